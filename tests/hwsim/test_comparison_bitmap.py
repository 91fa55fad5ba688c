"""The bitmap array: its kernel against units that take one weight per cycle with the data in hand, closed forms, laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compress.zoo_shapes import zoo_shapes
from hwsim.comparison.bitmap import bitmap_array, chunk_sizes, pass_cycles, run_bitmap
from hwsim.comparison.patterns import Pattern
from hwsim.errors import InputError
from hwsim.layer import LayerShape
from hwsim.machine import load_machine
from hwsim.technology import load_technology

MACHINE = load_machine("msa-16x16")
TECHNOLOGY = load_technology("45nm-horowitz")


def stepped_cluster(
    weights: NDArray, x: NDArray, units: int, chunk: int, is_balanced: bool, per_cycle: int
) -> tuple[NDArray, list[int]]:
    """Outputs of one position and the cycles of each tile of filters.

    Every cycle each unit takes the next one of its bitmap, multiplies and adds; the cluster goes on to the next chunk when
    every unit is through and the chunk has arrived (``per_cycle`` activations a cycle).
    """
    filters, reduction = weights.shape
    outputs, taken = np.zeros(filters, np.int64), []
    for first in range(0, filters, 2 * units):
        tile = list(range(first, min(first + 2 * units, filters)))
        cycle = 0
        for begin in range(0, reduction, chunk):
            end = min(begin + chunk, reduction)
            ones = {f: [k for k in range(begin, end) if weights[f, k]] for f in tile}
            slots: list[int | None] = [*tile, *[None] * (2 * units - len(tile))]
            pairs = [(slots[u], slots[u + units]) for u in range(units)]
            if is_balanced:
                slots.sort(key=lambda f: len(ones[f]) if f is not None else 0)
                pairs = [(slots[u], slots[-1 - u]) for u in range(units)]
            todo = [[(f, k) for f in pair if f is not None for k in ones[f]] for pair in pairs]
            arrived = 0
            while any(todo) or arrived < end - begin:
                for work in todo:
                    if work:
                        f, k = work.pop(0)
                        outputs[f] += weights[f, k] * x[k]
                arrived += per_cycle
                cycle += 1
        taken.append(cycle)
    return outputs, taken


@st.composite
def masked(draw: st.DrawFn) -> NDArray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.integers(1, 14)), draw(st.integers(1, 40))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return rng.integers(1, 100, size) * rng.choice([-1, 1], size) * (rng.random(size) < density)


def counted(mask: NDArray, chunk: int) -> NDArray:
    shape = LayerShape("fc", "linear", in_channels=mask.shape[1], out_channels=mask.shape[0])
    return Pattern(shape, int(mask.sum()), mask[None].astype(float)).nonzeros(chunk)


@settings(deadline=None)
@given(
    weights=masked(),
    units=st.integers(1, 5),
    chunk=st.integers(1, 16),
    is_balanced=st.booleans(),
    per_cycle=st.integers(1, 6),
)
def test_kernel_equals_stepped_cluster(
    weights: NDArray, units: int, chunk: int, is_balanced: bool, per_cycle: int
) -> None:
    x = np.random.default_rng(1).integers(-128, 128, weights.shape[1])
    outputs, taken = stepped_cluster(weights, x, units, chunk, is_balanced, per_cycle)
    assert (outputs == weights @ x).all()
    least = -(-chunk_sizes(weights.shape[1], chunk) // per_cycle)
    nonzeros = counted(weights != 0, chunk)
    assert pass_cycles(nonzeros, units, is_balanced, least)[0].tolist() == taken


@settings(deadline=None)
@given(weights=masked(), units=st.integers(1, 5), chunk=st.integers(1, 16))
def test_denser_is_never_faster_and_balancing_never_slower(weights: NDArray, units: int, chunk: int) -> None:
    mask = weights != 0
    more = mask | (np.random.default_rng(2).random(mask.shape) < 0.3)
    least = np.ones(-(-mask.shape[1] // chunk), np.int64)
    cycles = {
        (name, is_balanced): pass_cycles(counted(bits, chunk), units, is_balanced, least)
        for name, bits in (("mask", mask), ("more", more))
        for is_balanced in (True, False)
    }
    for is_balanced in (True, False):
        assert (cycles["mask", is_balanced] <= cycles["more", is_balanced]).all()
    assert (cycles["mask", True] <= cycles["mask", False]).all()
    assert (cycles["mask", True].sum() * units) >= mask.sum()


def test_all_weights_kept_is_a_dense_array() -> None:
    """2 filters x 300 positions per unit, 64 filters per tile, 32 clusters: 600 cycles for 32 outputs of 64 filters."""
    shape = LayerShape("fc", "linear", in_channels=300, out_channels=128, batch=64)
    array = bitmap_array(MACHINE, TECHNOLOGY, 32, 1.0)
    (cost,) = run_bitmap(array, [Pattern(shape, shape.weight_count)], TECHNOLOGY).layers
    assert cost.compute_cycles == 2 * 2 * 600 == shape.macs // 1024
    assert cost.products == shape.macs


def test_a_few_filters_get_a_unit_each() -> None:
    shape = LayerShape("fc", "linear", in_channels=300, out_channels=32, batch=32)
    (cost,) = run_bitmap(
        bitmap_array(MACHINE, TECHNOLOGY, 32, 1.0), [Pattern(shape, 300 * 32)], TECHNOLOGY
    ).layers
    assert cost.compute_cycles == 300


def test_no_weights_at_all_still_take_the_chunks_arrival() -> None:
    """A word of the expander brings 2 activations to each of 32 clusters: 300 positions take 64 + 64 + 22 cycles."""
    shape = LayerShape("fc", "linear", in_channels=300, out_channels=64, batch=32)
    (cost,) = run_bitmap(bitmap_array(MACHINE, TECHNOLOGY, 32, 0.0), [Pattern(shape, 0)], TECHNOLOGY).layers
    assert cost.compute_cycles == 150


def test_storage_is_a_bit_a_weight_and_the_kept_values() -> None:
    """Also 4 bytes where a unit's two filters begin, and 7 a channel."""
    shape = LayerShape("fc", "linear", in_channels=64, out_channels=10)
    array = bitmap_array(MACHINE, TECHNOLOGY, 32, 0.25)
    (cost,) = run_bitmap(array, [Pattern(shape, 160)], TECHNOLOGY).layers
    assert cost.storage_bytes == 640 // 8 + 160 + 5 * 4 + 10 * 7
    assert cost.kept_weights == 160


@pytest.mark.parametrize("network", ["lenet5", "resnet18"])
def test_fewer_weights_cost_less(network: str) -> None:
    shapes = zoo_shapes(network)
    array = bitmap_array(MACHINE, TECHNOLOGY, 32, 1.0)
    found = [
        run_bitmap(array, [Pattern(shape, int(share * shape.weight_count)) for shape in shapes], TECHNOLOGY)
        for share in (0.1, 0.5, 1.0)
    ]
    for field in ("compute_cycles", "latency_cycles", "dram_bytes", "storage_bytes"):
        totals = [sum(getattr(layer, field) for layer in cost.layers) for cost in found]
        assert totals == sorted(totals)
        assert totals[0] < totals[2]
    energies = [sum(sum(layer.energy_pj.values()) for layer in cost.layers) for cost in found]
    assert energies == sorted(energies)


def test_energy_of_the_products_and_of_dram() -> None:
    """A product picks an activation through 7 levels of 8 gates, and adds into 32 bits."""
    shape = LayerShape("fc", "linear", in_channels=256, out_channels=64, batch=32)
    (cost,) = run_bitmap(
        bitmap_array(MACHINE, TECHNOLOGY, 32, 0.5), [Pattern(shape, 8192)], TECHNOLOGY
    ).layers
    product_pj = 7 * 8 * TECHNOLOGY.gate_pj + TECHNOLOGY.multiplier_pj(8, 8)
    product_pj += TECHNOLOGY.adder_pj(32) + 32 * TECHNOLOGY.register_pj
    assert cost.energy_pj["array"] == pytest.approx(8192 * 32 * product_pj)
    assert cost.energy_pj["dram"] == cost.dram_bytes * 8 * 12.0


def test_a_longer_chunk_waits_less_and_needs_more_area() -> None:
    shapes = zoo_shapes("resnet18")
    patterns = [Pattern(shape, shape.weight_count // 4) for shape in shapes]
    areas, cycles = [], []
    for chunk in (16, 32, 64, 128):
        array = bitmap_array(MACHINE, TECHNOLOGY, 32, 0.25, chunk=chunk)
        areas.append(array.area_mm2(TECHNOLOGY))
        cycles.append(sum(layer.compute_cycles for layer in run_bitmap(array, patterns, TECHNOLOGY).layers))
    assert areas == sorted(areas)
    assert cycles == sorted(cycles, reverse=True)


# --- patterns


def test_random_patterns_keep_exactly_so_many_and_follow_their_seed() -> None:
    shape = LayerShape("conv", "conv", 8, 12, (9, 9), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), groups=2)
    first = Pattern(shape, 101, seed=(1, 2)).nonzeros(16)
    assert first.shape == (2, 6, 3)
    assert first.sum() == 101
    assert (first <= chunk_sizes(shape.k, 16)).all()
    assert (first == Pattern(shape, 101, seed=(1, 2)).nonzeros(16)).all()
    assert (first != Pattern(shape, 101, seed=(1, 3)).nonzeros(16)).any()


def test_chunks_of_one_random_pattern_agree() -> None:
    pattern = Pattern(LayerShape("fc", "linear", in_channels=300, out_channels=7), 500)
    fine, coarse = pattern.nonzeros(32), pattern.nonzeros(128)
    assert coarse.shape == (1, 7, 3)
    for c in range(3):
        assert (fine[:, :, 4 * c : 4 * c + 4].sum(axis=2) == coarse[:, :, c]).all()


def test_random_patterns_spread_as_draws_without_replacement() -> None:
    """Mean and variance of a hypergeometric count: 64 of 256 places, chunks of 16."""
    shape = LayerShape("fc", "linear", in_channels=64, out_channels=4)
    draws = np.concatenate(
        [Pattern(shape, 64, seed=(0, seed)).nonzeros(16).reshape(-1) for seed in range(400)]
    )
    assert draws.mean() == 4
    expected = 16 * 0.25 * 0.75 * (256 - 16) / 255
    assert draws.var() == pytest.approx(expected, rel=4 * math.sqrt(2 / draws.size))


@settings(deadline=None)
@given(weights=masked(), share=st.floats(0, 1), chunk=st.integers(1, 16))
def test_magnitudes_are_kept_from_the_largest(weights: NDArray, share: float, chunk: int) -> None:
    shape = LayerShape("fc", "linear", in_channels=weights.shape[1], out_channels=weights.shape[0])
    kept = int(share * weights.size)
    found = Pattern(shape, kept, weights[None]).nonzeros(chunk)
    order = sorted(range(weights.size), key=lambda i: (-abs(int(weights.flat[i])), i))
    expected = np.zeros((1, len(weights), -(-weights.shape[1] // chunk)), np.int64)
    for index in order[:kept]:
        row, k = divmod(index, weights.shape[1])
        expected[0, row, k // chunk] += 1
    assert (found == expected).all()


@pytest.mark.parametrize(
    ("kept", "weights", "words"),
    [
        (9, None, "must lie in [0, 8]"),
        (-1, None, "must lie in [0, 8]"),
        (2, np.zeros((1, 4, 2)), "expected (1, 2, 4)"),
        (2, np.full((1, 2, 4), np.nan), "finite"),
    ],
)
def test_wrong_patterns_are_refused(kept: int, weights: NDArray | None, words: str) -> None:
    with pytest.raises(InputError) as error:
        Pattern(LayerShape("fc", "linear", in_channels=4, out_channels=2), kept, weights)
    assert words in str(error.value)


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="chunk"):
        bitmap_array(MACHINE, TECHNOLOGY, 32, 0.5, chunk=0)
