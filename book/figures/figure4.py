"""Draw Figure 4: the bytes that a key-value cache keeps for each token, in full and as latents."""

import style
from matplotlib.figure import Figure
from sources import publication, rows

CAPTION = (
    "**Figure 4, with numbers.** Bytes that all layers keep for one token: keys and values in float16, or the "
    "latents of `k_proj` and `v_proj`, scales and positions counted. The paper's Figure 4 is a sketch of the same "
    "idea; its one published factor is marked."
)
SOURCES = ("cpu_cache_llama2", "cpu_cache_llama3", "published")
CASES = (
    ("cpu_cache_llama2", "Llama-2-7B", 0.1),
    ("cpu_cache_llama2", "Llama-2-7B", 0.55),
    ("cpu_cache_llama3", "Llama-3-8B", 0.1),
)


def caches() -> list[tuple[str, str, float, float | None]]:
    """List model and bits, cache type, bytes a token, and how many times smaller than the full cache."""
    found = []
    seen = set()
    for name, model, bits in CASES:
        kinds = {each["kind"]: each for each in rows(name, bits=bits)}
        if model not in seen:
            found.append((model, "full, float16", next(iter(kinds.values()))["ordinary_bytes_per_token"], None))
            seen.add(model)
        for kind, each in kinds.items():
            found.append((f"{model}, {bits:g} bits", kind, each["bytes_per_token"], each["reduction"]))
    return found


def alt() -> str:
    """Describe the picture in words."""
    parts = [
        f"{model}, {kind}: {size:,.0f} bytes" + (f", {reduction:.1f} times smaller" if reduction else "")
        for model, kind, size, reduction in caches()
    ]
    return f"Horizontal bars of bytes a token. {'; '.join(parts)}."


def draw(theme: style.Theme) -> Figure:
    """Draw the picture."""
    figure = Figure(figsize=(style.WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    found = caches()
    claimed = publication("kv_cache_reduction_x", "Llama-2-7B", "LittleBit", 0.1)
    for at, (model, kind, size, reduction) in enumerate(found):
        axes.barh(at, size / 1000, color=theme.ours if reduction else theme.faint, height=0.62)
        text = f"{size / 1000:,.1f} kB" + (f", {reduction:.1f} times smaller" if reduction else "")
        axes.text(size / 1000 + 6, at, text, va="center", fontsize=8)
        if claimed and reduction and kind == "latent" and model == "Llama-2-7B, 0.1 bits":
            full = found[0][2] / 1000
            axes.plot([full / claimed["value"]] * 2, [at - 0.45, at + 0.45], color=theme.published, linewidth=2)
            note = f"published: {claimed['value']:g} times smaller"
            axes.text(full * 0.52, at, note, va="center", color=theme.published, fontsize=8)
    axes.set_yticks(range(len(found)), [f"{model}\n{kind}" for model, kind, _, _ in found])
    axes.tick_params(axis="y", labelsize=7.5, length=0)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, max(size for _, _, size, _ in found) / 1000 * 1.18)
    axes.set_xlabel("kB a token, all layers (1 kB = 1000 bytes)")
    return figure
