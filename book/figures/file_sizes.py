"""Draw quality against file size: the packed students and llama.cpp's quantizations of the same model."""

import style
from matplotlib.figure import Figure
from sources import row, rows

FILE = "equal_bytes"
CAPTION = (
    "**The students' files are smaller than any that llama.cpp makes of this model, and diverge more from the "
    "original.** Mean KL divergence from the original and WikiText-2 perplexity against the size of all files that a "
    "program needs, SmolLM2-135M-Instruct. All axes are logarithmic."
)
SOURCES = (FILE,)
MEGABYTE = 1e6


def students(embedding_bits: int) -> list[dict]:
    """Select the students with these embeddings, by size."""
    return sorted(rows(FILE, method="littlebit", embedding_bits=embedding_bits), key=lambda each: each["bytes"])


def peers() -> list[dict]:
    """Select llama.cpp's files, by size."""
    return sorted(rows(FILE, method="llama.cpp"), key=lambda each: each["bytes"])


def alt() -> str:
    """Describe the picture in words."""

    def points(found: list[dict]) -> str:
        return ", ".join(f"{each['kl']:.2g} at {each['bytes'] / MEGABYTE:.0f} MB" for each in found)

    return (
        "Two charts against file size, both axes logarithmic: mean KL divergence from the original, and perplexity. "
        f"KL of the students with 4-bit embeddings: {points(students(4))}. KL of llama.cpp's files: {points(peers())}."
    )


def draw(theme: style.Theme) -> Figure:
    """Draw the picture."""
    figure = Figure(figsize=(style.WIDTH, 3.4), layout="constrained")
    series = (
        (students(8), "-o", theme.ours, "littlebit, 8-bit embedding"),
        (students(4), "--v", theme.ours, "littlebit, 4-bit embedding"),
        (peers(), "s", theme.third, "llama.cpp"),
    )
    panels = figure.subplots(1, 2)
    for axes, key, title in zip(panels, ("kl", "perplexity"), ("KL, nats a token", "perplexity"), strict=True):
        for found, line, colour, label in series:
            sizes = [each["bytes"] / MEGABYTE for each in found]
            axes.plot(sizes, [each[key] for each in found], line, color=colour, label=label)
        axes.set_xscale("log")
        axes.set_xticks((25, 50, 100, 150), ("25", "50", "100", "150"))
        axes.minorticks_off()
        axes.set_xlabel("size of the files, MB")
        axes.set_title(title)
    style.log_axis(panels[0], (0.005, 0.02, 0.1, 0.5, 2))
    style.log_axis(panels[1], (35, 50, 70, 90))
    original = row(FILE, method="original")["perplexity"]
    panels[1].axhline(original, color=theme.text, linestyle=":", linewidth=1.2, label="original")
    handles, labels = panels[1].get_legend_handles_labels()
    panels[0].legend(handles, labels, loc="lower left", fontsize=7)
    return figure
