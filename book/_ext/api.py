"""Write the API pages, one for each module, from the docstrings and the folders of the packages.

Every build writes them anew, so that a new module or folder needs no edit here.
"""

import ast
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The paper's order of reading; modules of the method that are not named here follow by name.
ORDER = [
    "svd",
    "signs",
    "factors",
    "dual_svid",
    "residual",
    "alignment",
    "admm",
    "bits",
    "memory",
    "packing",
    "linear",
    "kv_cache",
    "arrays",
    "distill",
    "train",
]
INTRODUCTION = """# API

These pages are made from the docstrings. `littlebit.reference` is the method in NumPy. `littlebit.fast` is the same in
torch, with the same names and parameters, and each page of the method shows both. The folders of `fast/` hold what only
a fast implementation needs. Everything exported can be imported from the package itself:
`from littlebit.fast import quantize_`.
"""


def modules(package: str) -> list[str]:
    """List the dotted names of a package's public modules, without the `__init__` of folders."""
    folder = ROOT / package
    paths = [path.relative_to(folder).with_suffix("") for path in sorted(folder.rglob("*.py"))]
    return [".".join(path.parts) for path in paths if not path.name.startswith("_")]


def docstring(module: str) -> str:
    """Read a module's docstring, which is Markdown, and link arXiv numbers."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def members(module: str) -> str:
    """Write the directive by which autodoc lists a module's members."""
    return f"```{{eval-rst}}\n.. automodule:: littlebit.{module}\n   :members:\n```\n"


def page(name: str, mirrored: bool) -> str:
    """Write a module's page: its docstring, then its functions, the reference's first where both packages have them."""
    if not mirrored:
        return f"# {name}\n\n`littlebit.fast.{name}`. {docstring(f'fast.{name}')}\n\n{members(f'fast.{name}')}"
    said, again = (docstring(f"{package}.{name}") for package in ("reference", "fast"))
    again = "" if again == said else again
    return (
        f"# {name}\n\n{said}\n\n## littlebit.reference.{name}\n\n{members(f'reference.{name}')}\n"
        f"## littlebit.fast.{name}\n\n{again}\n\n{members(f'fast.{name}')}"
    )


def section_of_index(heading: str, introduction: str, names: Sequence[str]) -> str:
    """Write a heading, an introduction and the list of pages below it."""
    pages = "\n".join(names)
    return f"## {heading}\n\n{introduction}\n\n```{{toctree}}\n:maxdepth: 1\n\n{pages}\n```\n"


def write_pages(folder: Path) -> None:
    """Write every page that has changed, and remove the pages of modules that are gone."""
    reference, fast = modules("reference"), modules("fast")
    method = [name for name in ORDER if name in reference] + [name for name in reference if name not in ORDER]
    rest = [name for name in fast if name not in reference]
    folders = sorted({name.split(".")[0] for name in rest})
    index = [INTRODUCTION, section_of_index("The method, twice", docstring("reference"), method)]
    for top in folders:
        names = [name for name in rest if name.split(".")[0] == top]
        index.append(section_of_index(f"fast/{top}", docstring(f"fast.{top}"), names))
    written = {f"{name}.md": page(name, mirrored=name in reference) for name in method + rest}
    written["index.md"] = "\n".join(index)
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in written:
            path.unlink()
    for name, text in written.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:  # else Sphinx would read every page again
            path.write_text(text)


def restructured(lines: Sequence[str]) -> list[str]:
    """Convert a docstring from plain text to reStructuredText.

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
    """Convert a section of a docstring: examples unchanged, others to a field of definitions or of short prose."""
    if heading == "Examples":
        return ["", ".. rubric:: Examples", "", *lines, ""]
    made = [f":{heading}:"]
    if heading == "Returns" and " : " not in lines[0]:
        rest = textwrap.dedent("\n".join(lines[1:])).splitlines()
        if not any(re.match(r"\w[\w, ]* : ", line) for line in rest):  # prose and lists keep their indentation
            between = [""] if any(line.startswith(" ") for line in rest) else []
            return made + ["    " + escaped(line) for line in [lines[0], *between, *rest]]
        made, lines = [*made, "    " + escaped(lines[0]), ""], rest  # the keys of a dict
    for line in lines:
        if not line or line.startswith(" "):
            made.append("    " + escaped(line))
            continue
        # names that share a line, "u : (d_out, rank), v : (d_in, rank)", get their own
        several = line.count(" : ") > 1
        for term in re.split(r"[,;] (?:and )?(?=\w+ : )| and (?=\w+ : )", line) if several else [line]:
            name, colon, kind = escaped(term).partition(" : ")
            made += [f"    **{name}**{colon}{kind}", "        ..", ""]  # the comment makes a definition of a mere term
    return made


def escaped(line: str) -> str:
    """Escape bars, stars and final underscores in a line, and link arXiv numbers."""
    pieces = re.split(r"(`[^`]*`)", line)
    pieces[::2] = [re.sub(r"([\\|*]|_\b(?!\w))", r"\\\1", piece) for piece in pieces[::2]]
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"`arXiv \1 <https://arxiv.org/abs/\1>`__", "".join(pieces))
