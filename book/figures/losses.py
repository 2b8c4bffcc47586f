"""Draw the student's loss against the tokens it has read, at four budgets."""

import style
from matplotlib.figure import Figure
from sources import rows

CAPTION = (
    "**Training, measured here.** Loss of the shipped checkpoints of SmolLM2-135M while they were trained: KL to "
    "the original's predictions, at 0.55 and 1.0 bits mixed with the cross-entropy above the original's, and the error "
    "of hidden states. Each point is the mean since the point before. At 0.1 and 0.3 bits the first million tokens go "
    "block by block, which is another loss: hence the peak after them."
)
SOURCES = ("training_smollm2",)


def alt() -> str:
    """Describe the picture in words."""
    found = sorted(rows("training_smollm2", stage="shipped"), key=lambda each: each["bits"])
    parts = ", ".join(f"{each['bits']:g} bits {each['log']['loss'][-1]:.2f}" for each in found)
    return f"Four falling curves of loss in nats against millions of tokens. At the end: {parts}."


def draw(theme: style.Theme) -> Figure:
    """Draw the picture."""
    figure = Figure(figsize=(style.WIDTH, 3.0), layout="constrained")
    axes = figure.subplots()
    found = sorted(rows("training_smollm2", stage="shipped"), key=lambda each: each["bits"])
    colours = (theme.published, theme.fourth, theme.third, theme.ours)
    for each, colour, line in zip(found, colours, ("-", "--", "-.", ":"), strict=True):
        steps, loss = each["log"]["step"], each["log"]["loss"]
        scale = each["tokens"] / steps[-1] / 1e6
        axes.plot([step * scale for step in steps], loss, line, color=colour, label=f"{each['bits']:g} bits")
    axes.set_xlabel("tokens, millions")
    axes.set_ylabel("loss, nats a token")
    axes.set_ylim(0)
    axes.legend(ncols=4, loc="upper right")
    return figure
