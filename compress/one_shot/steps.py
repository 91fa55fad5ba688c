"""How coarse the integers of each layer may be, so that a bit saved costs the network's outputs the same in every layer.

Let ``h_l`` be the mean, over the ``n_l`` weights of a layer, of the squared derivatives of the outputs. Rounding with steps
``s_l`` then costs the outputs a squared error of ``Σ n_l·h_l·s_l²/12``, to first order and with independent errors; and ``n_l``
bits are saved each time that ``s_l`` doubles. Both are balanced where ``h_l·s_l²`` is the same in all layers.

Sources: equal slopes of rate and distortion: Shoham, Gersho, "Efficient bit allocation for an arbitrary set of quantizers",
IEEE Trans. ASSP 36 (1988); squared derivatives by random signs: Hutchinson, "A stochastic estimator of the trace of the
influence matrix", Communications in Statistics 19 (1990).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.curvature import is_observable, squared_gradients
from compress.permute import output_tensors
from compress.rules import Plan
from hwsim.errors import InputError, Problem

__all__ = ["least_steps"]


def least_steps(
    model: nn.Module, plan: Plan, batches: Sequence[Tensor], rounding_error: float, *, seed: int = 0
) -> dict[str, float]:
    """The step of each layer's dense weights with which rounding costs a share of the energy of the network's outputs.

    Parameters
    ----------
    model : nn.Module
        Run in evaluation mode; left as it was.
    plan : Plan
    batches : sequence of Tensor
        Calibration inputs; the samples of a batch must not see each other.
    rounding_error : float
        Squared error of the outputs over their energy; not negative.
    seed : int
        Of the random signs.

    Returns
    -------
    dict from layer name to float
        0 for layers whose weights the outputs do not depend on, or cannot be derived by: these keep what their bits ask for.

    Raises
    ------
    InputError
        Outputs or derivatives that are not finite, or outputs without any derivative.
    """
    layers = [layer for layer in plan.layers if is_observable(layer.module)]
    if not rounding_error or not layers:
        return {}
    signs = torch.Generator().manual_seed(seed)
    energy = 0.0

    def signed_sum(outputs: object, _: Tensor) -> Tensor:
        nonlocal energy
        real = [values for values in output_tensors(outputs) if values.is_floating_point()]
        energy += sum(float(values.detach().double().square().sum()) for values in real)
        drawn = (torch.randint(0, 2, values.shape, generator=signs).mul_(2).sub_(1) for values in real)
        signed = ((values * sign.to(values)).sum() for values, sign in zip(real, drawn, strict=True))
        return sum(signed, start=torch.zeros(()))

    modules = {layer.name: layer.module for layer in layers}
    sums, samples = squared_gradients(
        model, modules, ((batch, batch) for batch in batches), signed_sum, of_samples=True
    )
    squares = {name: float(values.mean()) / samples for name, values in sums.items()}
    bad = [name for name, value in squares.items() if not math.isfinite(value)]
    if bad or not math.isfinite(energy):
        message = "outputs of the network or their derivatives are not finite"
        raise InputError("calibration", Problem(", ".join(bad), message, "check weights and inputs"))
    weights = sum(sums[name].numel() for name, value in squares.items() if value > 0)
    return {
        name: math.sqrt(12 * rounding_error * energy / samples / (weights * value)) if value > 0 else 0.0
        for name, value in squares.items()
    }
