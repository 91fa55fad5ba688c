"""Training without compression, accuracy, and dense checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from compress import zoo
from compress.artifact import DatasetNote
from compress.container import package_versions, read_container, write_container
from compress.data import Dataset
from compress.fit import Progress
from compress.loop import Gradients, LossLog, Precision
from compress.parallel import from_main, ranks, same_start
from compress.run_state import (
    RunState,
    check_same_run,
    digest,
    optimizer_tensors,
    random_state,
    read_run,
    restore_model,
    restore_optimizer,
    restore_random,
    write_run,
)
from compress.shapes import evaluation_mode
from hwsim.errors import FormatError, InputError, Problem, nearest_name
from hwsim.machine import validation_problems

__all__ = [
    "Checkpoint",
    "Epoch",
    "channels_last",
    "evaluate",
    "load_checkpoint",
    "load_weights",
    "note_of",
    "save_checkpoint",
    "train",
]

CHECKPOINT_FORMAT, CHECKPOINT_VERSION = "hwsim-dense", 1


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training images gave.

    Attributes
    ----------
    loss : float
        Mean cross-entropy over the epoch's batches, as trained (not measured again afterwards).
    test_accuracy : float
        Share of the test images, in [0, 1].
    seconds : float
        Of training, without the test.
    """

    epoch: int
    loss: float
    test_accuracy: float
    seconds: float


def train(
    model: nn.Module,
    data: Dataset,
    *,
    epochs: int,
    lr: float = 1e-3,
    batch_size: int = 64,
    seed: int = 0,
    precision: Precision = "fp32",
    accumulation: int = 1,
    progress: Callable[[Progress], None] | None = None,
    resume_from: str | Path | None = None,
) -> tuple[Epoch, ...]:
    """Train in place: Adam, cross-entropy, learning rate falling to zero along a half cosine over all steps.

    Among processes (a `torch.distributed` group, as under `torchrun`) each calls it with the same arguments and takes its share
    of every batch; all end with the same weights.

    Parameters
    ----------
    model : nn.Module
        Takes normalised float32 images ``[n, c, h, w]``, gives logits ``[n, classes]``. Trained on the device where it is.
        Left in evaluation mode.
    data : Dataset
    epochs : int
    lr : float
        Of the first step.
    batch_size : int
        Of all processes together. The images left over at the end of an epoch's shuffled order sit that epoch out.
    seed : int
        Of the order of the images and of dropout. The global generator is left as it was.
    precision, accumulation
        See `compress.rules.Recipe`.
    progress : callable, optional
        Called with a `Progress` of the phase "train" after every batch, in the process of rank 0.
    resume_from : str or Path, optional
        A folder that keeps the state of the training after every epoch. The same call on the same folder goes on where the
        training was stopped, and ends with the same bits.

    Returns
    -------
    tuple of Epoch

    Raises
    ------
    InputError
        Settings out of range, a network that does not fit the images or the classes, a loss that is not finite, or a folder
        that holds the state of another run.
    FormatError
        A damaged state.
    """
    count = len(data.train_labels)
    _check_settings(epochs, lr, batch_size, accumulation)
    check_fit(model, data)
    batch_size = min(batch_size, count)
    batches, here, device = count // batch_size, ranks(), device_of(model)
    images, labels = data.train_images.to(device), data.train_labels.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * batches)
    history: list[Epoch] = []
    keeper = None
    if resume_from is not None:
        settings = {
            "epochs": epochs,
            "lr": lr,
            "batch_size": batch_size,
            "seed": seed,
            "precision": precision,
            "accumulation": accumulation,
        }
        keeper = _Keeper(Path(resume_from), _identity(model, data, settings), optimizer, schedule)
    generators = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=generators),
        channels_last(model, data.normalise(data.test_images[:2])),
    ):
        torch.manual_seed(here.seed(seed))
        same_start(model)
        gradients = Gradients(model, _cross_entropy, precision=precision, accumulation=accumulation)
        if keeper is not None:
            history += keeper.restore(model, batches)
        for epoch in range(len(history) + 1, epochs + 1):
            started = time.perf_counter()
            model.train()
            order = torch.randperm(count)
            from_main([order])
            losses = LossLog(device, f"epoch {epoch}", f"lower the learning rate ({lr})")
            for batch in range(batches):
                own, weight = here.share(order[batch * batch_size : (batch + 1) * batch_size])
                own = own.to(device, non_blocking=True)
                optimizer.zero_grad()
                loss = gradients.backward(data.normalise(images[own]), labels[own], weight)
                optimizer.step()
                schedule.step()
                losses.add(loss)
                if progress is not None and here.is_main:
                    progress(Progress("train", epoch, epochs, batch + 1, batches, losses.latest))
            losses.read()
            from_main(list(model.buffers()))
            seconds = time.perf_counter() - started
            test_accuracy = evaluate(model, data.normalise(data.test_images), data.test_labels)
            history.append(Epoch(epoch, losses.total / batches, test_accuracy, seconds))
            if keeper is not None:
                keeper.save(model, history)
    model.eval()
    return tuple(history)


@dataclass(frozen=True, eq=False)
class _Keeper:
    """Keeps the state of a training after every epoch, and puts it back."""

    folder: Path
    identity: dict[str, Any]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def restore(self, model: nn.Module, batches: int) -> list[Epoch]:
        """The epochs that a stopped training had done, everything as it was after them."""
        found = read_run(self.folder, self.identity)
        check_same_run(self.folder, found)
        if found is None:
            return []
        restore_model(model, found.model)
        restore_optimizer(self.optimizer, found.optimizer)
        restore_random(found.random, device_of(model))
        lr, steps = float(found.log["lr"]), found.epoch * batches
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Each rate follows from the one before, so the schedule cannot be asked for the rate of a step.
        done = {"last_epoch": steps, "_step_count": steps + 1, "_last_lr": [lr]}
        self.schedule.load_state_dict({**self.schedule.state_dict(), **done})
        return [Epoch(number, *row) for number, row in enumerate(found.log["epochs"].tolist(), 1)]

    def save(self, model: nn.Module, history: list[Epoch]) -> None:
        """At the end of an epoch; all processes call it, that of rank 0 writes."""
        random = random_state(device_of(model))
        if not ranks().is_main:
            return
        rows = [[epoch.loss, epoch.test_accuracy, epoch.seconds] for epoch in history]
        log = {
            "epochs": torch.tensor(rows, dtype=torch.float64),
            "lr": torch.tensor(self.optimizer.param_groups[0]["lr"], dtype=torch.float64),
        }
        tensors = optimizer_tensors(self.optimizer)
        state = RunState("train", len(history), {}, model.state_dict(), tensors, {}, {}, random, log)
        write_run(self.folder, self.identity, state)


def _identity(model: nn.Module, data: Dataset, settings: dict[str, Any]) -> dict[str, Any]:
    images = {
        "train_images": data.train_images,
        "train_labels": data.train_labels,
        "test_images": data.test_images,
        "test_labels": data.test_labels,
    }
    return {
        "training": settings,
        "network": digest(model.state_dict()),
        "data": digest(images),
        "torch": torch.__version__,
        "device": device_of(model).type,
        "processes": ranks().size,
    }


def _cross_entropy(outputs: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, targets)


def device_of(model: nn.Module) -> torch.device:
    """Where a network is; the CPU for one without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def channels_last(model: nn.Module, sample: torch.Tensor) -> Iterator[None]:
    """Weights of 2-d convolutions with the channel fastest in memory, and back again.

    Values and results are the same; oneDNN trains LeNet-5 up to a quarter faster (measured on one AVX-512 core). A network that
    cannot run so (it calls ``view`` where only ``reshape`` would do) stays as it is, and so does any among several processes.

    Parameters
    ----------
    model : nn.Module
    sample : tensor
        A small input, to try it.
    """
    if ranks().size > 1:  # DistributedDataParallel warns of strides where a convolution has one input channel
        yield
        return
    _lay_out(model, torch.channels_last)
    try:
        with evaluation_mode(model), torch.no_grad():
            model(sample.to(device_of(model)))
    except RuntimeError:
        _lay_out(model, torch.contiguous_format)
    try:
        yield
    finally:
        _lay_out(model, torch.contiguous_format)


def _lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 4:
            # A copy even where the order is the same: with one channel both layouts are, but their strides are not.
            parameter.data = parameter.data.clone(memory_format=memory_format)


def _check_settings(epochs: int, lr: float, batch_size: int, accumulation: int) -> None:
    counts = (("epochs", epochs), ("batch_size", batch_size), ("accumulation", accumulation))
    problems = [Problem(name, f"{value}, must be at least 1") for name, value in counts if value < 1]
    if not 0 < lr < math.inf:
        problems.append(Problem("lr", f"{lr}, must be positive"))
    if problems:
        raise InputError("training", problems)


def check_fit(model: nn.Module, data: Dataset) -> None:
    """Refuse a network that does not take the images or has another number of outputs than there are classes."""
    sample = data.normalise(data.train_images[:2]).to(device_of(model))
    try:
        with evaluation_mode(model), torch.no_grad():
            size = tuple(model(sample).shape)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            "training",
            Problem(
                "network",
                f"does not take images of {data.input_shape}: {error}",
                "another network or data set",
            ),
        ) from error
    if size != (2, len(data.classes)):
        problem = Problem(
            "num_classes", f"outputs of shape {size} for 2 images, but {data.name} has {len(data.classes)}"
        )
        raise InputError("training", problem)


def evaluate(
    model: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    batch_size: int = 100,
) -> float:
    """Share of the images whose largest logit is that of their label, in [0, 1].

    Parameters
    ----------
    model : nn.Module or callable
        A module is put into evaluation mode for the time. An `IntegerModel` fits too.
    images : float32 tensor ``[n, c, h, w]``
        Normalised.
    labels : int64 tensor ``[n]``
    batch_size : int

    Raises
    ------
    InputError
        No images, or not one label per image.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise InputError("evaluation", Problem("images", f"{len(images)} images and {len(labels)} labels"))
    if isinstance(model, nn.Module):
        with evaluation_mode(model):
            return _accuracy_of(model, images, labels, batch_size)
    return _accuracy_of(model, images, labels, batch_size)


def _accuracy_of(
    model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, labels: torch.Tensor, batch_size: int
) -> float:
    device = device_of(model) if isinstance(model, nn.Module) else images.device
    correct = 0
    with torch.inference_mode():
        for part, expected in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            correct += int((model(part.to(device)).argmax(1) == expected.to(device)).sum())
    return correct / len(labels)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A dense network of the zoo with what is known about it.

    Attributes
    ----------
    model : nn.Module
    network : str
        Name in the zoo.
    num_classes : int
    seed : int
        Of the training.
    history : tuple of Epoch
        Empty when the weights come from elsewhere.
    dataset : DatasetNote or None
    packages : dict of str to str
        Versions of what wrote the file.
    """

    model: nn.Module
    network: str
    num_classes: int
    seed: int = 0
    history: tuple[Epoch, ...] = ()
    dataset: DatasetNote | None = None
    packages: dict[str, str] = field(default_factory=package_versions)


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    network: str
    num_classes: Annotated[int, Field(strict=True, ge=1)]
    seed: int
    history: tuple[Epoch, ...]
    dataset: DatasetNote | None
    packages: dict[str, str]


def note_of(data: Dataset) -> DatasetNote:
    """What a model file keeps of a data set."""
    return DatasetNote(data.name, data.source, data.mean, data.deviation)


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> int:
    """Write a dense network atomically; gives the bytes of the file.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    header = {
        "format": CHECKPOINT_FORMAT,
        "version": CHECKPOINT_VERSION,
        "network": checkpoint.network,
        "num_classes": checkpoint.num_classes,
        "seed": checkpoint.seed,
        "history": [asdict(epoch) for epoch in checkpoint.history],
        "dataset": asdict(checkpoint.dataset) if checkpoint.dataset else None,
        "packages": checkpoint.packages,
    }
    state = {name: values.cpu().numpy() for name, values in checkpoint.model.state_dict().items()}
    return write_container(path, header, state)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote.

    Raises
    ------
    FormatError
        Truncated, damaged, edited, of another kind or version, or weights that do not fit the network it names.
    InputError
        The file cannot be read at all.
    """
    header, arrays = read_container(path, CHECKPOINT_FORMAT, CHECKPOINT_VERSION)
    try:
        parsed = _Header.model_validate(header)
    except ValidationError as error:
        raise FormatError(str(path), validation_problems(error, _Header)) from None
    state = {name: torch.from_numpy(values) for name, values in arrays.items()}
    model = _with_state(str(path), parsed.network, parsed.num_classes, state)
    return Checkpoint(
        model,
        parsed.network,
        parsed.num_classes,
        parsed.seed,
        parsed.history,
        parsed.dataset,
        parsed.packages,
    )


def load_weights(path: str | Path, network: str, num_classes: int | None = None) -> Checkpoint:
    """A network of the zoo with weights from a plain safetensors file, such as torchvision's state dict saved as one.

    Raises
    ------
    FormatError
        Not a safetensors file, or names and shapes that are not the network's.
    InputError
        Unknown network, or the file cannot be read at all.
    """
    classes = num_classes or zoo.network(network).num_classes
    try:
        state = safetensors.torch.load(Path(path).read_bytes())
    except OSError as error:
        raise InputError(str(path), f"cannot be read: {error.strerror or error}") from None
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise FormatError(str(path), f"not a valid safetensors file: {error}") from None
    state = {name: values.float() if values.is_floating_point() else values for name, values in state.items()}
    return Checkpoint(_with_state(str(path), network, classes, state), network, classes)


def _with_state(source: str, network: str, num_classes: int, state: Mapping[str, torch.Tensor]) -> nn.Module:
    model = zoo.build(network, num_classes, device="meta")
    problems = state_problems(model, state)
    if problems:
        raise FormatError(source, problems)
    model.load_state_dict(state, assign=True)
    return model.eval()


def state_problems(model: nn.Module, state: Mapping[str, torch.Tensor]) -> list[Problem]:
    """Every way in which a state does not fit a model: names, shapes, values that are not finite."""
    expected = model.state_dict()
    problems = [Problem(name, "missing") for name in expected if name not in state]
    for name, values in sorted(state.items()):
        if name not in expected:
            problems.append(Problem(name, "unknown", nearest_name(name, expected)))
        elif values.shape != expected[name].shape:
            problems.append(
                Problem(name, f"shape {tuple(values.shape)}, must be {tuple(expected[name].shape)}")
            )
        elif values.is_floating_point() and not values.isfinite().all():
            problems.append(Problem(name, "holds values that are not finite"))
    return problems
