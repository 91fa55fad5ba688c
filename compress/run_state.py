"""A compression that was stopped goes on: everything that decides its next step, in one file. Never pickle.

The file holds the network, the optimizer, ADMM's variables, the frozen types, and the states of the random generators, as
they were at the end of an epoch; the header says which run it belongs to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor, nn

from compress.container import read_container, write_container
from compress.parallel import gathered, ranks
from hwsim.errors import FormatError, InputError, Problem
from hwsim.machine import validation_problems

__all__ = [
    "RunState",
    "check_same_run",
    "differences",
    "digest",
    "optimizer_tensors",
    "random_state",
    "read_run",
    "restore_model",
    "restore_optimizer",
    "restore_random",
    "write_run",
]

RUN_FORMAT, RUN_VERSION = "hwsim-run", 2
RUN_FILE = "compress-run.safetensors"
"""Name of the file in the folder that the user gives."""


@dataclass(frozen=True, eq=False)
class RunState:
    """A run at the end of an epoch.

    Attributes
    ----------
    phase : {"train", "admm", "retrain"}
        "train" is the training of an uncompressed network.
    epoch : int
        Epochs of the phase that are done.
    accuracies : dict of str to float or None
        What was evaluated so far, under ``dense`` and ``projected``.
    model, optimizer, admm, types, random, log : dict of str to Tensor
        ``random`` holds the generators of every process: ``"torch"`` is that of rank 0, ``"torch.1"`` that of rank 1. ``log``
        holds what a training tells of its epochs.
    """

    phase: Literal["train", "admm", "retrain"]
    epoch: int
    accuracies: dict[str, float | None]
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    admm: Mapping[str, Tensor]
    types: Mapping[str, Tensor] = field(default_factory=dict)
    random: Mapping[str, Tensor] = field(default_factory=dict)
    log: Mapping[str, Tensor] = field(default_factory=dict)


_PARTS = ("model", "optimizer", "admm", "types", "random", "log")


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    phase: Literal["train", "admm", "retrain"]
    epoch: Annotated[int, Field(strict=True, ge=1)]
    accuracies: dict[str, float | None]
    identity: dict[str, JsonValue]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, 64 hexadecimal digits."""
    found = hashlib.sha256()
    for name, values in tensors.items():
        found.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        # Through uint8: NumPy has no bfloat16.
        found.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def write_run(folder: str | Path, identity: Mapping[str, Any], state: RunState) -> None:
    """Write the state of a run atomically into a folder, in place of the one before.

    Parameters
    ----------
    folder : str or Path
    identity : mapping
        JSON values that say which run it is.
    state : RunState

    Raises
    ------
    InputError
        The file cannot be written.
    """
    header = {
        "format": RUN_FORMAT,
        "version": RUN_VERSION,
        "phase": state.phase,
        "epoch": state.epoch,
        "accuracies": state.accuracies,
        "identity": dict(identity),
    }
    tensors = dict(
        _stored(f"{part}/{name}", values.detach().cpu())
        for part in _PARTS
        for name, values in getattr(state, part).items()
    )
    write_container(Path(folder) / RUN_FILE, header, tensors)


_BFLOAT16 = "bfloat16:"
"""In front of the key of a tensor that is stored as 16-bit integers: NumPy has no such numbers."""


def _stored(key: str, tensor: Tensor) -> tuple[str, NDArray]:
    if tensor.dtype == torch.bfloat16:
        return _BFLOAT16 + key, tensor.view(torch.int16).numpy()
    return key, tensor.numpy()


def _restored(key: str, values: NDArray) -> tuple[str, Tensor]:
    tensor = torch.from_numpy(values.copy())
    if key.startswith(_BFLOAT16):
        return key.removeprefix(_BFLOAT16), tensor.view(torch.bfloat16)
    return key, tensor


def read_run(folder: str | Path, identity: Mapping[str, Any]) -> RunState | None:
    """The state of a run that was stopped, or None where the folder holds none.

    Raises
    ------
    FormatError
        A damaged file, or one of another version.
    InputError
        The file belongs to another run: every setting that differs is named.
    """
    path = Path(folder) / RUN_FILE
    if not path.exists():
        return None
    raw, arrays = read_container(path, RUN_FORMAT, RUN_VERSION)
    try:
        header = _Header.model_validate(raw)
    except ValidationError as error:
        raise FormatError(str(path), validation_problems(error, _Header)) from None
    problems = differences(header.identity, dict(identity))
    if problems:
        raise InputError(str(path), problems)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for stored_key, values in arrays.items():
        key, tensor = _restored(stored_key, values)
        part, _, name = key.partition("/")
        if part not in parts:
            raise FormatError(str(path), Problem(key, "unknown tensor"))
        parts[part][name] = tensor
    return RunState(header.phase, header.epoch, header.accuracies, **parts)


def differences(stored: Any, wanted: Any, field_name: str = "") -> list[Problem]:
    """What two identities of a run, as JSON values, do not share: one problem each."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        return [
            problem
            for name in sorted(set(stored) | set(wanted))
            for problem in differences(
                stored.get(name), wanted.get(name), f"{field_name}.{name}" if field_name else name
            )
        ]
    if stored == wanted:
        return []
    shown = [text if len(text := str(value)) <= 60 else text[:57] + "…" for value in (stored, wanted)]
    hint = "give the settings and data of the run that was stopped, or another folder"
    return [Problem(field_name, f"the stopped run has {shown[0]}, this one {shown[1]}", hint)]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer whose state is of tensors, such as Adam: ``"3/exp_avg"`` of the parameter number 3."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{number}/{name}": values
        for number, parameter in enumerate(parameters)
        for name, values in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, each tensor in the memory layout of its parameter.

    Raises
    ------
    FormatError
        A number that is no parameter, or a shape that is not the parameter's.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, values in tensors.items():
        number, _, name = key.partition("/")
        parameter = parameters[int(number)] if number.isdigit() and int(number) < len(parameters) else None
        if parameter is None or values.shape not in (parameter.shape, torch.Size()):
            raise FormatError(
                "optimizer state", Problem(key, f"shape {tuple(values.shape)} fits no parameter")
            )
        if values.shape == parameter.shape:
            values = torch.empty_like(parameter, dtype=values.dtype).copy_(values)
        optimizer.state[parameter][name] = values.detach()


def restore_model(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Put a stored state into a network, each tensor in the memory layout that it has there.

    Raises
    ------
    FormatError
        Names or shapes that are not the network's, all of them named.
    """
    expected = model.state_dict()
    problems = [Problem(f"model/{name}", "missing") for name in expected if name not in stored]
    problems += [
        Problem(f"model/{name}", f"shape {tuple(values.shape)} does not fit the network")
        for name, values in stored.items()
        if name not in expected or expected[name].shape != values.shape
    ]
    if problems:
        raise FormatError("state of a stopped run", problems)
    model.load_state_dict(stored)


def random_state(device: torch.device, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """The generators that decide dropout and the order of the data, of all processes (all of them call it).

    Those of rank 0 have their own names, ``"torch"``, ``"data"`` (``generator``) and ``"cuda"``; of rank 1 ``"torch.1"``.
    """
    own = {"torch": torch.get_rng_state()}
    if generator is not None:
        own["data"] = generator.get_state()
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    return {
        f"{name}.{rank}" if rank else name: part
        for name, values in own.items()
        for rank, part in enumerate(gathered(values))
    }


def restore_random(
    random: Mapping[str, Tensor], device: torch.device, generator: torch.Generator | None = None
) -> None:
    """Put back what `random_state` gave, in this process its own."""
    suffix = "" if ranks().is_main else f".{ranks().rank}"
    torch.set_rng_state(random[f"torch{suffix}"])
    if generator is not None and f"data{suffix}" in random:
        generator.set_state(random[f"data{suffix}"])
    if f"cuda{suffix}" in random:
        torch.cuda.set_rng_state(random[f"cuda{suffix}"], device)


def check_same_run(folder: Path, found: RunState | None) -> None:
    """All processes must have found the same: the folder lies where each of them can read it.

    Raises
    ------
    InputError
        They have not.
    """
    done = 0 if found is None else 2 * found.epoch + (found.phase == "retrain")
    seen = [int(part) for part in gathered(torch.tensor([done]))]
    if len(set(seen)) > 1:
        hint = "give a folder on a file system that all processes share"
        raise InputError(str(folder), Problem("", "not all processes find the same stopped run", hint))
