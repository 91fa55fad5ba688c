"""The weights of a point: trained once for all points that share them, kept as files beside the results."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from sweeps.space import Point, RandomTypes, Training

if TYPE_CHECKING:
    from compress.data import Dataset
    from compress.fit import Progress
    from compress.rules import Recipe
    from hwsim.layer import Layer

__all__ = [
    "CALIBRATION_IMAGES",
    "artifact_path",
    "dense_path",
    "images_of",
    "random_point_layers",
    "recipe_of",
    "state_path",
    "train_dense",
    "train_point",
]

CALIBRATION_IMAGES = 512
"""Training images that weigh blocks and set the activation scales of the integer model."""


def dense_path(folder: Path, point: Point) -> Path:
    """Where the uncompressed network of a point lies."""
    return folder / "dense" / f"{point.dense_key}.safetensors"


def artifact_path(folder: Path, point: Point) -> Path:
    """Where the compressed network of a point lies."""
    return folder / "artifacts" / f"{point.training_key}.hws.safetensors"


def state_path(folder: Path, training: str) -> Path:
    """Where the state of an unfinished training lies, a folder; ``training`` is its key.

    With another version of torch the bits would be others, so the training starts anew.
    """
    return folder / "unfinished" / f"{training}-torch-{version('torch')}"


def random_point_layers(point: Point) -> list[Layer]:
    """The layers of a point whose block types are drawn."""
    from compress.zoo_shapes import zoo_shapes
    from hwsim.layer import random_layers

    if not isinstance(point.weights, RandomTypes):
        raise TypeError(f"point {point.key} has trained weights")
    return random_layers(
        zoo_shapes(point.network, point.batch),
        point.block,
        point.pruned,
        point.unified,
        point.seed,
        exempt_first_last=point.weights.exempt == "first_and_last",
    )


def train_dense(
    folder: Path,
    point: Point,
    progress: Callable[[Progress], None] | None = None,
    resume_from: Path | None = None,
) -> None:
    """Train the uncompressed network of a point and keep it, unless it is there; a stopped training goes on."""
    path = dense_path(folder, point)
    if path.exists():
        return
    from compress import zoo
    from compress.train import Checkpoint, note_of, save_checkpoint, train

    training = _training(point)
    images = images_of(training, point.seed)
    classes = len(images.classes)
    model = zoo.build(point.network, classes, point.seed)
    history = train(
        model,
        images,
        epochs=training.dense_epochs,
        lr=training.learning_rate,
        batch_size=training.batch_size,
        seed=point.seed,
        progress=progress,
        resume_from=resume_from,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, Checkpoint(model, point.network, classes, point.seed, history, note_of(images)))


def train_point(
    folder: Path,
    point: Point,
    progress: Callable[[Progress], None] | None = None,
    resume_from: Path | None = None,
) -> None:
    """Compress the network of a point by ADMM and keep the artifact, unless it is there; a stopped run goes on."""
    path = artifact_path(folder, point)
    if path.exists():
        return
    from compress.artifact import save_artifact
    from compress.rebuild import compress_checkpoint
    from compress.rules import CompressionConfig
    from compress.train import load_checkpoint

    training = _training(point)
    precision = point.precision
    config = CompressionConfig(
        block=point.block,
        pruned=point.pruned,
        unified=point.unified,
        projection=training.projection,
        weight_bits=precision["weight_bits"],
        magnitude_bits=precision["magnitude_bits"],
        exempt_first_last=training.exempt == "first_and_last",
    )
    artifact = compress_checkpoint(
        load_checkpoint(dense_path(folder, point)),
        images_of(training, point.seed),
        config,
        recipe_of(training, point.seed),
        activation_bits=precision["activation_bits"],
        accumulator_bits=precision["accumulator_bits"],
        calibration_images=CALIBRATION_IMAGES,
        progress=progress,
        resume_from=resume_from,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_artifact(path, artifact)


def _training(point: Point) -> Training:
    if not isinstance(point.weights, Training):
        raise TypeError(f"point {point.key} has random types, there is nothing to train")
    return point.weights


def recipe_of(training: Training, seed: int) -> Recipe:
    """How a network is compressed and retrained."""
    from compress.rules import Recipe

    return Recipe(
        epochs_admm=training.admm_epochs,
        epochs_retrain=training.retrain_epochs,
        lr=training.learning_rate,
        lr_retrain=training.learning_rate,
        rho=training.rho,
        rho_growth=training.rho_growth,
        batch_size=training.batch_size,
        seed=seed,
    )


def images_of(training: Training, seed: int) -> Dataset:
    """The images of a training."""
    return _subset(training.dataset, training.train_images, training.test_images, seed)


@lru_cache(maxsize=2)
def _subset(dataset: str, train_images: int | None, test_images: int | None, seed: int) -> Dataset:
    from compress.data import load_dataset

    return load_dataset(dataset).subset(train_images, test_images, seed=seed)
