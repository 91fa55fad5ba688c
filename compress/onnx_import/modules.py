"""ONNX operators with weights, and those for which torch has a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.fx
from numpy.typing import NDArray
from torch import nn

from compress.onnx_import.operators import SamePad

if TYPE_CHECKING:
    from compress.onnx_import.reading import Reader

__all__ = ["LAYERS", "Unsupported"]

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_MAX_POOLS: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_MEAN_POOLS: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_ZERO_PADS: dict[int, Any] = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}
_NORMS: dict[int, Any] = {
    1: nn.BatchNorm1d,
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


class Unsupported(Exception):
    """What this importer does not do with a node."""


def _parameter(value: NDArray) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.array(value, np.float32)))


def _set(layer: nn.Module, weight: NDArray, bias: NDArray | None) -> nn.Module:
    layer.weight = _parameter(weight)
    layer.register_parameter("bias", None if bias is None else _parameter(bias.reshape(-1)))
    return layer


def _weights(reader: Reader, node: Any) -> tuple[NDArray, NDArray | None]:
    weight = reader.constant(node.input[1])
    has_bias = len(node.input) > 2 and node.input[2] != ""
    bias = reader.constant(node.input[2]) if has_bias else None
    if weight is None or (has_bias and bias is None):
        raise Unsupported("has a weight or bias that is computed from the input")
    return weight, bias


def _key(node: Any, attributes: dict[str, Any]) -> tuple[object, ...]:
    return (node.op_type, *node.input[1:], str(sorted(attributes.items())))


def _convolution(reader: Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node:
    weight, bias = _weights(reader, node)
    rank = weight.ndim - 2
    if rank not in _CONVOLUTIONS:
        raise Unsupported(f"has {rank} spatial dimensions")
    name = reader.layer_name(node, node.input[1], index)
    stride, dilation = (attributes.get(key, [1] * rank) for key in ("strides", "dilations"))
    source, padding = _padded(reader, node, attributes, weight.shape[2:], f"{name}_pad", 0.0)

    def make() -> nn.Module:
        with torch.device("meta"):
            layer = _CONVOLUTIONS[rank](
                weight.shape[1] * attributes.get("group", 1),
                weight.shape[0],
                tuple(weight.shape[2:]),
                stride=tuple(stride),
                padding=padding,
                dilation=tuple(dilation),
                groups=attributes.get("group", 1),
            )
        return _set(layer, weight, bias)

    return reader.layer(_key(node, attributes), name, make, source)


def _padded(
    reader: Reader, node: Any, attributes: dict[str, Any], kernel: Sequence[int], name: str, value: float
) -> tuple[torch.fx.Node, tuple[int, ...]]:
    """What a window operation reads, padded by a module where it cannot pad alike on both sides by itself."""
    rank, source = len(kernel), reader.source_node(node)
    stride, dilation = (attributes.get(key, [1] * rank) for key in ("strides", "dilations"))
    automatic = attributes.get("auto_pad", "NOTSET")
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        if all(one == 1 for one in stride) and all(
            d * (k - 1) % 2 == 0 for d, k in zip(dilation, kernel, strict=True)
        ):
            return source, tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
        pad = SamePad(kernel, stride, dilation, automatic == "SAME_UPPER", value)
        return reader.call(reader.free(name), pad, source), (0,) * rank
    pads = [0] * 2 * rank if automatic == "VALID" else attributes.get("pads", [0] * 2 * rank)
    before, after = pads[:rank], pads[rank:]
    if before == after and all(pad >= 0 for pad in before):
        return source, tuple(before)
    if value:
        raise Unsupported("pads differently on both sides")
    sides = [side for axis in reversed(range(rank)) for side in (before[axis], after[axis])]
    return reader.call(reader.free(name), _ZERO_PADS[rank](tuple(sides)), source), (0,) * rank


def _transposed(reader: Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node:
    weight, bias = _weights(reader, node)
    rank, groups = weight.ndim - 2, attributes.get("group", 1)
    pads = attributes.get("pads", [0] * 2 * rank)
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or "output_shape" in attributes:
        raise Unsupported("has auto_pad or output_shape")
    if pads[:rank] != pads[rank:] or rank not in _TRANSPOSED:
        raise Unsupported(f"pads {pads} over {rank} dimensions: only alike on both sides, of 1 to 3")

    def make() -> nn.Module:
        with torch.device("meta"):
            layer = _TRANSPOSED[rank](
                weight.shape[0],
                weight.shape[1] * groups,
                tuple(weight.shape[2:]),
                stride=tuple(attributes.get("strides", [1] * rank)),
                padding=tuple(pads[:rank]),
                output_padding=tuple(attributes.get("output_padding", [0] * rank)),
                groups=groups,
                dilation=tuple(attributes.get("dilations", [1] * rank)),
            )
        return _set(layer, weight, bias)

    name = reader.layer_name(node, node.input[1], index)
    return reader.layer(_key(node, attributes), name, make, reader.source_node(node))


def _linear(weight: NDArray, bias: NDArray | None) -> nn.Module:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    return _set(layer, weight, bias)


def _gemm(reader: Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node:
    weight, bias = _weights(reader, node)
    if attributes.get("transA", 0):
        raise Unsupported("transposes its input")
    weight = weight if attributes.get("transB", 0) else weight.T
    weight = weight * np.float32(attributes.get("alpha", 1.0))
    if bias is not None and bias.ndim > 1 and bias.shape[0] > 1:
        raise Unsupported(f"adds a matrix {list(bias.shape)} in place of a bias")
    if bias is not None:
        bias = np.broadcast_to(bias.reshape(-1) * np.float32(attributes.get("beta", 1.0)), weight.shape[:1])
    name = reader.layer_name(node, node.input[1], index)
    return reader.layer(_key(node, attributes), name, lambda: _linear(weight, bias), reader.source_node(node))


def _matmul(reader: Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node | None:
    """A layer where the right side is stored; else an operator between two results."""
    weight = reader.constant(node.input[1])
    if weight is None or weight.ndim != 2 or not isinstance(reader.values[node.input[0]], torch.fx.Node):
        return None
    name = reader.layer_name(node, node.input[1], index)
    key = _key(node, attributes)
    if reader.uses[node.output[0]] == 1:
        key = (*key, node.output[0])  # an addition behind it may become its bias
    return reader.layer(key, name, lambda: _linear(weight.T, None), reader.source_node(node))


def _add(reader: Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node | None:
    """A bias that is added behind a layer becomes the layer's."""
    for ours, theirs in ((0, 1), (1, 0)):
        before, bias = reader.values[node.input[ours]], reader.constant(node.input[theirs])
        if bias is None or not isinstance(before, torch.fx.Node) or reader.uses[node.input[ours]] != 1:
            continue
        layer = reader.of_layer.get(before)
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or layer.bias is not None:
            continue
        shared = sum(1 for other in reader.graph.nodes if other.target == before.target) > 1
        channels, rank = layer.weight.shape[0], layer.weight.dim() - 2
        fits = (
            bias.shape == (channels,)
            if rank == 0
            else bias.shape in ((channels, *(1,) * rank), (1, channels, *(1,) * rank))
        )
        if fits and not shared:
            layer.bias = _parameter(bias.reshape(-1))
            reader.layers = {key: name for key, name in reader.layers.items() if name != before.target}
            return before
    return None


def _batch_norm(reader: Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node | None:
    """A module where a layer shows how many dimensions there are; else an operator for any number."""
    values = [reader.constant(name) for name in node.input[1:5]]
    if attributes.get("training_mode", 0) or any(value is None for value in values):
        raise Unsupported("is in training mode, or has parameters that are computed")
    scale, shift, mean, variance = (np.array(value, np.float32) for value in values)
    source = reader.source_node(node)
    before = reader.of_layer.get(source)
    if not isinstance(before, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    norm = _NORMS[before.weight.dim()](len(scale), eps=attributes.get("epsilon", 1e-5))
    norm.weight, norm.bias = _parameter(scale), _parameter(shift)
    norm.running_mean, norm.running_var = torch.from_numpy(mean), torch.from_numpy(variance)
    name = reader.layer_name(node, node.input[1], index)
    return reader.call(reader.free(name), norm, source)


def _relu(reader: Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node:
    return reader.call(reader.free(f"relu_{index}"), nn.ReLU(), reader.source_node(node))


def _clip(reader: Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node | None:
    """Between 0 and 6 it is a ReLU6, which the requantiser can carry out."""
    limits = [attributes.get("min"), attributes.get("max")]
    for place, name in enumerate(node.input[1:3]):
        value = reader.constant(name) if name else None
        limits[place] = limits[place] if value is None else float(value)
    if limits != [0.0, 6.0] or not isinstance(reader.values[node.input[0]], torch.fx.Node):
        return None
    return reader.call(reader.free(f"relu6_{index}"), nn.ReLU6(), reader.source_node(node))


def _pool(reader: Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node:
    kernel = attributes["kernel_shape"]
    rank = len(kernel)
    if rank not in _MAX_POOLS:
        raise Unsupported(f"has {rank} spatial dimensions")
    is_max = node.op_type == "MaxPool"
    settings: dict[str, Any] = {
        "stride": tuple(attributes.get("strides", [1] * rank)),
        "ceil_mode": bool(attributes.get("ceil_mode", 0)),
    }
    source, padding = _padded(reader, node, attributes, kernel, f"pad_{index}", -np.inf if is_max else 0.0)
    if is_max:
        pool: nn.Module = _MAX_POOLS[rank](
            tuple(kernel),
            padding=padding,
            dilation=tuple(attributes.get("dilations", [1] * rank)),
            **settings,
        )
    else:
        includes = bool(attributes.get("count_include_pad", 0))
        if any(step != 1 for step in attributes.get("dilations", ())):
            raise Unsupported("is dilated")
        if source is not reader.source_node(node) and not includes:
            raise Unsupported("leaves a padding out of its mean that differs on both sides")
        pool = _MEAN_POOLS[rank](tuple(kernel), padding=padding, count_include_pad=includes, **settings)
    return reader.call(reader.free(f"{node.op_type.lower()}_{index}"), pool, source)


def _softmax(reader: Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node | None:
    """Before opset 13 the axes from the given one on are taken together, and the default is the second."""
    if max(one.version for one in reader.proto.opset_import if one.domain in ("", "ai.onnx")) < 13:
        attributes |= {"axis": attributes.get("axis", 1), "is_flat": True}
    return None


def _resize(reader: Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node | None:
    """Refuses what torch's interpolation does not do."""
    mode = attributes.get("mode", "nearest")
    coordinates = attributes.get("coordinate_transformation_mode", "half_pixel")
    known = [
        "half_pixel",
        "pytorch_half_pixel",
        "align_corners",
        *(["asymmetric"] if mode == "nearest" else []),
    ]
    if coordinates not in known:
        raise Unsupported(f"has the coordinates {coordinates}; with {mode} only {', '.join(known)}")
    usual = {
        "antialias": 0,
        "exclude_outside": 0,
        "keep_aspect_ratio_policy": "stretch",
        "axes": None,
        **({"cubic_coeff_a": -0.75} if mode == "cubic" else {}),
    }
    other = [name for name, value in usual.items() if attributes.get(name, value) != value]
    if other:
        raise Unsupported(f"has {', '.join(f'{name} {attributes[name]}' for name in other)}")
    return None


LAYERS: dict[str, Callable[[Reader, Any, dict[str, Any], int], torch.fx.Node | None]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _add,
    "BatchNormalization": _batch_norm,
    "Relu": _relu,
    "Clip": _clip,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "Resize": _resize,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
}
