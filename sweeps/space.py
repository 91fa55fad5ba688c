"""Design spaces: which networks, block shapes, ratios and machines to evaluate, and the key of every point.

A space is written in TOML (`load_space`) or in Python (`Space`). It is the product of its axes, in a fixed
order; every `Point` of it resolves to plain data, and the hash of that data names its result.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from hwsim.errors import InputError, Problem, nearest_name
from hwsim.machine import Machine, load_machine, preset_names, validation_problems
from hwsim.version import MODEL_VERSION
from sweeps.axes import stored_axes, technology_digest, twice
from sweeps.block_machine import LARGEST_BLOCK, Hold, machine_for_block, row_problems

__all__ = [
    "METHOD_VERSION",
    "Hold",
    "MachineSpace",
    "Point",
    "RandomTypes",
    "Space",
    "Training",
    "load_space",
    "machine_for_block",
    "parse_space",
    "read_space_file",
    "technology_digest",
]

METHOD_VERSION = "2"
"""Raised whenever training or compression changes what it makes of the same inputs; part of every key."""

Exempt = Literal["first_and_last", "none"]
Images = Annotated[int, Field(strict=True, ge=1, le=10**9)]
Epochs = Annotated[int, Field(strict=True, ge=0, le=100_000)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]


def _not_empty(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("empty, at least one is needed")
    return values


def _plain_block(text: str) -> str:
    g_o, g_k = _parse_block(text)
    return f"{g_o}x{g_k}"


def _parse_block(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text, re.ASCII)
    sizes = tuple(int(size) for size in match.groups()) if match else ()
    if len(sizes) != 2 or not all(1 <= size <= LARGEST_BLOCK for size in sizes):
        raise ValueError(f'must be "OUTPUTSxREDUCTION", each 1 to {LARGEST_BLOCK}, for example "4x4"')
    return sizes[0], sizes[1]


def _shares_of_one_whole(ratios: tuple[float, float]) -> tuple[float, float]:
    pruned, unified = ratios
    if Decimal(str(pruned)) + Decimal(str(unified)) > 1:  # decimal, as the counts of blocks: 0.3 + 0.7 is 1
        raise ValueError("p + u exceeds 1; the rest, 1 − p − u, stays dense")
    return pruned + 0.0, unified + 0.0  # −0.0 would be another key than 0.0


Ratios = Annotated[
    tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]],
    AfterValidator(_shares_of_one_whole),
]


class _Part(BaseModel):
    """Immutable, and a field that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Training(_Part):
    """How the weights of a point come about: train, compress by ADMM, retrain.

    Attributes
    ----------
    dataset : str
    train_images, test_images : int or None
        How many of the data set's images are used; None for all.
    batch_size : int
    learning_rate : float
        Of Adam, in all three phases.
    dense_epochs, admm_epochs, retrain_epochs : int
    rho, rho_growth : float
        Weight of the ADMM penalty at the start, and its factor from one update to the next.
    projection : {"exact", "prune_first"}
    exempt : {"first_and_last", "none"}
        Layers that are left dense.
    """

    dataset: Annotated[str, Field(min_length=1)] = "fashion-mnist"
    train_images: Images | None = None
    test_images: Images | None = None
    batch_size: Images = 64
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-3
    dense_epochs: Epochs = 6
    admm_epochs: Epochs = 6
    retrain_epochs: Epochs = 4
    rho: Annotated[float, Field(gt=0, le=1e6)] = 3e-2
    rho_growth: Annotated[float, Field(ge=1, le=100)] = 1.3
    projection: Literal["exact", "prune_first"] = "exact"
    exempt: Exempt = "first_and_last"

    @property
    def dense_inputs(self) -> dict[str, Any]:
        """What the uncompressed network depends on: it is trained once for all settings that share this."""
        fields = {"dataset", "train_images", "batch_size", "learning_rate", "dense_epochs"}
        return self.model_dump(mode="json", include=fields)


class RandomTypes(_Part):
    """No training: block types are drawn with the exact counts of the ratios, from the point's seed."""

    exempt: Exempt = "first_and_last"


class MachineSpace(_Part):
    """The machine at the base of every point and the fields that vary.

    Attributes
    ----------
    base : Machine
        Given as the name of a preset, as the path of a machine file, or as a `hwsim.machine.Machine`.
    axes : dict
        Dotted field names and the values that they take: ``{"dram.gb_per_s": (6.4, 12.8)}``.
    """

    base: Machine
    axes: dict[str, tuple[Any, ...]] = {}

    @field_validator("base", mode="before")
    @classmethod
    def _load(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            try:
                return load_machine(value)
            except InputError as error:
                raise InputError(
                    "machine", [_of_base(item, error.source) for item in error.problems]
                ) from None
        return value

    @model_validator(mode="after")
    def _axes_are_fields(self) -> MachineSpace:
        problems: list[Problem] = []
        axes = stored_axes(self.base, self.axes, problems)
        if problems:
            raise InputError("machine", problems)
        object.__setattr__(self, "axes", axes)
        return self


class Space(_Part):
    """A design space: the product of its axes.

    Attributes
    ----------
    name : str
    networks : tuple of str
    blocks : tuple of str
        Block shapes ``g_o x g_k``: ``("4x4", "1x16")``.
    ratios : tuple of (float, float)
        ``[p, u]``: shares of the blocks that are pruned and unified; the rest stays dense.
    hold : tuple of {"lanes", "area"}
        How the machine follows the block shape (`machine_for_block`); one word or several.
    machine : MachineSpace
    seeds : tuple of int
    batch : int
        Inputs per simulated inference.
    training, random : Training or RandomTypes
        Exactly one of them: trained weights, or random block types without training.

    Raises
    ------
    InputError
        With every problem found.

    Examples
    --------
    >>> space = Space(
    ...     networks=["lenet-5"], blocks=["4x4", "8x1"], ratios=[[0.5, 0.5]], random={},
    ...     machine={"base": "msa-16x16", "axes": {"dram.gb_per_s": [6.4, 12.8]}},
    ... )
    >>> len(space)
    4
    >>> [(point.block, point.fields) for point in space.points()][1]
    ((4, 4), (('dram.gb_per_s', 12.8),))
    """

    name: Annotated[str, Field(min_length=1, max_length=200)] = "sweep"
    networks: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], AfterValidator(_not_empty)]
    blocks: Annotated[tuple[Annotated[str, AfterValidator(_plain_block)], ...], AfterValidator(_not_empty)]
    ratios: Annotated[tuple[Ratios, ...], AfterValidator(_not_empty)]
    hold: Annotated[tuple[Hold, ...], AfterValidator(_not_empty)] = ("lanes",)
    machine: MachineSpace = Field(default_factory=lambda: MachineSpace(base=load_machine("msa-16x16")))
    seeds: Annotated[tuple[Seed, ...], AfterValidator(_not_empty)] = (0,)
    batch: Annotated[int, Field(strict=True, ge=1, le=2**20)] = 1
    training: Training | None = None
    random: RandomTypes | None = None

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            # What pydantic checks last it has not looked at if a single field is wrong: every problem at once.
            later = (*_together_problems(data), *_machine_problems(data))
            problems = dict.fromkeys([*validation_problems(error, Space), *later])
            raise InputError(f"space {data.get('name', 'sweep')}", list(problems)) from None

    @field_validator("hold", mode="before")
    @classmethod
    def _one_word_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Space:
        problems = _together_problems(dict(self))
        problems += _blocks_problems(self.machine.base, self.machine.axes, self.blocks)
        if problems:
            raise InputError("space", problems)
        return self

    @property
    def weights(self) -> Training | RandomTypes:
        """Where the weights come from."""
        weights = self.training or self.random
        assert weights is not None  # the validator has seen to it; this tells the type checker
        return weights

    def __len__(self) -> int:
        axes = (self.networks, self.seeds, self.blocks, self.ratios, self.hold, *self.machine.axes.values())
        return math.prod(len(values) for values in axes)

    def points(self) -> Iterator[Point]:
        """Every point once. Machine fields vary fastest: points with the same weights follow each other."""
        names = tuple(self.machine.axes)
        outer = itertools.product(self.networks, self.seeds, self.blocks, self.ratios, self.hold)
        for network, seed, block, (pruned, unified), hold in outer:
            for values in itertools.product(*self.machine.axes.values()):
                fields = tuple(zip(names, values, strict=True))
                yield Point(
                    network=network,
                    block=_parse_block(block),
                    pruned=pruned,
                    unified=unified,
                    hold=hold,
                    seed=seed,
                    base=self.machine.base,
                    fields=fields,
                    weights=self.weights,
                    batch=self.batch,
                )

    def resolved(self) -> dict[str, Any]:
        """The whole space as plain data, defaults and the base machine included: what a manifest records."""
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class Point:
    """One configuration of a space.

    Attributes
    ----------
    network : str
    block : tuple of int
        ``(g_o, g_k)``.
    pruned, unified : float
    hold : {"lanes", "area"}
    seed : int
    base : Machine
        The machine before ``fields`` and before it follows the block shape.
    fields : tuple of (str, value)
        Dotted machine fields that differ from ``base`` along the space's axes.
    weights : Training or RandomTypes
    batch : int
    """

    network: str
    block: tuple[int, int]
    pruned: float
    unified: float
    hold: Hold
    seed: int
    base: Machine
    fields: tuple[tuple[str, Any], ...]
    weights: Training | RandomTypes
    batch: int

    def machine(
        self, area_mm2: Callable[[Machine], float], fields: Mapping[str, Any] | None = None
    ) -> Machine:
        """The machine of this point: the base with its fields (or with others in their place), following the block shape.

        Raises
        ------
        InputError
            The combination is not a valid machine.
        """
        changed = self.base.with_fields(dict(self.fields if fields is None else fields))
        return machine_for_block(changed, self.block, self.hold, area_mm2)

    def resolved(self) -> dict[str, Any]:
        """Everything that the result depends on, as plain JSON-able data."""
        machine = self._machine_fields()
        return {
            **self._weight_inputs(machine["precision"]),
            "hold": self.hold,
            "batch": self.batch,
            "machine": machine,
            "technology_sha256": technology_digest(machine["technology"]["table"]),
            "model_version": MODEL_VERSION,
        }

    @cached_property
    def key(self) -> str:
        """The name of the point's result: SHA-256 (hex) of all that it depends on, versions included."""
        return _digest(self.resolved())

    @cached_property
    def training_key(self) -> str:
        """The same for all points with the same weights: points that differ in the machine only share it."""
        return _digest(self._weight_inputs(self._machine_fields()["precision"]))

    @cached_property
    def dense_key(self) -> str:
        """The same for every point that starts from the same uncompressed network."""
        dense = self.weights.dense_inputs if isinstance(self.weights, Training) else {}
        inputs = {
            "network": self.network,
            "seed": self.seed,
            "dense": dense,
            "method_version": METHOD_VERSION,
        }
        return _digest(inputs)

    @property
    def precision(self) -> dict[str, int]:
        """The machine's number formats, which training and calibration depend on."""
        return dict(self._machine_fields()["precision"])

    def columns(self) -> dict[str, Any]:
        """What identifies the point in the ``points`` table, the varied machine fields included."""
        return {
            "key": self.key,
            "network": self.network,
            "block": "x".join(str(size) for size in self.block),
            "block_rows": self.block[0],
            "block_columns": self.block[1],
            "pruned": self.pruned,
            "unified": self.unified,
            "hold": self.hold,
            "machine": self.base.name,
            "seed": self.seed,
            "batch": self.batch,
            "training_key": self.training_key,
            "training_settings": self._settings_name(),
            "model_version": MODEL_VERSION,
            **dict(self.fields),
        }

    def _settings_name(self) -> str:
        """Tells points of different training settings apart in a table; the manifest has the settings."""
        settings = self.weights.model_dump(mode="json")
        return f"{type(self.weights).__name__.lower()}-{_digest(settings)[:8]}"

    def _machine_fields(self) -> dict[str, Any]:
        data = self.base.model_dump(mode="json")
        for dotted, value in self.fields:
            *parents, leaf = dotted.split(".")
            part = data[parents[0]] if parents else data
            part[leaf] = value
        return data

    def _weight_inputs(self, precision: Mapping[str, int]) -> dict[str, Any]:
        # The machine's number formats belong here: quantisation is in the training loop.
        kind = "training" if isinstance(self.weights, Training) else "random"
        return {
            "network": self.network,
            "block": list(self.block),
            "pruned": self.pruned,
            "unified": self.unified,
            "seed": self.seed,
            kind: self.weights.model_dump(mode="json"),
            "precision": dict(precision),
            "method_version": METHOD_VERSION,
        }


def parse_space(
    data: dict[str, Any],
    source: str,
    *,
    networks: Iterable[str] | None = None,
    datasets: Iterable[str] | None = None,
) -> Space:
    """A space from the content of a space file.

    Parameters
    ----------
    data : dict
        What the TOML file holds.
    source : str
        Named in messages.
    networks, datasets : iterable of str, optional
        The names that exist; with them, unknown names are reported beside all other problems.

    Raises
    ------
    InputError
        With every problem found.
    """
    problems: list[Problem] = []
    space = None
    try:
        space = Space(**data)
    except InputError as error:
        problems += error.problems
    if networks is not None:
        found = data.get("networks")
        problems += _unknown("networks", found if isinstance(found, list | tuple) else [], networks)
    training = data.get("training")
    if datasets is not None and isinstance(training, dict) and "dataset" in training:
        problems += _unknown("training.dataset", [training["dataset"]], datasets)
    if problems or space is None:
        raise InputError(source, problems)
    return space


def load_space(
    path: str | Path, *, networks: Iterable[str] | None = None, datasets: Iterable[str] | None = None
) -> Space:
    """A space from a TOML file; the path of a machine file in it counts from the file's own folder.

    Raises
    ------
    InputError
        The file cannot be read, is not TOML, or is not a valid space.
    """
    return parse_space(read_space_file(path), str(path), networks=networks, datasets=datasets)


def read_space_file(path: str | Path) -> dict[str, Any]:
    """The data of a TOML file; the path of a machine file in it counts from the file's own folder.

    Raises
    ------
    InputError
        The file cannot be read, or is not TOML.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise InputError(str(path), f"not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    machine = data.get("machine")
    base = machine.get("base") if isinstance(machine, dict) else None
    if isinstance(machine, dict) and isinstance(base, str) and base not in preset_names():
        machine["base"] = str(path.parent / base)
    return data


def _together_problems(data: Mapping[str, Any]) -> list[Problem]:
    """What single fields of a space cannot show, of what a file or a program gives and of what is made of it alike."""
    problems = []
    for field in ("networks", "blocks", "ratios", "hold", "seeds"):
        values = data.get(field)
        problems += twice(field, values if isinstance(values, list | tuple) else ())
    given = [data.get(field) is not None for field in ("training", "random")]
    if given[0] == given[1]:
        found = "both are given" if given[0] else "neither is given"
        hint = "[training] trains and compresses; [random] draws block types without training"
        problems.append(Problem("training, random", f"{found}, must be exactly one", hint))
    return problems


def _of_base(problem: Problem, source: str) -> Problem:
    """A problem of the machine file, told as one of the space that names the file."""
    where = f"{source}: {problem.field}" if problem.field else source
    return Problem("machine.base", f"{where}: {problem.message}", problem.hint)


def _machine_problems(data: Mapping[str, Any]) -> list[Problem]:
    """What machine and blocks of a space cannot show where some other field is wrong; the base machine may be wrong itself."""
    given = data.get("machine", {})
    if isinstance(given, MachineSpace):
        base, axes = given.base, given.axes
    elif isinstance(given, Mapping):
        base, axes = given.get("base", "msa-16x16"), given.get("axes", {})
    else:
        return []
    problems: list[Problem] = []
    machine = _machine_of(base)
    lists = {}
    if isinstance(axes, Mapping):
        lists = {name: tuple(values) for name, values in axes.items() if isinstance(values, list | tuple)}
    lists = stored_axes(machine, lists, problems)
    blocks = data.get("blocks")
    if machine is not None and isinstance(blocks, list | tuple):
        problems += _blocks_problems(machine, lists, blocks)
    return problems


def _machine_of(base: Any) -> Machine | None:
    """The base machine that a space gives, None where it is not a valid one."""
    try:
        return MachineSpace(base=base).base
    except (ValidationError, InputError):
        return None


def _blocks_problems(
    base: Machine, axes: Mapping[str, tuple[Any, ...]], blocks: Iterable[Any]
) -> list[Problem]:
    """Block shapes that the accumulators of the machines do not divide by."""
    problems = []
    for rows in axes.get("array.rows", (base.array.rows,)):
        for text in blocks:
            try:
                g_o, _ = _parse_block(text)
            except (TypeError, ValueError):  # told where blocks are checked one by one
                continue
            problems += row_problems(rows * base.array.block[0], g_o, f"blocks: {text}")
    return problems


def _unknown(field: str, found: Iterable[Any], allowed: Iterable[str]) -> list[Problem]:
    names = list(allowed)
    missing = [str(name) for name in found if name not in names]
    return [Problem(field, f'unknown name "{name}"', nearest_name(name, names)) for name in missing]


def _digest(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
