"""Draw Figure 2: a weight, its primary path, its residual path and their sum, at three budgets."""

import base64

import numpy as np
import style
from matplotlib.figure import Figure
from sources import row, rows

CAPTION = (
    "**Figure 2, measured here.** Rows and columns 1 to 64 of the query projection of SmolLM2's first block, the "
    "most compressible of its 210 layers, after Dual-SVID and before any training, each with its relative error. "
    "The paper's Figure 2 shows a layer of a Llama model in the same way and gives no numbers."
)
SOURCES = ("explore",)


def pictured(text: str, corner: int, limit: float) -> np.ndarray:
    """Decode the corner of a matrix from the bytes that book/experiments/explore.py wrote."""
    codes = np.frombuffer(base64.b64decode(text), np.uint8).astype(float)
    return ((codes - 127) / 127 * limit).reshape(corner, corner)


def alt() -> str:
    """Describe the picture in words."""
    parts = [
        f"at {found['bits']:g} bits the primary path has a relative error of {found['primary_error']:.2f} and the sum "
        f"of {found['error']:.2f}"
        for found in rows("explore", what="figure 2")
    ]
    return f"Four matrices in three rows, blue positive and red negative, striped by column: {'; '.join(parts)}."


def draw(theme: style.Theme) -> Figure:
    """Draw the picture."""
    original = row("explore", what="original")
    corner, limit = original["corner"], original["limit"]
    found = rows("explore", what="figure 2")
    figure = Figure(figsize=(style.WIDTH, 4.3), layout="constrained")
    grid = figure.subplots(len(found), 4)
    for line, each in zip(grid, found, strict=True):
        panels = {"original W": original["pictures"]["sum"], "primary": each["pictures"]["primary"]}
        panels |= {"residual": each["pictures"]["residual"], "sum": each["pictures"]["sum"]}
        errors = {"primary": each["primary_error"], "sum": each["error"]}
        for axes, (name, text) in zip(line, panels.items(), strict=True):
            image = axes.imshow(
                pictured(text, corner, limit), cmap="RdBu", vmin=-limit, vmax=limit, interpolation="none"
            )
            axes.set_title(f"{name}\nerror {errors[name]:.2f}" if name in errors else f"{name}\n", fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(False)
        line[0].set_ylabel(f"{each['bits']:g} bits\nranks {each['ranks'][0]}, {each['ranks'][1]}", fontsize=8)
    bar = figure.colorbar(image, ax=grid, shrink=0.6, label="weight")
    bar.outline.set_visible(False)
    return figure
