"""Pareto fronts against the definition, hypervolumes against counting cells and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sweeps.pareto
from hwsim.errors import InputError
from sweeps.pareto import hypervolume, knee_point, pareto_front


def brute_force_front(costs: list[tuple[float, ...]]) -> list[int]:
    """The definition, pair by pair; smaller is better."""

    def dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    return [i for i, row in enumerate(costs) if not any(dominates(other, row) for other in costs)]


def as_frame(costs: list[tuple[float, ...]]) -> pd.DataFrame:
    return pd.DataFrame(
        costs, columns=[f"c{i}" for i in range(len(costs[0]))], index=range(100, 100 + len(costs))
    )


def costs_of(columns: int, largest: int = 4) -> st.SearchStrategy[list[tuple[float, ...]]]:
    """Few distinct values, so that ties and equal rows are common."""
    value = st.integers(0, largest).map(float)
    return st.lists(st.tuples(*[value] * columns), min_size=1, max_size=30)


@given(st.integers(1, 4).flatmap(costs_of), st.integers(1, 7))
@settings(deadline=None, max_examples=100)
def test_front_is_the_definition(costs, chunk):
    frame = as_frame(costs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps.pareto, "_CHUNK", chunk)  # several chunks even of few rows
        front = pareto_front(frame, minimise=list(frame))
    assert front.index.tolist() == [100 + i for i in brute_force_front(costs)]


@given(costs_of(3))
@settings(deadline=None, max_examples=60)
def test_maximising_is_minimising_the_negative(costs):
    frame = as_frame(costs)
    negated = frame.assign(c1=-frame["c1"])
    front = pareto_front(frame, minimise=["c0", "c1", "c2"])
    assert pareto_front(negated, minimise=["c2", "c0"], maximise=["c1"]).index.equals(front.index)


@given(costs_of(2), st.data())
@settings(deadline=None, max_examples=60)
def test_front_does_not_depend_on_the_order_and_is_its_own_front(costs, data):
    frame = as_frame(costs)
    shuffled = frame.loc[data.draw(st.permutations(frame.index.tolist()))]
    front = pareto_front(shuffled, minimise=["c0", "c1"])
    assert set(front.index) == set(pareto_front(frame, minimise=["c0", "c1"]).index)
    pd.testing.assert_frame_equal(pareto_front(front, minimise=["c0", "c1"]), front)


def test_front_keeps_all_columns_and_ties():
    frame = pd.DataFrame({"name": list("abcd"), "latency_ms": [1, 1, 2, 2], "accuracy": [0.8, 0.8, 0.9, 0.8]})
    front = pareto_front(frame, minimise=["latency_ms"], maximise=["accuracy"])
    assert front["name"].tolist() == ["a", "b", "c"]
    assert list(front.columns) == list(frame.columns)


@pytest.mark.parametrize("columns", [2, 3])
def test_infinite_values_and_signed_zeros_compare_as_numbers(columns):
    costs = [
        (math.inf, *[math.inf] * (columns - 1)),
        (0.0, *[1.0] * (columns - 1)),
        (-0.0, *[1.0] * (columns - 1)),
    ]
    frame = as_frame(costs)
    assert pareto_front(frame, minimise=list(frame)).index.tolist() == [101, 102]
    assert len(pareto_front(frame.iloc[:1], minimise=list(frame))) == 1


def test_front_of_no_rows_is_empty():
    frame = pd.DataFrame({"a": [], "b": [], "c": []}, dtype=float)
    assert pareto_front(frame, minimise=["a", "b", "c"]).empty
    assert hypervolume(frame, {"a": 1, "b": 1, "c": 1}, minimise=["a", "b", "c"]) == 0


def test_bad_columns_are_refused():
    frame = pd.DataFrame({"latency_ms": [1.0, math.nan], "accuracy": [0.5, 0.6], "network": ["a", "b"]})
    with pytest.raises(InputError) as caught:
        pareto_front(frame, minimise=["latency_ms", "network"], maximise=["acuracy"])
    text = str(caught.value)
    assert "1 of 2 values are missing" in text
    assert "must be numbers" in text
    assert 'did you mean "accuracy"?' in text
    with pytest.raises(InputError, match="no column given"):
        pareto_front(frame)
    with pytest.raises(InputError, match="named twice"):
        pareto_front(frame, minimise=["accuracy"], maximise=["accuracy"])


# ------------------------------------------------------------------------------------------------ knee


def test_knee_of_a_bent_front():
    frame = pd.DataFrame({"latency_ms": [1, 2, 10, 9], "accuracy": [0.1, 0.8, 0.9, 0.0]})
    assert knee_point(frame, minimise=["latency_ms"], maximise=["accuracy"]).name == 1


def test_knee_of_a_quarter_circle_is_its_middle():
    angle = np.linspace(0, np.pi / 2, 91)
    frame = pd.DataFrame({"a": 1 - np.cos(angle), "b": 5 * (1 - np.sin(angle))})
    assert knee_point(frame, minimise=["a", "b"]).name == 45


@given(costs_of(2), st.floats(0.5, 100), st.floats(-10, 10))
@settings(deadline=None, max_examples=60)
def test_knee_is_on_the_front(costs, scale, offset):
    frame = as_frame(costs)
    assert knee_point(frame, minimise=["c0", "c1"]).name in pareto_front(frame, minimise=["c0", "c1"]).index


def test_knee_needs_finite_rows():
    frame = pd.DataFrame({"a": [1.0, 2.0], "b": [2.0, -math.inf]})
    with pytest.raises(InputError, match="infinite"):
        knee_point(frame, minimise=["a", "b"])
    with pytest.raises(InputError, match="no rows"):
        knee_point(frame.iloc[:0], minimise=["a", "b"])


# ------------------------------------------------------------------------------------------------ hypervolume


@given(st.integers(2, 3).flatmap(lambda columns: costs_of(columns, largest=5)))
@settings(deadline=None, max_examples=70)
def test_hypervolume_counts_the_dominated_unit_cells(costs):
    frame = as_frame(costs)
    corner = 4
    cells = itertools.product(range(corner), repeat=len(costs[0]))
    expected = sum(
        any(all(x <= low for x, low in zip(row, cell, strict=True)) for row in costs) for cell in cells
    )
    names = list(frame)
    assert hypervolume(frame, dict.fromkeys(names, corner), minimise=names) == expected
    mirrored = dict.fromkeys(names, -corner)
    assert hypervolume(-frame, mirrored, maximise=names) == expected


def test_hypervolume_of_boxes_in_closed_form():
    frame = pd.DataFrame({"latency_ms": [1.0, 3.0], "accuracy": [0.5, 0.75], "area_mm2": [2.0, 1.0]})
    reference = {"latency_ms": 4.0, "accuracy": 0.25, "area_mm2": 3.0}
    first, second, both = 3 * 0.25 * 1, 1 * 0.5 * 2, 1 * 0.25 * 1
    found = hypervolume(frame, reference, minimise=["latency_ms", "area_mm2"], maximise=["accuracy"])
    assert found == first + second - both


def test_hypervolume_converges_to_the_ball():
    angle = (np.arange(2000) + 0.5) / 2000 * np.pi / 2
    frame = pd.DataFrame({"a": np.cos(angle), "b": np.sin(angle)})
    assert hypervolume(frame, {"a": 0, "b": 0}, maximise=["a", "b"]) == pytest.approx(np.pi / 4, rel=2e-3)


def test_hypervolume_says_what_is_wrong():
    frame = pd.DataFrame({"a": [1.0], "b": [math.inf]})
    with pytest.raises(InputError, match="missing in the reference point"):
        hypervolume(frame, {"a": 1}, minimise=["a", "b"])
    with pytest.raises(InputError, match="1 columns"):
        hypervolume(frame, {"a": 1}, minimise=["a"])
    with pytest.raises(InputError, match="infinite"):
        hypervolume(frame, {"a": 1, "b": 2}, minimise=["a", "b"])
