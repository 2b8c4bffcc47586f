"""Make Table 3: memory of whole models."""

from sources import Table, fixed, row, rows

CAPTION = (
    "**Table 3. GB of weights**, of $10^9$ bytes each. Published beside what `littlebit.reference.memory` counts, "
    "with the embedding and the head in 16 bits as in the paper, and in 8 and 4 bits, which the paper does not "
    "do."
)
SOURCES = ("memory",)
MODELS = {
    "llama2-7b": "Llama-2-7B",
    "llama2-13b": "Llama-2-13B",
    "llama2-70b": "Llama-2-70B",
    "llama3-8b": "Llama-3-8B",
}
BITS = (16, 0.3, 0.1)


def line(model: str, bits: float) -> list[str]:
    """Make one row."""
    found = {each["embedding_bits"]: each for each in rows("memory", table="weights", shape=model, bits=bits)}
    sizes = [fixed(found[width]["weights_GB"], 3) for width in (16, 8, 4)]
    dense = row("memory", table="weights", shape=model, bits=16, embedding_bits=16)
    smaller = fixed(dense["weights_GB"] / found[16]["weights_GB"]) if bits < 16 else ""
    both = dense["published_GB"], found[16]["published_GB"]
    published = fixed(both[0] / both[1]) if bits < 16 and all(both) else ""
    ratio = fixed(found[16].get("ratio_to_published"), 3)
    return [MODELS[model], f"{bits:g}", fixed(both[1], 2), published, *sizes, smaller, ratio]


def table() -> Table:
    """Make the table."""
    head = ["model", "bits", "published", "times smaller", "counted here", "8-bit embeddings", "4-bit embeddings"]
    head += ["times smaller, counted", "counted / published"]
    note = (
        "The published figures are from the paper's Table 3. Its float16 sizes are a little above two bytes a "
        "parameter, and it does not say why; the quantised ones are above what a file must hold by about as much."
    )
    return Table(head, [line(model, bits) for model in MODELS for bits in BITS], SOURCES, note)
