"""Carry out one run: train, compress, write the file, read it back, measure."""

from __future__ import annotations

import copy
import hashlib
import json
import lzma
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

import compress as compress_package
from compress.allocation import allocate, keep_within
from compress.artifact import Artifact, load_artifact, save_artifact
from compress.budget import Budget, as_budget
from compress.container import package_versions, read_container, write_container
from compress.data import balanced_subset
from compress.fit import CompressionResult, Progress, compress
from compress.integer.calibration import quantize_activations
from compress.layers import CompressedLayer
from compress.rate_distortion import (
    MULTIPLIERS,
    Curvature,
    coarsen_network,
    coarsen_within,
    curvatures,
    round_biases,
)
from compress.rebuild import make_artifact, rebuild
from compress.rules import CompressionConfig, Plan, Recipe
from compress.shapes import evaluation_mode
from compress.train import channels_last
from hwsim.errors import InputError
from hwsim.files import write_atomically
from hwsim.image import memory_image
from hwsim.machine import load_machine
from sweeps.study import one_shot
from sweeps.study.dense import train_dense
from sweeps.study.folder import Result, StudyFolder
from sweeps.study.runs import Run
from sweeps.study.tasks import Examples, Task, find_task, pretrained_path

__all__ = ["code_digest", "execute", "start_network"]

CALIBRATION = 2048
"""Training examples that budgets, coarser integers and activation scales are found with."""

BASE_MACHINE = "msa-16x16"
DENSE_FORMAT, DENSE_VERSION = "hwsim-study-dense", 1

ProgressCallback = Callable[[Progress], None]


def execute(run: Run, folder: StudyFolder, progress: ProgressCallback | None = None) -> Result:
    """The result of a run; its training goes on where one that was stopped had come to.

    Parameters
    ----------
    run : Run
        Claimed by the caller.
    folder : StudyFolder
        Gets the start network, the file, and the state of the training while it lasts.
    progress : callable, optional
        Called after every batch.

    Raises
    ------
    InputError
        A task or settings that do not fit together.
    """
    clock = _Clock(folder.state_folder(run.key) / "seconds.json", progress)
    progress = clock.tick
    if run.task in one_shot.SUBJECTS:
        return _one_shot(run, folder, clock)
    task = find_task(run.task)
    examples = task.examples().for_training(run.training)
    if run.method == "dense":
        model = _dense(run, task, examples, folder, progress)
        found = _Found(task.qualities(model, examples.test), _fp32_bytes(model), None, {}, {})
    else:
        start = start_network(run, task, examples, folder, progress)
        if run.method == "start":
            found = _Found(task.qualities(start, examples.test), _fp32_bytes(start), None, {}, {})
        else:
            found = _compressed(run, task, examples, start, folder, progress)
    seconds = clock.seconds()
    return Result(
        run=run,
        quality=found.quality,
        file_bytes=found.file_bytes,
        image_bytes=found.image_bytes,
        fp32_bytes=_fp32_bytes(task.build(0)),
        coders=found.coders,
        seconds=round(seconds[0], 2),
        wall_seconds=round(seconds[1], 2),
        epochs=run.trained_epochs,
        details=found.details | {"examples": examples.source, "trained_on": len(examples.train[0])},
        packages=package_versions(),
        code=code_digest(),
    )


def _one_shot(run: Run, folder: StudyFolder, clock: _Clock) -> Result:
    found = one_shot.compressed(run, folder, clock.tick)
    seconds = clock.seconds()
    return Result(
        run=run,
        quality=found.quality,
        file_bytes=found.file_bytes,
        image_bytes=None,
        fp32_bytes=found.fp32_bytes,
        coders={},
        seconds=round(seconds[0], 2),
        wall_seconds=round(seconds[1], 2),
        epochs=0,
        details=found.details | {"examples": found.examples},
        packages=package_versions(),
        code=code_digest(),
    )


@dataclass(frozen=True)
class _Found:
    """What the methods have in common to report."""

    quality: dict[str, float]
    file_bytes: int
    image_bytes: int | None
    coders: dict[str, int]
    details: dict[str, Any]


class _Clock:
    """Processor and wall seconds of a run, those before it was stopped too: kept beside its state after every epoch."""

    def __init__(self, path: Path, progress: ProgressCallback | None) -> None:
        self._path, self._progress = path, progress
        self._earlier = json.loads(path.read_text()) if path.exists() else [0.0, 0.0]
        self._start = time.process_time(), time.perf_counter()

    def seconds(self) -> list[float]:
        """Until now."""
        now = time.process_time(), time.perf_counter()
        parts = zip(self._earlier, self._start, now, strict=True)
        return [float(earlier) + end - start for earlier, start, end in parts]

    def tick(self, progress: Progress) -> None:
        """After every batch."""
        if progress.batch == progress.batches:
            write_atomically(self._path, json.dumps(self.seconds()).encode())
        if self._progress is not None:
            self._progress(progress)


def _fp32_bytes(model: nn.Module) -> int:
    return 4 * sum(parameter.numel() for parameter in model.parameters())


@lru_cache(maxsize=1)
def code_digest() -> str:
    """16 hexadecimal digits over the sources that decide a result: the package compress, and training and methods here."""
    names = ("channels", "dense", "methods", "one_shot", "photographs", "pitch", "runs", "sentences", "tasks")
    compress_folder = Path(str(compress_package.__file__)).parent
    files = [*sorted(compress_folder.rglob("*.py")), *(Path(__file__).with_name(f"{n}.py") for n in names)]
    content = hashlib.sha256()
    for file in files:
        content.update(file.name.encode() + b"\0" + file.read_bytes())
    return content.hexdigest()[:16]


# --- networks in fp32


def _dense(
    run: Run, task: Task, examples: Examples, folder: StudyFolder, progress: ProgressCallback | None
) -> nn.Module:
    return _trained(run, task, examples, folder, progress, run.training.epochs, folder.state_folder(run.key))


def _trained(
    run: Run,
    task: Task,
    examples: Examples,
    folder: StudyFolder,
    progress: ProgressCallback | None,
    epochs: int,
    state_folder: Path,
) -> nn.Module:
    model = task.build(run.seed)
    if task.pretrained:
        model.load_state_dict(safetensors.torch.load_file(pretrained_path(folder.path, task)))
    train_dense(
        model,
        examples.train,
        task.loss,
        epochs=epochs,
        lr=run.training.lr_dense,
        batch_size=run.training.batch_size,
        seed=run.seed,
        precision=run.training.precision,
        state_folder=state_folder,
        progress=progress,
    )
    return model


def start_network(
    run: Run, task: Task, examples: Examples, folder: StudyFolder, progress: ProgressCallback | None = None
) -> nn.Module:
    """The network that compressions of this seed start from: trained once, kept, shared by all runs."""
    return _kept_network(run, task, examples, folder, progress, run.training.dense_epochs)


def _kept_network(
    run: Run,
    task: Task,
    examples: Examples,
    folder: StudyFolder,
    progress: ProgressCallback | None,
    epochs: int,
) -> nn.Module:
    """A dense network of so many epochs, trained by the first run that asks for it."""
    shared = replace(run, seed=0) if task.shared_start else run
    training = run.training
    fields = (
        *(task.name, shared.seed, epochs, training.lr_dense, training.batch_size),
        *(training.train_images, training.held_out, training.precision),
    )
    key = "-".join(str(field) for field in fields)
    path = folder.dense_path(key)
    with folder.claim(f"dense-{key}", wait=True):
        if not path.exists():
            state = folder.state_folder(f"dense-{key}")
            model = _trained(shared, task, examples, folder, progress, epochs, state)
            tensors = {name: values.numpy() for name, values in model.state_dict().items()}
            write_container(path, {"format": DENSE_FORMAT, "version": DENSE_VERSION}, tensors)
            folder.forget(f"dense-{key}")
    _, stored = read_container(path, DENSE_FORMAT, DENSE_VERSION)
    model = task.build(shared.seed)
    model.load_state_dict({name: torch.from_numpy(values.copy()) for name, values in stored.items()})
    return model.eval()


# --- compressed networks


def _compressed(
    run: Run,
    task: Task,
    examples: Examples,
    start: nn.Module,
    folder: StudyFolder,
    progress: ProgressCallback | None,
) -> _Found:
    model = copy.deepcopy(start)
    if run.width < 1:
        if task.narrow is None:
            raise InputError("study", f"{task.name}: there is no channel pruning of this network")
        model = task.narrow(model, run.width)
    training, (inputs, targets) = run.training, examples.train
    trains = run.trained_epochs > 0
    recipe = Recipe(
        epochs_admm=training.admm_epochs if trains and _has_blocks(run) else 0,
        epochs_retrain=_retraining_epochs(run),
        lr=training.lr,
        lr_retrain=training.lr,
        rho=training.rho,
        rho_growth=training.rho_growth,
        updates_per_epoch=training.updates_per_epoch,
        ramp_updates=training.ramp_updates,
        batch_size=training.batch_size,
        precision=training.precision,
        seed=run.seed,
    )
    calibration = _calibration(run, task, examples)
    budget = as_budget(run.budget or None)
    plan = _plan(run, task, model, calibration, budget)
    teacher, loss_fn = None, task.loss
    if training.distill and trains:
        teaches = start
        if training.teacher_epochs:
            teaches = _kept_network(run, task, examples, folder, progress, training.teacher_epochs)
        teacher = _outputs(teaches, inputs)
        loss_fn = _Loss(task, training.distill, training.temperature, _width(targets))
    adjust = None if budget is None else partial(keep_within, budget, input_shape=tuple(inputs.shape[1:]))
    with channels_last(model, inputs[:2]):
        result = compress(
            model,
            plan,
            (inputs, _packed(targets, teacher)),
            recipe,
            loss_fn=loss_fn,
            evaluate=lambda network: task.qualities(network, examples.test)[task.measure],
            progress=progress,
            checkpoint=folder.state_folder(run.key) if trains else None,
            adjust=adjust,
        )
    model.eval()
    return _measured(run, task, examples, model, result, calibration, folder)


def _has_blocks(run: Run) -> bool:
    return bool(run.pruned or run.unified or run.budget)


def _retraining_epochs(run: Run) -> int:
    """What has no blocks gets the epochs of ADMM too, so that every method trains as long."""
    training = run.training
    if not run.trained_epochs:
        return 0
    return training.retrain_epochs + (0 if _has_blocks(run) else training.admm_epochs)


def _plan(
    run: Run, task: Task, model: nn.Module, calibration: tuple[Tensor, Tensor], budget: Budget | None
) -> Plan | CompressionConfig:
    config = CompressionConfig(
        block=run.block,
        pruned=run.pruned,
        unified=run.unified,
        permute_channels=run.permute,
        exempt_first_last=run.exempt_first_last,
    )
    if budget is None and not run.allocation:
        return config
    method: Any = run.allocation or None
    return allocate(model, calibration, config, budget=budget, method=method, loss_fn=task.loss)


def _calibration(run: Run, task: Task, examples: Examples) -> tuple[Tensor, Tensor]:
    inputs, targets = examples.train
    if task.is_classification:
        rows = torch.from_numpy(balanced_subset(targets.numpy(), min(CALIBRATION, len(targets)), run.seed))
    else:
        rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(run.seed))[:CALIBRATION]
    return inputs[rows], targets[rows]


# --- distillation from outputs that are computed once: the training has no random changes of its inputs


class _Loss:
    """``(1 − share)·loss + share·distance``; targets hold the true ones and the teacher's outputs side by side."""

    def __init__(self, task: Task, share: float, temperature: float, width: int) -> None:
        self.task, self.share, self.temperature, self.width = task, share, temperature, width

    def __call__(self, outputs: Tensor, packed: Tensor) -> Tensor:
        truth, teacher = packed[:, : self.width], packed[:, self.width :]
        truth = (
            truth[:, 0]
            if self.task.is_classification
            else truth.reshape(len(truth), *self._shape(outputs, truth))
        )
        loss = self.task.loss(outputs, truth)
        distance = self.task.distance(outputs, teacher.reshape(outputs.shape), self.temperature)
        return (1 - self.share) * loss + self.share * distance

    @staticmethod
    def _shape(outputs: Tensor, truth: Tensor) -> tuple[int, ...]:
        return tuple(outputs.shape[1:]) if outputs[0].numel() == truth.shape[1] else tuple(truth.shape[1:])


def _width(targets: Tensor) -> int:
    return targets[0].numel()


def _packed(targets: Tensor, teacher: Tensor | None) -> Tensor:
    if teacher is None:
        return targets
    return torch.cat([targets.reshape(len(targets), -1).float(), teacher.flatten(1)], dim=1)


def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    with evaluation_mode(model), torch.no_grad():
        return torch.cat([model(part) for part in inputs.split(512)])


# --- files and figures


def _measured(
    run: Run,
    task: Task,
    examples: Examples,
    model: nn.Module,
    result: CompressionResult,
    calibration: tuple[Tensor, Tensor],
    folder: StudyFolder,
) -> _Found:
    details = _details(task, model, result)
    input_shape = tuple(examples.train[0].shape[1:])
    pack = partial(
        make_artifact,
        model,
        input_shape=input_shape,
        num_classes=task.classes,
        network=task.network if run.width == 1 else "",
        seed=run.seed,
        recipe={"study_run": run.key},
    )
    path = folder.file_path(run)
    if run.target_bytes:
        save_artifact(folder.trained_path(run), pack(layers=result.layers))
    layers, details["multiplier"] = _coarser(run, task, model, result.layers, calibration, path, pack)
    file_bytes = save_artifact(path, pack(layers=layers))
    artifact = load_artifact(path)
    quality = task.qualities(rebuild(artifact, lambda: copy.deepcopy(model)), examples.test)
    if task.is_classification and run.shape:
        integer = quantize_activations(model, layers, calibration[0][:512])
        quality["accuracy_integer"] = task.qualities(integer, examples.test)["accuracy"]  # type: ignore[arg-type]
        whole = path.with_suffix(".integer.tmp")
        details["file_bytes_integer"] = save_artifact(whole, pack(layers=layers, integer_model=integer))
        whole.unlink()
    return _Found(quality, file_bytes, _image_bytes(artifact, run), _coders(artifact), details)


def _coarser(
    run: Run,
    task: Task,
    model: nn.Module,
    layers: dict[str, CompressedLayer],
    calibration: tuple[Tensor, Tensor],
    path: Path,
    pack: Callable[..., Artifact],
) -> tuple[dict[str, CompressedLayer], float]:
    """Integers that keep the run's target or loss, and the multiplier λ that was needed; the model's weights follow."""
    inputs, targets = calibration
    if run.target_bytes == 0:
        if not run.training.max_loss or not task.is_classification:
            return layers, 0.0
        return coarsen_within(model, layers, inputs, targets.long(), run.training.max_loss, seed=run.seed)
    if task.is_classification:
        curvature = curvatures(model, layers, inputs, seed=run.seed)
    else:
        curvature = {name: _relative(layer) for name, layer in layers.items()}
    round_biases(model, layers)
    if save_artifact(path, pack(layers=layers)) <= run.target_bytes:
        return layers, 0.0
    # The least multiplier whose file is small enough; the largest, if none is.
    low, high = -1, len(MULTIPLIERS) - 1
    while high - low > 1:
        middle = (low + high) // 2
        tried = coarsen_network(model, layers, curvature, MULTIPLIERS[middle], inputs)
        if save_artifact(path, pack(layers=tried)) <= run.target_bytes:
            high = middle
        else:
            low = middle
    return coarsen_network(model, layers, curvature, MULTIPLIERS[high], inputs), MULTIPLIERS[high]


def _relative(layer: CompressedLayer) -> Curvature:
    """Where there are no logits, errors count relative to their layer: a constant over its mean square.

    The constant only shifts λ: it brings useful ones into the middle of `MULTIPLIERS`.
    """
    groups, m, k = layer.weights.dense.shape
    square = float(np.square(layer.float_matrix(), dtype=np.float64).mean())
    return Curvature.constant(groups, m, k, 1e-3 / max(square, 1e-12))


def _details(task: Task, model: nn.Module, result: CompressionResult) -> dict[str, Any]:
    return {
        "measure": task.measure,
        "at_start": result.accuracy_dense,
        "projected": result.accuracy_projected,
        "as_trained": result.accuracy_retrained,
        "warnings": list(result.warnings),
        "plan": result.plan.to_dict(),
        "permutation": result.permutation.to_dict(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "recipe": result.recipe.model_dump(mode="json"),
    }


def _image_bytes(artifact: Artifact, run: Run) -> int | None:
    """Bytes of the memory images on a machine with the blocks of the run; None for single weights."""
    if run.block == (1, 1):
        return None
    base = load_machine(BASE_MACHINE)
    machine = base.with_fields({"array.block": list(run.block)})
    return sum(len(memory_image(layer, machine)) for layer in artifact.layers())


def _coders(artifact: Artifact) -> dict[str, int]:
    """What a general coder makes of the same integers, one byte each, with the other parameters in float32 as they are."""
    integers = [artifact.integer_weight(name) for name in artifact.compressed]
    narrow = [
        values.astype(np.int8 if np.abs(values).max(initial=0) < 128 else np.int16) for values in integers
    ]
    content = b"".join(
        [*(values.tobytes() for values in narrow), *(v.tobytes() for v in artifact.state.values())]
    )
    return {"lzma": len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))}


def keep_pretrained(folder: StudyFolder, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Put weights that a task starts from into the folder of a study."""
    content = safetensors.torch.save({key: values.contiguous() for key, values in tensors.items()})
    write_atomically(folder.path / "pretrained" / name, content)
