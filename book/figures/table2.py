"""Make Table 2: zero-shot accuracy."""

from sources import Table, as_published, fixed, publication, results, rows

CAPTION = (
    "**Table 2. Zero-shot accuracy, %.** The paper averages seven tasks of common sense. Here the task is BLiMP, "
    "pairs of a grammatical and an ungrammatical sentence, where chance is 50: **not the same measure**, so that "
    "columns compare from top to bottom only."
)
SOURCES = ("published", "training_smollm2")
BITS = (16, 1.0, 0.55, 0.3, 0.1)


def line(bits: float) -> list[str]:
    """Make one row."""
    cells = [f"{bits:g}"]
    for method in ("LittleBit", "STBLLM (nominal bits)"):
        found = publication("zero_shot_avg7", "Llama-2-7B", method, bits)
        cells.append(as_published(found["value"]) if found else "")
    if bits == 16:
        return [*cells, fixed(100 * results("training_smollm2")["blimp"]["teacher"])]
    (ours,) = rows("training_smollm2", stage="shipped", bits=bits)
    return [*cells, fixed(100 * ours["blimp"]) if "blimp" in ours else ""]


def table() -> Table:
    """Make the table."""
    head = ["bits", "published: Llama-2-7B, LittleBit", "published: Llama-2-7B, STBLLM (nominal bits)"]
    head.append("measured here: SmolLM2-135M, BLiMP")
    pairs = results("training_smollm2")["blimp"]["pairs"]
    return Table(head, [line(bits) for bits in BITS], SOURCES, f"BLiMP: all {pairs:,} pairs. Empty: not measured.")
