"""The order of the rewrites, and the record of what they did."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.plain.attention import Attention
from compress.plain.convolution import PaddedConvolution, SubPixelConvolution
from compress.plain.functional_calls import with_layers_for_calls
from compress.plain.parametrised import bake
from compress.plain.ties import merge_ties
from compress.plain.tree import replace_module

__all__ = ["Change", "PlainNetwork", "to_plain"]


@dataclass(frozen=True)
class Change:
    """One rewritten module.

    Attributes
    ----------
    name : str
        In the network that came in; empty for the network itself.
    kind : str
        Class that it had.
    became : str
        What stands there now, in words, with what that costs.
    """

    name: str
    kind: str
    became: str


@dataclass(frozen=True, eq=False)
class PlainNetwork:
    """A network in which all matrix work is done by Linear and Conv1d/2d/3d modules, as far as that can be had.

    Attributes
    ----------
    model : nn.Module
        The rewritten copy.
    changes : tuple of Change
        Empty where the network was plain already.
    """

    model: nn.Module
    changes: tuple[Change, ...]


def to_plain(model: nn.Module) -> PlainNetwork:
    """A copy of a network that computes the same with plain layers.

    ``nn.MultiheadAttention`` becomes four Linears (``….q``, ``….k``, ``….v``, ``….out``), a transposed convolution a
    convolution (``….conv``) and a rearrangement of its outputs, padding other than zeros a module of its own in front of the
    convolution. Parametrisations (weight norm, spectral norm, pruning masks) are carried out once and for all. A weight that
    several layers share belongs to one module that all of them use, an embedding tied to a layer looks into that layer's
    weight, and ``functional.linear``, ``functional.convNd`` and products with a parameter become layers where torch.fx can
    trace the module that does them.

    Parameters
    ----------
    model : nn.Module
        Left as it is. Its mode (training or evaluation) is that of the copy.

    Returns
    -------
    PlainNetwork

    Examples
    --------
    >>> plain = to_plain(nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2)))
    >>> [name for name, module in plain.model.named_modules() if isinstance(module, nn.Linear)]
    ['0', '1.q', '1.k', '1.v', '1.out']
    >>> plain.changes[0].kind
    'MultiheadAttention'
    """
    # Attributes that a hook computed from parameters cannot be copied with their history, and need not be.
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    copied = copy.deepcopy(model, memo)
    changes = [Change(name, kind, became) for name, kind, became in bake(copied)]
    copied, found = with_layers_for_calls(copied)
    changes += [Change(name, kind, became) for name, kind, became in found]
    for name, module, became in list(_replacements(copied)):
        copied = replace_module(copied, name, module)
        changes.append(became)
    changes += _without_nested_tensors(copied)
    changes += [Change(name, kind, became) for name, kind, became in merge_ties(copied)]
    return PlainNetwork(copied, tuple(changes))


def _replacements(model: nn.Module) -> Iterator[tuple[str, nn.Module, Change]]:
    """Modules that have a plain form, under each of their names: one module used in two places stays one."""
    made: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        is_new = id(module) not in made
        became = ""
        with torch.no_grad():
            if type(module) is nn.MultiheadAttention:
                if is_new:
                    made[id(module)] = Attention.of(module)
                became = "q, k, v and out as Linears"
            elif type(module) in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
                if is_new:
                    made[id(module)] = SubPixelConvolution.of(module)
                became = _of_transposed(module, made[id(module)])
            elif type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and module.padding_mode != "zeros":
                if is_new:
                    made[id(module)] = PaddedConvolution.of(module)
                became = f"padding ({module.padding_mode}) outside the array, and a convolution without any"
        if became:
            made[id(module)].train(module.training)
            yield name, made[id(module)], Change(name, type(module).__name__, became)


def _without_nested_tensors(model: nn.Module) -> Iterator[Change]:
    """`nn.TransformerEncoder` may hand the weights of its layers to a kernel of its own; here the layers themselves run."""
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
            module.use_nested_tensor = False
            became = "without nested tensors: what padded positions give is not set to 0"
            yield Change(name, type(module).__name__, became)


def _of_transposed(module: nn.Module, plain: nn.Module) -> str:
    before = module.get_parameter("weight").numel()
    after = plain.get_parameter("conv.weight").numel()
    stride = math.prod(module.stride)  # type: ignore[arg-type]
    zeros = f", {after / before - 1:.0%} more weights (zeros)" if after != before else ""
    if stride == 1:
        return f"a convolution with the kernel reversed{zeros}"
    return f"a convolution with {stride} outputs per channel, interleaved{zeros}"
