"""Draw the weight error of each initialiser at several budgets, with one path and with two."""

import style
from matplotlib.figure import Figure
from sources import rows

CAPTION = (
    "**Initialisation, measured here.** Mean relative error of the weights of two blocks of SmolLM2-135M before "
    "any training, one path (left) and two (right) under the same ceiling. At 0.1 bits two paths' scales alone "
    "are too much for these small layers. The thin line is Shannon's bound for Gaussian noise."
)
SOURCES = ("initialisation_smollm2",)
NAMES = {"dual-svid": "Dual-SVID (the paper)", "itq": "Joint-ITQ", "admm": "ADMM"}


def errors(init: str, paths: int) -> list[tuple[float, float]]:
    """List (bits, error) by bits."""
    return sorted((each["bits"], each["error"]) for each in rows("initialisation_smollm2", init=init, paths=paths))


def alt() -> str:
    """Describe the picture in words."""
    last = {init: dict(errors(init, 1))[0.55] for init in NAMES}
    parts = ", ".join(f"{NAMES[init]} {error:.2f}" for init, error in last.items())
    return f"Two charts of relative error falling with bits per weight. With one path at 0.55 bits: {parts}."


def draw(theme: style.Theme) -> Figure:
    """Draw the picture."""
    figure = Figure(figsize=(style.WIDTH, 3.1), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    looks = zip(NAMES, ("o", "s", "D"), (theme.fourth, theme.third, theme.ours), strict=True)
    for init, marker, colour in looks:
        for paths, axes in enumerate(panels, start=1):
            bits, values = zip(*errors(init, paths), strict=True)
            axes.plot(bits, values, "-", marker=marker, color=colour, label=NAMES[init])
    for axes in panels:
        budgets = [0.05 * step for step in range(1, 22)]
        axes.plot(
            budgets, [2**-b for b in budgets], color=theme.text, linewidth=0.8, label=r"Shannon's bound, $2^{-b}$"
        )
    for axes, title in zip(panels, ("one path", "primary and residual"), strict=True):
        axes.set_title(title)
        axes.set_xticks([0.1, 0.3, 0.55, 0.8, 1.0], ["0.1", "0.3", "0.55", "0.8", "1"])
        axes.set_xlim(0.05, 1.05)
        axes.set_xlabel("stored bits per weight")
    panels[0].set_ylabel("relative error ‖W - Ŵ‖ / ‖W‖")
    panels[0].legend(loc="lower left")
    return figure
