"""Decode one step of a Llama-like model on a CPU in one compiled call: no Python between embedding and logits.

A step takes a block of tokens (some of a prompt's, one new token, or tokens of several sequences) through

    x = embedding[token]
    for each layer:  x += O attention(RoPE(Q n), RoPE(K n), V n),  n = RMSNorm(x)
                     x += D (silu(G n) * U n),                     n = RMSNorm(x)
    logits = head RMSNorm(x),  for the last token of each sequence

in float32. Linear layers are the packed GEMVs of cpu.py (for blocks of tokens, small GEMMs); the head, the embedding
and attention are in cpu_dense.py. cpu_threads.py divides the large ones among threads.

What this adds to calling those kernels from Python: the time between the layers. Compiled code takes any number of
layers only as an array, so decoding/cpu_decoder.py turns a model into arrays of sizes and addresses.

**Bytes read for each token**: all sign words and scales once, the head once, the keys and values of all earlier tokens
once. **Limit**: lookups in the packed layers (see cpu.py), memory bandwidth in the head. SmolLM2-135M at 0.55 bits with
an 8-bit embedding decodes 308 tokens/s on one core and 365 on two; llama.cpp with Q4_1 weights 60 and 106, transformers
in float32 20 and 33 (book/results/cpu_decode.json).
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import numba
import numpy as np

from .cpu import NIBBLES, G, V, floats_at, prefetch_range
from .cpu_dense import embed
from .cpu_simd import (
    add,
    address_of,
    broadcast,
    divide,
    exponential,
    horizontal_sum,
    load_at,
    multiply,
    multiply_add,
    store_at,
    subtract,
    zeros,
)
from .cpu_threads import divided_attention, divided_head, divided_layer

# Indices into a model's int64 array of sizes
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS, VOCABULARY = range(7)
# Each sequence of a step is six int64. COUNT: its tokens in this step; POSITION: tokens in its cache before them;
# KEYS, VALUES: addresses of its cache, which has room for CAPACITY tokens; LOGITS: address of float32 to fill, or 0
SEQUENCE_FIELDS = 6
COUNT, POSITION, CAPACITY, KEYS, VALUES, LOGITS = range(SEQUENCE_FIELDS)
# The linear layers of a transformer layer, and the seven int64 that describe each
QUERY, KEY, VALUE, OUT, GATE, UP, DOWN = range(7)
# FIRST_PATH, PATHS: its rows in the array of all paths; BIAS: address of float32, or 0; DENSE: address of the weights,
# or 0 for a packed layer; DENSE_BITS: bits of a weight, 32 or 16
FIRST_PATH, PATHS, D_OUT, D_IN, BIAS, DENSE, DENSE_BITS = range(7)


@numba.njit(nogil=True, cache=True)
def rms_norm(x, weight, eps, out, rows, size):
    """Compute out = x / sqrt(mean(x^2) + eps) * weight for each row.

    x, weight, out : addresses of float32: (rows, size), (size,), (rows, size); size a multiple of sixteen.
    """
    for b in range(rows):
        row, to = x + 4 * b * size, out + 4 * b * size
        squares = zeros()
        for j in range(0, 4 * size, 64):
            lanes = load_at(row + j)
            squares = multiply_add(lanes, lanes, squares)
        factor = np.float32(1) / np.sqrt(horizontal_sum(squares) / np.float32(size) + eps)
        for j in range(0, 4 * size, 64):
            store_at(to + j, multiply(load_at(weight + j), multiply(load_at(row + j), broadcast(factor))))


@numba.njit(nogil=True, cache=True)
def apply_rope(x, heads, size, cosine, sine):
    """Apply rotary position embedding (RoPE) to one token, in place: rotate pairs (j, j + size / 2) of each head.

    x : flat float32, (heads, size); cosine, sine : (size / 2,) float32.
    """
    half = size // 2
    for head in range(heads):
        for j in range(half):
            low, high = x[head * size + j], x[head * size + half + j]
            x[head * size + j] = low * cosine[j] - high * sine[j]
            x[head * size + half + j] = high * cosine[j] + low * sine[j]


@numba.njit(nogil=True, cache=True)
def silu_product(gate, up, size):
    """Compute gate = silu(gate) * up in place, silu(z) = z / (1 + e^-z); addresses; size a multiple of sixteen."""
    one = broadcast(np.float32(1))
    for j in range(0, 4 * size, 64):
        z = load_at(gate + j)
        silu = divide(z, add(one, exponential(subtract(zeros(), z))))
        store_at(gate + j, multiply(silu, load_at(up + j)))


@numba.njit(nogil=True, cache=True)
def linear(team, numbers, paths, x, y, rows):
    """Compute y = W x + b for each row of x, W packed or dense.

    team : see cpu_threads.py; numbers : (7,) int64, see above; paths : all paths of the model; x, y : flat float32.
    """
    d_out, d_in = numbers[D_OUT], numbers[D_IN]
    if numbers[DENSE]:
        table = np.array([numbers[DENSE_BITS], numbers[DENSE], 0, 0, 0])
        for b in range(rows):
            divided_head(team, table, address_of(x) + 4 * b * d_in, d_in, address_of(y) + 4 * b * d_out, d_out)
    else:
        following = numbers[FIRST_PATH] + numbers[PATHS]
        mine = paths[numbers[FIRST_PATH] : following]
        if following < len(paths):  # prefetch the first words of the next layer
            prefetch_range(paths[following, V], 4 * d_in)
            prefetch_range(paths[following, G], 2 * d_in)
        divided_layer(team, NIBBLES, mine, d_out, d_in, address_of(x), address_of(y), rows)
    if numbers[BIAS]:
        bias = floats_at(numbers[BIAS], d_out)
        for b in range(rows):
            for i in range(d_out):
                y[b * d_out + i] += bias[i]


@numba.njit(nogil=True, cache=True)
def block_floats(sizes):
    """Count the float32 of scratch memory for each token of a block: x, normed, delta; q, mixed; k, v; gate, up."""
    inner, keys = sizes[HEADS] * sizes[HEAD_DIM], sizes[KV_HEADS] * sizes[HEAD_DIM]
    return 3 * sizes[HIDDEN] + 2 * inner + 2 * keys + 2 * sizes[INTERMEDIATE]


@numba.njit(nogil=True, cache=True)
def append_and_attend(team, sizes, layer, sequences, angles, q, k, v, mixed):
    """Apply RoPE to a block's queries and keys, append keys and values to each sequence's cache, and attend.

    sequences : see `step`; q, mixed : flat, (tokens, heads, head_dim); k, v : flat, (tokens, kv_heads, head_dim).
    """
    heads, kv_heads, size = sizes[HEADS], sizes[KV_HEADS], sizes[HEAD_DIM]
    first = np.int64(0)
    for each in range(len(sequences)):
        count, position, capacity = sequences[each, COUNT], sequences[each, POSITION], sequences[each, CAPACITY]
        shape, skip = (kv_heads, capacity, size), 4 * layer * kv_heads * capacity * size
        keys = floats_at(sequences[each, KEYS] + skip, kv_heads * capacity * size).reshape(shape)
        values = floats_at(sequences[each, VALUES] + skip, kv_heads * capacity * size).reshape(shape)
        for b in range(first, first + count):
            at = position + b - first
            apply_rope(q[b * heads * size :], heads, size, angles[0, at], angles[1, at])
            apply_rope(k[b * kv_heads * size :], kv_heads, size, angles[0, at], angles[1, at])
            for head_at in range(kv_heads):
                place = (b * kv_heads + head_at) * size
                keys[head_at, at] = k[place : place + size]
                values[head_at, at] = v[place : place + size]
        mine = first * heads * size
        divided_attention(team, q[mine:], keys, values, position, count, heads, mixed[mine:])
        first += count


@numba.njit(nogil=True, cache=True)
def step(sizes, eps, linears, paths, norms, embedding, head, angles, sequences, tokens, space, team):
    """Read one or more tokens of each of several sequences, and compute logits after the last one of each.

    sizes : int64, see above; eps : float32; linears : (layers, 7, 7) int64; paths : (all paths, 6) int64, see cpu.py;
    norms : (2 * layers + 1,) int64 addresses of float32 weights; embedding, head : (5,) int64, see cpu_dense.py;
    angles : (2, positions, head_dim / 2) float32, cosines and sines; sequences : (n, SEQUENCE_FIELDS) int64, see above;
    tokens : (sum of counts,) int64, sequence after sequence; space : float32, len(tokens) * block_floats(sizes), which
    begins on a cache line; team : see cpu_threads.py.

    Caches are float32, (layers, kv_heads, capacity, head_dim), filled up to `position`: this call appends its tokens.
    Each row of a block is computed in the same order whatever the other rows are, so the result does not depend on how
    tokens are divided into calls, nor on the other sequences.
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
        append_and_attend(team, sizes, layer, sequences, angles, q, k, v, mixed)
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
    last = np.int64(-1)
    for each in range(len(sequences)):
        last += sequences[each, COUNT]
        if sequences[each, LOGITS]:
            rms_norm(address_of(x) + 4 * last * hidden, norms[2 * sizes[LAYERS]], eps, address_of(normed), 1, hidden)
            divided_head(team, head, address_of(normed), hidden, sequences[each, LOGITS], sizes[VOCABULARY])
