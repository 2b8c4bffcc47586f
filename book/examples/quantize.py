"""Quantise the tiny model to 1.5 bits per weight, save it packed, load it again: a few seconds, without a network.

    python book/examples/quantize.py

Use "smollm2" in place of "tiny" for a real model (98 MB, fetched once), and 0.55 bits.
"""

import tempfile
from pathlib import Path

import littlebit.fast as lb
import torch

NAME, BITS = "tiny", 1.5

model, tokenizer = lb.load_model(NAME), lb.load_tokenizer(NAME)
text = (Path(lb.__file__).with_name("data") / "lincoln_1862.txt").read_text(encoding="utf-8")[:4000]
tokens = torch.tensor(tokenizer(text).input_ids)
print(f"original:  perplexity {lb.perplexity(model, tokens, window=128, progress=False).perplexity:.1f} of a byte")

results = lb.quantize_(model, lb.Config(bits=BITS, init="admm", paths=1), progress=False)  # in place
for name, layer in list(results.items())[:7]:
    print(f"{name:34} ranks {layer.ranks}  {layer.bits:.2f} bits  relative error {layer.error:.2f}")

with tempfile.TemporaryDirectory() as folder:
    lb.save(model, f"{folder}/out", tokenizer)
    print(f"stored:    {lb.info(f'{folder}/out')['bits_per_weight']:.2f} bits per weight, scales and padding included")
    packed = lb.load(f"{folder}/out")  # computes from the packed signs; no dense weight is made
    found = lb.perplexity(packed, tokens, window=128, progress=False).perplexity
    print(f"quantised: perplexity {found:.1f} of a byte before training; train.py brings it down")
