"""Generate text and compute random packed layers for a long time, and check that memory and results stay the same.

Run `make soak BUDGET=seconds`. In each round, a quantized model continues a prompt, greedily or by sampling, with one
of the key-value caches; greedy text must equal the first round's. Packed layers of random shapes, ranks, dtypes and
batch sizes must stay within the rounding bound, and give the same result twice. Between the first tenth of the time and
the end, resident memory may grow by 1 %.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time

import littlebit.fast as lb
import torch
from fuzz import held
from littlebit.fast.bench.linear import random_path
from littlebit.fast.kernels.unpacked import unpacked
from littlebit.fast.models.layers import PackedLinear

SHAPES = 10_000
LARGEST = 400  # largest d_out and d_in of a random layer
GROWTH = 0.01  # of resident memory
SHORT_S, SHORT_GROWTH = 600, 0.05  # In shorter runs, allocators still fill their pools.
PROMPTS = ("It was the best of times", "Four score and seven years ago", "x", "The whale, the whale!")
CACHES = ("full", "latent", "latent-int8")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class DriftError(AssertionError):
    """Report a result that changed, or that is outside the rounding bound."""


def check_layer(generator, seed):
    """Compute a random packed layer twice, and compare it with float64."""

    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    d_out, d_in, count = integer(1, LARGEST), integer(1, LARGEST), integer(1, 2)
    paths = [random_path(d_out, d_in, integer(1, min(d_out, d_in)), generator) for _ in range(count)]
    x = torch.randn(integer(1, 9), d_in, generator=generator).to(DTYPES[integer(0, len(DTYPES) - 1)])
    packed = PackedLinear(paths)
    with torch.inference_mode():
        y, again = packed(x), packed(x)
    a, b = (factor.double() for factor in unpacked(paths))
    exact, size = x.double() @ a.T @ b.T, x.double().abs() @ a.abs().T @ b.abs().T
    # One rounding for each term of each sum, then the rounding of the result to its dtype
    bound = 2 * (d_in + sum(path.rank for path in paths) + 8) * torch.finfo(torch.float32).eps * size
    bound += torch.finfo(y.dtype).eps * exact.abs() + torch.finfo(y.dtype).tiny
    if not torch.equal(y, again) or not ((y.double() - exact).abs() <= bound).all():
        raise DriftError(f"layer {seed}: {d_out} x {d_in}, ranks {packed.ranks}, {x.dtype}")


def check_text(model, tokenizer, known, at):
    """Continue a prompt, and compare greedy text with the first one for that prompt and cache; return its tokens."""
    prompt, cache = PROMPTS[at % len(PROMPTS)], CACHES[at // len(PROMPTS) % len(CACHES)]
    temperature = float(at // len(PROMPTS) // len(CACHES) % 2)
    text = lb.generate(model, prompt, 32, temperature, seed=at, tokenizer=tokenizer, kv_cache=cache)
    first = known.setdefault((prompt, cache, temperature), (at, text))
    if temperature == 0 and text != first[1]:
        raise DriftError(f"{prompt!r} with the {cache} cache gives another text than in round {first[0]}")
    return 32


def soak(folder, budget, shapes, seed=0):
    """Run rounds until the budget is spent; return the counts and the memory's growth."""
    model = lb.load_model("tiny")
    lb.quantize_(model, lb.Config(bits=1.5, paths=1), progress=False)
    tokenizer = lb.load_tokenizer("tiny")
    model = lb.load(lb.save(model, f"{folder}/out", tokenizer))
    generator, known, samples = torch.Generator().manual_seed(seed), {}, []
    begin, rounds, tokens, layers = time.monotonic(), 0, 0, 0
    while (spent := time.monotonic() - begin) < budget:
        tokens += check_text(model, tokenizer, known, rounds)
        rounds += 1
        while layers < shapes and layers < shapes * spent / (0.9 * budget):  # none in the last tenth of the time
            check_layer(generator, layers)
            layers += 1
        if len(samples) < 100 * spent / budget:
            gc.collect()
            samples.append(held("VmRSS"))
    first, last = statistics.median(samples[10:15]), statistics.median(samples[-5:])
    return {
        "seconds": round(budget),
        "rounds": rounds,
        "tokens": tokens,
        "shapes": layers,
        "resident_bytes_first": int(first),
        "resident_bytes_last": int(last),
        "growth": last / first - 1,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=60, help="seconds")
    parser.add_argument("--shapes", type=int, default=SHAPES, help="random shapes of layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="record this run in book/results/reliability.json")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    with tempfile.TemporaryDirectory() as folder:
        found = soak(folder, arguments.budget, arguments.shapes, arguments.seed)
    print(json.dumps(found, indent=1))
    if arguments.save:
        from record import record

        record("soak", found)
    if found["growth"] > (GROWTH if arguments.budget >= SHORT_S else SHORT_GROWTH):
        sys.exit(f"memory grew by {found['growth']:.1%} after the first tenth")


if __name__ == "__main__":
    main()
