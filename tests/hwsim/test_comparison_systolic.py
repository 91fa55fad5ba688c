"""Systolic arrays: closed forms against arrays of registers that are stepped cycle by cycle with the data in them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compress.zoo_shapes import zoo_shapes
from hwsim.comparison.cost import pj_per_bit
from hwsim.comparison.systolic import (
    DATAFLOWS,
    SystolicArray,
    _memories,
    best_array,
    run_systolic,
    systolic_area_mm2,
    systolic_cycles,
)
from hwsim.errors import InputError
from hwsim.layer import LayerShape
from hwsim.machine import load_machine
from hwsim.technology import load_technology

MACHINE = load_machine("msa-16x16")
TECHNOLOGY = load_technology("45nm-horowitz")


# --- the oracles: registers and wires, nothing that knows a formula


def weight_stationary_tile(weights: NDArray, inputs: NDArray) -> tuple[NDArray, int]:
    """One weight register per PE: load, then stream. ``[positions, C]`` and the cycles until the last sum is out.

    A weight may be any object that multiplies what passes the PE.
    """
    rows, columns = weights.shape
    held = [[0] * columns for _ in range(rows)]
    cycle = 0
    for loaded in range(rows):  # the chain shifts down, the last row's weights enter first
        held = [list(weights[rows - 1 - loaded]), *held[:-1]]
        cycle += 1
    found = np.zeros((len(inputs), columns), np.int64)
    left = len(inputs) * columns
    x = [[None] * columns for _ in range(rows)]
    sums = [[0] * columns for _ in range(rows)]
    start = cycle
    while left:
        t = cycle - start
        x_next: list[list] = [[None] * columns for _ in range(rows)]
        sums_next = [[0] * columns for _ in range(rows)]
        for r, c in product(range(rows), range(columns)):
            fed = inputs[t - r][r] if 0 <= t - r < len(inputs) else None
            x_next[r][c] = fed if c == 0 else x[r][c - 1]
            above = sums[r - 1][c] if r else 0
            if x_next[r][c] is not None:
                sums_next[r][c] = above + held[r][c] * x_next[r][c]
        x, sums = x_next, sums_next
        for c in range(columns):  # the column's sum for position t - (R-1) - c has just been made
            position = t - (rows - 1) - c
            if 0 <= position < len(inputs):
                found[position, c] = sums[rows - 1][c]
                left -= 1
        cycle += 1
    return found, cycle


def weight_stationary_chain(
    tiles: list[tuple[NDArray, NDArray]], spacing: list[int]
) -> tuple[list[NDArray], int]:
    """Two weight registers per PE; tile i+1 enters ``spacing[i]`` cycles after tile i.

    Weights for the next tile slide down a column behind the wavefront of this one; a PE takes over its second register when
    the first input of a tile reaches it.
    """
    rows, columns = tiles[0][0].shape
    starts = [rows]
    for gap in spacing:
        starts.append(starts[-1] + gap)
    loads = [0, *starts[:-1]]  # when weights of a tile begin to enter, in column 0
    held = [[0] * columns for _ in range(rows)]
    second = [[0] * columns for _ in range(rows)]
    x: list[list[tuple[int, bool] | None]] = [[None] * columns for _ in range(rows)]
    sums = [[0] * columns for _ in range(rows)]
    found = [np.zeros((len(inputs), columns), np.int64) for _, inputs in tiles]
    last = 0
    for t in range(starts[-1] + len(tiles[-1][1]) + rows + columns):
        x_next: list[list[tuple[int, bool] | None]] = [[None] * columns for _ in range(rows)]
        sums_next = [[0] * columns for _ in range(rows)]
        for r, c in product(range(rows), range(columns)):
            if c:
                x_next[r][c] = x[r][c - 1]
            else:
                for start, (_, inputs) in zip(starts, tiles, strict=True):
                    if 0 <= t - start - r < len(inputs):
                        x_next[r][c] = (int(inputs[t - start - r][r]), t - start - r == 0)
            entering = x_next[r][c]
            if entering is not None:
                if entering[1]:
                    held[r][c] = second[r][c]
                sums_next[r][c] = (sums[r - 1][c] if r else 0) + held[r][c] * entering[0]
        second_next = [list(row) for row in second]
        for (weights, _), load in zip(tiles, loads, strict=True):
            for r, c in product(range(rows), range(columns)):
                if 0 <= t - load - c - r <= rows - 1 - r:  # a word passes, or stays
                    word = weights[rows - 1 - (t - load - c)][c] if r == 0 else second[r - 1][c]
                    second_next[r][c] = word
        x, sums, second = x_next, sums_next, second_next
        for start, (_, inputs), out in zip(starts, tiles, found, strict=True):
            for c in range(columns):
                position = t - start - (rows - 1) - c
                if 0 <= position < len(inputs):
                    out[position, c] = sums[rows - 1][c]
                    last = t + 1
    return found, last


def output_stationary_chain(
    tiles: list[tuple[NDArray, NDArray]], spacing: list[int]
) -> tuple[list[NDArray], int, int]:
    """Tiles ``(inputs[R, K], weights[K, C])``; finished sums leave through the bottom of their column.

    Gives the outputs as they left, the cycles to the last product, and those to the last sum outside.
    """
    rows, columns = len(tiles[0][0]), tiles[0][1].shape[1]
    starts = [0]
    for gap in spacing:
        starts.append(starts[-1] + gap)
    acc = [[0] * columns for _ in range(rows)]
    out = [[0] * columns for _ in range(rows)]
    x: list[list[tuple[int, int, int] | None]] = [[None] * columns for _ in range(rows)]
    w = [[0] * columns for _ in range(rows)]
    found = [np.full((rows, columns), 10**9, np.int64) for _ in tiles]
    last_product = last_sum = 0
    for t in range(starts[-1] + 2 * rows + columns + max(len(weights) for _, weights in tiles) + 1):
        done = [
            start + c + len(weights) - 1
            for start, (_, weights) in zip(starts, tiles, strict=True)
            for c in range(columns)
        ]  # cycle in which row 0 of a column makes the last product of a tile
        out_next = [list(row) for row in out]
        for index, finished in enumerate(done):
            tile, c = divmod(index, columns)
            shift = t - (finished + rows)
            if 0 <= shift < rows:
                found[tile][rows - 1 - shift, c] = out[rows - 1][c]
                last_sum = max(last_sum, t + 1)
            for r in range(1, rows):
                if 0 <= shift < r:
                    out_next[r][c] = out[r - 1][c]
        x_next: list[list[tuple[int, int, int] | None]] = [[None] * columns for _ in range(rows)]
        w_next = [[0] * columns for _ in range(rows)]
        for r, c in product(range(rows), range(columns)):
            if c:
                x_next[r][c] = x[r][c - 1]
            if r:
                w_next[r][c] = w[r - 1][c]
            for tile, (start, (inputs, weights)) in enumerate(zip(starts, tiles, strict=True)):
                if c == 0 and 0 <= t - start - r < inputs.shape[1]:
                    x_next[r][c] = (int(inputs[r][t - start - r]), t - start - r, tile)
                if r == 0 and 0 <= t - start - c < len(weights):
                    w_next[r][c] = int(weights[t - start - c][c])
            entering = x_next[r][c]
            if entering is not None:
                value, k, tile = entering
                acc[r][c] = (0 if k == 0 else acc[r][c]) + value * w_next[r][c]
                last_product = t + 1
                if k == len(tiles[tile][1]) - 1:
                    out_next[r][c] = acc[r][c]
        x, w, out = x_next, w_next, out_next
    return found, last_product, last_sum


# --- helpers


def padded(matrix: NDArray, rows: int, columns: int) -> NDArray:
    result = np.zeros((rows, columns), np.int64)
    result[: matrix.shape[0], : matrix.shape[1]] = matrix
    return result


def gemm(seed: int, positions: int, reduction: int, filters: int) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    return rng.integers(-99, 100, (positions, reduction)), rng.integers(-99, 100, (reduction, filters))


sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))
gemms = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 7))
seeds = st.integers(0, 2**32 - 1)


# --- exactness


def test_the_closed_forms_give_the_published_totals_on_resnet18() -> None:
    """Source: SCALE-Sim 3.0.0 on these 21 layers at 16 x 16, plus one cycle a layer."""
    shapes = zoo_shapes("resnet18")
    assert len(shapes) == 21
    totals = [
        sum(systolic_cycles(SystolicArray(16, 16, dataflow), shape.n, shape.k, shape.m) for shape in shapes)
        for dataflow in DATAFLOWS
    ]
    assert totals == [9_226_448, 8_005_554]


@settings(deadline=None, max_examples=40)
@given(size=sizes, gemm_size=gemms, seed=seeds)
def test_weight_stationary_tile_by_tile(
    size: tuple[int, int], gemm_size: tuple[int, int, int], seed: int
) -> None:
    rows, columns = size
    positions, reduction, filters = gemm_size
    inputs, weights = gemm(seed, *gemm_size)
    result, cycles = np.zeros((positions, filters), np.int64), 0
    for f, k in product(range(0, filters, columns), range(0, reduction, rows)):
        tile = padded(weights[k : k + rows, f : f + columns], rows, columns)
        sums, taken = weight_stationary_tile(tile, padded(inputs[:, k : k + rows], positions, rows))
        live = min(columns, filters - f)
        result[:, f : f + live] += sums[:, :live]
        cycles += taken
    assert (result == inputs @ weights).all()
    assert cycles == systolic_cycles(
        SystolicArray(rows, columns, "weight_stationary"), positions, reduction, filters
    )


class TwoOfFour:
    """What a PE with 2:4 sparsity holds: two kept weights and their positions among the four activations that pass."""

    def __init__(self, group: NDArray) -> None:
        positions = np.argsort(group == 0, kind="stable")[:2]
        self.kept = [(int(group[at]), int(at)) for at in positions]

    def __mul__(self, passing: NDArray) -> int:
        return sum(weight * int(passing[at]) for weight, at in self.kept)


@settings(deadline=None, max_examples=40)
@given(size=sizes, gemm_size=gemms, seed=seeds)
def test_weight_stationary_with_two_of_four(
    size: tuple[int, int], gemm_size: tuple[int, int, int], seed: int
) -> None:
    (rows, columns), (positions, reduction, filters) = size, gemm_size
    inputs, weights = gemm(seed, *gemm_size)
    groups = -(-reduction // 4)
    x = padded(inputs, positions, 4 * groups).reshape(positions, groups, 4)
    w = padded(weights, 4 * groups, filters).reshape(groups, 4, filters)
    rng = np.random.default_rng(seed)
    for g, f in product(range(groups), range(filters)):
        w[g, rng.permutation(4)[:2], f] = 0
    result, cycles = np.zeros((positions, filters), np.int64), 0
    for f, g in product(range(0, filters, columns), range(0, groups, rows)):
        tile, passing = np.empty((rows, columns), object), np.zeros((positions, rows, 4), np.int64)
        for r, c in product(range(rows), range(columns)):
            is_live = g + r < groups and f + c < filters
            tile[r, c] = TwoOfFour(w[g + r, :, f + c] if is_live else np.zeros(4, np.int64))
        passing[:, : groups - g] = x[:, g : g + rows]
        sums, taken = weight_stationary_tile(tile, passing)
        live = min(columns, filters - f)
        result[:, f : f + live] += sums[:, :live]
        cycles += taken
    assert (result == x.reshape(positions, -1) @ w.reshape(-1, filters)).all()
    array = SystolicArray(rows, columns, "weight_stationary", is_structured=True)
    shape = LayerShape("fc", "linear", in_channels=reduction, out_channels=filters)
    assert array.reduction(shape, True) == groups
    assert array.reduction(shape, False) == -(-reduction // 2)
    assert cycles == systolic_cycles(array, positions, groups, filters)


def test_two_of_four_costs_less_than_dense_on_the_same_array() -> None:
    shapes = zoo_shapes("resnet18")
    array = SystolicArray(16, 32, "weight_stationary", is_overlapped=True, is_structured=True)
    assert array.multipliers == 1024
    sparse = run_systolic(array, shapes, MACHINE, TECHNOLOGY, [True] * len(shapes))
    dense = run_systolic(array, shapes, MACHINE, TECHNOLOGY)
    assert sparse.area_mm2 == dense.area_mm2
    for few, many in zip(sparse.layers, dense.layers, strict=True):
        for field in ("compute_cycles", "latency_cycles", "dram_bytes", "storage_bytes", "products"):
            assert getattr(few, field) < getattr(many, field)
        assert sum(few.energy_pj.values()) < sum(many.energy_pj.values())
        assert few.storage_bytes - 7 * few_channels(few.layer) == -(-few.kept_weights * 10 // 8)
    plain = run_systolic(SystolicArray(16, 32, "weight_stationary", True), shapes, MACHINE, TECHNOLOGY)
    assert plain.area_mm2 < sparse.area_mm2  # half the multipliers


def few_channels(name: str) -> int:
    return next(shape.out_channels for shape in zoo_shapes("resnet18") if shape.name == name)


@settings(deadline=None, max_examples=40)
@given(size=sizes, gemm_size=gemms, limit=st.integers(1, 10), seed=seeds)
def test_weight_stationary_with_overlap(
    size: tuple[int, int], gemm_size: tuple[int, int, int], limit: int, seed: int
) -> None:
    rows, columns = size
    positions, reduction, filters = gemm_size
    inputs, weights = gemm(seed, *gemm_size)
    places = list(product(range(0, positions, limit), range(0, filters, columns), range(0, reduction, rows)))
    tiles = [
        (
            padded(weights[k : k + rows, f : f + columns], rows, columns),
            padded(inputs[p : p + limit, k : k + rows], min(limit, positions - p), rows),
        )
        for p, f, k in places
    ]
    found, cycles = weight_stationary_chain(tiles, [max(len(streamed), rows) for _, streamed in tiles[:-1]])
    result = np.zeros((positions, filters), np.int64)
    for (p, f, _), sums in zip(places, found, strict=True):
        live = min(columns, filters - f)
        result[p : p + limit, f : f + live] += sums[:, :live]
    assert (result == inputs @ weights).all()
    array = SystolicArray(rows, columns, "weight_stationary", is_overlapped=True, accumulator_rows=limit)
    assert cycles == systolic_cycles(array, positions, reduction, filters)


@settings(deadline=None, max_examples=40)
@given(size=sizes, gemm_size=gemms, is_overlapped=st.booleans(), seed=seeds)
def test_output_stationary(
    size: tuple[int, int], gemm_size: tuple[int, int, int], is_overlapped: bool, seed: int
) -> None:
    rows, columns = size
    positions, reduction, filters = gemm_size
    inputs, weights = gemm(seed, *gemm_size)
    places = list(product(range(0, positions, rows), range(0, filters, columns)))
    tiles = [
        (
            padded(inputs[p : p + rows], rows, reduction),
            padded(weights[:, f : f + columns], reduction, columns),
        )
        for p, f in places
    ]
    gap = max(reduction, rows) if is_overlapped else rows + columns + reduction - 2
    found, products, sums = output_stationary_chain(tiles, [gap] * (len(tiles) - 1))
    result = np.zeros((positions, filters), np.int64)
    for (p, f), out in zip(places, found, strict=True):
        block = out[: positions - p, : filters - f]
        result[p : p + rows, f : f + columns] = block
    assert (result == inputs @ weights).all()
    array = SystolicArray(rows, columns, "output_stationary", is_overlapped)
    assert products == systolic_cycles(array, positions, reduction, filters)
    assert sums == products + rows  # what the closed form leaves out, as published


def test_tiles_cannot_follow_one_cycle_sooner() -> None:
    """The overlapped forms are tight: a wavefront one cycle earlier meets weights or sums of the tile before."""
    rng = np.random.default_rng(0)
    rows, columns, positions = 4, 3, 2
    tiles = [(rng.integers(1, 99, (rows, columns)), rng.integers(1, 99, (positions, rows))) for _ in "ab"]
    for gap, is_right in ((rows, True), (rows - 1, False)):
        found, _ = weight_stationary_chain(tiles, [gap])
        products = [inputs @ weights for weights, inputs in tiles]
        assert all((a == b).all() for a, b in zip(found, products, strict=True)) is is_right
    tiles = [(rng.integers(1, 99, (rows, 2)), rng.integers(1, 99, (2, columns))) for _ in "ab"]
    for gap, is_right in ((rows, True), (rows - 1, False)):
        found, _, _ = output_stationary_chain(tiles, [gap])
        products = [inputs @ weights for inputs, weights in tiles]
        assert all((a == b).all() for a, b in zip(found, products, strict=True)) is is_right


# --- laws


@settings(deadline=None)
@given(rows=st.integers(1, 64), columns=st.integers(1, 64), work=st.tuples(*[st.integers(1, 600)] * 3))
@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_overlap_never_costs_time_and_less_work_never_takes_longer(
    dataflow: str, rows: int, columns: int, work: tuple[int, int, int]
) -> None:
    plain = SystolicArray(rows, columns, dataflow, accumulator_rows=10_000)  # type: ignore[arg-type]
    overlapped = replace(plain, is_overlapped=True)
    assert systolic_cycles(overlapped, *work) <= systolic_cycles(plain, *work)
    assert systolic_cycles(overlapped, *work) * rows * columns >= math.prod(work)
    for array in (plain, overlapped):
        for axis in range(3):
            less = [max(1, size - (axis == index)) for index, size in enumerate(work)]
            assert systolic_cycles(array, *less) <= systolic_cycles(array, *work)


# --- with memory, energy and area


def test_a_layer_that_fits_is_loaded_computed_and_stored() -> None:
    """By hand: 64 x 32 weights and 7 bytes a channel, 4 inputs of 32; 64-byte bursts at 12.8 bytes per cycle."""
    shape = LayerShape("fc", "linear", in_channels=32, out_channels=64, batch=4)
    cost = run_systolic(SystolicArray(16, 16, "output_stationary"), [shape], MACHINE, TECHNOLOGY).layers[0]
    loaded = 64 * 32 + 64 * 7 + 4 * 32
    bursts = -(-loaded // 64) * 64
    assert cost.storage_bytes == 64 * 32 + 64 * 7
    assert cost.dram_bytes == bursts + 256
    assert cost.compute_cycles == 4 * (16 + 16 + 32 - 2)
    assert cost.latency_cycles == math.ceil(bursts / 12.8) + cost.compute_cycles + math.ceil(256 / 12.8)


def test_what_fits_nowhere_is_loaded_again() -> None:
    machine = MACHINE.with_fields({"activation_buffer.size_kib": 8, "weights.dense_kib": 16})
    shape = LayerShape("fc", "linear", in_channels=1024, out_channels=64, batch=16)
    cost = run_systolic(SystolicArray(16, 16, "weight_stationary"), [shape], machine, TECHNOLOGY).layers[0]
    weights, inputs, outputs = 1024 * 64 + 64 * 7, 16 * 1024, 64 * 16
    again = min(weights + -(-weights // 8192) * inputs, inputs + -(-inputs // 4096) * weights)
    assert abs(cost.dram_bytes - (again + outputs)) < 3 * 64
    # half a buffer of each first, half a buffer of outputs (all of them) last, the rest beside the array
    first, middle, last = (
        math.ceil(-(-size // 64) * 64 / 12.8) for size in (8192 + 4096, again - (8192 + 4096), outputs)
    )
    assert cost.latency_cycles == first + max(cost.compute_cycles, middle) + last


@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_groups_are_as_many_layers(dataflow: str) -> None:
    array = SystolicArray(16, 16, dataflow)  # type: ignore[arg-type]
    geometry = ((9, 9), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    one, both = (
        run_systolic(
            array,
            [LayerShape("conv", "conv", 20 * groups, 24 * groups, *geometry, groups=groups)],
            MACHINE,
            TECHNOLOGY,
        ).layers[0]
        for groups in (1, 2)
    )
    assert both.compute_cycles == 2 * one.compute_cycles
    for part in ("array", "delivery", "memories", "requantizer"):
        assert both.energy_pj[part] == pytest.approx(2 * one.energy_pj[part])


def test_energy_of_one_product_at_a_time() -> None:
    """A 1 x 1 array does one product per cycle: what it charges for the array is products times one product."""
    shape = LayerShape("fc", "linear", in_channels=5, out_channels=3, batch=2)
    cost = run_systolic(SystolicArray(1, 1, "weight_stationary"), [shape], MACHINE, TECHNOLOGY).layers[0]
    cell_um2 = TECHNOLOGY.multiplier_um2(8, 8) + TECHNOLOGY.adder_um2(16) + 32 * TECHNOLOGY.register_um2
    pitch_mm = math.sqrt(cell_um2 * 1e-6 / TECHNOLOGY.logic_utilization.value)
    hop_pj = TECHNOLOGY.register_pj + pitch_mm * TECHNOLOGY.wire_pj_per_mm
    product_pj = TECHNOLOGY.multiplier_pj(8, 8) + TECHNOLOGY.adder_pj(16) + 24 * hop_pj
    assert cost.energy_pj["array"] == pytest.approx(30 * product_pj)
    assert cost.energy_pj["dram"] == cost.dram_bytes * 8 * 12.0


@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_energy_of_the_memories_and_of_delivery(dataflow: str) -> None:
    """4 positions, 32 reduction, 64 filters on 16 x 16: 2 tiles along the reduction, 4 of filters, 1 of positions."""
    shape = LayerShape("fc", "linear", in_channels=32, out_channels=64, batch=4)
    array = SystolicArray(16, 16, dataflow)  # type: ignore[arg-type]
    (cost,) = run_systolic(array, [shape], MACHINE, TECHNOLOGY).layers
    memory = _memories(array, MACHINE, TECHNOLOGY)
    assert memory["activation"].macros * memory["activation"].capacity_bits == 256 * 8192
    read, write = ({name: pj_per_bit(part, TECHNOLOGY)[i] for name, part in memory.items()} for i in (0, 1))
    expected = 8 * 128 * write["activation"] + 8 * (2048 + 448) * write["weight"]  # loaded once
    expected += (
        4 * 8 * 128 * read["activation"] + 8 * 2048 * read["weight"]
    )  # inputs again for each filter tile
    expected += 8 * 256 * (read["output"] + write["output"])
    register_pj = TECHNOLOGY.register_pj
    delivered = 4 * 128 * 7.5 * 8 * register_pj  # a row's inputs wait 0 … 15 cycles for their turn
    bits = 8 + 8 + 4 if dataflow == "weight_stationary" else 32
    held_bits = 16 + bits  # a weight, an activation, a sum
    cell_um2 = TECHNOLOGY.multiplier_um2(8, 8) + TECHNOLOGY.adder_um2(bits)
    pitch_mm = math.sqrt((cell_um2 + held_bits * TECHNOLOGY.register_um2) * 1e-6 / 0.7)
    hop_pj = register_pj + pitch_mm * TECHNOLOGY.wire_pj_per_mm
    if dataflow == "weight_stationary":
        # 256 sums: written, read and added to, written, read
        expected += 256 * 32 * (2 * write["accumulator"] + 2 * read["accumulator"])
        expected += 256 * TECHNOLOGY.adder_pj(32)
        delivered += 2048 * 8 * 8.5 * hop_pj  # a weight passes 1 … 16 PEs
    else:
        delivered += 2048 * 8 * 7.5 * register_pj + 256 * 32 * 8.5 * hop_pj
    assert cost.energy_pj["memories"] == pytest.approx(expected)
    assert cost.energy_pj["delivery"] == pytest.approx(delivered)


@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_the_best_array_has_room_and_one_more_column_has_not(dataflow: str) -> None:
    shapes = zoo_shapes("lenet5")
    template = SystolicArray(1, 1, dataflow, is_overlapped=True)  # type: ignore[arg-type]
    array = best_array(template, shapes, MACHINE, TECHNOLOGY, area_mm2=4.0)
    assert array is not None
    assert systolic_area_mm2(array, MACHINE, TECHNOLOGY) <= 4.0
    wider = replace(array, columns=array.columns + 1)
    assert systolic_area_mm2(wider, MACHINE, TECHNOLOGY) > 4.0
    by_count = best_array(template, shapes, MACHINE, TECHNOLOGY, multipliers=1024)
    assert by_count is not None
    assert by_count.rows * by_count.columns == 1024
    tried = [(16, 64), (32, 32), (64, 16)]
    latencies = {
        pair: run_systolic(
            replace(template, rows=pair[0], columns=pair[1]), shapes, MACHINE, TECHNOLOGY
        ).latency_cycles
        for pair in tried
    }
    assert latencies[by_count.rows, by_count.columns] == min(latencies.values())


def test_nothing_fits_into_no_area_and_a_prime_number_of_multipliers_is_a_line() -> None:
    template, shapes = SystolicArray(1, 1, "weight_stationary"), zoo_shapes("lenet5")
    assert best_array(template, shapes, MACHINE, TECHNOLOGY, area_mm2=0.1) is None
    line = best_array(template, shapes, MACHINE, TECHNOLOGY, multipliers=13)
    assert line is not None
    assert {line.rows, line.columns} == {1, 13}


def test_every_wrong_field_is_named() -> None:
    with pytest.raises(InputError) as error:
        SystolicArray(0, 4, "input_stationary", accumulator_rows=0)  # type: ignore[arg-type]
    assert [problem.field for problem in error.value.problems] == ["rows", "accumulator_rows", "dataflow"]
    with pytest.raises(InputError, match="only for weight_stationary"):
        SystolicArray(4, 4, "output_stationary", is_structured=True)
