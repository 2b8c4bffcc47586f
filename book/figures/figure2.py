"""Draw Figure 2: two weights, their primary and residual paths, and the sums."""

import base64

import numpy as np
import style
from matplotlib.figure import Figure
from sources import row, rows

CAPTION = (
    "**Figure 2, measured here.** Rows and columns 1 to 64 of two weights of SmolLM2 after Dual-SVID with two paths "
    "and before any training, each with the relative error of the whole matrix. Above, the query projection of the "
    "first block, the most compressible of the 210 layers; below, a typical one, the up projection of block 4, whose "
    "reconstruction hardly resembles it. The paper's Figure 2 shows a layer of a Llama model and gives no numbers."
)
SOURCES = ("explore",)


def pictured(text: str, corner: int, limit: float) -> np.ndarray:
    """Decode the corner of a matrix from the bytes that book/experiments/explore.py wrote."""
    codes = np.frombuffer(base64.b64decode(text), np.uint8).astype(float)
    return ((codes - 127) / 127 * limit).reshape(corner, corner)


def layers() -> list[tuple[str, dict, dict[float, dict]]]:
    """List (title, original, reconstruction by bits) of both layers."""
    kinds = (("query\nblock 0", "original", "figure 2"), ("MLP up\nblock 4", "typical original", "typical"))
    return [
        (title, row("explore", what=first), {each["bits"]: each for each in rows("explore", what=second)})
        for title, first, second in kinds
    ]


def alt() -> str:
    """Describe the picture in words."""
    parts = [
        f"{title.replace(chr(10), ' of ')}: at 0.55 bits the primary path has a relative error of "
        f"{found[0.55]['primary_error']:.2f} and the sum of {found[0.55]['error']:.2f}, "
        f"at 1 bit {found[1.0]['error']:.2f}"
        for title, _, found in layers()
    ]
    return f"Five matrices in two rows, blue positive and red negative. {'; '.join(parts)}."


def draw(theme: style.Theme) -> Figure:
    """Draw the picture."""
    figure = Figure(figsize=(style.WIDTH, 3.0), layout="constrained")
    grid = figure.subplots(2, 5)
    for line, (title, original, found) in zip(grid, layers(), strict=True):
        half, one = found[0.55], found[1.0]
        panels = (
            ("W", original["pictures"]["sum"], None),
            ("primary, 0.55", half["pictures"]["primary"], half["primary_error"]),
            ("residual, 0.55", half["pictures"]["residual"], None),
            ("sum, 0.55", half["pictures"]["sum"], half["error"]),
            ("sum, 1 bit", one["pictures"]["sum"], one["error"]),
        )
        for axes, (name, text, error) in zip(line, panels, strict=True):
            matrix = pictured(text, original["corner"], 1.0)
            axes.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1, interpolation="none")
            axes.set_title(f"{name}\nerror {error:.2f}" if error else f"{name}\n", fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(False)
        line[0].set_ylabel(title, fontsize=8)
    return figure
