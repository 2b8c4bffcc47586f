"""Draw the README's picture and write its table of results."""

import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sources import fixed, number, publication, row, rows
from tables import PEERS, wikitext_share

LAYER = {"d_out": 28672, "d_in": 8192}  # of Llama-2-70B


def smallest(file: str) -> dict:
    """Select the row of the large layer with the fewest bits."""
    return min((each for each in rows(file, **LAYER) if each.get("batch", 1) == 1), key=lambda each: each["bits"])


def layer_bars() -> dict[str, float]:
    """List the milliseconds of torch's layers and of the packed one, from the most bits to the fewest."""
    layer = smallest("cpu_linear")
    others = {f"torch {title}": layer[key] / 1000 for key, title in PEERS.items() if layer.get(key)}
    return {"torch bfloat16": layer["dense_us"] / 1000, **others, "packed": layer["time_us"] / 1000}


def layer_beside() -> str:
    """List torch's layers with their times and the packed layer's speed-up, the fairest first."""
    bars = layer_bars()
    packed = bars.pop("packed")
    found = sorted(bars.items(), key=lambda item: item[1])
    return ", ".join(f"{name}: {time:.1f} ms ({time / packed:.0f}x)" for name, time in found)


def weights(bits: float, embedding_bits: int) -> float:
    """Look up the GB of Llama-2-7B's weights."""
    return row("memory", table="weights", shape="llama2-7b", bits=bits, embedding_bits=embedding_bits)["weights_GB"]


def speed(engine: str) -> float:
    """Look up an engine's tokens a second on one thread."""
    return row("cpu_decode", engine=engine, threads=1)["tokens_per_s"]


def perplexity(bits: float) -> float:
    """Look up the perplexity of a shipped checkpoint."""
    return row("training_smollm2", stage="shipped", bits=bits)["perplexity_packed"]


def panels() -> dict[str, dict[str, tuple[float, str]]]:
    """List the bars of each panel: length, and the text at the end. This project's come last."""
    layer, times = smallest("cpu_linear"), layer_bars()
    packed = times.pop("packed")
    size = f"{layer['d_out']} x {layer['d_in']}"
    teacher = row("training_smollm2", name="teacher")["perplexity"]
    return {
        "Llama-2-7B, GB of weights": {
            "float16": (weights(16, 16), fixed(weights(16, 16))),
            "0.1 bits": (weights(0.1, 16), fixed(weights(0.1, 16), 2)),
            "and 8-bit embeddings": (weights(0.1, 8), fixed(weights(0.1, 8), 2)),
        },
        f"{size} layer, one CPU core, ms": {
            **{name: (time, fixed(time)) for name, time in times.items()},
            f"packed, {layer['bits']:.1f} bits": (packed, fixed(packed, 2)),
        },
        "SmolLM2-135M, one CPU core, tokens/s": {
            "transformers, float32": (speed("transformers"), number(speed("transformers"))),
            "llama.cpp, Q4_1": (speed("llama.cpp"), number(speed("llama.cpp"))),
            "0.55 bits, 8-bit head": (speed("littlebit"), number(speed("littlebit"))),
        },
        "the price: WikiText-2 perplexity, 16-bit head": {
            "original": (teacher, fixed(teacher)),
            **{
                f"{bits:g} bit{'s' * (bits != 1)}": (perplexity(bits), fixed(perplexity(bits)))
                for bits in (1.0, 0.55, 0.3, 0.1)
            },
        },
    }


def alt() -> str:
    """Describe the picture in words."""
    parts = (
        f"{title}: {', '.join(f'{name} {end}' for name, (_, end) in bars.items())}" for title, bars in panels().items()
    )
    return f"Four charts of bars. {'. '.join(parts)}."


def draw_panel(axes: Axes, title: str, bars: dict[str, tuple[float, str]], theme: style.Theme) -> None:
    """Draw horizontal bars, with peers in grey."""
    others = ("float16", "torch ", "transformers", "llama.cpp", "original")
    longest = max(length for length, _ in bars.values())
    for at, (name, (length, end)) in enumerate(bars.items()):
        axes.barh(at, length, color=theme.faint if name.startswith(others) else theme.ours, height=0.62)
        axes.text(length + longest * 0.02, at, end, va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(len(bars), 3) - 0.5, -0.6)
    axes.set_xlim(0, longest * 1.2)
    axes.set_xticks([])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_title(title, loc="left", fontweight="bold")


def draw(theme: style.Theme) -> Figure:
    """Draw the picture."""
    figure = Figure(figsize=(8.6, 3.3), layout="constrained")
    for axes, (title, bars) in zip(figure.subplots(2, 2).flat, panels().items(), strict=True):
        draw_panel(axes, title, bars, theme)
    return figure


def table_of_results() -> str:
    """Write the README's table: what, this project's number, its peers, and the source."""
    cpu, gpu = smallest("cpu_linear"), smallest("cuda_linear")
    teacher = row("training_smollm2", name="teacher")["perplexity"]
    published = publication("memory_GB", "Llama-2-70B", "LittleBit", 0.1)
    cut = publication("kv_cache_reduction_x", "Llama-2-7B", "LittleBit", 0.1)
    llama70 = row("memory", table="weights", shape="llama2-70b", bits=0.1, embedding_bits=16)["weights_GB"]
    cache, full = (row("cuda_cache", kv_cache=kind, context=8192) for kind in ("latent", "full"))
    decoding = min(rows("cuda_decode", engine="packed"), key=lambda each: each["bits"])
    embedding = row("cpu_decode", engine="littlebit", threads=1)["embedding_bits"]
    laptop = min(rows("cpu_decode_shape", engine="littlebit", threads=2), key=lambda each: each["bits"])
    peers = {each["type"]: each["tokens_per_s"] for each in rows("llama_cpp_large", threads=2)}
    dense, eager = (row("cuda_decode", engine=engine) for engine in ("float16", "transformers"))
    lines = [
        (
            "WikiText-2 perplexity of SmolLM2-135M at 1.0, 0.55, 0.3, 0.1 bits, 16-bit embedding and head",
            ", ".join(fixed(perplexity(bits)) for bits in (1.0, 0.55, 0.3, 0.1)),
            f"original, a 4-bit file: {fixed(teacher)}; {wikitext_share()} of the training text is WikiText-2's train "
            "split or in its style",
            "training_smollm2",
        ),
        (
            f"{LAYER['d_out']} x {LAYER['d_in']} layer at {cpu['bits']:.1f} bits, batch 1, one CPU core",
            f"{cpu['time_us'] / 1000:.2f} ms",
            layer_beside(),
            "cpu_linear",
        ),
        (
            f"the same layer at {gpu['bits']:.1f} bits, batch 1, one H100",
            f"{gpu['time_us']:.1f} µs",
            f"gemlite with 1 bit a weight: {gpu['gemlite_us']:.0f} µs ({gpu['gemlite_us'] / gpu['time_us']:.1f}x), "
            f"cuBLAS float16: {gpu['dense_us']:.0f} µs ({gpu['speedup']:.1f}x)",
            "cuda_linear",
        ),
        (
            f"decoding SmolLM2-135M, 0.55 bits, {embedding}-bit embedding and head, one CPU core",
            f"{speed('littlebit'):.0f} tokens/s",
            f"llama.cpp, 4 bits (Q4_1): {speed('llama.cpp'):.0f}; transformers, float32: {speed('transformers'):.0f}",
            "cpu_decode",
        ),
        (
            f"decoding in Llama-2-7B's shape, random weights, {laptop['bits']:.1f} bits, 4-bit embedding and head, "
            "two CPU cores",
            f"{laptop['tokens_per_s']:.0f} tokens/s",
            f"llama.cpp, Q4_0: {peers['Q4_0']:.1f}; Q2_K: {peers['Q2_K']:.1f}",
            "cpu_decode_shape",
        ),
        (
            f"decoding in Llama-2-7B's shape, random weights, {decoding['bits']:.1f} bits, 16-bit embedding and head, "
            "one H100",
            f"{decoding['tokens_per_s']:.0f} tokens/s",
            f"in float16: the same decoder {dense['tokens_per_s']:.0f}, transformers {eager['tokens_per_s']:.0f}",
            "cuda_decode",
        ),
        (
            "weights of Llama-2-70B at 0.1 bits, 16-bit embedding and head",
            f"{llama70:.2f} GB",
            f"the paper: {published['value'] if published else ''} GB",
            "memory",
        ),
        (
            "latent key-value cache, Llama-2-7B at 0.1 bits",
            f"{full['kv_bytes_per_token'] / cache['kv_bytes_per_token']:.1f}x smaller",
            f"the paper: {cut['value'] if cut else ''}x; at 8k tokens on one H100 it decodes "
            f"{cache['tokens_per_s']:.0f} tokens/s, the full cache {full['tokens_per_s']:.0f}",
            "cuda_cache",
        ),
    ]
    body = [
        f"| {what} | **{ours}** | {beside} | [{file}.json](book/results/{file}.json) |"
        for what, ours, beside, file in lines
    ]
    head = ["| measured | littlebit | beside it | source |", "|---|---|---|---|"]
    return "\n".join([*head, *body]) + "\n"
