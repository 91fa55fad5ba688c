"""From an ONNX graph to a torch.fx graph: operators with weights become layers, all others modules of `Operator`."""

from __future__ import annotations

import hashlib
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.fx
from numpy.typing import NDArray
from torch import nn

from compress.onnx_import.batches import check_batches, free_batch
from compress.onnx_import.modules import LAYERS, Unsupported
from compress.onnx_import.operators import OPERATORS, Operator, dtype_of
from hwsim.errors import FormatError, InputError, Problem, nearest_name

__all__ = ["ImportedNetwork", "import_onnx"]

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
        Of the input; float32 for floats of any width.
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
    file: str | Path | bytes,
    source: str = "",
    input_shape: tuple[int, ...] | None = None,
    *,
    any_batch: bool = True,
) -> ImportedNetwork:
    """A torch network that computes what an ONNX file does.

    Convolutions, transposed convolutions, Gemm and MatMul with stored weights become layers, named after their weights or
    nodes where these have readable names. All floats are float32, whatever their width in the file.

    Parameters
    ----------
    file : str, Path or bytes
    source : str
        What messages call the file; its path by default.
    input_shape : tuple of int, optional
        Of one input, without the batch; needed where the file leaves dimensions open.
    any_batch : bool
        The network must take any number of inputs at a time, which is tried out where the file states one. False will do for
        what runs no batches but the stated.

    Raises
    ------
    InputError
        The extra is not installed; an operator or a use of one that is not supported, all of them at once, by node; open
        dimensions; more than one input; a network that holds to the batch that the file states.
    FormatError
        Not an ONNX file, or a graph that reads values that nothing gives.
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
    graph = Reader(proto, name)
    model = graph.read()
    model.eval()
    shape, dtype = graph.input(input_shape)
    batch = graph.stated_batch()
    if batch:
        free_batch(model, batch, shape, dtype, name)
        if any_batch:
            check_batches(model, batch, shape, dtype, name)
    return ImportedNetwork(model, shape, dtype, name, hashlib.sha256(content).hexdigest())


_NOBODY = "no input, initializer or node"
_REPAIR = "onnx.checker.check_model tells more; export the network anew"


class Reader:
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

    def stated_batch(self) -> int:
        """The number of inputs that the file was exported for; 0 where it leaves that open."""
        dimensions = self._inputs()[0].type.tensor_type.shape.dim
        return max(0, dimensions[0].dim_value) if len(dimensions) else 0

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
        broken = list(self._read_nodes(problems))
        if broken:
            raise FormatError(self.source, [*broken, *problems])
        if problems:
            raise InputError(self.source, problems)
        results = tuple(self._node(output.name) for output in self.proto.graph.output)
        self.graph.output(results[0] if len(results) == 1 else results)
        return torch.fx.GraphModule(self.root, self.graph)

    def _read_nodes(self, problems: list[Problem]) -> Iterator[Problem]:
        """Adds all nodes; what they do that is not supported goes to ``problems``, what is broken comes back."""
        graph = self.proto.graph
        refused = {tensor.values.name for tensor in graph.sparse_initializer}
        for name in refused:
            yield Problem(f"sparse_initializer {name}", "is not read", "store it as a dense initializer")
        for index, node in enumerate(graph.node):
            label = node.name or (node.output[0] if node.output else f"number {index}")
            field = f"node {label} ({node.op_type})"
            missing = [name for name in node.input if name and name not in self.values]
            for name in missing:
                if name not in refused:
                    message = f'reads "{name}", which {_NOBODY} in front of it gives'
                    yield Problem(field, message, _REPAIR)
            try:
                if not missing:
                    self._add(node, index)
            except Unsupported as reason:
                problems.append(Problem(field, str(reason)))
            # What stands behind a node that has been complained of is no problem of its own.
            refused.update(name for name in node.output if name not in self.values)
        for output in graph.output:
            if output.name not in self.values and output.name not in refused:
                yield Problem(f"output {output.name}", f"{_NOBODY} gives it", _REPAIR)

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
            raise Unsupported(f"is of the domain {node.domain}; only ONNX's own operators are read")
        layer = LAYERS.get(node.op_type)
        if node.op_type in ("Identity", "Dropout"):
            result: Any = self.values[node.input[0]]
        else:
            result = layer(self, node, attributes, index) if layer is not None else None
        if result is None:
            result = self._operator(node, attributes, index)
        if isinstance(result, list):
            self.values |= dict(zip(node.output, result, strict=False))
        else:
            if len([name for name in node.output[1:] if name and self.uses[name]]):
                raise Unsupported("has more than one output that is used")
            self.values[node.output[0]] = result

    def _constant(self, attributes: dict[str, Any]) -> NDArray:
        for name, value in attributes.items():
            if name == "value":
                return self._array(value)
            if name.startswith(("value_int", "value_float")):
                return np.asarray(value, np.int64 if name.startswith("value_int") else np.float32)
        raise Unsupported("holds no tensor")

    def constant(self, name: str) -> NDArray | None:
        """The value of an input that does not depend on the network's input."""
        value = self.values.get(name)
        return value if isinstance(value, np.ndarray) else None

    def _operator(self, node: Any, attributes: dict[str, Any], index: int) -> Any:
        kind = node.op_type
        if kind not in OPERATORS:
            known = (*OPERATORS, *LAYERS, "Constant", "Identity", "Dropout")
            raise Unsupported(f"this operator is not supported; {nearest_name(kind, known)}")
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
        result = self.call(self.free(f"{kind.lower()}_{index}"), module, *sources)
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
        self.layers[key] = self.free(name)
        return self.call(self.layers[key], make(), source)

    def layer_name(self, node: Any, weight: str, index: int) -> str:
        """After the weight (``features.0.weight``), else after the node (``/layers.0/q/MatMul``), else by number."""
        if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*\.weight", weight):
            return weight.removesuffix(".weight")
        parts = [part for part in node.name.strip("/").split("/") if part]
        if len(parts) > 1:
            return ".".join(_identifier(piece) for part in parts[:-1] for piece in part.split(".") if piece)
        return _identifier(node.name or weight.split(".")[0]) or f"{node.op_type.lower()}_{index}"

    def free(self, name: str) -> str:
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
            raise Unsupported("works on constants only, which is not supported")
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
