"""Any network in one call: rewritten into plain layers, compressed, quantised, packed, and a list of what was left out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.allocation import AllocationMethod, allocate
from compress.artifact import Artifact
from compress.budget import Budget, as_budget
from compress.file_budget import within_file_bytes, within_measured
from compress.fit import Batches, CompressionResult, LossFunction, compress
from compress.integer.calibration import quantize_activations, width_problems
from compress.merit import figure_of_merit
from compress.one_shot import OneShotRecipe, OneShotResult
from compress.one_shot import one_shot as run_one_shot
from compress.plain import PlainNetwork, to_plain
from compress.rebuild import make_artifact, spending
from compress.rules import CompressionConfig, Plan, Recipe, plan_layers
from compress.shapes import evaluation_mode, matrix_work, module_name
from hwsim.errors import InputError, Problem
from hwsim.layer import LayerShape

__all__ = ["compress_network"]


def compress_network(
    model: nn.Module,
    inputs: torch.Tensor,
    config: CompressionConfig,
    recipe: Recipe | None = None,
    *,
    train_data: Batches | tuple[torch.Tensor, torch.Tensor] | None = None,
    loss_fn: LossFunction = nn.functional.cross_entropy,
    one_shot: OneShotRecipe | None = None,
    network: str = "",
    allocation: AllocationMethod | None = None,
    budget: Budget | str | None = None,
    blocks: Sequence[tuple[int, int]] = (),
    preset: str = "small",
    activation_bits: int = 8,
    accumulator_bits: int = 32,
    batch_size: int = 8,
    evaluate: Callable[[nn.Module], float] | None = None,
    progress: Callable[[Any], None] | None = None,
    checkpoint: str | Path | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Artifact:
    """Compress a network of any kind; without training data in one shot, against the Hessian of the inputs.

    Parameters
    ----------
    model : nn.Module
        In float32, with one tensor as its input. Left as it is.
    inputs : tensor ``[n, …]``
        Inputs as the network gets them, float32, or int64 for indices. They set the scales of the activations; in one shot each
        layer is fitted to what the original gives on them, for which a few hundred do.
    config : CompressionConfig
    recipe : Recipe, optional
        Of the training; in one shot only its seed is noted.
    train_data : optional
        As for `compress.fit.compress`: ADMM and retraining in place of one shot.
    loss_fn : callable
    one_shot : OneShotRecipe, optional
        How, without training data; ``OneShotRecipe(method="projection")`` looks at the weights alone, for made-up inputs.
    network : str
        Name in the zoo; empty for a network of the user's own.
    allocation : {"uniform", "erdos-renyi", "magnitude", "hessian"}, optional
        How the ratios are spread over the layers, or by what a budget weighs blocks (`compress.allocation.allocate`).
    budget : Budget or str, optional
        In place of ratios, such as ``"file_bytes=2000000"``; in one shot only. The network is compressed a few times until the
        written file, or the machine with the final types, keeps it.
    blocks : sequence of (int, int)
        With a budget: block shapes from which each layer gets the best.
    preset : {"small", "fast"}
        Of the encoder whose file keeps a budget.
    activation_bits, accumulator_bits : int
        Of the integer model.
    batch_size : int
        Calibration inputs at a time.
    evaluate, progress : callable, optional
        As for `compress.fit.compress` or `compress.one_shot.one_shot`; the figures of ``evaluate`` go into ``results``, with
        ``integer`` for the integer model.
    checkpoint : path, optional
        A folder for the state of the run: the same call goes on where one that was stopped had come to.
    notes : mapping, optional
        JSON values for ``recipe``: where the network came from.

    Returns
    -------
    Artifact
        ``recipe`` holds ``plain`` (what was rewritten), ``untreated`` (what the method left alone, each with its reason) and
        ``input_dtype``; `compress.rebuild.rebuild` rewrites the network of a factory in the same way. ``results`` holds
        ``layer_errors`` of one shot, and ``budget``: its quantity, limit, and what was reached.

    Raises
    ------
    InputError
        The method can treat nothing of the network, or configuration, budget or inputs do not suit it.

    Examples
    --------
    >>> network = nn.Sequential(nn.ConvTranspose1d(4, 4, 4, stride=2), nn.ReLU(), nn.Conv1d(4, 2, 3))
    >>> config = CompressionConfig(block=(2, 2), exempt_first_last=False)
    >>> artifact = compress_network(network, torch.randn(4, 4, 8), config)
    >>> [layer.name for layer in artifact.layers()]
    ['0.conv', '2']
    """
    wanted = as_budget(budget)
    _check(inputs, train_data is not None, one_shot, allocation, wanted, activation_bits, accumulator_bits)
    plain = to_plain(model)
    folder = None if checkpoint is None else Path(checkpoint)
    recipe = recipe or Recipe()
    how = one_shot or OneShotRecipe(batch_size=batch_size)
    samples = [(batch, batch) for batch in inputs.split(batch_size)]  # nothing here looks at targets

    def run(lowered: nn.Module, aim: Budget | None, place: Path | None) -> Artifact:
        with evaluation_mode(lowered):
            plan = plan_layers(lowered, config)
            if allocation is not None or aim is not None or blocks:
                plan = allocate(lowered, samples, config, budget=aim, method=allocation, blocks=blocks)
        result: CompressionResult | OneShotResult
        if train_data is None:
            result = run_one_shot(
                lowered, inputs, plan, how, evaluate=evaluate, progress=progress, checkpoint=place
            )
        else:
            result = compress(
                lowered,
                plan,
                train_data,
                recipe,
                loss_fn=loss_fn,
                evaluate=evaluate,
                progress=progress,
                checkpoint=place,
            )
        lowered.eval()
        integer = (activation_bits, accumulator_bits)
        made = _packed(
            lowered, result, inputs, integer, batch_size, evaluate, network, recipe.seed, plain, notes
        )
        spent = spending(aim, lowered, result, tuple(inputs.shape[1:]), inputs.dtype)
        return replace(made, results=made.results | spent)

    def turn(aim: Budget, number: int) -> Artifact:
        place = None if folder is None else folder / f"turn-{number}"
        return run(copy.deepcopy(plain.model), aim, place)

    if wanted is None:
        return run(plain.model, None, folder)
    if wanted.quantity == "file_bytes":
        return within_file_bytes(wanted, turn, preset)[0]
    return within_measured(wanted, turn)


def _check(
    inputs: torch.Tensor,
    is_trained: bool,
    one_shot: OneShotRecipe | None,
    allocation: str | None,
    budget: Budget | None,
    activation_bits: int,
    accumulator_bits: int,
) -> None:
    problems = width_problems(activation_bits, accumulator_bits)
    if inputs.dim() < 2 or not len(inputs):
        problems.append(
            Problem("inputs", f"shape {tuple(inputs.shape)}, must be [n, …] with n of at least 1")
        )
    if is_trained and (one_shot is not None or budget is not None):
        name = "one_shot" if one_shot is not None else "budget"
        problems.append(Problem(name, "goes without training", "leave out train_data"))
    if allocation == "fisher":
        message = '"fisher" needs labels, and these inputs have none'
        problems.append(Problem("allocation", message, "hessian needs none"))
    if problems:
        raise InputError("compression", problems)


def _packed(
    lowered: nn.Module,
    result: CompressionResult | OneShotResult,
    inputs: torch.Tensor,
    integer_bits: tuple[int, int],
    batch_size: int,
    evaluate: Callable[[nn.Module], float] | None,
    network: str,
    seed: int,
    plain: PlainNetwork,
    notes: Mapping[str, Any] | None,
) -> Artifact:
    """The artifact of a compressed network, with its integer model and everything that was left out."""
    input_shape, plan = tuple(inputs.shape[1:]), result.plan
    shapes, missing = matrix_work(lowered, input_shape, dtype=inputs.dtype)
    untreated = _untreated(plan, shapes, missing)
    integers = quantize_activations(
        lowered,
        result.layers,
        inputs,
        activation_bits=integer_bits[0],
        accumulator_bits=integer_bits[1],
        batch_size=batch_size,
    )
    figures, procedure, results = _procedure(result)
    figures["integer"] = figure_of_merit(evaluate, integers)
    outside = [f"{row['name']} runs outside the array: {row['reason']}" for row in untreated]
    asked = [layer.settings.permute_channels for layer in plan.layers]
    how = {
        "config": plan.config.model_dump(mode="json"),
        **({"plan": plan.to_dict()} if plan.allocation is not None else {}),
        **({"permutation": result.permutation.to_dict()} if any(asked) else {}),
        **procedure,
        "calibration_inputs": len(inputs),
        "input_dtype": str(inputs.dtype).removeprefix("torch."),
        "plain": [vars(change) for change in plain.changes],
        "untreated": untreated,
        **(notes or {}),
    }
    return make_artifact(
        lowered,
        result.layers,
        input_shape,
        max(1, _outputs(lowered, inputs[:1])),
        network=network,
        integer_model=integers,
        seed=seed,
        recipe=how,
        results={
            **{f"figure_{name}": value for name, value in figures.items() if value is not None},
            **results,
            "warnings": [*result.warnings, *integers.notes, *outside],
        },
        shapes=shapes,
    )


def _procedure(
    result: CompressionResult | OneShotResult,
) -> tuple[dict[str, float | None], dict[str, Any], dict[str, Any]]:
    """Figures by name, the recipe under the name of its method, and what else was found."""
    if isinstance(result, OneShotResult):
        figures = {"dense": result.accuracy_dense, "one_shot": result.accuracy_compressed}
        errors = [asdict(error) for error in result.errors]
        procedure = {"training": None, "one_shot": result.recipe.model_dump(mode="json")}
        return figures, procedure, {"layer_errors": errors} if errors else {}
    figures = {
        "dense": result.accuracy_dense,
        "projected": result.accuracy_projected,
        "retrained": result.accuracy_retrained,
    }
    return figures, {"training": result.recipe.model_dump(mode="json")}, {}


def _untreated(plan: Plan, shapes: Sequence[LayerShape], missing: Mapping[str, str]) -> list[dict[str, str]]:
    """One row per thing that is not compressed or does not run, with its reason."""
    rows = {item.name or "the network itself": item.reason for item in plan.untreated}
    treated = {layer.name for layer in plan.layers}
    for name in dict.fromkeys(module_name(shape.name) for shape in shapes):
        if name not in treated and name not in rows:
            rows[name] = "a forward pass multiplies by this parameter itself, past any layer"
    for name, reason in missing.items():
        if name in treated:
            rows[name] = "no forward pass runs it; its weight is compressed, and does no work"
        elif name not in rows:
            rows[name] = f"its work is not simulated ({reason})"
    return [{"name": name, "reason": reason} for name, reason in rows.items()]


def _outputs(model: nn.Module, example: torch.Tensor) -> int:
    """Size of the last dimension of what the network gives; 1 where that is no tensor."""
    with torch.no_grad():
        result = model(example)
    return int(result.shape[-1]) if isinstance(result, torch.Tensor) and result.dim() else 1
