"""Co-design against uniform ratios: the same networks, machines, budgets and training, several seeds."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data import Dataset
from compress.rules import parse_config
from compress.run_state import digest
from compress.subjects import file_subject
from compress.train import Checkpoint, load_checkpoint
from hwsim.errors import InputError, Problem
from hwsim.files import write_atomically
from hwsim.machine import load_machine
from hwsim.report import package_versions
from sweeps.codesign.folder import claim, machine_toml, read_json, write_json
from sweeps.codesign.run import (
    ALTERNATION,
    ARTIFACT,
    ASKED,
    MACHINE,
    REPORT,
    RESULT,
    Tell,
    codesign,
    network_of,
    train_on,
)
from sweeps.codesign.settings import CoDesignSpace, Goal, machine_label
from sweeps.codesign.uniform import best_uniform
from sweeps.space import Point
from sweeps.weights import dense_path, images_of, state_path, train_dense

__all__ = ["METHODS", "Study", "collect", "dense_network", "run_study", "uniform"]

METHODS = "codesign", "uniform", "uniform-inner"
"""The last leaves the first and the last layer dense."""
CHOICE = "choice.json"


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes
    ----------
    network : str
        Of the zoo.
    goals : tuple of Goal
        Latencies (``latency_us``), in the order in which they are run.
    seeds : tuple of int

    Raises
    ------
    InputError
        Another quantity, or a goal or seed twice.
    """

    network: str
    goals: tuple[Goal, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        problems = [
            Problem(goal.quantity, "the study compares at equal latency", "latency_us")
            for goal in self.goals
            if goal.quantity != "latency_us"
        ]
        for name, values in (("goals", self.goals), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                problems.append(Problem(name, "must be at least one, and every one once"))
        if problems:
            raise InputError("study", problems)


def dense_network(
    folder: Path, network: str, space: CoDesignSpace, seed: int, tell: Tell | None = None
) -> Checkpoint:
    """The uncompressed network, trained unless its file is in ``folder``."""
    point = Point(
        network=network,
        block=space.shapes[0],
        pruned=0.0,
        unified=0.0,
        hold=space.hold[0],
        seed=seed,
        base=space.machine.base,
        fields=(),
        weights=space.training,
        batch=1,
    )

    def progress(now: Any) -> None:
        if tell is not None:
            tell(
                f"training {network}, epoch {now.epoch}/{now.epochs}",
                now.epoch - 1 + now.batch / now.batches,
                now.epochs,
            )

    state = state_path(folder, point.dense_key)
    train_dense(folder, point, progress, state)
    shutil.rmtree(state, ignore_errors=True)
    return load_checkpoint(dense_path(folder, point))


def run_study(
    study: Study,
    space: CoDesignSpace,
    folder: str | Path,
    *,
    tell: Tell | None = None,
) -> None:
    """Run what is missing of a study: a goal with all methods and seeds before the next one.

    Parameters
    ----------
    study : Study
    space : CoDesignSpace
    folder : str or Path
        One folder per run in ``runs``; dense networks in ``dense``. A run that was stopped goes on.
    tell : callable, optional
        As `sweeps.codesign.run.codesign`.
    """
    folder = Path(folder)
    tell = tell or (lambda doing, done, total: None)
    missing = [
        (goal, method, seed)
        for goal in study.goals
        for method in METHODS
        for seed in study.seeds
        if not (run_folder(folder, goal, seed, method) / RESULT).exists()
    ]
    for number, (goal, method, seed) in enumerate(missing, 1):

        def told(doing: str, done: float, total: float, number: int = number) -> None:
            tell(f"run {number}/{len(missing)}: {doing}", done, total)

        path = run_folder(folder, goal, seed, method)
        images = images_of(space.training, seed)
        checkpoint = dense_network(folder, study.network, space, seed, told)
        if method == "codesign":
            codesign(checkpoint, images, space, goal, path, seed=seed, tell=told)
        else:
            inner = method == "uniform-inner"
            uniform(checkpoint, images, space, goal, path, inner_only=inner, seed=seed, tell=told)


def run_folder(folder: Path, goal: Goal, seed: int, method: str) -> Path:
    """Where one run lies."""
    return folder / "runs" / f"{goal.quantity}-{goal.limit:.12g}-{seed}-{method}"


def uniform(
    checkpoint: Checkpoint,
    data: Dataset,
    space: CoDesignSpace,
    goal: Goal,
    folder: Path,
    *,
    inner_only: bool,
    seed: int,
    tell: Tell,
) -> dict[str, Any]:
    """Uniform ratios on their best machine, trained like a co-design; kept and resumed the same way.

    Where no uniform ratios reach the goal, the result holds the reason under ``infeasible``.
    """
    asked = {
        "method": "uniform-inner" if inner_only else "uniform",
        "network": checkpoint.network,
        "dense_network": digest(checkpoint.model.state_dict()),
        "goal": {"quantity": goal.quantity, "limit": goal.limit},
        "space": space.model_dump(mode="json"),
        "seed": seed,
    }
    claim(folder / ASKED, asked, package_versions())
    found = read_json(folder / CHOICE)
    if found is None:
        try:
            choice = best_uniform(
                network_of(checkpoint, data, space, seed),
                space,
                goal,
                exempt_first_last=inner_only,
                progress=lambda done, total: tell("choosing uniform ratios", done, total),
            )
        except InputError as error:
            write_json(folder / RESULT, {"infeasible": str(error)})
            return {"infeasible": str(error)}
        write_atomically(folder / MACHINE, machine_toml(choice.machine).encode())
        found = {
            "config": choice.config.model_dump(mode="json"),
            "damage": choice.damage,
            "planned": choice.figures.values,
        }
        write_json(folder / CHOICE, found)
    config, machine = parse_config(found["config"]), load_machine(folder / MACHINE)
    artifact = train_on(checkpoint, data, config, space.training, machine, folder, seed=seed, tell=tell)
    report = file_subject(folder / ARTIFACT, machine, 1).simulate()
    report.save(folder / REPORT)
    summary = report.summary
    result = {
        "machine": machine_label(machine, space.varied),
        "ratios": {
            name: found["config"][name] for name in ("block", "pruned", "unified", "exempt_first_last")
        },
        "damage": found["damage"],
        "accuracy": {
            name: artifact.results[f"accuracy_{name}"]
            for name in ("dense", "projected", "retrained", "integer")
        },
        "test_images": artifact.results["test_images"],
        "planned": found["planned"],
        "trained": {
            "latency_us": summary["latency_cycles"] / machine.clock_mhz,
            "latency_cycles": summary["latency_cycles"],
            "energy_pj": summary["energy_pj"],
            "image_bytes": summary["image_bytes"],
            "area_mm2": summary["area_mm2"],
        },
        "file_bytes": (folder / ARTIFACT).stat().st_size,
        "warnings": artifact.results["warnings"],
    }
    write_json(folder / RESULT, result)
    return result


def collect(study: Study, space: CoDesignSpace, folder: str | Path) -> list[dict[str, Any]]:
    """The results that are there, one row per run."""
    rows = []
    for goal in study.goals:
        for seed in study.seeds:
            for method in METHODS:
                path = run_folder(Path(folder), goal, seed, method)
                result = read_json(path / RESULT)
                if result is None:
                    continue
                row = {"goal": goal.quantity, "limit": goal.limit, "seed": seed, "method": method, **result}
                alternation = read_json(path / ALTERNATION)
                if alternation is not None:
                    row |= {"damage": alternation["best"]["damage"], "plan": alternation["plan"]}
                if "infeasible" not in row:
                    row["machine"] = machine_label(load_machine(path / MACHINE), space.varied)
                rows.append(row)
    return rows
