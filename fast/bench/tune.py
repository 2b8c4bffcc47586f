"""Launch schedules of packed layers, measured on this GPU: `littlebit tune`.

How the two kernels of a layer are divided among blocks and warps (`cuda_schedule.Schedule`) does not change what they
compute, but how fast. From sizes alone a schedule is guessed that is good on an H100; here others are tried, for the
groups of layers that the decoder launches together, and the fastest are kept for later runs.
"""

import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from .._progress import tqdm
from ..decoding.fused_llama import GROUPS, FusedEngine, PackedGroup
from ..files.atomic import write_text
from ..kernels.cuda_gemv import ROWS
from ..kernels.cuda_schedule import (
    Blocks,
    Device,
    Schedule,
    Sizes,
    latent_bytes,
    measured,
    name_of,
    output_bytes,
    own_schedules,
    read_schedules,
    slices_of,
    vectors_of,
)

PARTS = (1, 2, 4, 8, 16)  # that d_in is tried to be divided into
FEWEST_BLOCKS = 48  # that a GPU is given, if a layer has work for so many
MOST_LAYERS = 64  # of a kind, through which a measurement goes
REPLAYS = 9

Member = tuple[PackedGroup, Callable[[], None]]  # layers, and what runs them


def tune(engine: FusedEngine, progress: bool = True) -> list[dict[str, Any]]:
    """Find the fastest schedule of each kind of group of packed layers that an engine launches together, and use it.

    The layers of a model take turns, as they do when it decodes. A model with fewer bytes of them than the second-level
    cache holds finds them there, here as there.

    Parameters
    ----------
    engine : FusedEngine
        On a GPU; the attention before an output layer is that of its capacity.
    progress : bool

    Returns
    -------
    One dict for each kind of group: part ("qkv", "output", "gate, up" or "down"), sizes (the name of the schedule),
    before_us and after_us (a group), schedule.
    """
    kinds: dict[tuple[str, str], list[Member]] = {}
    vectors = vectors_of(engine.batch)
    for at, groups in enumerate(engine.groups):
        calls = engine.block_calls(at)
        for part, group in zip(GROUPS, groups, strict=True):
            if isinstance(group, PackedGroup):
                kinds.setdefault((part, name_of(group.siblings.sizes, vectors)), []).append((group, calls[part]))
    bar = tqdm(kinds.items(), desc="tune", disable=not progress)
    return [{"part": part, "sizes": sizes} | tuned_group(engine.batch, members) for (part, sizes), members in bar]


def tuned_group(batch: int, members: Sequence[Member]) -> dict[str, Any]:
    """The fastest schedule of groups of the same sizes, which then use it, and its time."""
    siblings, before = members[0][0].siblings, members[0][0].schedule

    def use(schedule: Schedule) -> None:
        for packed, _ in members:
            packed.use(schedule)

    def seconds(schedule: Schedule, replays: int = 3) -> float:
        use(schedule)
        return replay_seconds([call for _, call in members[:MOST_LAYERS]], replays)

    found = fastest(siblings.sizes, batch, siblings.device, before, seconds)
    longer = {each: seconds(each, REPLAYS) for each in (before, found)}  # a little quicker a few times may not be
    chosen = min(longer, key=longer.__getitem__)
    use(chosen)
    return {"before_us": 1e6 * longer[before], "after_us": 1e6 * longer[chosen], "schedule": chosen}


def fastest(
    sizes: Sizes, rows: int, device: Device, schedule: Schedule, seconds: Callable[[Schedule], float]
) -> Schedule:
    """The schedule that takes the fewest seconds: by turns one kernel's is fixed and the other's tried, twice."""
    seconds = cache(seconds)
    for _ in range(2):
        schedule = min([schedule, *latent_candidates(sizes, rows, device, schedule.output)], key=seconds)
        schedule = min([schedule, *output_candidates(sizes, rows, device, schedule)], key=seconds)
    return schedule


def latent_candidates(sizes: Sizes, rows: int, device: Device, output: Blocks) -> list[Schedule]:
    """Schedules that differ in the first kernel."""
    slices, tiles, vectors = slices_of(sizes.d_in), sizes.columns // ROWS, vectors_of(rows)
    most = 1 if sizes.d_in % 128 else slices

    def fits(blocks: Blocks, parts: int) -> bool:
        return latent_bytes(blocks, vectors, sizes.d_in, parts) <= device.shared_bytes

    return [
        Schedule(parts, blocks, output)
        for parts in PARTS
        if parts <= most
        for blocks in blocks_near(-(-slices // parts), tiles * parts, partial(fits, parts=parts))
    ]


def output_candidates(sizes: Sizes, rows: int, device: Device, schedule: Schedule) -> list[Schedule]:
    """Schedules that differ in the second kernel."""
    slices = max(sum(map(slices_of, ranks)) for ranks in sizes.ranks)
    tiles, vectors = sum(-(-d_out // ROWS) for d_out in sizes.d_outs), vectors_of(rows)

    def fits(blocks: Blocks) -> bool:
        return output_bytes(blocks, vectors, sizes) <= device.shared_bytes

    return [schedule._replace(output=blocks) for blocks in blocks_near(slices, tiles, fits)]


def blocks_near(slices: int, tiles: int, fits: Callable[[Blocks], bool]) -> list[Blocks]:
    """Ways to divide so many tiles, of so many slices each, among blocks of 2 to 16 warps that fit in shared memory."""
    numbers = itertools.product(
        sorted({min(slices, 1 << i) for i in range(5)} | {min(slices, 16)}), range(5), (1, 2, 4, 8)
    )
    found = [Blocks(*each) for each in numbers]
    found = [each for each in found if 2 <= each.sharing << each.log <= 16 and fits(each)]
    fewest = min(tiles, FEWEST_BLOCKS)
    return [each for each in found if -(-tiles * ROWS // each.rows) >= fewest or each.rows == ROWS] or found[:1]


def keep(rows: Sequence[dict[str, Any]], device: str, path: Path | None = None) -> Path:
    """Add schedules to those that are kept for a GPU, and use them from now on.

    Parameters
    ----------
    rows : what `tune` gives
    device : str
        The GPU's name.
    path : Path, optional
        Of the table; by default that in the cache folder, which later runs read.

    Returns
    -------
    The table's path.

    Raises
    ------
    ValueError
        If the table that is there is damaged.
    OSError
        If it cannot be written.
    """
    path = path or own_schedules()
    tables = read_schedules(path) if path.exists() else {}
    known = tables.setdefault(device, {})
    known |= {row["sizes"]: [row["schedule"].parts, *map(list, row["schedule"][1:])] for row in rows}
    write_text(path, as_text(tables))
    measured.cache_clear()
    return path


def as_text(tables: dict[str, dict[str, list[Any]]]) -> str:
    """Tables of schedules as JSON, a schedule in each line."""
    texts = []
    for name, known in sorted(tables.items()):
        lines = ",\n".join(f"  {json.dumps(sizes)}: {json.dumps(schedule)}" for sizes, schedule in known.items())
        texts.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(texts) + "\n}\n"


def replay_seconds(calls: Sequence[Callable[[], Any]], replays: int = REPLAYS) -> float:
    """Seconds of a call, in a graph that runs all calls one after the other; median over replays."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[1:])
