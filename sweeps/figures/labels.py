"""Texts beside points, where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

__all__ = ["label_points"]

_LABEL_PLACES = [
    (dx * reach, dy * reach, ha, va)
    for reach in (6, 10)
    for dx, dy, ha, va in (
        (1, 0, "left", "center"),
        (-1, 0, "right", "center"),
        (0, 1, "center", "bottom"),
        (0, -1, "center", "top"),
        (0.7, 0.7, "left", "bottom"),
        (0.7, -0.7, "left", "top"),
        (-0.7, 0.7, "right", "bottom"),
        (-0.7, -0.7, "right", "top"),
    )
]


def label_points(
    axes: Axes,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    texts: Sequence[str],
    avoid: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> None:
    """Write a text beside each point where there is room: off all points, lines and other texts, inside the axes.

    A point without room gets none; the figure's data names them all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = axes.get_figure(root=True)
    assert figure is not None
    assert isinstance(figure.canvas, FigureCanvasAgg)
    figure.draw_without_rendering()  # settles the layout, so that places on the page are final
    renderer = figure.canvas.get_renderer()
    obstacles = np.concatenate(
        [axes.transData.transform(np.column_stack([xs, ys])) for xs, ys in [(x, y), *avoid]]
    )
    margin = 2.5 / 72 * figure.dpi
    taken: list[Bbox] = []
    seen: set[tuple[float, float, str]] = set()
    for px, py, text in zip(x, y, texts, strict=True):
        if (px, py, text) in seen:
            continue
        seen.add((px, py, text))
        label = axes.annotate(text, (px, py), (0, 0), textcoords="offset points", fontsize=7)
        for dx, dy, ha, va in _LABEL_PLACES:
            label.set(position=(dx, dy), ha=ha, va=va)
            box = label.get_window_extent(renderer)
            padded = box.padded(margin)
            inside = np.all(padded.min >= axes.bbox.min) and np.all(padded.max <= axes.bbox.max)
            if inside and not box.count_overlaps(taken) and not _holds_any(padded, obstacles):
                taken.append(box)
                break
        else:
            label.remove()


def _holds_any(box: Bbox, places: NDArray[np.float64]) -> bool:
    return bool(((places > box.min) & (places < box.max)).all(axis=1).any())
