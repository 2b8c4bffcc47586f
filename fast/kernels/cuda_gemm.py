"""The packed linear layer for many vectors at once on NVIDIA GPUs: signs become float16 on their way to tensor cores.

Four launches. `scaled_vectors` multiplies each vector with g and rounds it to float16, after division by a power of two
that brings its largest entry near 2^14, so that nothing overflows. `products` multiplies it with V: a lane turns two
signs into two float16, +ell or -ell, by a shift, an AND and an XOR, which tensor cores then multiply with what lies in
shared memory. `scaled_vectors` adds the parts up that d_in was divided into there, and rounds likewise. `products`
multiplies that with U. Sums are of float32 throughout; beside the rounding of the output there are two, of the scaled
vectors, by 2^-11 of an entry at most.

The first launch is left out if x is float16 in whole eights: `products` then multiplies x itself with +g or -g, and the
sums with ell.

Words of signs are read from memory as they are, so a layer costs no more memory traffic than with one vector, until the
arithmetic is what takes the time.
"""

# What Numba makes of cuda.threadIdx and its like is not what their Python stand-ins say.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportOptionalSubscript=false

from functools import partial
from typing import Any, NamedTuple

from numba import cuda, float32, int32, types, uint32

from .cuda_gemv import EIGHT, eights, half_eight, largest_of, plus, times
from .cuda_intrinsics import as_bits, as_float, copy4, larger, let_next_start, round_to_half, wait, warp_max
from .cuda_mma import (
    commit,
    copy1,
    copy_chunk,
    group_product,
    landed,
    let_group_read,
    load_spaced,
    no_sums,
    put_tile,
    store4,
    tile_product,
)
from .cuda_plain import AT, ELEMENTS, HALVES, ROUND, SIGNATURES, SINGLES, WORDS, half_at, kernel_factory

DEPTH = 64  # entries of a vector, and signs of a row, that a block multiplies between two barriers: a step
WORDS_DEPTH = DEPTH // 2  # words of a step's piece of a vector, two float16 in each
SCALING_THREADS = 1024  # of a block that scales a vector, at most
SCALED_AT_ONCE = 16  # entries of a vector that a thread scales at once
STAGES_BYTES = 88 << 10  # of shared memory for stages: two blocks then share a multiprocessor
FEWEST_STAGES, MOST_STAGES = 4, 12


class Tile(NamedTuple):
    """What a block of `products` computes at once; it has no more rows than threads.

    Attributes
    ----------
    warps_down, warps_across : int
        Warps of a block that have different rows, or different vectors.
    down : int
        Sixteens of rows of a warp.
    across : int
        Eights of vectors of a warp.
    """

    warps_down: int
    warps_across: int
    down: int
    across: int

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return 16 * self.warps_down * self.down

    @property
    def vectors(self) -> int:
        """Vectors of a block."""
        return 8 * self.warps_across * self.across

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_down * self.warps_across

    @property
    def grouped(self) -> bool:
        """Whether four warps can be a group that has 64 rows, as GPUs of compute capability 9.0 multiply best."""
        return self.warps_across == self.down == 1 and self.warps_down % 4 == 0

    @property
    def stage_words(self) -> int:
        """Words of shared memory that a step's entries and signs take."""
        return WORDS_DEPTH * self.vectors + 2 * self.rows

    @property
    def stages(self) -> int:
        """Steps that are on their way or in work at the same time."""
        return min(MOST_STAGES, max(FEWEST_STAGES, STAGES_BYTES // (4 * self.stage_words)))

    def shared_bytes(self, segments: int, direct: bool = False) -> int:
        """Shared memory of a block: stages and scales, or later the sums in their place, and units of vectors or g."""
        held = max(self.stages * self.stage_words + segments * self.rows, self.vectors * (self.rows + 4))
        return 4 * (held + (self.stages * WORDS_DEPTH if direct else self.vectors))


@cuda.jit(device=True, forceinline=True)
def unit_bits(largest):
    """Bits of the power of two, or NaN, that a vector is divided by, from those of its largest magnitude."""
    exponent = max(largest >> uint32(23), uint32(15))
    return uint32((exponent - uint32(14)) << uint32(23)) if exponent < uint32(255) else uint32(0x7FC00000)


@cuda.jit(device=True, forceinline=True)
def column_of(place):
    """The first of the two columns that a word, the first of eight, holds; the other one is 16 further."""
    return int32(int32(int32(place >> 4) << 5) + int32(place & 15))


@cuda.jit(device=True, forceinline=True)
def put_words(out, place, low, high, inverse):
    """Store eight words, of two float16 each."""
    for i in range(2):
        a, b, c, d = low[4 * i], low[4 * i + 1], low[4 * i + 2], low[4 * i + 3]
        e, f, g, h = high[4 * i], high[4 * i + 1], high[4 * i + 2], high[4 * i + 3]
        store4(
            out, uint32(place + 4 * i), two_halves(a * inverse, e * inverse), two_halves(b * inverse, f * inverse),
            two_halves(c * inverse, g * inverse), two_halves(d * inverse, h * inverse),
        )  # fmt: skip


@cuda.jit(device=True, forceinline=True)
def two_halves(low, high):
    """A word of two float16."""
    return uint32(uint32(round_to_half(low)) | uint32(round_to_half(high)) << uint32(16))


@kernel_factory
def scaled_vectors(kind: str, aligned: bool, count: int, parts: int, early: bool) -> Any:
    """Vectors divided by a power of two each, as float16: entries i and i + 16 of each 32 are a word.

    Their entries are those of x, of a kind, times g, for each of `count` g (`aligned` if they are whole eights); or, if
    `count` is 0, the sums over `parts` of an array of float32.
    """
    at_place, eight_at, eight = AT[kind], EIGHT[kind], eights(aligned)

    @cuda.jit(device=True, forceinline=True)
    def entries(source, weights, base, column, d_in, distance):
        found = eight(source, at_place, eight_at, base, column, d_in)
        if count > 0:
            return times(found, eight(weights, half_at, half_eight, int32(0), column, d_in))
        for part in range(1, parts):  # known to the compiler, so that no load waits for another
            found = plus(found, eight(source, at_place, eight_at, int32(base + part * distance), column, d_in))
        return found

    @cuda.jit
    def kernel(source, gs, out, units, rows, vectors, d_in, stride):
        """Grid (rows, number of gs): a block scales a vector, to `stride` words of `out`, with room for `vectors`."""
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        row, which = int32(cuda.blockIdx.x), int32(cuda.blockIdx.y)
        largest_of_warps = cuda.shared.array(0, uint32)
        weights = gs[which]
        base, distance = int32(row * d_in), int32(rows * d_in)
        if early:
            wait()
            let_next_start()
        first = int32(thread << 3)
        column = column_of(first)
        low = entries(source, weights, base, column, d_in, distance)
        high = entries(source, weights, base, int32(column + 16), d_in, distance)
        largest, place = larger(largest_of(low), largest_of(high)), int32(first + int32(threads << 3))
        while place < stride:
            column = column_of(place)
            largest = larger(largest, largest_of(entries(source, weights, base, column, d_in, distance)))
            largest = larger(largest, largest_of(entries(source, weights, base, int32(column + 16), d_in, distance)))
            place = int32(place + int32(threads << 3))
        bits, lane = warp_max(as_bits(largest)), int32(thread & 31)
        if lane == 0:
            largest_of_warps[uint32(thread >> 5)] = bits
        cuda.syncthreads()
        unit = unit_bits(warp_max(largest_of_warps[uint32(lane)] if lane < int32(threads >> 5) else uint32(0)))
        inverse = as_float(uint32(uint32(0x7F000000) - unit)) if unit != uint32(0x7FC00000) else as_float(unit)
        target, place = int32(int32(int32(which * vectors) + row) * stride), first
        while place < stride:
            if place > first:  # what came first is still there
                column = column_of(place)
                low = entries(source, weights, base, column, d_in, distance)
                high = entries(source, weights, base, int32(column + 16), d_in, distance)
            put_words(out, int32(target + place), low, high, inverse)
            place = int32(place + int32(threads << 3))
        if thread == 0:
            units[uint32(int32(which * vectors) + row)] = as_float(unit)

    SIGNATURES[kernel] = types.void(
        ELEMENTS[kind], types.UniTuple(HALVES, max(count, 1)), WORDS, SINGLES, *[types.int32] * 4
    )
    return kernel


@kernel_factory
def products(
    kind: str, tile: Tile, choices: int, segments: int, early: bool, grouped: bool = False, direct: bool = False
) -> Any:
    """Sums of rows of signs, times scales, with vectors from `scaled_vectors`; each output is rounded to a kind.

    A block has one of `choices` of outputs, each of the sum of products of `segments` matrices of signs, one or two.
    With `grouped` warps multiply in groups of four, for which GPUs of compute capability 9.0 alone have instructions.
    If `direct`, vectors are of float16, in whole eights, and are multiplied with signs times g; there is one segment.
    """
    rounded, stages = ROUND[kind], tile.stages
    rows_of_tile, vectors_of_tile, threads = tile.rows, tile.vectors, tile.threads
    words_x, stride_sums = WORDS_DEPTH * vectors_of_tile, rows_of_tile + 4
    held_signs = stages * words_x  # where in shared memory words of signs begin
    held_scales = held_signs + stages * 2 * rows_of_tile
    held_units = max(held_scales + segments * rows_of_tile, vectors_of_tile * stride_sums)
    held_g, per_chunk = held_units, 8 if direct else 4  # elements of x in a chunk
    per_step = 8 * per_chunk
    turns_of_sums = rows_of_tile * vectors_of_tile // threads
    down, across, warps_down = tile.down, tile.across, tile.warps_down
    chunks_of_x, words_of_signs = 8 * vectors_of_tile, 2 * rows_of_tile
    turns_of_x, turns_of_signs = -(-chunks_of_x // threads), -(-words_of_signs // threads)
    first_half, second_half = (tile_product(down, across, half, 8 * WORDS_DEPTH, direct) for half in range(2))
    both_halves = group_product(across, direct)
    nothing, put_sums = no_sums(4 * down * across), put_tile(down, across, stride_sums)
    words_of_rows, scales_at = load_spaced(2 * down, 2, 16), load_spaced(*((8, 1, 4) if direct else (2 * down, 1, 8)))
    next_landed = landed(stages - 2)

    @cuda.jit(device=True, forceinline=True)
    def fetch_entries(signal, stage, x, g, begin, stride, left, step, thread):
        """Begin to copy a step's piece of each vector: eight chunks of four words, swapped so that no banks collide.

        If `direct`, zeros take the place of chunks beyond the last vector or its end, and g's piece comes too.
        """
        one, chunk = int32(thread >> 3), int32(thread & 7)
        first = int32(int32(per_step * step) + int32(per_chunk * chunk))
        source = int32(int32(begin + int32(one * stride)) + first)
        target = int32(int32(words_x * stage) + int32(WORDS_DEPTH * one))
        target = int32(target + int32(int32(chunk ^ int32(one & 7)) << 2))
        for turn in range(turns_of_x):
            if chunks_of_x % threads == 0 or thread + turn * threads < chunks_of_x:
                further = int32(turn * (threads // 8))
                to, place = uint32(target + int32(WORDS_DEPTH * further)), uint32(source + int32(further * stride))
                if direct:
                    inside = first < stride and int32(one + further) < left
                    copy_chunk(signal, to, x, place, uint32(16) if inside else uint32(0))
                else:
                    copy4(signal, to, x, place)
        if direct and thread < 8:
            to = uint32(int32(held_g + WORDS_DEPTH * stage) + int32(thread << 2))
            copy_chunk(signal, to, g, uint32(first), uint32(16) if first < stride else uint32(0))

    @cuda.jit(device=True, forceinline=True)
    def fetch_signs(signal, stage, signs, row, last_row, width, step, thread):
        """Begin to copy a step's two words of each row."""
        target = int32(held_signs + int32(words_of_signs * stage))
        word = min(int32(int32(step << 1) + int32(thread & 1)), int32(width - 1))
        for turn in range(turns_of_signs):
            if words_of_signs % threads == 0 or thread + turn * threads < words_of_signs:
                item = int32(thread + turn * threads)
                source = int32(int32(min(int32(row + int32(item >> 1)), last_row) * width) + word)
                copy1(signal, uint32(target + item), signs, uint32(source))

    @cuda.jit
    def kernel(
        x, units, gs, signs, scales, widths, counts, steps, bases, begins, offsets, limits, out,
        vectors, room, stride, across_out, per_part,
    ):  # fmt: skip
        """Grid (blocks of all choices, vectors / those of a tile, parts).

        Of each matrix: signs, scales of rows, words of a row (widths), steps, and where the vectors begin that it is
        multiplied with (bases). Of each choice: rows (counts), rows to be written, those beyond the former as zeros
        (limits), the first block (begins), where its outputs begin (offsets), and g if `direct`. A vector takes
        `stride` elements of x, which has room for `room` of each choice unless `direct`, and `across_out` elements of
        `out`; a part has `per_part` steps.
        """
        thread = int32(cuda.threadIdx.x)
        lane, warp, block, choice = int32(thread & 31), int32(thread >> 5), int32(cuda.blockIdx.x), int32(0)
        for following in range(1, choices):
            choice = int32(following) if block >= begins[following] else choice
        count = int32(counts[choice])
        row, vector = int32(rows_of_tile * int32(block - begins[choice])), int32(vectors_of_tile * cuda.blockIdx.y)
        last_row = int32(count - 1)
        signal, shared = cuda.shared.array(0, uint32), cuda.shared.array(0, float32)
        one = int32(segments * choice)
        two = int32(one + int32(segments - 1))
        signs_1, signs_2, width_1, width_2 = signs[one], signs[two], int32(widths[one]), int32(widths[two])
        boundary, total = int32(steps[one]), int32(steps[one])
        if segments > 1:
            total = int32(total + steps[two])
        begin = int32(per_part * cuda.blockIdx.z)
        end = min(int32(begin + per_part), total)
        for stage in range(stages - 1):
            ahead = int32(begin + stage)
            if ahead < boundary and ahead < end:
                fetch_signs(signal, int32(stage), signs_1, row, last_row, width_1, ahead, thread)
            elif ahead < end:
                fetch_signs(signal, int32(stage), signs_2, row, last_row, width_2, int32(ahead - boundary), thread)
        item, own, left = thread, int32(row + int32(thread % rows_of_tile)), int32(vectors - vector)
        scale, g = half_at(scales[one], min(own, last_row)) if direct else float32(1), gs[choice]
        while not direct and item < rows_of_tile:
            place = min(int32(row + item), last_row)
            for segment in range(segments):
                bits = uint32(scales[int32(one + int32(segment))][uint32(place)])
                signal[uint32(int32(held_scales + rows_of_tile * segment) + item)] = uint32(bits | bits << uint32(16))
            item = int32(item + threads)
        source_1 = int32(bases[one] + int32(vector * stride))
        source_2 = int32(int32(bases[two] + int32(vector * stride)) - int32(WORDS_DEPTH * boundary))
        if early:
            wait()
            let_next_start()
        item = thread
        while not direct and item < min(vectors_of_tile, left):
            shared[uint32(held_units + item)] = units[uint32(int32(int32(choice * room) + vector) + item)]
            item = int32(item + threads)
        ahead = begin
        for stage in range(stages - 1):
            if ahead < end:
                source = source_1 if ahead < boundary else source_2
                fetch_entries(signal, int32(stage), x, g, source, stride, left, ahead, thread)
            commit()
            ahead = int32(ahead + 1)
        warp_row = int32(16 * down * int32(warp % warps_down))
        warp_vector = int32(8 * across * int32(warp // warps_down))
        mine = int32(warp_row + int32(lane >> 2))
        row_of_matrix, chunk = int32(lane & 7), int32(lane >> 3)
        at_x = int32(WORDS_DEPTH * int32(warp_vector + row_of_matrix))
        at_1 = int32(at_x + int32(int32(chunk ^ row_of_matrix) << 2))
        at_2 = int32(at_x + int32(int32(int32(chunk + 4) ^ row_of_matrix) << 2))
        sums, step, stage, stage_ahead = nothing(), begin, int32(0), int32(stages - 1)
        next_landed()
        if grouped:
            let_group_read()
        cuda.syncthreads()
        at_scales = int32(held_g + int32(lane & 3)) if direct else int32(held_scales + mine)
        weights = scales_at(signal, uint32(at_scales if begin < boundary else int32(at_scales + rows_of_tile)))
        while step < end:
            if segments > 1 and step == boundary:
                weights = scales_at(signal, uint32(at_scales + rows_of_tile))
            if direct:
                weights = scales_at(signal, uint32(at_scales + int32(WORDS_DEPTH * stage)))
            if ahead < end:
                if segments == 1 or ahead < boundary:
                    fetch_signs(signal, stage_ahead, signs_1, row, last_row, width_1, ahead, thread)
                    source = source_1
                else:
                    fetch_signs(signal, stage_ahead, signs_2, row, last_row, width_2, int32(ahead - boundary), thread)
                    source = source_2
                fetch_entries(signal, stage_ahead, x, g, source, stride, left, ahead, thread)
            commit()
            ahead, stage_ahead = int32(ahead + 1), stage
            at_words = int32(int32(held_signs + int32(words_of_signs * stage)) + int32(mine << 1))
            words, place = words_of_rows(signal, uint32(at_words)), int32(words_x * stage)
            if grouped:
                sums = both_halves(sums, words, weights, signal, uint32(place), lane)
            else:
                sums = first_half(sums, words, weights, signal, uint32(place + at_1), lane)
                sums = second_half(sums, words, weights, signal, uint32(place + at_2), lane)
            step, stage = int32(step + 1), int32(stage + 1)
            if stage == stages:
                stage = int32(0)
            next_landed()
            if grouped:
                let_group_read()
            cuda.syncthreads()
        first = int32(int32(stride_sums * int32(warp_vector + int32(int32(lane & 3) << 1))) + mine)
        put_sums(shared, uint32(first), sums)
        cuda.syncthreads()
        row_of_sum, one_vector = int32(thread % rows_of_tile), int32(thread // rows_of_tile)
        limit = int32(limits[choice])
        target = int32(int32(int32(int32(cuda.blockIdx.z) * vectors + vector) * across_out) + offsets[choice])
        target, at_sum = int32(target + own), int32(int32(one_vector * stride_sums) + row_of_sum)
        for turn in range(turns_of_sums):
            further = int32(one_vector + turn * (threads // rows_of_tile))
            if own < limit and further < left:
                value = shared[uint32(at_sum + turn * (threads // rows_of_tile) * stride_sums)]
                factor = scale if direct else shared[uint32(held_units + further)]
                value = value * factor if own < count else float32(0)
                out[uint32(target + int32(further * across_out))] = rounded(value)

    each, total = partial(types.UniTuple, count=choices), partial(types.UniTuple, count=choices * segments)
    number = types.int32
    SIGNATURES[kernel] = types.void(
        HALVES if direct else WORDS, SINGLES, each(HALVES), total(WORDS), total(HALVES), total(number), each(number),
        total(number), total(number), each(number), each(number), each(number), ELEMENTS[kind], *[number] * 5,
    )  # fmt: skip
    return kernel
