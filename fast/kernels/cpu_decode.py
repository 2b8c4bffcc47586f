"""A whole step of a Llama-like model on a CPU, in Numba: no Python between embedding and logits.

A step takes a block of tokens (a prompt's, or one) through

    x = embedding[token]
    for each layer:  x += O attention(RoPE(Q n), RoPE(K n), V n),  n = RMSNorm(x)
                     x += D (silu(G n) * U n),                     n = RMSNorm(x)
    logits = head RMSNorm(x),  for the last token alone

in float32, with the linear layers of cpu.py. The model comes as numbers (sizes, addresses), because compiled code takes
any number of layers only as an array; fast/decode_cpu.py makes them. Threads divide the linear layers, the attention
and the head, where they are large enough (cpu_threads.py).

Bytes moved a token: all sign words and scales once, the head once, keys and values of all earlier tokens once.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import numba
import numpy as np

from .cpu import NIBBLES, G, V, ask_for, floats_at
from .cpu_dense import embed
from .cpu_simd import (
    add,
    address_of,
    broadcast,
    divide,
    exponential,
    lane_sum,
    load_at,
    multiply,
    multiply_add,
    store_at,
    subtract,
    zeros,
)
from .cpu_threads import divided_attention, divided_head, divided_layer

# Sizes of a model, by their place in an int64 array
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS, VOCABULARY, CAPACITY = range(8)
# The linear layers of a layer, and the numbers of each
QUERY, KEY, VALUE, OUT, GATE, UP, DOWN = range(7)
# DENSE: address of weights, 0 for packed layers; DENSE_BITS: of a weight, 32 or 16
FIRST_PATH, PATHS, D_OUT, D_IN, BIAS, DENSE, DENSE_BITS = range(7)


@numba.njit(nogil=True, cache=True)
def rms_norm(x, weight, eps, out, rows, size):
    """Out = x / sqrt(mean(x^2) + eps) * weight for each row; addresses; size a multiple of sixteen."""
    for b in range(rows):
        row, to = x + 4 * b * size, out + 4 * b * size
        squares = zeros()
        for j in range(0, 4 * size, 64):
            lanes = load_at(row + j)
            squares = multiply_add(lanes, lanes, squares)
        factor = np.float32(1) / np.sqrt(lane_sum(squares) / np.float32(size) + eps)
        for j in range(0, 4 * size, 64):
            store_at(to + j, multiply(load_at(weight + j), multiply(load_at(row + j), broadcast(factor))))


@numba.njit(nogil=True, cache=True)
def rotate(x, heads, size, cosine, sine):
    """Rotary position embedding of one token, in place: pairs (j, j + size / 2) of each head turn by their angle."""
    half = size // 2
    for head in range(heads):
        for j in range(half):
            low, high = x[head * size + j], x[head * size + half + j]
            x[head * size + j] = low * cosine[j] - high * sine[j]
            x[head * size + half + j] = high * cosine[j] + low * sine[j]


@numba.njit(nogil=True, cache=True)
def silu_product(gate, up, size):
    """Gate = silu(gate) * up, silu(z) = z / (1 + e^-z); addresses; size a multiple of sixteen."""
    one = broadcast(np.float32(1))
    for j in range(0, 4 * size, 64):
        z = load_at(gate + j)
        silu = divide(z, add(one, exponential(subtract(zeros(), z))))
        store_at(gate + j, multiply(silu, load_at(up + j)))


@numba.njit(nogil=True, cache=True)
def linear(team, numbers, paths, x, y, rows):
    """Y = W x + b for each row, W packed or dense; x and y are flat arrays."""
    d_out, d_in = numbers[D_OUT], numbers[D_IN]
    if numbers[DENSE]:
        table = np.array([numbers[DENSE_BITS], numbers[DENSE], 0, 0, 0])
        for b in range(rows):
            divided_head(team, table, address_of(x) + 4 * b * d_in, d_in, address_of(y) + 4 * b * d_out, d_out)
    else:
        following = numbers[FIRST_PATH] + numbers[PATHS]
        mine = paths[numbers[FIRST_PATH] : following]
        if following < len(paths):  # the next layer's first words
            ask_for(paths[following, V], 4 * d_in)
            ask_for(paths[following, G], 2 * d_in)
        divided_layer(team, NIBBLES, mine, d_out, d_in, address_of(x), address_of(y), rows)
    if numbers[BIAS]:
        bias = floats_at(numbers[BIAS], d_out)
        for b in range(rows):
            for i in range(d_out):
                y[b * d_out + i] += bias[i]


@numba.njit(nogil=True, cache=True)
def block_floats(sizes):
    """Floats for each token of a block: for x, normed, delta; q, mixed; k, v; gate, up."""
    inner, keys = sizes[HEADS] * sizes[HEAD_DIM], sizes[KV_HEADS] * sizes[HEAD_DIM]
    return 3 * sizes[HIDDEN] + 2 * inner + 2 * keys + 2 * sizes[INTERMEDIATE]


@numba.njit(nogil=True, cache=True)
def step(
    sizes, eps, linears, paths, norms, embedding, head, angles, keys, values, tokens, position, logits, space, team
):
    """Logits after the last of `tokens`, which stand at `position` and the places after it.

    sizes : int64, see above; eps : float32; linears : (layers, 7, 7) int64; paths : (all paths, 6) int64;
    norms : (2 * layers + 1,) int64 addresses of float32 weights; embedding, head : (5,) int64;
    angles : (2, capacity, head_dim / 2) float32, cosines and sines; keys, values : (layers, kv_heads, capacity,
    head_dim) float32, filled up to `position` and, by this call, up to its last token; tokens : (n,) int64;
    logits : (vocabulary,) float32, overwritten; space : float32, n * block_floats(sizes) that begin on a cache line;
    team : see cpu_threads.py.
    """
    hidden, heads, kv_heads, size = sizes[HIDDEN], sizes[HEADS], sizes[KV_HEADS], sizes[HEAD_DIM]
    wide, count = sizes[INTERMEDIATE], len(tokens)
    inner, outer, shared = count * heads * size, count * hidden, count * kv_heads * size
    x, normed, delta = space[:outer], space[outer : 2 * outer], space[2 * outer : 3 * outer]
    rest = space[3 * outer :]
    q, mixed, k, v = rest[:inner], rest[inner : 2 * inner], rest[2 * inner :], rest[2 * inner + shared :]
    gate, up = rest[2 * (inner + shared) :], rest[2 * (inner + shared) + count * wide :]
    for b in range(count):
        embed(embedding, tokens[b], hidden, address_of(x) + 4 * b * hidden)
    for layer in range(sizes[LAYERS]):
        rms_norm(address_of(x), norms[2 * layer], eps, address_of(normed), count, hidden)
        linear(team, linears[layer, QUERY], paths, normed, q, count)
        linear(team, linears[layer, KEY], paths, normed, k, count)
        linear(team, linears[layer, VALUE], paths, normed, v, count)
        for b in range(count):
            at = position + b
            rotate(q[b * heads * size :], heads, size, angles[0, at], angles[1, at])
            rotate(k[b * kv_heads * size :], kv_heads, size, angles[0, at], angles[1, at])
            for head_at in range(kv_heads):
                place = (b * kv_heads + head_at) * size
                keys[layer, head_at, at] = k[place : place + size]
                values[layer, head_at, at] = v[place : place + size]
        divided_attention(team, q, keys[layer], values[layer], position, count, heads, mixed)
        linear(team, linears[layer, OUT], paths, mixed, delta, count)
        for j in range(outer):
            x[j] += delta[j]
        rms_norm(address_of(x), norms[2 * layer + 1], eps, address_of(normed), count, hidden)
        linear(team, linears[layer, GATE], paths, normed, gate, count)
        linear(team, linears[layer, UP], paths, normed, up, count)
        silu_product(address_of(gate), address_of(up), count * wide)
        linear(team, linears[layer, DOWN], paths, gate, delta, count)
        for j in range(outer):
            x[j] += delta[j]
    last = address_of(x) + 4 * (count - 1) * hidden
    rms_norm(last, norms[2 * sizes[LAYERS]], eps, address_of(normed), 1, hidden)
    divided_head(team, head, address_of(normed), hidden, address_of(logits), sizes[VOCABULARY])
