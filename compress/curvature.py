"""How much a changed weight hurts, from calibration data: one pass with hooks, three views of what it saw.

Every layer is looked at through the inputs ``x`` that its weights multiply, ``[k]`` at each output position, and through the
gradients ``g`` of the loss with respect to its outputs. From these come the Hessian of the layer's own squared error
(``Σ x·xᵀ``, or its diagonal), and the diagonal of the Fisher information of the network's loss (the mean of ``(Σ g·xᵀ)²``),
which may be smoothed to an outer product of rows and columns.

Sources: Hessian of a layer: Hassibi, Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992,
applied per layer as in Dong, Chen, Pan, "Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain Surgeon", NIPS
2017. Pruning by a diagonal: LeCun, Denker, Solla, "Optimal Brain Damage", NIPS 1989, with the Fisher information in place of
the Hessian: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", arXiv 1801.05787 (2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from compress.blocks import ColumnOrder, weight_to_matrix
from compress.layers import CompressedLayer
from compress.rules import PlannedLayer
from compress.shapes import evaluation_mode
from hwsim.errors import InputError, Problem

__all__ = [
    "Curvature",
    "CurvatureKind",
    "Moments",
    "column_permutation",
    "curvature",
    "curvatures",
    "diagonal_fisher",
    "diagonal_hessian",
    "in_chunks",
    "input_moments",
    "input_patches",
    "is_observable",
    "listening",
]

CurvatureKind = Literal["fisher", "hessian"]
LossFunction = Callable[[Tensor, Tensor], Tensor]

CURVATURE_FLOOR = 0.02
"""Share of a layer's mean curvature that every weight has at least: calibration sees few inputs."""

_ENTRIES = 1 << 24
"""Entries of unfolded inputs, and of gradients of single samples, that are held at a time (64 MiB in float32)."""


# --- what a layer multiplies


def is_observable(module: nn.Module) -> bool:
    """Whether `input_patches` knows what the weights of a module multiply."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def input_patches(module: nn.Module, inputs: Tensor) -> Tensor:
    """What each weight of a layer multiplies: ``[n, groups, positions, k]``, k in the order of the weight itself.

    Parameters
    ----------
    module : Linear or Conv1d/2d/3d
        Any stride, padding (zeros or not), dilation and groups.
    inputs : Tensor
        As they reach the module, with a batch.

    Raises
    ------
    TypeError
        Another kind of module.

    Examples
    --------
    >>> input_patches(nn.Conv1d(1, 1, 2), torch.tensor([[[1.0, 2.0, 3.0]]])).tolist()
    [[[[1.0, 2.0], [2.0, 3.0]]]]
    """
    if isinstance(module, nn.Linear):
        return inputs.reshape(len(inputs), 1, -1, inputs.shape[-1])
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise TypeError(type(module).__name__)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode).contiguous()
    samples, channels, *size = padded.shape
    geometry = zip(size, module.kernel_size, module.stride, module.dilation, strict=True)
    outputs = [(length - step * (kernel - 1) - 1) // stride + 1 for length, kernel, stride, step in geometry]
    along = padded.stride()[2:]
    windows = padded.as_strided(
        (samples, channels, *module.kernel_size, *outputs),
        (
            *padded.stride()[:2],
            *(step * dilation for step, dilation in zip(along, module.dilation, strict=True)),
            *(step * stride for step, stride in zip(along, module.stride, strict=True)),
        ),
    )
    return windows.reshape(samples, module.groups, -1, math.prod(outputs)).transpose(2, 3)


def _output_gradients(module: nn.Module, gradients: Tensor) -> Tensor:
    """Gradients of a layer's outputs as ``[n, groups, positions, m]``."""
    if isinstance(module, nn.Linear):
        return gradients.reshape(len(gradients), 1, -1, gradients.shape[-1])
    groups = int(getattr(module, "groups", 1))
    return gradients.reshape(len(gradients), groups, gradients.shape[1] // groups, -1).transpose(2, 3)


def in_chunks(module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """`input_patches` of so few samples at a time that memory stays bounded."""
    taps = math.prod(getattr(module, "kernel_size", (1,)))
    per_sample = max(1, inputs[:1].numel() * taps)
    for part in inputs.split(max(1, _ENTRIES // per_sample)):
        yield input_patches(module, part)


@contextmanager
def listening(
    modules: Mapping[str, nn.Module], listener: Callable[[str, nn.Module, Tensor, Tensor], None]
) -> Iterator[None]:
    """``listener(name, module, inputs, outputs)`` is called whenever one of the modules ran."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        return lambda module, given, named, outputs: listener(
            name, module, next(iter((*given, *named.values()))), outputs
        )

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(hook(name), with_kwargs=True).remove)
        yield


# --- moments of the inputs


@dataclass(eq=False)
class Moments:
    """Sums over everything that reached a layer, columns in the order of the weight itself.

    Attributes
    ----------
    second : float64 Tensor ``[groups, k, k]``, or ``[groups, k]`` of the diagonal alone
        ``Σ x·xᵀ``.
    first : float64 Tensor ``[groups, k]``
        ``Σ x``.
    positions : int
        Terms of the sums, per group.
    """

    second: Tensor
    first: Tensor
    positions: int = 0

    @classmethod
    def zeros(cls, layer: PlannedLayer, full: bool) -> Moments:
        """Of a layer that has seen nothing."""
        shape = (layer.groups, layer.k)
        device = layer.module.get_parameter("weight").device
        second = torch.zeros((*shape, layer.k) if full else shape, dtype=torch.float64, device=device)
        return cls(second, torch.zeros(shape, dtype=torch.float64, device=device))

    def add(self, module: nn.Module, inputs: Tensor) -> None:
        """The inputs of one batch, unfolded a few samples at a time."""
        for patches in in_chunks(module, inputs):
            self.add_rows(patches.transpose(0, 1).flatten(1, 2))

    def add_rows(self, rows: Tensor) -> None:
        """Patches as rows: ``[groups, n, k]``."""
        self.second += rows.mT @ rows if self.second.dim() == 3 else rows.square().sum(dim=1)
        self.first += rows.sum(dim=1)
        self.positions += rows.shape[1]


@torch.no_grad()
def input_moments(
    model: nn.Module, layers: Sequence[PlannedLayer], inputs: Iterable[Tensor], *, full: bool = True
) -> tuple[dict[str, Moments], int]:
    """The moments of the inputs of some layers, from one pass; also the number of samples.

    Parameters
    ----------
    model : nn.Module
        Run in evaluation mode; left as it was.
    layers : sequence of PlannedLayer
        Of kinds that `is_observable` accepts. One that never runs keeps zeros.
    inputs : iterable of Tensor
        Calibration batches.
    full : bool
        With all products of two inputs; otherwise the squares alone.
    """
    moments = {layer.name: Moments.zeros(layer, full) for layer in layers}
    samples = 0
    with (
        evaluation_mode(model),
        listening(_modules(layers), lambda name, module, x, _: moments[name].add(module, x)),
    ):
        for batch in inputs:
            samples += len(batch)
            model(batch)
    return moments, samples


def _modules(layers: Sequence[PlannedLayer]) -> dict[str, nn.Module]:
    return {layer.name: layer.module for layer in layers}


def column_permutation(weight_shape: tuple[int, ...], column_order: ColumnOrder) -> Tensor:
    """Columns of the block view as indices into those of the weight itself: ``int64[k]``.

    Examples
    --------
    >>> column_permutation((1, 2, 3), "tap_major").tolist()  # two channels, three taps
    [0, 3, 1, 4, 2, 5]
    """
    row = torch.arange(math.prod(weight_shape[1:])).reshape(1, *weight_shape[1:])
    return weight_to_matrix(row, 1, column_order)[0, 0]


# --- the diagonal, per weight


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
        Zero for a layer that never ran: it cannot hurt.

    Raises
    ------
    InputError
        No samples, or inputs that are not finite.
    """
    moments, samples = input_moments(model, layers, inputs, full=False)
    rows = {
        layer.name: moments[layer.name]
        .second.float()
        .repeat_interleave(layer.m, dim=0)
        .reshape(layer.weight_shape)
        for layer in layers
    }
    return _means(rows, samples)


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
        Run in evaluation mode; left as it was. The samples of a batch must not see each other.
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
    """

    def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
        singles = [loss_fn(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(outputs))]
        return torch.stack(singles).sum()

    sums, samples = _squared_gradients(model, _modules(layers), data, loss_of, of_samples=True)
    shaped = {layer.name: sums[layer.name].float().reshape(layer.weight_shape) for layer in layers}
    return _means(shaped, samples)


def _squared_gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    data: Iterable[tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    of_samples: bool,
) -> tuple[dict[str, Tensor], int]:
    """Sums of squared gradients of a loss that is a sum over samples: ``float64[groups, m, k]`` per module; and the samples.

    What is squared is the gradient of each sample, or that of each batch.
    """
    sums = {
        name: torch.zeros(
            int(getattr(module, "groups", 1)),
            len(weight) // int(getattr(module, "groups", 1)),
            weight[0].numel(),
            dtype=torch.float64,
            device=weight.device,
        )
        for name, module in modules.items()
        for weight in [module.get_parameter("weight")]
    }
    seen: list[tuple[str, Tensor, GradientEdge]] = []

    def see(name: str, _: nn.Module, x: Tensor, outputs: Tensor) -> None:
        # The edge, not the tensor: an activation in place would make it another one.
        if outputs.requires_grad:
            seen.append((name, x.detach(), get_gradient_edge(outputs)))

    samples = 0
    with (
        evaluation_mode(model),
        torch.enable_grad(),
        listening(modules, see),
    ):
        for inputs, targets in data:
            samples += len(inputs)
            seen.clear()
            loss = loss_of(model(inputs), targets)
            if not (loss.requires_grad and seen):
                message = "has no derivative with respect to any weight"
                hint = "the forward pass switches gradients off, or gives whole numbers"
                raise InputError("curvature", Problem("loss", message, hint))
            gradients = torch.autograd.grad(loss, [edge for *_, edge in seen], allow_unused=True)
            uses: dict[str, list[tuple[Tensor, Tensor]]] = {}
            for (name, x, _), gradient in zip(seen, gradients, strict=True):
                if gradient is not None:
                    uses.setdefault(name, []).append((x, gradient))
            for name, pairs in uses.items():
                _add_squares(sums[name], modules[name], pairs, of_samples)
    return sums, samples


@torch.no_grad()
def _add_squares(
    total: Tensor, module: nn.Module, uses: Sequence[tuple[Tensor, Tensor]], of_samples: bool
) -> None:
    """Add the squared gradient of the weight, summed over positions and over the uses of the module."""
    samples = len(uses[0][0])
    taps = math.prod(getattr(module, "kernel_size", (1,)))
    per_sample = max(total.numel(), *(taps * x[:1].numel() for x, _ in uses))
    step = max(1, _ENTRIES // per_sample)
    batch = torch.zeros_like(total)
    for start in range(0, samples, step):
        part: Tensor | None = None
        for x, gradient in uses:
            columns = input_patches(module, x[start : start + step])
            rows = _output_gradients(module, gradient[start : start + step])
            found = rows.mT @ columns  # [n, groups, m, k]
            part = found if part is None else part + found
        assert part is not None  # a module in the list ran at least once
        if of_samples:
            total += part.square().sum(dim=0)
        else:
            batch += part.sum(dim=0)
    if not of_samples:
        total += batch.square()


def _means(sums: dict[str, Tensor], samples: int) -> dict[str, Tensor]:
    if samples == 0:
        raise InputError("calibration", Problem("data", "no samples; curvature needs at least one"))
    bad = [name for name, values in sums.items() if not bool(torch.isfinite(values).all())]
    if bad:
        message = "squared gradients or inputs are not finite"
        raise InputError("calibration", [Problem(name, message, "check weights and data") for name in bad])
    return {name: values / samples for name, values in sums.items()}


# --- rows and columns


Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Curvature:
    """Curvature of the loss along each weight of a layer: ``rows · columns + floor``, in nats per squared weight.

    Attributes
    ----------
    rows : float64 array ``[groups, m, 1]``
    columns : float64 array ``[groups, 1, k]``
    floor : float
        What every weight has at least.
    """

    rows: Array
    columns: Array
    floor: float

    def full(self) -> Array:
        """``float64[groups, m, k]``, positive."""
        return self.rows * self.columns + self.floor

    def at(self, mask: NDArray[np.bool_]) -> Array:
        """`full` where a mask ``[groups, m, k]`` is set, without the rest."""
        group, row, column = np.nonzero(mask)
        return self.rows[group, row, 0] * self.columns[group, 0, column] + self.floor

    def of_blocks(self, block: tuple[int, int]) -> tuple[Array, Array]:
        """Sums of `full` over the real entries of every block, and their numbers: ``[groups, Mb, Kb]`` each."""
        sizes = (self.rows.shape[1], self.columns.shape[2])
        tops, lefts = (np.arange(0, size, step) for size, step in zip(sizes, block, strict=True))
        rows, columns = np.add.reduceat(self.rows, tops, axis=1), np.add.reduceat(self.columns, lefts, axis=2)
        heights = np.diff(np.append(tops, sizes[0])).astype(np.float64)
        widths = np.diff(np.append(lefts, sizes[1])).astype(np.float64)
        entries = np.broadcast_to(np.outer(heights, widths), (len(rows), len(tops), len(lefts)))
        return rows * columns + self.floor * entries, entries

    @classmethod
    def constant(cls, groups: int, m: int, k: int, value: float = 1.0) -> Curvature:
        """The same for every weight: what is left without calibration inputs."""
        return cls(np.zeros((groups, m, 1)), np.zeros((groups, 1, k)), value)

    @classmethod
    def of_diagonal(cls, diagonal: Tensor) -> Curvature:
        """The outer product of the means of a diagonal ``[groups, m, k]`` over rows and columns.

        The gradient of a matrix product is an outer product too, and single entries are noisier than they are different.
        """
        mean = diagonal.mean(dim=(1, 2), keepdim=True)
        rows, columns = diagonal.mean(dim=2, keepdim=True), diagonal.mean(dim=1, keepdim=True)
        columns = torch.where(mean > 0, columns / mean, torch.zeros_like(mean))
        return cls(rows.numpy(), columns.numpy(), CURVATURE_FLOOR * float(diagonal.mean()) or 1.0)


def curvatures(
    model: nn.Module,
    layers: Mapping[str, CompressedLayer],
    inputs: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, Curvature]:
    """The diagonal of the Fisher matrix of every layer's weight, smoothed to rows and columns.

    It is estimated from gradients for labels that the network's own distribution draws.

    Parameters
    ----------
    model : nn.Module
        Gives logits ``[n, classes]``. Run in evaluation mode; left as it was.
    layers : mapping of str to CompressedLayer
    inputs : Tensor ``[n, …]``
        Calibration inputs; the more the better, 512 are enough for small networks.
    seed : int
        Of the labels.
    batch_size : int
        Inputs whose gradients are added before squaring. With labels drawn from the network they are independent
        and of mean 0, so the expectation does not depend on it.
    """
    generator = torch.Generator().manual_seed(seed)

    def loss_of(logits: Tensor, _: Tensor) -> Tensor:
        if logits.dim() != 2:
            problem = Problem("output", f"shape {tuple(logits.shape)}, must be [n, classes]")
            raise InputError("curvatures", problem)
        drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[:, 0]
        return functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")

    modules = {name: model.get_submodule(name) for name in layers}
    batches = ((batch, batch) for batch in inputs.split(batch_size))
    sums, samples = _squared_gradients(model, modules, batches, loss_of, of_samples=False)
    found = {}
    for name, layer in layers.items():
        columns = column_permutation(tuple(modules[name].get_parameter("weight").shape), layer.column_order)
        found[name] = Curvature.of_diagonal((sums[name] / samples)[:, :, columns].cpu())
    return found
