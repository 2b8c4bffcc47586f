"""Show what a quantization or a training will store and take, before any weight is read."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .tables import text_table
from .training_cost import Workload

if TYPE_CHECKING:
    from ..models.quantize import Config
    from ..training.config import TrainConfig


def print_dry_run(source: str, config: "Config", training: "TrainConfig | None", as_json: bool) -> None:
    """Print the stored bits, the memory and the time to expect on this CPU, and the phases of a training.

    Parameters
    ----------
    source : str
    config : Config
    training : TrainConfig, optional
    as_json : bool
    """
    from .estimate import estimate

    work = Workload()
    if training:
        at_once = training.micro_batch or training.batch_size
        work = Workload(training.total_tokens, sequence=training.sequence_length, sequences=at_once)
    found = estimate(source, config, work)
    if training:
        found |= {"training": asdict(training), "recipe": recipe(training)}
    print_costs(found, work, as_json)


def print_costs(found: dict[str, Any], work: Workload, as_json: bool, price: float | None = None) -> None:
    """Print estimated costs as a table and sentences, or as JSON.

    Parameters
    ----------
    found : dict
        From `estimate.estimate`, with the recipe of a training if there is one.
    work : Workload
    as_json : bool
    price : float, optional
        Price of a GPU for an hour.
    """
    if work.gpus:
        found["gpu_hours"] = work.gpus * found["train_s"] / 3600
        found["cost"] = None if price is None else price * found["gpu_hours"]
    if as_json:
        print(json.dumps(found))
        return
    print(text_table([layer_row(layer_type, row) for layer_type, row in found["kinds"].items()]))
    print(
        f"{found['bits_per_weight']:.4f} bits per weight in {found['layers']} layers, {found['linear_bytes']:,} bytes "
        f"of linear weights, about {found['file_bytes']:,} bytes in all"
    )
    for line in [*found.get("recipe", []), *gpu_lines(found, work)]:
        print(line)
    train_time = f", {duration(found['train_s'])} to train" if found["train_s"] and not work.gpus else ""
    print(
        f"about {found['memory_bytes'] / 2**30:.2f} GiB of memory; on this CPU about {duration(found['quantise_s'])} "
        f"to quantize{train_time}; nothing was written"
    )


def gpu_lines(found: dict[str, Any], work: Workload) -> list[str]:
    """Describe a training on GPUs: the memory of each, the time, and the cost where a price is known."""
    if not (work.gpus and work.tokens):
        return []
    total = sum(found["gpu_bytes"].values())
    parts = ", ".join(f"{part} {count / 2**30:.1f}" for part, count in found["gpu_bytes"].items())
    cost = "" if found["cost"] is None else f", cost {found['cost']:,.2f}"
    return [
        f"training on {work.gpus} GPUs, {work.sequences} sequences of {work.sequence} tokens on each at once: "
        f"{total / 2**30:.1f} GiB on each ({parts})",
        f"{work.tokens:,} tokens take about {duration(found['train_s'])} at {work.tflops:g} TFLOP/s a GPU (assumed: "
        f"--tflops): {found['gpu_hours']:.1f} GPU hours{cost}",
    ]


def layer_row(layer_type: str, row: dict[str, Any]) -> dict[str, Any]:
    """Make the table's row for one layer type."""
    return {
        "layer type": layer_type,
        "layers": row["layers"],
        "d_out x d_in": f"{row['d_out']} x {row['d_in']}",
        "rank": "+".join(map(str, row["ranks"])),
        "bits": f"{row['bits']:.3f}",
    }


def recipe(config: "TrainConfig") -> list[str]:
    """Describe a training: one line for each phase, and one for the settings that differ from the defaults."""
    from ..training.config import TrainConfig
    from ..training.phases import phases

    lines = []
    for phase in phases(config):
        trained = "the whole model"
        if phase.blocks:
            trained = "each block against the teacher's block"
        elif phase.frozen:
            trained = "scales only, signs frozen"
        lines.append(
            f"steps {phase.first} to {phase.last}: {trained}, {config.step_tokens // phase.sequence} sequences of "
            f"{phase.sequence} tokens per step"
        )
    changed = {key: value for key, value in asdict(config).items() if value != getattr(TrainConfig, key)}
    lines.append("settings: " + (", ".join(f"{key} {value}" for key, value in changed.items()) or "the defaults"))
    return lines


def duration(seconds: float) -> str:
    """Write a time in days, hours, minutes or seconds."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"
