"""What the user's own figure of merit says of a network, in a form that files can keep."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["figure_of_merit"]

_log = logging.getLogger(__name__)


def figure_of_merit(evaluate: Callable[[Any], float] | None, model: Any) -> float | None:
    """``evaluate(model)``, called without gradients; None without ``evaluate``.

    Also None, with a warning, where it is NaN or infinite (the signal-to-noise ratio of an exact copy): no file holds such a
    number, and a compression is not lost for it.
    """
    if evaluate is None:
        return None
    with torch.no_grad():
        figure = float(evaluate(model))
    if math.isfinite(figure):
        return figure
    _log.warning("evaluate gave %s, which no file holds: the figure is left out", figure)
    return None
