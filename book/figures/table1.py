"""Make Table 1: perplexity on WikiText-2."""

from sources import Table, as_published, fixed, publication, row, rows

CAPTION = (
    "**Table 1. WikiText-2 perplexity.** Published figures of others' models beside what was measured here on "
    "SmolLM2-135M-Instruct, window 2048. An empty cell was not published, or not measured: none is filled by "
    "guessing."
)
SOURCES = ("published", "training_smollm2")
BITS = (16, 1.0, 0.8, 0.7, 0.55, 0.3, 0.1)
PUBLISHED = (  # head, model, method, table
    ("Llama-2-7B, LittleBit", "Llama-2-7B", "LittleBit", "LittleBit T1"),
    ("Llama-2-13B, LittleBit", "Llama-2-13B", "LittleBit", "LittleBit T1"),
    ("Llama-2-7B, STBLLM (nominal bits)", "Llama-2-7B", "STBLLM (nominal bits)", "LittleBit T1"),
    ("Llama-2-7B, NanoQuant", "Llama-2-7B", "NanoQuant", "NanoQuant T2"),
)
DENSE = {"Llama-2-7B": ("FP16", "LittleBit T1"), "Llama-2-13B": ("BF16", "NanoQuant T2")}
SECOND_HAND = "†"


def marked(found: dict | None) -> str:
    """Format a published value, marked if it was read in a second source."""
    if found is None:
        return ""
    return as_published(found["value"]) + (SECOND_HAND if found["status"] == "second-hand" else "")


def line(bits: float) -> list[str]:
    """Make one row."""
    cells = [f"{bits:g}"]
    for _, model, method, table in PUBLISHED:
        named, where = DENSE[model] if bits == 16 else (method, table)
        cells.append(marked(publication("wikitext2_ppl", model, named, bits, where)))
    if bits == 16:
        return [*cells, fixed(row("training_smollm2", name="teacher")["perplexity"])]
    ours = rows("training_smollm2", stage="shipped", bits=bits)
    return [*cells, fixed(ours[0]["perplexity_packed"]) if ours else ""]


def table() -> Table:
    """Make the table."""
    head = ["bits", *(f"published: {name}" for name, *_ in PUBLISHED), "measured here: SmolLM2-135M"]
    note = (
        f"{SECOND_HAND} quoted from a second source, not read in the paper itself. Row 16 is the dense model; ours is "
        "a 4-bit file (Q4_1) of 5 bits a weight."
    )
    return Table(head, [line(bits) for bits in BITS], SOURCES, note)
