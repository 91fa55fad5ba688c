"""Points by the thousand: a space numbered in the order in which it is cheapest to evaluate, and whole batches of it at once.

The user's axes come in any order. Here those that change the weights come first, then those that change the passes, and the
clock and the DRAM last, so that consecutive numbers share what `hwsim.evaluate.Evaluator` keeps. A batch becomes columns of an
Arrow table, never one object per point.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hwsim.errors import InputError
from hwsim.machine import Machine
from sweeps.space import Point, Space, technology_digest

if TYPE_CHECKING:
    from hwsim.evaluate import Evaluator, Results
    from hwsim.layer import Layer

__all__ = ["Grid", "area_mm2", "evaluate_batch"]

RATES = ("clock_mhz", "dram.gb_per_s", "dram.burst_bytes", "dram.pj_per_bit")
"""Machine fields that a batch varies without another machine."""

_BUFFERS = (
    "activation_buffer.size_kib",
    "operand_store.fill_words_per_cycle",
    "output.size_kib",
    "output.words_per_cycle",
    "technology.table",
    "weights.dense_kib",
    "weights.magnitude_kib",
    "weights.sign_kib",
    "weights.type_kib",
)


class Grid:
    """The points of a space, numbered from 0.

    Parameters
    ----------
    space : Space

    Examples
    --------
    >>> space = Space(
    ...     networks=["lenet5"], blocks=["4x4", "8x1"], ratios=[[0.5, 0.5]], random={},
    ...     machine={"base": "msa-16x16", "axes": {"dram.gb_per_s": [6.4, 12.8], "front_end.queue_depth": [2, 4, 8]}},
    ... )
    >>> grid = Grid(space)
    >>> len(grid), grid.names[-2:], grid.group_size, grid.machine_size
    (12, ('front_end.queue_depth', 'dram.gb_per_s'), 6, 2)
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        axes: dict[str, tuple[Any, ...]] = {
            "network": space.networks,
            "seed": space.seeds,
            "block": tuple(tuple(map(int, text.split("x"))) for text in space.blocks),
            "ratios": space.ratios,
            "hold": space.hold,
        }
        axes |= space.machine.axes
        ranked = sorted(axes, key=_rank)  # stable: within a rank the user's order
        self.names = tuple(ranked)
        self.values = tuple(axes[name] for name in ranked)
        self.shape = tuple(len(values) for values in self.values)

    def __len__(self) -> int:
        return math.prod(self.shape)

    @property
    def group_size(self) -> int:
        """So many consecutive points share their weights."""
        return self._size(lambda name: _rank(name) > 0)

    @property
    def machine_size(self) -> int:
        """So many consecutive points differ in clock and DRAM only."""
        return self._size(lambda name: name in RATES)

    @property
    def varies_passes(self) -> bool:
        """Whether machines differ in what the counters of the passes depend on."""
        return any(
            _rank(name) == 1 and len(values) > 1 for name, values in zip(self.names, self.values, strict=True)
        )

    def _size(self, counts: Callable[[str], bool]) -> int:
        return math.prod(
            len(values) for name, values in zip(self.names, self.values, strict=True) if counts(name)
        )

    def codes(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """``int64[points, axes]``: which value of each axis a point has."""
        return np.stack(np.unravel_index(numbers, self.shape), axis=1).astype(np.int64)

    def point(self, number: int) -> Point:
        """One point as an object."""
        chosen = {
            name: values[code]
            for name, values, code in zip(
                self.names, self.values, np.unravel_index(number, self.shape), strict=True
            )
        }
        pruned, unified = chosen["ratios"]
        return Point(
            network=chosen["network"],
            block=chosen["block"],
            pruned=pruned,
            unified=unified,
            hold=chosen["hold"],
            seed=chosen["seed"],
            base=self.space.machine.base,
            fields=tuple((name, chosen[name]) for name in self.space.machine.axes),
            weights=self.space.weights,
            batch=self.space.batch,
        )

    def keys(self, codes: NDArray[np.int64]) -> list[str]:
        """The key of every point, as `Point.key` gives it."""
        pieces, slots = self._template
        columns: list[Iterator[str] | list[str]] = []
        fixed = pieces[0]
        for (axis, texts), piece in zip(slots, pieces[1:], strict=True):
            column = codes[:, axis]
            if (column == column[0]).all():
                fixed += texts[column[0]] + piece
            else:
                columns += [itertools.repeat(fixed), [texts[code] for code in column.tolist()]]
                fixed = piece
        if not columns:
            return [hashlib.sha256(fixed.encode()).hexdigest()] * len(codes)
        columns.append(itertools.repeat(fixed))
        sha256, join = hashlib.sha256, "".join
        # Not strict: all but the texts of the varied axes go on forever.
        return [sha256(join(parts).encode()).hexdigest() for parts in zip(*columns)]  # noqa: B905

    @cached_property
    def _template(self) -> tuple[list[str], list[tuple[int, list[str]]]]:
        """The canonical text that a key is the digest of: pieces, and between them the axis and its texts by value."""
        resolved = self.point(0).resolved()
        # A mark that cannot be part of the text, since it is made of its digest.
        mark = hashlib.sha256(_canonical(resolved).encode()).hexdigest()
        texts: list[tuple[int, list[str]]] = []
        for axis, (name, values) in enumerate(zip(self.names, self.values, strict=True)):
            for path, part in _slots(name):
                place: Any = resolved
                for step in path[:-1]:
                    place = place[step]
                place[path[-1]] = f"{mark}-{len(texts)}"
                texts.append((axis, [_canonical(part(value)) for value in values]))
        pieces = re.split(f'"{mark}-([0-9]+)"', _canonical(resolved))
        return pieces[::2], [texts[int(index)] for index in pieces[1::2]]


def _rank(name: str) -> int:
    if name in ("network", "seed", "block", "ratios") or name.startswith("precision."):
        return 0  # another training, or other random maps
    if name in RATES:
        return 3
    return 2 if name in _BUFFERS else 1


def _slots(name: str) -> list[tuple[tuple[str, ...], Callable[[Any], Any]]]:
    """Where the value of an axis stands in `Point.resolved`, and what of it."""
    if name == "ratios":
        return [(("pruned",), lambda ratios: ratios[0]), (("unified",), lambda ratios: ratios[1])]
    if name in ("network", "seed", "block", "hold"):
        return [((name,), lambda value: value)]
    path = tuple(name.split("."))
    places: list[tuple[tuple[str, ...], Callable[[Any], Any]]] = [(("machine", *path), lambda value: value)]
    if path[0] == "precision":
        places.append((path, lambda value: value))
    if name == "technology.table":
        places.append((("technology_sha256",), technology_digest))
    return places


def _canonical(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def evaluate_batch(
    grid: Grid,
    numbers: NDArray[np.int64],
    layers: Sequence[Layer],
    evaluator: Evaluator,
    measured: dict[str, Any] | None = None,
) -> pa.Table:
    """The rows of the ``points`` table of some points with the same weights.

    Parameters
    ----------
    grid : Grid
    numbers : int64 array ``[points]``
        Of one group (`Grid.group_size`), ascending for speed.
    layers : sequence of Layer
        Of these weights.
    evaluator : Evaluator
    measured : dict, optional
        Further columns that all of these points share (accuracies).

    Returns
    -------
    pyarrow.Table
        One row per point, in the order of ``numbers``. A point that does not fit its machine has its reason in ``error``.
    """
    from hwsim.evaluate import Rates

    codes = grid.codes(numbers)
    first = grid.point(int(numbers[0]))
    machines, machine_of, errors = _machines(grid, numbers, codes)
    columns = _point_columns(grid, codes, first)
    columns["key"] = pa.array(grid.keys(codes), pa.string())
    for name, value in (measured or {}).items():
        columns[name] = (
            pa.repeat(pa.scalar(value), len(numbers)) if value is not None else pa.nulls(len(numbers))
        )
    problems = np.array(errors, object)[machine_of]
    valid = np.flatnonzero(_empty(problems))
    if len(valid):
        used, which = np.unique(machine_of[valid], return_inverse=True)
        base = first.base
        own = (base.clock_mhz, base.dram.gb_per_s, base.dram.burst_bytes, base.dram.pj_per_bit)
        rates = Rates(
            *(_rate(grid, codes[valid], name, value) for name, value in zip(RATES, own, strict=True))
        )
        results = evaluator.evaluate(layers, [machines[index] for index in used], which, rates)
        problems[valid] = results.error
        columns = _figures(results, valid, problems) | columns  # an axis stays where there is no figure
    columns["error"] = pa.array(problems, pa.string())
    return pa.table(columns)


def _empty(texts: NDArray[np.object_]) -> NDArray[np.bool_]:
    return np.array([text is None for text in texts.tolist()], bool)


def _machines(
    grid: Grid, numbers: NDArray[np.int64], codes: NDArray[np.int64]
) -> tuple[list[Machine], NDArray[np.int64], list[str | None]]:
    """The machines of the points, clock and DRAM aside, and why those that there cannot be are not valid."""
    kept = [axis for axis, name in enumerate(grid.names) if name not in RATES and _rank(name) > 0]
    sizes = [grid.shape[axis] for axis in kept]
    combined = np.zeros(len(codes), np.int64)
    for axis, size in zip(kept, sizes, strict=True):
        combined = combined * size + codes[:, axis]
    _, example, machine_of = np.unique(combined, return_index=True, return_inverse=True)
    machines: list[Machine] = []
    errors: list[str | None] = []
    for number in numbers[example].tolist():
        point = grid.point(number)
        fields = {name: value for name, value in point.fields if name not in RATES}
        try:
            machine = point.machine(area_mm2, fields)
        except InputError as error:
            errors.append(str(error))
            machines.append(point.base)
        else:
            errors.append(None)
            machines.append(machine)
    return machines, machine_of, errors


def area_mm2(machine: Machine) -> float:
    """Area of a machine in its technology."""
    from hwsim.area import machine_area
    from hwsim.technology import load_technology, remembered

    return sum(machine_area(machine, remembered(load_technology(machine.technology.table))).values())


def _rate(grid: Grid, codes: NDArray[np.int64], name: str, own: float) -> NDArray[Any]:
    if name not in grid.names:
        return np.full(len(codes), own)
    axis = grid.names.index(name)
    return np.array(grid.values[axis])[codes[:, axis]]


def _point_columns(grid: Grid, codes: NDArray[np.int64], first: Point) -> dict[str, pa.Array]:
    """What identifies the points; `Point.columns` by the thousand."""
    same = first.columns()
    columns = {name: pa.repeat(pa.scalar(value), len(codes)) for name, value in same.items()}
    for name in ("hold", *grid.space.machine.axes):
        axis = grid.names.index(name)
        taken = pa.DictionaryArray.from_arrays(codes[:, axis], pa.array(grid.values[axis]))
        columns[name] = taken.cast(taken.type.value_type)
    return columns


SUMMARY_COLUMNS = (
    "latency_cycles",
    "latency_ms",
    "compute_cycles",
    "speedup_compute_only",
    "speedup_with_memory",
    "speedup_equal_area",
    "energy_pj",
    "dense_energy_pj",
    "dram_bytes",
    "average_bandwidth_gb_per_s",
    "peak_bandwidth_gb_per_s",
    "peak_demand_gb_per_s",
    "area_mm2",
    "image_bytes",
    "fp32_bytes",
    "int8_bytes",
    "bits_per_weight",
    "compression_vs_fp32",
    "weight_count",
    "macs",
    "peak_gmac_per_s",
    "machine_rows",
    "machine_columns",
    "clock_mhz",
    "dram_gb_per_s",
)


def _figures(
    results: Results, valid: NDArray[np.int64], problems: NDArray[np.object_]
) -> dict[str, pa.Array]:
    """The columns of a batch; null where a point has an error, and where a baseline does not fit."""
    there = _empty(problems[valid])
    figures = results.columns
    with np.errstate(divide="ignore", invalid="ignore"):
        figures = figures | {"compression_vs_fp32": figures["fp32_bytes"] / figures["image_bytes"]}
    place = None if there.all() and len(valid) == len(problems) else _places(valid, there, len(problems))
    columns = {}
    for name in SUMMARY_COLUMNS:
        array = pa.array(figures[name], from_pandas=True)  # NaN becomes null
        columns[name] = array if place is None else array.take(place)
    warnings = pa.array(results.warnings, pa.string())
    columns["warnings"] = warnings if place is None else warnings.take(place)
    return columns


def _places(valid: NDArray[np.int64], there: NDArray[np.bool_], points: int) -> pa.Array:
    """For each point its place among the results, null where it has none."""
    places = np.zeros(points, np.int64)
    empty = np.ones(points, bool)
    places[valid[there]] = np.flatnonzero(there)
    empty[valid[there]] = False
    return pa.array(places, mask=empty)
