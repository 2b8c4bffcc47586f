"""Compute what results are compared with: in float64, by dense matrices, with the bound that rounding allows.

Each function here is a second statement of the method, written without `littlebit.reference`. Where a result is
rounded, the function also gives its magnitude: the same computation on absolute values. A sum of n products in a float
type with unit eps, in any order, is off by at most about n eps times its magnitude.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from littlebit.reference import Factors, Latents, PackedFactors

SLOPE_END = 3.5  # SmoothSign's slope is below 1e-300 from here on


class Bounded(NamedTuple):
    """Hold an exact result and what bounds the error of a computed one; see `compare.assert_within`."""

    value: np.ndarray
    magnitude: np.ndarray
    terms: int


def signs_of(latents: np.ndarray) -> np.ndarray:
    """Take signs in float64; zero counts as positive."""
    return np.where(latents < 0, -1.0, 1.0)


def width_of(count: int) -> int:
    """Return the bits of the narrowest words that hold a row of signs."""
    return 8 if count <= 8 else 16 if count <= 16 else 32


def pack(signs: np.ndarray) -> np.ndarray:
    """Pack the last axis of an array, sign by sign: bit j % w of word j // w is 1 if sign j is negative."""
    count = signs.shape[-1]
    width = width_of(count)
    words = np.zeros((*signs.shape[:-1], -(-count // width)), f"uint{width}")
    for j in range(count):
        bits = (signs[..., j] < 0).astype(words.dtype)
        words[..., j // width] |= bits << words.dtype.type(j % width)
    return words


def unpack(words: np.ndarray, count: int) -> np.ndarray:
    """Read `count` signs of each row of words, sign by sign, in float64."""
    words = words.view(f"u{words.itemsize}")
    width = 8 * words.itemsize
    columns = [words[..., j // width] >> words.dtype.type(j % width) & words.dtype.type(1) for j in range(count)]
    return 1.0 - 2.0 * np.stack(columns, axis=-1)


def factors_of(path: Factors | PackedFactors) -> Factors:
    """Return a path in float64 with its signs for latents."""
    if isinstance(path, PackedFactors):
        u, v = unpack(path.u_words, len(path.ell)), unpack(path.v_words, len(path.g)).T
    else:
        u, v = signs_of(path.u), signs_of(path.v)
    return Factors(u, v, *(scale.astype(np.float64) for scale in (path.h, path.ell, path.g)))


def absolute(path: Factors) -> Factors:
    """Replace signs by 1 and scales by their magnitudes."""
    return Factors(np.ones_like(path.u), np.ones_like(path.v), *map(np.abs, path[2:]))


def dense(path: Factors) -> np.ndarray:
    """Multiply a float64 path out: W_ij = h_i g_j sum_k u_ik ell_k v_jk."""
    return path.h[:, None] * ((path.u * path.ell) @ path.v.T) * path.g


def total(paths: Sequence[Factors]) -> np.ndarray:
    """Add up the dense weights of float64 paths."""
    return np.sum([dense(path) for path in paths], axis=0)


def dense_error(weight: np.ndarray, path: Factors) -> tuple[float, float]:
    """Compute the Frobenius norm of W - W_hat, and how far rounding in `path`'s own dtype may move it."""
    eps = np.finfo(path.ell.dtype).eps
    wide = factors_of(path)
    rounding = (len(path.ell) + 4 + weight.size / 2) * eps
    slack = rounding * (2 * frobenius(weight) + frobenius(dense(absolute(wide))))
    return frobenius(weight - dense(wide)), slack + weight.size * float(np.finfo(path.ell.dtype).smallest_subnormal)


def frobenius(matrix: np.ndarray) -> float:
    """Compute the Frobenius norm without overflow."""
    matrix = matrix.astype(np.float64)
    scale = np.abs(matrix).max(initial=0) or 1.0
    return float(np.sqrt(((matrix / scale) ** 2).sum()) * scale)


def linear(x: np.ndarray, paths: Sequence[Factors | PackedFactors], bias: np.ndarray | None = None) -> Bounded:
    """Compute the output of a layer by its dense weight, x W^T + bias."""
    wide = [factors_of(path) for path in paths]
    x = x.astype(np.float64)
    bias = np.zeros(len(wide[0].h)) if bias is None else bias.astype(np.float64)
    exact = x @ total(wide).T + bias
    magnitude = np.abs(x) @ total(list(map(absolute, wide))).T + np.abs(bias)
    return Bounded(exact, magnitude, 8 + len(wide) * max(len(path.g) + len(path.ell) for path in wide))


def rounded_in_16_bits(x: np.ndarray, paths: Sequence[Factors | PackedFactors], dtype: np.dtype) -> np.ndarray:
    """Bound what rounding A, A x, B and y = B (A x) to a 16-bit dtype adds to the error; zero for a wider dtype.

    A stacks [V_sign g]^T, B has [h U_sign ell] side by side. Each product of a sum sees these four roundings and no
    more, because the sums themselves are of float32. An entry below float16's normal numbers is off by half of the
    smallest one instead.
    """
    if dtype.itemsize > 2:
        return np.zeros(())
    limits = np.finfo(dtype)
    wide = [absolute(factors_of(path)) for path in paths]
    x, half = np.abs(x.astype(np.float64)), float(limits.smallest_normal) * float(limits.eps) / 2
    largest = max(1.0, *(float(path.h.max() * path.ell.max()) for path in wide))
    a = np.concatenate([path.g * np.ones((len(path.ell), 1)) for path in wide])  # (R, d_in)
    b = np.concatenate([np.outer(path.h, path.ell) for path in wide], axis=1)  # (d_out, R)
    t = x @ a.T
    off_b = b.sum(axis=1)  # of each output, if every entry of A x is off by one
    tiny = x.sum(axis=-1, keepdims=True) * off_b + off_b + largest * t.sum(axis=-1, keepdims=True) + largest
    return ((1 + float(limits.eps) / 2) ** 4 - 1) * (t @ b.T) + 1.1 * half * tiny


def slope(latents: np.ndarray, rule: str) -> np.ndarray:
    """Compute the slope of the function whose derivative stands for the sign's: tanh(100 x), or x between -1 and 1."""
    wide = np.abs(latents.astype(np.float64))
    if rule == "straight_through":
        return (wide < 1).astype(np.float64)
    return np.where(wide < SLOPE_END, 100 / np.cosh(100 * np.minimum(wide, SLOPE_END)) ** 2, 0)


def slope_error(latents: np.ndarray, rule: str) -> np.ndarray:
    """Count the roundings of a slope, relative to the slope: SmoothSign rounds z = 200 |x|, which moves exp(-z)."""
    wide = np.abs(latents.astype(np.float64))
    return np.ones(latents.shape) if rule == "straight_through" else 1 + 200 * np.minimum(wide, SLOPE_END)


def sign_vjp(latents: np.ndarray, grad: np.ndarray, rule: str) -> Bounded:
    """Compute the gradient of latents under a rule; where exp underflows it is off by 400 times the smallest normal."""
    limits, size = np.finfo(latents.dtype), np.abs(grad.astype(np.float64))
    by_slope = slope(latents, rule)
    magnitude = size * (by_slope * slope_error(latents, rule) + 400 * float(limits.tiny) / float(limits.eps))
    return Bounded(grad * by_slope, magnitude, 8)


def linear_vjp(x: np.ndarray, paths: Sequence[Factors], grad: np.ndarray, rule: str) -> dict[str, list[Bounded]]:
    """Compute all gradients of a layer from the one of its dense weight, dL/dW = grad^T x.

    W_ij = h_i g_j sum_k u_ik ell_k v_jk, so dL/dh_i = sum_j dL/dW_ij W_ij / h_i, and so on.

    Returns
    -------
    dict
        x, bias, and one entry for each path in u, v, h, ell and g.
    """
    rows = [x.reshape(-1, x.shape[-1]).astype(np.float64), grad.reshape(-1, grad.shape[-1]).astype(np.float64)]
    wide = [factors_of(path) for path in paths]
    terms = 16 + x.shape[-1] + grad.shape[-1] + len(rows[0]) + sum(len(path.ell) for path in wide)
    exact = gradients_of(rows[0], rows[1], wide)
    sizes = gradients_of(np.abs(rows[0]), np.abs(rows[1]), [absolute(path) for path in wide])
    for at, path in enumerate(paths):
        for name, latents in (("u", path.u), ("v", path.v)):
            exact[name][at] = exact[name][at] * slope(latents, rule)
            sizes[name][at] = sizes[name][at] * slope(latents, rule) * slope_error(latents, rule)
    exact["x"][0], sizes["x"][0] = (each["x"][0].reshape(x.shape) for each in (exact, sizes))
    return {
        name: [Bounded(value, size, terms) for value, size in zip(values, sizes[name], strict=True)]
        for name, values in exact.items()
    }


def gradients_of(x: np.ndarray, dy: np.ndarray, paths: Sequence[Factors]) -> dict[str, list[np.ndarray]]:
    """Compute the gradients of x, bias, signs and scales for rows x (n, d_in) and dy (n, d_out)."""
    dw = dy.T @ x  # (d_out, d_in)
    found: dict[str, list[np.ndarray]] = {"x": [dy @ total(paths)], "bias": [dy.sum(axis=0)]}
    for u, v, h, ell, g in paths:
        inside = (u * ell) @ v.T  # (d_out, d_in)
        scaled = h[:, None] * dw * g
        found.setdefault("u", []).append(scaled @ v * ell)
        found.setdefault("v", []).append(scaled.T @ u * ell)
        found.setdefault("h", []).append((dw * g * inside).sum(axis=1))
        found.setdefault("ell", []).append(((scaled @ v) * u).sum(axis=0))
        found.setdefault("g", []).append((dw * h[:, None] * inside).sum(axis=0))
    return found


def dual_svid(weight: np.ndarray, rank: int) -> Factors:
    """Factorize a weight by three SVDs of LAPACK: of the weight, and of the magnitudes of its two factors."""
    left, s, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:rank])
    u, v = left[:, :rank] * root, right[:rank].T * root
    (h, ell_u), (g, ell_v) = (rank_one(np.abs(factor)) for factor in (u, v))
    return Factors(u, v, h, ell_u * ell_v, g)


def rank_one(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the best rank-one approximation of a non-negative matrix, in two vectors of equal norm."""
    left, s, right = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(s[0])
    return np.abs(left[:, 0]) * root, np.abs(right[0]) * root


def down_and_up(paths: Sequence[PackedFactors]) -> tuple[np.ndarray, np.ndarray]:
    """Split a layer in two: A = [ell V_sign^T g], (R, d_in), and B = [h U_sign], (d_out, R), in float64."""
    wide = [factors_of(path) for path in paths]
    a = np.concatenate([(path.g[:, None] * path.v * path.ell).T for path in wide])
    return a, np.concatenate([path.h[:, None] * path.u for path in wide], axis=1)


class Attention(NamedTuple):
    """Hold the inputs of one attention over a latent cache; x are the inputs of k_proj and v_proj."""

    x: np.ndarray  # (tokens, d_in)
    query: np.ndarray  # (heads, queries, size)
    key_paths: list[PackedFactors]
    value_paths: list[PackedFactors]
    biases: list[np.ndarray | None]
    turn: tuple[np.ndarray, np.ndarray]  # cosine and sine, (tokens, size / 2)
    mask: np.ndarray  # (queries, tokens)


def latent_error(x: np.ndarray, a: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute latents in float64, their magnitude, and how far stored ones may be from them."""
    eps = float(np.finfo(np.float32).eps)
    t, magnitude = x.astype(np.float64) @ a.T, np.abs(x).astype(np.float64) @ np.abs(a).T
    error = 2 * (a.shape[1] + 4) * eps * magnitude
    largest = (np.abs(t) + error).max(axis=1, keepdims=True)
    rounding = {
        "float32": 0,
        "float16": (np.abs(t) + error) * 2.0**-11 + largest * 2.0**-25,
        "int8": largest / 254,
    }[dtype]
    return t, magnitude, error + rounding * (1 + 8 * eps) + 4 * eps * magnitude


def attention(case: Attention, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Compute attention with whole keys and values in float64, and how far one over stored latents may be from it.

    Score errors of at most d change each weight by a factor of at most exp(2 d).
    """
    eps = float(np.finfo(np.float32).eps)
    (a_k, b_k), (a_v, b_v) = map(down_and_up, (case.key_paths, case.value_paths))
    (t_k, size_k, error_k), (t_v, size_v, error_v) = (latent_error(case.x, a, dtype) for a in (a_k, a_v))
    heads, _, size = case.query.shape
    group = heads // (len(b_k) // size)
    biases = [np.zeros(len(b_k)) if each is None else each.astype(np.float64) for each in case.biases]
    keys, values = t_k @ b_k.T + biases[0], t_v @ b_v.T + biases[1]
    cosine, sine = (each.astype(np.float64) for each in case.turn)
    outputs, bounds = [], []
    for head in range(heads):
        mine = slice(head // group * size, (head // group + 1) * size)
        q = size**-0.5 * case.query[head].astype(np.float64)
        scores = q @ turned(keys[:, mine], cosine, sine).T
        size_of_keys = size_k @ np.abs(b_k[mine]).T + np.abs(biases[0][mine])
        score_error = np.abs(q) @ turned_magnitude(error_k @ np.abs(b_k[mine]).T, cosine, sine).T
        score_size = np.abs(q) @ turned_magnitude(size_of_keys, cosine, sine).T
        score_error += 2 * (b_k.shape[1] + size + 12) * eps * score_size
        scores = np.where(case.mask, scores, -np.inf)
        blind = np.asarray(~case.mask.any(axis=1))
        scores[blind], score_error[blind] = 0, 0
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        d = np.where(case.mask | blind[:, None], score_error, 0).max(axis=1, keepdims=True)
        size_of_values = size_v @ np.abs(b_v[mine]).T + np.abs(biases[1][mine])
        value_error = error_v @ np.abs(b_v[mine]).T
        rounding = 2 * (b_v.shape[1] + len(case.x) + 16) * eps
        outputs.append(weights @ values[:, mine])
        bounds.append(
            np.expm1(2 * d) * (weights @ size_of_values)
            + np.exp(2 * d) * (weights @ (value_error + rounding * size_of_values))
        )
    return np.stack(outputs), np.stack(bounds)


def turned(rows: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
    """Apply the rotary embedding by multiplication of complex numbers."""
    low, high = np.split(rows, 2, axis=1)
    whole = (low + 1j * high) * (cosine + 1j * sine)
    return np.concatenate([whole.real, whole.imag], axis=1)


def turned_magnitude(rows: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
    """Compute the rotary embedding on absolute values."""
    low, high = np.split(np.abs(rows), 2, axis=1)
    c, s = np.abs(cosine), np.abs(sine)
    return np.concatenate([low * c + high * s, high * c + low * s], axis=1)


def latent_values(stored: Latents) -> np.ndarray:
    """Return stored latents in float64, codes * scale."""
    return stored.codes.astype(np.float64) * stored.scale.astype(np.float64)
