"""Print a model's answer while it decodes; without arguments the tiny model continues one prompt, offline.

    python book/examples/chat.py                                         # one prompt
    python book/examples/chat.py smollm2-0.55bit                         # questions and answers, until an empty line

The second fetches SmolLM2-135M-Instruct once (98 MB), and puts each question into its chat template.
"""

import sys

import littlebit.fast as lb
from littlebit.fast.decoding.generate import stream

SETTINGS = {"max_new_tokens": 80, "temperature": 0.6, "top_p": 0.8, "seed": 3}
PROMPT = "In the beginning of the"


def show(pieces) -> None:
    """Print pieces of text as they come, then end the line."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if len(sys.argv) > 1:
    model = lb.load(sys.argv[1])  # packed
    while question := input("> "):
        show(stream(model, question, chat=True, **SETTINGS))
else:
    print(PROMPT, end="")
    show(stream(lb.load_model("tiny"), PROMPT, tokenizer=lb.load_tokenizer("tiny"), **SETTINGS))
