"""From a trained network to compressed layers in one call: ADMM, projection, masked retraining, integers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from compress.admm import ADMM, Residual
from compress.layers import CompressedLayer
from compress.retrain import MaskedRetraining
from compress.rules import CompressionConfig, Plan, Recipe, plan_layers
from hwsim.errors import InputError, Problem

__all__ = ["Batches", "CompressionResult", "Progress", "Recipe", "compress"]

_log = logging.getLogger(__name__)

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Batches(Protocol):
    """Gives ``(inputs, targets)`` batches anew each time it is iterated: a DataLoader, a list of batches."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Progress:
    """Where a compression stands; handed to the callback after every batch.

    Attributes
    ----------
    phase : {"admm", "retrain"}
    epoch, epochs : int
        Of the phase, counted from 1.
    batch, batches : int
        Of the epoch, counted from 1.
    loss : float
        Of the batch, without the penalty.
    """

    phase: str
    epoch: int
    epochs: int
    batch: int
    batches: int
    loss: float


@dataclass(frozen=True, eq=False)
class CompressionResult:
    """What `compress` gives back; the model itself was changed in place.

    Attributes
    ----------
    layers : dict from layer name to CompressedLayer
    plan : Plan
        Also names what was left untreated, and why.
    config : CompressionConfig
    recipe : Recipe
    residuals : tuple of Residual
        One per compressed layer and ADMM update.
    warnings : tuple of str
        What had not converged when the weights were projected, and what to change.
    accuracy_dense, accuracy_projected, accuracy_retrained : float or None
        What the ``evaluate`` callback said before, after the projection (float weights), and at the end
        (quantised weights).
    """

    layers: dict[str, CompressedLayer]
    plan: Plan
    config: CompressionConfig
    recipe: Recipe
    residuals: tuple[Residual, ...]
    warnings: tuple[str, ...]
    accuracy_dense: float | None
    accuracy_projected: float | None
    accuracy_retrained: float | None


class _TensorBatches:
    """Minibatches of two tensors, shuffled anew at every pass by a generator of its own."""

    def __init__(self, inputs: Tensor, targets: Tensor, batch_size: int, seed: int) -> None:
        self._tensors = inputs, targets
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self._tensors[0]) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = self._tensors
        for rows in torch.randperm(len(inputs), generator=self._generator).split(self._batch_size):
            yield inputs[rows], targets[rows]


@dataclass(eq=False)
class _Trainer:
    """The inner loop that ADMM and retraining share."""

    model: nn.Module
    batches: Batches
    loss_fn: LossFunction
    progress: Callable[[Progress], None] | None
    device: torch.device

    def epoch(
        self,
        phase: str,
        epoch: int,
        epochs: int,
        optimizer: torch.optim.Optimizer,
        lr: Callable[[int], float],
        penalty: Callable[[], Tensor] | None,
        after_step: Callable[[int], None],
    ) -> None:
        """One pass over the data; ``lr`` and ``after_step`` get the batch's number, counted from 0."""
        self.model.train()
        for number, (inputs, targets) in enumerate(self.batches):
            for group in optimizer.param_groups:
                group["lr"] = lr(number)
            optimizer.zero_grad()
            loss = self.loss_fn(self.model(inputs.to(self.device)), targets.to(self.device))
            (loss if penalty is None else loss + penalty()).backward()
            optimizer.step()
            after_step(number)
            value = float(loss.detach())
            if not math.isfinite(value):
                where = f"{phase} epoch {epoch}, batch {number + 1}"
                hint = "lower the learning rate or rho; check the inputs for NaN"
                raise InputError("training", Problem("loss", f"{value} at {where}", hint))
            if self.progress is not None:
                self.progress(Progress(phase, epoch, epochs, number + 1, len(self.batches), value))


def compress(
    model: nn.Module,
    config: CompressionConfig,
    train_data: Batches | tuple[Tensor, Tensor],
    recipe: Recipe | None = None,
    *,
    loss_fn: LossFunction = nn.functional.cross_entropy,
    evaluate: Callable[[nn.Module], float] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> CompressionResult:
    """Compress a trained network in place: ADMM, projection for good, masked retraining, integers.

    Parameters
    ----------
    model : nn.Module
        Trained; in float32. Changed in place; its weights end as exactly ``integer · step size``.
    config : CompressionConfig
    train_data : tuple of two Tensors, or an iterable of batches with a length
        ``(inputs, targets)``, shuffled into minibatches of ``recipe.batch_size``; or such as a DataLoader.
    recipe : Recipe, optional
    loss_fn : callable
        ``loss_fn(outputs, targets)``, a scalar.
    evaluate : callable, optional
        ``evaluate(model)``, any figure of merit; called in evaluation mode before, after the projection and
        at the end.
    progress : callable, optional
        Called with a `Progress` after every batch.

    Raises
    ------
    InputError
        The configuration does not suit the network, the data cannot be batched, weights or the loss become
        NaN.

    Notes
    -----
    Reproducible: randomness comes from ``recipe.seed`` alone, and the global random state is as before
    afterwards. On an interrupt or error the model is left trainable, with the weights of that moment.

    Examples
    --------
    >>> inputs, targets = torch.eye(8).repeat(4, 1), torch.arange(8).repeat(4)
    >>> network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    >>> config = CompressionConfig(block=(2, 2), exempt_first_last=False)
    >>> result = compress(network, config, (inputs, targets), Recipe(epochs_admm=1, epochs_retrain=1))
    >>> sorted(result.layers)
    ['0', '2']
    """
    recipe = recipe or Recipe()
    plan = plan_layers(model, config)
    device = next(model.parameters()).device
    trainer = _Trainer(model, _batches(train_data, recipe), loss_fn, progress, device)
    was_training = model.training
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(recipe.seed)
        try:
            accuracy_dense = _evaluate(model, evaluate)
            admm = _run_admm(trainer, plan, recipe)
            types = admm.finalize()
            accuracy_projected = _evaluate(model, evaluate)
            layers = _retrain(trainer, plan, types, recipe)
            accuracy_retrained = _evaluate(model, evaluate)
        finally:
            model.train(was_training)
    return CompressionResult(
        layers,
        plan,
        config,
        recipe,
        tuple(admm.residuals),
        tuple(admm.warnings()),
        accuracy_dense,
        accuracy_projected,
        accuracy_retrained,
    )


def _batches(train_data: Batches | tuple[Tensor, Tensor], recipe: Recipe) -> Batches:
    """The training data as an iterable of batches with a length."""
    batches: Batches
    if isinstance(train_data, tuple):
        shapes = [
            tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in train_data
        ]
        if len(shapes) != 2 or not all(isinstance(s, tuple) and s[:1] == shapes[0][:1] for s in shapes):
            raise InputError("training data", f"a tuple of {shapes}; expected inputs and as many targets")
        inputs, targets = train_data
        batches = _TensorBatches(inputs, targets, recipe.batch_size, recipe.seed)
    else:
        batches = train_data
    try:
        count = len(batches)
    except TypeError:
        found = type(batches).__name__
        problem = f"{found} has no length; give a DataLoader, a list of batches or two tensors"
        raise InputError("training data", problem) from None
    if count == 0:
        raise InputError("training data", "holds no batch")
    return batches


def _evaluate(model: nn.Module, evaluate: Callable[[nn.Module], float] | None) -> float | None:
    if evaluate is None:
        return None
    model.eval()
    with torch.no_grad():
        return float(evaluate(model))


def _cosine(start: float, floor: float, done: float) -> float:
    """From ``start`` at 0 down to ``start · floor`` at 1.

    Source: Loshchilov, Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017.
    """
    return start * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)


def _run_admm(trainer: _Trainer, plan: Plan, recipe: Recipe) -> ADMM:
    admm = ADMM(
        trainer.model,
        plan,
        rho=recipe.rho,
        rho_growth=recipe.rho_growth,
        rho_max=max(recipe.rho, recipe.rho_max),
    )
    count = len(trainer.batches)
    # Batches after which an update falls; more updates than batches make one each.
    ends = sorted({-(-count * i // recipe.updates_per_epoch) for i in range(1, recipe.updates_per_epoch + 1)})
    starts = [0, *ends[:-1]]

    def lr(number: int) -> float:
        start, end = next((s, e) for s, e in zip(starts, ends, strict=True) if number < e)
        return _cosine(recipe.lr, recipe.lr_floor, (number - start) / (end - start))

    def after_step(number: int) -> None:
        if number + 1 in ends:
            admm.step()

    optimizer = torch.optim.Adam(trainer.model.parameters(), lr=recipe.lr)
    for epoch in range(1, recipe.epochs_admm + 1):
        trainer.epoch("admm", epoch, recipe.epochs_admm, optimizer, lr, admm.penalty, after_step)
    return admm


def _retrain(
    trainer: _Trainer, plan: Plan, types: dict[str, Tensor], recipe: Recipe
) -> dict[str, CompressedLayer]:
    total = recipe.epochs_retrain * len(trainer.batches)
    with MaskedRetraining(trainer.model, plan, types) as retraining:
        optimizer = torch.optim.Adam(trainer.model.parameters(), lr=recipe.lr_retrain)
        for epoch in range(1, recipe.epochs_retrain + 1):
            done = (epoch - 1) * len(trainer.batches)

            def lr(number: int, done: int = done) -> float:
                return _cosine(recipe.lr_retrain, recipe.lr_floor, (done + number) / total)

            retraining.calibrate()
            trainer.epoch(
                "retrain", epoch, recipe.epochs_retrain, optimizer, lr, None, lambda _: retraining.step()
            )
        return retraining.harvest()
