"""A whole step of a Llama-like model on a CPU, in Numba: no Python between embedding and logits.

A step takes a block of tokens (a prompt's, or one) through

    x = embedding[token]
    for each layer:  x += O attention(RoPE(Q n), RoPE(K n), V n),  n = RMSNorm(x)
                     x += D (silu(G n) * U n),                     n = RMSNorm(x)
    logits = head RMSNorm(x),  for the last token alone

in float32, with the linear layers of cpu.py. The model comes as numbers (sizes, addresses), because compiled code takes
any number of layers only as an array; fast/decode_cpu.py makes them. Threads divide the head, and the linear layers
that are large enough.

Bytes moved a token: all sign words and scales once, the head once, keys and values of all earlier tokens once.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import numba
import numpy as np

from .cpu import (
    NIBBLES,
    PARALLEL_WORK,
    RANK,
    G,
    V,
    aligned,
    ask_for,
    floats_at,
    layer_rows,
    layer_rows_parallel,
)
from .lanes import (
    LANES,
    add,
    address_of,
    broadcast,
    broadcast_at,
    divide,
    exponential,
    lane_sum,
    load_at,
    load_half_at,
    load_int4_at,
    load_int8_at,
    multiply,
    multiply_add,
    store_at,
    subtract,
    zeros,
)

# Sizes of a model, by their place in an int64 array
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS, VOCABULARY, CAPACITY = range(8)
# The linear layers of a layer, and the numbers of each
QUERY, KEY, VALUE, OUT, GATE, UP, DOWN = range(7)
# DENSE: address of weights, 0 for packed layers; DENSE_BITS: of a weight, 32 or 16
FIRST_PATH, PATHS, D_OUT, D_IN, BIAS, DENSE, DENSE_BITS = range(7)
# An embedding or head: bits of an entry (32, 16: floats), addresses of entries and float32 scales, entries a scale,
# address of float32 offsets (for 4 bits)
BITS, ENTRIES, SCALES, GROUP, OFFSETS = range(5)


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
def attend(q, keys, values, length, size, scores, out):
    """One head: softmax(q K / sqrt(size)) V over `length` positions; addresses, keys and values (length, size)."""
    scale = np.float32(1) / np.sqrt(np.float32(size))
    most = np.float32(-np.inf)
    for at in range(length):
        sums = zeros()
        for j in range(0, 4 * size, 64):
            sums = multiply_add(load_at(q + j), load_at(keys + 4 * at * size + j), sums)
        scores[at] = lane_sum(sums) * scale
        most = max(most, scores[at])
    padded = length + LANES - 1 & -LANES
    scores[length:padded] = -np.inf
    place, total = address_of(scores), zeros()
    for at in range(0, 4 * padded, 64):
        power = exponential(subtract(load_at(place + at), broadcast(most)))
        store_at(place + at, power)
        total = add(total, power)
    scores[length:padded] = 0
    # the padding's powers, which are as small as a float32's smallest, are in the sum: far below its rounding
    factor = broadcast(np.float32(1) / lane_sum(total))
    for j in range(0, 4 * size, 64):
        sums = zeros()
        for at in range(length):
            sums = multiply_add(broadcast_at(place + 4 * at), load_at(values + 4 * at * size + j), sums)
        store_at(out + j, multiply(sums, factor))


@numba.njit(nogil=True, cache=True)
def silu_product(gate, up, size):
    """Gate = silu(gate) * up, silu(z) = z / (1 + e^-z); addresses; size a multiple of sixteen."""
    one = broadcast(np.float32(1))
    for j in range(0, 4 * size, 64):
        z = load_at(gate + j)
        silu = divide(z, add(one, exponential(subtract(zeros(), z))))
        store_at(gate + j, multiply(silu, load_at(up + j)))


@numba.njit(nogil=True, cache=True)
def embed(table, row, size, out):
    """One row of an embedding as float32, to an address."""
    bits = table[BITS]
    for j in range(0, size, LANES if bits >= 16 else 2 * LANES):
        at = row * size + j
        if bits == 32:
            store_at(out + 4 * j, load_at(table[ENTRIES] + 4 * at))
        elif bits == 16:
            store_at(out + 4 * j, load_half_at(table[ENTRIES] + 2 * at))
        else:
            scale = broadcast_at(table[SCALES] + 4 * (at // table[GROUP]))
            low, high = codes(bits, table[ENTRIES] + at * bits // 8)
            offset = broadcast_at(table[OFFSETS] + 4 * (at // table[GROUP])) if bits == 4 else zeros()
            store_at(out + 4 * j, multiply_add(low, scale, offset))
            store_at(out + 4 * (j + LANES), multiply_add(high, scale, offset))


@numba.njit(nogil=True, cache=True, inline="always")
def codes(bits, address):
    """The 32 integers of 8 or 4 bits at an address, as two vectors of float32."""
    if bits == 8:
        return load_int8_at(address), load_int8_at(address + LANES)
    return load_int4_at(address)


@numba.njit(nogil=True, cache=True)
def float_rows(table, x, size, logits, start, stop):
    """`head_rows` for weights of 32 or 16 bits."""
    bits, place = table[BITS], table[ENTRIES] + start * size * (table[BITS] // 8)
    for i in range(start, stop):
        sums = zeros()
        for j in range(0, 4 * size, 64):
            weights = load_at(place) if bits == 32 else load_half_at(place)
            sums = multiply_add(weights, load_at(x + j), sums)
            place += bits * LANES // 8
        logits[i] = lane_sum(sums)


@numba.njit(nogil=True, cache=True, inline="always")
def add_scaled_codes(bits, sums, place, scale, offset, x0, x1):
    """Sums plus the products of 32 scaled integers, and with 4 bits of their offset, with 32 entries of x."""
    low, high = codes(bits, place)
    sums = multiply_add(multiply_add(high, x1, multiply(low, x0)), broadcast_at(scale), sums)
    return multiply_add(add(x0, x1), broadcast_at(offset), sums) if bits == 4 else sums


@numba.njit(nogil=True, cache=True, inline="always")
def integer_rows(bits, table, x, size, logits, start, stop):
    """`head_rows` for integers of 8 or 4 bits: four rows at a time share the loads of x.

    A partial sum of 32 products is scaled before it is added to the others; all in float32, so the error of an entry
    is that of a sum of `size` products and 4 * size / 32 more roundings.
    """
    row, shift = size * bits // 8, 0 if table[GROUP] == 32 else 1
    scale_row, offsets = 4 * (size // table[GROUP]), table[OFFSETS] - table[SCALES]  # from a scale to its offset
    for i in range(start, stop, 4):
        place, scale = table[ENTRIES] + i * row, table[SCALES] + i * scale_row
        step, scale_step = (row, scale_row) if i + 4 <= stop else (0, 0)  # the last rows come one at a time below
        a0 = a1 = a2 = a3 = zeros()
        if step:
            for unit in range(size // 32):
                x0, x1 = load_at(x + 128 * unit), load_at(x + 128 * unit + 64)
                at, s0 = place + 4 * bits * unit, scale + 4 * (unit >> shift)
                s1, s2, s3 = s0 + scale_step, s0 + 2 * scale_step, s0 + 3 * scale_step
                a0 = add_scaled_codes(bits, a0, at, s0, s0 + offsets, x0, x1)
                a1 = add_scaled_codes(bits, a1, at + step, s1, s1 + offsets, x0, x1)
                a2 = add_scaled_codes(bits, a2, at + 2 * step, s2, s2 + offsets, x0, x1)
                a3 = add_scaled_codes(bits, a3, at + 3 * step, s3, s3 + offsets, x0, x1)
            logits[i], logits[i + 1] = lane_sum(a0), lane_sum(a1)
            logits[i + 2], logits[i + 3] = lane_sum(a2), lane_sum(a3)
            continue
        for last in range(i, stop):
            a0 = zeros()
            for unit in range(size // 32):
                x0, x1 = load_at(x + 128 * unit), load_at(x + 128 * unit + 64)
                at, s0 = table[ENTRIES] + last * row + 4 * bits * unit, table[SCALES] + last * scale_row
                s0 += 4 * (unit >> shift)
                a0 = add_scaled_codes(bits, a0, at, s0, s0 + offsets, x0, x1)
            logits[last] = lane_sum(a0)


@numba.njit(nogil=True, cache=True)
def head_rows(table, x, size, logits, start, stop):
    """logits[i] = row i of the head times x, for start <= i < stop; x is an address."""
    if table[BITS] >= 16:
        float_rows(table, x, size, logits, start, stop)
    elif table[BITS] == 8:
        integer_rows(8, table, x, size, logits, start, stop)
    else:
        integer_rows(4, table, x, size, logits, start, stop)


@numba.njit(nogil=True, cache=True, parallel=True)
def head_rows_parallel(table, x, size, logits, count, threads):
    """`head_rows` divided among Numba's threads."""
    for part in numba.prange(threads):
        head_rows(table, x, size, logits, count * part // threads, count * (part + 1) // threads)


@numba.njit(nogil=True, cache=True)
def linear(numbers, paths, x, y, rows, threads):
    """Y = W x + b for each row, W packed or dense; x and y are flat arrays."""
    d_out, d_in = numbers[D_OUT], numbers[D_IN]
    if numbers[DENSE]:
        table = np.array([numbers[DENSE_BITS], numbers[DENSE], 0, 0, 0])
        for b in range(rows):
            head_rows(table, address_of(x) + 4 * b * d_in, d_in, y[b * d_out :], 0, d_out)
    else:
        following = numbers[FIRST_PATH] + numbers[PATHS]
        mine = paths[numbers[FIRST_PATH] : following]
        if following < len(paths):  # the next layer's first words
            ask_for(paths[following, V], 4 * d_in)
            ask_for(paths[following, G], 2 * d_in)
        b = 0
        while b + 4 <= rows:
            packed(mine, d_out, d_in, x[b * d_in :], y[b * d_out :], (0, 0, 0, 0), threads)
            b += 4
        while b < rows:
            packed(mine, d_out, d_in, x[b * d_in :], y[b * d_out :], (0,), threads)
            b += 1
    if numbers[BIAS]:
        bias = floats_at(numbers[BIAS], d_out)
        for b in range(rows):
            for i in range(d_out):
                y[b * d_out + i] += bias[i]


@numba.njit(nogil=True, cache=True)
def packed(paths, d_out, d_in, x, y, each, threads):
    """`cpu.layer_rows`, on several threads where that is worth it."""
    work = 0
    for order in range(len(paths)):
        work += paths[order, RANK]
    if threads > 1 and len(each) * work * (d_out + d_in) >= PARALLEL_WORK:
        layer_rows_parallel(NIBBLES, paths, d_out, d_in, x, y, each, threads)
    else:
        layer_rows(NIBBLES, paths, d_out, d_in, x, y, each)


@numba.njit(nogil=True, cache=True)
def step(sizes, eps, linears, paths, norms, embedding, head, angles, keys, values, tokens, position, logits, threads):
    """Logits after the last of `tokens`, which stand at `position` and the places after it.

    sizes : int64, see above; eps : float32; linears : (layers, 7, 7) int64; paths : (all paths, 6) int64;
    norms : (2 * layers + 1,) int64 addresses of float32 weights; embedding, head : (5,) int64;
    angles : (2, capacity, head_dim / 2) float32, cosines and sines; keys, values : (layers, kv_heads, capacity,
    head_dim) float32, filled up to `position` and, by this call, up to its last token; tokens : (n,) int64;
    logits : (vocabulary,) float32, overwritten.
    """
    hidden, heads, kv_heads, size = sizes[HIDDEN], sizes[HEADS], sizes[KV_HEADS], sizes[HEAD_DIM]
    wide, count = sizes[INTERMEDIATE], len(tokens)
    x, normed = aligned(count * hidden), aligned(count * hidden)
    q, mixed = aligned(count * heads * size), aligned(count * heads * size)
    k, v = aligned(count * kv_heads * size), aligned(count * kv_heads * size)
    gate, up, delta = aligned(count * wide), aligned(count * wide), aligned(count * hidden)
    scores = aligned(position + count + LANES)
    for b in range(count):
        embed(embedding, tokens[b], hidden, address_of(x) + 4 * b * hidden)
    for layer in range(sizes[LAYERS]):
        rms_norm(address_of(x), norms[2 * layer], eps, address_of(normed), count, hidden)
        linear(linears[layer, QUERY], paths, normed, q, count, threads)
        linear(linears[layer, KEY], paths, normed, k, count, threads)
        linear(linears[layer, VALUE], paths, normed, v, count, threads)
        for b in range(count):
            at = position + b
            rotate(q[b * heads * size :], heads, size, angles[0, at], angles[1, at])
            rotate(k[b * kv_heads * size :], kv_heads, size, angles[0, at], angles[1, at])
            for head_at in range(kv_heads):
                place = (b * kv_heads + head_at) * size
                keys[layer, head_at, at] = k[place : place + size]
                values[layer, head_at, at] = v[place : place + size]
            for head_at in range(heads):
                shared = head_at // (heads // kv_heads)
                place = 4 * (b * heads + head_at) * size
                attend(
                    address_of(q) + place,
                    address_of(keys[layer, shared]),
                    address_of(values[layer, shared]),
                    at + 1,
                    size,
                    scores,
                    address_of(mixed) + place,
                )
        linear(linears[layer, OUT], paths, mixed, delta, count, threads)
        for j in range(count * hidden):
            x[j] += delta[j]
        rms_norm(address_of(x), norms[2 * layer + 1], eps, address_of(normed), count, hidden)
        linear(linears[layer, GATE], paths, normed, gate, count, threads)
        linear(linears[layer, UP], paths, normed, up, count, threads)
        silu_product(address_of(gate), address_of(up), count * wide)
        linear(linears[layer, DOWN], paths, gate, delta, count, threads)
        for j in range(count * hidden):
            x[j] += delta[j]
    last = address_of(x) + 4 * (count - 1) * hidden
    rms_norm(last, norms[2 * sizes[LAYERS]], eps, address_of(normed), 1, hidden)
    if threads > 1:
        head_rows_parallel(head, address_of(normed), hidden, logits, sizes[VOCABULARY], threads)
    else:
        head_rows(head, address_of(normed), hidden, logits, 0, sizes[VOCABULARY])
    x[0] = normed[0] = 0  # a use after the last address: until here the arrays must not be freed
