"""Weights that are computed from other parameters, computed once and for all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from compress.shapes import evaluation_mode

__all__ = ["bake"]


def bake(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Replace every computed parameter by its value, in place; gives ``(module, its class, what was done)``."""
    for name, module in list(model.named_modules()):
        # Reading a spectral norm in training mode would move its estimate by one iteration.
        with evaluation_mode(module):
            found = list(_bake_hooks(module))
            if is_parametrized(module):
                found += _bake_parametrisations(module)
        if found:
            yield name, type(module).__name__, f"{', '.join(found)} as computed by its parametrisation"


def _bake_parametrisations(module: nn.Module) -> list[str]:
    """As `torch.nn.utils.parametrize.remove_parametrizations`, which would also edit the class that copies share."""
    values = {}
    for name, computed_by in module.parametrizations.items():  # type: ignore[union-attr,operator]
        is_trained = any(parameter.requires_grad for parameter in computed_by.parameters(recurse=False))
        with torch.no_grad():
            values[name] = nn.Parameter(getattr(module, name).detach().clone(), is_trained)
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        module.register_parameter(name, value)
    return list(values)


def _bake_hooks(module: nn.Module) -> Iterator[str]:
    """Those from before `torch.nn.utils.parametrize`: they compute the weight in front of every forward pass."""
    for hook in list(module._forward_pre_hooks.values()):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
                yield hook.name
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
                yield hook.name
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
                yield hook._tensor_name
