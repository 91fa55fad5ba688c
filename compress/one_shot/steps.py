"""How coarse the integers of each layer may be, so that a bit saved costs the network's outputs the same in every layer.

Let ``h_l`` be the mean, over the weights of a layer, of the squared derivatives of the outputs. Rounding ``n_l`` of them with
steps ``s_l`` then costs the outputs a squared error of ``Σ n_l·h_l·s_l²/12``, to first order and with independent errors; and
``n_l`` bits are saved each time that ``s_l`` doubles. Both are balanced where ``h_l·s_l²`` is the same in all layers.

Sources: equal slopes of rate and distortion: Shoham, Gersho, "Efficient bit allocation for an arbitrary set of quantizers",
IEEE Trans. ASSP 36 (1988); squared derivatives by random signs: Hutchinson, "A stochastic estimator of the trace of the
influence matrix", Communications in Statistics 19 (1990).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors

from compress.permute import output_tensors
from compress.rules import Plan, PlannedLayer
from compress.shapes import evaluation_mode
from hwsim.errors import InputError, Problem

__all__ = ["least_steps"]

_DRAWS = 128
"""Backward passes with signs of their own: one per sample, or per few samples where that would be more."""


def least_steps(
    model: nn.Module, plan: Plan, batches: Sequence[Tensor], rounding_error: float
) -> dict[str, float]:
    """The step of each layer's dense weights with which rounding costs a share of the energy of the network's outputs.

    Parameters
    ----------
    model : nn.Module
        Run in evaluation mode; left as it was.
    plan : Plan
        Pruned weights cost nothing, and a unified block as much as one weight, since its magnitude is rounded more finely.
    batches : sequence of Tensor
        Calibration inputs, samples first.
    rounding_error : float
        Squared error of the outputs over their energy; not negative.

    Returns
    -------
    dict from layer name to float
        Empty where nothing is asked for. 0 for layers whose weights the outputs do not depend on, as far as float32 shows:
        these keep what their bits ask for.

    Raises
    ------
    InputError
        Outputs or derivatives that are not finite, or outputs without any derivative.

    Notes
    -----
    A derivative is that of the outputs' sum with random signs, whose square is ``Σ (derivative of each output)²`` on average:
    over the samples, too, so it does not matter how a network lays them out inside.
    """
    if not rounding_error:
        return {}
    squares, energy = _squared_derivatives(model, plan, batches)
    counts = {layer.name: _rounded_weights(layer) for layer in plan.layers}
    rounded = sum(counts[name] for name, square in squares.items() if square > 0)
    return {
        name: math.sqrt(12 * rounding_error * energy / (rounded * square)) if square > 0 and rounded else 0.0
        for name, square in squares.items()
    }


def _rounded_weights(layer: PlannedLayer) -> float:
    blocks = math.prod(layer.types_shape)
    pruned, unified = layer.counts
    return math.prod(layer.weight_shape) * (blocks - pruned - unified) / blocks + unified


def _squared_derivatives(
    model: nn.Module, plan: Plan, batches: Sequence[Tensor]
) -> tuple[dict[str, float], float]:
    """Per layer the mean over its weights, and the energy of the outputs; both are means over samples."""
    weights = {layer.name: layer.module.get_parameter("weight") for layer in plan.layers}
    samples = sum(map(len, batches))
    random = torch.Generator().manual_seed(0)
    sums, energy = dict.fromkeys(weights, 0.0), 0.0
    # A network that trains may not change what a layer has read; one that only answers may.
    with evaluation_mode(model), torch.enable_grad():
        for part in (part for batch in batches for part in batch.split(-(-samples // _DRAWS))):
            with allow_mutation_on_saved_tensors():
                outputs = [values for values in output_tensors(model(part)) if values.is_floating_point()]
                energy += sum(float(values.detach().double().square().sum()) for values in outputs)
                signs = (torch.randint(0, 2, values.shape, generator=random) * 2 - 1 for values in outputs)
                pairs = zip(outputs, signs, strict=True)
                total = sum(((values * sign.to(values)).sum() for values, sign in pairs), torch.zeros(()))
                if not total.requires_grad:
                    message = "have no derivative with respect to any weight"
                    hint = "the forward pass switches gradients off, or gives whole numbers"
                    raise InputError("rounding_error", Problem("outputs of the network", message, hint))
                found = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                sums[name] += 0.0 if gradient is None else float(gradient.double().square().mean())
    bad = [name for name, value in sums.items() if not math.isfinite(value)]
    if bad or not math.isfinite(energy):
        message, hint = "values or derivatives are not finite", "check weights and calibration inputs"
        names = bad or ["outputs of the network"]
        raise InputError("calibration", [Problem(name, message, hint) for name in names])
    return {name: value / samples for name, value in sums.items()}, energy / samples
