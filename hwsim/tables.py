"""Plain tables that fit a terminal: numbers are shortened to three digits and a prefix, never cut; texts give way."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["format_table", "short_number", "time_text"]


def short_number(value: float) -> str:
    """Three significant digits and a decimal prefix from a thousand on.

    >>> short_number(1719752), short_number(999.4), short_number(12), short_number(0.5)
    ('1.72M', '999.40', '12', '0.50')
    """
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            scaled = value / limit
            return f"{scaled:.3g}{prefix}" if abs(scaled) < 999.5 else f"{scaled:.0f}{prefix}"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def time_text(milliseconds: float) -> str:
    """A time with its unit, in µs below a tenth of a millisecond.

    >>> time_text(2.5), time_text(0.007622)
    ('2.5 ms', '7.622 µs')
    """
    return f"{milliseconds:.4g} ms" if milliseconds >= 0.1 else f"{milliseconds * 1e3:.4g} µs"


def format_table(rows: Sequence[Mapping[Any, Any]], width: int | None = None) -> str:
    """Rows of the same keys as text, numbers to the right, texts to the left and cut at their front where space is short.

    Parameters
    ----------
    rows : sequence of mappings
        At least one.
    width : int or None
        Characters of a line; the terminal's by default.
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    names = list(rows[0])
    texts = [isinstance(rows[0][name], str) for name in names]
    cells = [
        [row[name] if text else short_number(row[name]) for name, text in zip(names, texts, strict=True)]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]
    widest = max((i for i, text in enumerate(texts) if text), key=lambda i: widths[i], default=None)
    if widest is not None:
        excess = sum(widths) + 2 * (len(widths) - 1) - width
        widths[widest] = max(widths[widest] - max(excess, 0), len(names[widest]), 6)
    lines = []
    for line in [names, *cells]:
        parts = [
            _cut(cell, size).ljust(size) if text else cell.rjust(size)
            for cell, size, text in zip(line, widths, texts, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else "…" + text[len(text) - size + 1 :]
