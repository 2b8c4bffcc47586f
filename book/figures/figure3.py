"""Draw Figure 3: perplexity on WikiText-2 against bits per weight."""

import style
from matplotlib.figure import Figure
from sources import publications, row, rows

CAPTION = (
    "**Figure 3. As bits fall, LittleBit's perplexity rises slowly, and STBLLM's explodes below half a bit.** "
    "Left, *published*: LittleBit and STBLLM as the paper has them, STBLLM at nominal bits (its files hold more), "
    "and NanoQuant's figures, Llama-2 at 7 and 13 billion parameters; for 13 billion there are two points. Right, "
    "*measured here*: SmolLM2-135M-Instruct, the shipped checkpoints and the same training stopped early. "
    "Different models: only the shapes of the curves compare."
)
SOURCES = ("published", "training_smollm2")
SERIES = (  # model, method, label, marker, line
    ("Llama-2-7B", "LittleBit", "LittleBit, 7B", "o", "-"),
    ("Llama-2-13B", "LittleBit", "LittleBit, 13B", "s", "-"),
    ("Llama-2-7B", "STBLLM (nominal bits)", "STBLLM, 7B", "^", ":"),
    ("Llama-2-7B", "NanoQuant", "NanoQuant, 7B", "D", "--"),
)


def published(model: str, method: str) -> list[tuple[float, float]]:
    """List (bits, perplexity) of each published figure up to 1 bit, by bits."""
    tables = ("LittleBit T1", "NanoQuant T2")
    found = {
        each["bpw"]: each["value"]
        for each in publications()
        if (each["model"], each["method"], each["metric"]) == (model, method, "wikitext2_ppl")
        and each["bpw"] <= 1
        and each["table"] in tables
    }
    return sorted(found.items())


def ours() -> list[dict]:
    """Select the shipped checkpoints, by bits."""
    return sorted(rows("training_smollm2", stage="shipped"), key=lambda each: each["bits"])


def alt() -> str:
    """Describe the picture in words."""
    pairs = ", ".join(f"{each['perplexity_packed']:.1f} at {each['bits']:g} bits" for each in ours())
    littlebit = ", ".join(f"{value:g} at {bits:g}" for bits, value in published("Llama-2-7B", "LittleBit"))
    return (
        "Two charts of perplexity against bits per weight, both axes logarithmic. Published: LittleBit on Llama-2-7B "
        f"falls slowly, {littlebit}, while STBLLM rises past a thousand at 0.3. Measured here on SmolLM2-135M: {pairs}."
    )


def draw(theme: style.Theme) -> Figure:
    """Draw the picture."""
    figure = Figure(figsize=(style.WIDTH, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = (theme.published, theme.published, theme.fourth, theme.third)
    for (model, method, label, marker, line), colour in zip(SERIES, colours, strict=True):
        bits, values = zip(*published(model, method), strict=True)
        left.plot(bits, values, line, marker=marker, color=colour, markerfacecolor="none", label=label)
    dense = row("training_smollm2", name="teacher")["perplexity"]
    checkpoints, early = (
        ours(),
        sorted(rows("training_smollm2", name="pilot, latents 0.008"), key=lambda each: each["bits"]),
    )
    right.plot(
        [each["bits"] for each in early],
        [each["perplexity"] for each in early],
        "--",
        marker="v",
        color=theme.ours,
        alpha=0.7,
        label=f"{early[0]['tokens'] / 1e6:.1f} M tokens",
    )
    right.plot(
        [each["bits"] for each in checkpoints],
        [each["perplexity_packed"] for each in checkpoints],
        "-o",
        color=theme.ours,
        label=f"{checkpoints[-1]['tokens'] / 1e6:.0f} to {checkpoints[0]['tokens'] / 1e6:.0f} M",
    )
    right.axhline(dense, color=theme.text, linestyle=":", linewidth=1.2, label="original")
    for axes, title in ((left, "published, Llama-2"), (right, "measured here, SmolLM2-135M")):
        style.bits_axis(axes)
        axes.set_title(title)
    left.set_xlabel("bits per weight (STBLLM: nominal)")
    left.legend(loc="center left", bbox_to_anchor=(0, 0.55), fontsize=7.5)
    right.legend(loc="upper right")
    style.log_axis(left, (5, 10, 20, 50, 100, 500, 2000))
    style.log_axis(right, (20, 50, 100, 200, 300))
    left.set_ylabel("WikiText-2 perplexity")
    return figure
