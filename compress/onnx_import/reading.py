"""From an ONNX graph to a torch.fx graph: operators with weights become layers, all others modules of `Operator`."""

from __future__ import annotations

import hashlib
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.fx
from numpy.typing import NDArray
from torch import nn

from compress.onnx_import.operators import OPERATORS, Operator, SamePad, dtype_of
from hwsim.errors import FormatError, InputError, Problem, nearest_name

__all__ = ["ImportedNetwork", "import_onnx"]

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

FIRST_OPSET, LAST_OPSET = 7, 24
"""Of ONNX's default domain; within it the operators here mean the same, but for where they take their axes from."""


@dataclass(frozen=True, eq=False)
class ImportedNetwork:
    """A network from an ONNX file.

    Attributes
    ----------
    model : nn.Module
        In evaluation mode, with one tensor as its input.
    input_shape : tuple of int
        Of one input, without the batch.
    dtype : torch.dtype
        Of the input.
    source : str
        The file.
    sha256 : str
        Of the file.
    """

    model: nn.Module
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    source: str
    sha256: str


def import_onnx(
    file: str | Path | bytes, source: str = "", input_shape: tuple[int, ...] | None = None
) -> ImportedNetwork:
    """A torch network that computes what an ONNX file does.

    Convolutions, transposed convolutions, Gemm and MatMul with stored weights become layers, named after their weights or
    nodes where these have readable names.

    Parameters
    ----------
    file : str, Path or bytes
    source : str
        What messages call the file; its path by default.
    input_shape : tuple of int, optional
        Of one input, without the batch; needed where the file leaves dimensions open.

    Raises
    ------
    InputError
        The extra is not installed; an operator or a use of one that is not supported, all of them at once, by node; open
        dimensions; more than one input.
    FormatError
        Not an ONNX file.
    """
    try:
        import onnx
    except ImportError:
        hint = "pip install 'hwsim[onnx]'"
        raise InputError("onnx", Problem("", "the package onnx is not installed", hint)) from None
    name = source or (str(file) if not isinstance(file, bytes) else "ONNX file")
    try:
        if isinstance(file, bytes):
            proto, content = onnx.load_model_from_string(file), file
        else:
            proto, content = onnx.load(str(file)), Path(file).read_bytes()
    except OSError as error:
        raise InputError(name, f"cannot be read: {error.strerror or error}") from None
    except Exception as error:  # protobuf raises classes of its own
        raise FormatError(name, f"no ONNX file: {type(error).__name__}: {error}") from None
    if not proto.graph.node:
        raise FormatError(name, "no ONNX file, or one with an empty graph")
    graph = _Reader(proto, name)
    model = graph.read()
    shape, dtype = graph.input(input_shape)
    return ImportedNetwork(model.eval(), shape, dtype, name, hashlib.sha256(content).hexdigest())


class _Unsupported(Exception):
    """What this importer does not do with a node."""


class _Reader:
    """Builds the graph, node by node; constants are folded."""

    def __init__(self, proto: Any, source: str) -> None:
        from onnx import numpy_helper

        self.proto, self.source, self._array = proto, source, numpy_helper.to_array
        self.root, self.graph = nn.Module(), torch.fx.Graph()
        self.values: dict[str, torch.fx.Node | NDArray] = {
            tensor.name: self._array(tensor) for tensor in proto.graph.initializer
        }
        self.uses = Counter(name for node in proto.graph.node for name in node.input)
        self.uses.update(output.name for output in proto.graph.output)
        self.layers: dict[object, str] = {}
        self.of_layer: dict[torch.fx.Node, nn.Module] = {}

    def input(self, given: tuple[int, ...] | None) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape without the batch, and type, of the only input."""
        tensor = self._inputs()[0].type.tensor_type
        stated = tuple(dimension.dim_value for dimension in tensor.shape.dim)[1:]
        if given is None:
            if any(size < 1 for size in stated) or not tensor.shape.dim:
                shown = "x".join(str(size) if size > 0 else "?" for size in stated)
                hint = "say which: --input-shape 3x48x320, without the batch"
                raise InputError(
                    self.source, Problem("input_shape", f"the file leaves it open: {shown}", hint)
                )
            given = stated
        elif len(given) != len(stated) or any(
            size not in (0, -1, one) for size, one in zip(stated, given, strict=True)
        ):
            raise InputError(
                self.source, Problem("input_shape", f"{given}, the file says {stated} (0 is open)")
            )
        try:
            return given, dtype_of(tensor.elem_type)
        except KeyError:
            problem = Problem("input", f"is of ONNX type {tensor.elem_type}, which is not supported")
            raise InputError(self.source, problem) from None

    def _inputs(self) -> list[Any]:
        stored = {tensor.name for tensor in self.proto.graph.initializer}
        return [value for value in self.proto.graph.input if value.name not in stored]

    def read(self) -> torch.fx.GraphModule:
        problems = []
        inputs = self._inputs()
        if len(inputs) != 1:
            names = ", ".join(value.name for value in inputs)
            problems.append(
                Problem("inputs", f"{len(inputs)} ({names}), must be 1", "fix the others in the file")
            )
        for opset in self.proto.opset_import:
            if opset.domain in ("", "ai.onnx") and not FIRST_OPSET <= opset.version <= LAST_OPSET:
                allowed = f"supported are {FIRST_OPSET} to {LAST_OPSET}"
                problems.append(Problem("opset", f"{opset.version}; {allowed}", "onnx.version_converter"))
        for value in inputs:
            self.values[value.name] = self.graph.placeholder(_identifier(value.name))
        for index, node in enumerate(self.proto.graph.node):
            if any(name and name not in self.values for name in node.input):
                continue  # behind one that has been complained of
            try:
                self._add(node, index)
            except _Unsupported as reason:
                label = node.name or (node.output[0] if node.output else f"number {index}")
                problems.append(Problem(f"node {label} ({node.op_type})", str(reason)))
        if problems:
            raise InputError(self.source, problems)
        results = tuple(self._node(output.name) for output in self.proto.graph.output)
        self.graph.output(results[0] if len(results) == 1 else results)
        return torch.fx.GraphModule(self.root, self.graph)

    def _node(self, name: str) -> torch.fx.Node:
        value = self.values[name]
        if not isinstance(value, torch.fx.Node):
            raise InputError(
                self.source, Problem(f"output {name}", "does not depend on the input; nothing to run")
            )
        return value

    def _add(self, node: Any, index: int) -> None:
        attributes = _attributes(node)
        if node.op_type == "Constant":
            self.values[node.output[0]] = self._constant(attributes)
            return
        if node.domain not in ("", "ai.onnx"):
            raise _Unsupported(f"is of the domain {node.domain}; only ONNX's own operators are read")
        if node.op_type in ("Identity", "Dropout"):
            self.values[node.output[0]] = self.values[node.input[0]]
            return
        layer = _LAYERS.get(node.op_type)
        result = layer(self, node, attributes, index) if layer is not None else None
        if result is None:
            result = self._operator(node, attributes, index)
        if isinstance(result, list):
            self.values |= dict(zip(node.output, result, strict=False))
        else:
            if len([name for name in node.output[1:] if name and self.uses[name]]):
                raise _Unsupported("has more than one output that is used")
            self.values[node.output[0]] = result

    def _constant(self, attributes: dict[str, Any]) -> NDArray:
        for name, value in attributes.items():
            if name == "value":
                return self._array(value)
            if name.startswith(("value_int", "value_float")):
                return np.asarray(value, np.int64 if name.startswith("value_int") else np.float32)
        raise _Unsupported("holds no tensor")

    def constant(self, name: str) -> NDArray | None:
        """The value of an input that does not depend on the network's input."""
        value = self.values.get(name)
        return value if isinstance(value, np.ndarray) else None

    def _operator(self, node: Any, attributes: dict[str, Any], index: int) -> Any:
        kind = node.op_type
        if kind not in OPERATORS:
            known = (*OPERATORS, *_LAYERS, "Constant", "Identity", "Dropout")
            raise _Unsupported(f"this operator is not supported; {nearest_name(kind, known)}")
        if kind == "Split":
            attributes.setdefault("num_outputs", len(node.output))
        places, sources, constants = [], [], {}
        for place, name in enumerate(node.input):
            value = self.values.get(name) if name else None
            if isinstance(value, torch.fx.Node):
                places.append(place)
                sources.append(value)
            elif value is not None:
                constants[place] = _plain(value)
        if not sources:
            ordered = [constants.get(place) for place in range(len(node.input))]
            folded = OPERATORS[kind](*(_as_tensor(value) for value in ordered), **attributes)
            return [part.numpy() for part in folded] if isinstance(folded, tuple | list) else folded.numpy()
        module = Operator(kind, places, constants, attributes)
        result = self.call(self._free(f"{kind.lower()}_{index}"), module, *sources)
        if kind == "Split":
            return [
                self.graph.call_function(operator.getitem, (result, part)) for part in range(len(node.output))
            ]
        return result

    def call(self, name: str, module: nn.Module, *sources: torch.fx.Node) -> torch.fx.Node:
        """A node that runs a module, which is added under that name."""
        parent, _, child = name.rpartition(".")
        place = self.root
        for part in parent.split(".") if parent else ():
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(child, module)
        node = self.graph.call_module(name, tuple(sources))
        self.of_layer[node] = module
        return node

    def layer(
        self, key: tuple[object, ...], name: str, make: Callable[[], nn.Module], source: torch.fx.Node
    ) -> torch.fx.Node:
        """A node that runs a layer; layers of the same weights and settings are one module."""
        if key in self.layers:
            return self.graph.call_module(self.layers[key], (source,))
        self.layers[key] = self._free(name)
        return self.call(self.layers[key], make(), source)

    def layer_name(self, node: Any, weight: str, index: int) -> str:
        """After the weight (``features.0.weight``), else after the node (``/layers.0/q/MatMul``), else by number."""
        if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*\.weight", weight):
            return weight.removesuffix(".weight")
        parts = [part for part in node.name.strip("/").split("/") if part]
        if len(parts) > 1:
            return ".".join(_identifier(piece) for part in parts[:-1] for piece in part.split(".") if piece)
        return _identifier(node.name or weight.split(".")[0]) or f"{node.op_type.lower()}_{index}"

    def _free(self, name: str) -> str:
        """The name, or where a module is in the way, one like it."""
        names = {path for path, _ in self.root.named_modules()}
        layers = {path for path, module in self.root.named_modules() if type(module) is not nn.Module}
        wanted, number = name, 1
        while wanted in names or any(wanted.startswith(f"{layer}.") for layer in layers if layer):
            number += 1
            wanted = f"{name.replace('.', '_')}_{number}"
        return wanted

    def source_node(self, node: Any, place: int = 0) -> torch.fx.Node:
        value = self.values[node.input[place]]
        if not isinstance(value, torch.fx.Node):
            raise _Unsupported("works on constants only, which is not supported")
        return value


def _identifier(text: str) -> str:
    cleaned = re.sub(r"\W", "_", text)
    return f"_{cleaned}" if cleaned[:1].isdigit() and "." in text else cleaned


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {
        name: value.decode() if isinstance(value, bytes) else list(value) if _is_list(value) else value
        for name, value in found.items()
    }


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _plain(value: NDArray) -> Any:
    """A float constant as a tensor, integers as Python's."""
    if value.dtype.kind == "f":
        return torch.from_numpy(np.array(value, np.float32))
    return value.tolist()


def _as_tensor(value: Any) -> Any:
    return torch.tensor(value) if isinstance(value, list | int | bool) else value


def _parameter(value: NDArray) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.array(value, np.float32)))


# --- operators with weights, and those for which torch has a module


def _set(layer: nn.Module, weight: NDArray, bias: NDArray | None) -> nn.Module:
    layer.weight = _parameter(weight)
    layer.register_parameter("bias", None if bias is None else _parameter(bias.reshape(-1)))
    return layer


def _weights(reader: _Reader, node: Any) -> tuple[NDArray, NDArray | None]:
    weight = reader.constant(node.input[1])
    has_bias = len(node.input) > 2 and node.input[2] != ""
    bias = reader.constant(node.input[2]) if has_bias else None
    if weight is None or (has_bias and bias is None):
        raise _Unsupported("has a weight or bias that is computed from the input")
    return weight, bias


def _key(node: Any, attributes: dict[str, Any]) -> tuple[object, ...]:
    return (node.op_type, *node.input[1:], str(sorted(attributes.items())))


def _convolution(reader: _Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node:
    weight, bias = _weights(reader, node)
    rank = weight.ndim - 2
    if rank not in _CONVOLUTIONS:
        raise _Unsupported(f"has {rank} spatial dimensions")
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
    reader: _Reader, node: Any, attributes: dict[str, Any], kernel: Sequence[int], name: str, value: float
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
        return reader.call(reader._free(name), pad, source), (0,) * rank
    pads = [0] * 2 * rank if automatic == "VALID" else attributes.get("pads", [0] * 2 * rank)
    before, after = pads[:rank], pads[rank:]
    if before == after and all(pad >= 0 for pad in before):
        return source, tuple(before)
    if value:
        raise _Unsupported("pads differently on both sides")
    sides = [side for axis in reversed(range(rank)) for side in (before[axis], after[axis])]
    return reader.call(reader._free(name), _ZERO_PADS[rank](tuple(sides)), source), (0,) * rank


def _transposed(reader: _Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node:
    weight, bias = _weights(reader, node)
    rank, groups = weight.ndim - 2, attributes.get("group", 1)
    pads = attributes.get("pads", [0] * 2 * rank)
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or "output_shape" in attributes:
        raise _Unsupported("has auto_pad or output_shape")
    if pads[:rank] != pads[rank:] or rank not in _TRANSPOSED:
        raise _Unsupported(f"pads {pads} over {rank} dimensions: only alike on both sides, of 1 to 3")

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


def _gemm(reader: _Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node:
    weight, bias = _weights(reader, node)
    if attributes.get("transA", 0):
        raise _Unsupported("transposes its input")
    weight = weight if attributes.get("transB", 0) else weight.T
    weight = weight * np.float32(attributes.get("alpha", 1.0))
    if bias is not None and bias.ndim > 1 and bias.shape[0] > 1:
        raise _Unsupported(f"adds a matrix {list(bias.shape)} in place of a bias")
    if bias is not None:
        bias = np.broadcast_to(bias.reshape(-1) * np.float32(attributes.get("beta", 1.0)), weight.shape[:1])
    name = reader.layer_name(node, node.input[1], index)
    return reader.layer(_key(node, attributes), name, lambda: _linear(weight, bias), reader.source_node(node))


def _matmul(reader: _Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node | None:
    """A layer where the right side is stored; else an operator between two results."""
    weight = reader.constant(node.input[1])
    if weight is None or weight.ndim != 2 or not isinstance(reader.values[node.input[0]], torch.fx.Node):
        return None
    name = reader.layer_name(node, node.input[1], index)
    key = _key(node, attributes)
    if reader.uses[node.output[0]] == 1:
        key = (*key, node.output[0])  # an addition behind it may become its bias
    return reader.layer(key, name, lambda: _linear(weight.T, None), reader.source_node(node))


def _add(reader: _Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node | None:
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


def _batch_norm(reader: _Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node | None:
    """A module where a layer shows how many dimensions there are; else an operator for any number."""
    values = [reader.constant(name) for name in node.input[1:5]]
    if attributes.get("training_mode", 0) or any(value is None for value in values):
        raise _Unsupported("is in training mode, or has parameters that are computed")
    scale, shift, mean, variance = (np.array(value, np.float32) for value in values)
    source = reader.source_node(node)
    before = reader.of_layer.get(source)
    if not isinstance(before, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    norm = _NORMS[before.weight.dim()](len(scale), eps=attributes.get("epsilon", 1e-5))
    norm.weight, norm.bias = _parameter(scale), _parameter(shift)
    norm.running_mean, norm.running_var = torch.from_numpy(mean), torch.from_numpy(variance)
    name = reader.layer_name(node, node.input[1], index)
    return reader.call(reader._free(name), norm, source)


def _relu(reader: _Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node:
    return reader.call(reader._free(f"relu_{index}"), nn.ReLU(), reader.source_node(node))


def _clip(reader: _Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node | None:
    """Between 0 and 6 it is a ReLU6, which the requantiser can carry out."""
    limits = [attributes.get("min"), attributes.get("max")]
    for place, name in enumerate(node.input[1:3]):
        value = reader.constant(name) if name else None
        limits[place] = limits[place] if value is None else float(value)
    if limits != [0.0, 6.0] or not isinstance(reader.values[node.input[0]], torch.fx.Node):
        return None
    return reader.call(reader._free(f"relu6_{index}"), nn.ReLU6(), reader.source_node(node))


def _pool(reader: _Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node:
    kernel = attributes["kernel_shape"]
    rank = len(kernel)
    if rank not in _MAX_POOLS:
        raise _Unsupported(f"has {rank} spatial dimensions")
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
            raise _Unsupported("is dilated")
        if source is not reader.source_node(node) and not includes:
            raise _Unsupported("leaves a padding out of its mean that differs on both sides")
        pool = _MEAN_POOLS[rank](tuple(kernel), padding=padding, count_include_pad=includes, **settings)
    return reader.call(reader._free(f"{node.op_type.lower()}_{index}"), pool, source)


def _softmax(reader: _Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node | None:
    """Before opset 13 the axes from the given one on are taken together, and the default is the second."""
    if max(one.version for one in reader.proto.opset_import if one.domain in ("", "ai.onnx")) < 13:
        attributes |= {"axis": attributes.get("axis", 1), "is_flat": True}
    return None


def _resize(reader: _Reader, node: Any, attributes: dict[str, Any], index: int) -> torch.fx.Node | None:
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
        raise _Unsupported(f"has the coordinates {coordinates}; with {mode} only {', '.join(known)}")
    usual = {
        "antialias": 0,
        "exclude_outside": 0,
        "keep_aspect_ratio_policy": "stretch",
        "axes": None,
        **({"cubic_coeff_a": -0.75} if mode == "cubic" else {}),
    }
    other = [name for name, value in usual.items() if attributes.get(name, value) != value]
    if other:
        raise _Unsupported(f"has {', '.join(f'{name} {attributes[name]}' for name in other)}")
    return None


_Layer = Callable[[_Reader, Any, dict[str, Any], int], torch.fx.Node | None]
_LAYERS: dict[str, _Layer] = {
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
