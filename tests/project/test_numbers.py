"""Numbers of the book: none that was measured is typed, each follows its file. What else pages name exists."""

import html
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOOK = ROOT / "book"
sys.path[:0] = [str(BOOK / folder) for folder in ("_ext", "experiments", "figures")]

import make  # noqa: E402 (the path comes first)
import pages  # noqa: E402
import remake  # noqa: E402
import sources  # noqa: E402
import stale  # noqa: E402
import tables  # noqa: E402
from littlebit.fast.cli.main import COMMANDS, build_parser  # noqa: E402
from littlebit.fast.files.digests import code_digest  # noqa: E402

PAGES = {path.name: path.read_text() for path in sorted(BOOK.glob("*.md"))}
FIGURES = {name: make.script(name) for name in make.names()}
TABLES = [
    name
    for name, value in vars(tables).items()
    if callable(value) and value.__annotations__.get("return") is tables.Table
]

# What is not a page's own prose: code, mathematics, what is put in, targets of links, and quotations with a source.
NOT_PROSE = re.compile(
    r"""^```.*?^```|\{\{.*?\}\}|\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)|^>.*(?:arXiv|https:).*$
    |arXiv\ \d{4}\.\d{5}(?:v\d)?|CC\ BY(?:-NC)?\ \d\.\d""",
    re.S | re.M | re.X,
)
BUDGETS = {"0.1", "0.3", "0.55", "0.8", "1.0"}  # bits per weight that one asks for
WORDS = r"times|[mµu]?s|seconds?|minutes?|hours?|days?|[kMGT]i?B|bytes|nats?|tok(?:ens)?/s|tokens a second|PPL"
UNIT = rf"(?:%|x(?![ \w])|x(?= [a-z])|(?:{WORDS})\b)"
QUANTITY = r"(?:perplexity|PPL|accuracy|error|loss|speed-?up)"
NUMBER = r"(?<![\w.,^-])\d(?:[\d,]*\d)?(?:\.\d+)?(?![\d.,]*\d)"


def typed_measurements(text):
    """Numbers in the prose of a page that look measured.

    They are those with a decimal point (budgets excepted), with a unit of time, size, speed or proportion, after the
    name of what is measured, and alone in a table's cell.
    """
    prose = NOT_PROSE.sub(" ", text)
    found = [each for each in re.findall(NUMBER, prose) if "." in each and each not in BUDGETS]
    found += re.findall(rf"{NUMBER}\s?{UNIT}", prose)
    found += re.findall(rf"{QUANTITY}\s(?:\w+\s)?{NUMBER}", prose)
    return found + re.findall(rf"\|\s*\**{NUMBER}\**\s*(?=\|)", prose)


@pytest.mark.parametrize(
    "text",
    [
        "gave 2795.5 in the end",
        "at 0.526 stored bits",
        "by 26 %",
        "3x faster",
        "12.5x faster",
        "takes 40 ms",
        "40ms",
        "1,200 tokens a second",
        "26,000 tokens/s",
        "fits in 2 GB",
        "16 GiB",
        "a perplexity of 53",
        "perplexity 218",
        "an error of 1",
        "| base | 218 |",
        "| base | **145** | x |",
        "> we reached 40 ms\n",
        "after 25 s",
    ],
)
def test_typed_measurements_are_found(text):
    assert typed_measurements(text)


@pytest.mark.parametrize(
    "text",
    [
        "0.55 bits, 16 bits, one path of rank 96",
        "8 sequences of 512 tokens",
        'perplexity {{ measured("cpu_linear", "speedup") }} and `lr=0.004`',
        "Llama-2-7B, Table 3, arXiv 2602.06694v3",
        "$r = 0.5 x$ and\n\n$$\n1.5 GB\n$$\n",
        "```sh\nlittlebit --bits 0.7  # takes 40 ms\n```\n",
        '> "nearly 31x memory reduction" (arXiv 2506.13771)\n',
        "CC BY-NC 4.0",
        "[Table 3](figures.md#9.5-ms)",
    ],
)
def test_settings_and_sources_are_no_measurements(text):
    assert not typed_measurements(text)


@pytest.mark.parametrize("name", PAGES)
def test_no_page_has_a_typed_measurement(name):
    assert not typed_measurements(PAGES[name])


@pytest.mark.parametrize("name", FIGURES)
def test_no_caption_has_a_typed_measurement(name):
    assert not typed_measurements(FIGURES[name].CAPTION)


def test_results_say_how_they_were_measured():
    files = sorted((BOOK / "results").glob("*.json"))
    assert len(files) > 10
    for path in files:
        record = json.loads(path.read_text())
        assert {"command", "device", "commit", "versions", "rows"} <= set(record), path.name
        assert record["command"], path.name
        assert record["device"], path.name
        assert record["rows"], path.name


@pytest.mark.parametrize("name", stale.MEASURES)
def test_results_record_the_code_that_they_measure(name):
    """What changed is listed, and is no failure; but it must be known for each file."""
    assert stale.measured_code(name)


def test_results_name_modules_that_exist():
    patterns = {pattern for patterns in stale.MEASURES.values() for pattern in patterns}
    modules = {
        ".".join(path.relative_to(ROOT / "fast").with_suffix("").parts) for path in (ROOT / "fast").rglob("*.py")
    }
    assert patterns | set(stale.MOVED.values()) <= modules


def test_stale_results_are_listed_and_said_below_tables(tmp_path, monkeypatch):
    (now,) = [digest for digest in stale.digests_now() if digest == code_digest((ROOT / "fast" / "svd.py").read_text())]
    monkeypatch.setattr(stale, "RESULTS", tmp_path)
    monkeypatch.setattr(stale, "MEASURES", {"a": ("svd", "kernels.*"), "b": ("svd",)})
    code = {"svd": now, "kernels.new_name": "0" * 12, "kernels.old_name": now, "demo": "0" * 12}
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps({"code": code, "device": "a machine"}))
    assert stale.changed("a") == ["kernels.new_name"]
    assert stale.report(["a", "b"]) == "a is older than changes in kernels.new_name"
    assert stale.report(["b"]) == "no results are older than the code that they measure"
    monkeypatch.setattr(sources, "results", lambda name: json.loads((tmp_path / f"{name}.json").read_text()))
    assert "`results/a.json` (a machine; measured before changes in `kernels.new_name`)" in sources.origin(["a"])
    assert "`results/b.json` (a machine)" in sources.origin(["b"])


def test_results_are_made_again_by_commands_that_exist():
    again = []
    for path in sorted((BOOK / "results").glob("*.json")):
        record = json.loads(path.read_text())
        words = record["command"].split()
        if remake.reason_to_leave(record, words):
            continue
        again.append(path.stem)
        assert f"book/results/{path.name}" in words
        if words[0] == "python":
            assert (ROOT / words[1]).exists()
        else:
            build_parser().parse_args(words[1:])
    assert {"cpu_linear", "cpu_ladder", "explore", "memory", "spectra_smollm2"} <= set(again)


@pytest.mark.parametrize(
    ("device", "command", "reason"),
    [
        ("NVIDIA H100", "littlebit bench linear --save book/results/x.json", "NVIDIA H100"),
        ("a CPU", "a loop of quantize_", "description"),
        ("a CPU", "littlebit bench decode --model DIR --save book/results/x.json", "needs DIR"),
        ("a CPU", "python book/experiments/embeddings.py book/results/x.json --text missing.txt", "needs missing.txt"),
    ],
)
def test_results_that_a_cpu_cannot_make_are_left(device, command, reason):
    assert reason in remake.reason_to_leave({"device": device, "command": command}, command.split())


def test_published_figures_say_who_published_them():
    for each in sources.publications():
        assert {"model", "method", "metric", "value", "table", "source", "status"} <= set(each), each
        assert re.search(r"arXiv \d{4}\.\d{5}", each["source"]), each
        assert each["status"] in ("primary", "second-hand"), each


def scaled(value, factor):
    """JSON with every measured number, which is one with decimals, multiplied; budgets are what rows are found by."""
    if isinstance(value, dict):
        kept = ("bits", "bpw", "fractions")
        return {name: each if name in kept else scaled(each, factor) for name, each in value.items()}
    if isinstance(value, list):
        return [scaled(each, factor) for each in value]
    return value * factor if isinstance(value, float) else value


def made(name):
    """Make a table of the book, or of the paper."""
    return getattr(tables, name)() if name in TABLES else FIGURES[name].table()


MADE = [*TABLES, *(name for name in FIGURES if hasattr(FIGURES[name], "table"))]


@pytest.mark.parametrize(("name", "source"), [(name, source) for name in MADE for source in made(name).sources])
def test_tables_follow_each_of_their_files(name, source, monkeypatch):
    before, results, publications = made(name).rows, sources.results, sources.publications
    for module in (sources, tables, *FIGURES.values()):
        if hasattr(module, "results"):
            monkeypatch.setattr(module, "results", lambda file: scaled(results(file), 1.5 if file == source else 1))
        if hasattr(module, "publications"):
            monkeypatch.setattr(
                module, "publications", lambda: scaled(publications(), 1.5 if source == "published" else 1)
            )
    assert made(name).rows != before


@pytest.mark.parametrize("name", [name for name in FIGURES if hasattr(FIGURES[name], "alt")])
def test_figures_have_words(name):
    assert len(FIGURES[name].alt().split()) > 10
    assert "\n" not in FIGURES[name].alt()


def test_every_figure_and_table_of_the_paper_is_made_and_shown():
    wanted = {f"figure{at}" for at in range(1, 6)} | {f"table{at}" for at in range(1, 6)}
    assert wanted <= set(FIGURES)
    shown = set(re.findall(r'\{\{ figure\("(\w+)"\) \}\}', PAGES["figures.md"]))
    assert wanted <= shown
    for at in range(1, 6):
        assert f"Figure {at}," in PAGES["code.md"]
        assert f"Table {at}," in PAGES["code.md"]


def test_a_page_that_names_what_does_not_exist_is_refused():
    with pytest.raises(LookupError, match="0 rows"):
        pages.filled_in('{{ measured("cpu_linear", "speedup", d_out=1) }}')
    with pytest.raises(LookupError, match=r"published\.json has no"):
        pages.filled_in('{{ cited("wikitext2_ppl", "Llama-2-7B", "LittleBit", 0.2) }}')


def test_numbers_on_a_page_say_where_they_are_from():
    page = pages.filled_in(PAGES["paper.md"])
    titles = re.findall(r'<span class="sourced" title="([^"]*)">', page)
    assert len(titles) > 5
    assert all(
        re.match(r"measured: results/\w+\.json, |published: .*arXiv|computed from (?:results/|published)", title)
        for title in titles
    )


def test_functions_that_pages_name_exist():
    names = [name for text in PAGES.values() for name in re.findall(r"\{py:obj\}`~?([\w.]+)`", text)]
    assert len(names) > 25
    for name in names:
        module, parts = name.split("."), []
        while True:
            try:
                found = importlib.import_module(".".join(module))
                break
            except ModuleNotFoundError:
                parts.insert(0, module.pop())
        for part in parts:
            found = getattr(found, part)


def test_files_that_pages_name_exist():
    paths = [
        path
        for text in PAGES.values()
        for path in re.findall(r"`((?:book|tests|fast|reference|notebooks)/[\w./-]+)`", text)
    ]
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_commands_that_pages_name_exist():
    commands = {name for text in PAGES.values() for name in re.findall(r"`littlebit (\w+)", text)}
    assert commands
    assert commands <= set(COMMANDS)


def test_notebooks_that_pages_name_exist_if_there_are_notebooks():
    numbers = {int(at) for text in PAGES.values() for at in re.findall(r"\{\{ notebook\((\d+),", text)}
    assert numbers == set(range(1, 18))
    written = {int(path.name[:2]) for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert not written or numbers <= written


NUMBERS = {
    (None, 3): "",
    (7, 3): "7",
    (1234567, 3): "1,234,567",
    (0.0, 3): "0.00",
    (9.996, 3): "10.0",
    (123.4, 3): "123",
    (98765.4, 3): "98,800",
    (0.012345, 3): "0.0123",
    (1.3e10, 3): "1.30e+10",
    (0.00001, 2): "1.0e-05",
}


@pytest.mark.parametrize("given", NUMBERS)
def test_number_rounds(given):
    assert sources.number(*given) == NUMBERS[given]


def test_readme_has_the_numbers_of_the_results():
    readme = (ROOT / "README.md").read_text()
    assert readme == make.readme_with_results(readme), "make figures"
    for theme in make.style.THEMES:
        picture = (BOOK / f"readme-{theme.name}.svg").read_text()
        assert make.script("readme").alt() in html.unescape(picture), "make figures"


def test_figures_are_vectors_and_of_both_themes(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "OUT", tmp_path)
    make.write("starts")
    light, dark = (tmp_path / f"starts-{theme.name}.svg" for theme in make.style.THEMES)
    assert "<image" not in light.read_text()
    assert light.read_text() != dark.read_text()
    before = light.read_bytes()
    make.write("starts")
    assert light.read_bytes() == before
