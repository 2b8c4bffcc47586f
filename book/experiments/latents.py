"""Measure which latents move: start, rule of the sign's gradient and Adam's eps, in a small network.

    python book/experiments/latents.py book/results/latents.json

The network reads eight characters of a text and predicts the ninth (notebook 08), in float64. Every student has one
path of the same ranks in each layer, at most one bit per weight, and learns the teacher's distribution for 700 steps
at 2e-3 and 300 at 2e-4. Six minutes on one core.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import littlebit.fast
import littlebit.reference as ref
import numpy as np
from littlebit.fast.bench.timing import cpu_name, save_results
from littlebit.notebooks.littlebit_from_zero import ALPHABET, CONTEXT, examples
from littlebit.reference.train import cross_entropy, dense_parameters, parameters, with_parameters

TEXT = Path(littlebit.fast.__file__).with_name("data") / "lincoln_1862.txt"
WIDTHS = (CONTEXT * len(ALPHABET), 128, 128, len(ALPHABET))
HELD_OUT, BATCH, STEPS = 2048, 256, 1000
BINS = (0, 0.02, 0.05, 0.08, 0.12, 0.3, np.inf)


def random_factors(weight: np.ndarray, rank: int) -> ref.Factors:
    """Draw latents as large as Dual-SVID's, and take scales that give the product the weight's norm."""
    rng, start = np.random.default_rng(2), ref.dual_svid(weight, rank)
    u, v = (rng.normal(0, np.sqrt((latent**2).mean()), latent.shape) for latent in (start.u, start.v))
    factors = ref.Factors(u, v, np.ones(len(u)), np.ones(rank), np.ones(len(v)))
    return factors._replace(ell=factors.ell * np.linalg.norm(weight) / np.linalg.norm(factors.to_dense()))


STARTS = {"random": random_factors, "dual-svid": ref.dual_svid, "admm": ref.admm}


def train_teacher(x: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> list[ref.Dense]:
    """Train a dense network on the text."""
    pairs = pairwise(WIDTHS)
    teacher = [ref.Dense(rng.normal(0, np.sqrt(2 / d_in), (d_out, d_in)), np.zeros(d_out)) for d_in, d_out in pairs]
    state = ref.adam_start(dense_parameters(teacher))
    for step in range(1200):
        chosen = rng.integers(0, len(x), BATCH)
        teacher, state, _ = ref.dense_step(teacher, x[chosen], targets[chosen], state, 1e-3 if step < 800 else 1e-4)
    return teacher


def train(start: list[ref.Layer], batches: list, rule: str, eps: float) -> list[ref.Layer]:
    """Take a step of Adam for each batch."""
    layers, state = start, ref.adam_start(parameters(start))
    for step, (x, wanted) in enumerate(batches):
        _, grads = ref.mlp_vjp(x, layers, ref.kl_loss_vjp(ref.mlp(x, layers), wanted), rule)
        rate = 2e-3 if step < 0.7 * STEPS else 2e-4
        values, state = ref.adam_step(parameters(layers), parameters(grads), state, rate, eps=eps)
        layers = with_parameters(layers, values)
    return layers


def movements(start: list[ref.Layer], end: list[ref.Layer]) -> list[dict]:
    """Median movement and share of flipped signs of the first layer's latents, by the size that they start with."""
    before, after = (np.concatenate([p.u.ravel(), p.v.ravel()]) for p in (start[0].paths[0], end[0].paths[0]))
    found = []
    for low, high in pairwise(BINS):
        mine = (low <= np.abs(before)) & (np.abs(before) < high)
        if mine.any():
            moved = np.median(np.abs(after - before)[mine])
            flipped = (ref.sign(after) != ref.sign(before))[mine].mean()
            sizes = {"from": low, "to": None if np.isinf(high) else high, "share": float(mine.mean())}
            found.append(sizes | {"median_move": float(moved), "flipped": float(flipped)})
    return found


def main() -> None:
    """Train every student and save the rows after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out, rng = parser.parse_args().out, np.random.default_rng(0)
    x, ones = examples(TEXT.read_text(encoding="utf-8"))
    targets = ones.argmax(axis=1)
    test, wanted, last = x[-HELD_OUT:], targets[-HELD_OUT:], len(x) - HELD_OUT - CONTEXT
    x, targets = x[:last], targets[:last]
    teacher = train_teacher(x, targets, rng)
    test_logits = ref.dense_mlp(test, teacher)
    chosen = rng.integers(0, len(x), (STEPS, BATCH))
    batches = [(x[each], ref.dense_mlp(x[each], teacher)) for each in chosen]
    rows = [{"what": "teacher", "cross_entropy": float(cross_entropy(test_logits, wanted))}]
    cases = [(start, rule, 1e-8) for start in STARTS for rule in ref.RULES]
    cases += [("dual-svid", "smooth_sign", eps) for eps in (1e-4, 1e-14)]
    for init, rule, eps in cases:
        ranks = [ref.rank_for_bits(*layer.weight.shape, 1.0, paths=1) for layer in teacher]
        start = [ref.Layer([STARTS[init](each.weight, r)], each.bias) for each, r in zip(teacher, ranks, strict=True)]
        end = train(start, batches, rule, eps)
        row = {
            "name": f"{init}, {rule}, eps {eps:g}",
            "what": "student",
            "init": init,
            "rule": rule,
            "eps": eps,
            "steps": STEPS,
        }
        for name, layers in ("kl_start", start), ("kl_end", end):
            row[name] = float(ref.kl_loss(ref.mlp(test, layers), test_logits))
        rows.append(row | {"latents": movements(start, end)})
        print(rows[-1], flush=True)
        save_results(out, rows, "python book/experiments/latents.py book/results/latents.json", cpu_name())


if __name__ == "__main__":
    main()
