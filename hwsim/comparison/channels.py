"""Channel pruning: smaller dense layers that any dense machine runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hwsim.layer import LayerShape

__all__ = ["prune_channels"]


def prune_channels(shapes: Sequence[LayerShape], kept_weights: int) -> list[LayerShape]:
    """The network with every inner width scaled by one factor, so that it has as nearly as possible ``kept_weights`` weights.

    The network's inputs and outputs keep their width. A width that occurs several times becomes the same width everywhere, so
    residual additions still fit. The inputs of a layer shrink with the outputs that feed it: inputs as wide as an earlier
    layer's outputs follow those; a linear layer behind a flattened image keeps its positions per channel; others (behind a
    concatenation) keep their width. A depthwise layer loses whole groups; other groups stay, with a multiple of them as width.

    Source: one factor for all widths: the uniform baseline (width multiplier) of Howard et al., MobileNets, arXiv 1704.04861,
    2017, and of He et al., AMC, ECCV 2018.

    Parameters
    ----------
    shapes : sequence of LayerShape
        In execution order.
    kept_weights : int
        Of all layers together.

    Examples
    --------
    >>> fc = [LayerShape("a", "linear", 100, 200), LayerShape("b", "linear", 200, 10)]
    >>> [(shape.in_channels, shape.out_channels) for shape in prune_channels(fc, 11_000)]
    [(100, 100), (100, 10)]
    """
    widest = max(shape.out_channels for shape in shapes)
    low, high = 1, 8 * widest  # the factor in eighths of a channel of the widest layer
    while low < high:
        middle = (low + high + 1) // 2
        if _weights(_scaled(shapes, middle, 8 * widest)) <= kept_weights:
            low = middle
        else:
            high = middle - 1
    below = _scaled(shapes, low, 8 * widest)
    above = _scaled(shapes, min(low + 1, 8 * widest), 8 * widest)
    return min(below, above, key=lambda found: abs(_weights(found) - kept_weights))


def _weights(shapes: Sequence[LayerShape]) -> int:
    return sum(shape.weight_count for shape in shapes)


def _scaled(shapes: Sequence[LayerShape], factor: int, whole: int) -> list[LayerShape]:
    def width(channels: int, multiple: int = 1) -> int:
        units = channels // multiple
        return multiple * max(1, (2 * units * factor + whole) // (2 * whole))

    result: list[LayerShape] = []
    widths: dict[int, int] = {}  # of earlier outputs, before and after
    for index, shape in enumerate(shapes):
        depthwise = shape.groups > 1 and shape.groups == shape.in_channels
        inputs = shape.in_channels if index == 0 else _inputs(shape, widths)
        if shape.groups > 1 and not depthwise:
            inputs = width(shape.in_channels, shape.groups)
        groups = inputs if depthwise else shape.groups
        if index == len(shapes) - 1:
            outputs = shape.out_channels
        elif depthwise:
            outputs = inputs * (shape.out_channels // shape.groups)
        else:
            outputs = width(shape.out_channels, shape.groups)
        widths[shape.out_channels] = outputs
        result.append(replace(shape, in_channels=inputs, out_channels=outputs, groups=groups))
    return result


def _inputs(shape: LayerShape, widths: dict[int, int]) -> int:
    if shape.in_channels in widths:
        return widths[shape.in_channels]
    for before, after in reversed(widths.items()):
        if shape.kind == "linear" and shape.in_channels % before == 0:
            return shape.in_channels // before * after
    return shape.in_channels
