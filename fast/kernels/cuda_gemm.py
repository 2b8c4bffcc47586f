"""Multiply packed signs with many vectors by a GEMM on tensor cores: signs become float16 in registers.

For 5 rows of x or more, in 16 bits. Four launches, two for each of y = U (V x):

    scale_vectors   each vector times g, divided by a power of two, rounded to float16
    gemm            its products with V, split-K over d_in, times ell
    scale_vectors   the sum of the partial sums, divided by a power of two, rounded to float16
    gemm            its products with U, times h

Versions, simple to fast (28672 x 8192 at 0.55 bits, 64 rows; book/results/cuda_batches.json, H100):

1. The GEMV (cuda_gemv.py) for each four rows: memory traffic grows with the batch.
2. `gemm` by mma: a lane turns two signs into two float16, +scale or -scale, by a shift, an AND and an XOR. Words of
   signs are read from memory as they are, so up to the point where arithmetic takes longer than reading them (the ridge
   of the roofline) a batch moves no more bytes of weights than one vector.
3. `gemm` by wgmma, on compute capability 9.0: four warps multiply 64 rows together, and vectors need no registers. With
   it the layer takes 56 us, a third of cuBLAS's dense float16, at 17 % of the speed of a copy: bound by arithmetic.
4. `direct`: without the first launch, where x is float16 with a multiple of eight columns. `gemm` then multiplies x
   itself with +g or -g, and its sums with ell.

From some hundreds of rows on, turning signs into float16 for each tile costs more than writing them out once:
cuda_unpack.py.

Bytes moved: each bit of U and V once for each tile of vectors (16 to 128 of them), x and y once, and the split-K
partial sums, 4 * split_k * rank for a row.

The division by a power of two brings a vector's largest entry near 2^14, so that nothing overflows float16; the factor
is multiplied back in the epilogue. Sums are float32. Beside the rounding of the output there are two roundings, of the
scaled vectors, each by at most 2^-11 of an entry.

`gemm` is a software pipeline, double buffering with more than two buffers: cp.async fills 4 to 12 stages of shared
memory ahead of the products. A stage holds 64 entries of each vector and two words of signs of each row. The chunks of
a vector are swizzled, so that neither copies nor ldmatrix have bank conflicts. 88 KiB of stages leave room for two
blocks on a multiprocessor (its occupancy).
"""

# Numba gives cuda.threadIdx, tuples and integer types other meanings than their Python stand-ins.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportOptionalSubscript=false

from functools import partial
from typing import Any, NamedTuple

from numba import cuda, float32, int32, types, uint32

from .cuda_elements import (
    AT,
    ELEMENTS,
    HALVES,
    LOAD8,
    ROUND,
    SIGNATURES,
    SINGLES,
    WORDS,
    absmax8,
    add8,
    half_at,
    half_load8,
    kernel_factory,
    load8,
    mul8,
)
from .cuda_intrinsics import (
    as_bits,
    as_float,
    cp_async_4,
    cp_async_16,
    cp_async_16_zero_fill,
    cp_async_commit,
    cp_async_wait_group,
    griddep_launch_dependents,
    griddep_wait,
    larger,
    round_to_half,
    store4,
    warp_max,
)
from .cuda_mma import (
    fence_async_proxy,
    load_strided,
    store_accumulators,
    warp_mma,
    warpgroup_mma,
    zero_accumulators,
)

K_STEP = 64  # entries of a vector, and signs of a row, that a block multiplies between two barriers
K_STEP_WORDS = K_STEP // 2  # words of a step's piece of a vector, two float16 in each
SCALING_THREADS = 1024  # most threads of a block that scales a vector
SCALED_AT_ONCE = 16  # entries of a vector that a thread scales at once
STAGES_BYTES = 88 << 10  # shared memory for stages: two blocks then fit a multiprocessor
MIN_STAGES, MAX_STAGES = 4, 12


class GemmTile(NamedTuple):
    """The rows and vectors that a block of `gemm` computes at once; it has no more rows than threads.

    Attributes
    ----------
    warps_down, warps_across : int
        Warps of a block that have different rows, or different vectors.
    down : int
        Fragments of 16 rows of a warp.
    across : int
        Fragments of 8 vectors of a warp.
    """

    warps_down: int
    warps_across: int
    down: int
    across: int

    @property
    def rows(self) -> int:
        """Count the rows of a block."""
        return 16 * self.warps_down * self.down

    @property
    def vectors(self) -> int:
        """Count the vectors of a block."""
        return 8 * self.warps_across * self.across

    @property
    def threads(self) -> int:
        """Count the threads of a block."""
        return 32 * self.warps_down * self.warps_across

    @property
    def fits_wgmma(self) -> bool:
        """Return whether groups of four warps can have 64 rows each, as wgmma multiplies them."""
        return self.warps_across == self.down == 1 and self.warps_down % 4 == 0

    @property
    def stage_words(self) -> int:
        """Count the words of shared memory that a stage takes."""
        return K_STEP_WORDS * self.vectors + 2 * self.rows

    @property
    def stages(self) -> int:
        """Count the stages of the pipeline."""
        return min(MAX_STAGES, max(MIN_STAGES, STAGES_BYTES // (4 * self.stage_words)))

    def shared_bytes(self, terms: int, direct: bool = False) -> int:
        """Count a block's bytes of shared memory: stages and scales (later the sums in their place), and units or g."""
        held = max(self.stages * self.stage_words + terms * self.rows, self.vectors * (self.rows + 4))
        return 4 * (held + (self.stages * K_STEP_WORDS if direct else self.vectors))


# ---- Vectors as float16 with a power of two


@cuda.jit(device=True, forceinline=True)
def unit_bits(largest):
    """Return the bits of the power of two that a vector is divided by, or of NaN.

    `largest` is the bits of the vector's largest magnitude.
    """
    exponent = max(largest >> uint32(23), uint32(15))
    return uint32((exponent - uint32(14)) << uint32(23)) if exponent < uint32(255) else uint32(0x7FC00000)


@cuda.jit(device=True, forceinline=True)
def column_of(place):
    """Return the first of the two columns in the word at `place`, a multiple of eight.

    The second column is 16 further.
    """
    return int32(int32(int32(place >> 4) << 5) + int32(place & 15))


@cuda.jit(device=True, forceinline=True)
def two_halves(low, high):
    """Round two float32 to float16 and pack them into a word."""
    return uint32(uint32(round_to_half(low)) | uint32(round_to_half(high)) << uint32(16))


@cuda.jit(device=True, forceinline=True)
def store_scaled(out, place, low, high, inverse):
    """Store eight words of two float16 each, multiplied by `inverse`."""
    for i in range(2):
        a, b, c, d = low[4 * i], low[4 * i + 1], low[4 * i + 2], low[4 * i + 3]
        e, f, g, h = high[4 * i], high[4 * i + 1], high[4 * i + 2], high[4 * i + 3]
        store4(
            out, uint32(place + 4 * i), two_halves(a * inverse, e * inverse), two_halves(b * inverse, f * inverse),
            two_halves(c * inverse, g * inverse), two_halves(d * inverse, h * inverse),
        )  # fmt: skip


@kernel_factory
def scale_vectors(dtype: str, aligned: bool, count: int, split_k: int, pdl: bool) -> Any:
    """Make a kernel that divides each vector by a power of two and rounds it to float16.

    Entries i and i + 16 of each 32 share a word, the order that `warp_mma` takes.

    Parameters
    ----------
    dtype : str
        Of the input: a key of ELEMENTS.
    aligned : bool
        Whether vectors have a multiple of eight entries.
    count : int
        How many g: the vectors are x times each g. If 0, they are the sums of `split_k` float32 partial sums.
    split_k : int
    pdl : bool
        Programmatic dependent launch.
    """
    at_place, at_once, eight = AT[dtype], LOAD8[dtype], load8(aligned)

    @cuda.jit(device=True, forceinline=True)
    def entries(source, weights, base, column, d_in, distance):
        """Load eight entries, times g or summed over partial sums."""
        found = eight(source, at_place, at_once, base, column, d_in)
        if count > 0:
            return mul8(found, eight(weights, half_at, half_load8, int32(0), column, d_in))
        for split in range(1, split_k):  # unrolled, so that no load waits for another
            found = add8(found, eight(source, at_place, at_once, int32(base + split * distance), column, d_in))
        return found

    @cuda.jit
    def kernel(source, gs, out, units, rows, vectors, d_in, stride):
        """Launch with a grid of (rows, number of gs): a block scales one vector.

        A vector takes `stride` words of `out`, which has room for `vectors` vectors of each g.
        """
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        row, which = int32(cuda.blockIdx.x), int32(cuda.blockIdx.y)
        largest_of_warps = cuda.shared.array(0, uint32)
        weights = gs[which]
        base, distance = int32(row * d_in), int32(rows * d_in)
        if pdl:
            griddep_wait()
            griddep_launch_dependents()
        first = int32(thread << 3)
        column = column_of(first)
        low = entries(source, weights, base, column, d_in, distance)
        high = entries(source, weights, base, int32(column + 16), d_in, distance)
        largest, place = larger(absmax8(low), absmax8(high)), int32(first + int32(threads << 3))
        while place < stride:
            column = column_of(place)
            largest = larger(largest, absmax8(entries(source, weights, base, column, d_in, distance)))
            largest = larger(largest, absmax8(entries(source, weights, base, int32(column + 16), d_in, distance)))
            place = int32(place + int32(threads << 3))
        bits, lane = warp_max(as_bits(largest)), int32(thread & 31)
        if lane == 0:
            largest_of_warps[uint32(thread >> 5)] = bits
        cuda.syncthreads()
        unit = unit_bits(warp_max(largest_of_warps[uint32(lane)] if lane < int32(threads >> 5) else uint32(0)))
        inverse = as_float(uint32(uint32(0x7F000000) - unit)) if unit != uint32(0x7FC00000) else as_float(unit)
        target, place = int32(int32(int32(which * vectors) + row) * stride), first
        while place < stride:
            if place > first:  # the first entries are still in registers
                column = column_of(place)
                low = entries(source, weights, base, column, d_in, distance)
                high = entries(source, weights, base, int32(column + 16), d_in, distance)
            store_scaled(out, int32(target + place), low, high, inverse)
            place = int32(place + int32(threads << 3))
        if thread == 0:
            units[uint32(int32(which * vectors) + row)] = as_float(unit)

    SIGNATURES[kernel] = types.void(
        ELEMENTS[dtype], types.UniTuple(HALVES, max(count, 1)), WORDS, SINGLES, *[types.int32] * 4
    )
    return kernel


# ---- Products


@kernel_factory
def gemm(
    dtype: str, tile: GemmTile, outputs: int, terms: int, pdl: bool, wgmma: bool = False, direct: bool = False
) -> Any:
    """Make a kernel that multiplies vectors from `scale_vectors` with signs times the scales of their rows.

    Parameters
    ----------
    dtype : str
        Of the outputs: a key of ELEMENTS.
    tile : GemmTile
    outputs : int
        Separate outputs, of which each block computes one: a path of V each.
    terms : int
        Matrices of signs whose products are summed for an output: the one or two paths of U.
    pdl : bool
        Programmatic dependent launch.
    wgmma : bool
        Multiply by `warpgroup_mma` instead of `warp_mma`; needs compute capability 9.0.
    direct : bool
        Multiply x itself, float16 with a multiple of eight columns, with signs times g; for one term.
    """
    rounded, stages = ROUND[dtype], tile.stages
    tile_rows, tile_vectors, threads = tile.rows, tile.vectors, tile.threads
    stage_x, sums_stride = K_STEP_WORDS * tile_vectors, tile_rows + 4
    # Words of shared memory: pieces of x, words of signs, scales, and units or g. The sums later take the place of all
    # but the last.
    signs_at = stages * stage_x
    scales_at = signs_at + stages * 2 * tile_rows
    units_at = max(scales_at + terms * tile_rows, tile_vectors * sums_stride)
    g_at, per_chunk = units_at, 8 if direct else 4  # elements of x in a chunk of 16 bytes
    per_step = 8 * per_chunk
    turns_of_sums = tile_rows * tile_vectors // threads
    down, across, warps_down = tile.down, tile.across, tile.warps_down
    chunks_of_x, stage_signs = 8 * tile_vectors, 2 * tile_rows
    turns_of_x, turns_of_signs = -(-chunks_of_x // threads), -(-stage_signs // threads)
    mma_first, mma_second = (warp_mma(down, across, half, 8 * K_STEP_WORDS, direct) for half in range(2))
    mma_both = warpgroup_mma(across, direct)
    zeros, store_sums = zero_accumulators(4 * down * across), store_accumulators(down, across, sums_stride)
    load_signs, load_scales = load_strided(2 * down, 2, 16), load_strided(*((8, 1, 4) if direct else (2 * down, 1, 8)))
    wait_for_next_stage = cp_async_wait_group(stages - 2)

    @cuda.jit(device=True, forceinline=True)
    def prefetch_entries(shared_words, stage, x, g, begin, stride, left, step, thread):
        """Begin to copy a step's piece of each vector: eight chunks of four words, swizzled against bank conflicts.

        If `direct`, zeros take the place of chunks beyond the last vector or its end, and g's piece is copied too.
        """
        one, chunk = int32(thread >> 3), int32(thread & 7)
        first = int32(int32(per_step * step) + int32(per_chunk * chunk))
        source = int32(int32(begin + int32(one * stride)) + first)
        target = int32(int32(stage_x * stage) + int32(K_STEP_WORDS * one))
        target = int32(target + int32(int32(chunk ^ int32(one & 7)) << 2))
        for turn in range(turns_of_x):
            if chunks_of_x % threads == 0 or thread + turn * threads < chunks_of_x:
                further = int32(turn * (threads // 8))
                to, place = uint32(target + int32(K_STEP_WORDS * further)), uint32(source + int32(further * stride))
                if direct:
                    inside = first < stride and int32(one + further) < left
                    cp_async_16_zero_fill(shared_words, to, x, place, uint32(16) if inside else uint32(0))
                else:
                    cp_async_16(shared_words, to, x, place)
        if direct and thread < 8:
            to = uint32(int32(g_at + K_STEP_WORDS * stage) + int32(thread << 2))
            cp_async_16_zero_fill(shared_words, to, g, uint32(first), uint32(16) if first < stride else uint32(0))

    @cuda.jit(device=True, forceinline=True)
    def prefetch_signs(shared_words, stage, signs, row, last_row, width, step, thread):
        """Begin to copy a step's two words of each row."""
        target = int32(signs_at + int32(stage_signs * stage))
        word = min(int32(int32(step << 1) + int32(thread & 1)), int32(width - 1))
        for turn in range(turns_of_signs):
            if stage_signs % threads == 0 or thread + turn * threads < stage_signs:
                item = int32(thread + turn * threads)
                source = int32(int32(min(int32(row + int32(item >> 1)), last_row) * width) + word)
                cp_async_4(shared_words, uint32(target + item), signs, uint32(source))

    @cuda.jit
    def kernel(
        x, units, gs, signs, scales, widths, counts, steps, bases, first_blocks, offsets, limits, out,
        vectors, room, stride, out_columns, split_steps,
    ):  # fmt: skip
        """Launch with a grid of (blocks of all outputs, vectors / vectors of a tile, K slices).

        Tuples with an entry for each matrix of signs: signs, scales of rows, words of a row (widths), steps, and where
        the vectors begin that it is multiplied with (bases). Tuples with an entry for each output: rows (counts), rows
        to write, with zeros beyond the former (limits), the first block (first_blocks), the first column in `out`
        (offsets), and g if `direct`. A vector takes `stride` elements of x, which has room for `room` vectors of each
        output unless `direct`, and `out_columns` elements of `out`. A K slice has `split_steps` steps.
        """
        thread = int32(cuda.threadIdx.x)
        lane, warp, block, which = int32(thread & 31), int32(thread >> 5), int32(cuda.blockIdx.x), int32(0)
        for following in range(1, outputs):
            which = int32(following) if block >= first_blocks[following] else which
        count = int32(counts[which])
        row, vector = int32(tile_rows * int32(block - first_blocks[which])), int32(tile_vectors * cuda.blockIdx.y)
        last_row = int32(count - 1)
        shared_words, shared = cuda.shared.array(0, uint32), cuda.shared.array(0, float32)
        one = int32(terms * which)
        two = int32(one + int32(terms - 1))
        signs_1, signs_2, width_1, width_2 = signs[one], signs[two], int32(widths[one]), int32(widths[two])
        boundary, total = int32(steps[one]), int32(steps[one])
        if terms > 1:
            total = int32(total + steps[two])
        begin = int32(split_steps * cuda.blockIdx.z)
        end = min(int32(begin + split_steps), total)

        # Prologue of the pipeline: fill all stages but one, signs first, for they do not depend on the last kernel
        for stage in range(stages - 1):
            ahead = int32(begin + stage)
            if ahead < boundary and ahead < end:
                prefetch_signs(shared_words, int32(stage), signs_1, row, last_row, width_1, ahead, thread)
            elif ahead < end:
                prefetch_signs(
                    shared_words, int32(stage), signs_2, row, last_row, width_2, int32(ahead - boundary), thread
                )
        item, own, left = thread, int32(row + int32(thread % tile_rows)), int32(vectors - vector)
        scale, g = half_at(scales[one], min(own, last_row)) if direct else float32(1), gs[which]
        while not direct and item < tile_rows:
            place = min(int32(row + item), last_row)
            for term in range(terms):
                bits = uint32(scales[int32(one + int32(term))][uint32(place)])
                shared_words[uint32(int32(scales_at + tile_rows * term) + item)] = uint32(bits | bits << uint32(16))
            item = int32(item + threads)
        source_1 = int32(bases[one] + int32(vector * stride))
        source_2 = int32(int32(bases[two] + int32(vector * stride)) - int32(K_STEP_WORDS * boundary))
        if pdl:
            griddep_wait()
            griddep_launch_dependents()
        item = thread
        while not direct and item < min(tile_vectors, left):
            shared[uint32(units_at + item)] = units[uint32(int32(int32(which * room) + vector) + item)]
            item = int32(item + threads)
        ahead = begin
        for stage in range(stages - 1):
            if ahead < end:
                source = source_1 if ahead < boundary else source_2
                prefetch_entries(shared_words, int32(stage), x, g, source, stride, left, ahead, thread)
            cp_async_commit()
            ahead = int32(ahead + 1)
        warp_row = int32(16 * down * int32(warp % warps_down))
        warp_vector = int32(8 * across * int32(warp // warps_down))
        mine = int32(warp_row + int32(lane >> 2))
        matrix_row, chunk = int32(lane & 7), int32(lane >> 3)
        at_x = int32(K_STEP_WORDS * int32(warp_vector + matrix_row))
        at_1 = int32(at_x + int32(int32(chunk ^ matrix_row) << 2))
        at_2 = int32(at_x + int32(int32(int32(chunk + 4) ^ matrix_row) << 2))
        sums, step, stage, stage_ahead = zeros(), begin, int32(0), int32(stages - 1)
        wait_for_next_stage()
        if wgmma:
            fence_async_proxy()
        cuda.syncthreads()
        at_scales = int32(g_at + int32(lane & 3)) if direct else int32(scales_at + mine)
        weights = load_scales(shared_words, uint32(at_scales if begin < boundary else int32(at_scales + tile_rows)))

        # Main loop: multiply one stage while the copies of the others go on
        while step < end:
            if terms > 1 and step == boundary:
                weights = load_scales(shared_words, uint32(at_scales + tile_rows))
            if direct:
                weights = load_scales(shared_words, uint32(at_scales + int32(K_STEP_WORDS * stage)))
            if ahead < end:
                if terms == 1 or ahead < boundary:
                    prefetch_signs(shared_words, stage_ahead, signs_1, row, last_row, width_1, ahead, thread)
                    source = source_1
                else:
                    further = int32(ahead - boundary)
                    prefetch_signs(shared_words, stage_ahead, signs_2, row, last_row, width_2, further, thread)
                    source = source_2
                prefetch_entries(shared_words, stage_ahead, x, g, source, stride, left, ahead, thread)
            cp_async_commit()
            ahead, stage_ahead = int32(ahead + 1), stage
            at_signs = int32(int32(signs_at + int32(stage_signs * stage)) + int32(mine << 1))
            words, place = load_signs(shared_words, uint32(at_signs)), int32(stage_x * stage)
            if wgmma:
                sums = mma_both(sums, words, weights, shared_words, uint32(place), lane)
            else:
                sums = mma_first(sums, words, weights, shared_words, uint32(place + at_1), lane)
                sums = mma_second(sums, words, weights, shared_words, uint32(place + at_2), lane)
            step, stage = int32(step + 1), int32(stage + 1)
            if stage == stages:
                stage = int32(0)
            wait_for_next_stage()
            if wgmma:
                fence_async_proxy()
            cuda.syncthreads()

        # Epilogue: through shared memory, so that stores are coalesced, times the unit or the scale
        first = int32(int32(sums_stride * int32(warp_vector + int32(int32(lane & 3) << 1))) + mine)
        store_sums(shared, uint32(first), sums)
        cuda.syncthreads()
        sum_row, one_vector = int32(thread % tile_rows), int32(thread // tile_rows)
        limit = int32(limits[which])
        target = int32(int32(int32(int32(cuda.blockIdx.z) * vectors + vector) * out_columns) + offsets[which])
        target, at_sum = int32(target + own), int32(int32(one_vector * sums_stride) + sum_row)
        for turn in range(turns_of_sums):
            further = int32(one_vector + turn * (threads // tile_rows))
            if own < limit and further < left:
                value = shared[uint32(at_sum + turn * (threads // tile_rows) * sums_stride)]
                factor = scale if direct else shared[uint32(units_at + further)]
                value = value * factor if own < count else float32(0)
                out[uint32(target + int32(further * out_columns))] = rounded(value)

    each, every = partial(types.UniTuple, count=outputs), partial(types.UniTuple, count=outputs * terms)
    number = types.int32
    SIGNATURES[kernel] = types.void(
        HALVES if direct else WORDS, SINGLES, each(HALVES), every(WORDS), every(HALVES), every(number), each(number),
        every(number), every(number), each(number), each(number), each(number), ELEMENTS[dtype], *[number] * 5,
    )  # fmt: skip
    return kernel
