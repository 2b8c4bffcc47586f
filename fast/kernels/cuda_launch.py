"""Launching the CUDA kernels: how work is divided, and a layer's paths as the numbers that kernels take.

The kernels are compiled to PTX by Numba, but loaded and started through the driver: an argument is then an address or
a number, a launch takes a few microseconds of Python, and it may be early (programmatic dependent launch).
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false

import hashlib
import itertools
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import cuda
from torch import Tensor
from torch.nn import functional

from ..files.cache import cached, made_once
from ..packing import PackedFactors
from . import plan
from .cuda import PLANES, RECIPES, ROWS, SIGNATURES, SLICE, VECTORS, Shares, latent, output, plain_latent, plain_output
from .cuda_batch import DEPTH, SCALED_AT_ONCE, SCALING_THREADS, WORDS_DEPTH, Tile, products, scaled_vectors
from .cuda_unpacked import ACROSS, STRIP, UNPACKING_BLOCKS, UNPACKING_THREADS, unpacking
from .dispatch import unpacked_linear

OLDEST = (8, 0)  # compute capability that has the instructions
EARLY = (9, 0)  # that has programmatic dependent launch
KINDS = {torch.float16: "half", torch.bfloat16: "bfloat", torch.float32: "single"}
VERSIONS = ("plain", "tensor", "early")  # the ladder
WARPS = 8  # of a block of the plain kernels
MOST_WARPS = 16  # of a block of the others
SMALL_BATCH = 4  # rows of x in 16 bits up to which `launch` is quicker than `launch_batch`, on an H100
EXACT_BATCH = 32  # rows of x in float32, of which `launch` alone keeps the precision, up to which unpacking is slower
GROUPED = (9, 0)  # the capability that multiplies with groups of warps
MOST_PARTS = 8  # of d_in, for batches
# Microseconds on an H100: of a batch's launches, and added to them for a sign, for a sign times a vector, and for an
# entry of x or y. Fitted to both ways' times for six layers at 0.1 to 0.55 bits and 32 to 1024 rows: what they choose
# takes 7 % longer than the quicker way at worst.
BATCH_COST, UNPACKED_COST = (9.3, 2.3e-7, 3.4e-9, 1.8e-6), (11.0, 1.3e-6, 2.1e-9, 5.1e-7)
SCHEDULES = Path(__file__).parent.parent / "data" / "cuda_schedules.json"
MOST_NUMBER = 64  # in a schedule
PTX = "kernel.ptx"
log = logging.getLogger(__name__)


class Blocks(NamedTuple):
    """How a kernel's work is divided.

    Attributes
    ----------
    sharing : int
        Warps of a block that have the same rows and different slices of the vector.
    log : int
        Binary logarithm of the warps of a block that have different rows.
    tiles : int
        Of 16 rows, that a warp computes one after the other.
    """

    sharing: int
    log: int
    tiles: int

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return ROWS * self.tiles << self.log

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.sharing << self.log

    def shared_bytes(self, vectors: int, slices: int, strides: Sequence[int]) -> int:
        """Shared memory of a block: the planes of its slices, a number for each warp and row, and the rows' words."""
        words = sum(-(-self.rows * stride // 4) * 4 + ROWS for stride in strides)
        return 4 * (vectors * (PLANES * slices + self.sharing * self.rows) + words)


class Schedule(NamedTuple):
    """How the two kernels of a layer are launched.

    Attributes
    ----------
    parts : int
        That d_in is divided into, at most its slices; 1 if d_in is no multiple of 128.
    latent, output : Blocks
    """

    parts: int
    latent: Blocks
    output: Blocks


class Sizes(NamedTuple):
    """The sizes of a layer, or of several that share their input.

    Attributes
    ----------
    d_in : int
    d_outs : tuple of int
        One for each layer.
    ranks : tuple of tuple of int
        Of each layer's paths, one or two.
    """

    d_in: int
    d_outs: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]

    @property
    def paths(self) -> list[int]:
        """Ranks of all layers' paths."""
        return [rank for ranks in self.ranks for rank in ranks]

    @property
    def columns(self) -> int:
        """Entries of a vector in `part`."""
        return sum(map(padded, self.paths))

    @property
    def wide(self) -> bool:
        """Whether all rows of U are whole fours of words."""
        return all(padded(rank) % 128 == 0 for rank in self.paths)

    def __str__(self) -> str:
        """How the table of measured schedules names them: d_outs, "x", d_in, ":", ranks; "," between layers."""
        ranks = ("+".join(map(str, ranks)) for ranks in self.ranks)
        return f"{','.join(map(str, self.d_outs))}x{self.d_in}:{','.join(ranks)}"


def slices_of(count: int) -> int:
    """Slices of a vector of so many entries."""
    return -(-count // SLICE)


def padded(rank: int) -> int:
    """Entries of a path in `part`: whole words of signs."""
    return -(-rank // 32) * 32


def latent_bytes(blocks: Blocks, vectors: int, d_in: int, parts: int) -> int:
    """Shared memory of a block of `latent`."""
    slices = -(-slices_of(d_in) // parts)
    return blocks.shared_bytes(vectors, slices, [8 * slices + 4 if d_in % 128 == 0 else -(-d_in // 32)])


def output_bytes(blocks: Blocks, vectors: int, sizes: Sizes) -> int:
    """Shared memory of a block of `output`."""

    def needed(ranks: Sequence[int]) -> int:
        slices = [slices_of(rank) for rank in ranks]
        strides = [8 * count + 4 for count in slices] if sizes.wide else [padded(rank) // 32 for rank in ranks]
        return blocks.shared_bytes(vectors, sum(slices), strides)

    return max(map(needed, sizes.ranks))


class Device(NamedTuple):
    """What a schedule depends on: name, multiprocessors, and the most shared memory of a block, in bytes."""

    name: str
    multiprocessors: int
    shared_bytes: int


def schedule_for(sizes: Sizes, rows: int, device: Device) -> Schedule | None:
    """A schedule for layers and so many rows of x: the measured one, or one from sizes alone.

    None if no block has enough shared memory.
    """
    vectors = vectors_of(rows)
    schedule = measured().get(device.name, {}).get(name_of(sizes, vectors)) or estimated(sizes, device.multiprocessors)
    first = fitting(
        schedule.latent, device.shared_bytes, lambda blocks: latent_bytes(blocks, vectors, sizes.d_in, schedule.parts)
    )
    second = fitting(schedule.output, device.shared_bytes, lambda blocks: output_bytes(blocks, vectors, sizes))
    return Schedule(schedule.parts, first, second) if first and second else None


def name_of(sizes: Sizes, vectors: int) -> str:
    """Under what the tables of measured schedules have one: the sizes, and how many vectors are multiplied at once."""
    return str(sizes) if vectors == 1 else f"{sizes}*{vectors}"


def estimated(sizes: Sizes, multiprocessors: int) -> Schedule:
    """A schedule from sizes alone: what was measured to be good, some 64 to 128 blocks for 132 multiprocessors."""
    slices, tiles = slices_of(sizes.d_in), sizes.columns // ROWS
    parts = 1 if sizes.d_in % 128 else min(8, power_of_two(max(1, slices // 8)))
    log = binary_log(2 * tiles * parts // multiprocessors)
    first = Blocks(min(-(-slices // parts), MOST_WARPS >> log), log, 1)
    slices = max(sum(map(slices_of, ranks)) for ranks in sizes.ranks)
    tiles = sum(-(-d_out // ROWS) for d_out in sizes.d_outs)
    log = binary_log(2 * tiles // multiprocessors)
    return Schedule(parts, first, Blocks(min(power_of_two(max(1, 2 * slices // 7)), MOST_WARPS >> log), log, 1))


def binary_log(number: int) -> int:
    """Binary logarithm, rounded down, of a number of warps: from 0 to that of the most that a block has."""
    return min(max(1, number), MOST_WARPS).bit_length() - 1


def fitting(blocks: Blocks, limit: int, needed: Callable[[Blocks], int]) -> Blocks | None:
    """Blocks with fewer rows, until they need no more shared memory than there is."""
    while needed(blocks) > limit:
        if blocks.tiles > 1:
            blocks = blocks._replace(tiles=blocks.tiles // 2)
        elif blocks.log:
            blocks = blocks._replace(log=blocks.log - 1)
        else:
            return None
    return blocks


def power_of_two(number: int) -> int:
    """The largest power of two that is at most `number`."""
    return 1 << (number.bit_length() - 1)


def vectors_of(rows: int) -> int:
    """Rows of x that a block multiplies at once."""
    return min(VECTORS, 1 << (rows - 1).bit_length())


@cache
def measured() -> dict[str, dict[str, Schedule]]:
    """The fastest schedules that were measured, by the GPU's name and `name_of`: what ships, and what `tune` kept."""
    tables = json.loads(SCHEDULES.read_text(encoding="utf-8"))
    try:
        own = own_schedules()
        for name, table in read_schedules(own).items() if own.exists() else ():
            tables[name] = tables.get(name, {}) | table
    except (ValueError, OSError) as error:
        log.warning("littlebit: %s; it is passed over", error)
    return {name: {of: schedule_from(each) for of, each in table.items()} for name, table in tables.items()}


def own_schedules() -> Path:
    """Where `littlebit tune` keeps what it has measured."""
    return cached("cuda_schedules.json")


def read_schedules(path: Path) -> dict[str, dict[str, list[Any]]]:
    """A table of schedules, as it is stored.

    Raises
    ------
    ValueError
        If it is damaged.
    """
    try:
        tables = json.loads(path.read_text(encoding="utf-8"))
        for table in tables.values():
            for each in table.values():
                schedule_from(each)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        said = f"{path} is no table of launch schedules ({error}): remove it, and run `littlebit tune` again"
        raise ValueError(said) from None
    return tables


def schedule_from(stored: Any) -> Schedule:
    """A schedule from [parts, latent, output].

    Raises
    ------
    ValueError, TypeError
        If there can be no such schedule.
    """
    parts, *both = stored
    schedule = Schedule(parts, *(Blocks(*each) for each in both))
    numbers = [parts, *schedule.latent, *schedule.output]
    if not all(type(number) is int and 0 <= number <= MOST_NUMBER for number in numbers):
        raise ValueError(f"{stored} are no small numbers")
    for blocks in (schedule.latent, schedule.output):
        if not (parts and blocks.tiles and 32 <= blocks.threads <= 32 * MOST_WARPS):
            raise ValueError(f"there is no block of {blocks}")
    return schedule


class Norm(NamedTuple):
    """RMSNorm of the input, before it is multiplied.

    Attributes
    ----------
    weight : (d_in,) float32 array
    squares : (rows, count) float32 array
        Numbers that together are the sum of squares of each vector.
    count : int
    eps : float
    """

    weight: Any
    squares: Any
    count: int
    eps: float


def launch(
    x: Any,
    kind: str,
    rows: int,
    layers: Sequence[Sequence[Any]],
    y: Any,
    part: Any,
    schedule: Schedule,
    early: bool,
    start: Any,
    norm: Norm | None = None,
    activation: str | None = None,
    bias: Any = None,
    squares: Any = None,
    shares: Shares | None = None,
) -> None:
    """Start both kernels for layers that share their input, on flat device arrays.

    Parameters
    ----------
    x : (rows * d_in,) array; float16 and bfloat16 as uint16; twice as long with an activation
    kind : str
        A value of KINDS, of x and y.
    rows : int
        Vectors.
    layers : sequence of one or two PackedFactors of arrays each, words as uint32 and scales as uint16
    y : (rows * sum of d_out,) array to be written: for each vector, the layers' outputs one after the other
    part : float32 array of at least schedule.parts * rows * sum of padded ranks elements, overwritten
    schedule : Schedule
    early : bool
    start : callable
        Launches a kernel: (kernel, grid, threads, bytes of shared memory, arguments).
    norm : Norm, optional
    activation : str, optional
        One of cuda.ACTIVATIONS: v = activation(x[:d_in]) * x[d_in:].
    bias : (sum of d_out,) float32 array, optional
        Added to the outputs.
    squares : (rows * output_blocks(...),) float32 array, optional
        The only layer's output is added to y, of float32, and the sums of squares of what y then holds go here.
    shares : Shares, optional
        x, of float32, is what the blocks of `cuda_decode.attend` have left: (rows, heads, shares.count, shares.stride).

    Raises
    ------
    ValueError
        If d_in cannot be divided into schedule.parts.
    """
    paths = [path for layer in layers for path in layer]
    pairs = [path for layer in layers for path in (layer[0], layer[-1])]
    d_in, d_outs = len(paths[0].g), [len(layer[0].h) for layer in layers]
    ranks = [len(path.ell) for path in paths]
    sizes = Sizes(d_in, tuple(d_outs), tuple(tuple(len(path.ell) for path in layer) for layer in layers))
    vectors, slices, parts = vectors_of(rows), slices_of(d_in), schedule.parts
    if parts > slices or (parts > 1 and d_in % 128):
        most = 1 if d_in % 128 else slices
        raise ValueError(f"{d_in} columns cannot be divided into {parts} parts: at most {most} (Schedule.parts)")
    of_part, groups = -(-slices // parts), -(-rows // vectors)
    used = -(-slices // of_part)
    begins, total = sums_before([-(-padded(rank) // schedule.latent.rows) for rank in ranks])
    offsets, across = sums_before(map(padded, ranks))
    entry = shares or ("norm" if norm else activation or "plain")
    blocks = schedule.latent
    start(
        latent(kind, d_in % 128 == 0, d_in % 8 == 0, vectors, early, len(paths), entry),
        (total, used, groups),
        blocks.threads,
        latent_bytes(blocks, vectors, d_in, parts),
        (
            x, *columns_of(paths, "g", "v_words", "ell"), tuple(ranks), begins, offsets, part,
            *((norm.weight, norm.squares) if norm else (part, part)),
            d_in, rows, across, of_part, blocks.tiles, blocks.sharing, blocks.log,
            *((norm.count, norm.eps) if norm else (0, 0.0)),
        ),
    )  # fmt: skip
    blocks = schedule.output
    begins, total = sums_before([-(-d_out // blocks.rows) for d_out in d_outs])
    starts, across_y = sums_before(d_outs)
    every = iter(zip(ranks, offsets, strict=True))
    of_pairs = [next(every) if at < len(layer) else (0, 0) for layer in layers for at in (0, 1)]
    leave = "add" if squares is not None else "bias" if bias is not None else "plain"
    start(
        output(kind, sizes.wide, vectors, used, early, len(layers), leave),
        (total, 1, groups),
        blocks.threads,
        output_bytes(blocks, vectors, sizes),
        (
            part, *columns_of(pairs, "u_words", "h"), *zip(*of_pairs, strict=True), tuple(d_outs), begins, starts,
            part if bias is None else bias, y, part if squares is None else squares,
            rows, across, across_y, blocks.tiles, blocks.sharing, blocks.log,
        ),
    )  # fmt: skip


def output_blocks(d_out: int, schedule: Schedule) -> int:
    """Blocks of a layer's second kernel, each of which gives a sum of squares of a vector."""
    return -(-d_out // schedule.output.rows)


def sums_before(counts: Iterable[int]) -> tuple[tuple[int, ...], int]:
    """Where each of some pieces begins, and where the last one ends."""
    *before, total = itertools.accumulate(counts, initial=0)
    return tuple(before), total


def columns_of(paths: Sequence[Any], *names: str) -> list[tuple[Any, ...]]:
    """The arrays of each name, of all paths."""
    return [tuple(getattr(path, name) for path in paths) for name in names]


class Work(NamedTuple):
    """Memory that `launch_batch` overwrites: scaled inputs and latents with their units, and latents in parts."""

    inputs: Any
    input_units: Any
    part: Any
    latents: Any
    latent_units: Any


class BatchSchedule(NamedTuple):
    """How the kernels for batches are launched.

    Attributes
    ----------
    parts : int
        That d_in is divided into.
    latent, output : Tile
    """

    parts: int
    latent: Tile
    output: Tile


def steps_of(count: int) -> int:
    """Pieces of DEPTH entries of a vector of so many."""
    return -(-count // DEPTH)


def tiles_for(rows: int, grouped: bool) -> list[Tile]:
    """Tiles for so many vectors, large ones first."""
    if rows <= 16:
        return [Tile(4, 1, 1, 2), Tile(2, 1, 1, 2)]
    if rows <= 32:
        return [Tile(4, 1, 1, 4), Tile(2, 2, 1, 2)]
    if not grouped:
        return [Tile(4, 2, 2, 4), Tile(2, 2, 2, 4)]
    return ([Tile(8, 1, 1, 16)] if rows > 64 else []) + [Tile(8, 1, 1, 8), Tile(4, 1, 1, 8)]


def batch_schedule(sizes: Sizes, rows: int, multiprocessors: int, grouped: bool) -> BatchSchedule:
    """Large tiles in few parts, as long as there is a block for each multiprocessor: what was measured to be good."""
    tiles = tiles_for(rows, grouped)

    def blocks(tile: Tile, counts: Iterable[int]) -> int:
        return sum(-(-count // tile.rows) for count in counts) * -(-rows // tile.vectors)

    most = min(MOST_PARTS, power_of_two(max(1, steps_of(sizes.d_in) // 4)))
    choices = [(tile, 1 << log) for tile in tiles for log in range(most.bit_length())]
    enough = (each for each in choices if blocks(each[0], sizes.paths) * each[1] >= multiprocessors)
    latent, parts = next(enough, (tiles[-1], most))
    output = next((tile for tile in tiles if blocks(tile, sizes.d_outs) >= multiprocessors), tiles[-1])
    return BatchSchedule(parts, latent, output)


def work_sizes(sizes: Sizes, rows: int, schedule: BatchSchedule) -> Work:
    """Elements of each piece of `Work`, for one layer; there is room for as many vectors as the last tiles have."""
    room_1, room_2 = (-(-rows // tile.vectors) * tile.vectors for tile in (schedule.latent, schedule.output))
    columns, count = DEPTH * sum(map(steps_of, sizes.paths)), len(sizes.paths)
    inputs = count * room_1 * WORDS_DEPTH * steps_of(sizes.d_in)
    return Work(inputs, count * room_1, schedule.parts * rows * columns, room_2 * columns // 2, room_2)


def is_quicker_unpacked(sizes: Sizes, rows: int) -> bool:
    """Whether products of unpacked signs are quicker than `launch_batch`, for a layer and so many rows in 16 bits."""
    entries = sizes.d_in + sum(sizes.d_outs)
    signs = entries * sum(sizes.paths)

    def cost(launches: float, sign: float, product: float, entry: float) -> float:
        return launches + signs * (sign + rows * product) + rows * entries * entry

    return cost(*UNPACKED_COST) < cost(*BATCH_COST)


def scaling_threads(columns: int) -> int:
    """Threads of a block that scales a vector of so many entries."""
    return min(SCALING_THREADS, 32 * -(-columns // (32 * SCALED_AT_ONCE)))


def launch_batch(
    x: Any,
    kind: str,
    rows: int,
    paths: Sequence[Any],
    y: Any,
    work: Work,
    schedule: BatchSchedule,
    early: bool,
    start: Any,
    grouped: bool = False,
) -> None:
    """Start the kernels for batches, likewise, for one layer; `grouped` if warps can multiply in groups.

    They are three if x is float16 in whole eights, which then begins at a multiple of 16 bytes, and else four.
    """
    d_in, d_out, count = len(paths[0].g), len(paths[0].h), len(paths)
    ranks = tuple(len(path.ell) for path in paths)
    depth, direct = steps_of(d_in), kind == "half" and d_in % 8 == 0
    per_part = -(-depth // schedule.parts)
    parts, stride = -(-depth // per_part), d_in if direct else WORDS_DEPTH * depth
    tile = schedule.latent
    groups = -(-rows // tile.vectors)
    room, threads = groups * tile.vectors, scaling_threads(DEPTH * depth)
    gs, v_words, ell = columns_of(paths, "g", "v_words", "ell")
    if not direct:
        start(
            scaled_vectors(kind, d_in % 8 == 0, count, 1, early),
            (rows, count, 1),
            threads,
            threads // 8,
            (x, gs, work.inputs, work.input_units, rows, room, d_in, stride),
        )
    steps = tuple(map(steps_of, ranks))
    limits = tuple(DEPTH * each for each in steps)
    offsets, across = sums_before(limits)
    begins, blocks = sums_before([-(-limit // tile.rows) for limit in limits])
    start(
        products("single", tile, count, 1, early, grouped and tile.grouped, direct),
        (blocks, groups, parts),
        tile.threads,
        tile.shared_bytes(1, direct),
        (
            x if direct else work.inputs, work.input_units, gs, v_words, ell, (-(-d_in // 32),) * count, ranks,
            (depth,) * count, tuple(0 if direct else room * stride * which for which in range(count)), begins, offsets,
            limits, work.part, rows, room, stride, across, per_part,
        ),
    )  # fmt: skip
    tile = schedule.output
    groups = -(-rows // tile.vectors)
    room, threads = groups * tile.vectors, scaling_threads(across)
    start(
        scaled_vectors("single", True, 0, parts, early),
        (rows, 1, 1),
        threads,
        threads // 8,
        (work.part, (paths[0].g,), work.latents, work.latent_units, rows, room, across, across // 2),
    )
    start(
        products(kind, tile, 1, count, early, grouped and tile.grouped),
        (-(-d_out // tile.rows), groups, 1),
        tile.threads,
        tile.shared_bytes(count),
        (
            work.latents, work.latent_units, (paths[0].g,), *columns_of(paths, "u_words", "h"),
            tuple(-(-rank // 32) for rank in ranks), (d_out,), steps, tuple(offset // 2 for offset in offsets),
            (0,), (0,), (d_out,), y, rows, room, across // 2, d_out, sum(steps),
        ),
    )  # fmt: skip


def launch_plain(x: Any, kind: str, rows: int, paths: Sequence[Any], y: Any, part: Any, start: Any) -> None:
    """Start the plain kernels, likewise: one for each path, and one."""
    first, second = paths[0], paths[-1]
    d_in, d_out = len(first.g), len(first.h)
    ranks, offset = [len(path.ell) for path in paths], 0
    for path, rank in zip(paths, ranks, strict=True):
        arguments = (x, path.g, path.v_words, path.ell, part, rank, d_in, rows, sum(ranks), offset)
        start(plain_latent(kind), (-(-rank // WARPS), rows, 1), 32 * WARPS, 0, arguments)
        offset += rank
    arguments = (part, first.u_words, second.u_words, first.h, second.h, y, ranks[0], sum(ranks[1:]), d_out)
    start(plain_output(kind), (-(-d_out // WARPS), rows, 1), 32 * WARPS, 0, arguments)


def eights_of(count: int) -> int:
    """Eights of so many entries, the last of which need not be whole."""
    return -(-count // 8)


def launch_unpacking(kind: str, paths: Sequence[Any], out: Any, multiprocessors: int, early: bool, start: Any) -> None:
    """Start the kernel that unpacks a layer's paths to a kind, likewise: A, and after it B, with rows of whole eights.

    `out` is of uint32, two entries in each.
    """
    count, d_in, d_out = len(paths), len(paths[0].g), len(paths[0].h)
    ranks = tuple(len(path.ell) for path in paths)
    of_ranks, across = tuple(map(eights_of, ranks)), eights_of(d_in)
    offsets, total = sums_before(of_ranks)
    heights, widths = (*(8 * each for each in of_ranks), *[d_out] * count), (*[across] * count, *of_ranks)
    starts = *(8 * offset * across for offset in offsets), *(8 * total * across + offset for offset in offsets)
    begins, tiles = sums_before(
        -(-height // STRIP) * -(-width // ACROSS) for height, width in zip(heights, widths, strict=True)
    )
    v_words, g, u_words, ell, h = columns_of(paths, "v_words", "g", "u_words", "ell", "h")
    start(
        unpacking(kind, count, early),
        (min(-(-tiles // (UNPACKING_THREADS // 32)), UNPACKING_BLOCKS * multiprocessors), 1, 1),
        UNPACKING_THREADS,
        UNPACKING_THREADS // 4,
        (
            v_words + u_words, g + ell, h, heights, (*ranks, *[d_out] * count), (*[d_in] * count, *ranks), widths,
            starts, (*[across] * count, *[total] * count), begins, out, tiles,
        ),
    )  # fmt: skip


class Array(NamedTuple):
    """Where a tensor begins on a device, and how many elements it has."""

    address: int
    size: int

    def __len__(self) -> int:
        return self.size


def array(tensor: Tensor) -> Array:
    """The array of a contiguous tensor."""
    return Array(tensor.data_ptr(), tensor.numel())


class Siblings:
    """Layers that share their input, as the numbers that the kernels take: q, k and v, or gate and up, or one alone.

    Parameters
    ----------
    layers : sequence of layers' tensors
        The tensors of a layer's paths, one or two, one after the other, on a GPU, of fitting shapes and dtypes.
    """

    def __init__(self, layers: Sequence[Sequence[Tensor]]):
        self.kept = [[readable(tensor) for tensor in tensors] for tensors in layers]
        self.layers = [[PackedFactors(*map(array, path)) for path in plan.batched(kept)] for kept in self.kept]
        ranks = tuple(tuple(len(path.ell) for path in layer) for layer in self.layers)
        self.sizes = Sizes(len(self.layers[0][0].g), tuple(len(layer[0].h) for layer in self.layers), ranks)
        self.index = self.kept[0][0].device.index
        self.device = described(self.index)
        self.capability = torch.cuda.get_device_capability(self.index)
        self.early = self.capability >= EARLY
        self.schedules: dict[int, Schedule | None] = {}

    def schedule(self, rows: int) -> Schedule | None:
        """The schedule for so many rows of x; None if no block has enough shared memory."""
        vectors = vectors_of(rows)
        if vectors not in self.schedules:
            self.schedules[vectors] = schedule_for(self.sizes, rows, self.device)
        return self.schedules[vectors]

    def part_size(self, rows: int, schedule: Schedule) -> int:
        """Elements of `part` for so many rows of x."""
        return schedule.parts * rows * self.sizes.columns

    def launch(
        self,
        x: Tensor,
        y: Tensor,
        part: Tensor,
        schedule: Schedule | None = None,
        early: bool | None = None,
        norm: tuple[Tensor, Tensor, int, float] | None = None,
        activation: str | None = None,
        bias: Tensor | None = None,
        squares: Tensor | None = None,
        shares: Shares | None = None,
    ) -> None:
        """Compute y from x on torch's current stream: see `launch`, whose arrays are contiguous tensors here.

        x and y have a vector in each row, and one dtype of KINDS. `norm` has the fields of `Norm`.
        """
        rows = len(y)
        schedule, early = schedule or self.schedule(rows), self.early if early is None else early
        with torch.cuda.device(self.index):
            stream = torch.cuda.current_stream().cuda_stream
            launch(
                array(x),
                KINDS[x.dtype],
                rows,
                self.layers,
                array(y),
                array(part),
                schedule,  # type: ignore[arg-type]
                early,
                partial(start, stream, early),
                Norm(array(norm[0]), array(norm[1]), *norm[2:]) if norm else None,
                activation,
                None if bias is None else array(bias),
                None if squares is None else array(squares),
                shares,
            )


class Plan(Siblings):
    """A layer's paths as the numbers that the kernels take, for as long as its tensors stay what they are.

    Parameters
    ----------
    tensors : the tensors of all paths, one or two, one after the other, on a GPU, of fitting shapes and dtypes
    """

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__([tensors])
        self.paths = plan.batched(self.kept[0])
        self.d_out, self.d_in = self.sizes.d_outs[0], self.sizes.d_in
        self.ranks = self.sizes.ranks[0]
        self.seen = [(tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in self.kept[0]]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the plan reads just these tensors, as for a plan on a CPU."""
        return plan.Plan.fits(self, tensors)

    def __call__(self, x: Tensor, version: str | None = None, schedule: Schedule | None = None) -> Tensor:
        """(..., d_out) of x's dtype from (..., d_in), on torch's current stream; nothing waits for the device.

        `version` is one of VERSIONS; by default the best, or the kernels for batches, or for large ones products of
        unpacked signs. Several threads and streams may call it at once. A float64 input is rounded to float32.
        """
        if x.dtype not in KINDS:
            x = x.to(torch.float32)
        x = x.contiguous()
        if x.data_ptr() % 16:
            x = x.clone()
        rows = x.numel() // self.d_in
        y = torch.empty(*x.shape[:-1], self.d_out, dtype=x.dtype, device=x.device)
        if not rows:
            return y
        if version is None and schedule is None and rows > SMALL_BATCH and x.dtype != torch.float32:
            return self.unpacked(x) if is_quicker_unpacked(self.sizes, rows) else self.batch(x, y, rows)
        schedule = schedule or self.schedule(rows)
        if version is None and (schedule is None or rows > EXACT_BATCH):
            return self.unpacked(x)
        if version == "plain":
            part = torch.empty(rows * sum(self.ranks), dtype=torch.float32, device=x.device)
            with torch.cuda.device(self.index):
                go = partial(start, torch.cuda.current_stream().cuda_stream, False)
                launch_plain(array(x), KINDS[x.dtype], rows, self.layers[0], array(y), array(part), go)
            return y
        part = torch.empty(self.part_size(rows, schedule), dtype=torch.float32, device=x.device)  # type: ignore[arg-type]
        self.launch(x, y.view(rows, self.d_out), part, schedule, self.early and version != "tensor")
        return y

    def batch_schedule(self, rows: int) -> BatchSchedule:
        """The schedule of the kernels for batches."""
        return batch_schedule(self.sizes, rows, self.device.multiprocessors, self.capability == GROUPED)

    def batch(self, x: Tensor, y: Tensor, rows: int, schedule: BatchSchedule | None = None) -> Tensor:
        """The same by the kernels for batches."""
        schedule = schedule or self.batch_schedule(rows)
        counts = work_sizes(self.sizes, rows, schedule)
        places, total = sums_before(-(-count // 4) * 4 for count in counts)
        memory = torch.empty(total, dtype=torch.int32, device=x.device)
        work = Work(*(Array(memory.data_ptr() + 4 * at, n) for at, n in zip(places, counts, strict=True)))
        with torch.cuda.device(self.index):
            go = partial(start, torch.cuda.current_stream().cuda_stream, self.early)
            arguments = array(x), KINDS[x.dtype], rows, self.layers[0], array(y), work, schedule, self.early, go
            launch_batch(*arguments, self.capability == GROUPED)
        return y

    def unpacked(self, x: Tensor) -> Tensor:
        """The same by unpacking to x's dtype and two products."""
        if x.dtype == torch.float32:
            return unpacked_linear(x.reshape(-1, self.d_in), self.paths).reshape(*x.shape[:-1], self.d_out)
        a, b = self.factors(x.dtype)
        return functional.linear(functional.linear(x, a), b)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All paths folded into one pair in float16 or bfloat16, A (R, d_in) and B (d_out, R): see `cuda_unpacked`.

        R is the sum of ranks, each rounded up to a multiple of eight; the rows of A and columns of B that this adds are
        zero.
        """
        rows, columns = 8 * sum(map(eights_of, self.ranks)), 8 * eights_of(self.d_in)
        memory = torch.empty(rows * (columns + self.d_out), dtype=dtype, device=self.kept[0][0].device)
        with torch.cuda.device(self.index):
            go = partial(start, torch.cuda.current_stream().cuda_stream, self.early)
            multiprocessors = self.device.multiprocessors
            launch_unpacking(KINDS[dtype], self.layers[0], array(memory), multiprocessors, self.early, go)
        a, b = memory[: rows * columns], memory[rows * columns :]
        return a.view(rows, columns)[:, : self.d_in], b.view(self.d_out, rows)


def readable(tensor: Tensor) -> Tensor:
    """A tensor as the kernels read it: row after row, 16 bytes at a time, words of 32 bits."""
    if tensor.dtype in (torch.uint8, torch.int16):
        tensor = tensor.to(torch.int32) & (0xFF if tensor.dtype == torch.uint8 else 0xFFFF)
    elif tensor.is_floating_point():
        tensor = tensor.to(torch.float16)
    tensor = tensor.detach().contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@cache
def described(index: int) -> Device:
    """A GPU's properties."""
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.name, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def unusable(index: int) -> str | None:
    """Why the kernels do not run on a GPU, or None if they do."""
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        return f"its compute capability is {capability[0]}.{capability[1]}, and they need {OLDEST[0]}.{OLDEST[1]}"
    with torch.cuda.device(index):
        loaded(latent("half", True, True, 1, capability >= EARLY), index)
    return None


@cache
def compiled(kernel: Any, capability: tuple[int, int]) -> tuple[bytes, bytes]:
    """PTX of a kernel, and the name that it has there; kept in the cache folder, for it takes Numba seconds."""
    named = f"{RECIPES[kernel]} {SIGNATURES[kernel]} {capability} {sources()}"
    try:
        folder = cached("ptx", hashlib.sha256(named.encode()).hexdigest()[:32])
        text = (made_once(folder, lambda part: write_ptx(part, kernel, capability)) / PTX).read_bytes()
    except OSError as error:
        log.info("littlebit: the cache folder cannot be used, so kernels are compiled for this run alone: %s", error)
        text = ptx_of(kernel, capability)
    found = re.search(rb"\.entry\s+(\w+)\(", text)
    assert found
    return text, found[1]


@cache
def sources() -> str:
    """A digest of what makes PTX of a recipe: these modules, and the compiler of this environment."""
    files = sorted(Path(__file__).parent.glob("cuda*.py"))
    versions = [metadata.version(name) for name in ("numba", "numba-cuda", "llvmlite")]
    text = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(text + repr([*versions, sys.prefix]).encode()).hexdigest()


def write_ptx(folder: Path, kernel: Any, capability: tuple[int, int]) -> None:
    """Put a kernel's PTX into a folder."""
    (folder / PTX).write_bytes(ptx_of(kernel, capability))


def ptx_of(kernel: Any, capability: tuple[int, int]) -> bytes:
    """PTX that Numba makes of a kernel."""
    ptx, _ = cuda.compile(kernel.py_func, SIGNATURES[kernel], cc=capability, output="ptx", device=False, abi="numba")
    text = ptx if isinstance(ptx, bytes) else ptx.encode()
    if b"wgmma" in text:  # only for this very capability
        text = re.sub(rb"\.target sm_(\d+)\b", rb".target sm_\1a", text)
    return text


@cache
def loaded(kernel: Any, index: int) -> Any:
    """A kernel as the driver starts it on a device, which is the current one."""
    from cuda.bindings import driver

    library, name = library_of(kernel, torch.cuda.get_device_capability(index))
    function = checked(driver.cuLibraryGetKernel(library, name))
    device, names = checked(driver.cuDeviceGet(index)), driver.CUfunction_attribute
    fixed = checked(driver.cuKernelGetAttribute(names.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function, device))
    most = names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuKernelSetAttribute(most, described(index).shared_bytes - fixed, function, device))
    return driver.CUfunction(int(function))


@cache
def library_of(kernel: Any, capability: tuple[int, int]) -> tuple[Any, bytes]:
    """A kernel's library in the driver, for all devices of a capability, and its name there."""
    from cuda.bindings import driver

    text, name = compiled(kernel, capability)
    return checked(driver.cuLibraryLoadData(text, None, None, 0, None, None, 0)), name


def checked(answer: Any) -> Any:
    """What a call of the driver returns.

    Raises
    ------
    RuntimeError
        With the driver's name of the error.
    """
    code, *values = answer
    if int(code):
        raise RuntimeError(f"the CUDA driver failed: {code.name}")
    return values[0] if values else None


def start(
    stream: int, early: bool, kernel: Any, grid: tuple[int, int, int], threads: int, size: int, args: Any
) -> None:
    """Start a kernel on a stream of the current device."""
    from cuda.bindings import driver

    values = np.array([number_of(arg) for arg in flat(args)], np.uint64)
    pointers = values.ctypes.data + 8 * np.arange(len(values), dtype=np.uint64)
    launching = driver.CUlaunchConfig()
    launching.gridDimX, launching.gridDimY, launching.gridDimZ = grid
    launching.blockDimX, launching.blockDimY, launching.blockDimZ = threads, 1, 1
    launching.sharedMemBytes, launching.hStream = size, stream
    if early:
        launching.attrs, launching.numAttrs = [early_launch()], 1
    checked(driver.cuLaunchKernelEx(launching, loaded(kernel, torch.cuda.current_device()), pointers.ctypes.data, 0))


def flat(args: Iterable[Any]) -> Iterator[Any]:
    """Arguments, and the entries of those that are tuples, which is how a kernel gets them."""
    for arg in args:
        yield from arg if type(arg) is tuple else (arg,)


def number_of(arg: Any) -> int:
    """An argument's bits: an address, an integer, or a float32."""
    if isinstance(arg, Array):
        return arg.address
    return int(np.float32(arg).view(np.uint32)) if isinstance(arg, float) else arg


@cache
def early_launch() -> Any:
    """The launch attribute that lets a kernel start before the one before it has ended."""
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute
