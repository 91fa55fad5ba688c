"""Small operations on the tree of modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["linear_of", "replace_module"]


def replace_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put a module in the place of another; gives the root, which may be the new module itself."""
    if not name:
        return module
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    return model


def linear_of(weight: Tensor, bias: Tensor | None, like: Tensor) -> nn.Linear:
    """A Linear of these values; whether it is trained follows ``like``."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach().clone(), like.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), like.requires_grad)
    return linear
