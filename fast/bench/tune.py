"""Find the fastest launch configurations of a model's packed layers on this GPU: `littlebit tune`.

A configuration (`cuda_schedule.LaunchConfig`) says how the two GEMV kernels of a layer divide their work among blocks
and warps. The estimate from a layer's shape is good on an H100. Here others are timed, for the layers that the decoder
launches together, and the fastest are saved for later runs.
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
from ..kernels.cuda_gemv import FRAGMENT_ROWS
from ..kernels.cuda_schedule import (
    Device,
    LaunchConfig,
    LayerShape,
    Tiling,
    config_name,
    k_tiles_of,
    latent_shared_bytes,
    measured_configs,
    output_shared_bytes,
    own_schedules,
    read_configs,
    vectors_of,
)

SPLIT_K = (1, 2, 4, 8, 16)  # split factors to try
MIN_BLOCKS = 48  # fewest blocks of a kernel to try, if a layer has that many tiles
MAX_LAYERS = 64  # most layers of one shape in a measurement
REPLAYS = 9

Member = tuple[PackedGroup, Callable[[], None]]  # layers that are launched together, and a call that launches them


def tune(engine: FusedEngine, progress: bool = True) -> list[dict[str, Any]]:
    """Find and use the fastest configuration for each group of packed layers that an engine launches together.

    The layers of a model run one after the other, as in decoding. If they fit the L2 cache they stay there, as in
    decoding too.

    Parameters
    ----------
    engine : FusedEngine
        On a GPU. Attention before an output layer is timed at the engine's capacity.
    progress : bool

    Returns
    -------
    list of dict, one for each group of one shape: part ("qkv", "output", "gate, up" or "down"), sizes (the key in the
    table), before_us and after_us (microseconds of a group), and schedule (the fastest LaunchConfig)
    """
    members: dict[tuple[str, str], list[Member]] = {}
    vectors = vectors_of(engine.batch)
    for at, groups in enumerate(engine.groups):
        calls = engine.block_calls(at)
        for part, group in zip(GROUPS, groups, strict=True):
            if isinstance(group, PackedGroup):
                name = config_name(group.siblings.shape, vectors)
                members.setdefault((part, name), []).append((group, calls[part]))
    bar = tqdm(members.items(), desc="tune", disable=not progress)
    return [{"part": part, "sizes": name} | tuned_group(engine.batch, group) for (part, name), group in bar]


def tuned_group(batch: int, members: Sequence[Member]) -> dict[str, Any]:
    """Find the fastest configuration for groups of one shape, make them use it, and return it with its time."""
    siblings, before = members[0][0].siblings, members[0][0].schedule

    def use(config: LaunchConfig) -> None:
        for packed, _ in members:
            packed.use(config)

    def seconds(config: LaunchConfig, replays: int = 3) -> float:
        use(config)
        return replay_seconds([call for _, call in members[:MAX_LAYERS]], replays)

    found = fastest(siblings.shape, batch, siblings.device, before, seconds)
    longer = {each: seconds(each, REPLAYS) for each in (before, found)}  # a few replays may mislead
    chosen = min(longer, key=longer.__getitem__)
    use(chosen)
    return {"before_us": 1e6 * longer[before], "after_us": 1e6 * longer[chosen], "schedule": chosen}


def fastest(
    shape: LayerShape, rows: int, device: Device, config: LaunchConfig, seconds: Callable[[LaunchConfig], float]
) -> LaunchConfig:
    """Find the fastest configuration: in turn, fix one kernel's tiling and try all of the other's, twice."""
    seconds = cache(seconds)
    for _ in range(2):
        config = min([config, *latent_candidates(shape, rows, device, config.output)], key=seconds)
        config = min([config, *output_candidates(shape, rows, device, config)], key=seconds)
    return config


def latent_candidates(shape: LayerShape, rows: int, device: Device, output: Tiling) -> list[LaunchConfig]:
    """List configurations that differ in the first kernel."""
    k_tiles, row_tiles, vectors = k_tiles_of(shape.d_in), shape.columns // FRAGMENT_ROWS, vectors_of(rows)
    most = 1 if shape.d_in % 128 else k_tiles

    def fits(tiling: Tiling, split_k: int) -> bool:
        return latent_shared_bytes(tiling, vectors, shape.d_in, split_k) <= device.shared_bytes

    return [
        LaunchConfig(split_k, tiling, output)
        for split_k in SPLIT_K
        if split_k <= most
        for tiling in candidate_tilings(-(-k_tiles // split_k), row_tiles * split_k, partial(fits, split_k=split_k))
    ]


def output_candidates(shape: LayerShape, rows: int, device: Device, config: LaunchConfig) -> list[LaunchConfig]:
    """List configurations that differ in the second kernel."""
    k_tiles = max(sum(map(k_tiles_of, ranks)) for ranks in shape.ranks)
    row_tiles, vectors = sum(-(-d_out // FRAGMENT_ROWS) for d_out in shape.d_outs), vectors_of(rows)

    def fits(tiling: Tiling) -> bool:
        return output_shared_bytes(tiling, vectors, shape) <= device.shared_bytes

    return [config._replace(output=tiling) for tiling in candidate_tilings(k_tiles, row_tiles, fits)]


def candidate_tilings(k_tiles: int, row_tiles: int, fits: Callable[[Tiling], bool]) -> list[Tiling]:
    """List tilings with 2 to 16 warps a block that fit shared memory and give at least MIN_BLOCKS blocks.

    `row_tiles` counts the tiles of 16 rows of the whole kernel, `k_tiles` the K tiles of each.
    """
    k_warps = sorted({min(k_tiles, 1 << i) for i in range(5)} | {min(k_tiles, 16)})
    found = [Tiling(*each) for each in itertools.product(k_warps, range(5), (1, 2, 4, 8))]
    found = [each for each in found if 2 <= each.k_warps << each.log_row_warps <= 16 and fits(each)]
    fewest = min(row_tiles, MIN_BLOCKS)

    def enough(tiling: Tiling) -> bool:
        return -(-row_tiles * FRAGMENT_ROWS // tiling.rows) >= fewest or tiling.rows == FRAGMENT_ROWS

    return [each for each in found if enough(each)] or found[:1]


def keep(rows: Sequence[dict[str, Any]], device: str, path: Path | None = None) -> Path:
    """Save configurations in the table of tuned ones for a GPU, and use them from now on.

    Parameters
    ----------
    rows : list of dict
        From `tune`.
    device : str
        The GPU's name.
    path : Path, optional
        The table to change; by default the one in the cache folder, which later runs read.

    Returns
    -------
    Path
        The table.

    Raises
    ------
    ValueError
        If the existing file does not hold valid configurations.
    OSError
        If it cannot be written.
    """
    path = path or own_schedules()
    tables = read_configs(path) if path.exists() else {}
    known = tables.setdefault(device, {})
    known |= {row["sizes"]: [row["schedule"].split_k, *map(list, row["schedule"][1:])] for row in rows}
    write_text(path, as_text(tables))
    measured_configs.cache_clear()
    return path


def as_text(tables: dict[str, dict[str, list[Any]]]) -> str:
    """Format tables as JSON with one configuration on each line."""
    texts = []
    for device, known in sorted(tables.items()):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(config)}" for name, config in known.items())
        texts.append(f" {json.dumps(device)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(texts) + "\n}\n"


def replay_seconds(calls: Sequence[Callable[[], Any]], replays: int = REPLAYS) -> float:
    """Measure the mean seconds of calls in a CUDA graph that runs them one after the other; median over replays."""
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
