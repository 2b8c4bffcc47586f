"""Draw Figure 1: a dense layer and the LittleBit layer that replaces it, to scale for a layer of SmolLM2."""

import style
from littlebit.reference.bits import SCALE_BITS, padded
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sources import row

CAPTION = (
    "**Figure 1, as stored here.** A dense layer, and the two paths that take its place: to scale, for the query "
    "projection of SmolLM2's first block (the paper's Figure 1 is a sketch of the same two pathways). The input "
    "goes from right to left, as in the product."
)
SOURCES = ("explore",)


def layer() -> tuple[int, int, list[int], int]:
    """Look up d_out, d_in, the ranks of the two paths, and the bits stored in total."""
    original, found = row("explore", what="original"), row("explore", what="figure 2", bits=0.55)
    d_out, d_in = original["d_out"], original["d_in"]
    return d_out, d_in, found["ranks"], round(found["stored_bits"] * d_out * d_in)


def alt() -> str:
    """Describe the picture in words."""
    d_out, d_in, ranks, stored = layer()
    return (
        f"A {d_out} by {d_in} matrix of 16-bit weights, {d_out * d_in * 2:,} bytes, beside two LittleBit paths of rank "
        f"{ranks[0]} and {ranks[1]}: each is a column of scales h, a tall matrix of signs U, scales ell, a wide matrix "
        f"of signs V and a row of scales g; together {stored // 8:,} bytes."
    )


def box(axes: Axes, theme: style.Theme, corner: tuple[float, float], size: tuple[float, float], signs: bool) -> None:
    """Draw a matrix of signs, or a vector of scales."""
    colour = theme.ours if signs else theme.third
    axes.add_patch(Rectangle(corner, *size, facecolor=colour, alpha=0.55 if signs else 0.95, edgecolor=colour, lw=0.8))


def path(axes: Axes, theme: style.Theme, x: float, y: float, sizes: tuple[int, int, int], name: str) -> None:
    """Draw one path, from left to right h, U, ell, V, g, with names below."""
    d_out, d_in, rank = sizes
    thin, gap = 26, 22
    at = x
    box(axes, theme, (at, y), (thin, d_out), signs=False)
    axes.text(at + thin / 2, y + d_out + 42, "h", ha="center")
    at += thin + gap
    box(axes, theme, (at, y), (rank, d_out), signs=True)
    axes.text(at + rank / 2, y + d_out + 42, "U", ha="center")
    at += rank + gap
    middle = y + d_out / 2 - rank / 2
    box(axes, theme, (at, middle), (thin, rank), signs=False)
    axes.text(at + thin / 2, middle + rank + 42, r"$\ell$", ha="center")
    at += thin + gap
    box(axes, theme, (at, middle), (d_in, rank), signs=True)
    axes.text(at + d_in / 2, middle + rank + 42, r"V$^\top$", ha="center")
    box(axes, theme, (at, middle - gap - thin), (d_in, thin), signs=False)
    axes.text(at + d_in + 14, middle - gap - thin / 2, "g", va="center")
    signs = rank * padded(d_in) + d_out * padded(rank)
    scales = SCALE_BITS * (d_out + d_in + rank)
    text = f"{name}, rank {rank}\nsigns {signs // 8:,} bytes\nscales {scales // 8:,} bytes"
    axes.text(at + d_in + 60, middle + rank / 2, text, va="center", fontsize=8, linespacing=1.4)


def draw(theme: style.Theme) -> Figure:
    """Draw the picture."""
    d_out, d_in, ranks, stored = layer()
    figure = Figure(figsize=(style.WIDTH, 3.9), layout="constrained")
    axes = figure.subplots()
    axes.add_patch(Rectangle((0, 340), d_in, d_out, facecolor=theme.fourth, alpha=0.5, edgecolor=theme.fourth, lw=0.8))
    axes.text(d_in / 2, 340 + d_out / 2, f"W\n{d_out} x {d_in}", ha="center", va="center")
    axes.text(d_in / 2, 310, f"dense, float16\n{2 * d_out * d_in:,} bytes", ha="center", va="top", linespacing=1.4)
    axes.text(d_in + 75, 340 + d_out / 2, r"$\approx$", ha="center", va="center", fontsize=14)
    left = d_in + 150
    for y, rank, name in ((780, ranks[0], "primary"), (0, ranks[1], "residual")):
        path(axes, theme, left, y, (d_out, d_in, rank), name)
    axes.text(left + 60, 712, "+", fontsize=13, va="center", ha="center")
    total = f"both paths together\n{stored // 8:,} bytes, {stored / (d_out * d_in):.2f} bits a weight"
    axes.text(left + 560, 700, total, ha="center", va="center", linespacing=1.4)
    axes.set_xlim(-10, left + 1130)
    axes.set_ylim(-20, 780 + d_out + 90)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure
