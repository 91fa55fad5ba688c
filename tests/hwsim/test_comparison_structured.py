"""2:4 sparsity and pruned channels: closed forms, the format, the widths, and laws."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.zoo_shapes import zoo_shapes
from hwsim.area import machine_area
from hwsim.comparison.blocks import dense_array, dense_layer, kept_weights, run_blocks
from hwsim.comparison.channels import prune_channels
from hwsim.comparison.structured import run_structured, structured_array
from hwsim.layer import PRUNED, Layer, LayerShape, random_types
from hwsim.machine import load_machine
from hwsim.technology import load_technology

MACHINE = load_machine("msa-16x16")
TECHNOLOGY = load_technology("45nm-horowitz")
shapes = st.builds(
    LayerShape,
    st.just("fc"),
    st.just("linear"),
    in_channels=st.integers(1, 300),
    out_channels=st.integers(1, 200),
    batch=st.integers(1, 40),
)


def linear(name: str, inputs: int, outputs: int, batch: int = 1) -> LayerShape:
    return LayerShape(name, "linear", inputs, outputs, batch=batch)


# --- 2:4


def test_a_pass_takes_half_the_time_of_a_dense_one() -> None:
    """64 x 4,096 weights are one row tile of 1,024 block columns: ``Kb·occ + 3`` cycles, occ 2 instead of 4."""
    shape = linear("fc", 4096, 64, batch=16)
    array = structured_array(MACHINE, TECHNOLOGY, 16)
    assert array.block_cycles == 2
    (sparse,) = run_structured(array, [shape], [True], TECHNOLOGY).layers
    dense = dense_array(MACHINE, TECHNOLOGY, 16)
    (full,) = run_blocks(dense, [dense_layer(shape, (4, 4))], TECHNOLOGY).layers
    assert (sparse.compute_cycles, full.compute_cycles) == (2 * 1024 + 3, 4 * 1024 + 3)


def test_a_narrow_port_holds_it_up() -> None:
    """8 kept weights of a 4 x 4 block with their positions are 80 bits: 10 cycles through a port of 8."""
    array = structured_array(MACHINE.with_fields({"weights.dense_port_bits": 8}), TECHNOLOGY, 16)
    assert (array.block_bits, array.block_cycles) == (80, 10)


def test_the_format_loses_nothing() -> None:
    """A product from kept weights and two-bit positions alone, as a PE makes it."""
    rng = np.random.default_rng(0)
    weights = rng.integers(-127, 128, (8, 32))
    for group in weights.reshape(-1, 4):
        group[rng.permutation(4)[:2]] = 0
    x = rng.integers(-128, 128, 32)
    stored = [
        [(int(group[at]), int(at)) for at in sorted(np.argsort(group == 0, kind="stable")[:2])]
        for group in weights.reshape(-1, 4)
    ]
    assert all(at < 2**2 for pair in stored for _, at in pair)
    sums = np.zeros(8, np.int64)
    for index, pair in enumerate(stored):
        row, group = divmod(index, 8)
        sums[row] += sum(value * int(x[4 * group + at]) for value, at in pair)
    assert (sums == weights @ x).all()
    # and that is what is charged: 8 + 2 bits per kept weight, besides 4 bytes a block row and 7 a channel
    (cost,) = run_structured(
        structured_array(MACHINE, TECHNOLOGY, 16), [linear("fc", 32, 8)], [True], TECHNOLOGY
    ).layers
    assert cost.storage_bytes == sum(len(pair) for pair in stored) * 10 // 8 + 2 * 4 + 8 * 7
    assert cost.kept_weights == 128


@settings(deadline=None, max_examples=25)
@given(shape=shapes)
def test_half_the_weights_never_cost_more_than_all(shape: LayerShape) -> None:
    array = structured_array(MACHINE, TECHNOLOGY, 16)
    (sparse,) = run_structured(array, [shape], [True], TECHNOLOGY).layers
    (dense,) = run_structured(array, [shape], [False], TECHNOLOGY).layers
    for field in ("products", "compute_cycles", "latency_cycles", "dram_bytes", "storage_bytes"):
        assert getattr(sparse, field) <= getattr(dense, field)
    assert sum(sparse.energy_pj.values()) < sum(dense.energy_pj.values())
    assert 2 * sparse.kept_weights >= sparse.weight_count == dense.kept_weights


def test_a_layer_that_is_not_pruned_costs_what_it_costs_on_the_dense_array() -> None:
    shape = linear("fc", 512, 128)
    array = structured_array(MACHINE, TECHNOLOGY, 16)
    (sparse,) = run_structured(array, [shape], [False], TECHNOLOGY).layers
    (dense,) = run_blocks(array.machine, [dense_layer(shape, (4, 4))], TECHNOLOGY).layers
    assert sparse.latency_cycles == dense.latency_cycles
    for part in ("array", "delivery", "memories", "dram", "requantizer"):
        assert sparse.energy_pj[part] == dense.energy_pj[part]
    assert sparse.energy_pj["static"] > dense.energy_pj["static"]  # the selection leaks and is clocked


def test_the_area_is_the_dense_machines_with_selection_and_a_smaller_memory() -> None:
    """5 of 8 bits of every pair of weights stay; 1,024 multiplexers of four 8-bit inputs and 16 rows of 8 positions come."""
    array = structured_array(MACHINE, TECHNOLOGY, 16)
    assert array.machine.weights.dense_kib == MACHINE.weights.dense_kib * 0.625
    assert array.selection(TECHNOLOGY).logic_um2(TECHNOLOGY) == pytest.approx(
        1024 * 3 * 8 * TECHNOLOGY.gate_um2 + 16 * 8 * 2 * TECHNOLOGY.register_um2
    )
    own = machine_area(array.machine, TECHNOLOGY)
    assert abs(array.area_mm2(TECHNOLOGY) - sum(own.values())) < 0.2  # adder trees of two, not of four


def test_energy_of_a_block() -> None:
    """8 products picked out of four activations each, two outputs' pairs added, 4 updates of 32 bits, per column."""
    shape = linear("fc", 64, 64, batch=16)
    (cost,) = run_structured(structured_array(MACHINE, TECHNOLOGY, 16), [shape], [True], TECHNOLOGY).layers
    block_pj = 8 * (TECHNOLOGY.multiplier_pj(8, 8) + 2 * 8 * TECHNOLOGY.gate_pj)
    block_pj += 4 * TECHNOLOGY.adder_pj(17)
    block_pj += 4 * (TECHNOLOGY.adder_pj(32) + 32 * TECHNOLOGY.register_pj)
    latched_pj = 2 * 4 * 8 * TECHNOLOGY.register_pj  # an operand is written twice
    assert cost.energy_pj["array"] == pytest.approx(16 * 16 * 16 * (block_pj + latched_pj))


def test_a_narrow_block_becomes_four_wide() -> None:
    machine = MACHINE.with_fields({"array.block": [4, 1], "array.multipliers": 4})
    array = structured_array(machine, TECHNOLOGY, 16)
    assert array.machine.array.block == (4, 4)
    assert array.machine.array.multipliers == 4


# --- channels


@pytest.mark.parametrize(
    ("network", "share"), [("resnet18", 0.5), ("vgg16", 0.25), ("mobilenetv2", 0.5), ("lenet5", 0.3)]
)
def test_the_network_keeps_as_many_weights_and_still_fits_together(network: str, share: float) -> None:
    before = zoo_shapes(network)
    total = sum(shape.weight_count for shape in before)
    after = prune_channels(before, round(share * total))
    assert sum(shape.weight_count for shape in after) / total == pytest.approx(share, rel=0.02)
    assert after[0].in_channels == before[0].in_channels
    assert after[-1].out_channels == before[-1].out_channels
    widths: dict[int, set[int]] = {}
    for old, new in zip(before[:-1], after[:-1], strict=True):
        assert (new.n, new.kernel) == (old.n, old.kernel)
        widths.setdefault(old.out_channels, set()).add(new.out_channels)
    assert all(len(found) == 1 for found in widths.values())  # equal widths stay equal: additions fit
    outputs = {old.out_channels: new.out_channels for old, new in zip(before, after, strict=True)}
    for old, new in list(zip(before, after, strict=True))[1:]:
        if old.in_channels in outputs:
            assert new.in_channels == outputs[old.in_channels]
        if old.groups == old.in_channels > 1:
            assert new.groups == new.in_channels


def test_a_flattened_image_keeps_its_positions() -> None:
    shapes = zoo_shapes("lenet5")
    flat = next(shape for shape in shapes if shape.kind == "linear")
    conv = shapes[shapes.index(flat) - 1]
    positions = flat.in_channels // conv.out_channels
    assert positions > 1
    after = prune_channels(shapes, sum(shape.weight_count for shape in shapes) // 3)
    index = shapes.index(flat)
    assert after[index].in_channels == after[index - 1].out_channels * positions


def test_all_weights_kept_is_the_network_itself() -> None:
    shapes = zoo_shapes("mobilenetv2")
    assert prune_channels(shapes, sum(shape.weight_count for shape in shapes)) == shapes


def test_fewer_weights_never_take_longer() -> None:
    shapes = zoo_shapes("resnet18")
    total = sum(shape.weight_count for shape in shapes)
    dense = dense_array(MACHINE, TECHNOLOGY, 16)
    cycles = []
    for tenths in (10, 7, 5, 3, 1):
        layers = [dense_layer(shape, (4, 4)) for shape in prune_channels(shapes, total * tenths // 10)]
        cycles.append(run_blocks(dense, layers, TECHNOLOGY).latency_cycles)
    assert all(fewer < more for more, fewer in pairwise(cycles))


# --- kept weights of blocks


@settings(deadline=None)
@given(shape=shapes, block=st.sampled_from([(1, 4), (4, 4), (3, 5)]), p=st.sampled_from(["0", "0.3", "1"]))
def test_kept_weights_are_counted_without_padding(shape: LayerShape, block: tuple[int, int], p: str) -> None:
    types = random_types(shape, block, float(p), 0.0, np.random.default_rng(1))
    layer = Layer(shape, block, types)
    per_weight = np.repeat(np.repeat(types != PRUNED, block[0], 1), block[1], 2)
    assert kept_weights(layer) == per_weight[:, : shape.m, : shape.k].sum()
