"""Draw Figure 1: where linear layers are in a transformer layer, and the two pathways that replace one, to scale."""

import style
from littlebit.reference.bits import SCALE_BITS, padded
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sources import row

CAPTION = (
    "**Figure 1, as stored here.** Left, a transformer layer; its seven linear layers (filled) are replaced. Right, "
    "one of them, the query projection of SmolLM2's first block: x goes through both pathways, whose outputs are "
    "added. Every area is proportional to the bits stored, of the dense weight W too: signs, and scales (dark)."
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
        f"A transformer layer as a column of boxes, seven of them linear layers; a {d_out} by {d_in} matrix of 16-bit "
        f"weights as a large square; and two rows of small boxes, g, V, ell, U and h of rank {ranks[0]} and {ranks[1]}"
        f", through which x flows to a sum and to y. Together they hold {stored // 8:,} bytes, the square "
        f"{d_out * d_in * 2:,}."
    )


AREA = 100  # bits for each unit of area
HEIGHT = 26  # of the boxes of a path
STACK = (  # a transformer layer from its input upwards: names side by side, and whether they are linear layers
    (("RMSNorm",), False),
    (("q", "k", "v"), True),
    (("attention",), False),
    (("o",), True),
    (("RMSNorm",), False),
    (("gate", "up"), True),
    (("down",), True),
)


def arrow(axes: Axes, theme: style.Theme, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow along which a vector goes."""
    look = {"arrowstyle": "-|>", "color": theme.text, "lw": 0.8, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7}
    axes.annotate("", end, start, arrowprops=look)


def box(axes: Axes, theme: style.Theme, corner: tuple[float, float], size: tuple[float, float], signs: bool) -> None:
    """Draw a matrix of signs, or a vector of scales."""
    colour = theme.ours if signs else theme.third
    axes.add_patch(Rectangle(corner, *size, facecolor=colour, alpha=0.55 if signs else 1, edgecolor=colour, lw=0.5))


def stack(axes: Axes, theme: style.Theme, left: float, width: float) -> None:
    """Draw a transformer layer as a column of boxes, its input below."""
    for level, (names, linear) in enumerate(STACK):
        y, each = 8 + 32 * level, width / len(names)
        for at, name in enumerate(names):
            colour = theme.ours if linear else theme.faint
            corner = (left + at * each + 1, y)
            axes.add_patch(Rectangle(corner, each - 2, 20, facecolor=colour, alpha=0.4, edgecolor=colour, lw=0.8))
            axes.text(corner[0] + each / 2 - 1, y + 9.5, name, ha="center", va="center", fontsize=6.5)
        arrow(axes, theme, (left + width / 2, y - 12), (left + width / 2, y))
    axes.text(left + width / 2, 242, "a transformer layer", ha="center", fontsize=7.5)


def path(axes: Axes, theme: style.Theme, left: float, y: float, sizes: tuple[int, int, int]) -> float:
    """Draw one path along x from `left` on, in the order in which x meets its parts, and return where it ends."""
    d_out, d_in, rank = sizes
    parts = (
        ("g", SCALE_BITS * d_in, False),
        (r"V$^\top$", rank * padded(d_in), True),
        (r"$\ell$", SCALE_BITS * rank, False),
        ("U", d_out * padded(rank), True),
        ("h", SCALE_BITS * d_out, False),
    )
    at = left
    for number, (name, bits, signs) in enumerate(parts):
        width = bits / AREA / HEIGHT
        box(axes, theme, (at, y - HEIGHT / 2), (width, HEIGHT), signs)
        axes.text(at + width / 2, y + HEIGHT / 2 + 8, name, ha="center", va="center", fontsize=8)
        if number < len(parts) - 1:
            arrow(axes, theme, (at + width, y), (at + width + 15, y))
        at += width + 15
    return at - 15


def draw(theme: style.Theme) -> Figure:
    """Draw the picture."""
    d_out, d_in, ranks, stored = layer()
    figure = Figure(figsize=(style.WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    stack(axes, theme, 0, 84)
    side = (SCALE_BITS * d_out * d_in / AREA) ** 0.5
    axes.add_patch(Rectangle((112, 0), side, side, facecolor=theme.fourth, alpha=0.4, edgecolor=theme.fourth, lw=0.8))
    text = f"W, dense\n{d_out} x {d_in}, float16\n{2 * d_out * d_in:,} bytes"
    axes.text(112 + side / 2, side / 2, text, ha="center", va="center", linespacing=1.5, fontsize=8)
    left, middle = 112 + side + 62, side / 2
    axes.text(left - 48, middle, "x", ha="center", va="center")
    ends = []
    for y, rank, name in ((middle + 50, ranks[0], "primary"), (middle - 50, ranks[1], "residual")):
        arrow(axes, theme, (left - 42, middle), (left, y))
        ends.append((path(axes, theme, left, y, (d_out, d_in, rank)), y))
        axes.text(left + 8, y - HEIGHT / 2 - 9, f"{name}, rank {rank}", va="center", fontsize=7)
    plus = max(end for end, _ in ends) + 34
    for end in ends:
        arrow(axes, theme, end, (plus - 4, middle + (4 if end[1] > middle else -4)))
    axes.text(plus, middle, "+", ha="center", va="center", fontsize=11)
    arrow(axes, theme, (plus + 6, middle), (plus + 24, middle))
    axes.text(plus + 31, middle, "y", ha="center", va="center")
    total = f"{stored // 8:,} bytes, {stored / (d_out * d_in):.2f} bits a weight"
    axes.text((left + plus) / 2, 8, total, ha="center", va="center", fontsize=7.5)
    axes.set_xlim(-4, plus + 40)
    axes.set_ylim(-8, 254)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure
