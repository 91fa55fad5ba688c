"""Training in fp32 for any task, stopped and resumed bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.fit import Progress
from compress.loop import Gradients, Precision
from compress.run_state import (
    RunState,
    digest,
    optimizer_tensors,
    read_run,
    restore_model,
    restore_optimizer,
    write_run,
)
from compress.train import channels_last
from hwsim.errors import InputError, Problem

__all__ = ["train_dense"]


def train_dense(
    model: nn.Module,
    examples: tuple[Tensor, Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    precision: Precision = "fp32",
    state_folder: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Train in place: Adam, learning rate falling to zero along a half cosine over all steps.

    Parameters
    ----------
    model : nn.Module
        Left in evaluation mode.
    examples : (inputs, targets)
        As many of each; what does not fill a batch sits an epoch out.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, a scalar.
    epochs : int
    lr : float
    batch_size : int
    seed : int
        Of the order of the data and of dropout; the global generator is left as it was.
    precision : {"fp32", "bf16"}
        See `compress.loop.Gradients`.
    state_folder : Path, optional
        The state is kept there after every epoch, and a training that was stopped goes on from it.
    progress : callable, optional

    Raises
    ------
    InputError
        A loss that is not finite, or the state of another training in the folder.
    """
    inputs, targets = examples
    batch_size = min(batch_size, len(inputs))
    batches = len(inputs) // batch_size
    steps = max(1, epochs * batches)
    identity = {
        "training": {
            "epochs": epochs,
            "lr": lr,
            "batch_size": batch_size,
            "seed": seed,
            "precision": precision,
        },
        "network": digest(model.state_dict()),
        "data": digest({"inputs": inputs, "targets": targets}),
        "torch": torch.__version__,
    }
    with torch.random.fork_rng(devices=[]), channels_last(model, inputs[:2]):
        torch.manual_seed(seed)
        order = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
        gradients = Gradients(model, lambda outputs, _, wanted: loss_fn(outputs, wanted), precision=precision)
        found = read_run(state_folder, identity) if state_folder is not None else None
        if found is not None:
            restore_model(model, found.model)
            restore_optimizer(optimizer, found.optimizer)
            torch.set_rng_state(found.random["torch"])
            order.set_state(found.random["data"])
        for epoch in range(1 + (found.epoch if found is not None else 0), epochs + 1):
            model.train()
            rows = torch.randperm(len(inputs), generator=order)
            for batch in range(batches):
                chosen = rows[batch * batch_size : (batch + 1) * batch_size]
                done = ((epoch - 1) * batches + batch) / steps
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 + math.cos(math.pi * done)) / 2
                optimizer.zero_grad()
                value = float(gradients.backward(inputs[chosen], targets[chosen]))
                optimizer.step()
                if not math.isfinite(value):
                    where = f"{value} at epoch {epoch}, batch {batch + 1}"
                    raise InputError("training", Problem("loss", where, f"lower the learning rate ({lr})"))
                if progress is not None:
                    progress(Progress("train", epoch, epochs, batch + 1, batches, value))
            if state_folder is not None:
                random = {"torch": torch.get_rng_state(), "data": order.get_state()}
                state = RunState(
                    "train", epoch, {}, model.state_dict(), optimizer_tensors(optimizer), {}, {}, random
                )
                write_run(state_folder, identity, state)
    model.eval()
