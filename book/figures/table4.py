"""Make Table 4: the key-value cache."""

from sources import Table, fixed, number, rows

CAPTION = (
    "**Table 4. How many times smaller a key-value cache of latents is** than float16 keys and values. Published "
    "beside what `littlebit.reference.memory` counts, with every token's scales and position."
)
SOURCES = ("memory",)
MODELS = {
    "llama2-7b": "Llama-2-7B",
    "llama2-13b": "Llama-2-13B",
    "llama2-70b": "Llama-2-70B",
    "llama3-8b": "Llama-3-8B",
}
BITS = (0.1, 0.3, 0.55)


def line(model: str, bits: float) -> list[str]:
    """Make one row."""
    found = {each["kind"]: each for each in rows("memory", table="kv_cache", shape=model, bits=bits)}
    latent, small = found["latent"], found["latent-int8"]
    return [
        MODELS[model],
        f"{bits:g}",
        fixed(latent["published_reduction"]),
        fixed(latent["reduction"]),
        fixed(small["reduction"]),
        number(latent["ordinary_bytes_per_token"]),
        number(latent["bytes_per_token"]),
    ]


def table() -> Table:
    """Make the table."""
    head = [
        "model",
        "bits",
        "published",
        "float16 latents",
        "int8 latents",
        "bytes a token, full",
        "float16 latents, bytes",
    ]
    note = "The published factor is from the paper's Table 4, rank 192."
    return Table(head, [line(model, bits) for model in MODELS for bits in BITS], SOURCES, note)
