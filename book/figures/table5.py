"""Make Table 5: decoding, tokens a second."""

from sources import Table, as_published, fixed, number, publication, rows
from tables import CUDA_ENGINES

CAPTION = (
    "**Table 5. Decoding at batch 1, tokens a second.** Published for Llama-2-7B on the authors' A100; measured here "
    "for random weights of that shape on an H100, and for SmolLM2-135M on one and two threads of a CPU. Machines "
    "are not the same: compare each with its own dense row."
)
SOURCES = ("published", "cuda_decode", "cpu_decode")
ENGINES = {
    "littlebit": "littlebit, 0.55 bits, 8-bit head",
    "llama.cpp": "llama.cpp, Q4_1",
    "transformers": "transformers, float32",
}


def ours(engine: str, threads: int) -> float:
    """Look up measured tokens a second."""
    (found,) = rows("cpu_decode", engine=engine, threads=threads)
    return found["tokens_per_s"]


def table() -> Table:
    """Make the table."""
    lines = []
    dense = publication("decode_tok_s", "Llama-2-7B", "FP16")
    for method, bits in (("LittleBit", 0.1), ("FP16", 16)):
        found = publication("decode_tok_s", "Llama-2-7B", method, bits)
        if found and dense:
            name = f"{method}, {bits:g} bits"
            lines.append(
                [
                    f"published: {name}",
                    "Llama-2-7B, GPU",
                    as_published(found["value"]),
                    fixed(found["value"] / dense["value"], 2),
                ]
            )
    (own_dense,) = rows("cuda_decode", engine="float16")
    for each in rows("cuda_decode"):
        name = f"littlebit, {each['bits']:.2g} bits" if each["engine"] == "packed" else CUDA_ENGINES[each["engine"]]
        speed = each["tokens_per_s"]
        times = fixed(speed / own_dense["tokens_per_s"], 2)
        lines.append([f"measured here: {name}", "Llama-2-7B's shape, H100", number(speed), times])
    for threads in (1, 2):
        for engine, name in ENGINES.items():
            speed = ours(engine, threads)
            machine = f"SmolLM2-135M, CPU, {threads} thread{'s' * (threads > 1)}"
            lines.append(
                [f"measured here: {name}", machine, number(speed), fixed(speed / ours("transformers", threads), 2)]
            )
    return Table(["engine", "model and machine", "tokens a second", "times its dense row"], lines, SOURCES)
