"""Make Table 2: zero-shot accuracy."""

from sources import Table, as_published, fixed, publication, row, rows
from tables import zero_shot_mean

CAPTION = (
    "**Table 2. Zero-shot accuracy, %.** The mean of the paper's seven tasks, and BLiMP, pairs of a grammatical and an "
    "ungrammatical sentence. The models differ, so columns compare from top to bottom only."
)
SOURCES = ("published", "zero_shot")
BITS = (16, 1.0, 0.55, 0.3, 0.1)


def line(bits: float) -> list[str]:
    """Make one row."""
    cells = [f"{bits:g}"]
    for method in ("LittleBit", "STBLLM (nominal bits)"):
        found = publication("zero_shot_avg7", "Llama-2-7B", method, bits)
        cells.append(as_published(found["value"]) if found else "")
    model = "smollm2" if bits == 16 else f"smollm2-{bits:g}bit"
    if not rows("zero_shot", model=model):
        return [*cells, "", ""]
    blimp = row("zero_shot", model=model, task="blimp")["acc"]
    return [*cells, fixed(100 * zero_shot_mean(model)), fixed(100 * blimp)]


def chance() -> list[str]:
    """Make the row of random choices."""
    tasks = [each["chance"] for each in rows("zero_shot", model="smollm2") if each["task"] != "blimp"]
    blimp = row("zero_shot", model="smollm2", task="blimp")["chance"]
    return ["random choices", "", "", fixed(100 * sum(tasks) / len(tasks)), fixed(100 * blimp)]


def table() -> Table:
    """Make the table."""
    head = ["bits", "published: Llama-2-7B, LittleBit", "published: Llama-2-7B, STBLLM (nominal bits)"]
    head += ["measured here: SmolLM2-135M, seven tasks", "measured here: SmolLM2-135M, BLiMP"]
    pairs = row("zero_shot", model="smollm2", task="blimp")["items"]
    note = (
        f"All items of the seven tasks, accuracy by log-probability (`acc`); all {pairs:,} pairs of BLiMP. Empty: not "
        "measured."
    )
    return Table(head, [*map(line, BITS), chance()], SOURCES, note)
