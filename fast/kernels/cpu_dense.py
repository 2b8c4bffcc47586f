"""What a decoder's step reads beside packed signs: attention over the cache, rows of the embedding and of the head.

All in float32, from weights of 32, 16, 8 or 4 bits; for one thread, which cpu_threads.py gives its share.
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

# An embedding or head: bits of an entry (32, 16: floats), addresses of entries and float32 scales, entries a scale,
# address of float32 offsets (for 4 bits)
BITS, ENTRIES, SCALES, GROUP, OFFSETS = range(5)


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
