"""Launch the packed layer's CUDA kernels: from flat device arrays of a layer's paths to grids and kernel arguments.

    launch_plain    the naive GEMV (cuda_plain.py)
    launch_gemv     a few rows of x, layers that share their input in one launch (cuda_gemv.py)
    launch_gemm     more rows (cuda_gemm.py)
    launch_unpack   signs as 16-bit matrices, for cuBLAS (cuda_unpack.py)

Each takes the function that launches a kernel, so that the simulator can run them too.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from collections.abc import Sequence
from typing import Any, NamedTuple

from .cuda_gemm import K_STEP, K_STEP_WORDS, SCALED_AT_ONCE, SCALING_THREADS, gemm, scale_vectors
from .cuda_gemv import SplitKvPartials, latent, output
from .cuda_plain import plain_latent, plain_output
from .cuda_schedule import (
    PLAIN_WARPS,
    GemmConfig,
    GemmWorkspace,
    LaunchConfig,
    LayerShape,
    exclusive_sums,
    fields_of,
    k_tiles_of,
    latent_shared_bytes,
    output_shared_bytes,
    padded_rank,
    steps_of,
    vectors_of,
)
from .cuda_unpack import TILE_COLUMNS8, TILE_ROWS, UNPACK_BLOCKS, UNPACK_THREADS, unpack


class Norm(NamedTuple):
    """An RMSNorm of the input, which the GEMV applies in its prologue.

    Attributes
    ----------
    weight : (d_in,) float32 array
    squares : (rows, count) float32 array
        Partial sums of each row's squares.
    count : int
    eps : float
    """

    weight: Any
    squares: Any
    count: int
    eps: float


def launch_plain(x: Any, dtype: str, rows: int, paths: Sequence[Any], y: Any, t: Any, start: Any) -> None:
    """Launch the naive GEMV: a kernel for each path's latents, and one for the outputs.

    Parameters
    ----------
    x, dtype, rows, y, start
        See `launch_gemv`.
    paths : sequence of one or two PackedFactors of arrays
    t : (rows * sum of ranks,) float32 array, overwritten
    """
    first, second = paths[0], paths[-1]
    d_in, d_out = len(first.g), len(first.h)
    ranks, offset = [len(path.ell) for path in paths], 0
    for path, rank in zip(paths, ranks, strict=True):
        arguments = (x, path.g, path.v_words, path.ell, t, rank, d_in, sum(ranks), offset)
        start(plain_latent(dtype), (-(-rank // PLAIN_WARPS), rows, 1), 32 * PLAIN_WARPS, 0, arguments)
        offset += rank
    arguments = (t, first.u_words, second.u_words, first.h, second.h, y, ranks[0], sum(ranks[1:]), d_out)
    start(plain_output(dtype), (-(-d_out // PLAIN_WARPS), rows, 1), 32 * PLAIN_WARPS, 0, arguments)


# ---- GEMV


def launch_gemv(
    x: Any,
    dtype: str,
    rows: int,
    layers: Sequence[Sequence[Any]],
    y: Any,
    t: Any,
    config: LaunchConfig,
    pdl: bool,
    start: Any,
    norm: Norm | None = None,
    activation: str | None = None,
    bias: Any = None,
    squares: Any = None,
    split_kv: SplitKvPartials | None = None,
) -> None:
    """Launch both GEMV kernels for layers that share their input, on flat device arrays.

    Parameters
    ----------
    x : (rows * d_in,) array; float16 and bfloat16 as uint16; twice as long with an activation
    dtype : str
        A value of DTYPE_NAMES, of x and y.
    rows : int
    layers : sequence of one or two PackedFactors of arrays each, words as uint32 and scales as uint16
    y : (rows * sum of d_out,) array, written: for each row the layers' outputs side by side
    t : float32 array of at least config.split_k * rows * sum of padded ranks elements, overwritten
    config : LaunchConfig
    pdl : bool
        Use programmatic dependent launch.
    start : callable
        Launches a kernel: (kernel, grid, threads, bytes of shared memory, arguments).
    norm : Norm, optional
    activation : str, optional
        "silu": the input is silu(x[:d_in]) * x[d_in:].
    bias : (sum of d_out,) float32 array, optional
        Added to the outputs.
    squares : (rows * output_blocks(...),) float32 array, optional
        The only layer's output is added to the float32 y, and partial sums of squares of the new y go here.
    split_kv : SplitKvPartials, optional
        x holds the float32 partials of `cuda_decode.attend`: (rows, heads, splits, stride).

    Raises
    ------
    ValueError
        If d_in cannot be divided into config.split_k K slices.
    """
    shape = shape_of(layers)
    k_tiles, split_k = k_tiles_of(shape.d_in), config.split_k
    if split_k > k_tiles or (split_k > 1 and shape.d_in % 128):
        most = 1 if shape.d_in % 128 else k_tiles
        raise ValueError(f"split_k must be at most {most} for {shape.d_in} columns, got {split_k}: see LaunchConfig")
    prologue = split_kv or ("norm" if norm else activation or "plain")
    launch_latent(x, dtype, rows, layers, t, config, pdl, start, norm, prologue)
    launch_output(dtype, rows, layers, y, t, config, pdl, start, bias, squares)


def shape_of(layers: Sequence[Sequence[Any]]) -> LayerShape:
    """Return the shape of layers that share their input."""
    ranks = tuple(tuple(len(path.ell) for path in layer) for layer in layers)
    return LayerShape(len(layers[0][0].g), tuple(len(layer[0].h) for layer in layers), ranks)


def k_slices(d_in: int, split_k: int) -> tuple[int, int]:
    """Return the K tiles of a K slice of d_in, and the number of K slices that have any."""
    k_tiles = k_tiles_of(d_in)
    of_slice = -(-k_tiles // split_k)
    return of_slice, -(-k_tiles // of_slice)


def launch_latent(
    x: Any,
    dtype: str,
    rows: int,
    layers: Sequence[Sequence[Any]],
    t: Any,
    config: LaunchConfig,
    pdl: bool,
    start: Any,
    norm: Norm | None,
    prologue: str | SplitKvPartials,
) -> None:
    """Launch the first GEMV kernel; see `launch_gemv`."""
    paths = [path for layer in layers for path in layer]
    d_in, ranks, vectors = len(paths[0].g), [len(path.ell) for path in paths], vectors_of(rows)
    of_slice, slices = k_slices(d_in, config.split_k)
    tiling = config.latent
    first_blocks, total = exclusive_sums([-(-padded_rank(rank) // tiling.rows) for rank in ranks])
    offsets, columns = exclusive_sums(map(padded_rank, ranks))
    start(
        latent(dtype, d_in % 128 == 0, d_in % 8 == 0, vectors, pdl, len(paths), prologue),
        (total, slices, -(-rows // vectors)),
        tiling.threads,
        latent_shared_bytes(tiling, vectors, d_in, config.split_k),
        (
            x, *fields_of(paths, "g", "v_words", "ell"), tuple(ranks), first_blocks, offsets, t,
            *((norm.weight, norm.squares) if norm else (t, t)),
            d_in, rows, columns, of_slice, tiling.row_tiles, tiling.k_warps, tiling.log_row_warps,
            *((norm.count, norm.eps) if norm else (0, 0.0)),
        ),
    )  # fmt: skip


def launch_output(
    dtype: str,
    rows: int,
    layers: Sequence[Sequence[Any]],
    y: Any,
    t: Any,
    config: LaunchConfig,
    pdl: bool,
    start: Any,
    bias: Any,
    squares: Any,
) -> None:
    """Launch the second GEMV kernel; see `launch_gemv`."""
    shape, vectors, tiling = shape_of(layers), vectors_of(rows), config.output
    offsets, columns = exclusive_sums(map(padded_rank, shape.paths))
    first_blocks, total = exclusive_sums([-(-d_out // tiling.rows) for d_out in shape.d_outs])
    starts, y_columns = exclusive_sums(shape.d_outs)
    every = iter(zip(shape.paths, offsets, strict=True))
    # The kernel takes two paths for each layer; a missing one has rank 0
    pairs = [path for layer in layers for path in (layer[0], layer[-1])]
    of_pairs = [next(every) if at < len(layer) else (0, 0) for layer in layers for at in (0, 1)]
    epilogue = "add" if squares is not None else "bias" if bias is not None else "plain"
    start(
        output(dtype, shape.wide, vectors, k_slices(shape.d_in, config.split_k)[1], pdl, len(layers), epilogue),
        (total, 1, -(-rows // vectors)),
        tiling.threads,
        output_shared_bytes(tiling, vectors, shape),
        (
            t, *fields_of(pairs, "u_words", "h"), *zip(*of_pairs, strict=True), shape.d_outs, first_blocks, starts,
            t if bias is None else bias, y, t if squares is None else squares,
            rows, columns, y_columns, tiling.row_tiles, tiling.k_warps, tiling.log_row_warps,
        ),
    )  # fmt: skip


# ---- GEMM


def scaling_threads(columns: int) -> int:
    """Return the threads of a block that scales a vector with `columns` entries."""
    return min(SCALING_THREADS, 32 * -(-columns // (32 * SCALED_AT_ONCE)))


def launch_gemm(
    x: Any,
    dtype: str,
    rows: int,
    paths: Sequence[Any],
    y: Any,
    workspace: GemmWorkspace,
    config: GemmConfig,
    pdl: bool,
    start: Any,
    wgmma: bool = False,
) -> None:
    """Launch the GEMM kernels for one layer: three if x is float16 with a multiple of eight columns, else four.

    Parameters
    ----------
    x, dtype, rows, y, pdl, start
        See `launch_gemv`; x must begin at a multiple of 16 bytes.
    paths : sequence of one or two PackedFactors of arrays
    workspace : GemmWorkspace
        With the elements that `cuda_schedule.workspace_sizes` counts.
    config : GemmConfig
    wgmma : bool
        Whether the GPU has wgmma.
    """
    split_k = launch_gemm_latent(x, dtype, rows, paths, workspace, config, pdl, start, wgmma)
    tile, d_out = config.output, len(paths[0].h)
    ranks = [len(path.ell) for path in paths]
    steps = tuple(map(steps_of, ranks))
    offsets, columns = exclusive_sums(K_STEP * each for each in steps)
    groups = -(-rows // tile.vectors)
    room, threads = groups * tile.vectors, scaling_threads(columns)
    start(
        scale_vectors("single", True, 0, split_k, pdl),
        (rows, 1, 1),
        threads,
        threads // 8,
        (
            workspace.partials, (paths[0].g,), workspace.latents, workspace.latent_units,
            rows, room, columns, columns // 2,
        ),
    )  # fmt: skip
    start(
        gemm(dtype, tile, 1, len(paths), pdl, wgmma and tile.fits_wgmma),
        (-(-d_out // tile.rows), groups, 1),
        tile.threads,
        tile.shared_bytes(len(paths)),
        (
            workspace.latents, workspace.latent_units, (paths[0].g,), *fields_of(paths, "u_words", "h"),
            tuple(-(-rank // 32) for rank in ranks), (d_out,), steps, tuple(offset // 2 for offset in offsets),
            (0,), (0,), (d_out,), y, rows, room, columns // 2, d_out, sum(steps),
        ),
    )  # fmt: skip


def launch_gemm_latent(
    x: Any,
    dtype: str,
    rows: int,
    paths: Sequence[Any],
    workspace: GemmWorkspace,
    config: GemmConfig,
    pdl: bool,
    start: Any,
    wgmma: bool,
) -> int:
    """Launch the GEMM's first half, x times V; return the number of split-K partial sums. See `launch_gemm`."""
    d_in, count, tile = len(paths[0].g), len(paths), config.latent
    ranks = tuple(len(path.ell) for path in paths)
    depth, direct = steps_of(d_in), dtype == "half" and d_in % 8 == 0
    split_steps = -(-depth // config.split_k)
    split_k, stride = -(-depth // split_steps), d_in if direct else K_STEP_WORDS * depth
    groups = -(-rows // tile.vectors)
    room, threads = groups * tile.vectors, scaling_threads(K_STEP * depth)
    gs, v_words, ell = fields_of(paths, "g", "v_words", "ell")
    if not direct:
        start(
            scale_vectors(dtype, d_in % 8 == 0, count, 1, pdl),
            (rows, count, 1),
            threads,
            threads // 8,
            (x, gs, workspace.inputs, workspace.input_units, rows, room, d_in, stride),
        )
    limits = tuple(K_STEP * steps_of(rank) for rank in ranks)
    offsets, columns = exclusive_sums(limits)
    first_blocks, blocks = exclusive_sums([-(-limit // tile.rows) for limit in limits])
    start(
        gemm("single", tile, count, 1, pdl, wgmma and tile.fits_wgmma, direct),
        (blocks, groups, split_k),
        tile.threads,
        tile.shared_bytes(1, direct),
        (
            x if direct else workspace.inputs, workspace.input_units, gs, v_words, ell, (-(-d_in // 32),) * count,
            ranks, (depth,) * count, tuple(0 if direct else room * stride * which for which in range(count)),
            first_blocks, offsets, limits, workspace.partials, rows, room, stride, columns, split_steps,
        ),
    )  # fmt: skip
    return split_k


# ---- Unpacking


def groups_of_eight(count: int) -> int:
    """Count the groups of eight entries in `count`, rounded up."""
    return -(-count // 8)


def launch_unpack(dtype: str, paths: Sequence[Any], out: Any, multiprocessors: int, pdl: bool, start: Any) -> None:
    """Launch the kernel that unpacks a layer's paths to A and, after it, B.

    Rows are padded to a multiple of eight entries.

    Parameters
    ----------
    dtype : str
        "half" or "bfloat".
    paths, pdl, start
        See `launch_gemv`.
    out : uint32 array, two entries in each word
    multiprocessors : int
        Of the GPU.
    """
    count, d_in, d_out = len(paths), len(paths[0].g), len(paths[0].h)
    ranks = tuple(len(path.ell) for path in paths)
    of_ranks, across = tuple(map(groups_of_eight, ranks)), groups_of_eight(d_in)
    offsets, total = exclusive_sums(of_ranks)
    heights, widths = (*(8 * each for each in of_ranks), *[d_out] * count), (*[across] * count, *of_ranks)
    starts = *(8 * offset * across for offset in offsets), *(8 * total * across + offset for offset in offsets)
    first_tiles, tiles = exclusive_sums(
        -(-height // TILE_ROWS) * -(-width // TILE_COLUMNS8) for height, width in zip(heights, widths, strict=True)
    )
    v_words, g, u_words, ell, h = fields_of(paths, "v_words", "g", "u_words", "ell", "h")
    start(
        unpack(dtype, count, pdl),
        (min(-(-tiles // (UNPACK_THREADS // 32)), UNPACK_BLOCKS * multiprocessors), 1, 1),
        UNPACK_THREADS,
        UNPACK_THREADS // 4,
        (
            v_words + u_words, g + ell, h, heights, (*ranks, *[d_out] * count), (*[d_in] * count, *ranks), widths,
            starts, (*[across] * count, *[total] * count), first_tiles, out, tiles,
        ),
    )  # fmt: skip
