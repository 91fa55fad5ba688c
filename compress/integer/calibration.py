"""Scales of activations from a few inputs, and the requantisers that follow from them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.fx
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.artifact import Activations, integer_weight
from compress.curvature import listening
from compress.integer.arithmetic import make_requantizer
from compress.integer.graph import Graph, surroundings_of, traced_graph
from compress.integer.model import IntegerModel
from compress.layers import CompressedLayer
from compress.norms import NORMS
from hwsim.errors import InputError, Problem, nearest_name
from hwsim.layer import Requantizer

__all__ = ["quantize_activations", "width_problems"]

SAMPLES_PER_BATCH = 1 << 15
"""Values of a tensor that calibration keeps of every batch, drawn at random; the largest value is exact."""

CLIP_STEPS = tuple(2 ** (-step / 8) for step in range(33))
"""Clipping thresholds that calibration tries, as shares of the largest value: 1 down to 1/16."""


class _Range:
    """The largest magnitude of a tensor over all batches, and a random sample of its values."""

    def __init__(self) -> None:
        self.largest = 0.0
        self._samples: list[Tensor] = []

    def observe(self, values: Tensor, generator: torch.Generator) -> None:
        flat = values.detach().flatten().float().cpu()
        self.largest = max(self.largest, float(flat.abs().max()))
        if len(flat) > SAMPLES_PER_BATCH:
            flat = flat[torch.randint(len(flat), (SAMPLES_PER_BATCH,), generator=generator)]
        self._samples.append(flat.clone())

    def scale(self, bits: int, clip: bool) -> float:
        """Real value of one integer: the largest value fits, or (``clip``) the squared error is least."""
        most = (1 << (bits - 1)) - 1
        if self.largest == 0:
            return 1.0
        sample = torch.cat(self._samples)

        def error(scale: float) -> float:
            quantized = torch.round(sample / scale).clamp_(-most - 1, most) * scale
            return float((quantized - sample).square().sum())

        candidates = [self.largest * share / most for share in (CLIP_STEPS if clip else CLIP_STEPS[:1])]
        return min(candidates, key=error)


class _Observer(torch.fx.Interpreter):
    """Runs a traced network and looks at some of its values."""

    def __init__(self, graph: Graph, observe: Callable[[str, str, Tensor], None]) -> None:
        super().__init__(graph.module)
        self._outputs = {end: graph.nodes[node] for node, end in graph.ends.items()}
        self._inputs = graph.nodes
        self._observe = observe

    def run_node(self, n: torch.fx.Node) -> Any:
        if n in self._inputs:
            self._observe(self._inputs[n], "input", self.env[n.all_input_nodes[0]])
        result = super().run_node(n)
        if n in self._outputs:
            self._observe(self._outputs[n], "output", result)
        return result


def _calibrate(
    model: nn.Module, graph: Graph | None, names: set[str], images: Tensor, batch_size: int
) -> dict[str, tuple[_Range, _Range]]:
    """The ranges of what every layer reads and of what its requantiser will write."""
    ranges: dict[str, tuple[_Range, _Range]] = {}
    generator = torch.Generator().manual_seed(0)

    def observe(name: str, side: str, values: Tensor) -> None:
        pair = ranges.setdefault(name, (_Range(), _Range()))
        pair[side == "output"].observe(values, generator)

    def ran(name: str, _module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        observe(name, "input", inputs)
        observe(name, "output", output)

    run: Callable[[Tensor], Any] = model if graph is None else _Observer(graph, observe).run
    modules = {} if graph is not None else {name: model.get_submodule(name) for name in sorted(names)}
    with torch.no_grad(), listening(modules, ran):
        for part in images.split(batch_size):
            run(part)
    return ranges


def quantize_activations(
    model: nn.Module,
    layers: Mapping[str, CompressedLayer],
    images: Tensor,
    *,
    activation_bits: int = 8,
    accumulator_bits: int = 32,
    batch_size: int = 100,
) -> IntegerModel:
    """Calibrate activations on a few images and build the integer model.

    Scales are per tensor. That of a hidden tensor clips where the squared error of its calibration values is least (a single
    outlier would otherwise cost every other value its resolution); that of the network's output never clips, because the
    largest logit decides.

    Parameters
    ----------
    model : nn.Module
        In float; the weights of ``layers`` are exactly integer × step size. It is not changed, and its mode does not matter.
    layers : mapping of str to CompressedLayer
        By module name; requantisers that they may have are ignored.
    images : float32 tensor ``[n, …]``
        Calibration inputs, normalised like those of the training. A few hundred do.
    activation_bits : int
        2 to 16.
    accumulator_bits : int
        8 to 62; a layer that could need more is named in `IntegerModel.notes` and wraps as the hardware would.
    batch_size : int

    Raises
    ------
    InputError
        No images, settings out of range, a layer that the network does not have, weights that are not integer × step size.
    """
    _check_calibration(model, layers, images, activation_bits, accumulator_bits)
    model = copy.deepcopy(model).eval()
    graph, _ = traced_graph(model, set(layers))
    ranges = _calibrate(model, graph, set(layers), images, batch_size)
    quantized: dict[str, CompressedLayer] = {}
    activations: dict[str, Activations] = {}
    surroundings = {name: surroundings_of(graph, name) for name in ranges}
    output_scales = {}
    for name, (_, written) in ranges.items():
        around = surroundings[name]
        scale = written.scale(activation_bits, clip=not around.feeds_output)
        # The clamp of the requantiser is the 6 of a ReLU6 where the largest integer stands for 6 at most.
        most = (1 << (activation_bits - 1)) - 1
        output_scales[name] = min(scale, 6 / most) if around.nonlinearity == "relu6" else scale
    for name, (read, _) in ranges.items():
        around = surroundings[name]
        input_scale = (
            output_scales[around.producer] if around.producer else read.scale(activation_bits, clip=True)
        )
        activations[name] = Activations(
            input_scale, output_scales[name], around.norm, around.nonlinearity, around.producer
        )
        requantizer = _requantizer_of(model, layers[name], activations[name])
        quantized[name] = replace(
            layers[name], weights=replace(layers[name].weights, requantizer=requantizer)
        )
    # With those that never ran, too: they decide whether the network has a graph, here as in a file.
    return IntegerModel(model, dict(layers) | quantized, activations, activation_bits, accumulator_bits)


def _requantizer_of(model: nn.Module, layer: CompressedLayer, around: Activations) -> Requantizer:
    """Bias, normalisation and scales of a layer as integers."""
    module = model.get_submodule(layer.name)
    channels = module.get_parameter("weight").shape[0]
    bias = _float64(module.bias, channels, 0.0)
    slope, constant = np.ones(channels), np.zeros(channels)
    if around.norm:
        norm = model.get_submodule(around.norm)
        if not isinstance(norm, NORMS):
            raise InputError(
                f"layer {layer.name}", Problem("norm", f"{around.norm} is no batch normalisation")
            )
        variance, mean = _float64(norm.running_var, channels, 1.0), _float64(norm.running_mean, channels, 0.0)
        slope = _float64(norm.weight, channels, 1.0) / np.sqrt(variance + norm.eps)
        constant = _float64(norm.bias, channels, 0.0) - slope * mean
    gain = slope * layer.weights.step_size * around.input_scale
    return make_requantizer(gain, slope * bias + constant, around.output_scale, around.nonlinearity != "none")


def _float64(values: object, count: int, default: float) -> NDArray[np.float64]:
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy().astype(np.float64)
    return np.full(count, default)


_INPUT_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)


def width_problems(activation_bits: int, accumulator_bits: int = 32) -> list[Problem]:
    """Widths of number formats that no machine has."""
    return [
        Problem(field, f"{value}, must lie in {least} to {most}")
        for field, value, least, most in (
            ("activation_bits", activation_bits, 2, 16),
            ("accumulator_bits", accumulator_bits, 8, 62),
        )
        if not least <= value <= most
    ]


def _check_calibration(
    model: nn.Module,
    layers: Mapping[str, CompressedLayer],
    images: Tensor,
    activation_bits: int,
    accumulator_bits: int,
) -> None:
    problems = width_problems(activation_bits, accumulator_bits)
    if len(images) == 0:
        problems.append(Problem("images", "none; calibration needs at least one"))
    elif images.dtype not in _INPUT_TYPES or not images.isfinite().all():
        message = f"{images.dtype}, must be finite floats, normalised as for training, or indices as int64"
        problems.append(Problem("images", message))
    problems += _weight_problems(model, layers)
    if problems:
        raise InputError("integer model", problems)


def _weight_problems(model: nn.Module, layers: Mapping[str, CompressedLayer]) -> list[Problem]:
    """Layers whose float weights are not what their integers say."""
    modules = dict(model.named_modules())
    problems = []
    for name, layer in layers.items():
        if name not in modules:
            problems.append(Problem(name, "the network has no such module", nearest_name(name, modules)))
            continue
        weight = modules[name].get_parameter("weight").detach().cpu()
        integers = integer_weight(layer, tuple(weight.shape)).astype(np.float32)
        expected = torch.from_numpy(integers * np.float32(layer.weights.step_size))
        if not torch.equal(weight, expected):
            off = float((weight - expected).abs().max())
            problems.append(Problem(name, f"weights are off integer × step size by up to {off:g}"))
    return problems
