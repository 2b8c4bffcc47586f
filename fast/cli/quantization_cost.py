"""Estimate what a quantization and a training take and store, from shapes and ranks alone; torch is not needed."""

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from ...reference.admm import ADMM_STEPS
from ...reference.alignment import ITQ_STEPS
from ..bench.decode import cores
from ..bits import Ranks, Shape, layer_bits, model_bits
from ..models.packed_shapes import layer_type
from .training_cost import (
    FLOAT_BYTES,
    HALF_BYTES,
    PROCESS_BYTES,
    TrainedSizes,
    Workload,
    device_bytes,
    host_bytes,
    seconds,
)

INITS = ("dual-svid", "itq", "admm")  # initializers whose time is known
WORK_ARRAYS = 5  # a weight, its residual, its approximation, and what decompositions hold
PROBE_SECONDS = 0.1  # for timing matrix products and additions
# Rows and columns of the matrices that are multiplied: so few that NumPy uses one thread. With more, two programs that
# measure at once wait for each other's threads, and find a speed that is 25 times too low.
PROBE_SIZE = 64
PROBE_ENTRIES = 1 << 20  # of the arrays that are added
# Additions in the time of the elementwise work on each entry of the factors, in Dual-SVID or a step of ADMM.
PASSES = 40
QR_COST = 4  # time of a multiplication in QR or Cholesky / its time in a matrix product
SVD_COST = 50  # time of a full SVD / the time of m n min(m, n) multiplications in a matrix product


def costs(
    shapes: dict[str, Shape],
    ranks: dict[str, Ranks],
    sizes: TrainedSizes,
    work: Workload,
    init: str,
    scale_bits: int,
    calibrated: bool = False,
) -> dict[str, Any]:
    """Estimate bits, memory and time of quantizing a model on this machine's CPU, and of training it.

    Parameters
    ----------
    shapes, ranks : dict
        Of the layers to quantize, by name.
    sizes : TrainedSizes
        Of the whole model.
    work : Workload
        How the model is trained.
    init : str
        Initializer.
    scale_bits : int
        Stored bits of a scale.
    calibrated : bool
        Whether calibration text passes through the model first.

    Returns
    -------
    dict, see `estimate.estimate`.
    """
    stored = model_bits(shapes, ranks, scale_bits)
    rate = multiplications_per_second()
    memory = quantization_bytes(sizes, shapes, ranks, stored // 8, calibrated)
    return {
        "layers": len(shapes),
        "weights": sizes.weights,
        "bits_per_weight": stored / sizes.weights,
        "linear_bytes": stored // 8,
        "file_bytes": stored // 8 + HALF_BYTES * sizes.tables,
        "memory_bytes": max(memory, host_bytes(sizes, work)) if work.tokens else memory,
        "gpu_bytes": device_bytes(sizes, work) if work.tokens and work.gpus else {},
        "quantise_s": quantize_seconds(shapes, ranks, init, rate, pass_seconds()),
        "train_s": seconds(sizes, work, rate) if work.tokens else 0.0,
        "kinds": count_layer_types(shapes, ranks, scale_bits),
    }


def trained_sizes(
    shapes: dict[str, Shape], ranks: dict[str, Ranks], tables: int, blocks: int, hidden: int, vocabulary: int
) -> TrainedSizes:
    """Count the sizes of a model that memory and time depend on.

    Parameters
    ----------
    shapes, ranks : dict
        Of the layers to quantize, by name.
    tables : int
        All other parameters.
    blocks, hidden, vocabulary : int
    """
    return TrainedSizes(
        weights=sum(math.prod(shape) for shape in shapes.values()),
        tables=tables,
        latents=sum(sum(ranks[name]) * sum(shapes[name]) for name in shapes),
        scales=sum(sum(ranks[name]) + len(ranks[name]) * sum(shapes[name]) for name in shapes),
        blocks=blocks,
        hidden=hidden,
        vocabulary=vocabulary,
        widths=sum(sum(ranks[name]) + sum(shapes[name]) for name in shapes),
    )


def quantization_bytes(
    sizes: TrainedSizes, shapes: dict[str, Shape], ranks: dict[str, Ranks], packed: int, calibrated: bool
) -> int:
    """Estimate the host memory of quantizing a model whose dense weights stay in their files.

    That is the process, all packed layers, and the most of: the arrays of the largest layer in float32 (WORK_ARRAYS of
    the weight's shape, as many of the factors'); the rest of the model in float16; with calibration, one block in
    float32.
    """
    layer = max(math.prod(shapes[name]) + sum(ranks[name]) * sum(shapes[name]) for name in shapes)
    most = [FLOAT_BYTES * WORK_ARRAYS * layer, HALF_BYTES * sizes.tables]
    if calibrated:
        most.append(FLOAT_BYTES * max(sizes.weights // sizes.blocks, sizes.vocabulary * sizes.hidden))
    return PROCESS_BYTES + packed + max(most)


def count_layer_types(shapes: dict[str, Shape], ranks: dict[str, Ranks], scale_bits: int) -> dict[str, dict[str, Any]]:
    """Count the layers of each type; take shape and ranks from its first layer, bits per weight from its last."""
    rows: dict[str, dict[str, Any]] = {}
    for name, (d_out, d_in) in shapes.items():
        row = rows.setdefault(layer_type(name), {"layers": 0, "d_out": d_out, "d_in": d_in, "ranks": ranks[name]})
        row["layers"] += 1
        row["bits"] = layer_bits(d_out, d_in, ranks[name], scale_bits) / (d_out * d_in)
    return rows


def quantize_seconds(
    shapes: dict[str, Shape], ranks: dict[str, Ranks], init: str, rate: float, entry_seconds: float
) -> float:
    """Estimate the time to factorize all layers.

    Large layers spend their time in matrix products. The rest is elementwise work on the entries of both factors.

    Parameters
    ----------
    shapes, ranks : dict
    init : str
    rate : float
        Multiply-adds per second in a matrix product.
    entry_seconds : float
        Time of adding one number to another in large arrays.
    """
    passes = PASSES * (ADMM_STEPS if init == "admm" else 1)
    counts = Counter((shapes[name], rank) for name in shapes for rank in ranks[name])
    return sum(
        count * (multiplications(shape, rank, init) / rate + passes * entry_seconds * sum(shape) * rank)
        for (shape, rank), count in counts.items()
    )


def multiplications(shape: Shape, rank: int, init: str) -> float:
    """Count the multiplications in the matrix products and decompositions that factorize one path of a layer.

    A multiplication in a decomposition takes longer than in a product, so it counts QR_COST times in QR, Cholesky and
    the small SVD. If the rank is so large that the whole weight is decomposed, its SVD counts SVD_COST times m n min(m,
    n). The few columns of a randomized SVD's sketch beyond the rank are left out.
    """
    d_out, d_in = shape
    if 3 * rank < min(shape):
        count = 10 * d_out * d_in * rank + 10 * QR_COST * (d_out + d_in) * rank**2
    else:
        count = SVD_COST * d_out * d_in * min(shape)
    if init == "itq":
        count += ITQ_STEPS * ((d_out + d_in) * rank**2 + SVD_COST * rank**3)
    if init == "admm":
        count += ADMM_STEPS * (2 * d_out * d_in * rank + QR_COST * (d_out + d_in) * rank**2)
    return count


def multiplications_per_second() -> float:
    """Measure the speed of a float32 matrix product on one core, times the cores, in multiply-adds per second."""
    a = np.ones((PROBE_SIZE, PROBE_SIZE), np.float32)
    return cores() * PROBE_SIZE**3 / shortest_seconds(lambda: np.matmul(a, a))


def pass_seconds() -> float:
    """Measure the time of adding one float32 number to another, in arrays larger than a cache."""
    a, out = np.ones(PROBE_ENTRIES, np.float32), np.empty(PROBE_ENTRIES, np.float32)
    return shortest_seconds(lambda: np.add(a, a, out)) / PROBE_ENTRIES


def shortest_seconds(run: Callable[[], object]) -> float:
    """Time a function for PROBE_SECONDS, and return its shortest time: other programs only add to it."""
    end, times = time.perf_counter() + PROBE_SECONDS, []
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
