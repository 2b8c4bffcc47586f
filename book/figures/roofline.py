"""Draw how far the kernels are from the machine's limits: operations on the CPU, bytes on the GPU."""

import style
from matplotlib.figure import Figure
from sources import results, rows

CAPTION = (
    "**How near the limits, measured here.** Left: sign additions a second of one core against their number in a "
    "layer; the line is what the innermost lookup reaches alone, from registers. Right: time on the GPU against the "
    "bytes of a packed layer; the line is those bytes at the speed of a copy. A float16 layer of equal shape is "
    "hollow, with its own bytes."
)
SOURCES = ("cpu_linear", "cuda_linear")


def gpu_rows() -> list[dict]:
    """Select the GPU's rows at batch 1."""
    return [each for each in rows("cuda_linear") if each.get("batch", 1) == 1]


def copy_speed(found: dict) -> float:
    """Compute the bytes a second of the device-to-device copy that was measured beside a row."""
    return found["bytes"] / (found["time_us"] * 1e-6) / found["fraction_of_copy"]


def alt() -> str:
    """Describe the picture in words."""
    best = max(rows("cpu_linear"), key=lambda each: each["sign_adds_per_s"])
    near = max(gpu_rows(), key=lambda each: each["fraction_of_copy"])
    return (
        f"Left, a CPU core reaches up to {best['sign_adds_per_s'] / 1e9:.0f} billion sign additions a second, "
        f"{best['fraction_of_peak']:.0%} of the line above. Right, GPU times lie above the line of a copy, at best at "
        f"{near['fraction_of_copy']:.0%} of its speed, and below the float16 layers."
    )


def draw(theme: style.Theme) -> Figure:
    """Draw the picture."""
    figure = Figure(figsize=(style.WIDTH, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    cpu, gpu = rows("cpu_linear"), gpu_rows()
    work = [each["sign_adds_per_s"] * each["time_us"] * 1e-6 for each in cpu]
    left.plot(work, [each["sign_adds_per_s"] / 1e9 for each in cpu], "o", color=theme.ours, label="packed layers")
    peak = [each["peak_sign_adds_per_s"] / 1e9 for each in cpu]
    left.axhline(sum(peak) / len(peak), color=theme.text, linestyle="--", linewidth=1, label="lookups alone")
    left.set_xscale("log")
    left.set_ylim(0, max(peak) * 1.3)
    left.set_xlabel("sign additions in a layer")
    left.set_ylabel("billion sign additions / s")
    left.set_title("one AVX-512 core")
    left.legend(loc="lower right")
    size = [each["bytes"] for each in gpu]
    dense = {(each["d_out"], each["d_in"]): each["dense_us"] for each in gpu}
    right.loglog(size, [each["time_us"] for each in gpu], "o", color=theme.ours, label="packed layers")
    right.loglog(
        [2 * d_out * d_in for d_out, d_in in dense],
        list(dense.values()),
        "s",
        color=theme.fourth,
        markerfacecolor="none",
        label="float16 (cuBLAS)",
    )
    ends = [min(size), 2 * max(d_out * d_in for d_out, d_in in dense)]
    speed = sum(copy_speed(each) for each in gpu) / len(gpu)
    right.loglog(ends, [end / speed * 1e6 for end in ends], "--", color=theme.text, linewidth=1, label="a copy")
    right.set_xlabel("bytes of weights")
    right.set_ylabel("time at batch 1, µs")
    right.set_title(results("cuda_linear")["device"].removeprefix("NVIDIA "))
    right.legend(loc="upper left")
    return figure
