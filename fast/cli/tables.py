"""Lay out the commands' results as text."""

from collections.abc import Mapping, Sequence
from typing import Any


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out rows with equal keys as text, under the keys; only the first column is aligned to the left.

    Examples
    --------
    >>> print(text_table([{"engine": "littlebit", "ms": 3.25}, {"engine": "torch", "ms": 12.5}]))
    engine       ms
    littlebit  3.25
    torch      12.5
    """
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def checkpoint_summary(stored: Mapping[str, Any]) -> str:
    """Describe in one line what `info` counted in a packed checkpoint."""
    return (
        f"{stored['bits_per_weight']:.4f} bits per weight stored in {stored['layers']} layers "
        f"({stored['described_bits_per_weight']:.4f} with the names, checksums and config.json beside them), "
        f"{stored['linear_bytes']:,} bytes of linear weights, {stored['file_bytes']:,} bytes in all "
        f"({stored['file_bits_per_parameter']:.3f} bits per parameter; embeddings of {stored['embedding_bits']} bits)"
    )
