"""Choose how the packed layer's CUDA kernels divide their work: tile sizes, split-K factors, and GEMV, GEMM or cuBLAS.

A launch configuration does not change what is computed, beyond the order of sums, but how fast. It is either measured
(`littlebit tune`, and a table for the H100 that comes with the package) or estimated from the layer's shape.
"""

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..files.cache import cache_path
from .cuda_gemm import K_STEP, K_STEP_WORDS, GemmTile
from .cuda_gemv import FRAGMENT_ROWS, K_TILE, MAX_VECTORS, PLANES_WORDS

log = logging.getLogger(__name__)

DTYPE_NAMES = {torch.float16: "half", torch.bfloat16: "bfloat", torch.float32: "single"}
PLAIN_WARPS = 8  # warps of a block of the plain kernels
MAX_WARPS = 16  # most warps of a block of the GEMV
MAX_GEMV_ROWS = 4  # rows of x in 16 bits up to which the GEMV is faster than the GEMM, on an H100
# Rows of x in float32 up to which the GEMV is faster than unpacking; the GEMM would lose float32's precision
MAX_EXACT_ROWS = 32
WGMMA_CAPABILITY = (9, 0)  # the only compute capability with wgmma
MAX_SPLIT_K = 8  # most K slices of the GEMM
# Microseconds on an H100 for a call: the launches; and for each sign, each sign times a row of x, and each entry of x
# or y. Fitted to both ways' times for six layers at 0.1 to 0.55 bits and 32 to 1024 rows. The way that these numbers
# choose takes at most 7 % longer than the faster one.
GEMM_COST, UNPACKED_COST = (9.3, 2.3e-7, 3.4e-9, 1.8e-6), (11.0, 1.3e-6, 2.1e-9, 5.1e-7)
CONFIGS = Path(__file__).parent.parent / "data" / "cuda_schedules.json"
MAX_STORED_NUMBER = 64


class Tiling(NamedTuple):
    """How a GEMV kernel divides its rows and its K dimension among warps.

    Attributes
    ----------
    k_warps : int
        Warps of a block that have the same rows and different K tiles (split-K within a block).
    log_row_warps : int
        Binary logarithm of the warps of a block that have different rows.
    row_tiles : int
        Tiles of 16 rows that a warp computes one after the other.
    """

    k_warps: int
    log_row_warps: int
    row_tiles: int

    @property
    def rows(self) -> int:
        """Count the rows of a block."""
        return FRAGMENT_ROWS * self.row_tiles << self.log_row_warps

    @property
    def threads(self) -> int:
        """Count the threads of a block."""
        return 32 * self.k_warps << self.log_row_warps

    def shared_bytes(self, vectors: int, k_tiles: int, strides: Sequence[int]) -> int:
        """Count a block's bytes of shared memory.

        It holds bit planes, a sum for each K warp, row and vector, and words of signs. `strides` are the words between
        rows, one for each matrix of signs.
        """
        words = sum(-(-self.rows * stride // 4) * 4 + FRAGMENT_ROWS for stride in strides)
        return 4 * (vectors * (PLANES_WORDS * k_tiles + self.k_warps * self.rows) + words)


class LaunchConfig(NamedTuple):
    """How the two GEMV kernels of a layer are launched.

    Attributes
    ----------
    split_k : int
        K slices of d_in, each for other blocks: at most the K tiles of d_in, and 1 unless 128 divides d_in.
    latent, output : Tiling
    """

    split_k: int
    latent: Tiling
    output: Tiling


class LayerShape(NamedTuple):
    """The shape of a layer, or of fused projections, which share their input.

    Attributes
    ----------
    d_in : int
    d_outs : tuple of int
        One for each layer.
    ranks : tuple of tuple of int
        For each layer, the ranks of its one or two paths.
    """

    d_in: int
    d_outs: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]

    @property
    def paths(self) -> list[int]:
        """List the ranks of all layers' paths."""
        return [rank for ranks in self.ranks for rank in ranks]

    @property
    def columns(self) -> int:
        """Count the columns of t, the latents of all paths."""
        return sum(map(padded_rank, self.paths))

    @property
    def wide(self) -> bool:
        """Return whether all rows of U have a multiple of four words."""
        return all(padded_rank(rank) % 128 == 0 for rank in self.paths)

    def __str__(self) -> str:
        """Return the name in tables of configurations: d_outs, "x", d_in, ":", ranks, with "," between layers."""
        ranks = ("+".join(map(str, ranks)) for ranks in self.ranks)
        return f"{','.join(map(str, self.d_outs))}x{self.d_in}:{','.join(ranks)}"


class Device(NamedTuple):
    """The properties of a GPU that a configuration depends on.

    Attributes
    ----------
    name : str
    multiprocessors : int
    shared_bytes : int
        Most shared memory of a block, in bytes.
    """

    name: str
    multiprocessors: int
    shared_bytes: int


def k_tiles_of(count: int) -> int:
    """Count the K tiles of a vector with `count` entries."""
    return -(-count // K_TILE)


def padded_rank(rank: int) -> int:
    """Return a path's columns of t: the rank, rounded up to whole words of signs."""
    return -(-rank // 32) * 32


def vectors_of(rows: int) -> int:
    """Return how many rows of x a block of the GEMV multiplies at once: 1, 2 or 4."""
    return min(MAX_VECTORS, 1 << (rows - 1).bit_length())


def latent_shared_bytes(tiling: Tiling, vectors: int, d_in: int, split_k: int) -> int:
    """Count the bytes of shared memory of a block of `cuda_gemv.latent`."""
    k_tiles = -(-k_tiles_of(d_in) // split_k)
    return tiling.shared_bytes(vectors, k_tiles, [8 * k_tiles + 4 if d_in % 128 == 0 else -(-d_in // 32)])


def output_shared_bytes(tiling: Tiling, vectors: int, shape: LayerShape) -> int:
    """Count the bytes of shared memory of a block of `cuda_gemv.output`."""

    def needed(ranks: Sequence[int]) -> int:
        k_tiles = [k_tiles_of(rank) for rank in ranks]
        strides = [8 * count + 4 for count in k_tiles] if shape.wide else [padded_rank(rank) // 32 for rank in ranks]
        return tiling.shared_bytes(vectors, sum(k_tiles), strides)

    return max(map(needed, shape.ranks))


def launch_config(shape: LayerShape, rows: int, device: Device) -> LaunchConfig | None:
    """Choose how to launch the GEMV for `rows` rows of x, by measurements on this GPU or by the shape.

    Returns
    -------
    LaunchConfig, or None if no block has enough shared memory.
    """
    vectors = vectors_of(rows)
    known = measured_configs().get(device.name, {})
    config = known.get(config_name(shape, vectors)) or estimated_config(shape, device.multiprocessors)
    first = shrink_to_fit(
        config.latent,
        device.shared_bytes,
        lambda tiling: latent_shared_bytes(tiling, vectors, shape.d_in, config.split_k),
    )
    second = shrink_to_fit(
        config.output, device.shared_bytes, lambda tiling: output_shared_bytes(tiling, vectors, shape)
    )
    return LaunchConfig(config.split_k, first, second) if first and second else None


def estimated_config(shape: LayerShape, multiprocessors: int) -> LaunchConfig:
    """Estimate a configuration from the shape: 64 to 128 blocks on 132 multiprocessors, which measured well."""
    k_tiles, row_tiles = k_tiles_of(shape.d_in), shape.columns // FRAGMENT_ROWS
    split_k = 1 if shape.d_in % 128 else min(8, power_of_two(max(1, k_tiles // 8)))
    log = log_of_warps(2 * row_tiles * split_k // multiprocessors)
    first = Tiling(min(-(-k_tiles // split_k), MAX_WARPS >> log), log, 1)
    k_tiles = max(sum(map(k_tiles_of, ranks)) for ranks in shape.ranks)
    row_tiles = sum(-(-d_out // FRAGMENT_ROWS) for d_out in shape.d_outs)
    log = log_of_warps(2 * row_tiles // multiprocessors)
    return LaunchConfig(split_k, first, Tiling(min(power_of_two(max(1, 2 * k_tiles // 7)), MAX_WARPS >> log), log, 1))


def log_of_warps(count: int) -> int:
    """Return the binary logarithm of a number of warps, rounded down, after limiting it to 1 to MAX_WARPS."""
    return min(max(1, count), MAX_WARPS).bit_length() - 1


def power_of_two(number: int) -> int:
    """Return the largest power of two that is at most `number`."""
    return 1 << (number.bit_length() - 1)


def shrink_to_fit(tiling: Tiling, limit: int, needed: Callable[[Tiling], int]) -> Tiling | None:
    """Reduce the rows of a block until its shared memory, `needed`, is within `limit` bytes; None if it never is."""
    while needed(tiling) > limit:
        if tiling.row_tiles > 1:
            tiling = tiling._replace(row_tiles=tiling.row_tiles // 2)
        elif tiling.log_row_warps:
            tiling = tiling._replace(log_row_warps=tiling.log_row_warps - 1)
        else:
            return None
    return tiling


# ---- Tables of measured configurations


def config_name(shape: LayerShape, vectors: int) -> str:
    """Return the key of a configuration in the tables: the shape, and the vectors at once if more than one."""
    return str(shape) if vectors == 1 else f"{shape}*{vectors}"


@cache
def measured_configs() -> dict[str, dict[str, LaunchConfig]]:
    """Read the fastest measured configurations, by the GPU's name and `config_name`: bundled ones and tuned ones."""
    tables = json.loads(CONFIGS.read_text(encoding="utf-8"))
    try:
        path = own_schedules()
        for name, table in read_configs(path).items() if path.exists() else ():
            tables[name] = tables.get(name, {}) | table
    except (ValueError, OSError) as error:
        log.warning("littlebit: launch configurations from `littlebit tune` are not used: %s", error)
    return {name: {key: parse_config(each) for key, each in table.items()} for name, table in tables.items()}


def own_schedules() -> Path:
    """Return the path of the table that `littlebit tune` writes."""
    return cache_path("cuda_schedules.json")


def read_configs(path: Path) -> dict[str, dict[str, list[Any]]]:
    """Read and check a table of configurations; values stay lists, as stored.

    Raises
    ------
    ValueError
        If the file does not hold valid configurations.
    """
    try:
        tables = json.loads(path.read_text(encoding="utf-8"))
        for table in tables.values():
            for each in table.values():
                parse_config(each)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        invariant = f"{path} must hold a table of launch configurations ({error})"
        raise ValueError(f"{invariant}: remove it, and run `littlebit tune` again") from None
    return tables


def parse_config(stored: Any) -> LaunchConfig:
    """Parse a configuration from [split_k, latent, output], the last two [k_warps, log_row_warps, row_tiles].

    Raises
    ------
    ValueError, TypeError
        If a number is out of range or missing.
    """
    split_k, *both = stored
    config = LaunchConfig(split_k, *(Tiling(*each) for each in both))
    numbers = [split_k, *config.latent, *config.output]
    if not all(type(number) is int and 0 <= number <= MAX_STORED_NUMBER for number in numbers):
        raise ValueError(f"a configuration must hold integers from 0 to {MAX_STORED_NUMBER}, got {stored}")
    for tiling in (config.latent, config.output):
        if not (split_k and tiling.row_tiles and 32 <= tiling.threads <= 32 * MAX_WARPS):
            raise ValueError(f"split_k and row_tiles must be positive, and warps 1 to {MAX_WARPS}, got {stored}")
    return config


# ---- The GEMM


class GemmWorkspace(NamedTuple):
    """Device memory that `cuda_launch.launch_gemm` overwrites.

    Attributes
    ----------
    inputs, input_units
        The scaled rows of x, two float16 in a word, and their powers of two.
    partials
        Split-K partial sums of the latents, float32.
    latents, latent_units
        The scaled latents and their powers of two.
    """

    inputs: Any
    input_units: Any
    partials: Any
    latents: Any
    latent_units: Any


class GemmConfig(NamedTuple):
    """How the GEMM kernels are launched.

    Attributes
    ----------
    split_k : int
        K slices of d_in.
    latent, output : GemmTile
    """

    split_k: int
    latent: GemmTile
    output: GemmTile


def steps_of(count: int) -> int:
    """Count the K steps of a vector with `count` entries."""
    return -(-count // K_STEP)


def tiles_for(rows: int, wgmma: bool) -> list[GemmTile]:
    """List the tiles to choose from for `rows` rows of x, large ones first."""
    if rows <= 16:
        return [GemmTile(4, 1, 1, 2), GemmTile(2, 1, 1, 2)]
    if rows <= 32:
        return [GemmTile(4, 1, 1, 4), GemmTile(2, 2, 1, 2)]
    if not wgmma:
        return [GemmTile(4, 2, 2, 4), GemmTile(2, 2, 2, 4)]
    return ([GemmTile(8, 1, 1, 16)] if rows > 64 else []) + [GemmTile(8, 1, 1, 8), GemmTile(4, 1, 1, 8)]


def gemm_config(shape: LayerShape, rows: int, multiprocessors: int, wgmma: bool) -> GemmConfig:
    """Choose the largest tiles and the fewest K slices that give each multiprocessor a block."""
    tiles = tiles_for(rows, wgmma)

    def blocks(tile: GemmTile, counts: Iterable[int]) -> int:
        return sum(-(-count // tile.rows) for count in counts) * -(-rows // tile.vectors)

    most = min(MAX_SPLIT_K, power_of_two(max(1, steps_of(shape.d_in) // 4)))
    choices = [(tile, 1 << log) for tile in tiles for log in range(most.bit_length())]
    enough = (each for each in choices if blocks(each[0], shape.paths) * each[1] >= multiprocessors)
    latent, split_k = next(enough, (tiles[-1], most))
    output = next((tile for tile in tiles if blocks(tile, shape.d_outs) >= multiprocessors), tiles[-1])
    return GemmConfig(split_k, latent, output)


def workspace_sizes(shape: LayerShape, rows: int, config: GemmConfig) -> GemmWorkspace:
    """Count the elements of each array of a workspace for one layer, with room for whole tiles of vectors."""
    room_1, room_2 = (-(-rows // tile.vectors) * tile.vectors for tile in (config.latent, config.output))
    columns, count = K_STEP * sum(map(steps_of, shape.paths)), len(shape.paths)
    inputs = count * room_1 * K_STEP_WORDS * steps_of(shape.d_in)
    return GemmWorkspace(inputs, count * room_1, config.split_k * rows * columns, room_2 * columns // 2, room_2)


def is_faster_unpacked(shape: LayerShape, rows: int) -> bool:
    """Return whether cuBLAS with unpacked signs is faster than the GEMM, for `rows` rows of x in 16 bits."""
    entries = shape.d_in + sum(shape.d_outs)
    signs = entries * sum(shape.paths)

    def cost(launches: float, sign: float, product: float, entry: float) -> float:
        return launches + signs * (sign + rows * product) + rows * entries * entry

    return cost(*UNPACKED_COST) < cost(*GEMM_COST)


# ---- Helpers of launches


def exclusive_sums(counts: Iterable[int]) -> tuple[tuple[int, ...], int]:
    """Return where each of several pieces begins, and where the last one ends."""
    *before, total = itertools.accumulate(counts, initial=0)
    return tuple(before), total


def fields_of(paths: Sequence[Any], *names: str) -> list[tuple[Any, ...]]:
    """Collect the named fields of all paths: a tuple over paths for each name."""
    return [tuple(getattr(path, name) for path in paths) for name in names]
