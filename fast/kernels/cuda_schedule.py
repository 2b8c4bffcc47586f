"""Choose launch configurations for the packed layer's CUDA kernels."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..files.cache import cache_path
from .cuda_gemm import DEPTH, WORDS_DEPTH, Tile
from .cuda_gemv import PLANES, ROWS, SLICE, VECTORS

log = logging.getLogger(__name__)


KINDS = {torch.float16: "half", torch.bfloat16: "bfloat", torch.float32: "single"}


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
    return cache_path("cuda_schedules.json")


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
