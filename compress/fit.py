"""From a trained network to compressed layers in one call: ADMM, projection, masked retraining, integers."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data.distributed import DistributedSampler

from compress.admm import ADMM, Residual, project_to_types
from compress.layers import CompressedLayer
from compress.loop import Gradients, LossLog
from compress.merit import figure_of_merit
from compress.parallel import from_main, gathered, ranks, same_start
from compress.permute import Permutation, permute_channels
from compress.retrain import MaskedRetraining
from compress.rules import CompressionConfig, Plan, PlannedLayer, Recipe, plan_layers
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
from hwsim.errors import InputError, Problem
from hwsim.layer import PRUNED, UNIFIED

__all__ = ["Batches", "CompressionResult", "Progress", "Recipe", "compress"]

_log = logging.getLogger(__name__)

LossFunction = Callable[[Tensor, Tensor], Tensor]

AdjustTypes = Callable[[nn.Module, Plan, Mapping[str, Tensor]], dict[str, Tensor]]
"""``adjust(model, plan, types)`` gives the types that are retrained; none of them above the one that came in."""


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
        Of the batch, without the penalty. On an accelerator and among processes losses are read many at a time: then the
        latest that was read, and NaN before the first.
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
    recipe : Recipe
    permutation : Permutation
        Which channels were reordered, and which could not be, and why.
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
    recipe: Recipe
    permutation: Permutation
    residuals: tuple[Residual, ...]
    warnings: tuple[str, ...]
    accuracy_dense: float | None
    accuracy_projected: float | None
    accuracy_retrained: float | None


class _TensorBatches:
    """Minibatches of two tensors, shuffled anew at every pass by a generator of its own; of each this process's share."""

    def __init__(self, inputs: Tensor, targets: Tensor, batch_size: int, seed: int) -> None:
        self._tensors = inputs, targets
        self._batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self._tensors[0]) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((inputs, targets) for inputs, targets, _ in self.shares())

    def shares(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Inputs, targets and the weight of their mean loss (`compress.parallel.Ranks.share`)."""
        inputs, targets = self._tensors
        here = ranks()
        for rows in torch.randperm(len(inputs), generator=self.generator).split(self._batch_size):
            own, weight = here.share(rows)
            own = own.to(inputs.device, non_blocking=True)
            yield inputs[own], targets[own.to(targets.device, non_blocking=True)], weight


@dataclass(frozen=True, eq=False)
class _Teacher:
    """The uncompressed network, whose outputs the compressed one is drawn to."""

    model: nn.Module
    share: float
    kind: Literal["kl", "mse"]
    temperature: float

    def blend(self, loss: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
        """``(1 − share)·loss + share·distance``; the squared temperature keeps the gradient's size (Hinton et al., 2015)."""
        with torch.no_grad():
            wanted = self.model(inputs)
        if self.kind == "mse":
            distance = nn.functional.mse_loss(outputs, wanted)
        else:
            soft, target = (
                torch.log_softmax(values / self.temperature, dim=1) for values in (outputs, wanted)
            )
            pointwise = nn.functional.kl_div(soft, target, reduction="none", log_target=True).sum(dim=1)
            distance = self.temperature**2 * pointwise.mean()
        return (1 - self.share) * loss + self.share * distance


@dataclass(eq=False)
class _Trainer:
    """The inner loop that ADMM and retraining share."""

    model: nn.Module
    batches: Batches
    loss_fn: LossFunction
    progress: Callable[[Progress], None] | None
    device: torch.device
    teacher: _Teacher | None
    recipe: Recipe
    frozen: Mapping[str, nn.Module]

    def _loss(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = self.loss_fn(outputs, targets)
        return loss if self.teacher is None else self.teacher.blend(loss, outputs, inputs)

    def gradients(self, penalty: Callable[[], Tensor] | None) -> Gradients:
        """For the parameters that the network has now."""
        recipe = self.recipe
        return Gradients(
            self.model,
            self._loss,
            precision=recipe.precision,
            accumulation=recipe.accumulation,
            penalty=penalty,
        )

    def epoch(
        self,
        phase: str,
        epoch: int,
        epochs: int,
        optimizer: torch.optim.Optimizer,
        gradients: Gradients,
        lr: Callable[[int], float],
        after_step: Callable[[int], None],
    ) -> None:
        """One pass over the data; ``lr`` and ``after_step`` get the batch's number, counted from 0."""
        self.model.train()
        for module in self.frozen.values():
            module.training = False
        hint = "lower the learning rate or rho; check the inputs for NaN"
        losses = LossLog(self.device, f"{phase} epoch {epoch}", hint)
        for number, (inputs, targets, weight) in enumerate(_shares(self.batches)):
            for group in optimizer.param_groups:
                group["lr"] = lr(number)
            optimizer.zero_grad()
            loss = gradients.backward(inputs, targets, weight)
            optimizer.step()
            after_step(number)
            losses.add(loss)
            if self.progress is not None:
                self.progress(Progress(phase, epoch, epochs, number + 1, len(self.batches), losses.latest))
        losses.read()
        # Running statistics are those of one process, as in DDP.
        from_main(list(self.model.buffers()))


def _shares(batches: Batches) -> Iterator[tuple[Tensor, Tensor, float]]:
    if isinstance(batches, _TensorBatches):
        return batches.shares()
    return ((inputs, targets, 1.0) for inputs, targets in batches)


def compress(
    model: nn.Module,
    config: CompressionConfig | Plan,
    train_data: Batches | tuple[Tensor, Tensor],
    recipe: Recipe | None = None,
    *,
    loss_fn: LossFunction = nn.functional.cross_entropy,
    evaluate: Callable[[nn.Module], float] | None = None,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: str | Path | None = None,
    adjust: AdjustTypes | None = None,
) -> CompressionResult:
    """Compress a trained network in place: ADMM, projection for good, masked retraining, integers.

    Parameters
    ----------
    model : nn.Module
        Trained; in float32. Changed in place; its weights end as exactly ``integer · step size``. Modules in evaluation mode
        inside a network in training mode stay in it, so that frozen normalisation keeps its statistics; where the network
        itself is in evaluation mode, all of it trains. Afterwards every module is in the mode that it came in.
    config : CompressionConfig or Plan
        A plan for this very model, such as `compress.allocation.allocate` gives.
    train_data : tuple of two Tensors, or an iterable of batches with a length
        ``(inputs, targets)``, shuffled into minibatches of ``recipe.batch_size``; or such as a DataLoader.
    recipe : Recipe, optional
    loss_fn : callable
        ``loss_fn(outputs, targets)``, a scalar: the mean over the samples.
    evaluate : callable, optional
        ``evaluate(model)``, any figure of merit; called in evaluation mode before, after the projection and
        at the end.
    progress : callable, optional
        Called with a `Progress` after every batch, in the process of rank 0.
    checkpoint : str or Path, optional
        A folder. The state of the run is written there after every epoch; called again with the same arguments, a run that
        was stopped goes on from there, and ends bit for bit like one that was not. The order of the data is restored where
        it comes from torch's global generator or from the ``generator`` of a DataLoader.
    adjust : callable, optional
        Called with the projected network, the plan and the types; gives the types that are retrained, such as
        `compress.allocation.keep_within` does.

    Raises
    ------
    InputError
        The configuration does not suit the network, the data cannot be batched, weights or the loss become
        NaN, the checkpoint is of another run.
    FormatError
        The checkpoint is damaged.

    Notes
    -----
    Among processes (a `torch.distributed` group, as under `torchrun`) each calls it with the same arguments and trains on its
    share: of the tensors' batches, whose order and size are those of one process alone; or of what its own DataLoader gives,
    which should have a `DistributedSampler`. All start from the weights of rank 0, end with the same ones, and evaluate; only
    rank 0 writes the checkpoint, which all must be able to read. Batch normalisation sees a process's share alone.

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
    plan = config if isinstance(config, Plan) else plan_layers(model, config)
    batches = _batches(train_data, recipe)
    device = _device(model)
    modes = [(module, module.training) for module in model.modules()]
    frozen = _frozen(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        here = ranks()
        # Dropout differs between the processes; the order of the data has a generator of its own.
        torch.manual_seed(here.seed(recipe.seed))
        same_start(model)
        _check_share(batches)
        try:
            keeper = _Keeper.start(checkpoint, model, plan, recipe, batches, train_data, frozen)
            permutation = _permute(model, plan, batches, device)
            teacher = _teacher(model, recipe)
            report = progress if here.is_main else None
            trainer = _Trainer(model, batches, loss_fn, report, device, teacher, recipe, frozen)
            if "dense" not in keeper.accuracies:
                keeper.accuracies["dense"] = _evaluate(model, evaluate)
            admm = _run_admm(trainer, plan, recipe, keeper)
            types = keeper.types() or _final_types(admm, adjust)
            plan = plan.with_counts({name: _counts(codes) for name, codes in types.items()})
            if "projected" not in keeper.accuracies:
                keeper.accuracies["projected"] = _evaluate(model, evaluate)
            layers = _retrain(trainer, plan, admm, types, recipe, keeper)
            accuracy_retrained = _evaluate(model, evaluate)
        finally:
            for module, is_training in modes:
                module.training = is_training
    return CompressionResult(
        layers,
        plan,
        recipe,
        permutation,
        tuple(admm.residuals),
        tuple(admm.warnings()),
        keeper.accuracies["dense"],
        keeper.accuracies["projected"],
        accuracy_retrained,
    )


def _check_share(batches: Batches) -> None:
    """What a process can know of the data of the others."""
    if ranks().size == 1:
        return
    counts = [int(count) for count in gathered(torch.tensor([len(batches)]))]
    if len(set(counts)) > 1:
        message = f"{counts} batches in the processes by rank, must be the same"
        raise InputError("training data", Problem("", message, "give the loader a DistributedSampler"))
    is_sharded = isinstance(batches, _TensorBatches) or _sampler(batches) is not None
    if not is_sharded and ranks().is_main:
        _log.warning(
            "every one of the %d processes reads all of the data: give the DataLoader a DistributedSampler",
            ranks().size,
        )


def _sampler(batches: Batches) -> DistributedSampler | None:
    sampler = getattr(batches, "sampler", None)
    return sampler if isinstance(sampler, DistributedSampler) else None


def _new_order(batches: Batches, epoch: int) -> None:
    """Tell a distributed sampler which pass it is, counted from 0 over both phases: without it, all have the same order."""
    sampler = _sampler(batches)
    if sampler is not None:
        sampler.set_epoch(epoch)


def _frozen(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that the user holds in evaluation mode, by name; a network that is in it as a whole holds none."""
    return {name: part for name, part in model.named_modules() if model.training and not part.training}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _teacher(model: nn.Module, recipe: Recipe) -> _Teacher | None:
    if not recipe.distill:
        return None
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    return _Teacher(frozen, recipe.distill, recipe.distill_loss, recipe.distill_temperature)


def _permute(model: nn.Module, plan: Plan, batches: Batches, device: torch.device) -> Permutation:
    if not any(layer.settings.permute_channels for layer in plan.layers):
        return Permutation((), ())
    state = random_state(device, _generator(batches))
    inputs, _ = next(iter(batches))
    # The look at one batch must not change the order of the training.
    restore_random(state, device, _generator(batches))
    return permute_channels(model, plan, inputs.to(device))


@dataclass(eq=False)
class _Keeper:
    """Writes the state of the run after every epoch, and holds what was found of an earlier one."""

    folder: Path | None
    identity: dict[str, Any]
    batches: Batches
    found: RunState | None = None
    accuracies: dict[str, float | None] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        folder: str | Path | None,
        model: nn.Module,
        plan: Plan,
        recipe: Recipe,
        batches: Batches,
        train_data: Batches | tuple[Tensor, Tensor],
        frozen: Mapping[str, nn.Module],
    ) -> _Keeper:
        """Before anything of the model has changed."""
        if folder is None:
            return cls(None, {}, batches)
        tensors = {"inputs": train_data[0], "targets": train_data[1]} if isinstance(train_data, tuple) else {}
        identity = {
            "recipe": recipe.model_dump(mode="json"),
            "plan": {layer.name: _identity(layer) for layer in plan.layers},
            "dense_network": digest(model.state_dict()),
            "data": digest(tensors) if tensors else "",
            "batches": len(batches),
            "torch": torch.__version__,
            "device": _device(model).type,
            "processes": ranks().size,
            **({"frozen": list(frozen)} if frozen else {}),
        }
        found = read_run(folder, identity)
        check_same_run(Path(folder), found)
        return cls(Path(folder), identity, batches, found, dict(found.accuracies) if found else {})

    def epochs_done(self, phase: str) -> int:
        """Epochs of a phase that need not be run again, where the run was stopped in it."""
        return self.found.epoch if self.found is not None and self.found.phase == phase else 0

    def in_phase(self, phase: str) -> bool:
        """Whether the run was stopped in this phase."""
        return self.found is not None and self.found.phase == phase

    def types(self) -> dict[str, Tensor]:
        """The frozen types where the run had them already."""
        return dict(self.found.types) if self.found is not None else {}

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Network, optimizer and random generators as they were."""
        if self.found is None:
            return
        restore_model(model, self.found.model)
        restore_optimizer(optimizer, self.found.optimizer)
        restore_random(self.found.random, _device(model), _generator(self.batches))

    def save(
        self,
        phase: Literal["admm", "retrain"],
        epoch: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        admm: ADMM,
        types: dict[str, Tensor] | None = None,
    ) -> None:
        """At the end of an epoch."""
        if self.folder is None:
            return
        random = random_state(_device(model), _generator(self.batches))
        if not ranks().is_main:
            return
        state = RunState(
            phase,
            epoch,
            self.accuracies,
            model.state_dict(),
            optimizer_tensors(optimizer),
            admm.state_dict(),
            types or {},
            random,
        )
        write_run(self.folder, self.identity, state)


def _identity(layer: PlannedLayer) -> dict[str, Any]:
    settings = layer.settings.model_dump(mode="json")
    return {"counts": list(layer.counts), **settings}


def _generator(batches: Batches) -> torch.Generator | None:
    """What decides the order of the data where a loader has a generator of its own."""
    generator = getattr(batches, "generator", None)
    return generator if isinstance(generator, torch.Generator) else None


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
    if evaluate is not None:
        model.eval()
    return figure_of_merit(evaluate, model)


def _cosine(start: float, floor: float, done: float) -> float:
    """From ``start`` at 0 down to ``start · floor`` at 1.

    Source: Loshchilov, Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017.
    """
    return start * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)


def _run_admm(trainer: _Trainer, plan: Plan, recipe: Recipe, keeper: _Keeper) -> ADMM:
    admm = ADMM(
        trainer.model,
        plan,
        rho=recipe.rho,
        rho_growth=recipe.rho_growth,
        rho_max=max(recipe.rho, recipe.rho_max),
        ramp_updates=recipe.ramp_updates,
    )
    if keeper.found is not None:
        admm.load_state_dict(keeper.found.admm)
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
    gradients = trainer.gradients(admm.penalty)
    if keeper.in_phase("admm"):
        keeper.restore(trainer.model, optimizer)
    if not keeper.in_phase("retrain"):
        for epoch in range(keeper.epochs_done("admm") + 1, recipe.epochs_admm + 1):
            _new_order(trainer.batches, epoch - 1)
            trainer.epoch("admm", epoch, recipe.epochs_admm, optimizer, gradients, lr, after_step)
            keeper.save("admm", epoch, trainer.model, optimizer, admm)
    return admm


def _final_types(admm: ADMM, adjust: AdjustTypes | None) -> dict[str, Tensor]:
    """The types of ADMM's last projection, adjusted, with the weights to match."""
    types = admm.finalize()
    if adjust is not None:
        adjusted = adjust(admm.model, admm.plan, types)
        for layer in admm.plan.layers:
            codes = adjusted[layer.name]
            if not torch.equal(codes, types[layer.name]):
                project_to_types(layer, codes)
        types = adjusted
    # Equal weights give equal types on equal machines; where processors differ, rank 0 decides.
    from_main([*types.values(), *(layer.module.get_parameter("weight") for layer in admm.plan.layers)])
    return types


def _counts(types: Tensor) -> tuple[int, int]:
    return int((types == PRUNED).sum()), int((types == UNIFIED).sum())


def _retrain(
    trainer: _Trainer, plan: Plan, admm: ADMM, types: dict[str, Tensor], recipe: Recipe, keeper: _Keeper
) -> dict[str, CompressedLayer]:
    total = recipe.epochs_retrain * len(trainer.batches)
    with MaskedRetraining(trainer.model, plan, types) as retraining:
        optimizer = torch.optim.Adam(trainer.model.parameters(), lr=recipe.lr_retrain)
        gradients = trainer.gradients(None)
        if keeper.in_phase("retrain"):
            keeper.restore(trainer.model, optimizer)
        for epoch in range(keeper.epochs_done("retrain") + 1, recipe.epochs_retrain + 1):
            done = (epoch - 1) * len(trainer.batches)

            def lr(number: int, done: int = done) -> float:
                return _cosine(recipe.lr_retrain, recipe.lr_floor, (done + number) / total)

            retraining.calibrate()
            _new_order(trainer.batches, recipe.epochs_admm + epoch - 1)
            trainer.epoch(
                "retrain",
                epoch,
                recipe.epochs_retrain,
                optimizer,
                gradients,
                lr,
                lambda _: retraining.step(),
            )
            keeper.save("retrain", epoch, trainer.model, optimizer, admm, types)
        return retraining.harvest()
