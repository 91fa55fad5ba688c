"""The baseline that people reach for first: whole filters and neurons taken out, the rest retrained.

Source: filters of least norm: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017; in residual networks only
the inner channels of a block, as there.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from hwsim.errors import InputError, Problem

__all__ = ["narrow_lenet5", "narrow_resnet"]


def narrow_lenet5(model: nn.Module, width: float) -> nn.Module:
    """LeNet-5 with a share of the channels of both convolutions and of the neurons of the first linear layer.

    Parameters
    ----------
    model : nn.Module
        Of the zoo, trained; left as it is.
    width : float
        In (0, 1]; rounded up to whole channels.
    """
    _check(width)
    small = copy.deepcopy(model)
    conv1, conv2, fc1, fc2 = (small.get_submodule(name) for name in ("conv1", "conv2", "fc1", "fc2"))
    positions = fc1.get_parameter("weight").shape[1] // conv2.get_parameter("weight").shape[0]
    _shrink(conv1, conv2, width, 1)
    _shrink(conv2, fc1, width, positions)
    _shrink(fc1, fc2, width, 1)
    return small


def narrow_resnet(model: nn.Module, width: float) -> nn.Module:
    """A residual network with a share of the inner channels of every block; the residual stream keeps its own.

    Parameters
    ----------
    model : nn.Module
        With blocks that have ``conv1``, ``bn1`` and ``conv2``; left as it is.
    width : float
    """
    _check(width)
    small = copy.deepcopy(model)
    for block in small.modules():
        inner = {name for name, _ in block.named_children()}
        if {"conv1", "bn1", "conv2", "bn2"} <= inner:
            kept = _shrink(block.get_submodule("conv1"), block.get_submodule("conv2"), width, 1)
            norm = block.get_submodule("bn1")
            for name in ("weight", "bias"):
                setattr(norm, name, nn.Parameter(norm.get_parameter(name).detach()[kept]))
            for name in ("running_mean", "running_var"):
                setattr(norm, name, norm.get_buffer(name)[kept])
            norm.num_features = len(kept)  # type: ignore[assignment]
    return small


def _check(width: float) -> None:
    if not 0 < width <= 1:
        raise InputError("channel pruning", Problem("width", f"{width}, must be above 0 and at most 1"))


def _shrink(producer: nn.Module, reader: nn.Module, width: float, positions: int) -> Tensor:
    """Take the outputs of least norm out of one layer, and what reads them out of the next; gives those that stay."""
    weight, read = producer.get_parameter("weight").detach(), reader.get_parameter("weight").detach()
    count = math.ceil(round(width * len(weight), 9))
    norms = weight.flatten(1).norm(dim=1)
    kept = torch.sort(torch.topk(norms, count).indices).values
    producer.weight = nn.Parameter(weight[kept].clone())
    if producer._parameters.get("bias") is not None:
        producer.bias = nn.Parameter(producer.get_parameter("bias").detach()[kept].clone())
    columns = (kept[:, None] * positions + torch.arange(positions)).flatten()
    reader.weight = nn.Parameter(read[:, columns].clone())
    setattr(producer, "out_channels" if weight.dim() == 4 else "out_features", count)
    setattr(reader, "in_channels" if read.dim() == 4 else "in_features", len(columns))
    return kept
