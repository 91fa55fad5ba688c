"""Between torch and the file: pack a compressed network into an artifact, and build the networks of an artifact."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import zoo
from compress.allocation import AllocationMethod, allocate, budget_spent, keep_within
from compress.artifact import Artifact, DatasetNote
from compress.budget import Budget, as_budget
from compress.data import Dataset, balanced_subset
from compress.fit import CompressionResult, compress
from compress.integer.calibration import quantize_activations, width_problems
from compress.integer.model import IntegerModel
from compress.layers import CompressedLayer
from compress.one_shot import OneShotRecipe, OneShotResult
from compress.one_shot import one_shot as run_one_shot
from compress.plain import to_plain
from compress.rate_distortion import coarsen_within
from compress.rules import CompressionConfig, Plan, Recipe
from compress.shapes import layer_shapes
from compress.train import Checkpoint, channels_last, check_fit, evaluate, note_of, state_problems
from hwsim.errors import FormatError, InputError, Problem
from hwsim.layer import LayerShape

__all__ = ["compress_checkpoint", "make_artifact", "rebuild", "rebuild_integer"]


def compress_checkpoint(
    checkpoint: Checkpoint,
    data: Dataset,
    config: CompressionConfig,
    recipe: Recipe | None = None,
    *,
    allocation: AllocationMethod | None = None,
    budget: Budget | str | None = None,
    blocks: Sequence[tuple[int, int]] = (),
    activation_bits: int = 8,
    accumulator_bits: int = 32,
    calibration_images: int = 512,
    max_loss: float = 0.0,
    one_shot: OneShotRecipe | None = None,
    progress: Callable[[Any], None] | None = None,
    resume_from: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Artifact:
    """From a trained network to its compressed form with both accuracies: everything that `hwsim compress` does.

    Parameters
    ----------
    checkpoint : Checkpoint
        Its model is left as it is.
    data : Dataset
    config : CompressionConfig
    recipe : Recipe, optional
    allocation : str, optional
    budget : Budget or str, optional
    blocks : sequence of (int, int)
        How block types are dealt out over the layers: see `compress.allocation.allocate`.
    activation_bits, accumulator_bits : int
        Of the integer model.
    calibration_images : int
        Training images, as many of each class, that set the scales of the activations and weigh blocks.
    max_loss : float
        Nats of calibration loss that coarser integers may cost, chosen for a small file
        (`compress.rate_distortion.coarsen_within`); 0 keeps the integers of the training.
    one_shot : OneShotRecipe, optional
        Compress by `compress.one_shot.one_shot` on the calibration images, without training; of ``recipe`` the seed counts.
    progress : callable, optional
        See `compress.fit.compress`; in one shot, see `compress.one_shot.one_shot`.
    resume_from : str or Path, optional
        A folder for the state of the run, as ``checkpoint`` of either.
    device : torch.device or str
        Where ADMM and retraining run. One-shot compression, calibration and the integer model stay on the CPU. Among
        processes each calls this with the same arguments and gets the same artifact; one of them should save it.

    Returns
    -------
    Artifact
        ``results`` holds ``accuracy_dense``, ``accuracy_projected``, ``accuracy_retrained`` (float, quantised weights),
        in one shot ``accuracy_one_shot`` and ``layer_errors`` in place of these two,
        ``accuracy_coarse`` (the same with coarser integers, where asked for),
        ``accuracy_integer`` (what the machine computes), ``test_images`` (their number) and ``warnings``; with a budget
        ``budget``: its quantity, limit, and what the final block types cost. ``recipe`` holds the plan, layer by layer, where
        blocks were dealt out, and what was permuted.

    Raises
    ------
    InputError
        Configuration, data and network do not suit each other; see `compress.fit.compress`.
    """
    recipe = recipe or Recipe()
    problems = width_problems(activation_bits, accumulator_bits)
    if calibration_images < 1:
        problems.append(Problem("calibration_images", f"{calibration_images}, must be at least 1"))
    if not 0 <= max_loss < math.inf:
        problems.append(Problem("max_loss", f"{max_loss}, must be at least 0 and finite"))
    if problems:  # said before the training, not after it
        raise InputError("compression", problems)
    model = copy.deepcopy(checkpoint.model)
    test_inputs = data.normalise(data.test_images)

    def accuracy(network: Callable[[torch.Tensor], torch.Tensor]) -> float:
        return evaluate(network, test_inputs, data.test_labels)

    check_fit(model, data)
    train_inputs = data.normalise(data.train_images)
    chosen = torch.from_numpy(balanced_subset(data.train_labels.numpy(), calibration_images, recipe.seed))
    calibration = train_inputs[chosen], data.train_labels[chosen]
    wanted = as_budget(budget)
    plan: Plan | CompressionConfig = config
    if allocation is not None or wanted is not None or blocks:
        plan = allocate(model, calibration, config, budget=wanted, method=allocation, blocks=blocks)
    result: CompressionResult | OneShotResult
    with channels_last(model, test_inputs[:2]):
        if one_shot is not None:
            result = run_one_shot(
                model,
                calibration[0],
                plan,
                one_shot,
                evaluate=accuracy,
                progress=progress,
                checkpoint=resume_from,
            )
        else:
            model.to(device)
            result = compress(
                model,
                plan,
                (train_inputs.to(device), data.train_labels.to(device)),
                recipe,
                evaluate=accuracy,
                progress=progress,
                checkpoint=resume_from,
                adjust=None if wanted is None else partial(keep_within, wanted, input_shape=data.input_shape),
            )
    model.cpu()
    layers, coarse = result.layers, {}
    if max_loss:
        model.eval()
        layers, multiplier = coarsen_within(model, layers, *calibration, max_loss, seed=recipe.seed)
        coarse = {"max_loss": max_loss, "multiplier": multiplier, "accuracy_coarse": accuracy(model)}
    integer_model = quantize_activations(
        model,
        layers,
        calibration[0],
        activation_bits=activation_bits,
        accumulator_bits=accumulator_bits,
    )
    outside = [f"{item.name} runs outside the array: {item.reason}" for item in result.plan.untreated]
    results = {
        "accuracy_dense": result.accuracy_dense,
        **_measured(result),
        **coarse,
        "accuracy_integer": accuracy(integer_model),
        "test_images": len(data.test_labels),
        "warnings": [*result.warnings, *integer_model.notes, *outside],
        **spending(wanted, model, result, data.input_shape),
    }
    asked = [layer.settings.permute_channels for layer in result.plan.layers]
    how = {
        "config": config.model_dump(mode="json"),
        **({"plan": result.plan.to_dict()} if result.plan.allocation is not None else {}),
        **({"permutation": result.permutation.to_dict()} if any(asked) else {}),
        **_procedure(result, len(data.train_labels)),
        "calibration_images": len(chosen),
        "dense": {"seed": checkpoint.seed, "epochs": len(checkpoint.history)},
    }
    return make_artifact(
        model,
        layers,
        data.input_shape,
        checkpoint.num_classes,
        network=checkpoint.network,
        integer_model=integer_model,
        seed=recipe.seed,
        recipe=how,
        results=results,
        dataset=note_of(data),
    )


def _measured(result: CompressionResult | OneShotResult) -> dict[str, Any]:
    if isinstance(result, OneShotResult):
        errors = [asdict(error) for error in result.errors]
        return {"accuracy_one_shot": result.accuracy_compressed, "layer_errors": errors}
    return {
        "accuracy_projected": result.accuracy_projected,
        "accuracy_retrained": result.accuracy_retrained,
    }


def _procedure(result: CompressionResult | OneShotResult, train_images: int) -> dict[str, Any]:
    """The recipe under the name of its method, and what it saw besides the calibration images."""
    if isinstance(result, OneShotResult):
        source = "class-balanced training images, without labels"
        return {"one_shot": {**result.recipe.model_dump(mode="json"), "calibration": source}}
    return {"training": result.recipe.model_dump(mode="json"), "train_images": train_images}


def spending(
    budget: Budget | None,
    model: nn.Module,
    result: CompressionResult | OneShotResult,
    input_shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """What the final block types cost in the budget, as an entry of ``results``; nothing without one."""
    if budget is None:
        return {}
    types = {name: layer.types for name, layer in result.layers.items()}
    reached = budget_spent(budget, model, result.plan, types, input_shape, dtype)
    return {"budget": {"quantity": budget.quantity, "limit": budget.limit, "reached": reached}}


def make_artifact(
    model: nn.Module,
    layers: Mapping[str, CompressedLayer],
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    network: str = "",
    integer_model: IntegerModel | None = None,
    seed: int = 0,
    recipe: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    dataset: DatasetNote | None = None,
    shapes: Sequence[LayerShape] | None = None,
) -> Artifact:
    """Everything that a file needs of a compressed network.

    Parameters
    ----------
    model : nn.Module
        Its weights of ``layers`` are integer × step size; all its other parameters and buffers are stored as they are.
    layers : mapping of str to CompressedLayer
        By module name.
    input_shape : tuple of int
        Of one input, without the batch.
    num_classes : int
    network : str
        Name in the zoo; empty for a network of the user's own.
    integer_model : IntegerModel, optional
        Gives requantisers and activation scales.
    seed : int
    recipe, results : mapping, optional
        JSON values: how it was compressed, and what was measured.
    dataset : DatasetNote, optional
    shapes : sequence of LayerShape, optional
        What `compress.shapes.layer_shapes` gave, where it is at hand or needs to be told more.

    Raises
    ------
    InputError
        The network does not take such an input.
    """
    compressed = dict(layers) | (integer_model.layers if integer_model else {})
    modules = dict(model.named_modules())
    stored = model.state_dict(keep_vars=True)
    aliases = _aliases(stored, [f"{name}.weight" for name in compressed])
    held = {f"{name}.weight" for name in compressed}
    state = {
        name: (values.float() if values.is_floating_point() else values).detach().cpu().contiguous().numpy()
        for name, values in stored.items()
        if name not in held and name not in aliases
    }
    return Artifact(
        network=network,
        num_classes=num_classes,
        input_shape=tuple(input_shape),
        compressed=compressed,
        weight_shapes={name: tuple(modules[name].get_parameter("weight").shape) for name in compressed},
        shapes=tuple(layer_shapes(model, input_shape) if shapes is None else shapes),
        state=state,
        activations=integer_model.activations if integer_model else {},
        activation_bits=integer_model.activation_bits if integer_model else 8,
        accumulator_bits=integer_model.accumulator_bits if integer_model else 32,
        seed=seed,
        recipe=dict(recipe or {}),
        results=dict(results or {}),
        dataset=dataset,
    )


def _aliases(state: Mapping[str, torch.Tensor], first: Sequence[str]) -> dict[str, str]:
    """Further names of a parameter that the network has under several, and the one that counts, by preference of ``first``."""
    chosen: dict[int, str] = {}
    for name in (*first, *state):
        if name in state:
            chosen.setdefault(id(state[name]), name)
    return {name: chosen[id(values)] for name, values in state.items() if chosen[id(values)] != name}


def rebuild(artifact: Artifact, factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The float network of an artifact, in evaluation mode.

    The weight of every compressed module is ``integer × step size`` in float32, bit for bit; everything else is what was
    stored.

    Parameters
    ----------
    artifact : Artifact
    factory : callable, optional
        ``factory()`` gives the network; needed where it is not one of the zoo. Its weights do not matter. Where the network was
        rewritten into plain layers before it was compressed, the same is done here.

    Raises
    ------
    InputError
        No factory for a network that is not in the zoo.
    FormatError
        Names or shapes in the artifact are not those of the network.
    """
    if factory is None and not artifact.network:
        hint = "rebuild(artifact, factory=YourNetwork)"
        raise InputError("rebuild", Problem("network", "the file does not name a network of the zoo", hint))
    model = (
        factory() if factory is not None else zoo.build(artifact.network, artifact.num_classes, device="meta")
    )
    state = {name: torch.from_numpy(values.copy()) for name, values in artifact.state.items()}
    state |= {f"{name}.weight": torch.from_numpy(artifact.weight(name)) for name in artifact.compressed}
    if artifact.recipe.get("plain"):
        model = to_plain(model).model
    expected = model.state_dict(keep_vars=True)
    aliases = _aliases(expected, list(state))
    state |= {alias: state[name] for alias, name in aliases.items() if name in state and alias not in state}
    problems = state_problems(model, state)
    if problems:
        raise FormatError(f"artifact of {artifact.network or 'a network of your own'}", problems)
    model.load_state_dict(state, assign=True)
    return model.eval()


def rebuild_integer(artifact: Artifact, factory: Callable[[], nn.Module] | None = None) -> IntegerModel:
    """The integer model of an artifact, with the very integers that were stored.

    Raises
    ------
    InputError
        The artifact was saved without calibrated activations; or as `rebuild`.
    FormatError
        As `rebuild`.
    """
    if not artifact.activations:
        raise InputError("rebuild", Problem("activations", "were not calibrated before the file was saved"))
    return IntegerModel(
        rebuild(artifact, factory),
        artifact.compressed,
        artifact.activations,
        artifact.activation_bits,
        artifact.accumulator_bits,
    )
