"""Benchmark of attention over a latent key-value cache beside an ordinary one, at the shape of a published model."""

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

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
    kinds: Sequence[str] = tuple(LATENT_TYPES),
    device: str = "cpu",
    repeats: int = 5,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Time what one layer does with its cache for one new token, at batch 1.

    Both sides start from the layer's input and a rotated query, and end with the heads' outputs: the ordinary one
    computes key and value from packed words, writes them into room that is there already, and calls torch's
    scaled_dot_product_attention on float32 keys and values (the dtype in which a CPU computes) or float16 ones
    (elsewhere); the latent one computes latents, stores them and reads them all. Random signs and numbers, ranks those
    of the first layer. Both take turns; a figure is the median, in processor time on a CPU with one thread.

    Parameters
    ----------
    shape : str
        A name in MODEL_SHAPES, not one with a fused projection.
    bits : float
        Ceiling in stored bits per weight, with two paths.
    contexts : sequence of int
        Tokens in the cache.
    kinds : sequence of str
        "latent" or "latent-int8".
    device : str
    repeats : int
    progress : bool

    Returns
    -------
    One dict per context and kind: shape, bits, ranks (of k_proj and v_proj), context, kind, device, time_us and
    ordinary_us (one layer, one token), speed (ordinary_us / time_us), bytes_per_token and ordinary_bytes_per_token
    (whole model, the latter in float16), reduction, ordinary_type (that was timed).

    Raises
    ------
    ValueError
        If the shape is unknown or has a fused projection.
    """
    if shape not in MODEL_SHAPES or MODEL_SHAPES[shape].fused:
        known = ", ".join(name for name, each in MODEL_SHAPES.items() if not each.fused)
        raise ValueError(f"the cache of {shape!r} cannot be timed, only those of {known}")
    sizes = MODEL_SHAPES[shape]
    ranks = model_memory(sizes, bits).ranks
    layer = {name: ranks[f"0.{name}"] for name in ("k_proj", "v_proj")}
    rows = []
    cases = [(context, kind) for context in contexts for kind in kinds]
    for context, kind in tqdm(cases, desc="bench cache", disable=not progress):
        with torch.inference_mode():
            time_s, ordinary_s = bench_case(sizes, layer, context, LATENT_TYPES[kind], torch.device(device), repeats)
        kept = model_memory(sizes, bits, context=context, kv_cache=kind).kv_cache / context
        ordinary = model_memory(sizes, bits, context=context).kv_cache / context
        row = {"shape": shape, "bits": bits, "ranks": layer, "context": context, "kind": kind, "device": device}
        row |= {"time_us": time_s * 1e6, "ordinary_us": ordinary_s * 1e6, "speed": ordinary_s / time_s}
        row |= {"bytes_per_token": kept, "ordinary_bytes_per_token": ordinary, "reduction": ordinary / kept}
        rows.append(row | {"ordinary_type": str(ordinary_type(torch.device(device))).removeprefix("torch.")})
    return rows


def ordinary_type(device: torch.device) -> torch.dtype:
    """In what keys and values are kept and multiplied on a device."""
    return torch.float32 if device.type == "cpu" else torch.float16


def bench_case(
    shape: ModelShape,
    ranks: dict[str, tuple[int, ...]],
    context: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> list[float]:
    """Median seconds of one token in one layer, from latents and from keys and values."""
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

    kind = ordinary_type(device)
    keys, values = (numbers(1, shape.kv_heads, context, shape.head_size).to(kind) for _ in range(2))

    def heads_of(paths: list[PackedFactors]) -> Tensor:
        return packed_linear(x, paths).unflatten(-1, (-1, shape.head_size)).transpose(1, 2)

    def from_keys_and_values() -> Tensor:
        keys[:, :, -1:] = apply_rope(heads_of(key_paths), cosine[:, None, -1:], sine[:, None, -1:]).to(kind)
        values[:, :, -1:] = heads_of(value_paths).to(kind)
        return functional.scaled_dot_product_attention(query.to(kind), keys, values, enable_gqa=True)

    return alternate([from_latents], [from_keys_and_values], repeats=repeats, clock=clock_of(device))


def clock_of(device: torch.device) -> Any:
    """Seconds: of this thread's processor where it does all the work, else of the clock, all work waited for."""
    if device.type == "cpu":
        return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    return functools.partial(synchronised, device)


def synchronised(device: torch.device) -> float:
    """The time, when the device has done what it was asked for."""
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def crossover(rows: Sequence[dict[str, Any]]) -> float | None:
    """Tokens from which on the latent cache is the quicker one, between the measured contexts; None if it never is.

    Of one kind's rows; linear between neighbouring contexts.
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
