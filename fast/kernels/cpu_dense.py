"""Compute what a decoding step needs beside packed layers: attention, embedding rows and the language model's head.

These are dense SIMD kernels for one thread: a GEMV whose weights of 32, 16, 8 or 4 bits are converted to float32 in
registers, and attention of one query over cached keys and values. cpu_threads.py divides rows and heads among threads.

**Bytes read**: a head row of n entries takes n * bits / 8 bytes, and 4 bytes for each scale and offset. An attention
head reads 8 bytes for each cached token and dimension, since keys and values are float32. Every byte is read once for
each new token. **Limit**: memory bandwidth, once the weights exceed the cache, because each weight read is used in one
multiplication. So a head of 8 or 4 bits takes less time than one of 16. Only whole steps have been measured: see
cpu_decode.py.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import numba
import numpy as np

from .cpu_simd import (
    LANES,
    add,
    address_of,
    broadcast,
    broadcast_at,
    exponential,
    horizontal_sum,
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

# An embedding or head is five int64: bits of an entry (32 and 16: floating point), address of the entries, address of
# their float32 scales, entries that share a scale, address of their float32 offsets (4 bits only).
BITS, ENTRIES, SCALES, GROUP, OFFSETS = range(5)


@numba.njit(nogil=True, cache=True)
def attend(q, keys, values, length, size, scores, out):
    """Compute one attention head, softmax(q K^T / sqrt(size)) V, over the first `length` positions.

    q, keys, values, out : addresses of float32: (size,), (length, size), (length, size) and (size,), size a multiple of
    sixteen; scores : float32 array with room for `length` entries, padded to sixteen, that begins on a cache line.

    All scores are kept, so the softmax is not computed online: for one query they fit the cache.
    """
    scale = np.float32(1) / np.sqrt(np.float32(size))
    most = np.float32(-np.inf)
    for at in range(length):
        sums = zeros()
        for j in range(0, 4 * size, 64):
            sums = multiply_add(load_at(q + j), load_at(keys + 4 * at * size + j), sums)
        scores[at] = horizontal_sum(sums) * scale
        most = max(most, scores[at])
    padded = length + LANES - 1 & -LANES
    scores[length:padded] = -np.inf
    place, total = address_of(scores), zeros()
    for at in range(0, 4 * padded, 64):
        power = exponential(subtract(load_at(place + at), broadcast(most)))
        store_at(place + at, power)
        total = add(total, power)
    scores[length:padded] = 0
    # The total contains e^-87 for each padding lane, which is far below the rounding of the sum.
    factor = broadcast(np.float32(1) / horizontal_sum(total))
    for j in range(0, 4 * size, 64):
        sums = zeros()
        for at in range(length):
            sums = multiply_add(broadcast_at(place + 4 * at), load_at(values + 4 * at * size + j), sums)
        store_at(out + j, multiply(sums, factor))


@numba.njit(nogil=True, cache=True)
def embed(table, row, size, out):
    """Convert one row of an embedding to float32, and store it at the address `out`."""
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
    """Load 32 integers of 8 or 4 bits from an address as two vectors of float32."""
    if bits == 8:
        return load_int8_at(address), load_int8_at(address + LANES)
    return load_int4_at(address)


@numba.njit(nogil=True, cache=True)
def float_rows(table, x, size, logits, start, stop):
    """Compute `head_rows` for weights of 32 or 16 bits."""
    bits, place = table[BITS], table[ENTRIES] + start * size * (table[BITS] // 8)
    for i in range(start, stop):
        sums = zeros()
        for j in range(0, 4 * size, 64):
            weights = load_at(place) if bits == 32 else load_half_at(place)
            sums = multiply_add(weights, load_at(x + j), sums)
            place += bits * LANES // 8
        logits[i] = horizontal_sum(sums)


@numba.njit(nogil=True, cache=True, inline="always")
def add_scaled_codes(bits, sums, place, scale, offset, x0, x1):
    """Add 32 products, (code * scale + offset) * x, to `sums`; only 4-bit codes have an offset."""
    low, high = codes(bits, place)
    sums = multiply_add(multiply_add(high, x1, multiply(low, x0)), broadcast_at(scale), sums)
    return multiply_add(add(x0, x1), broadcast_at(offset), sums) if bits == 4 else sums


@numba.njit(nogil=True, cache=True, inline="always")
def integer_rows(bits, table, x, size, logits, start, stop):
    """Compute `head_rows` for integers of 8 or 4 bits; four rows at a time share the loads of x.

    Each partial sum of 32 products is scaled before it is added. All sums are float32: the rounding error of a logit is
    the error of a sum of `size` products plus 4 * size / 32 more roundings.
    """
    row, shift = size * bits // 8, 0 if table[GROUP] == 32 else 1
    scale_row = 4 * (size // table[GROUP])
    offsets = table[OFFSETS] - table[SCALES]  # distance from a scale to its offset
    for i in range(start, stop, 4):
        place, scale = table[ENTRIES] + i * row, table[SCALES] + i * scale_row
        a0 = a1 = a2 = a3 = zeros()
        if i + 4 <= stop:
            for unit in range(size // 32):
                x0, x1 = load_at(x + 128 * unit), load_at(x + 128 * unit + 64)
                at, s0 = place + 4 * bits * unit, scale + 4 * (unit >> shift)
                s1, s2, s3 = s0 + scale_row, s0 + 2 * scale_row, s0 + 3 * scale_row
                a0 = add_scaled_codes(bits, a0, at, s0, s0 + offsets, x0, x1)
                a1 = add_scaled_codes(bits, a1, at + row, s1, s1 + offsets, x0, x1)
                a2 = add_scaled_codes(bits, a2, at + 2 * row, s2, s2 + offsets, x0, x1)
                a3 = add_scaled_codes(bits, a3, at + 3 * row, s3, s3 + offsets, x0, x1)
            logits[i], logits[i + 1] = horizontal_sum(a0), horizontal_sum(a1)
            logits[i + 2], logits[i + 3] = horizontal_sum(a2), horizontal_sum(a3)
            continue
        for last in range(i, stop):  # the last rows, fewer than four
            a0 = zeros()
            for unit in range(size // 32):
                x0, x1 = load_at(x + 128 * unit), load_at(x + 128 * unit + 64)
                at, s0 = table[ENTRIES] + last * row + 4 * bits * unit, table[SCALES] + last * scale_row
                s0 += 4 * (unit >> shift)
                a0 = add_scaled_codes(bits, a0, at, s0, s0 + offsets, x0, x1)
            logits[last] = horizontal_sum(a0)


@numba.njit(nogil=True, cache=True)
def head_rows(table, x, size, logits, start, stop):
    """Compute logits[i] = row i of the head times x for start <= i < stop.

    table : five int64 (see above); x : address of (size,) float32; logits : float32 array.
    """
    if table[BITS] >= 16:
        float_rows(table, x, size, logits, start, stop)
    elif table[BITS] == 8:
        integer_rows(8, table, x, size, logits, start, stop)
    else:
        integer_rows(4, table, x, size, logits, start, stop)
