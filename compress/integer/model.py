"""The integer model: what the machine computes, to the last bit, and so the accuracy that it really has.

Array layers (the compressed Linear and convolution modules) work on integers: activations are signed two's complement with
one scale per tensor and zero-point 0, sums are exact, and the requantiser carries out bias, batch normalisation and ReLU on
the way to the next integer. Normalisation is never folded into the weights: one factor per output channel would break the
shared magnitudes. Pooling by maximum, reshaping, padding and ReLU act on the integers themselves. Everything else (residual
additions, average pooling, activation functions other than ReLU) runs outside the array, in float on dequantised values.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from compress.artifact import Activations
from compress.integer.arithmetic import Dequantize, IntegerLayer, LayerTrace, Quantize, Wrapped
from compress.integer.graph import Graph, is_size, surroundings_of, traced_graph
from compress.layers import CompressedLayer
from hwsim.errors import InputError, Problem
from hwsim.layer import Requantizer

__all__ = ["IntegerModel", "IntegerOutput"]


class IntegerOutput(NamedTuple):
    """What the network gives.

    Attributes
    ----------
    integers : int64 tensor or None
        None where the last operation ran outside the array.
    values : float32 tensor
        Integers × the scale of the last layer, or what the float operations behind it gave.
    """

    integers: Tensor | None
    values: Tensor


class IntegerModel:
    """A network whose array layers compute on integers exactly as the machine does.

    Calling it gives float logits, so that it stands where the float network stood (`compress.train.evaluate`).

    Parameters
    ----------
    model : nn.Module
        The float network. It is copied.
    layers : mapping of str to CompressedLayer
        With requantisers.
    activations : mapping of str to Activations
    activation_bits, accumulator_bits : int

    Attributes
    ----------
    layers, activations
        As given.
    accumulator_bits_needed : dict of str to int
        Per layer, for the worst input.
    float_operations : tuple of str
        What runs outside the array in float, by the names of the traced graph; empty when nothing does.
    notes : tuple of str
        What a user should know: no fusion because tracing failed, accumulators that can overflow.

    Raises
    ------
    InputError
        The network's surroundings of a layer are not those for which the requantisers were made.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, CompressedLayer],
        activations: Mapping[str, Activations],
        activation_bits: int = 8,
        accumulator_bits: int = 32,
    ) -> None:
        self.layers, self.activations = dict(layers), dict(activations)
        self.activation_bits, self.accumulator_bits = activation_bits, accumulator_bits
        model = copy.deepcopy(model).eval()
        graph, note = traced_graph(model, set(layers))
        _check_surroundings(graph, self.activations)
        self._array = {
            name: IntegerLayer(
                model.get_submodule(name), layer, activations[name], activation_bits, accumulator_bits
            )
            for name, layer in layers.items()
            if name in activations
        }
        self.accumulator_bits_needed = {name: layer.bits_needed for name, layer in self._array.items()}
        self.float_operations: tuple[str, ...] = ()
        self._output_scale: float | None = None
        if graph is None:
            self._module = self._wrap_modules(model)
        else:
            self._module = self._rewrite(graph)
        self.notes = (*note, *self._overflow_notes())

    @property
    def requantizers(self) -> dict[str, Requantizer]:
        """The integers behind every accumulator, by layer."""
        return {name: layer.requantizer for name, layer in self._array.items()}

    def __call__(self, images: Tensor) -> Tensor:
        return self.forward(images).values

    @torch.no_grad()
    def forward(self, images: Tensor) -> IntegerOutput:
        """Run normalised float images ``[n, …]``."""
        result = self._module(images)
        if self._output_scale is None:
            return IntegerOutput(None, result)
        return IntegerOutput(result.to(torch.int64), result * self._output_scale)

    def layer_trace(self, images: Tensor) -> list[LayerTrace]:
        """What every array layer reads and writes for some images, in order of execution."""
        trace: list[LayerTrace] = []
        for layer in self._array.values():
            layer.trace = trace
        try:
            self.forward(images)
        finally:
            for layer in self._array.values():
                layer.trace = None
        return trace

    def _overflow_notes(self) -> list[str]:
        return [
            f"layer {name}: the worst input needs {bits} accumulator bits, the machine has {self.accumulator_bits}; "
            "sums may wrap"
            for name, bits in self.accumulator_bits_needed.items()
            if bits > self.accumulator_bits
        ]

    def _wrap_modules(self, model: nn.Module) -> nn.Module:
        """Without a graph: every array layer quantises its input and gives floats."""
        for name, layer in self._array.items():
            around = self.activations[name]
            quantize = Quantize(around.input_scale, self.activation_bits)
            dequantize = Dequantize(around.output_scale)
            wrapped = Wrapped(model.get_submodule(name), quantize, layer, dequantize)
            for place in [
                path
                for path, found in model.named_modules(remove_duplicate=False)
                if found is wrapped.original
            ]:
                model.set_submodule(place, wrapped)
        self.float_operations = ("everything but the array layers",)
        return model

    def _rewrite(self, graph: Graph) -> nn.Module:
        """With a graph: integers flow from layer to layer, and are converted only where something else comes between."""
        module = graph.module
        for name, layer in self._array.items():
            module.set_submodule(name, layer)
        for node, end in graph.ends.items():
            _fuse(node, end)
        scales: dict[torch.fx.Node, float] = {}
        floats: dict[torch.fx.Node, torch.fx.Node] = {}
        outside = []
        for node in list(module.graph.nodes):
            if node in graph.nodes:
                name = graph.nodes[node]
                source = node.all_input_nodes[0]
                if not self.activations[name].producer:
                    source = _in_float(module, source, node, scales, floats)
                    quantize = Quantize(self.activations[name].input_scale, self.activation_bits)
                    node.replace_input_with(node.all_input_nodes[0], _call(module, node, quantize, source))
                scales[node] = self.activations[name].output_scale
            elif node.all_input_nodes and node.all_input_nodes[0] in scales and graph.is_scale_free(node):
                scales[node] = scales[node.all_input_nodes[0]]
            elif node.op == "output":
                result = node.args[0]
                self._output_scale = scales.get(result) if isinstance(result, torch.fx.Node) else None
                if self._output_scale is None:
                    _all_in_float(module, node, scales, floats)
            elif node.op != "placeholder" and not is_size(node):
                _all_in_float(module, node, scales, floats)
                if not graph.is_scale_free(node):
                    outside.append(node.name)
        module.graph.lint()
        module.recompile()
        self.float_operations = tuple(outside)
        return module


def _check_surroundings(graph: Graph | None, activations: Mapping[str, Activations]) -> None:
    names = set(activations) if graph is None else set(graph.nodes.values())
    problems = [
        Problem(name, "has no activation scales", "calibrate") for name in sorted(names - set(activations))
    ]
    for name, stored in activations.items():
        found = surroundings_of(graph, name)
        for field in ("norm", "nonlinearity", "producer"):
            if getattr(stored, field) != getattr(found, field):
                message = f'requantisers made for "{getattr(stored, field)}", the network has "{getattr(found, field)}"'
                problems.append(Problem(f"{name}.{field}", message, "calibrate this network anew"))
    if problems:
        raise InputError("integer model", problems)


def _fuse(node: torch.fx.Node, end: torch.fx.Node) -> None:
    """Let a layer stand for the chain from it to ``end``."""
    while end is not node:
        end.replace_all_uses_with(end.all_input_nodes[0])
        before = end.all_input_nodes[0]
        end.graph.erase_node(end)
        end = before


def _call(
    module: torch.fx.GraphModule, before: torch.fx.Node, operation: nn.Module, source: torch.fx.Node
) -> torch.fx.Node:
    name = f"_conversion_{sum(1 for _ in module.children())}"
    module.add_submodule(name, operation)
    with module.graph.inserting_before(before):
        return module.graph.call_module(name, (source,))


def _in_float(
    module: torch.fx.GraphModule,
    source: torch.fx.Node,
    before: torch.fx.Node,
    scales: Mapping[torch.fx.Node, float],
    floats: dict[torch.fx.Node, torch.fx.Node],
) -> torch.fx.Node:
    """The node itself, or its dequantised value where it holds integers (made once)."""
    if source not in scales:
        return source
    if source not in floats:
        floats[source] = _call(module, before, Dequantize(scales[source]), source)
    return floats[source]


def _all_in_float(
    module: torch.fx.GraphModule,
    node: torch.fx.Node,
    scales: Mapping[torch.fx.Node, float],
    floats: dict[torch.fx.Node, torch.fx.Node],
) -> None:
    for source in node.all_input_nodes:
        converted = _in_float(module, source, node, scales, floats)
        if converted is not source:
            node.replace_input_with(source, converted)
