"""Plain tables that fit a terminal: numbers are shortened to three digits and a prefix, never cut; texts give way."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["format_table", "short_number", "time_text"]

_LEAST_TEXT = 6


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
    """Rows of the same keys as text, numbers to the right, texts to the left.

    Where space is short, names stand in several lines, broken after ``_``, ``.`` and spaces; then texts are cut at their
    front, the widest first.

    Parameters
    ----------
    rows : sequence of mappings
        At least one.
    width : int or None
        Characters of a line; the terminal's by default.

    Examples
    --------
    >>> print(format_table([{"layer": "conv1", "latency_cycles": 4805, "energy_pj": 1.5}], width=20))
           latency_  energy_
    layer    cycles       pj
    conv1      4.8k     1.50
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    names = list(rows[0])
    texts = [isinstance(rows[0][name], str) for name in names]
    cells = [
        [row[name] if text else short_number(row[name]) for name, text in zip(names, texts, strict=True)]
        for row in rows
    ]
    columns = list(zip(*cells, strict=True))
    heads = [[str(name)] for name in names]
    widths = _widths(heads, columns)
    if _excess(widths, width) > 0:
        heads = [
            _folded(str(name), max(map(len, column))) for name, column in zip(names, columns, strict=True)
        ]
        widths = _widths(heads, columns)
    while (excess := _excess(widths, width)) > 0:
        least = [max(_LEAST_TEXT, *map(len, head)) for head in heads]
        longer = [i for i, text in enumerate(texts) if text and widths[i] > least[i]]
        if not longer:
            break
        widest = max(longer, key=lambda i: widths[i])
        widths[widest] = max(widths[widest] - excess, least[widest])
    height = max(map(len, heads))
    upright = [[""] * (height - len(head)) + head for head in heads]
    lines = []
    for line in [*zip(*upright, strict=True), *cells]:
        parts = [
            _cut(cell, size).ljust(size) if text else cell.rjust(size)
            for cell, size, text in zip(line, widths, texts, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _widths(heads: Sequence[Sequence[str]], columns: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, [*head, *column])) for head, column in zip(heads, columns, strict=True)]


def _excess(widths: Sequence[int], width: int) -> int:
    return sum(widths) + 2 * (len(widths) - 1) - width


def _folded(name: str, width: int) -> list[str]:
    """A name in lines no longer than ``width`` or its longest word."""
    words = re.findall(r"[^_. ]+[_. ]*|[_. ]+", name)
    width = max([width, *(len(word.rstrip(" ")) for word in words)])
    lines = [""]
    for word in words:
        if len((lines[-1] + word).rstrip(" ")) <= width:
            lines[-1] += word
        else:
            lines.append(word)
    return [line.rstrip(" ") for line in lines]


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else "…" + text[len(text) - size + 1 :]
