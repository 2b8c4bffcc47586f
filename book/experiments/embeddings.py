"""Measure the perplexity that 8- and 4-bit embeddings cost SmolLM2, dense and at 0.55 bits.

    python book/experiments/embeddings.py OUT.json [--text more.txt] [--windows 8]

Nothing but embedding and head changes from row to row. 4 bits are calibrated on the shipped training text; perplexity
is measured on the shipped evaluation text and on --text.
"""

import argparse
import copy
import json
from pathlib import Path

import littlebit.fast as lb
import torch
from littlebit.fast.bench.timing import cpu_name, save_results
from littlebit.fast.checkpoints.texts import text_tokens
from littlebit.fast.evaluation.perplexity import SAMPLE_TEXT, TRAINING_TEXT
from littlebit.fast.models.embeddings import quantize_embeddings_

CALIBRATION_TOKENS = 8192


def main() -> None:
    """Measure all rows and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--windows", type=int, default=8, help="of 2048 tokens, from the beginning of each text")
    arguments = parser.parse_args()
    tokenizer = lb.load_tokenizer("smollm2")
    calibration = text_tokens(tokenizer, TRAINING_TEXT)[:CALIBRATION_TOKENS]
    texts = {path.name: text_tokens(tokenizer, path) for path in [SAMPLE_TEXT, *arguments.text]}
    rows = []
    for name, model in (("smollm2", lb.load_model("smollm2")), ("smollm2-0.55bit", lb.load("smollm2-0.55bit"))):
        before: dict[str, float] = {}
        for bits in (16, 8, 4):
            small = copy.deepcopy(model)
            quantize_embeddings_(small, bits, calibration)
            head = small.get_output_embeddings()
            stored = 16.0
            if bits < 16:
                table = head.table
                stored = 8 * sum(each.nbytes for each in table.buffers()) / (len(table.codes) * table.size)
            row = {"model": name, "embedding_bits": bits, "stored_bits_per_entry": stored}
            for text, tokens in texts.items():
                with torch.inference_mode():
                    found = lb.perplexity(small, tokens, max_windows=arguments.windows, progress=False)
                cost = found.perplexity / before.setdefault(text, found.perplexity) - 1
                row[text] = {"perplexity": found.perplexity, "scored": found.scored, "cost": cost}
            rows.append(row)
            print(json.dumps(row), flush=True)
    command = f"python book/experiments/embeddings.py {arguments.out} --windows {arguments.windows}"
    command += "".join(f" --text {path.name}" for path in arguments.text)
    save_results(arguments.out, rows, command, cpu_name())


if __name__ == "__main__":
    main()
