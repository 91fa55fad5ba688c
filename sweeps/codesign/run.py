"""A co-design from the trained network to machine, compressed model and report, in a folder; a killed run goes on."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.artifact import Artifact, load_artifact, save_artifact
from compress.budget import Budget
from compress.curvature import curvature
from compress.data import Dataset, balanced_subset
from compress.fit import Progress
from compress.rebuild import compress_checkpoint
from compress.rules import CompressionConfig, plan_layers
from compress.run_state import digest
from compress.subjects import file_subject
from compress.train import Checkpoint, check_fit
from hwsim.errors import FormatError, Problem
from hwsim.files import write_atomically
from hwsim.machine import Machine, load_machine
from hwsim.report import Report, package_versions
from hwsim.version import MODEL_VERSION
from sweeps.codesign.alternation import (
    Alternation,
    Bench,
    Network,
    alternate,
    cheapest,
    compression_config,
)
from sweeps.codesign.folder import claim, machine_toml, read_json, write_json
from sweeps.codesign.settings import CoDesignSpace, Goal, machine_label
from sweeps.space import METHOD_VERSION, Training
from sweeps.weights import CALIBRATION_IMAGES, recipe_of

__all__ = [
    "ARTIFACT",
    "ASKED",
    "MACHINE",
    "REPORT",
    "Outcome",
    "asked_of",
    "codesign",
    "network_of",
    "train_on",
]

ASKED, ALTERNATION, RESULT = "asked.json", "alternation.json", "result.json"
MACHINE, ARTIFACT, REPORT = "machine.toml", "model.hws.safetensors", "report.json"
STATE = "state"

Tell = Callable[[str, float, float], None]
"""``tell(doing, done, total)``, in shares of one phase."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a co-design ended with.

    Attributes
    ----------
    machine : Machine
    artifact : Artifact
    report : Report
        Of the trained layers on the machine.
    result : dict
        What ``result.json`` holds.
    """

    machine: Machine
    artifact: Artifact
    report: Report
    result: dict[str, Any]


def codesign(
    checkpoint: Checkpoint,
    data: Dataset,
    space: CoDesignSpace,
    goal: Goal,
    folder: str | Path,
    *,
    seed: int = 0,
    tell: Tell | None = None,
) -> Outcome:
    """Choose machine and plan together, train the plan, and say what the trained network costs on the machine.

    Parameters
    ----------
    checkpoint : Checkpoint
        A trained network; left as it is.
    data : Dataset
        To weigh blocks, to train and to test on.
    space : CoDesignSpace
    goal : Goal
    folder : str or Path
        Of the results: ``asked.json`` (resolved configuration, versions), ``alternation.json`` and ``.csv``, ``machine.toml``,
        ``model.hws.safetensors``, ``report.json`` (as `hwsim simulate` writes it), ``result.json``. The same call on the same
        folder goes on where it was stopped, within the training too, and gives the same bytes of the model.
    seed : int
        Of the training and of the calibration images.
    tell : callable, optional
        Called with what is done, how much of it, and of how much.

    Raises
    ------
    InputError
        The goal cannot be reached, the folder is another run's, network and data do not suit each other.
    FormatError
        A damaged file in the folder.
    """
    folder = Path(folder)
    tell = tell or (lambda doing, done, total: None)
    check_fit(checkpoint.model, data)
    asked = asked_of(checkpoint.network, data, space, goal, seed)
    asked["dense_network"] = digest(checkpoint.model.state_dict())
    claim(folder / ASKED, asked, package_versions())
    network = network_of(checkpoint, data, space, seed)
    chosen = _chosen(folder, network, space, goal, tell)
    machine = load_machine(folder / MACHINE)
    artifact = train_on(
        checkpoint,
        data,
        compression_config(space, machine),
        space.training,
        machine,
        folder,
        seed=seed,
        budget=goal.budget(machine),
        space=space,
        tell=tell,
    )
    report = file_subject(folder / ARTIFACT, machine, 1).simulate()
    report.save(folder / REPORT)
    result = _result(folder, chosen, artifact, report, network, space, goal)
    write_json(folder / RESULT, result)
    return Outcome(machine, artifact, report, result)


def asked_of(network: str, data: Dataset, space: CoDesignSpace, goal: Goal, seed: int) -> dict[str, Any]:
    """What a folder is for, as plain values; the dense network, which may have to be trained first, aside."""
    return {
        "network": network,
        "data": {"source": data.source, "train": len(data.train_labels), "test": len(data.test_labels)},
        "goal": {"quantity": goal.quantity, "limit": goal.limit},
        "space": space.model_dump(mode="json"),
        "seed": seed,
        "model_version": MODEL_VERSION,
        "method_version": METHOD_VERSION,
    }


def network_of(checkpoint: Checkpoint, data: Dataset, space: CoDesignSpace, seed: int) -> Network:
    """The network with the curvature by which its blocks are weighed, from the calibration images of the training."""
    model = checkpoint.model
    if space.weighing == "magnitude":
        return Network(model, data.input_shape)
    chosen = torch.from_numpy(balanced_subset(data.train_labels.numpy(), CALIBRATION_IMAGES, seed))
    inputs, targets = data.normalise(data.train_images[chosen]), data.train_labels[chosen]
    batches = list(zip(inputs.split(64), targets.split(64), strict=True))
    exempt = space.training.exempt == "first_and_last"
    plan = plan_layers(model, CompressionConfig(exempt_first_last=exempt))
    treated = [layer for layer in plan.layers if not layer.exempt]
    return Network(model, data.input_shape, curvature(space.weighing, model, treated, batches))


def _chosen(folder: Path, network: Network, space: CoDesignSpace, goal: Goal, tell: Tell) -> dict[str, Any]:
    """The alternation as plain values, from the folder where it is done already; the winner's machine has a file of its own."""
    found = read_json(folder / ALTERNATION)
    if found is not None and (folder / MACHINE).exists():
        return found
    done = alternate(
        network, space, goal, progress=lambda starts, total: tell("choosing machine and plan", starts, total)
    )
    names = space.varied
    rows = [step.row(names) for step in done.steps]
    winner = done.best.machine.with_fields({"name": f"{space.name}-{goal.quantity}-{goal.limit:g}"[:200]})
    write_atomically(folder / MACHINE, machine_toml(winner).encode())
    write_atomically(folder / "alternation.csv", _csv(rows))
    plain = _plain_alternation(done, rows, names)
    write_json(folder / ALTERNATION, plain)  # last: with it the choice is made
    return plain


def _plain_alternation(
    done: Alternation, rows: list[dict[str, Any]], names: tuple[str, ...]
) -> dict[str, Any]:
    plan = done.best.plan
    assert plan is not None  # the winner of an alternation has one
    return {
        "machines": done.machines,
        "refused": done.refused,
        "steps": rows,
        "endings": list(done.endings),
        "best": done.best.row(names),
        "plan": plan.to_dict(),
    }


def _csv(rows: list[dict[str, Any]]) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def train_on(
    checkpoint: Checkpoint,
    data: Dataset,
    config: CompressionConfig,
    training: Training,
    machine: Machine,
    folder: Path,
    *,
    seed: int,
    budget: Budget | None = None,
    space: CoDesignSpace | None = None,
    tell: Tell,
) -> Artifact:
    """The compressed network of a configuration for a machine, trained by ADMM and retraining; kept in ``folder``.

    Parameters
    ----------
    config : CompressionConfig
    machine : Machine
        For its number formats.
    budget : Budget, optional
    space : CoDesignSpace, optional
        Blocks are dealt out within it, by the weighing of ``space`` and among its shapes that the machine can run.
    """
    path = folder / ARTIFACT
    if path.exists():
        return load_artifact(path)
    total = training.admm_epochs + training.retrain_epochs

    def progress(now: Progress) -> None:
        before = training.admm_epochs if now.phase == "retrain" else 0
        done = before + now.epoch - 1 + now.batch / now.batches
        tell(f"training, {now.phase} epoch {now.epoch}/{now.epochs}", done, total)

    artifact = compress_checkpoint(
        checkpoint,
        data,
        config,
        recipe_of(training, seed),
        allocation=None if space is None else space.weighing,
        budget=budget,
        blocks=() if space is None else space.shapes_for(machine),
        activation_bits=machine.precision.activation_bits,
        accumulator_bits=machine.precision.accumulator_bits,
        calibration_images=CALIBRATION_IMAGES,
        progress=progress,
        resume_from=folder / STATE,
    )
    save_artifact(path, artifact)
    return artifact


def _result(
    folder: Path,
    chosen: dict[str, Any],
    artifact: Artifact,
    report: Report,
    network: Network,
    space: CoDesignSpace,
    goal: Goal,
) -> dict[str, Any]:
    """Plan against what was trained, and whether another machine would now be better."""
    machine = load_machine(folder / MACHINE)
    layers = artifact.layers()
    machines = [
        other
        for other in space.machines()[0]
        if all(
            layer.block[0] % other.array.block[0] == 0 and layer.block[1] % other.array.block[1] == 0
            for layer in layers
        )
    ]
    bench = Bench(network, [machine, *machines])
    figures = bench.measure(layers, bench.machines)
    own = figures[0]
    if own.error is not None or own.values["latency_cycles"] != report.summary["latency_cycles"]:
        raise FormatError(str(folder / MACHINE), Problem("", own.error or "is not the machine of the report"))
    best = cheapest(figures, goal, space.constraints.limits())
    better = figures[best] if best is not None else own
    assert better is not None
    names = space.varied
    limits = space.constraints.limits() | _goal_limits(goal)
    spent = artifact.results["budget"]
    accuracy = {
        name: artifact.results[f"accuracy_{name}"] for name in ("dense", "projected", "retrained", "integer")
    }
    return {
        "machine": machine_label(machine, names),
        "accuracy": accuracy,
        "test_images": artifact.results["test_images"],
        "planned": {name: chosen["best"][name] for name in own.values},
        "trained": own.values,
        "file_bytes": (folder / ARTIFACT).stat().st_size,
        "budget": spent,
        "limits_broken": own.excess(limits),
        "best_machine_for_trained": {
            "machine": machine_label(bench.machines[best or 0], names),
            "saves_percent": 100 * (1 - better.values[goal.objective] / own.values[goal.objective]),
        },
        "alternation": {"endings": chosen["endings"], "machines": chosen["machines"]},
        "warnings": artifact.results["warnings"],
    }


def _goal_limits(goal: Goal) -> dict[str, float]:
    """The goal as a limit of figures; the bytes of a file are an estimate and are told apart."""
    return {} if goal.quantity == "file_bytes" else {goal.quantity: goal.limit}
