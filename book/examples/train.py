"""Quantise the tiny model to 1.5 bits and train it against the original: some ten seconds on one core, offline.

python book/examples/train.py
"""

from pathlib import Path

import littlebit.fast as lb
import torch

PROMPT = "It is the duty of the"

teacher, model, tokenizer = lb.load_model("tiny"), lb.load_model("tiny"), lb.load_tokenizer("tiny")
data = Path(lb.__file__).with_name("data")
train_text, test_text = (
    torch.tensor(tokenizer((data / name).read_text(encoding="utf-8")).input_ids)
    for name in ("roosevelt_1901.txt", "lincoln_1862.txt")
)


def report(stage: str, measured: torch.nn.Module) -> None:
    """Print the perplexity on text that is not trained on, and a sample."""
    score = lb.perplexity(measured, test_text[:8192], window=128, progress=False)
    text = lb.generate(measured, PROMPT, tokenizer=tokenizer, max_new_tokens=60)
    print(f"{stage:9} perplexity {score.perplexity:5.1f}   {PROMPT}{text!r}")


report("original", teacher)
lb.quantize_(model, lb.Config(bits=1.5, init="admm", paths=1), progress=False)
report("untrained", model)
config = lb.TrainConfig(total_tokens=65_536, sequence_length=128, batch_size=8)
log = lb.train_(model, teacher, [train_text], config, progress=False)  # in place
report("trained", model)
print(f"loss: {log[0]['loss']:.2f} nats in the first steps, {log[-1]['loss']:.2f} in the last")
