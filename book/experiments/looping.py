"""Count how many short questions each model answers by repeating itself, and write book/results/looping.json.

    python book/experiments/looping.py book/results/looping.json

Every question of QUESTIONS is asked in the chat template, in the compiled CPU decoder. An answer loops if one of
its 4-grams of tokens occurs REPEATS times or more. The first answers are greedy. The second ones have the settings of
SAMPLED, because greedy text of a small model repeats itself more.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from littlebit.fast.bench.timing import cpu_name, save_results
from littlebit.fast.checkpoints.fetch import resolve
from littlebit.fast.checkpoints.names import bundled_names
from littlebit.fast.decoding.generate import prompt_tokens, stream_tokens
from littlebit.fast.decoding.mapped_weights import map_model
from littlebit.fast.decoding.tokenizer import Tokenizer
from littlebit.fast.models.generation_settings import GenerationConfig

NEW_TOKENS = 128
REPEATS = 8
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.1, "seed": 0}
QUESTIONS = """\
What is the capital of France?
Why is the sky blue?
How do I boil an egg?
Who wrote Romeo and Juliet?
What does a heart do?
Name three fruits that are red.
How many days are in a year?
What is the largest ocean?
Tell me a short story about a dog.
Why do leaves fall in autumn?
What is gravity?
How do birds fly?
Give me a tip for sleeping well.
What is the difference between a lake and a river?
Who was the first person on the moon?
How does a bicycle stay upright?
What should I pack for a day at the beach?
Explain what a computer program is.
What is seven times eight?
Describe a thunderstorm.
How is bread made?
What language do people speak in Brazil?
Why do we need water?
Write two sentences about winter.
What is a good name for a cat?
How can I learn to swim?
What does a teacher do?
Which planet is closest to the sun?
How do plants make food?
What is a volcano?
Give me an idea for dinner.
Why do people dream?
What is the boiling point of water?
How do I write a thank-you letter?
What colours make green?
What is the tallest animal?
How does a train move?
What is democracy?
Tell me a fact about the moon.
How do I look after a houseplant?
What is the purpose of a bridge?
Who painted the Mona Lisa?
What can I do on a rainy day?
Why is exercise healthy?
How far away is the sun?
What is a metaphor?
How do I say hello in Spanish?
What happens when ice melts?
Why do cats purr?
What is the best way to save money?
""".splitlines()


def main(out: Path) -> None:
    """Ask all models, and write how many of their answers loop."""
    rows = []
    for name in ("smollm2", *bundled_names()):
        folder = resolve(name)
        model, tokenizer = map_model(folder), Tokenizer(folder)
        for kind, settings in (("greedy", GREEDY), ("sampled", SAMPLED)):
            config = GenerationConfig(max_new_tokens=NEW_TOKENS, **settings)
            answers = [
                list(stream_tokens(model, prompt_tokens(tokenizer, question, True), config)) for question in QUESTIONS
            ]
            rows.append(
                {
                    "model": name,
                    "decoding": kind,
                    "settings": settings,
                    "questions": len(answers),
                    "looping": sum(loops(answer) for answer in answers),
                    "mean_tokens": sum(map(len, answers)) / len(answers),
                    "example": tokenizer.decode(answers[0], skip_special_tokens=True),
                }
            )
            print(rows[-1], flush=True)
            save_results(out, rows, f"python book/experiments/looping.py {out}", cpu_name())


def loops(tokens: Sequence[int]) -> bool:
    """Tell whether a 4-gram of tokens occurs REPEATS times or more."""
    grams = Counter(zip(*(tokens[at:] for at in range(4)), strict=False))
    return max(grams.values(), default=0) >= REPEATS


if __name__ == "__main__":
    main(Path(sys.argv[1]))
