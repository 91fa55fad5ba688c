"""Batches of a space: every point once, with the key and the figures that it has by itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwsim.errors import FitError, InputError
from hwsim.evaluate import Evaluator
from hwsim.layer import random_layers
from hwsim.simulator import simulate
from sweeps.batch import RATES, SUMMARY_COLUMNS, Grid, area_mm2, evaluate_batch
from sweeps.space import Point, Space

AXES: dict[str, list[object]] = {
    "clock_mhz": [500.0, 1000.0],
    "dram.gb_per_s": [6, 12.8],
    "dram.pj_per_bit": [0.0, 12.0],
    "dram.burst_bytes": [32, 64],
    "technology.table": ["45nm-horowitz", "22nm-aladdin"],
    "output.size_kib": [0.125, 64],
    "precision.weight_bits": [4, 8],
    "front_end.queue_depth": [1, 4],
    "features.row_balance": ["none", "sorted"],
    "array.columns": [8, 16],
}


def space_of(axes: dict[str, list[object]], **changes: object) -> Space:
    content: dict[str, object] = {
        "networks": ["lenet5"],
        "blocks": ["4x4", "2x8"],
        "ratios": [[0.5, 0.5], [0.25, 0.5]],
        "hold": ["lanes", "area"],
        "seeds": [0, 3],
        "machine": {"base": "msa-16x16", "axes": axes},
        "random": {},
    }
    return Space(**{**content, **changes})


def spaces() -> st.SearchStrategy[Space]:
    names = st.lists(st.sampled_from(sorted(AXES)), max_size=4, unique=True)
    return names.map(lambda chosen: space_of({name: AXES[name] for name in chosen}))


@settings(deadline=None, max_examples=25)
@given(spaces())
def test_a_grid_has_every_point_of_the_space_once(space: Space) -> None:
    grid = Grid(space)
    numbers = np.arange(len(grid))
    keys = grid.keys(grid.codes(numbers))
    assert sorted(keys) == sorted(point.key for point in space.points())
    for number in numbers[:: max(len(grid) // 5, 1)].tolist():
        assert grid.point(number).key == keys[number]


@settings(deadline=None, max_examples=25)
@given(spaces())
def test_consecutive_points_share_what_is_slow_to_compute(space: Space) -> None:
    grid = Grid(space)
    points = [grid.point(number) for number in range(len(grid))]
    for start in range(0, len(grid), grid.group_size):
        assert len({point.training_key for point in points[start : start + grid.group_size]}) == 1
    assert len({point.training_key for point in points}) == len(grid) // grid.group_size
    for start in range(0, len(grid), grid.machine_size):
        same = points[start : start + grid.machine_size]
        fields = [[field for field in point.fields if field[0] not in RATES] for point in same]
        assert all(found == fields[0] for found in fields)
        assert len({(point.block, point.hold) for point in same}) == 1


def row_of(point: Point) -> dict[str, object]:
    """A point by itself, by way of `simulate`."""
    from compress.zoo_shapes import zoo_shapes

    layers = random_layers(zoo_shapes(point.network), point.block, point.pruned, point.unified, point.seed)
    row: dict[str, object] = point.columns() | {"error": None}
    try:
        report = simulate(point.machine(area_mm2), layers)
    except (InputError, FitError) as error:
        return row | {"error": str(error)}
    summary = report.summary | {
        "compression_vs_fp32": report.summary["fp32_bytes"] / report.summary["image_bytes"],
        "machine_rows": report.machine.array.rows,
        "machine_columns": report.machine.array.columns,
        "clock_mhz": report.machine.clock_mhz,
        "dram_gb_per_s": report.machine.dram.gb_per_s,
        "warnings": "; ".join(report.warnings) or None,
    }
    return row | {name: summary[name] for name in (*SUMMARY_COLUMNS, "warnings")}


EVALUATOR = Evaluator()


@settings(deadline=None, max_examples=10)
@given(spaces(), st.integers(0, 2**32 - 1))
def test_a_batch_equals_its_points_one_by_one(space: Space, seed: int) -> None:
    from compress.zoo_shapes import zoo_shapes

    grid = Grid(space)
    rng = np.random.default_rng(seed)
    start = int(rng.integers(len(grid) // grid.group_size)) * grid.group_size
    numbers = start + rng.permutation(grid.group_size)[:5]
    first = grid.point(int(numbers[0]))
    layers = random_layers(zoo_shapes("lenet5"), first.block, first.pruned, first.unified, first.seed)
    table = evaluate_batch(grid, numbers, layers, EVALUATOR)
    for number, row in zip(numbers.tolist(), table.to_pylist(), strict=True):
        expected = row_of(grid.point(number))
        assert {name: row[name] for name in expected} == expected  # to the last bit
        assert all(row[name] is None for name in row.keys() - expected.keys())


def test_points_that_do_not_fit_stand_between_those_that_do() -> None:
    from compress.zoo_shapes import zoo_shapes

    axes: dict[str, list[object]] = {
        "output.size_kib": [0.125, 64],
        "array.columns": [16, 64],
        "operand_store.size_kib": [0.25, 160],
    }
    grid = Grid(space_of(axes, blocks=["4x4"], ratios=[[0.5, 0.5]], hold="lanes", seeds=[0]))
    layers = random_layers(zoo_shapes("lenet5"), (4, 4), 0.5, 0.5, 0)
    rows = evaluate_batch(grid, np.arange(8), layers, Evaluator()).to_pylist()
    assert [row["error"] is None for row in rows] == [row["latency_cycles"] is not None for row in rows]
    errors = [row["error"] or "" for row in rows]
    assert sum("no pass can be fed" in error for error in errors) == 2, "not a machine"
    assert sum("does not fit machine" in error for error in errors) == 3, "a machine, but too small"
    assert errors.count("") == 3
    for number, row in enumerate(rows):
        assert row["output.size_kib"] == dict(grid.point(number).fields)["output.size_kib"]
        expected = row_of(grid.point(number))
        assert {name: row[name] for name in expected} == expected


@pytest.mark.parametrize("rates", [1, 100])
def test_a_large_grid_is_numbers_not_objects(rates: int) -> None:
    axes: dict[str, list[object]] = {
        "clock_mhz": [500.0 + i for i in range(rates)],
        "dram.gb_per_s": [1.0 + i for i in range(1000)],
        "front_end.skip_window": list(range(1, 101)),
    }
    grid = Grid(space_of(axes))
    assert len(grid) == 16 * rates * 100_000
    assert grid.keys(grid.codes(np.array([len(grid) - 1]))) == [grid.point(len(grid) - 1).key]
