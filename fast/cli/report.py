"""Report how well layers were quantized: a table by layer type, and an HTML page with charts."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.atomic import write_text
from ..models.packed_shapes import layer_type as type_of_layer

if TYPE_CHECKING:
    from ..models.results import LayerResult

COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")
WIDTH, HEIGHT, MARGIN = 900, 260, 40  # of a chart, in pixels
STYLE = "body{font:15px sans-serif;max-width:960px;margin:2em auto}table{border-collapse:collapse}"
STYLE += "td,th{padding:.2em .8em;text-align:right}td:first-child,th:first-child{text-align:left}"


def summarize_layer_types(results: Mapping[str, "LayerResult"]) -> list[dict[str, Any]]:
    """Summarize results by layer type: count, shape, total rank, paths, mean bits and mean relative error."""
    groups: dict[str, list[LayerResult]] = {}
    for name, result in results.items():
        groups.setdefault(type_of_layer(name), []).append(result)
    rows = []
    for layer_type, group in groups.items():
        ranks = [sum(result.ranks) for result in group]
        paths = [len(result.ranks) for result in group]
        rows.append(
            {
                "layer type": layer_type,
                "layers": len(group),
                "d_out x d_in": f"{group[0].d_out} x {group[0].d_in}",
                "rank": text_range(ranks),
                "paths": text_range(paths),
                "bits": f"{sum(result.bits for result in group) / len(group):.3f}",
                "rel. error": f"{sum(result.error for result in group) / len(group):.3f}",
            }
        )
    return rows


def text_range(values: list[int]) -> str:
    """Write the smallest and the largest value as `low-high`, or as one number if they are equal."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def html_report(path: Path, title: str, summary: str, results: Mapping[str, "LayerResult"]) -> None:
    """Write a self-contained page: the table by layer type, and charts of every layer's error and stored bits."""
    rows = summarize_layer_types(results)
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in rows[0])
    cells = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row.values()) for row in rows)
    table = f"<table><tr>{heads}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
    charts = (
        f"<h2>{html.escape(caption)}</h2>{bar_chart(results, field)}"
        for caption, field in (("Relative error of each layer", "error"), ("Stored bits per weight", "bits"))
    )
    write_text(
        path,
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(summary)}</p>{table}{''.join(charts)}\n",
    )


def bar_chart(results: Mapping[str, "LayerResult"], field: str) -> str:
    """Draw a bar for each layer as SVG, colored by layer type; its tooltip shows the layer's name and value."""
    layer_types = list(dict.fromkeys(type_of_layer(name) for name in results))
    colors = {layer_type: COLORS[at % len(COLORS)] for at, layer_type in enumerate(layer_types)}
    top = max(getattr(result, field) for result in results.values()) or 1.0
    step = (WIDTH - MARGIN) / len(results)
    parts = [f"<svg viewBox='0 0 {WIDTH} {HEIGHT + MARGIN}' role='img'>"]
    for at, (name, result) in enumerate(results.items()):
        value = getattr(result, field)
        tall = value / top * (HEIGHT - 20)
        parts.append(
            f"<rect x='{MARGIN + at * step:.2f}' y='{HEIGHT - tall:.2f}' width='{max(step * 0.85, 0.5):.2f}' "
            f"height='{tall:.2f}' fill='{colors[type_of_layer(name)]}'>"
            f"<title>{html.escape(name)}: {value:.4f}</title></rect>"
        )
    for value in (0.0, top / 2, top):
        parts.append(f"<text x='0' y='{HEIGHT - value / top * (HEIGHT - 20):.2f}' font-size='12'>{value:.3g}</text>")
    for at, layer_type in enumerate(layer_types):
        x = MARGIN + at * (WIDTH - MARGIN) / len(layer_types)
        label = html.escape(layer_type)
        parts.append(f"<text x='{x:.0f}' y='{HEIGHT + 25}' font-size='12' fill='{colors[layer_type]}'>{label}</text>")
    return "".join([*parts, "</svg>"])
