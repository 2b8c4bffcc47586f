"""Make Table 4: the key-value cache."""

from sources import Table, fixed, number, row, rows

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
    counted = row("memory", table="kv_cache", shape="llama2-7b", bits=0.1, kind="latent")
    note = (
        "The published factor is from the paper's Table 4, rank 192. Ranks here are counted: at 0.1 bits their mean is "
        f"{counted['mean_rank']:g} in Llama-2-7B. The run on a GPU behind the README's factor has rounded ranks, which "
        "makes its cache a little larger."
    )
    return Table(head, [line(model, bits) for model in MODELS for bits in BITS], SOURCES, note)
