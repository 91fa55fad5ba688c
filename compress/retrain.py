"""Retraining inside the compressed form, harvesting its integers, and checking that nothing slipped.

Pruned weights stay zero, a unified block has one trainable magnitude behind frozen signs, dense blocks are
free, and every forward pass sees quantised weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from compress.blocks import (
    block_sums,
    expand_blocks,
    matrix_to_blocks,
    matrix_to_weight,
    real_entries,
    weight_to_matrix,
)
from compress.layers import CompressedLayer
from compress.quantize import (
    choose_step_size,
    dequantize,
    fake_quantize,
    magnitude_range,
    quantize_blocks,
    weight_range,
)
from compress.rules import Plan, PlannedLayer
from hwsim.errors import InputError, Problem
from hwsim.layer import DENSE, PRUNED, UNIFIED

__all__ = ["MaskedRetraining", "check_invariants"]


class _SharedMagnitudes(torch.autograd.Function):
    """``signs · magnitude`` of every block; the gradient of a magnitude is ``Σ sign · g`` over its block."""

    @staticmethod
    def forward(ctx: Any, magnitudes: Tensor, signs: Tensor, block: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(signs)
        ctx.block = block
        return expand_blocks(magnitudes, block, signs.shape[1], signs.shape[2]) * signs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (signs,) = ctx.saved_tensors
        return block_sums(grad_output * signs, ctx.block), None, None


class _BlockForm(nn.Module):
    """The weight of a layer as a function of its dense weights and magnitudes (a torch parametrisation)."""

    types: Tensor
    signs: Tensor
    dense_mask: Tensor
    step_size: Tensor

    def __init__(self, layer: PlannedLayer, types: Tensor) -> None:
        super().__init__()
        self.layer = layer
        settings = layer.settings
        weight = layer.module.get_parameter("weight").detach()
        self.memory_format = _memory_format(weight)
        matrix = weight_to_matrix(weight, layer.groups, settings.column_order)
        types = types.to(weight.device)
        unified, dense = (
            expand_blocks(types == code, settings.block, layer.m, layer.k) for code in (UNIFIED, DENSE)
        )
        self.register_buffer("types", types)
        # ±1 in unified blocks, 0 elsewhere.
        self.register_buffer("signs", (1.0 - 2.0 * (matrix < 0)) * unified)
        self.register_buffer("dense_mask", dense.to(weight.dtype))
        self.register_buffer("step_size", torch.ones((), device=weight.device))
        self.has_unified = bool(unified.any())
        self.has_dense = bool(dense.any())

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Dense weights ``[groups, m, k]``, magnitudes ``[groups, Mb, Kb]``; empty where no block needs them."""
        settings = self.layer.settings
        matrix = weight_to_matrix(weight, self.layer.groups, settings.column_order)
        counts = real_entries(self.layer.m, self.layer.k, settings.block, matrix.device).to(matrix)
        magnitudes = block_sums(matrix * self.signs, settings.block) / counts
        nothing = matrix.new_empty(0)
        return (
            matrix * self.dense_mask if self.has_dense else nothing,
            magnitudes if self.has_unified else nothing,
        )

    def forward(self, dense: Tensor, magnitudes: Tensor) -> Tensor:
        settings = self.layer.settings
        matrix = torch.zeros_like(self.signs)
        if self.has_unified:
            quantized = fake_quantize(magnitudes, self.step_size, *magnitude_range(settings.magnitude_bits))
            matrix = _SharedMagnitudes.apply(quantized, self.signs, settings.block)
        if self.has_dense:
            quantized = fake_quantize(dense, self.step_size, *weight_range(settings.weight_bits))
            matrix = matrix + quantized * self.dense_mask
        return matrix_to_weight(matrix, self.layer.weight_shape, settings.column_order, self.memory_format)


def _memory_format(weight: Tensor) -> torch.memory_format:
    """Whether the channel is fastest in memory. By strides: with one channel a weight counts as contiguous in both ways."""
    if weight.dim() != 4:
        return torch.contiguous_format
    like = torch.empty(weight.shape, device="meta").to(memory_format=torch.channels_last)
    return torch.channels_last if weight.stride() == like.stride() else torch.contiguous_format


class MaskedRetraining:
    """The network with every planned layer held in its compressed form, for the user's own training loop.

    Build the optimizer *after* this object: the layers' parameters are new ones. Call `step` after every step
    of the optimizer, `calibrate` now and then (every epoch), and `harvest` at the end. As a context manager
    it takes the network out of the compressed form when the block is left by an exception.

    Parameters
    ----------
    model : nn.Module
    plan : Plan
        Of this very model.
    types : mapping from layer name to uint8 Tensor ``[groups, Mb, Kb]``
        As `ADMM.finalize` returns them. The weights are brought into the form that they ask for; signs are
        taken from the weights, ``sign(0) = +1``, and frozen.

    Raises
    ------
    InputError
        Types missing or of another shape, counts other than the plan's, or a model that DistributedDataParallel wraps: wrap
        it after this, since its parameters change.

    Examples
    --------
    >>> from compress.admm import ADMM
    >>> from compress.rules import CompressionConfig, plan_layers
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    >>> plan = plan_layers(model, CompressionConfig(block=(2, 2), exempt_first_last=False))
    >>> retraining = MaskedRetraining(model, plan, ADMM(model, plan).finalize())
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> model(torch.ones(1, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> retraining.step()
    >>> sorted(retraining.harvest())
    ['0', '2']
    """

    def __init__(self, model: nn.Module, plan: Plan, types: Mapping[str, Tensor]) -> None:
        if isinstance(model, DistributedDataParallel):
            hint = "MaskedRetraining(model.module, …), then DistributedDataParallel(model.module)"
            raise InputError(
                "MaskedRetraining", Problem("model", "is wrapped already, but gets new parameters", hint)
            )
        problems = [
            problem for layer in plan.layers for problem in _type_problems(layer, types.get(layer.name))
        ]
        if problems:
            raise InputError("block types", problems)
        self.model = model
        self.plan = plan
        self._forms: dict[str, _BlockForm] = {}
        for layer in plan.layers:
            form = _BlockForm(layer, types[layer.name])
            parametrize.register_parametrization(layer.module, "weight", form)
            self._forms[layer.name] = form
            for original in self._held(layer).parameters():
                # DistributedDataParallel would wait for the gradient of an empty one.
                original.requires_grad_(original.numel() > 0)
        self.calibrate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _held(self, layer: PlannedLayer) -> Any:
        return layer.module.parametrizations["weight"]  # type: ignore[index]

    def _originals(self, layer: PlannedLayer) -> tuple[Tensor, Tensor]:
        """Dense weights and magnitudes of a layer, zeros where it has none."""
        held, form = self._held(layer), self._forms[layer.name]
        dense = held.original0 if form.has_dense else torch.zeros_like(form.signs)
        magnitudes = held.original1 if form.has_unified else form.signs.new_zeros(layer.types_shape)
        return dense.detach(), magnitudes.detach()

    @torch.no_grad()
    def step(self) -> None:
        """Keep every magnitude at or above zero; called after every step of the optimizer."""
        for layer in self.plan.layers:
            if self._forms[layer.name].has_unified:
                self._held(layer).original1.clamp_(min=0)

    def calibrate(self) -> None:
        """Choose every layer's step size anew, for the weights as they are now."""
        for layer in self.plan.layers:
            form, settings = self._forms[layer.name], layer.settings
            step_size = choose_step_size(
                *self._originals(layer),
                form.types,
                settings.block,
                settings.weight_bits,
                settings.magnitude_bits,
            )
            form.step_size.fill_(step_size)

    def harvest(self) -> dict[str, CompressedLayer]:
        """Leave the compressed form: integers out, the model's weights set to what they mean, all checked.

        Returns
        -------
        dict from layer name to CompressedLayer
            In the plan's order.

        Raises
        ------
        InputError
            A weight is NaN or infinite.
        """
        layers = {layer.name: self._quantized(layer) for layer in self.plan.layers}
        self._release()
        with torch.no_grad():
            for layer in self.plan.layers:
                layer.module.get_parameter("weight").copy_(dequantize(layers[layer.name], layer.weight_shape))
        check_invariants(self.plan, layers)
        return layers

    def _quantized(self, layer: PlannedLayer) -> CompressedLayer:
        form, settings = self._forms[layer.name], layer.settings
        dense, magnitudes = self._originals(layer)
        bad = sum(int((~torch.isfinite(values)).sum()) for values in (dense, magnitudes))
        if bad:
            message = f"{bad} trained weights or magnitudes are NaN or infinite"
            raise InputError(f"layer {layer.name}", Problem("weight", message, "lower the learning rate"))
        integers = quantize_blocks(
            dense,
            form.signs < 0,
            magnitudes,
            form.types,
            settings.block,
            float(form.step_size),
            settings.weight_bits,
            settings.magnitude_bits,
        )
        return CompressedLayer(
            layer.name, settings.block, settings.column_order, form.types.cpu().numpy(), integers
        )

    def _release(self) -> None:
        for layer in self.plan.layers:
            if parametrize.is_parametrized(layer.module, "weight"):
                parametrize.remove_parametrizations(layer.module, "weight", leave_parametrized=True)
                # torch leaves a plain tensor where nothing was trainable, as in a layer that is pruned throughout.
                layer.module.weight = nn.Parameter(layer.module.weight.detach())  # type: ignore[operator]


def _type_problems(layer: PlannedLayer, types: Tensor | None) -> list[Problem]:
    if types is None:
        return [Problem(layer.name, "no types given")]
    if types.dtype != torch.uint8 or tuple(types.shape) != layer.types_shape:
        message = f"{types.dtype} {tuple(types.shape)}, expected torch.uint8 {layer.types_shape}"
        return [Problem(layer.name, message)]
    found = tuple(int((types == code).sum()) for code in (PRUNED, UNIFIED, DENSE))
    pruned, unified = layer.counts
    wanted = (pruned, unified, types.numel() - pruned - unified)
    if found != wanted:
        return [
            Problem(layer.name, f"{found} blocks are pruned, unified and dense; the plan asks for {wanted}")
        ]
    return []


def check_invariants(plan: Plan, layers: Mapping[str, CompressedLayer]) -> None:
    """Check exactly, on the model's own weights and on the integers, that every layer is what its plan says.

    The counts; one magnitude per unified block and zeros in pruned ones; integers within their bits and 0
    where unused; weights equal to integer × step size to the last bit.

    Raises
    ------
    InputError
        Naming every layer and property that does not hold.
    """
    problems = []
    for layer in plan.layers:
        compressed = layers.get(layer.name)
        found = [("", "is missing")] if compressed is None else _violations(layer, compressed)
        problems += [
            Problem(".".join(filter(None, (layer.name, field))), message) for field, message in found
        ]
    if problems:
        raise InputError("compressed model", problems)


def _violations(layer: PlannedLayer, compressed: CompressedLayer) -> list[tuple[str, str]]:
    types = torch.from_numpy(compressed.types)
    type_problems = _type_problems(layer, types)
    if type_problems:
        return [("types", problem.message) for problem in type_problems]
    block, integers = layer.settings.block, compressed.weights
    weight = layer.module.get_parameter("weight").detach().cpu()
    matrix = weight_to_matrix(weight, layer.groups, layer.settings.column_order)
    sizes = matrix_to_blocks(matrix.abs(), block)
    # Padding must not count as a second magnitude: it is lifted out of the minimum.
    padding = 1 - matrix_to_blocks(torch.ones_like(matrix), block)
    greatest = sizes.amax(dim=(2, 4))
    least = torch.where(padding > 0, torch.inf, sizes).amin(dim=(2, 4))
    used = {code: expand_blocks(types == code, block, layer.m, layer.k).numpy() for code in (UNIFIED, DENSE)}
    low, high = weight_range(integers.weight_bits)
    checks = {
        "weight": [
            (bool((greatest[types == PRUNED] != 0).any()), "a pruned block holds a weight other than zero"),
            (
                bool((greatest != least)[types == UNIFIED].any()),
                "a unified block holds more than one magnitude",
            ),
            (
                not torch.equal(weight, dequantize(compressed, layer.weight_shape)),
                "differs from integer × step size",
            ),
        ],
        "dense": [
            (bool(integers.dense[~used[DENSE]].any()), "is not 0 outside of the dense blocks"),
            (
                bool(((integers.dense < low) | (integers.dense > high)).any()),
                f"exceeds {integers.weight_bits} bits",
            ),
        ],
        "signs": [
            (bool(integers.signs[~used[UNIFIED]].any()), "is not 0 outside of the unified blocks"),
            (bool((integers.signs > 1).any()), "holds something other than 0 and 1"),
        ],
        "magnitudes": [
            (
                bool(integers.magnitudes[compressed.types != UNIFIED].any()),
                "is not 0 outside of the unified blocks",
            ),
            (
                bool((integers.magnitudes > magnitude_range(integers.magnitude_bits)[1]).any()),
                f"exceeds {integers.magnitude_bits} bits",
            ),
        ],
        "step_size": [
            (
                not 0 < integers.step_size < float("inf")
                or float(np.float32(integers.step_size)) != integers.step_size,
                f"{integers.step_size} is not a positive float32",
            ),
        ],
    }
    return [(field, message) for field, tests in checks.items() for broken, message in tests if broken]
