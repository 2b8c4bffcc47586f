"""Draw how low-rank the weights are: the share of the squared norm in the largest singular values."""

import style
from matplotlib.figure import Figure
from sources import rows

CAPTION = (
    "**How low-rank a language model's weights are, measured here.** Mean over the 30 layers of each kind of "
    "SmolLM2-135M; dotted, a matrix of the same shape with independent normal entries. Queries and keys are "
    "clearly low-rank; the weights of the MLP, most of the model, hardly more than noise."
)
SOURCES = ("spectra_smollm2",)
SHOWN = ("q_proj", "k_proj", "o_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


def at_quarter(found: dict) -> tuple[float, float]:
    """Find the share of energy at a quarter of the full rank, of the weights and of normal entries."""
    at = found["fractions"].index(0.25)
    return found["energy"][at], found["normal_energy"][at]


def alt() -> str:
    """Describe the picture in words."""
    kinds = {each["kind"]: at_quarter(each) for each in rows("spectra_smollm2")}
    parts = [f"{kind} {energy:.2f} (noise {noise:.2f})" for kind, (energy, noise) in kinds.items()]
    return f"Small charts of energy against rank, one a kind of layer. At a quarter of the rank: {', '.join(parts)}."


def draw(theme: style.Theme) -> Figure:
    """Draw the picture."""
    figure = Figure(figsize=(style.WIDTH, 3.1), layout="constrained")
    grid = figure.subplots(2, 4, sharex=True, sharey=True).flat
    kinds = {each["kind"]: each for each in rows("spectra_smollm2")}
    for axes, kind in zip(grid, SHOWN, strict=False):
        found = kinds[kind]
        axes.plot(found["fractions"], found["energy"], color=theme.ours, label="weights")
        axes.plot(
            found["fractions"], found["normal_energy"], ":", color=theme.text, linewidth=1.2, label="normal entries"
        )
        axes.set_title(f"{kind}\n{found['d_out']} x {found['d_in']}", fontsize=8)
        axes.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        axes.set_yticks([0, 0.5, 1], ["0", "½", "1"])
    last = figure.axes[-1]
    last.axis("off")
    last.legend(*figure.axes[0].get_legend_handles_labels(), loc="center", fontsize=7.5)
    figure.supxlabel("rank, as a part of the full rank", fontsize=9)
    figure.supylabel("share of ‖W‖²", fontsize=9)
    return figure
