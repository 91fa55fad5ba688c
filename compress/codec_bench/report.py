"""The table of a comparison, as Markdown."""

from __future__ import annotations

from typing import Any

__all__ = ["markdown"]

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"

COLUMNS = ("network", "weights", "coder", "bytes", "quality", "enc MB/s", "dec MB/s", "peak MB")


def markdown(document: dict[str, Any]) -> str:
    """The weights as given, NNCodec and ours, one under the other."""
    lines = [" | ".join(("", *COLUMNS, "")).strip(), "|" + "---|" * len(COLUMNS)]
    for row in document["rows"]:
        lines += [" | ".join(("", *cells, "")).strip() for cells in _cells(row)]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[tuple[str, ...]]:
    first = (row["network"], row["weights"])
    found: list[tuple[str, ...]] = []
    if "given" in row:
        found.append(
            (*first, "as given, fp32", f"{row['fp32_bytes']:,}", f"{row['given']:.2f} %", "", "", "")
        )
    if "nncodec" in row:
        chosen = row["nncodec"]["chosen"]
        found.append((*first, f"NNCodec, qp {chosen['qp']}", *_figures(row, chosen, chosen)))
    for key, label in (("ours", ""), ("ours_refitted", ", biases refitted")):
        if key in row:
            for preset in ("small", "fast"):
                found.append((*first, f"{preset}{label}", *_figures(row, row[key], row[key][preset])))
    return found


def _figures(row: dict[str, Any], point: dict[str, Any], measured: dict[str, Any]) -> tuple[str, ...]:
    quality = f"{point['accuracy']:.2f} %" if row["quality"] == "accuracy" else f"{point['snr_db']:.2f} dB"
    speeds = (row["fp32_bytes"] / measured[key] / 1e6 for key in ("encode_s", "decode_s"))
    return (
        f"{measured['size_bytes']:,}",
        quality,
        *(f"{speed:.0f}" for speed in speeds),
        f"{measured['peak_mb']:.0f}",
    )
