"""Matrix work as `torch.export` sees it: also what a forward pass does with a parameter past the modules that hold them."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import nn

from hwsim.layer import LayerShape

__all__ = ["ExportedWork", "exported_work", "without_attention_kernel"]

_aten = torch.ops.aten
_LINEAR = (_aten.linear.default,)
_CONVOLUTIONS: dict[Any, int] = {
    _aten.conv1d.default: 1,
    _aten.conv2d.default: 2,
    _aten.conv3d.default: 3,
    _aten.conv1d.padding: 1,
    _aten.conv2d.padding: 2,
    _aten.conv3d.padding: 3,
}
_PRODUCTS = {_aten.matmul.default: (0, 1), _aten.mm.default: (0, 1), _aten.addmm.default: (1, 2)}
"""Which arguments of a product are its two sides."""

_VIEWS = {
    *("alias", "chunk", "clone", "contiguous", "detach", "expand", "getitem", "narrow", "numpy_T", "permute"),
    *("reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "to", "transpose", "unbind"),
    *("unflatten", "unsqueeze", "view"),
}
_WITHOUT_PRODUCTS = {
    *("add", "batch_norm", "cat", "div", "embedding", "embedding_bag", "gather", "group_norm", "index"),
    *("index_select", "layer_norm", "mul", "prelu", "rms_norm", "stack", "sub", "sum", "mean", "where"),
}
"""Operations on parameters of two or more dimensions that are no matrix work."""


@dataclass(frozen=True, eq=False)
class ExportedWork:
    """What the graph of a network multiplies.

    Attributes
    ----------
    shapes : list of LayerShape
        In order of execution. Work of a Linear or convolution has the module's name, of other parameters the parameter's
        (``"in_proj"`` for ``in_proj_weight``), from the second use on with its number (``"head#2"``).
    other : dict of str to str
        Parameters in operations that are not such layers: the operation, and where it reads what was computed from
        parameters, the operation that did (``"linear behind cat"``).
    """

    shapes: list[LayerShape]
    other: dict[str, str]


@contextmanager
def without_attention_kernel() -> Iterator[None]:
    """torch's own attention kernels read weights past their modules; without them the modules run."""
    was_on = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_on)


def exported_work(model: nn.Module, example: torch.Tensor, layers: Mapping[nn.Module, str]) -> ExportedWork:
    """The matrix work of a network in evaluation mode.

    Parameters
    ----------
    model : nn.Module
    example : Tensor
        A batch of inputs; its values do not matter, nothing is computed.
    layers : mapping of nn.Module to str
        The modules that are layers, and their names.

    Raises
    ------
    Exception
        Whatever `torch.export.export` raises where it cannot follow the network.
    """
    with without_attention_kernel(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (example,), strict=False)
    return _Reader(model, program, layers).read()


class _Reader:
    """Walks over an exported graph."""

    def __init__(
        self, model: nn.Module, program: torch.export.ExportedProgram, layers: Mapping[nn.Module, str]
    ) -> None:
        self.model, self.layers, self.graph = model, layers, program.graph
        self.parameters = {
            node: program.graph_signature.inputs_to_parameters[node.name]
            for node in program.graph.nodes
            if node.op == "placeholder" and node.name in program.graph_signature.inputs_to_parameters
        }
        signature = program.graph_signature
        # What does not depend on the input, and the matrices that it is computed from.
        self.computed: dict[torch.fx.Node, frozenset[str]] = {
            node: frozenset()
            for node in program.graph.nodes
            if node.op == "placeholder" and node.name not in signature.user_inputs
        }
        self.computed |= {
            node: frozenset([path]) for node, path in self.parameters.items() if node.meta["val"].dim() > 1
        }
        self.holders = {
            id(module.get_parameter("weight")): name
            for module, name in reversed(list(layers.items()))
            if "weight" in module._parameters and module._parameters["weight"] is not None
        }

    def read(self) -> ExportedWork:
        shapes: list[LayerShape] = []
        uses: Counter[str] = Counter()
        other: dict[str, str] = {}
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            work = self._work(node)
            if work is None:
                other.update(self._unlisted(node))
                if all(source in self.computed for source in node.all_input_nodes):
                    read = [self.computed[source] for source in node.all_input_nodes]
                    self.computed[node] = frozenset().union(*read)
                continue
            parameter, shape = work
            module = self._module_of(node)
            name = self._name(parameter) if module is None else self.layers[module]
            uses[name] += 1
            mark = f"#{uses[name]}" if uses[name] > 1 else ""
            shapes.append(shape(name + mark))
        return ExportedWork(shapes, other)

    def _parameter(self, node: object) -> torch.fx.Node | None:
        """The parameter that a value is a view of."""
        node = self._behind_views(node) if isinstance(node, torch.fx.Node) else None
        return node if node in self.parameters else None

    def _behind_views(self, node: torch.fx.Node) -> torch.fx.Node:
        while node.op == "call_function" and _operation(node) in _VIEWS:
            node = node.args[0]  # type: ignore[assignment]
        return node

    def _unlisted(self, node: torch.fx.Node) -> Iterator[tuple[str, str]]:
        """Matrices that an operation reads, or whose work it does, which is neither a layer nor free of products."""
        if _operation(node) in _VIEWS | _WITHOUT_PRODUCTS:
            return
        for source in node.all_input_nodes:
            parameter = self._parameter(source)
            if parameter is not None and parameter.meta["val"].dim() > 1:
                yield self.parameters[parameter], _operation(node)
            elif parameter is None:
                maker = self._behind_views(source)
                for path in sorted(self.computed.get(maker, ())):
                    yield path, f"{_operation(node)} behind {_operation(maker)}"

    def _module_of(self, node: torch.fx.Node) -> nn.Module | None:
        """The layer whose forward an operation belongs to."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if not stack:
            return None
        module = self.model.get_submodule(str(stack[-1][0]).split("@")[0])
        return module if module in self.layers else None

    def _name(self, parameter: torch.fx.Node) -> str:
        path = self.parameters[parameter]
        found = self.holders.get(id(self.model.get_parameter(path)))
        if found is not None:
            return found
        return path.removesuffix("weight").rstrip("._") or path

    def _work(self, node: torch.fx.Node) -> Any:
        """``(parameter, function from name to shape)`` of a linear layer, convolution or product with a parameter."""
        if node.target in _LINEAR or node.target in _CONVOLUTIONS:
            parameter, source = self._parameter(node.args[1]), node.args[0]
            if parameter is None or not isinstance(source, torch.fx.Node):
                return None
            size, weight = _size(source), _size(node.args[1])
            if node.target in _LINEAR:
                return parameter, lambda name: _linear(name, size, weight[1], weight[0])
            return parameter, lambda name: _convolution(name, node, size, weight)
        if node.target in _PRODUCTS:
            left, right = (node.args[place] for place in _PRODUCTS[node.target])
            parameter = self._parameter(right)
            if parameter is None or self._parameter(left) is not None or len(_size(right)) != 2:
                return None
            size, weight = _size(left), _size(right)
            return parameter, lambda name: _linear(name, size, weight[0], weight[1])
        return None


def _operation(node: torch.fx.Node) -> str:
    """``"matmul"`` of ``aten.matmul.default``."""
    name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
    return str(name)


def _size(node: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def _linear(name: str, size: tuple[int, ...], in_features: int, out_features: int) -> LayerShape:
    batch, leading = (size[0], size[1:-1]) if len(size) > 1 else (1, ())
    return LayerShape(name, "linear", in_features, out_features, leading, batch=batch)


def _convolution(
    name: str, node: torch.fx.Node, size: tuple[int, ...], weight: tuple[int, ...]
) -> LayerShape:
    rank = _CONVOLUTIONS[node.target]
    arguments: dict[str, Any] = dict(
        zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), node.args, strict=False)
    )
    arguments |= node.kwargs
    kernel = weight[2:]
    dilation = _each(arguments.get("dilation", 1), rank)
    padding = arguments.get("padding", 0)
    sides: tuple[tuple[int, int], ...]
    if padding == "same":
        totals = [step * (taps - 1) for taps, step in zip(kernel, dilation, strict=True)]
        sides = tuple((total // 2, total - total // 2) for total in totals)
    else:
        sides = tuple((side, side) for side in _each(0 if padding == "valid" else padding, rank))
    groups = int(arguments.get("groups", 1))
    return LayerShape(
        name=name,
        kind="conv",
        in_channels=weight[1] * groups,
        out_channels=weight[0],
        input_size=size[-rank:],
        kernel=kernel,
        stride=_each(arguments.get("stride", 1), rank),
        padding=sides,
        dilation=dilation,
        groups=groups,
        batch=size[0] if len(size) == rank + 2 else math.prod(size[: -rank - 1]),
    )


def _each(value: Any, rank: int) -> tuple[int, ...]:
    """One number per dimension."""
    values = [int(part) for part in value] if isinstance(value, list | tuple) else [int(value)]
    return tuple(values * rank) if len(values) == 1 else tuple(values)
