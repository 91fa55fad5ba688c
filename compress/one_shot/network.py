"""A whole network in one shot: layer after layer in order of execution, each on the inputs that the compressed ones give."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.blocks import weight_to_matrix
from compress.layers import CompressedLayer
from compress.merit import figure_of_merit
from compress.one_shot.observe import Observed, Observer, Step, execution
from compress.one_shot.quadratic import Quadratic
from compress.one_shot.recipe import OneShotRecipe
from compress.one_shot.solver import projected, quantized, solve
from compress.one_shot.state import LayerError, LayerFiles, surroundings
from compress.one_shot.steps import least_steps
from compress.permute import Permutation, output_tensors, permute_channels
from compress.quantize import dequantize
from compress.retrain import check_invariants
from compress.rules import CompressionConfig, Plan, PlannedLayer, plan_layers
from compress.run_state import digest
from compress.shapes import evaluation_mode
from hwsim.errors import InputError, Problem

__all__ = ["OneShotProgress", "OneShotResult", "one_shot"]

VARIANCE_RATIOS = (0.25, 4.0)
"""Least and greatest factor of a variance: beyond, a channel has lost what it carried."""


@dataclass(frozen=True)
class OneShotProgress:
    """A layer that is done; handed to the callback.

    Attributes
    ----------
    layer : str
    number, layers : int
        Counted from 1, in order of execution.
    """

    layer: str
    number: int
    layers: int


@dataclass(frozen=True, eq=False)
class OneShotResult:
    """What `one_shot` gives back; the model itself was changed in place.

    Attributes
    ----------
    layers : dict from layer name to CompressedLayer
        In the plan's order.
    plan : Plan
    recipe : OneShotRecipe
    permutation : Permutation
    errors : tuple of LayerError
        In order of execution; of layers that were fitted.
    warnings : tuple of str
    accuracy_dense, accuracy_compressed : float or None
        What the ``evaluate`` callback said before and after.
    """

    layers: dict[str, CompressedLayer]
    plan: Plan
    recipe: OneShotRecipe
    permutation: Permutation
    errors: tuple[LayerError, ...]
    warnings: tuple[str, ...]
    accuracy_dense: float | None
    accuracy_compressed: float | None


@torch.no_grad()
def one_shot(
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor],
    config: CompressionConfig | Plan,
    recipe: OneShotRecipe | None = None,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    progress: Callable[[OneShotProgress], None] | None = None,
    checkpoint: str | Path | None = None,
) -> OneShotResult:
    """Compress a trained network in place without training: calibration inputs, no labels.

    Parameters
    ----------
    model : nn.Module
        Trained; in float32. Its weights end as exactly ``integer · step size``.
    inputs : Tensor ``[n, …]``, or a sequence of batches
        A few hundred samples of what the network will see. Fewer positions than a layer has inputs are made up for by the
        damping.
    config : CompressionConfig or Plan
        A plan for this very model, such as `compress.allocation.allocate` gives. Its counts are met exactly.
    recipe : OneShotRecipe, optional
    evaluate : callable, optional
        ``evaluate(model)``, called in evaluation mode before and after.
    progress : callable, optional
        Called with a `OneShotProgress` after every layer.
    checkpoint : str or Path, optional
        A folder where each finished layer is kept; called again with the same arguments, a run that was stopped goes on after
        the last of them, and ends bit for bit like one that was not.

    Raises
    ------
    InputError
        No inputs, or inputs that make the network's values infinite or NaN; a layer whose Hessian does not fit the memory; a
        checkpoint of another run.
    FormatError
        The checkpoint is damaged.

    Notes
    -----
    Deterministic: what is drawn (`compress.one_shot.steps`) has a fixed seed. One layer's Hessian is held at a time, in
    float64; a pass of the calibration inputs goes through the network up to each layer. With ``target="network"`` the original
    one runs once for several layers: up to 256 MiB of what reaches them are held.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> config = CompressionConfig(exempt_first_last=False)
    >>> result = one_shot(network, torch.randn(256, 16), config)
    >>> result.errors[0].reached_percent < result.errors[0].projected_percent
    True
    """
    recipe = recipe or OneShotRecipe()
    plan = config if isinstance(config, Plan) else plan_layers(model, config)
    batches = _batches(inputs, recipe)
    files = LayerFiles.open(checkpoint, _identity(model, plan, recipe, batches))
    with evaluation_mode(model):
        before = figure_of_merit(evaluate, model)
        permutation = Permutation((), ())
        if any(layer.settings.permute_channels for layer in plan.layers):
            permutation = permute_channels(model, plan, batches[0])
        # The original network's outputs are the targets; one that is not needed costs no memory.
        original = copy.deepcopy(model) if recipe.target == "network" else model
        steps = least_steps(model, plan, batches, recipe.rounding_error)
        order = execution(model, plan, batches[0])
        seen, held_out = _split(batches, recipe.held_out if recipe.method == "hessian" else 0.0)
        judge = _Judge.of(model, held_out) if held_out else None
        observer = Observer.of(model, original, order, seen)
        layers: dict[str, CompressedLayer] = {}
        errors, warnings = [], []
        for number, step in enumerate(order, 1):
            done = files.read(number, step.layer, step.norm)
            if done is None:
                done = _compress_layer(step, observer, judge, recipe, steps.get(step.layer.name, 0.0))
                files.write(number, step.layer, step.norm, *done)
            layers[step.layer.name], error = done
            if error is not None:
                errors.append(error)
            if not step.uses and recipe.method == "hessian":
                warnings.append(f"{step.layer.name}: {step.reason}; its weights are projected as they are")
            if progress is not None:
                progress(OneShotProgress(step.layer.name, number, len(order)))
        layers = {layer.name: layers[layer.name] for layer in plan.layers}
        check_invariants(plan, layers)
        after = figure_of_merit(evaluate, model)
    return OneShotResult(layers, plan, recipe, permutation, tuple(errors), tuple(warnings), before, after)


def _batches(inputs: Tensor | Sequence[Tensor], recipe: OneShotRecipe) -> list[Tensor]:
    batches = list(inputs.split(recipe.batch_size)) if isinstance(inputs, Tensor) else list(inputs)
    batches = [batch for batch in batches if len(batch)]
    if not batches:
        raise InputError("calibration", Problem("inputs", "no samples; one-shot compression needs some"))
    return batches


def _split(batches: Sequence[Tensor], share: float) -> tuple[list[Tensor], list[Tensor]]:
    """Every so many-th sample apart, over all batches; nothing apart where that would be no sample, or leave none."""
    count = sum(map(len, batches))
    number = torch.arange(1, count + 1, dtype=torch.float64)
    is_apart = (number * share).floor() > ((number - 1) * share).floor()
    parts = is_apart.split([len(batch) for batch in batches])
    halves = [
        [chosen for batch, part in zip(batches, parts, strict=True) if len(chosen := batch[part == apart])]
        for apart in (False, True)
    ]
    return (halves[0], halves[1]) if all(halves) else (list(batches), [])


def _identity(
    model: nn.Module, plan: Plan, recipe: OneShotRecipe, batches: Sequence[Tensor]
) -> dict[str, Any]:
    settings = recipe.model_dump(mode="json")
    if not recipe.rounding_error:
        del settings["rounding_error"]  # runs that were stopped before there was such a setting go on
    return {
        "recipe": settings,
        "plan": {
            layer.name: {"counts": list(layer.counts), **layer.settings.model_dump(mode="json")}
            for layer in plan.layers
        },
        "dense_network": digest(model.state_dict()),
        "inputs": digest({str(number): batch for number, batch in enumerate(batches)}),
        "torch": torch.__version__,
    }


# --- one layer


@dataclass(frozen=True, eq=False)
class _Judge:
    """Inputs that nothing is fitted to, and what the original network makes of them."""

    batches: Sequence[Tensor]
    wanted: Sequence[list[Tensor]]

    @classmethod
    def of(cls, original: nn.Module, batches: Sequence[Tensor]) -> _Judge:
        wanted = [_numbers(original(batch)) for batch in batches]
        if not all(bool(torch.isfinite(values).all()) for outputs in wanted for values in outputs):
            message = "some make outputs of the network that are not finite"
            raise InputError(
                "calibration", Problem("inputs", message, "check weights and calibration inputs")
            )
        return cls(batches, wanted)

    def loss(self, model: nn.Module) -> float:
        """Squared error of the outputs; infinite where one is not a number."""
        total = 0.0
        for batch, wanted in zip(self.batches, self.wanted, strict=True):
            pairs = zip(_numbers(model(batch)), wanted, strict=True)
            total += sum(float((found - aim).double().square().sum()) for found, aim in pairs)
        return math.inf if math.isnan(total) else total


def _numbers(outputs: Any) -> list[Tensor]:
    """The tensors of real numbers among the outputs of a network, however they are packed."""
    return [values for values in output_tensors(outputs) if values.is_floating_point()]


def _compress_layer(
    step: Step, observer: Observer, judge: _Judge | None, recipe: OneShotRecipe, least_step: float
) -> tuple[CompressedLayer, LayerError | None]:
    """The integers of a layer; weight, bias and following normalisation of the model are changed to match."""
    layer = step.layer
    parameter = layer.module.get_parameter("weight")
    weight = weight_to_matrix(parameter.detach(), layer.groups, layer.settings.column_order).double()
    is_fitted = bool(step.uses) and recipe.method == "hessian"
    start = projected(layer, weight)
    plain = quantized(layer, start, None, least_step=least_step)
    if not is_fitted:
        parameter.copy_(dequantize(plain, layer.weight_shape))
        return plain, None
    observed = observer.look(step, weight)
    has_bias = layer.module._parameters.get("bias") is not None
    takes_shift = recipe.refit_bias and (has_bias or step.norm is not None)
    fitted = observed.centred() if takes_shift else observed
    quadratic = Quadratic.of_products(fitted.products, fitted.cross, weight, recipe.damping)
    try:
        solution = solve(layer, quadratic, recipe)
        compressed = quantized(layer, solution.form, quadratic, least_step=least_step)
    except torch.linalg.LinAlgError:
        message = (
            f"{recipe.damping}: so little that the Hessian of these calibration inputs is singular in float64"
        )
        hint = "give more calibration inputs or more damping; the default is 0.01"
        raise InputError(f"layer {layer.name}", Problem("damping", message, hint)) from None
    if judge is not None:
        parameter.copy_(dequantize(plain, layer.weight_shape))
        lost_plain = judge.loss(observer.model)
    parameter.copy_(dequantize(compressed, layer.weight_shape))
    around = {name: values.clone() for name, values in surroundings(layer, step.norm).items()}
    _match_statistics(step, observed, weight, _matrix(layer, compressed), recipe)
    if judge is not None and judge.loss(observer.model) > lost_plain:
        compressed = plain
        parameter.copy_(dequantize(compressed, layer.weight_shape))
        for name, values in surroundings(layer, step.norm).items():
            values.copy_(around[name])
    energy = quadratic.loss(torch.zeros_like(weight))
    error = LayerError(
        layer.name,
        100 * quadratic.loss(start.matrix()) / energy if energy else 0.0,
        100 * quadratic.loss(_matrix(layer, compressed)) / energy if energy else 0.0,
        solution.iterations,
        solution.is_settled,
        compressed is not plain,
    )
    return compressed, error


def _matrix(layer: PlannedLayer, compressed: CompressedLayer) -> Tensor:
    """The weights that the integers mean, as the block view ``[groups, m, k]``."""
    weight = dequantize(compressed, layer.weight_shape).to(layer.module.get_parameter("weight").device)
    return weight_to_matrix(weight, layer.groups, layer.settings.column_order).double()


def _match_statistics(
    step: Step, observed: Observed, weight: Tensor, final: Tensor, recipe: OneShotRecipe
) -> None:
    """Bias or normalisation make up for shifted means and, where asked for, changed variances of the outputs.

    Both are changes relative to the original network on the same inputs, so that calibration inputs need not have the
    statistics of the training.
    """
    wanted_mean, mean = (
        (matrix @ columns[:, :, None]).flatten()
        for matrix, columns in ((weight, observed.wanted_mean), (final, observed.mean))
    )
    bias, norm = step.layer.module._parameters.get("bias"), step.norm
    if bias is not None:
        wanted_mean, mean = wanted_mean + bias.double(), mean + bias.double()
        if recipe.refit_bias:
            bias.add_((wanted_mean - mean).to(bias))
            mean = wanted_mean
    if norm is None:
        return
    centre, variance, eps = norm.get_buffer("running_mean"), norm.get_buffer("running_var"), float(norm.eps)  # type: ignore[arg-type]
    ratio = torch.ones_like(mean)
    if recipe.refit_variance:
        products = observed.mean[:, :, None] * observed.mean[:, None, :]
        now = torch.einsum("gmk,gkl,gml->gm", final, observed.products - products, final).flatten()
        wanted = observed.wanted_variance.flatten()
        ratio = torch.where((wanted > 0) & (now > 0), now / wanted, 1.0).clamp(*VARIANCE_RATIOS)
        variance.copy_(((variance.double() + eps) * ratio - eps).clamp(min=0.0))
    if recipe.refit_bias:
        # What comes out of the normalisation keeps its mean, whatever becomes of the spread.
        centre.copy_(mean - (wanted_mean - centre.double()) * ratio.sqrt())
