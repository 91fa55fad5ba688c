"""Diagonal curvature of the loss at trained weights, from calibration data: how much a changed weight hurts.

Two estimates: the diagonal Fisher information, from gradients of single samples, and the diagonal of the layer-wise Hessian,
from the inputs of every layer. Both are per weight, in the weight's own shape, and never negative, as
`compress.projection` and `compress.admm` take them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.rules import PlannedLayer
from compress.shapes import evaluation_mode
from hwsim.errors import InputError, Problem

__all__ = ["CurvatureKind", "curvature", "diagonal_fisher", "diagonal_hessian"]

CurvatureKind = Literal["fisher", "hessian"]
LossFunction = Callable[[Tensor, Tensor], Tensor]

_GRADIENT_ENTRIES = 1 << 25
"""Entries of per-sample gradients that are held at a time (128 MiB in float32)."""


def curvature(
    kind: CurvatureKind,
    model: nn.Module,
    layers: Sequence[PlannedLayer],
    data: Iterable[tuple[Tensor, Tensor]],
    loss_fn: LossFunction = functional.cross_entropy,
) -> dict[str, Tensor]:
    """`diagonal_fisher` or `diagonal_hessian` by name."""
    if kind == "fisher":
        return diagonal_fisher(model, layers, data, loss_fn)
    return diagonal_hessian(model, layers, (inputs for inputs, _ in data))


def diagonal_fisher(
    model: nn.Module,
    layers: Sequence[PlannedLayer],
    data: Iterable[tuple[Tensor, Tensor]],
    loss_fn: LossFunction = functional.cross_entropy,
) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information: the mean over samples of the squared gradient of the loss.

    Parameters
    ----------
    model : nn.Module
        Run in evaluation mode; left as it was.
    layers : sequence of PlannedLayer
    data : iterable of (inputs, targets)
        Calibration batches; a few hundred samples do.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, a mean over samples.

    Returns
    -------
    dict from layer name to float32 Tensor of the weight's shape
        ``½·h·(w − z)²`` estimates what the loss grows by when w becomes z.

    Raises
    ------
    InputError
        No samples, or gradients that are not finite.

    Notes
    -----
    Source: pruning by the second-order Taylor expansion, LeCun, Denker, Solla, "Optimal Brain Damage", NIPS 1989, with the
    Fisher information in place of the Hessian: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning",
    arXiv 1801.05787 (2018).
    """
    names = {f"{layer.name}.weight": layer.name for layer in layers}
    parameters = {name: values.detach() for name, values in model.named_parameters()}
    weights = {name: parameters.pop(name) for name in names}
    buffers = {name: values.detach() for name, values in model.named_buffers()}

    def loss_of(weights: dict[str, Tensor], inputs: Tensor, target: Tensor) -> Tensor:
        state = {**parameters, **buffers, **weights}
        outputs = torch.func.functional_call(model, state, (inputs.unsqueeze(0),))
        return loss_fn(outputs, target.unsqueeze(0))

    gradient = torch.func.grad(loss_of)
    sums = {name: torch.zeros_like(values) for name, values in weights.items()}
    at_once = max(1, _GRADIENT_ENTRIES // max(1, sum(values.numel() for values in weights.values())))
    # One sample at a time inside: a network may do what vmap cannot follow, such as reading values.
    batched: Callable[..., dict[str, Tensor]] = torch.func.vmap(gradient, in_dims=(None, 0, 0))
    samples = 0
    with evaluation_mode(model):
        for inputs, targets in data:
            for part, labels in zip(inputs.split(at_once), targets.split(at_once), strict=True):
                samples += len(part)
                try:
                    found = batched(weights, part, labels)
                except RuntimeError:
                    pairs = zip(part, labels, strict=True)
                    singles = [gradient(weights, one, label) for one, label in pairs]
                    found = {name: torch.stack([single[name] for single in singles]) for name in names}
                for name, values in found.items():
                    sums[name] += values.square().sum(dim=0)
    return _means({names[name]: values for name, values in sums.items()}, samples)


def diagonal_hessian(
    model: nn.Module, layers: Sequence[PlannedLayer], inputs: Iterable[Tensor]
) -> dict[str, Tensor]:
    """The diagonal of every layer's own Hessian: the mean square of the input that each weight multiplies.

    It belongs to the squared error of the layer's outputs, summed over output positions, so it is comparable within a layer;
    normalise it to compare layers.

    Parameters
    ----------
    model : nn.Module
        Run in evaluation mode; left as it was.
    layers : sequence of PlannedLayer
    inputs : iterable of Tensor
        Calibration batches.

    Returns
    -------
    dict from layer name to float32 Tensor of the weight's shape

    Raises
    ------
    InputError
        No samples, or inputs that are not finite.

    Notes
    -----
    Source: the diagonal of ``X·Xᵀ`` of Hassibi, Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon",
    NIPS 1992, applied per layer as in Dong, Chen, Pan, "Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain
    Surgeon", NIPS 2017.
    """
    sums: dict[str, Tensor] = {}
    handles = []

    def listen(layer: PlannedLayer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            squares = _input_squares(module, arguments[0].detach())
            sums[layer.name] = sums.get(layer.name, torch.zeros_like(squares)) + squares

        return add

    samples = 0
    with evaluation_mode(model):
        try:
            for layer in layers:
                handles.append(layer.module.register_forward_pre_hook(listen(layer)))
            for batch in inputs:
                samples += len(batch)
                with torch.no_grad():
                    model(batch)
        finally:
            for handle in handles:
                handle.remove()
    rows = {}
    for layer in layers:
        # A layer that never ran cannot hurt.
        per_group = sums.get(layer.name, torch.zeros(layer.groups, *layer.weight_shape[1:]))
        rows[layer.name] = per_group.repeat_interleave(layer.m, dim=0)
    return _means(rows, samples)


@torch.enable_grad()
def _input_squares(module: nn.Module, inputs: Tensor) -> Tensor:
    """``[groups, in/groups, *kernel]``: Σ over samples and positions of the squared input that a weight multiplies.

    It is the gradient of a convolution of the squares with respect to its kernel.
    """
    if isinstance(module, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1]).square().sum(dim=0, keepdim=True)
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise TypeError(type(module).__name__)
    kernel = torch.zeros(module.groups, *module.weight.shape[1:], device=inputs.device, requires_grad=True)
    convolve: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[len(module.kernel_size) - 1]
    squares = inputs.square()
    padding: Any = module.padding
    if module.padding_mode != "zeros":
        squares = functional.pad(squares, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    outputs = convolve(squares, kernel, None, module.stride, padding, module.dilation, module.groups)
    (sums,) = torch.autograd.grad(outputs.sum(), kernel)
    return sums


def _means(sums: dict[str, Tensor], samples: int) -> dict[str, Tensor]:
    if samples == 0:
        raise InputError("calibration", Problem("data", "no samples; curvature needs at least one"))
    bad = [name for name, values in sums.items() if not bool(torch.isfinite(values).all())]
    if bad:
        message = "squared gradients or inputs are not finite"
        raise InputError("calibration", [Problem(name, message, "check weights and data") for name in bad])
    return {name: values / samples for name, values in sums.items()}
