"""The gradients of one step: a batch in parts, in the number format asked for, over all processes; and losses read late."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compress.parallel import ranks
from compress.shapes import evaluation_mode
from hwsim.errors import InputError, Problem

__all__ = ["Gradients", "LossLog", "Precision"]

Precision = Literal["fp32", "bf16"]

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``objective(outputs, inputs, targets)``: a scalar, the mean over the samples."""

_LOSSES_READ_TOGETHER = 50
"""Steps between two looks at the losses on an accelerator or among processes: each look waits for them."""


_NO_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers": False
}
"""Once an epoch is enough for running statistics, and the masks of the retraining never change. torch 2.13 has a new name."""


class _Forward(nn.Module):
    """The network and the penalty as one module, so that DDP knows of every parameter that gets a gradient."""

    def __init__(self, network: nn.Module, penalty: Callable[[], Tensor] | None) -> None:
        super().__init__()
        self.network = network
        self._penalty = penalty

    def forward(self, inputs: Tensor, with_penalty: bool) -> tuple[Any, Tensor | None]:
        return self.network(inputs), self._penalty() if with_penalty and self._penalty is not None else None


class Gradients:
    """Fills the gradients of a network, as `loss.backward()` does, but for a batch in parts and for several processes.

    Built when the parameters are in place (masked retraining has parameters of its own), used until they change.

    Parameters
    ----------
    model : nn.Module
        On its device, in float32.
    objective : callable
        ``objective(outputs, inputs, targets)``, the mean over the samples.
    precision : {"fp32", "bf16"}
        bf16: the network runs under autocast; weights, loss, penalty and gradients of the weights stay in float32.
    accumulation : int
        Parts that a batch is cut into; their gradients are summed, so memory is that of one part and the step the same but
        for rounding (batch normalisation sees one part at a time).
    penalty : callable, optional
        Gives a scalar of the parameters alone, such as `ADMM.penalty`. It counts once per step, whatever the number of
        parts and of processes: averaging equal gradients over processes leaves them as they are.

    Raises
    ------
    InputError
        bf16 on a GPU that does not have it.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        precision: Precision = "fp32",
        accumulation: int = 1,
        penalty: Callable[[], Tensor] | None = None,
    ) -> None:
        self._model = model
        self._objective = objective
        self._accumulation = accumulation
        self._forward: nn.Module = _Forward(model, penalty)
        self._device = next(model.parameters()).device
        self._is_bf16 = precision == "bf16"
        if self._is_bf16 and self._device.type == "cuda" and not torch.cuda.is_bf16_supported():
            message = f"bf16 is asked for, {torch.cuda.get_device_name(self._device)} does not have it"
            raise InputError("training", Problem("precision", message, "fp32"))

    def backward(self, inputs: Tensor, targets: Tensor, weight: float = 1.0) -> Tensor:
        """Add the gradients of this process's share of a batch to those that are there.

        Parameters
        ----------
        inputs, targets : Tensor ``[n, …]``
        weight : float
            Of the mean over these samples (`compress.parallel.Ranks.share`).

        Returns
        -------
        Tensor ``[]``
            The weighted loss without the penalty, detached and on its device.
        """
        parts = list(zip(inputs.chunk(self._accumulation), targets.chunk(self._accumulation), strict=True))
        losses = [
            self._backward_part(part, wanted, weight * len(part) / len(inputs), number == len(parts))
            for number, (part, wanted) in enumerate(parts, start=1)
        ]
        return sum(losses[1:], start=losses[0])

    def _backward_part(self, part: Tensor, wanted: Tensor, share: float, is_last: bool) -> Tensor:
        part = part.to(self._device, non_blocking=True)
        wanted = wanted.to(self._device, non_blocking=True)
        with self._unsynchronised(part, is_last):
            with self._autocast():
                outputs, penalty = self._forward(part, is_last)
            if self._is_bf16 and isinstance(outputs, Tensor):
                outputs = outputs.float()
            with self._autocast():
                loss = self._objective(outputs, part, wanted)
            if share != 1:
                loss = loss * share
            (loss if penalty is None else loss + penalty).backward()
        return loss.detach()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16) if self._is_bf16 else nullcontext()

    def _unsynchronised(self, sample: Tensor, is_last: bool) -> AbstractContextManager[Any]:
        """All parts but the last keep their gradients to themselves; the first call wraps the network for several processes."""
        if ranks().size == 1:
            return nullcontext()
        if not isinstance(self._forward, DistributedDataParallel):
            self._forward = DistributedDataParallel(
                self._forward,
                device_ids=[self._device] if self._device.type == "cuda" else None,
                **_NO_BUFFERS,
                find_unused_parameters=self._has_unused(sample[:2]),
            )
        return nullcontext() if is_last else self._forward.no_sync()

    def _has_unused(self, sample: Tensor) -> bool:
        """Whether some parameter gets no gradient from the outputs; DDP must know."""
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        with evaluation_mode(self._model), torch.enable_grad():
            outputs = self._model(sample)
            if not isinstance(outputs, Tensor):
                return True
            return any(g is None for g in torch.autograd.grad(outputs.sum(), parameters, allow_unused=True))


class LossLog:
    """The losses of an epoch, read when that costs nothing: at once on a CPU alone, else many together.

    Parameters
    ----------
    device : torch.device
    where, hint : str
        For the message about a loss that is not finite.
    together : int, optional
        Losses that are read together.

    Attributes
    ----------
    latest : float
        The last loss that was read, a mean over the processes; NaN before the first.
    total : float
        Sum of all that were read.
    """

    def __init__(self, device: torch.device, where: str, hint: str, together: int | None = None) -> None:
        is_free = device.type == "cpu" and ranks().size == 1
        self._together = together or (1 if is_free else _LOSSES_READ_TOGETHER)
        self._where, self._hint = where, hint
        self._pending: list[Tensor] = []
        self._read = 0
        self.latest = math.nan
        self.total = 0.0

    def add(self, loss: Tensor) -> None:
        """Keep the loss of a batch; reads where enough are kept.

        Raises
        ------
        InputError
            One of those that were read is not finite; it says which batch it was.
        """
        self._pending.append(loss)
        if len(self._pending) >= self._together:
            self.read()

    def read(self) -> None:
        """Read all that were not read yet; raises as `add`."""
        if not self._pending:
            return
        losses, here = torch.stack(self._pending), ranks()
        self._pending = []
        if here.size > 1:
            dist.all_reduce(losses)
            losses /= here.size
        for value in losses.tolist():
            self._read += 1
            self.total += value
            self.latest = value
            if not math.isfinite(value):
                message = f"{value} at {self._where}, batch {self._read}"
                raise InputError("training", Problem("loss", message, self._hint))
