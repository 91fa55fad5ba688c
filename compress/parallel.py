"""Where a training runs: its device, its number format, and its processes under `torchrun`.

Every process holds the same weights and takes its share of every batch; gradients are averaged. The projection, the penalty
and the masked retraining are functions of the weights alone, so every process comes to the same by itself. Only the process
of rank 0 writes files and reports.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hwsim.errors import InputError, Problem, nearest_name

__all__ = ["Ranks", "choose_device", "from_main", "gathered", "processes", "ranks", "same_start", "unwrapped"]

_SEED_STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of two processes: far from the seeds that people count up."""

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What `torchrun` sets. Source: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables"""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes
    ----------
    rank : int
        From 0.
    size : int
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """The seed of this process's dropout: that of the run at rank 0."""
        return (seed + _SEED_STRIDE * self.rank) % (1 << 63) if self.rank else seed

    def share(self, rows: Tensor) -> tuple[Tensor, float]:
        """This process's rows of a batch, and the weight of their mean loss in the average over the processes.

        The average of weight × mean is then the mean over the whole batch, also where the shares differ in size. A process
        that is left without a row computes the first one, at weight 0.

        Examples
        --------
        >>> Ranks(1, 2).share(torch.arange(5))
        (tensor([1, 3]), 0.8)
        """
        own = rows[self.rank :: self.size]
        if not len(own):
            return rows[:1], 0.0
        return own, self.size * len(own) / len(rows)


def ranks() -> Ranks:
    """The processes of torch's default group; one alone where there is none."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside a DistributedDataParallel, or the network itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def choose_device(name: str = "auto") -> torch.device:
    """The device of this process.

    Parameters
    ----------
    name : str
        ``"auto"``: the GPU of this process where there is one, else the CPU; ``"cpu"``; ``"cuda"``; ``"cuda:1"``.
        Under `torchrun` ``"cuda"`` is the GPU with the number of the process on its machine.

    Raises
    ------
    InputError
        An unknown name, or a GPU that is not there.
    """
    kind, _, number = name.partition(":")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if kind not in ("auto", "cpu", "cuda") or (number and not (kind == "cuda" and number.isdecimal())):
        hint = nearest_name(kind, ("auto", "cpu", "cuda"))
        raise InputError("options", Problem("device", f'"{name}", must be auto, cpu, cuda or cuda:N', hint))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cpu" or (kind == "auto" and not gpus):
        return torch.device("cpu")
    index = int(number) if number else local
    if index >= gpus:
        raise InputError("options", Problem("device", _missing(index, gpus), _missing_hint(gpus)))
    return torch.device("cuda", index)


def _missing(index: int, gpus: int) -> str:
    if gpus:
        return f"GPU {index} is asked for, this machine has {gpus}, counted from 0"
    if torch.version.cuda is None:
        return f"cuda is asked for, but torch {torch.__version__} is a build without CUDA"
    return "cuda is asked for, but torch finds no GPU"


def _missing_hint(gpus: int) -> str:
    return (
        f"start at most {gpus} processes per machine"
        if gpus
        else "--device cpu, or a torch and a driver with CUDA"
    )


@contextmanager
def processes(device: torch.device) -> Iterator[Ranks]:
    """Join the other processes where `torchrun` started this one; alone, and at no cost, where it did not.

    A group that is there already is used and left. Gradients travel by NCCL between GPUs and by Gloo between CPUs.

    Examples
    --------
    >>> with processes(torch.device("cpu")) as here:
    ...     here
    Ranks(rank=0, size=1)
    """
    if not all(name in os.environ for name in _LAUNCHED) or ranks().size > 1 or dist.is_initialized():
        yield ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield ranks()
    finally:
        dist.destroy_process_group()


def from_main(tensors: list[Tensor]) -> None:
    """Overwrite tensors by those of rank 0, in place; nothing happens in a process alone."""
    if ranks().size == 1:
        return
    with torch.no_grad():
        for tensor in tensors:
            whole = tensor.detach().to(_meeting_place(tensor)).contiguous()
            dist.broadcast(whole, src=0)
            tensor.copy_(whole)


def same_start(model: nn.Module) -> None:
    """Parameters and buffers of rank 0 on every process."""
    from_main([*model.parameters(), *model.buffers()])


def gathered(values: Tensor) -> list[Tensor]:
    """The tensors of all processes by rank, of one shape and dtype, where this one lies."""
    here = ranks()
    if here.size == 1:
        return [values]
    own = values.to(_meeting_place(values))
    parts = [torch.empty_like(own) for _ in range(here.size)]
    dist.all_gather(parts, own)
    return [part.to(values.device) for part in parts]


def _meeting_place(tensor: Tensor) -> torch.device:
    """NCCL takes nothing but tensors on the GPU."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else tensor.device
    )
