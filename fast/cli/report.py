"""Reports of a quantisation: a table by kind of layer as text, and a page with pictures as HTML, complete in itself."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files.atomic import write_text
from ..models.packed_shapes import layer_type
from ..models.quantize import LayerResult

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")
WIDTH, HEIGHT, MARGIN = 900, 260, 40
STYLE = "body{font:15px sans-serif;max-width:960px;margin:2em auto}table{border-collapse:collapse}"
STYLE += "td,th{padding:.2em .8em;text-align:right}td:first-child,th:first-child{text-align:left}"


def kinds_of(results: Mapping[str, LayerResult]) -> list[dict[str, Any]]:
    """One row for each kind of layer: layers, sizes, smallest and largest total rank, paths, mean bits and error."""
    kinds: dict[str, list[LayerResult]] = {}
    for name, result in results.items():
        kinds.setdefault(layer_type(name), []).append(result)
    rows = []
    for kind, group in kinds.items():
        ranks = [sum(result.ranks) for result in group]
        paths = sorted({len(result.ranks) for result in group})
        rows.append(
            {
                "kind": kind,
                "layers": len(group),
                "d_out x d_in": f"{group[0].d_out} x {group[0].d_in}",
                "rank": between(min(ranks), max(ranks)),
                "paths": between(paths[0], paths[-1]),
                "bits": f"{sum(result.bits for result in group) / len(group):.3f}",
                "rel. error": f"{sum(result.error for result in group) / len(group):.3f}",
            }
        )
    return rows


def between(low: int, high: int) -> str:
    """One number, or the first and the last of several."""
    return str(low) if low == high else f"{low}-{high}"


def kind_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as text in columns."""
    heads = list(rows[0])
    widths = [max(len(str(each[head])) for each in [dict(zip(heads, heads, strict=True)), *rows]) for head in heads]
    lines = [heads, *([str(row[head]) for head in heads] for row in rows)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def html_report(path: Path, title: str, summary: str, results: Mapping[str, LayerResult]) -> None:
    """Write a page with the table, and the error and the stored bits of every layer as pictures."""
    rows = kinds_of(results)
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in rows[0])
    cells = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row.values()) for row in rows)
    table = f"<table><tr>{heads}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
    pictures = (
        f"<h2>{html.escape(caption)}</h2>{picture(results, field)}"
        for caption, field in (("Relative error, layer by layer", "error"), ("Stored bits per weight", "bits"))
    )
    write_text(
        path,
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(summary)}</p>{table}{''.join(pictures)}\n",
    )


def picture(results: Mapping[str, LayerResult], field: str) -> str:
    """A bar for each layer, in the model's order, coloured by kind, as SVG; the pointer shows its name and value."""
    kinds = list(dict.fromkeys(layer_type(name) for name in results))
    colours = {kind: COLOURS[at % len(COLOURS)] for at, kind in enumerate(kinds)}
    top = max(getattr(result, field) for result in results.values()) or 1.0
    step = (WIDTH - MARGIN) / len(results)
    parts = [f"<svg viewBox='0 0 {WIDTH} {HEIGHT + MARGIN}' role='img'>"]
    for at, (name, result) in enumerate(results.items()):
        value = getattr(result, field)
        tall = value / top * (HEIGHT - 20)
        parts.append(
            f"<rect x='{MARGIN + at * step:.2f}' y='{HEIGHT - tall:.2f}' width='{max(step * 0.85, 0.5):.2f}' "
            f"height='{tall:.2f}' fill='{colours[layer_type(name)]}'>"
            f"<title>{html.escape(name)}: {value:.4f}</title></rect>"
        )
    for value in (0.0, top / 2, top):
        parts.append(f"<text x='0' y='{HEIGHT - value / top * (HEIGHT - 20):.2f}' font-size='12'>{value:.3g}</text>")
    for at, kind in enumerate(kinds):
        x = MARGIN + at * (WIDTH - MARGIN) / len(kinds)
        parts.append(
            f"<text x='{x:.0f}' y='{HEIGHT + 25}' font-size='12' fill='{colours[kind]}'>{html.escape(kind)}</text>"
        )
    return "".join([*parts, "</svg>"])
