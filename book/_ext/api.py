"""The pages of the API: one for each module, written anew by every build, so that a new module needs no edit here."""

import ast
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The order in which the paper is read; modules that are not named here follow by name.
ORDER = [
    "svd",
    "signs",
    "factors",
    "dual_svid",
    "residual",
    "alignment",
    "admm",
    "bits",
    "packing",
    "linear",
    "arrays",
    "distill",
    "train",
]
# Where a module that only fast/ has belongs; one that is not named here is one of "More".
GROUPS = {
    "Whole models": [
        "model",
        "selection",
        "shared",
        "wrappers",
        "layers",
        "experts",
        "embeddings",
        "calibrate",
        "evaluate",
        "zero_shot",
    ],
    "Training": ["student", "trainer", "muon", "resume"],
    "Files": [
        "checkpoint",
        "headers",
        "digests",
        "writing",
        "cache",
        "official",
        "gguf",
        "gguf_reader",
        "fetch",
        "hub",
        "shipped",
    ],
    "Running": [
        "decode",
        "decode_cpu",
        "decode_mapped",
        "decode_loaded",
        "decode_cuda",
        "fused_engine",
        "latent_engine",
        "static_engine",
        "tokenizer",
        "latent_cache",
        "cache_argument",
        "hf_cache",
        "kernels",
    ],
    "With torch, transformers and PEFT": ["operators", "hf", "quantizer", "plugin", "lora"],
    "Measuring": [
        "agreement",
        "bench_linear",
        "bench_peers",
        "bench_cuda",
        "tune_cuda",
        "bench_cache",
        "bench_decode",
        "bench_decode_cuda",
    ],
    "The command": ["lazy", "demo", "estimate", "report", "progress", "completion"],
}


def modules(package: str) -> list[str]:
    """Dotted names of a package's modules below the package."""
    folder = ROOT / package
    paths = [path.relative_to(folder).with_suffix("") for path in sorted(folder.rglob("*.py"))]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    return [name for name in names if not name.split(".")[-1].startswith("_")]


def docstring(module: str) -> str:
    """Docstring of a module, which is Markdown; arXiv numbers become links."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def members(module: str) -> str:
    """What autodoc makes of a module."""
    return f"```{{eval-rst}}\n.. automodule:: littlebit.{module}\n   :members:\n```\n"


def page(name: str, mirrored: bool) -> str:
    """A module's page: what it is, then its functions, for mirrored modules those of the reference first."""
    if not mirrored:
        return f"# {name}\n\n`littlebit.fast.{name}`. {docstring(f'fast.{name}')}\n\n{members(f'fast.{name}')}"
    said, again = (docstring(f"{package}.{name}") for package in ("reference", "fast"))
    again = "" if again == said else again
    return (
        f"# {name}\n\n{said}\n\n## littlebit.reference.{name}\n\n{members(f'reference.{name}')}\n"
        f"## littlebit.fast.{name}\n\n{again}\n\n{members(f'fast.{name}')}"
    )


def contents(caption: str, names: Sequence[str]) -> str:
    """A heading and the list of pages below it."""
    pages = "\n".join(names)
    return f"## {caption}\n\n```{{toctree}}\n:maxdepth: 1\n\n{pages}\n```\n"


def write_pages(folder: Path) -> None:
    """Write every page that has changed, and remove those of modules that are gone."""
    reference, fast = modules("reference"), modules("fast")
    ordered = [name for name in ORDER if name in reference] + [name for name in reference if name not in ORDER]
    rest = [name for name in fast if name not in reference]
    groups = {
        caption: [name for top in tops for name in rest if name.split(".")[0] == top]
        for caption, tops in GROUPS.items()
    }
    groups["More"] = [name for name in rest if not any(name in group for group in groups.values())]
    written = {f"{name}.md": page(name, mirrored=name in reference) for name in ordered + rest}
    written["index.md"] = "\n".join(
        [INTRODUCTION, contents("The method, twice", ordered)]
        + [contents(caption, names) for caption, names in groups.items() if names]
    )
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in written:
            path.unlink()
    for name, text in written.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:  # else Sphinx would read every page again
            path.write_text(text)


INTRODUCTION = """# API

The pages below are made from the docstrings. `littlebit.reference` says in NumPy what the method is, and
`littlebit.fast` says it again in torch, with the same names and parameters; a page shows both. What is exported can be
imported from the package itself: `from littlebit.fast import quantize_`.
"""


def restructured(lines: Sequence[str]) -> list[str]:
    """A docstring, which is plain text, as reStructuredText.

    Above the first heading an indented block, or a paragraph that does not end like a sentence, is an equation and is
    shown as it stands. Sections become fields; their types are words and shapes, "(m, n) float array", to be shown
    rather than looked up as napoleon would.
    """
    prose, *rest = re.split(r"^(\w+)\n-{3,}\n", "\n".join(lines).strip(), flags=re.M)
    made: list[str] = []
    for at, paragraph in enumerate(re.split(r"\n\s*\n", prose.strip())):
        block = textwrap.dedent(paragraph).split("\n")
        is_equation = at > 0 and (paragraph.startswith("    ") or paragraph[-1] not in ".:")
        made += ["::", "", *("    " + line for line in block)] if is_equation else map(escaped, block)
        made.append("")
    for heading, text in zip(rest[::2], rest[1::2], strict=True):
        made += section(heading, text.rstrip().split("\n"))
    return made


def section(heading: str, lines: list[str]) -> list[str]:
    """A section of a docstring: examples as they stand, the others as a field of definitions or, if short, of prose."""
    if heading == "Examples":
        return ["", ".. rubric:: Examples", "", *lines, ""]
    if heading == "Returns" and " : " not in lines[0]:
        return [f":{heading}:", *("    " + escaped(line.strip()) for line in lines)]
    made = [f":{heading}:"]
    for line in lines:
        if line.startswith(" "):
            made.append("    " + escaped(line))
            continue
        # names that share a line, "u : (d_out, rank), v : (d_in, rank)", get their own
        several = line.count(" : ") > 1
        for term in re.split(r"[,;] (?:and )?(?=\w+ : )| and (?=\w+ : )", line) if several else [line]:
            name, colon, kind = escaped(term).partition(" : ")
            made += [f"    **{name}**{colon}{kind}", "        ..", ""]  # the comment makes a definition of a mere term
    return made


def escaped(line: str) -> str:
    """A line whose bars, stars and final underscores are only that; arXiv numbers become links."""
    pieces = re.split(r"(`[^`]*`)", line)
    pieces[::2] = [re.sub(r"([\\|*]|_\b(?!\w))", r"\\\1", piece) for piece in pieces[::2]]
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"`arXiv \1 <https://arxiv.org/abs/\1>`__", "".join(pieces))
