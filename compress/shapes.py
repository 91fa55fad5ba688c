"""The geometry of every Linear and convolution of a network, in the order in which a forward pass runs
them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from hwsim.errors import HwsimError, InputError, Problem
from hwsim.layer import LayerShape

__all__ = ["evaluation_mode", "layer_shapes", "module_name"]

REUSE_MARK = "#"
"""Between the name of a module and the number of its second and later use: ``"shared#2"``."""


def module_name(layer_name: str) -> str:
    """The module that a layer belongs to: its name, without the mark of a second use.

    Examples
    --------
    >>> module_name("features.0"), module_name("head#2")
    ('features.0', 'head')
    """
    return layer_name.split(REUSE_MARK)[0]


def layer_shapes(model: nn.Module, input_shape: tuple[int, ...], batch: int = 1) -> list[LayerShape]:
    """The GEMM geometry of all Linear and Conv1d/2d/3d modules, in order of execution.

    A forward pass on torch's ``meta`` device shows it, so no arithmetic is done and the weights may be
    absent. Only where the network cannot run there (it reads values) does it run on zeros for real.

    Parameters
    ----------
    model : nn.Module
    input_shape : tuple of int
        Of one input, without the batch.
    batch : int
        Inputs per pass.

    Returns
    -------
    list of LayerShape
        Named like the modules. A module that runs more than once appears once per use, from the second on as
        ``"name#2"``: every use is work of its own. The batch of a layer is the first dimension of the tensor
        that reached it.

    Raises
    ------
    InputError
        The network does not take such an input, a convolution pads with something other than zeros, or
        nothing of the network is a layer.

    Warns
    -----
    UserWarning
        Modules with weight matrices that are no such layers, or whose layer no forward pass reaches: their
        work is not in the list.

    Examples
    --------
    >>> [(shape.m, shape.k, shape.n) for shape in layer_shapes(nn.Sequential(nn.Conv2d(3, 8, 3)), (3, 8, 8))]
    [(8, 27, 36)]
    """
    problems = [
        Problem(field, f"{value}, must be at least 1")
        for field, value in (
            ("batch", batch),
            *((f"input_shape[{i}]", size) for i, size in enumerate(input_shape)),
        )
        if value < 1
    ]
    if problems:
        raise InputError("layer shapes", problems)
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, _LAYERS)
    }
    shapes: list[LayerShape] = []
    uses: Counter[str] = Counter()

    def record(module: nn.Module, inputs: tuple[Any, ...], _output: object) -> None:
        name = names[module]
        uses[name] += 1
        mark = f"{REUSE_MARK}{uses[name]}" if uses[name] > 1 else ""
        shapes.append(_shape_of(name + mark, module, tuple(inputs[0].shape)))

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        for module in names:
            stack.callback(module.register_forward_hook(record).remove)
        try:
            _forward_on_meta(model, (batch, *input_shape))
        except HwsimError:
            raise
        except Exception:
            shapes.clear()
            uses.clear()
            _forward_for_real(model, (batch, *input_shape))
    _warn_of_missing_work(model, names, uses)
    if not shapes:
        raise InputError(
            type(model).__name__, Problem("", "no Linear or Conv1d/2d/3d ran; there is nothing to list")
        )
    return shapes


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and each back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _forward_on_meta(model: nn.Module, shape: tuple[int, ...]) -> None:
    tensors = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    with torch.device("meta"):
        torch.func.functional_call(model, tensors, (torch.empty(shape),))


def _forward_for_real(model: nn.Module, shape: tuple[int, ...]) -> None:
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    try:
        model(torch.zeros(shape, device=device))
    except HwsimError:
        raise
    except Exception as error:
        raise InputError(
            type(model).__name__,
            Problem(
                "input_shape", f"no forward pass with an input of {shape}: {type(error).__name__}: {error}"
            ),
        ) from error


def _shape_of(name: str, module: nn.Module, size: tuple[int, ...]) -> LayerShape:
    if isinstance(module, nn.Linear):
        batch, leading = (size[0], size[1:-1]) if len(size) > 1 else (1, ())
        return LayerShape(name, "linear", module.in_features, module.out_features, leading, batch=batch)
    if not isinstance(module, _LAYERS[1:]):  # for the type checker: hooks sit on _LAYERS only
        raise TypeError(type(module).__name__)
    if module.padding_mode != "zeros":
        raise InputError(
            f"layer {name}",
            Problem(
                "padding_mode",
                f'"{module.padding_mode}"; the array pads with zeros only, since padding is not fetched',
                'use padding_mode="zeros", or pad in front of the layer with nn.ReflectionPad2d and the like',
            ),
        )
    rank = len(module.kernel_size)
    return LayerShape(
        name=name,
        kind="conv",
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        input_size=size[-rank:],
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=_padding(module),
        dilation=tuple(module.dilation),
        groups=module.groups,
        batch=size[0] if len(size) == rank + 2 else 1,
    )


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[tuple[int, int], ...]:
    """Zeros before and after. "same" puts the odd one of an odd total behind, as torch does."""
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if module.padding == "same":
        totals = [
            dilation * (kernel - 1)
            for kernel, dilation in zip(module.kernel_size, module.dilation, strict=True)
        ]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((int(padding), int(padding)) for padding in module.padding)


def _warn_of_missing_work(model: nn.Module, names: dict[nn.Module, str], uses: Counter[str]) -> None:
    missing = [
        f"{name or 'the network itself'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if module not in names
        and not isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    ]
    missing += [f"{name} (never run as a module)" for name in names.values() if not uses[name]]
    if missing:
        warnings.warn(
            f"the work of these weights is not in the list of layers: {', '.join(missing)}",
            UserWarning,
            stacklevel=3,
        )
