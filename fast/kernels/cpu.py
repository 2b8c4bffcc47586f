"""Sign matrices times vectors on a CPU, from packed words, in Numba: a ladder of four kernels.

All four compute the same thing, sums_i = sum_j s_ij x_j for rows of signs s and a few columns of x, and each says what
it changes and why that is faster. n is the number of signs, in sign additions a cycle of a core with AVX-512:

| kernel | idea | cost of n signs | most a cycle |
|---|---|---|---|
| loops | one sign, one addition | n branches or selects | 1 |
| bytes | eight signs choose one of 256 partial sums, made once for all rows | n / 8 x 2 loads | 8 to 12 |
| select | sixteen signs are a lane mask: sum x - 2 * (sum of x over set bits) | n / 16 masks, additions | 16 |
| nibbles | four signs choose one of sixteen sums, which lie in one register; sixteen rows at once | below | 44 |

`nibbles` puts the words of sixteen rows side by side, so that one VPERMPS looks up four signs of each of them: 64 signs
for three instructions (lookup, addition, shift to the next nibble) that two execution ports share. Bringing the rows'
words side by side costs five instructions more for each 512 signs, hence 36 a cycle at best. The tables of x are made
once for all rows, and stay in the first-level cache, as x is taken in chunks of 512 columns.

Bytes moved: the sign words once for each four rows of x, the scales (float16) once, x and y once each.

The result for a row of x does not depend on the other rows, nor on the number of threads, but on whether there are so
many rows that unpacking them for torch's BLAS is quicker (`plan.Plan.is_quicker_unpacked`).

Nothing here needs torch: cpu_threads.py divides a layer among threads, plan.py brings tensors to it, and
fast/decode_cpu.py arrays.
"""
# pyright: reportCallIssue=false, reportPrivateImportUsage=false

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from .cpu_simd import (
    LANES,
    add,
    add_lookups,
    add_where,
    address_of,
    broadcast,
    each_add,
    each_load,
    each_store,
    each_zeros,
    four_columns,
    four_tables,
    half_to_float,
    lane_sum,
    load,
    load_half,
    load_words,
    multiply,
    next_nibble,
    pointer,
    prefetch,
    store,
    subtract,
    zeros,
)

LOOPS, BYTES, SELECT, NIBBLES = 1, 2, 3, 4
KERNELS = {"loops": LOOPS, "bytes": BYTES, "select": SELECT, "nibbles": NIBBLES}
BEST = NIBBLES

CHUNK = 16  # words of a row that are taken at once: the tables of 512 columns, 8 KB
TABLE_BYTES = 4 * LANES
GROUP = 64  # rows of signs that share a chunk's tables before the next chunk; the next group's words are asked for
ASKED = 1 << 14  # bytes of the next stage's words that are asked for at most, before this one
LINE = 64  # bytes of a cache line


@numba.njit(nogil=True, cache=True)
def add_loops(words, stride, first, count, x, sums, start, stop):
    """sums[i - start] += sum_j s_ij x_j for start <= i < stop: one sign at a time.

    words : flat uint32, row i in words[i * stride + first :]; count : words of it to use; x : (32 * count,) float32;
    sums : float32.
    """
    for i in range(start, stop):
        total = np.float32(0)
        for k in range(count):
            word = words[i * stride + first + k]
            for bit in range(32):
                value = x[32 * k + bit]
                total += -value if word >> np.uint32(bit) & np.uint32(1) else value
        sums[i - start] += total


@numba.njit(nogil=True, cache=True)
def add_bytes(words, stride, first, count, x, sums, start, stop):
    """`add_loops` by tables: for each eight columns the partial sums of all 256 bytes, shared by the rows."""
    tables = np.empty((4 * count, 256), np.float32)
    for k in range(4 * count):
        tables[k, 0] = x[8 * k : 8 * k + 8].sum()
        for bit in range(8):  # setting a bit takes its x away twice
            for low in range(1 << bit):
                tables[k, low + (1 << bit)] = tables[k, low] - np.float32(2) * x[8 * k + bit]
    for i in range(start, stop):
        total = np.float32(0)
        for k in range(count):
            word = words[i * stride + first + k]
            total += tables[4 * k, word & np.uint32(255)]
            total += tables[4 * k + 1, word >> np.uint32(8) & np.uint32(255)]
            total += tables[4 * k + 2, word >> np.uint32(16) & np.uint32(255)]
            total += tables[4 * k + 3, word >> np.uint32(24)]
        sums[i - start] += total


@numba.njit(nogil=True, cache=True)
def add_select(words, stride, first, count, x, sums, start, stop):
    """`add_loops` by lane masks: four rows share each sixteen columns, and all of them the sum of x."""
    halves = words.view(np.uint16)
    all_x = zeros()
    for k in range(2 * count):
        all_x = add(all_x, load(x, LANES * k))
    total = lane_sum(all_x)
    step = 2 * stride
    for i in range(start, stop, 4):
        row0 = 2 * (i * stride + first)
        row1 = row0 + step if i + 1 < stop else row0
        row2 = row0 + 2 * step if i + 2 < stop else row0
        row3 = row0 + 3 * step if i + 3 < stop else row0
        a0 = a1 = a2 = a3 = zeros()
        for k in range(2 * count):
            lanes = load(x, LANES * k)
            a0, a1 = add_where(a0, halves, row0 + k, lanes), add_where(a1, halves, row1 + k, lanes)
            a2, a3 = add_where(a2, halves, row2 + k, lanes), add_where(a3, halves, row3 + k, lanes)
        sums[i - start] += total - np.float32(2) * lane_sum(a0)
        if i + 1 < stop:
            sums[i + 1 - start] += total - np.float32(2) * lane_sum(a1)
        if i + 2 < stop:
            sums[i + 2 - start] += total - np.float32(2) * lane_sum(a2)
        if i + 3 < stop:
            sums[i + 3 - start] += total - np.float32(2) * lane_sum(a3)


@numba.njit(nogil=True, cache=True)
def nibble_tables(x, count, tables):
    """The partial sums of each four of 32 * count columns, sixteen for each: what `add_nibbles` looks up."""
    column, table = address_of(x), address_of(tables)
    for k in range(2 * count):
        four_tables(column + 4 * LANES * k, table + 4 * TABLE_BYTES * k)


@numba.njit(nogil=True, cache=True, inline="always")
def add_nibbles_of_word(totals, table, step, word):
    """Totals plus the sums that the eight nibbles of one word of each of sixteen rows look up."""
    for nibble in range(8):
        totals = add_lookups(totals, table + TABLE_BYTES * nibble, step, word)
        word = next_nibble(word)
    return totals


@numba.njit(nogil=True, cache=True, inline="always")
def add_nibbles_of_rows(row, row_step, count, table, step, sums, sums_step, each):
    """`add_nibbles` for sixteen rows; reads up to three words more than `count` of each.

    Four sums in turn, one for each word, keep the additions from waiting for each other.
    """
    a0 = each_load(each, sums, sums_step)
    a1 = a2 = a3 = each_zeros(each)
    for _ in range(count >> 2):
        w0, w1, w2, w3 = four_columns(row, row_step)
        a0 = add_nibbles_of_word(a0, table, step, w0)
        a1 = add_nibbles_of_word(a1, table + 8 * TABLE_BYTES, step, w1)
        a2 = add_nibbles_of_word(a2, table + 16 * TABLE_BYTES, step, w2)
        a3 = add_nibbles_of_word(a3, table + 24 * TABLE_BYTES, step, w3)
        row += 16
        table += 32 * TABLE_BYTES
    rest = count & 3
    if rest:
        w0, w1, w2, w3 = four_columns(row, row_step)
        a0 = add_nibbles_of_word(a0, table, step, w0)
        if rest > 1:
            a1 = add_nibbles_of_word(a1, table + 8 * TABLE_BYTES, step, w1)
        if rest > 2:
            a2 = add_nibbles_of_word(a2, table + 16 * TABLE_BYTES, step, w2)
    each_store(sums, sums_step, each_add(each_add(a0, a1), each_add(a2, a3)))


@numba.njit(nogil=True, cache=True)
def aligned(size):
    """An uninitialised float32 array that begins on a cache line."""
    space = np.empty(size + LANES, np.float32)
    skip = (-address_of(space) & 63) // 4
    return space[skip : skip + size]


@numba.njit(nogil=True, cache=True)
def scaled_chunk(x, x_step, scale, first, count, columns, rows):
    """Columns 32 * first, ... of `rows` rows of x * scale into rows of 32 * count, zero beyond the last column.

    x : flat float32, rows x_step apart; scale : (d_in,) uint16 bits of float16.
    """
    stop = min(32 * count, len(scale) - 32 * first)
    for b in range(rows):
        at, x_at = b * 32 * count, b * x_step + 32 * first
        whole = stop & -LANES
        for j in range(0, whole, LANES):
            store(columns, at + j, multiply(load(x, x_at + j), load_half(scale, 32 * first + j)))
        for j in range(whole, stop):
            columns[at + j] = x[x_at + j] * half_to_float(scale[32 * first + j])
        columns[at + stop : at + 32 * count] = 0


@numba.njit(nogil=True, cache=True)
def add_nibbles_of_chunk(row, width, count, ahead, lines, apart, table, sums, sums_step, rows, each):
    """`add_nibbles` for the first `count` words of `rows` rows.

    For each sixteen of them it asks for `lines` lines of later words, `apart` bytes apart, from the address `ahead` on.
    """
    step = 8 * TABLE_BYTES * count
    for _ in range(0, rows, LANES):
        for line in range(lines):
            prefetch(ahead + apart * line)
        ahead += apart * lines
        add_nibbles_of_rows(row, 4 * width, count, table, step, sums, sums_step, each)
        row += 4 * LANES * width
        sums += 4 * LANES


@numba.njit(nogil=True, cache=True)
def add_nibbles(words, x, x_step, scale, sums, sums_step, start, stop, each):
    """`add_loops` by tables that fit a register, for all columns and for each of several rows of x.

    Arguments as of `sign_products`. Rows are taken in groups and, for each group, columns in chunks, so that a chunk's
    tables stay in the first-level cache. The first group makes the tables, each chunk's just before it is used; where
    there are more groups, they are kept. The words that come next are asked for in advance.

    The last rows, fewer than 32, are copied and padded, so that no load of four words of sixteen rows leaves the array.
    """
    rows, width = len(each), (len(scale) + 31) // 32
    padded = width + 3 & -4
    whole = start + (stop - start & -LANES)  # rows up to the last incomplete sixteen
    if (
        start < whole and (len(words) - padded) // width + 1 < whole
    ):  # the last sixteen's last loads would leave the array
        whole -= LANES
    copy = np.zeros(2 * LANES * padded if whole < stop else 0, np.uint32)
    for i in range(whole, stop):
        for k in range(width):
            copy[(i - whole) * padded + k] = words[i * width + k]
    none = np.int64(0)
    alone = width <= CHUNK or stop - start <= 2 * GROUP  # one group: tables are not worth keeping for few rows
    group_rows, kept = (max(stop - start, 1), min(width, CHUNK)) if alone else (GROUP, width)  # a share may be empty
    columns, tables = aligned(rows * 32 * CHUNK), aligned(rows * 128 * kept)
    for group in range(start, stop, group_rows):
        end = min(group + group_rows, stop)
        split = max(group, min(end, whole))  # the rows from here on are in the copy
        for first in range(0, width, CHUNK):
            count = min(CHUNK, width - first)
            mine = tables[rows * 128 * first if kept == width else 0 :]
            if group == start:
                scaled_chunk(x, x_step, scale, first, count, columns, rows)
                nibble_tables(columns, rows * count, mine)
            table, into = address_of(mine), address_of(sums) + 4 * (group - start)
            place = address_of(words) + 4 * (group * width + first)
            ahead, lines, apart = place + 4 * (GROUP * width + (GROUP - 1) * first), count, LINE  # the next group's
            if alone and width > CHUNK:
                ahead, lines, apart = place + 2 * LINE - 4, LANES, 4 * width  # the ends of the same rows' next chunks
            mine_rows = split - group
            add_nibbles_of_chunk(place, width, count, ahead, lines, apart, table, into, 4 * sums_step, mine_rows, each)
            left = end - split
            if left > 0:
                place, into = address_of(copy) + 4 * ((split - whole) * padded + first), into + 4 * (split - group)
                add_nibbles_of_chunk(place, padded, count, ahead, none, none, table, into, 4 * sums_step, left, each)
    columns[0] = tables[0] = 0  # a use after the last address: until here the arrays must not be freed


@numba.njit(nogil=True, cache=True)
def sign_products(kernel, words, x, x_step, scale, sums, sums_step, start, stop, each):
    """sums[b, i - start] = sum_j s_ij scale_j x_bj for rows start <= i < stop of signs, by one of the KERNELS.

    words : flat uint32, len(scale) signs a row; x : flat float32, rows x_step apart; scale : uint16 bits of float16;
    sums : flat float32, rows sums_step apart, each padded to a multiple of sixteen; start is a multiple of sixteen;
    each : a tuple of as many entries as rows of x.
    """
    rows, width = len(each), (len(scale) + 31) // 32
    for b in range(rows):
        sums[b * sums_step :][: stop - start + LANES - 1 & -LANES] = 0
    if kernel == NIBBLES:
        add_nibbles(words, x, x_step, scale, sums, sums_step, start, stop, each)
        return
    columns = aligned(rows * 32 * CHUNK)
    for first in range(0, width, CHUNK):
        count = min(CHUNK, width - first)
        scaled_chunk(x, x_step, scale, first, count, columns, rows)
        for b in range(rows):
            mine, part = columns[b * 32 * count :][: 32 * count], sums[b * sums_step :]
            if kernel == LOOPS:
                add_loops(words, width, first, count, mine, part, start, stop)
            elif kernel == BYTES:
                add_bytes(words, width, first, count, mine, part, start, stop)
            else:
                add_select(words, width, first, count, mine, part, start, stop)


# A layer as numbers, so that compiled code can take any number of paths, and of layers: for each path the addresses of
# its five arrays, and its rank.
U, V, H, ELL, G, RANK = range(6)
PATH_NUMBERS = 6


@numba.njit(nogil=True, cache=True, inline="always")
def words_at(address, size):
    """The uint32 array of `size` entries at an address."""
    return numba.carray(pointer(address), (size,), np.uint32)


@numba.njit(nogil=True, cache=True, inline="always")
def halves_at(address, size):
    """The float16 array of `size` entries at an address, as uint16 bits."""
    return numba.carray(pointer(address), (size,), np.uint16)


@numba.njit(nogil=True, cache=True, inline="always")
def floats_at(address, size):
    """The float32 array of `size` entries at an address."""
    return numba.carray(pointer(address), (size,), np.float32)


@numba.njit(nogil=True, cache=True)
def first_stage(kernel, path, d_in, x, start, stop, t, t_step, each):
    """t[b, i] = sum_j V_sign[j, i] g[j] x[b, j] for start <= i < stop; x and t are flat, t's rows padded to sixteen."""
    words = words_at(path[V], path[RANK] * ((d_in + 31) // 32))
    sign_products(kernel, words, x, d_in, halves_at(path[G], d_in), t[start:], t_step, start, stop, each)


@numba.njit(nogil=True, cache=True)
def second_stage(kernel, path, d_out, t, t_step, start, stop, y, accumulate, each):
    """y[b, i] (+)= h[i] sum_k U_sign[i, k] ell[k] t[b, k] for start <= i < stop; y is flat."""
    step = stop - start + LANES - 1 & -LANES
    sums = aligned(len(each) * step)
    words = words_at(path[U], d_out * ((path[RANK] + 31) // 32))
    sign_products(kernel, words, t, t_step, halves_at(path[ELL], path[RANK]), sums, step, start, stop, each)
    for b in range(len(each)):
        add_scaled(y, b * d_out, halves_at(path[H], d_out), sums, b * step, start, stop, accumulate)


@numba.njit(nogil=True, cache=True)
def add_scaled(y, y_at, h, sums, at, start, stop, accumulate):
    """y[y_at + i] (+)= h[i] * sums[at + i - start] for start <= i < stop."""
    whole = start + (stop - start & -LANES)
    for i in range(start, whole, LANES):
        value = multiply(load_half(h, i), load(sums, at + i - start))
        store(y, y_at + i, add(load(y, y_at + i), value) if accumulate else value)
    for i in range(whole, stop):
        single = half_to_float(h[i]) * sums[at + i - start]
        y[y_at + i] = y[y_at + i] + single if accumulate else single


@numba.njit(nogil=True, cache=True)
def ask_for(address, size):
    """Bring the first of `size` bytes at an address nearer, at most ASKED of them."""
    for line in range(0, min(size, ASKED), LINE):
        prefetch(address + line)


@numba.njit(nogil=True, cache=True)
def layer_rows(kernel, paths, d_out, d_in, x, y, each):
    """len(each) rows of y = W_hat x, on one thread; x and y are flat, `paths` is (paths, 6) int64."""
    start = np.int64(0)  # for a 0 as it stands Numba would compile all that is called here once more
    for order in range(len(paths)):
        path = paths[order]
        rank = path[RANK]
        step = rank + LANES - 1 & -LANES
        t = aligned(len(each) * step)
        ask_for(path[U], 4 * d_out * ((rank + 31) // 32))
        ask_for(path[H], 2 * d_out)
        first_stage(kernel, path, d_in, x, start, rank, t, step, each)
        if order + 1 < len(paths):
            ask_for(paths[order + 1, V], 4 * rank * ((d_in + 31) // 32))
            ask_for(paths[order + 1, G], 2 * d_in)
        second_stage(kernel, path, d_out, t, step, start, d_out, y, order > 0, each)


@numba.njit(nogil=True, cache=True)
def path_starts(paths):
    """Where the rows of each path begin if the rows of all, padded to sixteen, follow each other; and the end."""
    starts = np.zeros(len(paths) + 1, np.int64)
    for order in range(len(paths)):
        starts[order + 1] = starts[order] + (paths[order, RANK] + LANES - 1 & -LANES)
    return starts


@numba.njit(nogil=True, cache=True)
def unpack_rows(words, rows, scale, factor, dense, step):
    """dense[i * step + j] = factor[i] * s_ij * scale[j] for the rows of signs.

    words : flat uint32, len(scale) signs a row; scale : float32; factor : (rows,) float32; dense : flat float32.
    """
    size, halves = len(scale), words.view(np.uint16)
    width, whole = (size + 31) // 32, size & -LANES
    for i in range(rows):
        for j in range(0, whole, LANES):
            lanes = multiply(broadcast(factor[i]), load(scale, j))
            negative = add_where(zeros(), halves, 2 * width * i + j // LANES, lanes)
            store(dense, i * step + j, subtract(lanes, add(negative, negative)))
        for j in range(whole, size):
            value = factor[i] * scale[j]
            dense[i * step + j] = -value if words[i * width + j // 32] >> np.uint32(j % 32) & np.uint32(1) else value


@numba.njit(nogil=True, cache=True)
def unpack(plan, d_out, d_in, a_address, b_address):
    """All paths as one pair: A = diag(ell) V_sign^T diag(g), stacked, and B = diag(h) U_sign, side by side.

    plan : six numbers for each path; a, b : addresses of (R, d_in) and (d_out, R) float32 for a total rank R.
    """
    paths = plan.reshape(-1, PATH_NUMBERS)
    total = paths[:, RANK].sum()
    a, b = floats_at(a_address, total * d_in), floats_at(b_address, d_out * total)
    before = 0
    for order in range(len(paths)):
        path = paths[order]
        rank = path[RANK]
        h, ell, g = floats_of(path[H], d_out), floats_of(path[ELL], rank), floats_of(path[G], d_in)
        v_words = words_at(path[V], rank * ((d_in + 31) // 32))
        unpack_rows(v_words, rank, g, ell, a[before * d_in :], d_in)
        u_words = words_at(path[U], d_out * ((rank + 31) // 32))
        unpack_rows(u_words, d_out, np.ones(rank, np.float32), h, b[before:], total)
        before += rank


@numba.njit(nogil=True, cache=True)
def floats_of(place, size):
    """Float16 values at an address, as a float32 array."""
    halves = halves_at(place, size)
    values = np.empty(size, np.float32)
    for j in range(size):
        values[j] = half_to_float(halves[j])
    return values


@numba.njit(nogil=True, cache=True)
def lookup_rounds(words, tables, sums, rounds):
    """The innermost loop of `nibbles` and nothing else: `rounds` times 2048 sign additions from registers and cache."""
    table, into = address_of(tables), address_of(sums)
    a0 = a1 = a2 = a3 = each_zeros((0,))
    for _ in range(rounds):
        w0, w1 = load_words(words, 0), load_words(words, LANES)
        w2, w3 = load_words(words, 2 * LANES), load_words(words, 3 * LANES)
        a0 = add_nibbles_of_word(a0, table, 0, w0)
        a1 = add_nibbles_of_word(a1, table + 8 * TABLE_BYTES, 0, w1)
        a2 = add_nibbles_of_word(a2, table + 16 * TABLE_BYTES, 0, w2)
        a3 = add_nibbles_of_word(a3, table + 24 * TABLE_BYTES, 0, w3)
        each_store(into, 0, a3)  # a store keeps the loads of the words from leaving the loop
    each_store(into, 0, each_add(each_add(a0, a1), each_add(a2, a3)))


def lookups_per_second(threads: int = 1, rounds: int = 20000) -> float:
    """Sign additions a second that cores reach when only looking up: the limit of `nibbles` on this machine."""
    start_together = threading.Barrier(threads)

    def rate() -> float:
        words, tables = np.arange(4 * LANES, dtype=np.uint32) * 2654435769, aligned(32 * LANES)
        words, sums = words.astype(np.uint32), aligned(4 * LANES)
        tables[:] = 1
        lookup_rounds(words, tables, sums, 1)
        start_together.wait()
        start = time.perf_counter()
        lookup_rounds(words, tables, sums, rounds)
        return 4 * 512 * rounds / (time.perf_counter() - start)

    if threads == 1:
        return rate()
    with ThreadPoolExecutor(threads) as pool:
        return sum(each.result() for each in [pool.submit(rate) for _ in range(threads)])
