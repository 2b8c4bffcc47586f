"""LittleBit from zero: train a layer, squeeze it below one bit per weight, train it again, compute from packed bits.

One file, NumPy alone, under a minute: python littlebit_from_zero.py [TEXT FILE]

A small network reads eight characters and predicts the ninth. Its large matrix W (256 x 224) is decomposed (SVD),
turned into signs and scales (Dual-SVID), given a second path (residual), trained with the straight-through rule (QAT)
and packed, one bit a sign. The layer that computes from the packed bytes equals the trained layer to the last bit.
"""

import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

TEXT = " ".join(topics.values())[:50_000]  # of the Python language reference, which every Python brings along
ALPHABET = " .abcdefghijklmnopqrstuvwxyz"
CONTEXT, HIDDEN, RANK, BATCH, HELD_OUT = 8, 256, 32, 128, 1000
half = lambda x: x.astype(np.float16).astype(float)


class Factors(NamedTuple):
    """Hold a path, W ~ diag(h) sign(u) diag(ell) sign(v)^T diag(g). Signs are stored; training moves u and v."""

    u: np.ndarray  # (d_out, rank) latents
    v: np.ndarray  # (d_in, rank) latents
    h: np.ndarray  # (d_out,) row scales
    ell: np.ndarray  # (rank,) latent scales
    g: np.ndarray  # (d_in,) column scales

    def dense(self):
        return (self.h[:, None] * sign(self.u) * self.ell) @ (self.g[:, None] * sign(self.v)).T


def sign(x):
    return np.where(x < 0, -1.0, 1.0)  # the sign of 0 is +1, so one bit is enough


def svd(a):
    """1. Decompose a = u diag(s) v^T: rotate columns in pairs until all are orthogonal (Jacobi; rows >= columns)."""
    columns, v, rotated = a.T.copy(), np.eye(a.shape[1]), True  # stored as rows, which are contiguous
    while rotated:
        rotated = False
        for p, q in zip(*np.triu_indices(len(columns), 1), strict=True):
            alpha, beta, gamma = columns[p] @ columns[p], columns[q] @ columns[q], columns[p] @ columns[q]
            if abs(gamma) > 1e-14 * np.sqrt(alpha * beta):
                zeta = (beta - alpha) / (2 * gamma)
                tangent = np.copysign(1, zeta) / (abs(zeta) + np.hypot(1, zeta))
                turn = np.array([[1, -tangent], [tangent, 1]]) / np.hypot(1, tangent)
                columns[[p, q]], v[[p, q]], rotated = turn @ columns[[p, q]], turn @ v[[p, q]], True
    s = np.sqrt((columns**2).sum(axis=1))
    order = np.argsort(-s)
    return (columns[order] / np.where(s[order] == 0, 1, s[order])[:, None]).T, s[order], v[order].T


def rank_one(a):
    """Find the best row column^T for a matrix without negative entries, by power iteration."""
    column = a.sum(axis=0)
    for _ in range(100):
        column = a.T @ (a @ column)
        column = column / np.sqrt(column @ column)
    row = a @ column
    root = np.sqrt(np.sqrt(row @ row))  # half of the size on each side
    return row / root, column * root


def dual_svid(w, rank):
    """2. Take the signs of both factors of the truncated SVD, and the scales that fit their sizes best."""
    left, s, right = svd(w)
    u, v = left[:, :rank] * np.sqrt(s[:rank]), right[:, :rank] * np.sqrt(s[:rank])
    (h, ell_u), (g, ell_v) = rank_one(abs(u)), rank_one(abs(v))
    return Factors(u, v, h, ell_u * ell_v, g)


def compensate(w, ranks):
    """3. Give what one path misses, the residual, to the next path."""
    paths = []
    for rank in ranks:
        path = dual_svid(w, rank)
        dense = path.dense()
        step = (w * dense).sum() / (dense * dense).sum()  # the best length; the paper takes 1
        paths.append(path._replace(ell=step * path.ell))
        w = w - step * dense
    return paths


def linear(x, paths):
    return sum(((x * p.g) @ sign(p.v) * p.ell) @ sign(p.u).T * p.h for p in paths)


def linear_vjp(x, p, dy):
    """4. Go back through a = x g, s = a V, t = s ell, z = t U^T, y = z h, straight through each sign."""
    a, U, V = x * p.g, sign(p.u), sign(p.v)
    s, dz = a @ V, dy * p.h
    t, dt = s * p.ell, dz @ U
    ds = dt * p.ell
    du, dv = dz.T @ t * (abs(p.u) < 1), a.T @ ds * (abs(p.v) < 1)  # the rule: latents beyond 1 stay
    return Factors(du, dv, (dy * (t @ U.T)).sum(0), (dt * s).sum(0), (ds @ V.T * x).sum(0))


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def train(x, p, layer, layer_vjp, params, steps, lr):
    """Run Adam on KL(p || q), whose gradient by the logits is q - p; p is the text, or what the teacher says."""
    rng, means, squares = np.random.default_rng(0), [0.0] * len(params), [0.0] * len(params)
    for n in range(1, steps + 1):
        rows, (*weights, b, C, c) = rng.integers(0, len(x), BATCH), params
        y = layer(x[rows], weights) + b  # (BATCH, HIDDEN)
        hidden = np.maximum(y, 0)
        d = (np.exp(log_softmax(hidden @ C.T + c)) - p[rows]) / BATCH
        dy = d @ C * (y > 0)
        grads = [*layer_vjp(x[rows], weights, dy), dy.sum(0), d.T @ hidden, d.sum(0)]
        means = [0.9 * m + 0.1 * g for m, g in zip(means, grads, strict=True)]
        squares = [0.999 * s + 0.001 * g**2 for s, g in zip(squares, grads, strict=True)]
        sizes = [np.sqrt(s / (1 - 0.999**n)) + 1e-8 for s in squares]
        rate = lr * (1 if n < 0.7 * steps else 0.1) / (1 - 0.9**n)
        params = [a - rate * m / s for a, m, s in zip(params, means, sizes, strict=True)]
    return params


def pack(signs):
    """5. Pack each row of signs into bytes: bit 1 is -1, the lowest bit comes first."""
    return np.packbits(signs < 0, axis=1, bitorder="little")


def packed_product(words, x):
    """6. Multiply packed signs with x: each byte looks up one of the 256 signed sums of its eight entries."""
    signs = 1.0 - 2.0 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")  # (256, 8)
    sums = signs @ x.reshape(-1, 8).T  # (256, bytes of a row)
    return sums[words, np.arange(words.shape[1])].sum(axis=1)


def stored_layer(x, paths, product):
    """Compute y of one x by `product`(name, path, vector). Float64 adds float16 numbers exactly, in any order."""
    latents = [half(product("V", i, half(x * p.g)) * p.ell) for i, p in enumerate(paths)]
    return sum(product("U", i, t) * p.h for i, (t, p) in enumerate(zip(latents, paths, strict=True)))


def examples(text):
    """Encode each window of a text: eight ones among zeros (n, 224), and the character that follows (n, 28)."""
    codes = np.array([ALPHABET.index(c) for c in " ".join(text.lower().split()) if c in ALPHABET])
    ones = np.eye(len(ALPHABET))[np.lib.stride_tricks.sliding_window_view(codes, CONTEXT + 1)]
    return ones[:, :-1].reshape(len(ones), -1), ones[:, -1]


def train_teacher(x, p):
    rng, k = np.random.default_rng(0), len(ALPHABET)
    weight, C = rng.normal(0, 0.5, (HIDDEN, x.shape[1])), rng.normal(0, 0.1, (k, HIDDEN))
    params = [weight, np.zeros(HIDDEN), C, np.zeros(k)]
    return train(x, p, lambda x, w: x @ w[0].T, lambda x, w, dy: [dy.T @ x], params, 1500, 1e-3)


def train_student(x, teacher, paths, steps=1000):
    """Train the latents, scales and the rest of the network on the teacher's distribution."""
    split = lambda arrays: [Factors(*arrays[i : i + 5]) for i in range(0, len(arrays), 5)]
    vjp = lambda x, arrays, dy: [grad for path in split(arrays) for grad in linear_vjp(x, path, dy)]
    W, b, C, c = teacher
    p = np.exp(log_softmax(np.maximum(x @ W.T + b, 0) @ C.T + c))
    params = [array for path in paths for array in path] + [b, C, c]
    *arrays, b, C, c = train(x, p, lambda x, w: linear(x, split(w)), vjp, params, steps, 2e-3)
    return split(arrays), (b, C, c)


def main(text=TEXT):
    begin, (x, p) = time.perf_counter(), examples(text)
    old_x, old_p, x, p = x[: -HELD_OUT - CONTEXT], p[: -HELD_OUT - CONTEXT], x[-HELD_OUT:], p[-HELD_OUT:]

    def report(name, y, b, C, c):
        nats = -(p * log_softmax(np.maximum(y + b, 0) @ C.T + c)).sum(1).mean()
        print(f"{name:36} {nats:.3f} nats per character of text that nobody has learnt")

    W, *rest = teacher = train_teacher(old_x, old_p)
    report("teacher, 16 bits per weight", x @ W.T, *rest)
    start = compensate(W, [RANK, RANK])
    for n in (1, 2):
        error = np.linalg.norm(W - sum(path.dense() for path in start[:n])) / np.linalg.norm(W)
        report(f"untrained, error {error:.3f} of {n} path(s)", linear(x, start[:n]), *rest)
    trained, rest = train_student(old_x, teacher, start)
    paths = [path._replace(h=half(path.h), ell=half(path.ell), g=half(path.g)) for path in trained]
    flips = np.mean([sign(new.u) != sign(old.u) for new, old in zip(paths, start, strict=True)])
    report(f"trained, {flips:.0%} of U's signs flipped", linear(x, paths), *rest)

    signs = {"V": [sign(path.v).T for path in paths], "U": [sign(path.u) for path in paths]}
    words = {name: [pack(each) for each in matrices] for name, matrices in signs.items()}
    wanted = np.array([stored_layer(row, paths, lambda name, i, a: signs[name][i] @ a) for row in x])
    got = np.array([stored_layer(row, paths, lambda name, i, a: packed_product(words[name][i], a)) for row in x])
    size = sum(each.nbytes for pair in words.values() for each in pair) + 2 * sum(a.size for q in paths for a in q[2:])
    report(f"packed, {8 * size / W.size:.3f} bits per weight", got, *rest)
    print(f"bit for bit the trained layer: {(got == wanted).all()}; {time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main(*(Path(name).read_text(encoding="utf-8") for name in sys.argv[1:2]))
