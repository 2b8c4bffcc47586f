"""Check the functions that a reader of the notebooks writes: `check(function)` says what is wrong, and gives a hint.

Each exercise compares with the packages, or with a law, on random inputs. Its known mistakes carry a hint of their own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import littlebit.reference as ref
import numpy as np
from littlebit.reference.svd import normalized, reflector

RNG = np.random.default_rng(7)
LIMIT = 1e-6  # relative error that is forgiven


class Exercise(NamedTuple):
    """Hold an exercise.

    Attributes
    ----------
    inputs : callable
        () -> the arguments of one trial.
    right : callable
        Computes the right result from the arguments.
    mistakes : sequence of (callable, hint)
        Computes what a known mistake would give.
    """

    inputs: Callable[[], tuple]
    right: Callable[..., Any]
    mistakes: Sequence[tuple[Callable[..., Any], str]]


def check(function: Callable[..., Any], trials: int = 5) -> None:
    """Try a function on random inputs and print whether it is right.

    Parameters
    ----------
    function : callable
        Named as the exercise.
    trials : int

    Raises
    ------
    AssertionError
        If a result is wrong; the message has a hint.
    KeyError
        If there is no exercise of that name.
    """
    name = function.__name__
    exercise = EXERCISES[name]
    for _ in range(trials):
        arguments = exercise.inputs()
        got, wanted = function(*arguments), exercise.right(*arguments)
        if got is None:
            print(f"{name}: not written yet")
            return
        if np.shape(got) != np.shape(wanted):
            raise AssertionError(f"{name}: the result must have the shape {np.shape(wanted)}, got {np.shape(got)}")
        if not close(got, wanted):
            hints = [hint for mistake, hint in exercise.mistakes if close(got, mistake(*arguments))]
            raise AssertionError(
                f"{name}: {hints[0] if hints else 'not yet right; try it on a case that you can count'}"
            )
    print(f"{name}: right, in {trials} trials")


def close(got: Any, wanted: Any) -> bool:
    """Say whether two results agree."""
    got, wanted = np.asarray(got, float), np.asarray(wanted, float)
    return got.shape == wanted.shape and bool(np.allclose(got, wanted, rtol=LIMIT, atol=LIMIT))


def matrix(rows: int = 12, columns: int = 9) -> np.ndarray:
    """Draw a matrix of Gaussian numbers."""
    return RNG.standard_normal((rows, columns))


def values(count: int = 10) -> np.ndarray:
    """Draw singular values: positive and descending."""
    return np.sort(RNG.uniform(0.1, 3, count))[::-1]


def sizes() -> tuple[int, int]:
    """Draw the sizes of a layer, multiples of 64."""
    return 64 * int(RNG.integers(4, 40)), 64 * int(RNG.integers(4, 40))


def signs(*shape: int) -> np.ndarray:
    """Draw signs."""
    return ref.sign(RNG.standard_normal(shape))


def path() -> tuple[np.ndarray, ...]:
    """Draw u, v, h, ell and g of a path."""
    return matrix(8, 3), matrix(6, 3), *(RNG.uniform(0.5, 1.5, n) for n in (8, 3, 6))


def flat(u: np.ndarray, v: np.ndarray, h: np.ndarray, ell: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Compute the product of the latents themselves."""
    return (h[:, None] * u * ell) @ (g[:, None] * v).T


def gradient_of_ell(x: np.ndarray, given: ref.Factors, dy: np.ndarray) -> np.ndarray:
    """Compute dell by the package."""
    return ref.linear_vjp(x, [given], dy)[1][0].ell


def word(bits: np.ndarray) -> int:
    """Read bits, the lowest first, as a number."""
    return int(bits @ 2 ** np.arange(len(bits)))


def bits_of(number: int, count: int) -> np.ndarray:
    """Write a number as bits, the lowest first."""
    return number >> np.arange(count) & 1


def table(x: np.ndarray) -> np.ndarray:
    """Compute the sixteen signed sums of four numbers."""
    return np.array([(1 - 2 * bits_of(code, 4)) @ x for code in range(16)])


def procrustes(z: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the rotation R for which z R is nearest to b."""
    p, _, qt = np.linalg.svd(b.T @ z)
    return (p @ qt).T


def pair() -> tuple[np.ndarray, np.ndarray]:
    """Draw factors and their signs after a rotation."""
    z = matrix(20, 4)
    return z, ref.sign(z @ np.linalg.qr(matrix(4, 4))[0])


def to_axis(x: np.ndarray, way: int) -> np.ndarray:
    """Compute x + way sign(x_0) ||x|| e_0."""
    return x + way * np.copysign(np.linalg.norm(x), x[0]) * (np.arange(len(x)) == 0)


def row_steps(w: np.ndarray, bits: int) -> np.ndarray:
    """Compute the absmax step of each row, (d_out, 1)."""
    return np.abs(w).max(1, keepdims=True) / (2 ** (bits - 1) - 1)


def flips(history: np.ndarray) -> np.ndarray:
    """Count the changes of sign of each column."""
    return (np.diff(ref.sign(history), axis=0) != 0).sum(0)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Compute the softmax of each row."""
    return np.exp(scores) / np.exp(scores).sum(1, keepdims=True)


EXERCISES = {
    # 01
    "error_after_cut": Exercise(
        lambda: (values(), int(RNG.integers(1, 9))),
        lambda s, rank: np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()),
        [
            (lambda s, rank: (s[rank:] ** 2).sum() / (s**2).sum(), "this is the share of the energy: take its root"),
            (lambda s, rank: np.sqrt((s[:rank] ** 2).sum() / (s**2).sum()), "these values are kept, not lost"),
            (lambda s, rank: s[rank:].sum() / s.sum(), "energies are squares of singular values"),
        ],
    ),
    "rank_in_16_bits": Exercise(
        lambda: (*sizes(), float(RNG.uniform(0.1, 2))),
        lambda d_out, d_in, bits: int(bits * d_out * d_in / (16 * (d_out + d_in))),
        [
            (
                lambda d_out, d_in, bits: bits * d_out * d_in / (16 * (d_out + d_in)),
                "a rank is a whole number: round down",
            ),
            (
                lambda d_out, d_in, bits: int(bits * d_out * d_in / (d_out + d_in)),
                "each number of a factor takes 16 bits",
            ),
        ],
    ),
    # 02
    "best_scale": Exercise(
        lambda: (matrix(),),
        lambda w: np.abs(w).mean(),
        [
            (
                lambda w: np.sqrt((w**2).mean()),
                "that keeps the energy; the error is smallest elsewhere: set its slope to 0",
            ),
            (lambda w: w.mean(), "the signs carry the signs: the scale is about sizes"),
        ],
    ),
    "energy_of_signs": Exercise(
        lambda: (matrix(),),
        lambda w: np.abs(w).mean() ** 2 / (w**2).mean(),
        [
            (lambda w: np.abs(w).mean() / np.sqrt((w**2).mean()), "energies are squares"),
            (lambda w: 1 - np.abs(w).mean() ** 2 / (w**2).mean(), "this is what is lost"),
        ],
    ),
    # 03
    "dense_of_path": Exercise(
        path,
        lambda u, v, h, ell, g: flat(ref.sign(u), ref.sign(v), h, ell, g),
        [
            (flat, "the format stores signs of u and v, not u and v"),
            (lambda u, v, h, ell, g: flat(ref.sign(u), ref.sign(v), h, 1 + 0 * ell, g), "where is ell?"),
        ],
    ),
    "law_of_two_signs": Exercise(
        lambda: (float(RNG.uniform(0, 1)),),
        lambda t: np.sqrt(t**2 + (1 - t**2) * (1 - 4 / np.pi**2)),
        [
            (lambda t: np.sqrt(t**2 + (1 - t**2) * (1 - 2 / np.pi)), "both factors lose their sizes: 2/pi twice"),
            (lambda t: t**2 + (1 - t**2) * (1 - 4 / np.pi**2), "this is the square of the error"),
        ],
    ),
    # 04
    "two_paths": Exercise(
        lambda: (matrix(), 2),
        lambda w, rank: sum(p.to_dense() for p in two(w, rank)),
        [
            (
                lambda w, rank: 2 * ref.dual_svid(w, rank).to_dense(),
                "the second path must see what the first one missed",
            ),
            (lambda w, rank: two(w, rank)[1].to_dense(), "this is the second path alone: add the first"),
        ],
    ),
    "share_of_scales": Exercise(
        lambda: (*sizes(), float(RNG.uniform(0.1, 1))),
        lambda d_out, d_in, bits: 16 * (d_out + d_in) / (bits * d_out * d_in),
        [(lambda d_out, d_in, bits: (d_out + d_in) / (bits * d_out * d_in), "a scale takes 16 bits")],
    ),
    # 05
    "count_path_bits": Exercise(
        lambda: (*sizes(), 32 * int(RNG.integers(1, 9))),
        lambda d_out, d_in, rank: rank * (d_out + d_in) + 16 * (d_out + d_in + rank),
        [
            (lambda d_out, d_in, rank: rank * (d_out + d_in), "scales are stored, too"),
            (
                lambda d_out, d_in, rank: rank * (d_out + d_in) + 16 * (d_out + d_in),
                "ell has scales as well, one for each rank",
            ),
        ],
    ),
    "rank_within": Exercise(
        lambda: (*sizes(), float(RNG.uniform(0.3, 1))),
        lambda d_out, d_in, bits: int((bits * d_out * d_in - 16 * (d_out + d_in)) // (d_out + d_in + 16)),
        [
            (lambda d_out, d_in, bits: int(bits * d_out * d_in // (d_out + d_in + 16)), "pay for h and g first"),
            (
                lambda d_out, d_in, bits: int((bits * d_out * d_in - 16 * (d_out + d_in)) // (d_out + d_in)),
                "a rank also takes 16 bits of ell",
            ),
        ],
    ),
    # 06
    "nearest_rotation": Exercise(
        pair,
        procrustes,
        [(lambda z, b: procrustes(z, b).T, "this turns the other way: transpose it")],
    ),
    "agreement": Exercise(
        lambda: (pair()[0], np.linalg.qr(matrix(4, 4))[0]),
        lambda z, rotation: np.abs(z @ rotation).sum(),
        [
            (lambda z, rotation: np.abs(z).sum(), "rotate first"),
            (lambda z, rotation: (z @ rotation).sum(), "signs agree with sizes: take them without signs"),
        ],
    ),
    # 07
    "slope_of_tanh": Exercise(
        lambda: (RNG.uniform(-0.05, 0.05, 8),),
        lambda x: ref.smooth_sign_vjp(x, np.ones_like(x)),
        [
            (lambda x: 1 - np.tanh(100 * x) ** 2, "the chain rule: the 100 inside comes out as a factor"),
            (lambda x: 100 * (1 - np.tanh(x) ** 2), "the argument is 100 x"),
        ],
    ),
    "gradient_of_scale": Exercise(
        lambda: (matrix(5, 6), ref.Factors(*path()), matrix(5, 8)),
        gradient_of_ell,
        [
            (
                lambda x, p, dy: (dy * p.h @ p.u_sign).sum(0),
                "this is dt: multiply by s, entry by entry, before the sum",
            )
        ],
    ),
    # 08
    "gradient_of_kl": Exercise(
        lambda: (matrix(6, 5), matrix(6, 5)),
        lambda student, teacher: ref.kl_loss_vjp(student, teacher),
        [
            (lambda student, teacher: -ref.kl_loss_vjp(student, teacher), "that climbs: it is q - p, student first"),
            (
                lambda student, teacher: len(student) * ref.kl_loss_vjp(student, teacher),
                "the loss is a mean over the rows",
            ),
        ],
    ),
    "flipped_share": Exercise(
        lambda: (matrix(), matrix()),
        lambda before, after: (ref.sign(before) != ref.sign(after)).mean(),
        [
            (lambda before, after: (ref.sign(before) == ref.sign(after)).mean(), "these are the signs that stayed"),
            (lambda before, after: (ref.sign(before) != ref.sign(after)).sum(), "a share, not a count"),
        ],
    ),
    # 09
    "pack_byte": Exercise(
        lambda: (signs(8),),
        lambda s: word(s < 0),
        [
            (lambda s: word(s > 0), "bit 1 stands for -1"),
            (lambda s: word((s < 0)[::-1]), "the first sign goes into the lowest bit"),
        ],
    ),
    "sum_with_signs": Exercise(
        lambda: (int(RNG.integers(0, 2**16)), matrix(1, 16)[0]),
        lambda code, x: (1 - 2 * bits_of(code, 16)) @ x,
        [
            (lambda code, x: -(1 - 2 * bits_of(code, 16)) @ x, "bit 1 stands for -1"),
            (lambda code, x: (1 - 2 * bits_of(code, 16)[::-1]) @ x, "the lowest bit belongs to the first entry"),
            (lambda code, x: bits_of(code, 16) @ x, "a 0 stands for +1: those entries count, too"),
        ],
    ),
    # 10
    "sixteen_sums": Exercise(
        lambda: (matrix(1, 4)[0],),
        table,
        [
            (lambda x: -table(x), "bit 1 stands for -1"),
            (lambda x: table(x[::-1]), "bit 0 of the code belongs to the first entry"),
        ],
    ),
    "look_up": Exercise(
        lambda: (RNG.integers(0, 16, (7, 5)), matrix(5, 16)),
        lambda codes, tables: tables[np.arange(5), codes].sum(axis=1),
        [(lambda codes, tables: tables[0][codes].sum(axis=1), "every group of four columns has a table of its own")],
    ),
    # 11
    "butterfly": Exercise(
        lambda: (matrix(1, 32)[0],),
        lambda lanes: np.full(32, lanes.sum()),
        [(lambda lanes: lanes, "no lane has met another yet: add what lane i ^ d holds, for d = 16, 8, 4, 2, 1")],
    ),
    "bit_planes": Exercise(
        lambda: (RNG.integers(-(2**7), 2**7, 12),),
        lambda q: np.array([(q + 128) >> p & 1 for p in range(8)]),
        [
            (lambda q: np.array([q >> p & 1 for p in range(8)]), "add 128 first: the entries must be positive"),
            (lambda q: np.array([(q + 128) >> p & 1 for p in range(8)][::-1]), "plane 0 holds the lowest bits"),
        ],
    ),
    # 12
    "mean_value": Exercise(
        lambda: (RNG.dirichlet(np.ones(7)), matrix(7, 3), matrix(5, 3)),
        lambda p, latents, up: up @ (p @ latents),
        [(lambda p, latents, up: up @ latents.mean(axis=0), "tokens count by their attention p")],
    ),
    "times_smaller": Exercise(
        lambda: (64 * int(RNG.integers(2, 65)), int(RNG.integers(16, 300))),
        lambda d_kv, rank: d_kv / rank,
        [(lambda d_kv, rank: rank / d_kv, "this is the share that is left")],
    ),
    # 13
    "perplexity_of": Exercise(
        lambda: (-RNG.uniform(0.1, 5, 20),),
        lambda log_p: np.exp(-log_p.mean()),
        [
            (lambda log_p: np.exp(log_p.mean()), "the sign: a likely text has a low perplexity"),
            (lambda log_p: np.exp(-log_p).mean(), "take the mean before the exponential"),
        ],
    ),
    "bits_per_parameter": Exercise(
        lambda: (int(RNG.integers(10**6, 10**8)), int(RNG.integers(10**7, 10**9))),
        lambda file_bytes, count: 8 * file_bytes / count,
        [(lambda file_bytes, count: file_bytes / count, "a byte has eight bits")],
    ),
    # 14
    "mirror_of": Exercise(
        lambda: (matrix(1, 6)[0],),
        lambda x: reflector(x),
        [
            (lambda x: -reflector(x), "the same mirror, seen from behind: let w point the way of x"),
            (lambda x: normalized(to_axis(x, -1)), "this mirror maps to the other end, and its first entry cancels"),
            (lambda x: to_axis(x, 1), "w must have length 1"),
        ],
    ),
    "cosine_with_signs": Exercise(
        lambda: (matrix(1, 7)[0],),
        lambda u: np.abs(u).sum() / np.sqrt(len(u) * (u @ u)),
        [
            (lambda u: np.abs(u).sum() / np.sqrt(u @ u), "divide by the length of the signs, too: the root of n"),
            (lambda u: np.abs(u).sum() ** 2 / (len(u) * (u @ u)), "this is its square, the energy kept"),
        ],
    ),
    # 15
    "flips_per_latent": Exercise(
        lambda: (matrix(20, 4),),
        flips,
        [
            (lambda history: 1.0 * (ref.sign(history[0]) != ref.sign(history[-1])), "count flips back, too"),
            (lambda history: flips(history) / (len(history) - 1), "a count, not a share"),
            (lambda history: flips(history).sum(), "one count for each latent"),
        ],
    ),
    "first_move": Exercise(
        lambda: (matrix(1, 6)[0] * 10.0 ** RNG.integers(-9, 1, 6), float(RNG.uniform(0.5, 1.5)), 1e-8),
        lambda grad, lr, eps: -lr * grad / (np.abs(grad) + eps),
        [
            (lambda grad, lr, eps: lr * grad / (np.abs(grad) + eps), "downhill: against the gradient"),
            (lambda grad, lr, eps: -lr * grad, "that is gradient descent: Adam divides by the root of its square"),
            (lambda grad, lr, eps: -lr * np.sign(grad), "nearly; but where the gradient is as small as eps?"),
        ],
    ),
    # 16
    "past_only": Exercise(
        lambda: (matrix(5, 5),),
        lambda scores: softmax(np.where(np.tri(5, dtype=bool), scores, -np.inf)),
        [
            (softmax, "a token must not see later ones"),
            (lambda scores: softmax(scores * np.tri(5)), "a score of 0 still counts, as e^0: use minus infinity"),
            (lambda scores: softmax(scores) * np.tri(5), "each row must add up to 1: leave out first, then divide"),
        ],
    ),
    "recipe_loss": Exercise(
        lambda: (float(RNG.uniform(0, 1)), matrix(3, 8), matrix(3, 8)),
        lambda kl, mine, theirs: kl + 10 * ((mine - theirs) ** 2).mean(1).sum(),
        [
            (lambda kl, mine, theirs: kl + ((mine - theirs) ** 2).mean(1).sum(), "the weight of the second term is 10"),
            (lambda kl, mine, theirs: kl + 10 * ((mine - theirs) ** 2).mean(), "a sum over blocks, not their mean"),
            (lambda kl, mine, theirs: kl + 10 * ((mine - theirs) ** 2).sum(), "a mean over the entries of a block"),
        ],
    ),
    # 17
    "absmax_codes": Exercise(
        lambda: (matrix(5, 9), int(RNG.integers(2, 9))),
        lambda w, bits: np.round(w / row_steps(w, bits)),
        [
            (lambda w, bits: np.round(w / row_steps(w, bits)) * row_steps(w, bits), "codes, not weights"),
            (lambda w, bits: np.round(w / row_steps(w, bits).max()), "each row has a step of its own"),
            (lambda w, bits: w / row_steps(w, bits), "codes are whole numbers"),
            (lambda w, bits: np.round(w * 2 ** (bits - 1) / np.abs(w).max(1)[:, None]), "the largest is 2^(b-1) - 1"),
        ],
    ),
    "pass_on": Exercise(
        lambda: (matrix(5, 4), matrix(1, 5)[0], RNG.uniform(0.5, 1.5, 5)),
        lambda rest, lost, row: rest - np.outer(lost / row[0], row[1:]),
        [
            (lambda rest, lost, row: rest + np.outer(lost / row[0], row[1:]), "this doubles the harm: mind the sign"),
            (lambda rest, lost, row: rest - np.outer(lost, row[1:]), "divide by the diagonal entry, row[0]"),
        ],
    ),
}


def two(weight: np.ndarray, rank: int) -> list[ref.Factors]:
    """Make a path, and a path of what it misses, as the paper does."""
    first = ref.dual_svid(weight, rank)
    return [first, ref.dual_svid(weight - first.to_dense(), rank)]
