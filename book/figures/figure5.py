"""Draw Figure 5: a packed layer's speed-up over float16 (or bfloat16) at batch 1."""

from collections.abc import Iterable

import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sources import publication, results, rows

CAPTION = (
    "**Figure 5.** Speed-up of one layer at batch 1 over torch's own 16-bit layer. Left: GPU, *measured here* "
    "(filled), the GEMV of NanoQuant's repository on the same kind of GPU (dashed), and the one factor that the "
    "paper gives, on another GPU (hollow star, *published*). Right: one CPU core, *measured here*; the paper has "
    "no CPU figures. Below, the times themselves; dotted lines are the 16-bit layers."
)
SOURCES = ("cuda_linear", "baselines", "published", "cpu_linear")
SHAPES = ((4096, 4096), (11008, 4096), (28672, 8192))
MARKERS = ("o", "s", "D")
PAPER = ("kernel_speedup_vs_FP16_x", "Llama-2-70B MLP 8192x28672", "LittleBit 1-bit GEMV (not released)", 0.1)


def speeds(name: str, shape: tuple[int, int], **where: object) -> list[tuple[float, float]]:
    """List (stored bits, speed-up) of a shape, by bits."""
    found = rows(name, d_out=shape[0], d_in=shape[1], **where)
    return sorted((each["bits"], each["speedup"]) for each in found if "speedup" in each and each.get("batch", 1) == 1)


def alt() -> str:
    """Describe the picture in words."""
    gpu, cpu = speeds("cuda_linear", SHAPES[-1]), speeds("cpu_linear", SHAPES[-1])
    paper = publication(*PAPER)
    device = results("cuda_linear")["device"]
    return (
        f"Two charts of speed-up against bits per weight. On {device} the {SHAPES[-1][0]} by "
        f"{SHAPES[-1][1]} layer goes from {gpu[0][1]:.1f} times at {gpu[0][0]:.2f} bits down to {gpu[-1][1]:.1f} times "
        f"at {gpu[-1][0]:.2f}; the paper says {paper['value'] if paper else '?'} on an A100. One CPU core goes from "
        f"{cpu[0][1]:.0f} times at {cpu[0][0]:.2f} bits to {cpu[-1][1]:.0f} at {cpu[-1][0]:.2f}."
    )


def latencies(axes: Axes, name: str, unit: float, looks: Iterable[tuple[tuple[int, int], str, str]]) -> None:
    """Draw the time of a call of each shape against bits, and that of its 16-bit layer as a dotted line."""
    for shape, marker, colour in looks:
        found = [each for each in rows(name, d_out=shape[0], d_in=shape[1]) if each.get("batch", 1) == 1]
        found = sorted((each for each in found if "speedup" in each), key=lambda each: each["bits"])
        times = [each["time_us"] / unit for each in found]
        axes.plot([each["bits"] for each in found], times, "-", marker=marker, color=colour)
        dense = found[0]["time_us"] * found[0]["speedup"] / unit
        axes.axhline(dense, color=colour, linewidth=1, linestyle=":")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")


def draw(theme: style.Theme) -> Figure:
    """Draw the picture."""
    figure = Figure(figsize=(style.WIDTH, 6.4), layout="constrained")
    (left, right), below = figure.subplots(2, 2)
    colours = (theme.ours, theme.third, theme.fourth)
    for shape, marker, colour in zip(SHAPES, MARKERS, colours, strict=True):
        label = f"{shape[0]} x {shape[1]}"
        for axes, name in ((left, "cuda_linear"), (right, "cpu_linear")):
            bits, speed = zip(*speeds(name, shape), strict=True)
            axes.plot(bits, speed, "-", marker=marker, color=colour, label=label)
        bits, speed = zip(*speeds("baselines", shape, engine="NanoQuant GEMV"), strict=True)
        left.plot(bits, speed, "--", marker=marker, color=colour, markerfacecolor="none", linewidth=1)
    for axes, name, unit in ((below[0], "cuda_linear", 1), (below[1], "cpu_linear", 1000)):
        latencies(axes, name, unit, zip(SHAPES, MARKERS, colours, strict=True))
    below[0].set_ylabel("time of a call (µs)")
    below[1].set_ylabel("time of a call (ms)")
    left.plot([], [], "--", color=theme.text, linewidth=1, label="NanoQuant")
    if paper := publication(*PAPER):
        left.plot(
            paper["bpw"],
            paper["value"],
            "*",
            color=theme.published,
            markerfacecolor="none",
            markersize=13,
            label="paper, A100",
        )
    left.set_title(results("cuda_linear")["device"].removeprefix("NVIDIA "))
    right.set_title("one AVX-512 core")
    for axes in (left, right, *below):
        style.bits_axis(axes)
    left.axhline(1, color=theme.text, linewidth=0.8, linestyle=":")
    style.log_axis(left, (1, 2, 4, 8, 16, 32))
    right.set_ylim(10, 180)
    style.log_axis(right, (10, 20, 50, 100))
    left.set_ylabel("times faster than 16 bits")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
