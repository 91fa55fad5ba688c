"""The same bytes spent by a general coder: NNCodec on the weights of finished runs, before our own rounding."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.artifact import load_artifact
from compress.codec_bench.processes import run_nncodec
from compress.pretrained import load_pretrained
from compress.rebuild import rebuild
from hwsim.errors import InputError, Problem
from hwsim.files import write_atomically
from sweeps.study.folder import StudyFolder
from sweeps.study.methods import start_network
from sweeps.study.one_shot import SUBJECTS, treated_layers
from sweeps.study.runs import Run
from sweeps.study.tasks import Examples, Task, find_task

__all__ = ["PEER_METHODS", "code_with_nncodec"]

PEER_METHODS = ("unstructured", "pruned", "channels", "joint", "budget")
QP = tuple(range(-38, -7))
"""From nearly exact to very coarse."""


def code_with_nncodec(
    folder: StudyFolder, python: Path, runs: Sequence[Run], say: Callable[[str], None] = lambda text: None
) -> None:
    """Keep, for each finished run with a target of bytes, NNCodec's finest stream within that target and its quality.

    Parameters
    ----------
    folder : StudyFolder
    python : Path
        A Python that has NNCodec.
    runs : sequence of Run
    say : callable
        Gets a line per run.

    Raises
    ------
    InputError
        The Python is not there, or NNCodec fails.
    """
    if not python.is_file():
        raise InputError("study", Problem("nncodec", f"{python} does not exist"))
    for run in runs:
        if run.task in SUBJECTS:
            _code_original(run, folder, python, say)
            continue
        wanted = run.target_bytes and run.method in PEER_METHODS and folder.trained_path(run).exists()
        if not wanted or not folder.is_done(run) or folder.peer_path(run).exists():
            continue
        task = find_task(run.task)
        examples = task.examples().for_training(run.training)
        figures = _best_within(run, task, examples, folder, python)
        content = json.dumps(figures, allow_nan=False) + "\n"
        write_atomically(folder.peer_path(run), content.encode())
        say(f"{run.title}: NNCodec {figures['bytes']:,} bytes at qp {figures['qp']}, {figures['quality']}")


def _code_original(run: Run, folder: StudyFolder, python: Path, say: Callable[[str], None]) -> None:
    """Beside the fp32 network of a one-shot study: NNCodec on the weights that the others compress, at every step size."""
    if run.method != "start" or not folder.is_done(run) or folder.peer_path(run).exists():
        return
    subject, points = SUBJECTS[run.task], []
    model = load_pretrained(run.task).model
    weights = treated_layers(model)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        arrays = {key: values.detach().numpy() for key, values in weights.items()}
        for point in run_nncodec(python, arrays, QP, place):
            with np.load(place / f"qp{point['qp']}.npz", allow_pickle=False) as stored, torch.no_grad():
                for key, values in weights.items():
                    values.copy_(torch.from_numpy(stored[key]).reshape(values.shape))
            quality = subject.measure(model)
            points.append({"qp": point["qp"], "bytes": point["size_bytes"], "quality": quality})
            say(f"{run.task}: NNCodec at qp {point['qp']}: {point['size_bytes']:,} bytes, {quality}")
    write_atomically(folder.peer_path(run), (json.dumps({"points": points}, allow_nan=False) + "\n").encode())


def _best_within(
    run: Run, task: Task, examples: Examples, folder: StudyFolder, python: Path
) -> dict[str, Any]:
    model = _trained_network(run, task, examples, folder)
    tensors = {
        name: values.numpy() for name, values in model.state_dict().items() if values.is_floating_point()
    }
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        points = run_nncodec(python, tensors, QP, place)
        fitting = [point for point in points if point["size_bytes"] <= run.target_bytes]
        chosen = (
            min(fitting, key=lambda point: point["qp"])
            if fitting
            else min(points, key=lambda point: point["size_bytes"])
        )
        with np.load(place / f"qp{chosen['qp']}.npz", allow_pickle=False) as stored:
            decoded = {key: torch.from_numpy(stored[key]).reshape(tensors[key].shape) for key in stored.files}
    model.load_state_dict(model.state_dict() | decoded)
    quality = task.qualities(model, examples.test)
    return {"bytes": chosen["size_bytes"], "qp": chosen["qp"], "quality": quality, "within": bool(fitting)}


def _trained_network(run: Run, task: Task, examples: Examples, folder: StudyFolder) -> nn.Module:
    """The network with its integers of 8 bits, as training left them."""
    artifact = load_artifact(folder.trained_path(run))
    if run.width == 1 and task.network:
        return rebuild(artifact)
    start = start_network(run, task, examples, folder)
    if run.width < 1 and task.narrow is not None:
        start = task.narrow(start, run.width)
    return rebuild(artifact, lambda: copy.deepcopy(start))
