"""Show what a quantization or a training will store and take, before any weight is read."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .tables import text_table

if TYPE_CHECKING:
    from ..models.quantize import Config
    from ..training.config import TrainConfig


def print_estimate(source: str, config: "Config", training: "TrainConfig | None", as_json: bool) -> None:
    """Print the stored bits, the memory and the time to expect, and the phases of a training."""
    from .estimate import estimate

    found = estimate(source, config, training.total_tokens if training else 0)
    if training:
        found |= {"training": asdict(training), "recipe": recipe(training)}
    if as_json:
        print(json.dumps(found))
        return
    print(text_table([layer_row(layer_type, row) for layer_type, row in found["kinds"].items()]))
    print(
        f"{found['bits_per_weight']:.4f} bits per weight in {found['layers']} layers, {found['linear_bytes']:,} bytes "
        f"of linear weights, about {found['file_bytes']:,} bytes in all"
    )
    for line in found.get("recipe", []):
        print(line)
    train_time = f", {duration(found['train_s'])} to train" if found["train_s"] else ""
    print(
        f"about {found['memory_bytes'] / 2**30:.2f} GiB of memory; on this CPU about {duration(found['quantise_s'])} "
        f"to quantize{train_time}; nothing was written"
    )


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
