"""Benchmark attention over a latent key-value cache against a full one, at the shape of a published model.

The latent cache stores the rank-sized latents of keys and values, which DeepSeek calls multi-head latent attention
(MLA). It reads fewer bytes for each cached token, but must expand keys and values from them.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .._progress import tqdm
from ..decoding.latent_cache import LATENT_TYPES
from ..kv_cache import apply_rope, latent_attention, latents, round_latents
from ..linear import packed_linear
from ..memory import MODEL_SHAPES, ModelShape, model_memory
from ..packing import PackedFactors
from .linear import random_path
from .timing import alternate

CONTEXTS = (1024, 8192, 32768)


def bench_cache(
    shape: str = "llama2-7b",
    bits: float = 0.1,
    contexts: Sequence[int] = CONTEXTS,
    cache_types: Sequence[str] = tuple(LATENT_TYPES),
    device: str = "cpu",
    repeats: int = 5,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Time attention of one layer for one new token at batch 1, with a latent and with a full cache.

    Both start from the layer's input and a query after RoPE, and end with the outputs of the heads. With the full
    cache: compute key and value from packed words, store them in memory that is already allocated, and call torch's
    scaled_dot_product_attention, in float32 on a CPU and in float16 elsewhere. With the latent cache: compute and store
    the latents, then attend to all of them. Signs, latents and inputs are random; ranks are the first layer's. The two
    take turns, and a figure is the median, in processor time on a CPU with one thread.

    Parameters
    ----------
    shape : str
        A name in MODEL_SHAPES, without fused projections.
    bits : float
        Upper bound on stored bits per weight, with two paths.
    contexts : sequence of int
        Tokens in the cache.
    cache_types : sequence of str
        "latent" (float16) or "latent-int8".
    device : str
        A torch device.
    repeats : int
        Measured tokens, after one that is not.
    progress : bool
        Show a progress bar.

    Returns
    -------
    list of dict
        One for each context and cache type, with these columns:

        - shape, bits, ranks (of k_proj and v_proj), context, kind (the cache type), device
        - time_us: microseconds of one token in one layer with the latent cache
        - ordinary_us: the same with the full cache, in the dtype ordinary_type
        - speed = ordinary_us / time_us: below 1 the latent cache is slower
        - bytes_per_token: size of the latent cache for each token, in all layers
        - ordinary_bytes_per_token: the same of the full cache in float16
        - reduction = ordinary_bytes_per_token / bytes_per_token

    Raises
    ------
    ValueError
        If the shape is unknown or has a fused projection.
    """
    if shape not in MODEL_SHAPES or MODEL_SHAPES[shape].fused:
        known = ", ".join(name for name, each in MODEL_SHAPES.items() if not each.fused)
        raise ValueError(
            f"shape must be known and have separate key and value projections, got {shape!r}: choose one of {known}"
        )
    sizes = MODEL_SHAPES[shape]
    ranks = model_memory(sizes, bits).ranks
    layer = {name: ranks[f"0.{name}"] for name in ("k_proj", "v_proj")}
    rows = []
    cases = [(context, cache_type) for context in contexts for cache_type in cache_types]
    for context, cache_type in tqdm(cases, desc="bench cache", disable=not progress):
        with torch.inference_mode():
            time_s, full_s = bench_case(sizes, layer, context, LATENT_TYPES[cache_type], torch.device(device), repeats)
        latent_bytes = model_memory(sizes, bits, context=context, kv_cache=cache_type).kv_cache / context
        full_bytes = model_memory(sizes, bits, context=context).kv_cache / context
        row = {"shape": shape, "bits": bits, "ranks": layer, "context": context, "kind": cache_type, "device": device}
        row |= {"time_us": time_s * 1e6, "ordinary_us": full_s * 1e6, "speed": full_s / time_s}
        row |= {"bytes_per_token": latent_bytes, "ordinary_bytes_per_token": full_bytes}
        row |= {"reduction": full_bytes / latent_bytes}
        rows.append(row | {"ordinary_type": str(full_cache_dtype(torch.device(device))).removeprefix("torch.")})
    return rows


def full_cache_dtype(device: torch.device) -> torch.dtype:
    """Choose the dtype in which a device stores and multiplies keys and values."""
    return torch.float32 if device.type == "cpu" else torch.float16


def bench_case(
    shape: ModelShape,
    ranks: dict[str, tuple[int, ...]],
    context: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> list[float]:
    """Measure the median seconds of one token in one layer: with a latent cache, then with a full one."""
    generator = torch.Generator(device).manual_seed(0)
    width = shape.kv_heads * shape.head_size
    key_paths, value_paths = (
        [random_path(width, shape.hidden, rank, generator) for rank in ranks[name]] for name in ("k_proj", "v_proj")
    )

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    x, query = numbers(1, 1, shape.hidden), numbers(1, shape.heads, 1, shape.head_size)
    cosine, sine = numbers(1, context, shape.head_size // 2), numbers(1, context, shape.head_size // 2)
    stored_keys, stored_values = (
        round_latents(numbers(1, context, sum(ranks[name])), dtype) for name in ("k_proj", "v_proj")
    )
    mask = torch.ones(1, 1, context, dtype=torch.bool, device=device)

    def from_latents() -> Tensor:
        for paths, kept in (key_paths, stored_keys), (value_paths, stored_values):
            new = round_latents(latents(x, paths), dtype)
            kept.codes[:, -1:], kept.scale[:, -1:] = new.codes, new.scale
        return latent_attention(query, stored_keys, stored_values, key_paths, value_paths, cosine, sine, mask)

    full = full_cache_dtype(device)
    keys, values = (numbers(1, shape.kv_heads, context, shape.head_size).to(full) for _ in range(2))

    def heads_of(paths: list[PackedFactors]) -> Tensor:
        return packed_linear(x, paths).unflatten(-1, (-1, shape.head_size)).transpose(1, 2)

    def from_keys_and_values() -> Tensor:
        keys[:, :, -1:] = apply_rope(heads_of(key_paths), cosine[:, None, -1:], sine[:, None, -1:]).to(full)
        values[:, :, -1:] = heads_of(value_paths).to(full)
        return functional.scaled_dot_product_attention(query.to(full), keys, values, enable_gqa=True)

    return alternate([from_latents], [from_keys_and_values], repeats=repeats, clock=clock_of(device))


def clock_of(device: torch.device) -> Any:
    """Choose a clock: the processor time of this thread if it does all the work, else `synchronized_time`."""
    if device.type == "cpu":
        return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    return functools.partial(synchronized_time, device)


def synchronized_time(device: torch.device) -> float:
    """Wait until the device has finished its work, then read the clock, in seconds."""
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def crossover(rows: Sequence[dict[str, Any]]) -> float | None:
    """Find the context length from which on the latent cache is faster; None if it is slower at the longest one.

    Takes rows of `bench_cache` with one cache type, and interpolates linearly between their contexts.
    """
    rows = sorted(rows, key=lambda row: row["context"])
    gaps = [row["time_us"] - row["ordinary_us"] for row in rows]
    if not rows or gaps[-1] > 0:
        return None
    last = max((at for at, gap in enumerate(gaps) if gap > 0), default=None)
    if last is None:
        return float(rows[0]["context"])
    (here, there), (slow, quick) = (rows[last]["context"], rows[last + 1]["context"]), (gaps[last], gaps[last + 1])
    return here + (there - here) * slow / (slow - quick)
