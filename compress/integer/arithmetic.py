"""One array layer on integers, every operation exact, and the requantiser behind its accumulators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from compress.artifact import MAX_SHIFT, Activations, integer_weight
from compress.layers import CompressedLayer
from hwsim.errors import InputError, Problem
from hwsim.layer import Requantizer, accumulator_bits_needed

__all__ = ["Dequantize", "IntegerLayer", "LayerTrace", "Quantize", "Wrapped", "make_requantizer"]

FLOAT32_EXACT = 1 << 24
"""Integers up to here add exactly in float32, in any order."""


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


class Quantize(nn.Module):
    """Float values to integers (held in a float tensor)."""

    def __init__(self, scale: float, bits: int) -> None:
        super().__init__()
        self.scale, self.low, self.high = scale, -(1 << (bits - 1)), (1 << (bits - 1)) - 1

    def forward(self, values: Tensor) -> Tensor:
        return torch.floor(values / self.scale + 0.5).clamp_(self.low, self.high)


class Dequantize(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, integers: Tensor) -> Tensor:
        return integers * self.scale


class IntegerLayer(nn.Module):
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

    def forward(self, input: Tensor) -> Tensor:
        """The argument has the name of torch's, for those who call it by keyword."""
        if self.wants_rows and input.dim() > 2:
            message = "normalises another dimension than the outputs of the linear layer in front of it"
            hint = "normalise with nn.LayerNorm, or let a convolution of kernel 1 stand for the linear layer"
            raise InputError(f"layer {self.name}", Problem("norm", message, hint))
        accumulators = self.accumulate(input.to(self.weight.dtype), self.weight).to(torch.float64)
        if self.bits_needed > self.accumulator_bits:
            accumulators = _wrap(accumulators, self.accumulator_bits)
        seen = _integers(accumulators) if self.trace is not None else None
        # Exact in float64: (acc + bias) · scale has at most 49 bits, and the factor is the scale over a power of two.
        values = accumulators.add_(self.bias).mul_(self.factor).add_(0.5).floor_()
        outputs = values.clamp_(0 if self.requantizer.relu else self.low, self.high).to(torch.float32)
        if self.trace is not None and seen is not None:
            self.trace.append(LayerTrace(self.name, _integers(input), seen, _integers(outputs)))
        return outputs


class Wrapped(nn.Module):
    """An array layer among floats. Whoever reads its weight or bias gets those of the float network."""

    def __init__(
        self, module: nn.Module, quantize: Quantize, layer: IntegerLayer, dequantize: Dequantize
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

    def forward(self, input: Tensor) -> Tensor:
        """The argument has the name of torch's, for those who call it by keyword."""
        return self.steps(input)


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
