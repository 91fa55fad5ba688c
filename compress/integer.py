"""The integer model: what the machine computes, to the last bit, and so the accuracy that it really has.

Array layers (the compressed Linear and convolution modules) work on integers: activations are signed two's complement with
one scale per tensor and zero-point 0, sums are exact, and the requantiser carries out bias, batch normalisation and ReLU on
the way to the next integer. Normalisation is never folded into the weights: one factor per output channel would break the
shared magnitudes. Pooling by maximum, reshaping, padding and ReLU act on the integers themselves. Everything else (residual
additions, average pooling, activation functions other than ReLU) runs outside the array, in float on dequantised values.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.fx
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from compress.artifact import MAX_SHIFT, Activations, integer_weight
from compress.layers import CompressedLayer
from compress.plain.convolution import Interleave, Pad
from compress.plain.ties import TiedEmbedding
from hwsim.errors import InputError, Problem, nearest_name
from hwsim.layer import Requantizer, accumulator_bits_needed

__all__ = [
    "IntegerModel",
    "IntegerOutput",
    "LayerTrace",
    "accumulator_bits_needed",
    "make_requantizer",
    "quantize_activations",
]

Nonlinearity = Literal["none", "relu", "relu6"]

SAMPLES_PER_BATCH = 1 << 15
"""Values of a tensor that calibration keeps of every batch, drawn at random; the largest value is exact."""

CLIP_STEPS = tuple(2 ** (-step / 8) for step in range(33))
"""Clipping thresholds that calibration tries, as shares of the largest value: 1 down to 1/16."""

FLOAT32_EXACT = 1 << 24
"""Integers up to here add exactly in float32, in any order."""


# --- arithmetic


def make_requantizer(
    gain: NDArray[np.float64], offset: NDArray[np.float64], output_scale: float, relu: bool
) -> Requantizer:
    """The integers that come nearest to ``y = (gain · acc + offset) / output_scale``.

    The machine computes ``clamp(floor((acc + bias) · scale / 2**shift + 1/2))``. The bias is in units of the accumulator
    (``offset / gain``) and the scale has 15 significant bits. Where the bias would not fit 32 bits (a channel whose
    normalisation has a gain of nearly 0), the gain is raised until it does: the constant is kept, and the accumulator adds
    what should have been less than ``acc / 2**31`` of it.

    Parameters
    ----------
    gain, offset : float64 array ``[out]``
        Real value of one unit of the accumulator, and of an accumulator of 0. A negative gain gives a negative scale.
    output_scale : float
        Real value of one unit of the output.
    relu : bool
    """
    most = 2**31 - 1
    least_gain = np.abs(offset) / most
    gain = np.where(np.abs(gain) < least_gain, np.where(gain < 0, -least_gain, least_gain), gain)
    bias = np.divide(offset, gain, out=np.zeros_like(offset), where=gain != 0)
    mantissa, exponent = np.frexp(gain / output_scale)
    scale, shift = np.rint(mantissa * 2**15), 15 - exponent.astype(np.int64)
    carried = scale == 2**15
    scale, shift = np.where(carried, 2**14, scale), np.where(carried, shift - 1, shift)
    # Beyond 16 bits every accumulator but 0 saturates anyway; below the last shift the scale loses bits.
    scale, shift = np.where(shift < 0, np.sign(scale) * (2**15 - 1), scale), np.maximum(shift, 0)
    lost = np.maximum(shift - MAX_SHIFT, 0)
    scale, shift = np.where(lost > 0, np.rint(np.ldexp(scale, -lost)), scale), np.minimum(shift, MAX_SHIFT)
    shift = np.where(scale == 0, 0, shift)
    return Requantizer(
        bias=np.clip(np.rint(bias), -most, most).astype(np.int32),
        scale=scale.astype(np.int16),
        shift=shift.astype(np.uint8),
        relu=relu,
    )


class _Quantize(nn.Module):
    """Float values to integers (held in a float tensor)."""

    def __init__(self, scale: float, bits: int) -> None:
        super().__init__()
        self.scale, self.low, self.high = scale, -(1 << (bits - 1)), (1 << (bits - 1)) - 1

    def forward(self, values: Tensor) -> Tensor:
        return torch.floor(values / self.scale + 0.5).clamp_(self.low, self.high)


class _Dequantize(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, integers: Tensor) -> Tensor:
        return integers * self.scale


class _IntegerLayer(nn.Module):
    """A Linear or convolution on integers with its requantiser; integers in float tensors, every operation exact."""

    def __init__(
        self,
        module: nn.Module,
        layer: CompressedLayer,
        around: Activations,
        activation_bits: int,
        accumulator_bits: int,
    ) -> None:
        super().__init__()
        requantizer = layer.weights.requantizer
        if requantizer is None:
            raise InputError(
                f"layer {layer.name}", Problem("requantizer", "missing; activations were not calibrated")
            )
        float_weight = module.get_parameter("weight")
        weight_shape, device = tuple(float_weight.shape), float_weight.device
        integers = integer_weight(layer, weight_shape)
        self.name, self.requantizer = layer.name, requantizer
        self.bits_needed = accumulator_bits_needed(integers, activation_bits)
        self.accumulator_bits = accumulator_bits
        self.low, self.high = -(1 << (activation_bits - 1)), (1 << (activation_bits - 1)) - 1
        self.accumulate = _accumulation(module)
        self.wants_rows = isinstance(module, nn.Linear) and around.norm != ""
        self.channel_shape = (-1, *(1 for _ in weight_shape[2:]))
        self.trace: list[LayerTrace] | None = None
        dtype = _exact_dtype(self.bits_needed, device)
        self.weight = torch.from_numpy(integers).to(device, dtype)
        factor = np.ldexp(requantizer.scale.astype(np.float64), -requantizer.shift.astype(np.int64))
        self.factor = torch.from_numpy(factor).to(device).reshape(self.channel_shape)
        self.bias = (
            torch.from_numpy(requantizer.bias.astype(np.float64)).to(device).reshape(self.channel_shape)
        )

    def forward(self, integers: Tensor) -> Tensor:
        if self.wants_rows and integers.dim() > 2:
            message = "normalises another dimension than the outputs of the linear layer in front of it"
            hint = "normalise with nn.LayerNorm, or let a convolution of kernel 1 stand for the linear layer"
            raise InputError(f"layer {self.name}", Problem("norm", message, hint))
        accumulators = self.accumulate(integers.to(self.weight.dtype), self.weight).to(torch.float64)
        if self.bits_needed > self.accumulator_bits:
            accumulators = _wrap(accumulators, self.accumulator_bits)
        seen = _integers(accumulators) if self.trace is not None else None
        # Exact in float64: (acc + bias) · scale has at most 49 bits, and the factor is the scale over a power of two.
        values = accumulators.add_(self.bias).mul_(self.factor).add_(0.5).floor_()
        outputs = values.clamp_(0 if self.requantizer.relu else self.low, self.high).to(torch.float32)
        if self.trace is not None and seen is not None:
            self.trace.append(LayerTrace(self.name, _integers(integers), seen, _integers(outputs)))
        return outputs


class _Wrapped(nn.Module):
    """An array layer among floats. Whoever reads its weight or bias gets those of the float network."""

    def __init__(
        self, module: nn.Module, quantize: _Quantize, layer: _IntegerLayer, dequantize: _Dequantize
    ) -> None:
        super().__init__()
        self._float = (module,)  # in a tuple, so that it is no child
        self.steps = nn.Sequential(quantize, layer, dequantize)

    @property
    def original(self) -> nn.Module:
        return self._float[0]

    @property
    def weight(self) -> object:
        return self.original.weight

    @property
    def bias(self) -> object:
        return self.original.bias

    def forward(self, values: Tensor) -> Tensor:
        return self.steps(values)


def _integers(values: Tensor) -> NDArray[np.int64]:
    return values.detach().cpu().numpy().astype(np.int64)


def _wrap(values: Tensor, bits: int) -> Tensor:
    """Integers reduced to two's complement of so many bits."""
    half = 1 << (bits - 1)
    return (torch.remainder(values.to(torch.int64) + half, 1 << bits) - half).to(torch.float64)


def _exact_dtype(bits_needed: int, device: torch.device) -> torch.dtype:
    """float32 where its sums are exact: small enough, on a CPU (no TF32, no Winograd), and not set to lower precision."""
    fits = (1 << (bits_needed - 1)) <= FLOAT32_EXACT
    is_plain = device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    return torch.float32 if fits and is_plain else torch.float64


def _accumulation(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The matrix product or convolution of a module as a function of input and weight, without bias."""
    if isinstance(module, nn.Linear):
        return functional.linear
    for kind, convolve in (
        (nn.Conv1d, functional.conv1d),
        (nn.Conv2d, functional.conv2d),
        (nn.Conv3d, functional.conv3d),
    ):
        if isinstance(module, kind):
            if module.padding_mode != "zeros":
                problem = Problem("padding_mode", f'"{module.padding_mode}"; the array pads with zeros only')
                raise InputError("integer model", problem)
            return partial(
                convolve,
                stride=module.stride,
                padding=module.padding,
                dilation=module.dilation,
                groups=module.groups,
            )
    raise InputError("integer model", Problem(type(module).__name__, "is not a Linear or Conv1d/2d/3d"))


# --- the graph: which normalisation, ReLU and integers belong to which layer


@dataclass(frozen=True)
class _Surroundings:
    """What the requantiser of a layer carries out, and whose integers the layer reads. Empty: nothing, nobody."""

    norm: str = ""
    nonlinearity: Nonlinearity = "none"
    producer: str = ""
    feeds_output: bool = True


_WHOLE = (Interleave, Pad, TiedEmbedding)


class _Tracer(torch.fx.Tracer):
    """Compressed modules stay whole even where they are subclasses of torch's, and so do those that to_plain puts in."""

    def __init__(self, leaves: set[str]) -> None:
        super().__init__()
        self._leaves = leaves

    def create_args_for_root(self, *arguments: Any, **settings: Any) -> Any:
        """The network gets one tensor; an argument with a default has that value, so that ``if mask is None`` is decided."""
        function, inputs = super().create_args_for_root(*arguments, **settings)
        return function, [self._default_of(value) for value in inputs]

    def _default_of(self, value: Any) -> Any:
        if not isinstance(value, torch.fx.Proxy) or value.node.op != "placeholder" or not value.node.args:
            return value
        default = value.node.args[0]
        self.graph.erase_node(value.node)
        return default

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_whole = (
            module_qualified_name in self._leaves or isinstance(m, _WHOLE) or hasattr(m, "is_scale_free")
        )
        return is_whole or super().is_leaf_module(m, module_qualified_name)


# Operations that commute with a positive scale, so that they may act on the integers.
_POOLS = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_SCALE_FREE_MODULES = (
    *(*_POOLS, *_DROPOUTS, nn.Flatten, nn.Unflatten, nn.Identity, nn.ReLU),
    *(Interleave, Pad, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
)
_RESHAPING = "flatten view reshape squeeze unsqueeze permute transpose contiguous clone"
_SCALE_FREE_METHODS = {*_RESHAPING.split(), "relu"}
_SCALE_FREE_FUNCTIONS = {
    *(functional.max_pool1d, functional.max_pool2d, functional.max_pool3d, functional.dropout),
    *(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.permute, torch.transpose),
    *(functional.relu, torch.relu),
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Graph:
    """A traced network and the surroundings of its array layers."""

    def __init__(self, model: nn.Module, names: set[str]) -> None:
        graph = _Tracer(names).trace(model)
        self.module = torch.fx.GraphModule(model, graph)
        self.nodes = {node: str(node.target) for node in graph.nodes if _calls(node, names)}
        uses = Counter(self.nodes.values())
        self.ends: dict[torch.fx.Node, torch.fx.Node] = {}
        self.surroundings: dict[str, _Surroundings] = {}
        chains: dict[torch.fx.Node, tuple[torch.fx.Node, str, Nonlinearity]] = {}
        for node, name in self.nodes.items():
            # A module that runs twice has one requantiser: nothing is fused that only one of its uses has.
            chains[node] = self._chain(node) if uses[name] == 1 else (node, "", "none")
            self.ends[node] = chains[node][0]
        producers = {end: self.nodes[node] for node, end in self.ends.items() if uses[self.nodes[node]] == 1}
        for node, name in self.nodes.items():
            end, norm, nonlinearity = chains[node]
            source = self._source(node.all_input_nodes[0])
            producer = producers.get(source, "") if uses[name] == 1 else ""
            self.surroundings[name] = _Surroundings(norm, nonlinearity, producer, self._reaches_output(end))

    def _chain(self, node: torch.fx.Node) -> tuple[torch.fx.Node, str, Nonlinearity]:
        """The last node that the requantiser can stand for, with the normalisation and the nonlinearity up to it."""
        end, norm = node, ""
        following = _only_user(end)
        if following is not None and following.op == "call_module" and self._is_norm(following, node):
            end, norm = following, str(following.target)
            following = _only_user(end)
        nonlinearity = "none" if following is None else self._nonlinearity(following)
        if following is not None and nonlinearity != "none":
            end = following
        return end, norm, nonlinearity

    def _is_norm(self, node: torch.fx.Node, layer: torch.fx.Node) -> bool:
        norm = self.module.get_submodule(str(node.target))
        channels = self.module.get_submodule(str(layer.target)).get_parameter("weight").shape[0]
        if not isinstance(norm, _NORMS) or norm.running_mean is None:
            return False
        return norm.num_features == channels and node.all_input_nodes == [layer]

    def _nonlinearity(self, node: torch.fx.Node) -> Nonlinearity:
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            if isinstance(module, nn.ReLU6):
                return "relu6"
            return "relu" if isinstance(module, nn.ReLU) else "none"
        if node.target in (functional.relu, torch.relu, "relu"):
            return "relu"
        return "relu6" if node.target is functional.relu6 else "none"

    def _source(self, node: torch.fx.Node) -> torch.fx.Node:
        """Back over everything that acts on integers as they are."""
        while node not in self.ends.values() and self.is_scale_free(node):
            node = node.all_input_nodes[0]
        return node

    def _reaches_output(self, node: torch.fx.Node) -> bool:
        return any(
            user.op == "output" or (self.is_scale_free(user) and self._reaches_output(user))
            for user in node.users
        )

    def is_scale_free(self, node: torch.fx.Node) -> bool:
        """Whether a node may act on integers: it commutes with a positive scale and reads one tensor."""
        source, *others = node.all_input_nodes or [node]
        reads_one = not _is_size(source) and all(_is_size(other) for other in others)
        if not reads_one or node.kwargs.get("return_indices"):
            return False
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            is_free = isinstance(module, _SCALE_FREE_MODULES) or getattr(module, "is_scale_free", False)
            return is_free and not getattr(module, "return_indices", False)
        if node.op == "call_function":
            return node.target in _SCALE_FREE_FUNCTIONS
        return node.op == "call_method" and node.target in _SCALE_FREE_METHODS


def _calls(node: torch.fx.Node, names: set[str]) -> bool:
    return node.op == "call_module" and str(node.target) in names


def _only_user(node: torch.fx.Node) -> torch.fx.Node | None:
    """The one node that reads the values of this one; reading its size is no matter."""
    users = [user for user in node.users if not _is_size(user)]
    return users[0] if len(users) == 1 else None


def _is_size(node: torch.fx.Node) -> bool:
    """Whether a node is a size of a tensor, or computed from sizes alone (``x.size(0)``, ``x.shape[1] * 2``)."""
    if node.op == "call_method" and node.target in ("size", "dim"):
        return True
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    is_arithmetic = getattr(node.target, "__module__", "") == "_operator"
    return is_arithmetic and all(_is_size(source) for source in node.all_input_nodes)


# --- calibration


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

    def __init__(self, graph: _Graph, observe: Callable[[str, str, Tensor], None]) -> None:
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
    model: nn.Module, graph: _Graph | None, names: set[str], images: Tensor, batch_size: int
) -> dict[str, tuple[_Range, _Range]]:
    """The ranges of what every layer reads and of what its requantiser will write."""
    ranges: dict[str, tuple[_Range, _Range]] = {}
    generator = torch.Generator().manual_seed(0)

    def observe(name: str, side: str, values: Tensor) -> None:
        pair = ranges.setdefault(name, (_Range(), _Range()))
        pair[side == "output"].observe(values, generator)

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def look(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            observe(name, "input", inputs[0])
            observe(name, "output", output)

        return look

    if graph is not None:
        run: Callable[[Tensor], Any] = _Observer(graph, observe).run
        handles = []
    else:
        run = model
        handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in sorted(names)]
    try:
        with torch.no_grad():
            for part in images.split(batch_size):
                run(part)
    finally:
        for handle in handles:
            handle.remove()
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
    graph, _ = _trace(model, set(layers))
    ranges = _calibrate(model, graph, set(layers), images, batch_size)
    quantized: dict[str, CompressedLayer] = {}
    activations: dict[str, Activations] = {}
    surroundings = {name: _surroundings(graph, name) for name in ranges}
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
    return IntegerModel(model, quantized, activations, activation_bits, accumulator_bits)


def _surroundings(graph: _Graph | None, name: str) -> _Surroundings:
    return _Surroundings() if graph is None else graph.surroundings[name]


def _requantizer_of(model: nn.Module, layer: CompressedLayer, around: Activations) -> Requantizer:
    """Bias, normalisation and scales of a layer as integers."""
    module = model.get_submodule(layer.name)
    channels = module.get_parameter("weight").shape[0]
    bias = _float64(module.bias, channels, 0.0)
    slope, constant = np.ones(channels), np.zeros(channels)
    if around.norm:
        norm = model.get_submodule(around.norm)
        if not isinstance(norm, _NORMS):
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


# --- the model


class LayerTrace(NamedTuple):
    """What one array layer read and wrote.

    Attributes
    ----------
    name : str
    input, accumulator, output : int64 array
        Batch first, as the module sees them.
    """

    name: str
    input: NDArray[np.int64]
    accumulator: NDArray[np.int64]
    output: NDArray[np.int64]


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
        graph, note = _trace(model, set(layers))
        _check_surroundings(graph, self.activations)
        self._array = {
            name: _IntegerLayer(
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
            quantize = _Quantize(around.input_scale, self.activation_bits)
            dequantize = _Dequantize(around.output_scale)
            wrapped = _Wrapped(model.get_submodule(name), quantize, layer, dequantize)
            for place in [
                path
                for path, found in model.named_modules(remove_duplicate=False)
                if found is wrapped.original
            ]:
                model.set_submodule(place, wrapped)
        self.float_operations = ("everything but the array layers",)
        return model

    def _rewrite(self, graph: _Graph) -> nn.Module:
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
                    quantize = _Quantize(self.activations[name].input_scale, self.activation_bits)
                    node.replace_input_with(node.all_input_nodes[0], _call(module, node, quantize, source))
                scales[node] = self.activations[name].output_scale
            elif node.all_input_nodes and node.all_input_nodes[0] in scales and graph.is_scale_free(node):
                scales[node] = scales[node.all_input_nodes[0]]
            elif node.op == "output":
                result = node.args[0]
                self._output_scale = scales.get(result) if isinstance(result, torch.fx.Node) else None
                if self._output_scale is None:
                    _all_in_float(module, node, scales, floats)
            elif node.op != "placeholder" and not _is_size(node):
                _all_in_float(module, node, scales, floats)
                if not graph.is_scale_free(node):
                    outside.append(node.name)
        module.graph.lint()
        module.recompile()
        self.float_operations = tuple(outside)
        return module


def _trace(model: nn.Module, names: set[str]) -> tuple[_Graph | None, tuple[str, ...]]:
    """The graph of a network, or None and why there is none."""
    try:
        graph = _Graph(model, names)
    except Exception as error:  # whatever the user's forward does to a symbolic tensor
        return None, (f"no fusion: torch.fx cannot trace the network ({type(error).__name__}: {error})",)
    read = sorted({name for name in names for node in graph.module.graph.nodes if _reads_weight(node, name)})
    if read:
        return None, (f"no fusion: the weights of {', '.join(read)} are read outside their modules, too",)
    unseen = sorted(names - set(graph.nodes.values()))
    if unseen:
        return None, (f"no fusion: {', '.join(unseen)} do not show in the traced graph",)
    return graph, ()


def _reads_weight(node: torch.fx.Node, name: str) -> bool:
    return node.op == "get_attr" and str(node.target).rpartition(".")[0] == name


def _check_surroundings(graph: _Graph | None, activations: Mapping[str, Activations]) -> None:
    names = set(activations) if graph is None else set(graph.nodes.values())
    problems = [
        Problem(name, "has no activation scales", "calibrate") for name in sorted(names - set(activations))
    ]
    for name, stored in activations.items():
        found = _surroundings(graph, name)
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
        floats[source] = _call(module, before, _Dequantize(scales[source]), source)
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
