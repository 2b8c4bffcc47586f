"""Launching the CUDA kernels: how work is divided, and a layer's paths as the numbers that kernels take.

The kernels are compiled to PTX by Numba, but loaded and started through the driver: an argument is then an address or
a number, a launch takes a few microseconds of Python, and it may be early (programmatic dependent launch).
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..packing import PackedFactors
from . import cuda_driver, cuda_schedule
from .cpu_layer import CpuPackedLayer, group_paths
from .cuda_gemm import DEPTH, SCALED_AT_ONCE, SCALING_THREADS, WORDS_DEPTH, products, scaled_vectors
from .cuda_gemv import Shares, latent, output
from .cuda_plain import plain_latent, plain_output
from .cuda_schedule import (
    EXACT_BATCH,
    KINDS,
    SMALL_BATCH,
    WARPS,
    BatchSchedule,
    Schedule,
    Sizes,
    Work,
    batch_schedule,
    columns_of,
    is_quicker_unpacked,
    latent_bytes,
    output_bytes,
    padded,
    slices_of,
    steps_of,
    sums_before,
    vectors_of,
    work_sizes,
)
from .cuda_unpack import ACROSS, STRIP, UNPACKING_BLOCKS, UNPACKING_THREADS, unpacking
from .unpacked import unpacked_linear

log = logging.getLogger(__name__)


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


class Siblings:
    """Layers that share their input, as the numbers that the kernels take: q, k and v, or gate and up, or one alone.

    Parameters
    ----------
    layers : sequence of layers' tensors
        The tensors of a layer's paths, one or two, one after the other, on a GPU, of fitting shapes and dtypes.
    """

    def __init__(self, layers: Sequence[Sequence[Tensor]]):
        self.kept = [[cuda_driver.readable(tensor) for tensor in tensors] for tensors in layers]
        self.layers = [
            [PackedFactors(*map(cuda_driver.array, path)) for path in group_paths(kept)] for kept in self.kept
        ]
        ranks = tuple(tuple(len(path.ell) for path in layer) for layer in self.layers)
        self.sizes = Sizes(len(self.layers[0][0].g), tuple(len(layer[0].h) for layer in self.layers), ranks)
        self.index = self.kept[0][0].device.index
        self.device = cuda_driver.described(self.index)
        self.capability = torch.cuda.get_device_capability(self.index)
        self.early = self.capability >= cuda_driver.EARLY
        self.schedules: dict[int, Schedule | None] = {}

    def schedule(self, rows: int) -> Schedule | None:
        """The schedule for so many rows of x; None if no block has enough shared memory."""
        vectors = vectors_of(rows)
        if vectors not in self.schedules:
            self.schedules[vectors] = cuda_schedule.schedule_for(self.sizes, rows, self.device)
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
                cuda_driver.array(x),
                KINDS[x.dtype],
                rows,
                self.layers,
                cuda_driver.array(y),
                cuda_driver.array(part),
                schedule,  # type: ignore[arg-type]
                early,
                partial(cuda_driver.start, stream, early),
                Norm(cuda_driver.array(norm[0]), cuda_driver.array(norm[1]), *norm[2:]) if norm else None,
                activation,
                None if bias is None else cuda_driver.array(bias),
                None if squares is None else cuda_driver.array(squares),
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
        self.paths = group_paths(self.kept[0])
        self.d_out, self.d_in = self.sizes.d_outs[0], self.sizes.d_in
        self.ranks = self.sizes.ranks[0]
        self.seen = [(tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in self.kept[0]]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the plan reads just these tensors, as for a plan on a CPU."""
        return CpuPackedLayer.fits(self, tensors)

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
                go = partial(cuda_driver.start, torch.cuda.current_stream().cuda_stream, False)
                launch_plain(
                    cuda_driver.array(x),
                    KINDS[x.dtype],
                    rows,
                    self.layers[0],
                    cuda_driver.array(y),
                    cuda_driver.array(part),
                    go,
                )
            return y
        part = torch.empty(self.part_size(rows, schedule), dtype=torch.float32, device=x.device)  # type: ignore[arg-type]
        self.launch(x, y.view(rows, self.d_out), part, schedule, self.early and version != "tensor")
        return y

    def batch_schedule(self, rows: int) -> BatchSchedule:
        """The schedule of the kernels for batches."""
        return batch_schedule(self.sizes, rows, self.device.multiprocessors, self.capability == cuda_schedule.GROUPED)

    def batch(self, x: Tensor, y: Tensor, rows: int, schedule: BatchSchedule | None = None) -> Tensor:
        """The same by the kernels for batches."""
        schedule = schedule or self.batch_schedule(rows)
        counts = work_sizes(self.sizes, rows, schedule)
        places, total = sums_before(-(-count // 4) * 4 for count in counts)
        memory = torch.empty(total, dtype=torch.int32, device=x.device)
        work = Work(*(cuda_driver.Array(memory.data_ptr() + 4 * at, n) for at, n in zip(places, counts, strict=True)))
        with torch.cuda.device(self.index):
            go = partial(cuda_driver.start, torch.cuda.current_stream().cuda_stream, self.early)
            arguments = (
                cuda_driver.array(x),
                KINDS[x.dtype],
                rows,
                self.layers[0],
                cuda_driver.array(y),
                work,
                schedule,
                self.early,
                go,
            )
            launch_batch(*arguments, self.capability == cuda_schedule.GROUPED)
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
            go = partial(cuda_driver.start, torch.cuda.current_stream().cuda_stream, self.early)
            multiprocessors = self.device.multiprocessors
            launch_unpacking(KINDS[dtype], self.layers[0], cuda_driver.array(memory), multiprocessors, self.early, go)
        a, b = memory[: rows * columns], memory[rows * columns :]
        return a.view(rows, columns)[:, : self.d_in], b.view(self.d_out, rows)
