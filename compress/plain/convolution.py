"""Convolutions that the array does not run as they are: transposed ones, and those that pad with other than zeros."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from hwsim.errors import InputError, Problem

__all__ = ["Interleave", "Pad", "PaddedConvolution", "SubPixelConvolution"]

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Ordinary = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Interleave(nn.Module):
    """Channels to positions: ``[…, c · s₁ · s₂, u₁, u₂]`` to ``[…, c, s₁·u₁, s₂·u₂]``, then cut off at both ends.

    Parameters
    ----------
    stride : tuple of int
        ``s`` of each dimension; the phase of the last dimension is the fastest.
    before, after : tuple of int
        Positions to cut off.
    """

    def __init__(self, stride: tuple[int, ...], before: tuple[int, ...], after: tuple[int, ...]) -> None:
        super().__init__()
        self.stride, self.before, self.after = stride, before, after

    def forward(self, x: Tensor) -> Tensor:
        rank = len(self.stride)
        lead, sizes = x.shape[: -rank - 1], x.shape[-rank:]
        phases = x.reshape(*lead, -1, *self.stride, *sizes)
        first = len(lead) + 1
        order = [*range(first)]
        for dimension in range(rank):
            order += [first + rank + dimension, first + dimension]
        full = [size * stride for size, stride in zip(sizes, self.stride, strict=True)]
        whole = phases.permute(order).reshape(*lead, -1, *full)
        for dimension, (before, after) in enumerate(zip(self.before, self.after, strict=True)):
            size = full[dimension] - before - after
            whole = whole.narrow(whole.dim() - rank + dimension, before, size)
        return whole


class SubPixelConvolution(nn.Module):
    """Takes the place of a transposed convolution: an ordinary one whose outputs are interleaved.

    Output ``o`` of a transposed convolution of stride ``s`` reads the taps ``t`` with ``o + padding = s·i + t``: which of them
    depends on ``o mod s`` only. So it is ``s`` ordinary convolutions on the same input, the phases, each with every ``s``-th
    tap; their outputs alternate. They are the channels of one convolution ``conv`` with ``s`` times as many outputs.

    Source: Shi et al., "Is the deconvolution layer the same as a convolutional layer?", arXiv 1609.07009.
    """

    def __init__(self, conv: nn.Module, interleave: Interleave) -> None:
        super().__init__()
        self.conv, self.interleave = conv, interleave

    @classmethod
    def of(cls, module: Transposed) -> Self:
        """The same function as a module of torch's.

        Kernels that the stride does not divide get zeros behind them; a dilated kernel with a stride gets zeros between.
        """
        rank, groups, strides = len(module.kernel_size), module.groups, module.stride
        weight = module.weight.detach()
        taps, dilations, padding, before, after = [], [], [], [], []
        for axis in range(rank):
            kernel, stride, pad = module.kernel_size[axis], strides[axis], int(module.padding[axis])
            dilation, extra = module.dilation[axis], int(module.output_padding[axis])
            reach = (kernel - 1) * dilation + 1
            if stride > 1:
                weight = _spread(weight, 2 + axis, dilation, stride)
                dilation = 1
            count = weight.shape[2 + axis] // stride
            behind = dilation * (count - 1)
            both = max(behind - pad // stride, (reach + extra - pad - 1) // stride, 0)
            start = pad - stride * (behind - both)
            taps.append(count)
            dilations.append(dilation)
            padding.append(both)
            before.append(start)
            after.append(stride * (2 * both - behind + 1) - start + 2 * pad - reach - extra)
        per_group = module.out_channels // groups
        phases = weight.reshape(
            groups, -1, per_group, *(size for pair in zip(taps, strides, strict=True) for size in pair)
        )
        axes = [3 + 2 * axis for axis in range(rank)]
        kernel_last = phases.permute(0, 2, *(axis + 1 for axis in axes), 1, *axes).flip(
            tuple(range(-rank, 0))
        )
        copies = math.prod(strides)
        with torch.device("meta"):
            conv = _CONVOLUTIONS[rank](
                module.in_channels,
                module.out_channels * copies,
                tuple(taps),
                padding=tuple(padding),
                dilation=tuple(dilations),
                groups=groups,
                bias=module.bias is not None,
            )
        in_channels = module.in_channels // groups
        conv.weight = nn.Parameter(
            kernel_last.reshape(-1, in_channels, *taps).contiguous(), module.weight.requires_grad
        )
        if module.bias is not None:
            bias = module.bias.detach().repeat_interleave(copies)
            conv.bias = nn.Parameter(bias, module.bias.requires_grad)
        return cls(conv, Interleave(tuple(strides), tuple(before), tuple(after)))

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The arguments have the names of torch's, for those who call it by keyword."""
        values = self.interleave(self.conv(input))
        if output_size is not None:
            sizes = tuple(output_size)[-(len(self.interleave.stride)) :]
            if sizes != tuple(values.shape[-len(sizes) :]):
                message = f"{sizes}, the layer as built gives {tuple(values.shape[-len(sizes) :])}"
                hint = "give nn.ConvTranspose its output_padding instead"
                raise InputError("transposed convolution", Problem("output_size", message, hint))
        return values


def _spread(weight: Tensor, axis: int, dilation: int, stride: int) -> Tensor:
    """Zeros between the taps of a dilated kernel, and behind it up to a multiple of the stride."""
    reach = (weight.shape[axis] - 1) * dilation + 1
    size = list(weight.shape)
    size[axis] = -(-reach // stride) * stride
    places = torch.arange(0, reach, dilation, device=weight.device)
    return weight.new_zeros(size).index_copy_(axis, places, weight)


class Pad(nn.Module):
    """`functional.pad` with values of the tensor itself: "reflect", "replicate" or "circular"."""

    def __init__(self, sides: tuple[int, ...], mode: str) -> None:
        super().__init__()
        self.sides, self.mode = sides, mode

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x, self.sides, self.mode)


class PaddedConvolution(nn.Module):
    """Takes the place of a convolution whose padding is not zeros: the array would fetch nothing for it."""

    def __init__(self, pad: Pad, conv: nn.Module) -> None:
        super().__init__()
        self.pad, self.conv = pad, conv

    @classmethod
    def of(cls, module: Ordinary) -> Self:
        """The same function as a module of torch's."""
        with torch.device("meta"):
            conv = _CONVOLUTIONS[len(module.kernel_size)](
                module.in_channels,
                module.out_channels,
                module.kernel_size,
                stride=module.stride,
                dilation=module.dilation,
                groups=module.groups,
                bias=module.bias is not None,
            )
        conv.weight, conv.bias = module.weight, module.bias
        return cls(Pad(tuple(module._reversed_padding_repeated_twice), module.padding_mode), conv)

    def forward(self, input: Tensor) -> Tensor:
        """The argument has the name of torch's, for those who call it by keyword."""
        return self.conv(self.pad(input))
