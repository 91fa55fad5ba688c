"""`compare`: the block-skip machine and the others on one network, at equal multipliers and at equal area."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from numpy.typing import NDArray

from hwsim.area import dense_at_equal_area, machine_area
from hwsim.comparison.bitmap import UNITS_PER_CLUSTER, BitmapArray, bitmap_array, run_bitmap
from hwsim.comparison.blocks import dense_array, dense_layer, kept_weights, run_blocks
from hwsim.comparison.channels import prune_channels
from hwsim.comparison.cost import MachineCost, largest
from hwsim.comparison.patterns import Pattern
from hwsim.comparison.structured import StructuredArray, run_structured, stored_share, structured_array
from hwsim.comparison.systolic import Dataflow, SystolicArray, best_array, run_systolic
from hwsim.comparison.table import Comparison
from hwsim.errors import FitError, InputError, Problem, nearest_name
from hwsim.layer import DENSE, Layer, LayerShape
from hwsim.machine import Machine, load_machine
from hwsim.simulator import check_layers
from hwsim.technology import Technology, load_technology

__all__ = ["BASELINES", "SIZINGS", "compare"]

Sizing = Literal["equal multipliers", "equal area"]
SIZINGS: tuple[Sizing, ...] = ("equal multipliers", "equal area")
CHUNKS = (128, 64, 32)
"""Chunks that the designer of the bitmap array may choose from; the first is SparTen's."""


@dataclass(frozen=True, eq=False)
class _Case:
    """What every machine is given: the work in its several patterns, and the machine to be equal to."""

    machine: Machine
    technology: Technology
    layers: list[Layer]
    shapes: list[LayerShape]
    fewer_channels: list[LayerShape]
    patterns: list[Pattern]
    is_pruned: list[bool]

    @property
    def multipliers(self) -> int:
        array = self.machine.array
        return array.rows * array.columns * array.multipliers

    @property
    def area_mm2(self) -> float:
        return sum(machine_area(self.machine, self.technology).values())

    @property
    def kept_share(self) -> float:
        return sum(map(kept_weights, self.layers)) / sum(shape.weight_count for shape in self.shapes)


def compare(
    machine: Machine | str,
    layers: Sequence[Layer],
    *,
    network: str = "network",
    baselines: Sequence[str] | None = None,
    weights: Mapping[str, NDArray] | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """The cost of a compressed network on its machine, and of the same network on others with the pattern each needs.

    Every machine keeps as many weights as the blocks do, or states what it keeps; accuracy is not compared. See
    docs/comparison.md for what each machine is and is granted.

    Parameters
    ----------
    machine : Machine or str
        The block-skip machine: a machine, the name of a preset, or the path of a machine file.
    layers : sequence of Layer
        The compressed network, in execution order. A layer whose blocks are all DENSE stays dense on every machine.
    network : str
        Named in the result.
    baselines : sequence of str or None
        Names from `BASELINES`; all by default.
    weights : mapping of str to array ``[groups, m, k]`` or None
        Dense weights by the layer's name, of every layer: single weights are pruned by magnitude. Without, at random.
    seed : int
        Of the random patterns.
    progress : callable or None
        Told before each machine: what is computed, how many are done, of how many.

    Returns
    -------
    Comparison

    Raises
    ------
    InputError
        No layers, an unknown baseline, or weights that do not belong to the layers.
    FitError
        A layer does not fit ``machine``. (A baseline that cannot run the network is left out, with a warning.)

    Examples
    --------
    >>> import numpy as np
    >>> from hwsim.layer import random_types
    >>> shape = LayerShape("fc", "linear", in_channels=800, out_channels=500)
    >>> types = random_types(shape, (4, 4), 0.5, 0.5, np.random.default_rng(0))
    >>> found = compare("msa-16x16", [Layer(shape, (4, 4), types)], baselines=["2:4"])
    >>> found.machines["kept_share"].tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    if isinstance(machine, str):
        machine = load_machine(machine)
    names = _checked_names(baselines)
    check_layers(layers, "compare")
    case = _case(machine, list(layers), weights, seed)
    ours = run_blocks(machine, layers, case.technology)
    rows: list[tuple[str, str, str, MachineCost]] = []
    warnings = []
    for index, sizing in enumerate(SIZINGS):
        rows.append((sizing, "block-skip", "blocks", ours))
        for done, name in enumerate(names, index * len(names)):
            baseline = BASELINES[name]
            if progress is not None:
                progress(f"{name} at {sizing}", done, len(SIZINGS) * len(names))
            try:
                cost = baseline.run(case, sizing)
            except FitError as error:
                warnings.append(f"{name} at {sizing} cannot run this network: {error}")
                continue
            except InputError as error:
                # such as memories so small that they hold less than one of its blocks
                warnings.append(f"{name} at {sizing} cannot be built beside {machine.name}: {error}")
                continue
            if cost is None:
                warnings.append(f"{name} at {sizing}: not even the smallest array has room")
                continue
            rows.append((sizing, name, baseline.pattern, cost))
    return Comparison.build(
        network=network,
        machine=machine,
        rows=rows,
        patterns="magnitude" if weights is not None else "random",
        seed=seed,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _checked_names(baselines: Sequence[str] | None) -> list[str]:
    if baselines is None:
        return list(BASELINES)
    problems = [
        Problem("baseline", f'"{name}" is not one of the machines', nearest_name(name, BASELINES))
        for name in baselines
        if name not in BASELINES
    ]
    if problems:
        raise InputError("compare", problems)
    return list(dict.fromkeys(baselines))


def _case(machine: Machine, layers: list[Layer], weights: Mapping[str, NDArray] | None, seed: int) -> _Case:
    if weights is not None:
        problems = [
            Problem(layer.name, "has no dense weights", "give those of every layer, or none")
            for layer in layers
            if layer.name not in weights
        ]
        if problems:
            raise InputError("weights", problems)
    shapes = [layer.shape for layer in layers]
    kept = [kept_weights(layer) for layer in layers]
    return _Case(
        machine=machine,
        technology=load_technology(machine.technology.table),
        layers=layers,
        shapes=shapes,
        fewer_channels=prune_channels(shapes, sum(kept)),
        patterns=[
            Pattern(shape, count, None if weights is None else weights[shape.name], (seed, index))
            for index, (shape, count) in enumerate(zip(shapes, kept, strict=True))
        ],
        is_pruned=[bool((layer.types != DENSE).any()) for layer in layers],
    )


def _fits(build: Callable[[int], float], budget_mm2: float, size: int) -> bool:
    try:
        return build(size) <= budget_mm2
    except InputError:  # beyond what a machine description holds
        return False


def _dense(case: _Case, sizing: Sizing, *, has_fewer_channels: bool) -> MachineCost:
    if sizing == "equal area":
        machine = dense_at_equal_area(case.machine, case.technology)
    else:
        machine = dense_array(case.machine, case.technology, case.machine.array.rows)
    shapes = case.fewer_channels if has_fewer_channels else case.shapes
    layers = [dense_layer(shape, machine.array.block) for shape in shapes]
    return run_blocks(machine, layers, case.technology)


def _systolic(
    case: _Case,
    sizing: Sizing,
    *,
    dataflow: Dataflow,
    is_overlapped: bool = True,
    has_fewer_channels: bool = False,
    is_structured: bool = False,
) -> MachineCost | None:
    machine, technology = case.machine, case.technology
    if is_structured:
        stored_bytes = int(machine.weights.dense_kib * 1024 * stored_share(machine))
        machine = machine.with_fields({"weights.dense_kib": stored_bytes / 1024})
    shapes = case.fewer_channels if has_fewer_channels else case.shapes
    array = best_array(
        SystolicArray(1, 1, dataflow, is_overlapped, is_structured=is_structured),
        shapes,
        machine,
        technology,
        multipliers=case.multipliers if sizing == "equal multipliers" else None,
        area_mm2=case.area_mm2,
        is_pruned=case.is_pruned,
    )
    return None if array is None else run_systolic(array, shapes, machine, technology, case.is_pruned)


def _structured(case: _Case, sizing: Sizing) -> MachineCost | None:
    def built(rows: int) -> StructuredArray:
        return structured_array(case.machine, case.technology, rows)

    rows = case.machine.array.rows
    if sizing == "equal area":
        rows = largest(
            partial(_fits, lambda size: built(size).area_mm2(case.technology), case.area_mm2), 4096
        )
    return run_structured(built(rows), case.shapes, case.is_pruned, case.technology) if rows else None


def _bitmap(case: _Case, sizing: Sizing) -> MachineCost | None:
    units = min(UNITS_PER_CLUSTER, case.multipliers)

    def built(clusters: int, chunk: int) -> BitmapArray:
        return bitmap_array(
            case.machine, case.technology, clusters, case.kept_share, units=units, chunk=chunk
        )

    def area_mm2(chunk: int, clusters: int) -> float:
        return built(clusters, chunk).area_mm2(case.technology)

    found = []
    for chunk in CHUNKS:
        clusters = case.multipliers // units
        if sizing == "equal area":
            clusters = largest(partial(_fits, partial(area_mm2, chunk), case.area_mm2), 4096)
        if clusters:
            found.append(run_bitmap(built(clusters, chunk), case.patterns, case.technology))
    return min(found, key=lambda cost: cost.latency_cycles, default=None)


@dataclass(frozen=True)
class _Baseline:
    """A machine of the comparison: its weights' pattern, and how to run a case on it at a size."""

    pattern: str
    run: Callable[[_Case, Sizing], MachineCost | None]


BASELINES: dict[str, _Baseline] = {
    "dense": _Baseline("none", partial(_dense, has_fewer_channels=False)),
    "ws": _Baseline("none", partial(_systolic, dataflow="weight_stationary", is_overlapped=False)),
    "ws-overlap": _Baseline("none", partial(_systolic, dataflow="weight_stationary")),
    "os": _Baseline("none", partial(_systolic, dataflow="output_stationary", is_overlapped=False)),
    "os-overlap": _Baseline("none", partial(_systolic, dataflow="output_stationary")),
    "2:4": _Baseline("2 of 4", _structured),
    "2:4-ws": _Baseline("2 of 4", partial(_systolic, dataflow="weight_stationary", is_structured=True)),
    "channels": _Baseline("channels", partial(_dense, has_fewer_channels=True)),
    "channels-ws": _Baseline(
        "channels", partial(_systolic, dataflow="weight_stationary", has_fewer_channels=True)
    ),
    "bitmap": _Baseline("elements", _bitmap),
}
"""The machines that the block-skip machine is compared with, by name."""
