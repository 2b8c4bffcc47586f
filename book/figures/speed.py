"""Draw the speed of whole models: tokens a second on one core, and on a GPU."""

import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sources import results, row

CAPTION = (
    "**Whole models, measured here.** Tokens a second after a short prompt, one sequence. Left: SmolLM2-135M on one "
    "CPU core. Right: random weights in Llama-2-7B's shape on one GPU; hollow bars are dense models of 16 bits, or of "
    "4 (llama.cpp)."
)
SOURCES = ("cpu_decode", "cuda_decode")
CPU = (("littlebit", "0.55 bits"), ("llama.cpp", "llama.cpp"), ("transformers", "transformers"))
GPU_BITS = (0.1, 0.55, 1.0)


def on_cpu() -> list[tuple[str, float]]:
    """List (engine, tokens a second) on one core."""
    return [(label, row("cpu_decode", engine=engine, threads=1)["tokens_per_s"]) for engine, label in CPU]


def on_gpu() -> list[tuple[str, float]]:
    """List (bits, tokens a second) on the GPU, the dense engine last."""
    packed = {round(each["bits"], 2): each for each in results("cuda_decode")["rows"] if each["engine"] == "packed"}
    found = [(f"{bits:g} bits", packed[bits]["tokens_per_s"]) for bits in GPU_BITS]
    return [*found, ("float16", row("cuda_decode", engine="float16")["tokens_per_s"])]


def alt() -> str:
    """Describe the picture in words."""
    cpu, gpu = (", ".join(f"{name} {value:.0f}" for name, value in found) for found in (on_cpu(), on_gpu()))
    return f"Two bar charts of tokens a second. One core, SmolLM2-135M: {cpu}. One GPU, Llama-2-7B's shape: {gpu}."


def bars(axes: Axes, found: list[tuple[str, float]], packed: int, theme: style.Theme) -> None:
    """Draw a bar for each value, filled for the packed models, which come first."""
    for at, (_, value) in enumerate(found):
        fill = theme.ours if at < packed else "none"
        axes.barh(at, value, color=fill, edgecolor=theme.ours if at < packed else theme.published, height=0.6)
        axes.text(value, at, f" {value:,.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(found)), [name for name, _ in found])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(value for _, value in found))
    axes.grid(False)
    axes.set_xlabel("tokens a second")


def draw(theme: style.Theme) -> Figure:
    """Draw the picture."""
    figure = Figure(figsize=(style.WIDTH, 2.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    bars(left, on_cpu(), 1, theme)
    bars(right, on_gpu(), len(GPU_BITS), theme)
    left.set_title("SmolLM2-135M, one core")
    right.set_title(f"7B shape, {results('cuda_decode')['device'].removeprefix('NVIDIA ').split()[0]}")
    return figure
