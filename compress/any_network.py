"""Any network in one call: rewritten into plain layers, compressed, quantised, packed, and a list of what was left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compress.allocate import AllocationMethod, allocate
from compress.artifact import Artifact
from compress.fit import Batches, LossFunction, Progress, compress
from compress.integer import quantize_activations, width_problems
from compress.plain import to_plain
from compress.rebuild import make_artifact
from compress.rules import CompressionConfig, Plan, Recipe, plan_layers
from compress.shapes import matrix_work, module_name
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
    network: str = "",
    allocation: AllocationMethod | None = None,
    activation_bits: int = 8,
    accumulator_bits: int = 32,
    batch_size: int = 8,
    evaluate: Callable[[nn.Module], float] | None = None,
    progress: Callable[[Progress], None] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Artifact:
    """Compress a network of any kind; without training data in one shot.

    Parameters
    ----------
    model : nn.Module
        In float32, with one tensor as its input. Left as it is.
    inputs : tensor ``[n, …]``
        Inputs as the network gets them, float32, or int64 for indices: they set the scales of the activations.
    config : CompressionConfig
    recipe : Recipe, optional
        Of the training; without training data there is none, whatever it says.
    train_data : optional
        As for `compress.fit.compress`.
    loss_fn : callable
    network : str
        Name in the zoo; empty for a network of the user's own.
    allocation : {"uniform", "erdos-renyi", "magnitude"}, optional
        How the ratios are spread over the layers (`compress.allocate.allocate`).
    activation_bits, accumulator_bits : int
        Of the integer model.
    batch_size : int
        Calibration inputs at a time.
    evaluate, progress : callable, optional
        As for `compress.fit.compress`; the figures of ``evaluate`` go into ``results``, with ``integer`` for the integer model.
    notes : mapping, optional
        JSON values for ``recipe``: where the network came from.

    Returns
    -------
    Artifact
        ``recipe`` holds ``plain`` (what was rewritten), ``untreated`` (what the method left alone, each with its reason) and
        ``input_dtype``; `compress.rebuild.rebuild` rewrites the network of a factory in the same way.

    Raises
    ------
    InputError
        The method can treat nothing of the network, or configuration or inputs do not suit it.

    Examples
    --------
    >>> network = nn.Sequential(nn.ConvTranspose1d(4, 4, 4, stride=2), nn.ReLU(), nn.Conv1d(4, 2, 3))
    >>> config = CompressionConfig(block=(2, 2), exempt_first_last=False)
    >>> artifact = compress_network(network, torch.randn(4, 4, 8), config)
    >>> [layer.name for layer in artifact.layers()]
    ['0.conv', '2']
    """
    problems = width_problems(activation_bits, accumulator_bits)
    if inputs.dim() < 2 or not len(inputs):
        problems.append(
            Problem("inputs", f"shape {tuple(inputs.shape)}, must be [n, …] with n of at least 1")
        )
    if problems:
        raise InputError("compression", problems)
    plain = to_plain(model)
    lowered = plain.model.eval()
    recipe = recipe or Recipe()
    if train_data is None:
        recipe = recipe.model_copy(update={"epochs_admm": 0, "epochs_retrain": 0})
    plan = plan_layers(lowered, config)
    if allocation is not None:
        plan = allocate(lowered, None, config, method=allocation)
    shapes, missing = matrix_work(lowered, tuple(inputs.shape[1:]), dtype=inputs.dtype)
    untreated = _untreated(plan, shapes, missing)
    nothing = [(inputs[:1], torch.zeros(1, dtype=torch.int64))]
    result = compress(
        lowered,
        plan,
        nothing if train_data is None else train_data,
        recipe,
        loss_fn=loss_fn,
        evaluate=evaluate,
        progress=progress,
    )
    integers = quantize_activations(
        lowered,
        result.layers,
        inputs,
        activation_bits=activation_bits,
        accumulator_bits=accumulator_bits,
        batch_size=batch_size,
    )
    figures = {
        "dense": result.accuracy_dense,
        "projected": result.accuracy_projected,
        "retrained": result.accuracy_retrained,
    }
    if evaluate is not None:
        figures["integer"] = float(evaluate(integers))  # type: ignore[arg-type]
    outside = [f"{row['name']} runs outside the array: {row['reason']}" for row in untreated]
    trained = result.warnings if train_data is not None else ()
    how = {
        "config": config.model_dump(mode="json"),
        **({"plan": plan.to_dict()} if plan.allocation is not None else {}),
        "training": recipe.model_dump(mode="json") if train_data is not None else None,
        "calibration_inputs": len(inputs),
        "input_dtype": str(inputs.dtype).removeprefix("torch."),
        "plain": [vars(change) for change in plain.changes],
        "untreated": untreated,
        **(notes or {}),
    }
    return make_artifact(
        lowered,
        result.layers,
        tuple(inputs.shape[1:]),
        max(1, _outputs(lowered, inputs[:1])),
        network=network,
        integer_model=integers,
        seed=recipe.seed,
        recipe=how,
        results={
            **{f"figure_{name}": value for name, value in figures.items() if value is not None},
            "warnings": [*trained, *integers.notes, *outside],
        },
        shapes=shapes,
    )


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
