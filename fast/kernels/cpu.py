"""Multiply packed sign matrices by vectors on a CPU: four GEMV kernels in Numba, from simple to fast.

All four compute the same sums, sums_i = sum_j s_ij x_j, for rows of signs s and one vector x, or a few. (A matrix times
one vector is a GEMV; times a batch of vectors, a GEMM.) Read them in this order:

| kernel | what it changes | additions a cycle, at most | measured, 1e9 additions a second |
|---|---|---|---|
| `add_loops` | one sign, one addition | 1 | 1.5 |
| `add_bytes` | lookup table: eight signs choose one of 256 sums, made once for all rows | 8 to 12 | 15 |
| `add_select` | SIMD: sixteen signs mask sixteen lanes; y = sum x - 2 * (sum of x where the sign is -1) | 16 | 23 |
| `add_nibbles` | lookup table in a register: four signs choose one of 16 sums; sixteen rows at once | 44 | 53 |

"At most" counts instructions of an AVX-512 core. "Measured" is one core on an 11008 x 4096 layer of 0.55 bits, from
book/results/cpu_ladder.json: `add_nibbles` is 37 times faster than `add_loops`.

**Bytes read.** All four read the same bytes from memory: for an output with n signs, n / 8 bytes of sign words and two
bytes of its float16 scale. A dense float16 row reads 2 n bytes. The vector x is read once, and each byte of sign words
once for up to four rows of x.

**What limits them.** The first three are bound by instructions. `add_nibbles` comes close to the ridge of the roofline,
where instructions (lookups) and memory bandwidth limit alike: on a 28672 x 8192 layer of 0.55 bits it reads 7.4 GB/s of
sign words. That is 52 % of what its innermost loop handles from registers and first-level cache (`lookups_per_second`),
and torch's bfloat16 layer, bound by memory bandwidth, reads 8.5 GB/s there and takes 26 times as long (one core,
book/results/cpu_linear.json). Small layers reach less, 20 % of the lookups for 4096 x 4096 at 0.1 bits: making the
tables of x takes a larger share of their time.

**How `add_nibbles` works.** It loads the words of sixteen rows and transposes them, so that lane i of a register holds
a word of row i. One VPERMPS then looks four signs of each row up in a table of sixteen sums, which fills one AVX-512
register. A lookup, an addition and a shift to the next nibble handle 64 signs, and two execution ports share these
three instructions. The transposition costs five instructions for each 512 signs, which leaves 36 additions a cycle at
best. The tables are made once for all rows. Columns are taken in tiles of 512, whose tables (8 KB) stay in the
first-level cache.

The result for a row of x does not depend on the number of threads or on the other rows of x, with one exception: large
batches use torch's BLAS instead (see `CpuPackedLayer.is_quicker_unpacked`).

This file needs Numba but not torch. cpu_simd.py has the vector instructions, cpu_threads.py divides a layer among
threads, cpu_layer.py passes torch tensors to it, and decoding/cpu_decoder.py passes NumPy arrays.
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
    address_of,
    batch_add,
    batch_load,
    batch_store,
    batch_zeros,
    broadcast,
    half_to_float,
    horizontal_sum,
    load,
    load_half,
    load_transposed,
    load_words,
    masked_add,
    multiply,
    pointer,
    prefetch,
    shift_right_nibble,
    store,
    store_lookup_tables,
    subtract,
    zeros,
)

LOOPS, BYTES, SELECT, NIBBLES = 1, 2, 3, 4
KERNELS = {"loops": LOOPS, "bytes": BYTES, "select": SELECT, "nibbles": NIBBLES}
BEST = NIBBLES

TILE_WORDS = 16  # sign words of a row in one K tile (512 columns): its lookup tables take 8 KB
TABLE_BYTES = 4 * LANES
ROW_TILE = 64  # rows of signs that use a K tile's tables before the next K tile; the next 64 rows are prefetched
PREFETCH_BYTES = 1 << 14  # limit on the bytes of the next stage's words that are prefetched before this stage
CACHE_LINE = 64  # bytes


@numba.njit(nogil=True, cache=True)
def add_loops(words, stride, first, count, x, sums, start, stop):
    """Add sum_j s_ij x_j to sums[i - start] for rows start <= i < stop, one sign at a time.

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
    """Compute `add_loops` by table lookup: a table of 256 sums for each eight columns, shared by all rows.

    A sign costs 1/8 load of a word's byte and 1/8 load from a table. The tables of a K tile take 64 KB, more than a
    first-level cache.
    """
    tables = np.empty((4 * count, 256), np.float32)
    for k in range(4 * count):
        tables[k, 0] = x[8 * k : 8 * k + 8].sum()
        for bit in range(8):  # setting a bit turns +x into -x: it subtracts x twice
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
    """Compute `add_loops` by SIMD: sixteen sign bits mask the addition of sixteen columns.

    sum_j s_ij x_j = sum_j x_j - 2 * (sum of x_j where s_ij = -1). Four rows share each load of x, and all rows sum_j
    x_j.
    """
    halves = words.view(np.uint16)
    all_x = zeros()
    for k in range(2 * count):
        all_x = add(all_x, load(x, LANES * k))
    total = horizontal_sum(all_x)
    step = 2 * stride
    for i in range(start, stop, 4):
        row0 = 2 * (i * stride + first)
        row1 = row0 + step if i + 1 < stop else row0
        row2 = row0 + 2 * step if i + 2 < stop else row0
        row3 = row0 + 3 * step if i + 3 < stop else row0
        a0 = a1 = a2 = a3 = zeros()
        for k in range(2 * count):
            lanes = load(x, LANES * k)
            a0, a1 = masked_add(a0, halves, row0 + k, lanes), masked_add(a1, halves, row1 + k, lanes)
            a2, a3 = masked_add(a2, halves, row2 + k, lanes), masked_add(a3, halves, row3 + k, lanes)
        sums[i - start] += total - np.float32(2) * horizontal_sum(a0)
        if i + 1 < stop:
            sums[i + 1 - start] += total - np.float32(2) * horizontal_sum(a1)
        if i + 2 < stop:
            sums[i + 2 - start] += total - np.float32(2) * horizontal_sum(a2)
        if i + 3 < stop:
            sums[i + 3 - start] += total - np.float32(2) * horizontal_sum(a3)


# The fastest kernel, `add_nibbles`, from its innermost loop outwards. `batch` is a tuple with one entry for each row of
# x that shares the lookups' instructions. Its entries are not used: its length tells Numba the batch size when it
# compiles, so that the rows of x become registers, not a loop.


@numba.njit(nogil=True, cache=True, inline="always")
def add_word(totals, table, step, word):
    """Add to `totals` what the eight nibbles of one word of each of sixteen rows look up."""
    for nibble in range(8):
        totals = add_lookups(totals, table + TABLE_BYTES * nibble, step, word)
        word = shift_right_nibble(word)
    return totals


@numba.njit(nogil=True, cache=True, inline="always")
def add_sixteen_rows(row, row_step, count, table, step, sums, sums_step, batch):
    """Compute `add_nibbles` for sixteen rows; reads up to three words more than `count` of each.

    Words go to four accumulators in turn, so that additions do not wait for each other's latency.
    """
    a0 = batch_load(batch, sums, sums_step)
    a1 = a2 = a3 = batch_zeros(batch)
    for _ in range(count >> 2):
        w0, w1, w2, w3 = load_transposed(row, row_step)
        a0 = add_word(a0, table, step, w0)
        a1 = add_word(a1, table + 8 * TABLE_BYTES, step, w1)
        a2 = add_word(a2, table + 16 * TABLE_BYTES, step, w2)
        a3 = add_word(a3, table + 24 * TABLE_BYTES, step, w3)
        row += 16
        table += 32 * TABLE_BYTES
    rest = count & 3
    if rest:
        w0, w1, w2, w3 = load_transposed(row, row_step)
        a0 = add_word(a0, table, step, w0)
        if rest > 1:
            a1 = add_word(a1, table + 8 * TABLE_BYTES, step, w1)
        if rest > 2:
            a2 = add_word(a2, table + 16 * TABLE_BYTES, step, w2)
    batch_store(sums, sums_step, batch_add(batch_add(a0, a1), batch_add(a2, a3)))


@numba.njit(nogil=True, cache=True)
def add_tile(row, width, count, ahead, lines, apart, table, sums, sums_step, rows, batch):
    """Compute `add_nibbles` for one K tile, the first `count` words of `rows` rows.

    For each sixteen rows it prefetches `lines` cache lines of later words, `apart` bytes apart, from address `ahead`.
    """
    step = 8 * TABLE_BYTES * count
    for _ in range(0, rows, LANES):
        for line in range(lines):
            prefetch(ahead + apart * line)
        ahead += apart * lines
        add_sixteen_rows(row, 4 * width, count, table, step, sums, sums_step, batch)
        row += 4 * LANES * width
        sums += 4 * LANES


@numba.njit(nogil=True, cache=True)
def make_lookup_tables(x, count, tables):
    """Compute the tables that `add_nibbles` uses: sixteen sums for each four of 32 * count columns."""
    column, table = address_of(x), address_of(tables)
    for k in range(2 * count):
        store_lookup_tables(column + 4 * LANES * k, table + 4 * TABLE_BYTES * k)


@numba.njit(nogil=True, cache=True)
def aligned_empty(size):
    """Allocate an uninitialised float32 array that begins on a cache line."""
    space = np.empty(size + LANES, np.float32)
    skip = (-address_of(space) & 63) // 4
    return space[skip : skip + size]


@numba.njit(nogil=True, cache=True)
def scale_tile(x, x_step, scale, first, count, columns, rows):
    """Copy columns 32 * first, ... of x * scale for `rows` rows of x, 32 * count columns each, padded with zeros.

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
def add_nibbles(words, x, x_step, scale, sums, sums_step, start, stop, batch):
    """Compute `add_loops` by lookup tables that fit a register, for all columns and for each row of x.

    Arguments are the same as for `multiply_signs`. Rows are taken in tiles and, within a row tile, columns in K tiles,
    so that the tables of a K tile stay in the first-level cache. The first row tile makes the tables, each just before
    it is used; they are kept for the other row tiles. The words that come next are prefetched.

    Loads take four words of sixteen rows. So that none leaves the array, the last rows, fewer than 32, are copied to a
    padded array first.
    """
    rows, width = len(batch), (len(scale) + 31) // 32
    padded = width + 3 & -4
    whole = start + (stop - start & -LANES)  # rows up to the last incomplete sixteen
    readable = (len(words) - padded) // width + 1  # rows whose last load of four words stays within the array
    if start < whole and readable < whole:
        whole -= LANES
    copy = np.zeros(2 * LANES * padded if whole < stop else 0, np.uint32)
    for i in range(whole, stop):
        for k in range(width):
            copy[(i - whole) * padded + k] = words[i * width + k]
    none = np.int64(0)
    single = width <= TILE_WORDS or stop - start <= 2 * ROW_TILE  # one row tile: few rows do not repay keeping tables
    # max: a thread may get no rows
    tile_rows, kept = (max(stop - start, 1), min(width, TILE_WORDS)) if single else (ROW_TILE, width)
    columns, tables = aligned_empty(rows * 32 * TILE_WORDS), aligned_empty(rows * 128 * kept)
    for tile in range(start, stop, tile_rows):
        end = min(tile + tile_rows, stop)
        split = max(tile, min(end, whole))  # rows from here on are in the copy
        for first in range(0, width, TILE_WORDS):
            count = min(TILE_WORDS, width - first)
            mine = tables[rows * 128 * first if kept == width else 0 :]
            if tile == start:
                scale_tile(x, x_step, scale, first, count, columns, rows)
                make_lookup_tables(columns, rows * count, mine)
            table, into = address_of(mine), address_of(sums) + 4 * (tile - start)
            place = address_of(words) + 4 * (tile * width + first)
            # prefetch the next row tile
            ahead, lines, apart = place + 4 * (ROW_TILE * width + (ROW_TILE - 1) * first), count, CACHE_LINE
            if single and width > TILE_WORDS:  # or the same rows' next K tile
                ahead, lines, apart = place + 2 * CACHE_LINE - 4, LANES, 4 * width
            add_tile(place, width, count, ahead, lines, apart, table, into, 4 * sums_step, split - tile, batch)
            left = end - split
            if left > 0:
                place, into = address_of(copy) + 4 * ((split - whole) * padded + first), into + 4 * (split - tile)
                add_tile(place, padded, count, ahead, none, none, table, into, 4 * sums_step, left, batch)
    columns[0] = tables[0] = 0  # Numba frees an array after its last use, and does not count uses of its address


@numba.njit(nogil=True, cache=True)
def multiply_signs(kernel, words, x, x_step, scale, sums, sums_step, start, stop, batch):
    """Compute sums[b, i - start] = sum_j s_ij scale_j x_bj for rows start <= i < stop of signs.

    kernel : one of KERNELS; words : flat uint32, len(scale) signs a row; x : flat float32, rows x_step apart;
    scale : uint16 bits of float16; sums : flat float32, rows sums_step apart, each padded to a multiple of sixteen;
    start : a multiple of sixteen; batch : a tuple with one entry for each row of x.
    """
    rows, width = len(batch), (len(scale) + 31) // 32
    for b in range(rows):
        sums[b * sums_step :][: stop - start + LANES - 1 & -LANES] = 0
    if kernel == NIBBLES:
        add_nibbles(words, x, x_step, scale, sums, sums_step, start, stop, batch)
        return
    columns = aligned_empty(rows * 32 * TILE_WORDS)
    for first in range(0, width, TILE_WORDS):
        count = min(TILE_WORDS, width - first)
        scale_tile(x, x_step, scale, first, count, columns, rows)
        for b in range(rows):
            mine, part = columns[b * 32 * count :][: 32 * count], sums[b * sums_step :]
            if kernel == LOOPS:
                add_loops(words, width, first, count, mine, part, start, stop)
            elif kernel == BYTES:
                add_bytes(words, width, first, count, mine, part, start, stop)
            else:
                add_select(words, width, first, count, mine, part, start, stop)


# A packed layer is passed to compiled code as an int64 array, one row for each path: the addresses of the path's five
# arrays, and its rank. Compiled code can then take any number of paths, and of layers.
U, V, H, ELL, G, RANK = range(6)
PATH_FIELDS = 6


@numba.njit(nogil=True, cache=True, inline="always")
def words_at(address, size):
    """View `size` uint32 values at an address as an array."""
    return numba.carray(pointer(address), (size,), np.uint32)


@numba.njit(nogil=True, cache=True, inline="always")
def halves_at(address, size):
    """View `size` float16 values at an address as an array of their bits, uint16."""
    return numba.carray(pointer(address), (size,), np.uint16)


@numba.njit(nogil=True, cache=True, inline="always")
def floats_at(address, size):
    """View `size` float32 values at an address as an array."""
    return numba.carray(pointer(address), (size,), np.float32)


@numba.njit(nogil=True, cache=True)
def first_stage(kernel, path, d_in, x, start, stop, t, t_step, batch):
    """Compute t[b, i] = sum_j V_sign[j, i] g[j] x[b, j] for start <= i < stop.

    x and t are flat; the rows of t are padded to multiples of sixteen.
    """
    words = words_at(path[V], path[RANK] * ((d_in + 31) // 32))
    multiply_signs(kernel, words, x, d_in, halves_at(path[G], d_in), t[start:], t_step, start, stop, batch)


@numba.njit(nogil=True, cache=True)
def second_stage(kernel, path, d_out, t, t_step, start, stop, y, accumulate, batch):
    """Compute y[b, i] = h[i] sum_k U_sign[i, k] ell[k] t[b, k] for start <= i < stop, or add it; y is flat."""
    step = stop - start + LANES - 1 & -LANES
    sums = aligned_empty(len(batch) * step)
    words = words_at(path[U], d_out * ((path[RANK] + 31) // 32))
    multiply_signs(kernel, words, t, t_step, halves_at(path[ELL], path[RANK]), sums, step, start, stop, batch)
    for b in range(len(batch)):
        scale_outputs(y, b * d_out, halves_at(path[H], d_out), sums, b * step, start, stop, accumulate)


@numba.njit(nogil=True, cache=True)
def scale_outputs(y, y_at, h, sums, at, start, stop, accumulate):
    """Store h[i] * sums[at + i - start] to y[y_at + i] for start <= i < stop, or add it to what is there."""
    whole = start + (stop - start & -LANES)
    for i in range(start, whole, LANES):
        value = multiply(load_half(h, i), load(sums, at + i - start))
        store(y, y_at + i, add(load(y, y_at + i), value) if accumulate else value)
    for i in range(whole, stop):
        single = half_to_float(h[i]) * sums[at + i - start]
        y[y_at + i] = y[y_at + i] + single if accumulate else single


@numba.njit(nogil=True, cache=True)
def prefetch_range(address, size):
    """Prefetch `size` bytes at an address, at most PREFETCH_BYTES of them."""
    for line in range(0, min(size, PREFETCH_BYTES), CACHE_LINE):
        prefetch(address + line)


@numba.njit(nogil=True, cache=True)
def layer_rows(kernel, paths, d_out, d_in, x, y, batch):
    """Compute y = W_hat x for len(batch) rows of x on one thread; x and y are flat, `paths` is (paths, 6) int64."""
    start = np.int64(0)  # a literal 0 would make Numba compile everything below a second time
    for order in range(len(paths)):
        path = paths[order]
        rank = path[RANK]
        step = rank + LANES - 1 & -LANES
        t = aligned_empty(len(batch) * step)
        prefetch_range(path[U], 4 * d_out * ((rank + 31) // 32))
        prefetch_range(path[H], 2 * d_out)
        first_stage(kernel, path, d_in, x, start, rank, t, step, batch)
        if order + 1 < len(paths):
            prefetch_range(paths[order + 1, V], 4 * rank * ((d_in + 31) // 32))
            prefetch_range(paths[order + 1, G], 2 * d_in)
        second_stage(kernel, path, d_out, t, step, start, d_out, y, order > 0, batch)


@numba.njit(nogil=True, cache=True)
def path_offsets(paths):
    """Compute where each path's ranks begin, and where the last end, if padded to sixteen and laid end to end."""
    offsets = np.zeros(len(paths) + 1, np.int64)
    for order in range(len(paths)):
        offsets[order + 1] = offsets[order] + (paths[order, RANK] + LANES - 1 & -LANES)
    return offsets


# Unpacking to dense matrices, for large batches: torch's BLAS then does a GEMM.


@numba.njit(nogil=True, cache=True)
def unpack_rows(words, rows, scale, factor, dense, step):
    """Compute dense[i * step + j] = factor[i] * s_ij * scale[j] for the rows of signs.

    words : flat uint32, len(scale) signs a row; scale : float32; factor : (rows,) float32; dense : flat float32.
    """
    size, halves = len(scale), words.view(np.uint16)
    width, whole = (size + 31) // 32, size & -LANES
    for i in range(rows):
        for j in range(0, whole, LANES):
            lanes = multiply(broadcast(factor[i]), load(scale, j))
            negative = masked_add(zeros(), halves, 2 * width * i + j // LANES, lanes)
            store(dense, i * step + j, subtract(lanes, add(negative, negative)))
        for j in range(whole, size):
            value = factor[i] * scale[j]
            dense[i * step + j] = -value if words[i * width + j // 32] >> np.uint32(j % 32) & np.uint32(1) else value


@numba.njit(nogil=True, cache=True)
def unpack(paths, d_out, d_in, a_address, b_address):
    """Unpack all paths to one pair of dense factors with W_hat = B A.

    A stacks diag(ell) V_sign^T diag(g) of the paths; B has diag(h) U_sign of the paths side by side.

    paths : (paths, PATH_FIELDS) int64; a_address, b_address : addresses of (R, d_in) and (d_out, R)
    float32 for a total rank R.
    """
    total = paths[:, RANK].sum()
    a, b = floats_at(a_address, total * d_in), floats_at(b_address, d_out * total)
    before = 0
    for order in range(len(paths)):
        path = paths[order]
        rank = path[RANK]
        h, ell, g = halves_to_floats(path[H], d_out), halves_to_floats(path[ELL], rank), halves_to_floats(path[G], d_in)
        v_words = words_at(path[V], rank * ((d_in + 31) // 32))
        unpack_rows(v_words, rank, g, ell, a[before * d_in :], d_in)
        u_words = words_at(path[U], d_out * ((rank + 31) // 32))
        unpack_rows(u_words, d_out, np.ones(rank, np.float32), h, b[before:], total)
        before += rank


@numba.njit(nogil=True, cache=True)
def halves_to_floats(address, size):
    """Convert `size` float16 values at an address to a float32 array."""
    halves = halves_at(address, size)
    values = np.empty(size, np.float32)
    for j in range(size):
        values[j] = half_to_float(halves[j])
    return values


# The compute ceiling of the roofline: how fast the innermost loop is when it waits for no memory.


@numba.njit(nogil=True, cache=True)
def lookup_rounds(words, tables, sums, rounds):
    """Run the innermost loop of `add_nibbles` alone: `rounds` times 2048 sign additions from registers and L1 cache."""
    table, into = address_of(tables), address_of(sums)
    a0 = a1 = a2 = a3 = batch_zeros((0,))
    for _ in range(rounds):
        w0, w1 = load_words(words, 0), load_words(words, LANES)
        w2, w3 = load_words(words, 2 * LANES), load_words(words, 3 * LANES)
        a0 = add_word(a0, table, 0, w0)
        a1 = add_word(a1, table + 8 * TABLE_BYTES, 0, w1)
        a2 = add_word(a2, table + 16 * TABLE_BYTES, 0, w2)
        a3 = add_word(a3, table + 24 * TABLE_BYTES, 0, w3)
        batch_store(into, 0, a3)  # without a store LLVM would move the loads of the words out of the loop
    batch_store(into, 0, batch_add(batch_add(a0, a1), batch_add(a2, a3)))


def lookups_per_second(threads: int = 1, rounds: int = 20000) -> float:
    """Measure the sign additions a second of `lookup_rounds` on some threads: the ceiling of `add_nibbles` here."""
    start_together = threading.Barrier(threads)

    def rate() -> float:
        words, tables = np.arange(4 * LANES, dtype=np.uint32) * 2654435769, aligned_empty(32 * LANES)
        words, sums = words.astype(np.uint32), aligned_empty(4 * LANES)
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
