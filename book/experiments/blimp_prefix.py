r"""Measure BLiMP after two different first tokens: the beginning of a chat's turn, and the beginning of a text.

    python book/experiments/blimp_prefix.py book/results/blimp_prefix.json --blimp blimp.zip

The tokenizer of SmolLM2-Instruct has <|im_start|> as its BOS token, which the task puts before each sentence. In a chat
the name of a speaker follows it. A text of its pretraining followed <|endoftext|>.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from littlebit.fast import load, load_model, load_tokenizer
from littlebit.fast.bench.timing import device_name, save_results
from littlebit.fast.evaluation.zero_shot import blimp

ORIGINAL = "smollm2"
PREFIXES = ("<|im_start|>", "<|endoftext|>")


def main() -> None:
    """Measure every model after every prefix; save the rows after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--blimp", type=Path, required=True, help="BLiMP's archive")
    parser.add_argument("--models", nargs="+", default=[ORIGINAL, "smollm2-1bit"])
    parser.add_argument("--items", type=int, help="pairs of each paradigm; all without it")
    parser.add_argument("--batch", type=int, help="tokens to read at once")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    tokenizer, rows = load_tokenizer(ORIGINAL), []
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
    for name in arguments.models:
        model: Any = (load_model if name == ORIGINAL else load)(name, arguments.device)
        for prefix in PREFIXES:
            tokenizer.bos_token = prefix
            found = blimp(model, tokenizer, arguments.blimp, arguments.items, arguments.batch, progress=False)
            rows.append({"name": name, "prefix": prefix, "accuracy": found.accuracy, "pairs": found.pairs})
            print(rows[-1], flush=True)
            save_results(arguments.out, rows, shlex.join(["python", *words]), device_name(arguments.device))


if __name__ == "__main__":
    main()
