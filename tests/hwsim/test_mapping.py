"""Steps, loop orders, transfers and latency: against the reference of the documentation, by hand, and at boundaries."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings

from hwsim.errors import FitError
from hwsim.kernels.steps import STEP_FIELDS
from hwsim.layer import DENSE, Layer, LayerShape, random_types
from hwsim.machine import Machine, load_machine, preset_names
from hwsim.mapping import Mapping
from hwsim.simulator import run_layer, simulate
from tests.hwsim.reference import DoesNotFit, LayerReference, Schedule
from tests.hwsim.strategies import layers_on_machines, small_machine

# How the words of a fill are shared out among steps is not part of the contract; their sum is.
COMPARED = [name for name in STEP_FIELDS if name != "filled_words"]

REGIMES = {
    "does not fit",
    "weights whole",
    "weights grouped",
    "weights streamed",
    "inputs whole",
    "inputs grouped",
    "weights outer",
    "columns outer",
    "split rows",
    "several segments",
    "sorted order",
    "several groups",
    "step bound by the channel",
    "fill stall",
    "drain stall",
    "output-limited row group",
    "several column tiles in a step",
    "halo kept",
}


def dense_layer(machine: Machine, shape: LayerShape) -> Layer:
    block = machine.array.block
    return Layer(shape, block, np.full((shape.groups, *shape.blocks(block)), DENSE, np.uint8))


def linear(outputs: int, inputs: int, *leading: int) -> LayerShape:
    return LayerShape("fc", "linear", in_channels=inputs, out_channels=outputs, input_size=leading)


def conv(out_channels: int, in_channels: int, size: tuple[int, ...], kernel: int, **other: Any) -> LayerShape:
    rank = len(size)
    fields = {"stride": (1,) * rank, "padding": ((0, 0),) * rank, "dilation": (1,) * rank} | other
    return LayerShape("conv", "conv", in_channels, out_channels, size, (kernel,) * rank, **fields)


def reference_of(layer: Layer, machine: Machine) -> Schedule:
    return LayerReference(layer.shape, layer.types.tolist(), machine).best()


def regimes_of(schedule: Schedule, machine: Machine) -> set[str]:
    steps = schedule.steps
    seen = {
        f"weights {schedule.weight_residence}",
        f"inputs {schedule.input_residence}",
        schedule.loop_order,
        "split rows" if not schedule.units_are_rows else "",
        "several segments" if schedule.segments > 1 else "",
        "sorted order" if machine.features.row_balance == "sorted" else "",
        "several groups" if steps[-1].group else "",
        "fill stall" if any(step.fill_stall_cycles for step in steps[1:]) else "",
        "drain stall" if any(step.drain_stall_cycles for step in steps[:-1]) else "",
        "step bound by the channel" if any(step.step_cycles > step.busy_cycles for step in steps) else "",
    }
    if schedule.weight_residence == "whole" and len({step.row_tiles for step in steps}) > 1:
        seen.add("output-limited row group")
    if any(step.positions[1] - step.positions[0] > machine.array.columns for step in steps):
        seen.add("several column tiles in a step")
    loads = [step.load_input_bytes for step in steps]
    if schedule.input_residence == "grouped" and any(0 < load < loads[0] for load in loads[1:]):
        seen.add("halo kept")
    return seen - {""}


def assert_same(mapping: Mapping, expected: Schedule) -> None:
    assert mapping.loop_order == expected.loop_order
    assert mapping.weight_residence == expected.weight_residence
    assert mapping.input_residence == expected.input_residence
    table = {name: [getattr(step, name) for step in expected.steps] for name in COMPARED}
    assert {name: mapping.column(name).tolist() for name in COMPARED} == table
    assert mapping.totals["filled_words"] == sum(step.filled_words for step in expected.steps)
    assert mapping.latency_cycles == expected.latency_cycles
    assert mapping.traffic_bytes == expected.traffic_bytes
    tiles = [(step.group, step.row_tiles[0], step.row_tiles[-1] + 1) for step in expected.steps]
    assert [tuple(step[:3]) for step in mapping.steps.tolist()] == tiles


# ---------------------------------------------------------------- against the reference


def test_steps_equal_the_reference_in_every_regime() -> None:
    """Derandomized, so that the list of regimes that occurred does not change from run to run."""
    seen: Counter[str] = Counter()

    @settings(deadline=None, max_examples=400, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(layers_on_machines())
    def check(case: tuple[Layer, Machine]) -> None:
        layer, machine = case
        try:
            expected = reference_of(layer, machine)
        except DoesNotFit:
            seen["does not fit"] += 1
            with pytest.raises(FitError, match="finest step is one row tile against one column tile"):
                run_layer(layer, machine)
            return
        seen.update(regimes_of(expected, machine))
        assert_same(run_layer(layer, machine).mapping, expected)

    check()
    assert set(seen) >= REGIMES, f"never seen: {sorted(REGIMES - set(seen))}"


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(layers_on_machines())
def test_report_attributes_the_latency_as_the_reference(case: tuple[Layer, Machine]) -> None:
    layer, machine = case
    try:
        expected = reference_of(layer, machine)
    except DoesNotFit:
        event("does not fit")
        return
    row = simulate(machine, [layer]).layers.iloc[0]
    parts = expected.attribution()
    assert {name: row[f"{name}_bound_cycles"] for name in parts} == parts
    assert sum(parts.values()) == expected.latency_cycles == row["latency_cycles"]
    assert parts[row["bound"]] == max(parts.values())
    cycles_to_ns = 1000 / machine.clock_mhz
    flows = [moved / (cycles * cycles_to_ns) for moved, cycles in expected.flows() if cycles]
    assert row["peak_bandwidth_gb_per_s"] == pytest.approx(max(flows))
    busy = sum(step.busy_cycles for step in expected.steps)
    assert row["peak_demand_gb_per_s"] == pytest.approx(expected.traffic_bytes / (busy * cycles_to_ns))
    average = expected.traffic_bytes / (expected.latency_cycles * cycles_to_ns)
    assert row["average_bandwidth_gb_per_s"] == pytest.approx(average)
    assert max(flows) <= machine.dram.gb_per_s * (1 + 1e-12)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(layers_on_machines())
def test_laws_of_a_mapping(case: tuple[Layer, Machine]) -> None:
    layer, machine = case
    try:
        run = run_layer(layer, machine)
    except FitError:
        event("does not fit")
        return
    mapping, shape = run.mapping, layer.shape
    assert mapping.latency_cycles >= mapping.totals["pass_cycles"] == run.totals["cycles"]
    rate = machine.dram.gb_per_s * 1000 / machine.clock_mhz
    assert mapping.latency_cycles >= mapping.traffic_bytes / rate * (1 - 1e-12)
    outputs = shape.out_channels * shape.n * machine.precision.activation_bits
    assert 8 * mapping.totals["store_bytes"] >= outputs
    # Every row tile meets every column: at least one pass for each full column tile.
    assert (mapping.passes * machine.array.columns >= shape.n).all()
    assert (mapping.loads >= 1).all()
    if mapping.weight_residence == "streamed":
        np.testing.assert_array_equal(mapping.loads, mapping.passes)
    if mapping.weight_residence == "whole":
        assert (mapping.loads == 1).all()
    assert mapping.totals["load_weight_bytes"] + mapping.totals["stream_bytes"] >= run.sizes.total_bytes
    faster = machine.with_fields({"dram.gb_per_s": machine.dram.gb_per_s * 2})
    assert run_layer(layer, faster).mapping.latency_cycles <= mapping.latency_cycles


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("cut", [1, 4], ids=["as shipped", "a quarter of the memories"])
def test_layers_of_a_real_network_on_the_presets(preset: str, cut: int) -> None:
    """Four layers of ResNet-18, too large for the drawn cases."""
    machine = load_machine(preset)
    sizes = ("weights.dense_kib", "weights.sign_kib", "activation_buffer.size_kib")
    smaller = {
        name: getattr(getattr(machine, name.split(".")[0]), name.split(".")[1]) / cut for name in sizes
    }
    machine = machine.with_fields(smaller | {"features.row_balance": "sorted" if cut > 1 else "none"})
    strided = {"stride": (2, 2), "padding": ((1, 1), (1, 1))}
    shapes = [
        conv(128, 64, (56, 56), 3, **strided),
        conv(512, 256, (14, 14), 1, stride=(2, 2)),
        conv(512, 256, (14, 14), 3, **strided),
        linear(1000, 512),
    ]
    for seed, shape in enumerate(shapes):
        block = machine.array.block
        types = random_types(shape, block, 0.5, 0.4, np.random.default_rng(seed))
        layer = Layer(shape, block, types)
        assert_same(run_layer(layer, machine).mapping, reference_of(layer, machine))


def test_spans_hold_only_the_columns_that_taps_reach() -> None:
    """Dilation 3 and padding 2: the first position's taps lie at -2, 1 and 4, so column 0 is not needed by it."""
    machine = small_machine(
        array__columns=1,
        activation_buffer__size_kib=20 / 1024,
        dram__burst_bytes=1,
        output__size_kib=2 / 1024,
    )
    shape = conv(1, 1, (12,), 3, padding=((2, 2),), dilation=(3,), batch=2)
    layer = dense_layer(machine, shape)
    expected = reference_of(layer, machine)
    assert not expected.units_are_rows
    assert expected.steps[0].load_input_bytes == 4  # columns 1 to 4
    assert_same(run_layer(layer, machine).mapping, expected)


def test_a_unit_whose_taps_all_lie_in_the_padding_needs_no_input() -> None:
    machine = small_machine(activation_buffer__size_kib=1 / 1024)
    layer = dense_layer(machine, conv(2, 1, (1,), 1, stride=(3,), padding=((1, 0),), batch=2))
    mapping = run_layer(layer, machine).mapping
    assert mapping.totals["load_input_bytes"] == 0
    assert_same(mapping, reference_of(layer, machine))


# ---------------------------------------------------------------- worked out by hand


def test_a_layer_held_whole_by_hand() -> None:
    """Linear 4 -> 8 with three vectors, 2 x 2 blocks on 2 rows and 3 columns: two passes.

    Per DENSE block max(4/2 products, 32 bits / 32) = 2 cycles; Kb = 2, so a pass takes 2*2 + 3 = 7 cycles. Mb = 4, so two row
    tiles; 3 positions are one column tile. Nothing is filled between the passes (same tile, one segment).

    Image: present streams type and dense; offsets 4 rows x 2 x 4 = 32 bytes, channels 8 x 7 = 56, type 4 rows x 1 byte,
    dense 4 x 8 = 32 bytes: each one burst of 64, 5 cycles at 12.8 bytes per cycle. Inputs 3 x 4 = 12 bytes: one burst.
    Outputs 8 x 3 = 24 bytes: one burst. First fill 2 words, 1 per cycle. Drain of a pass: 4 x 3 / 4 = 3 cycles.
    """
    machine = small_machine()
    mapping = run_layer(dense_layer(machine, linear(8, 4, 3)), machine).mapping
    assert (mapping.weight_residence, mapping.input_residence) == ("whole", "whole")
    [cost] = mapping.cost.tolist()
    assert dict(zip(STEP_FIELDS, cost, strict=True)) == {
        "pass_cycles": 14,
        "fill_stall_cycles": 2,
        "drain_stall_cycles": 3,
        "load_weight_cycles": 20,
        "load_weight_bytes": 256,
        "load_input_cycles": 5,
        "load_input_bytes": 64,
        "stream_cycles": 0,
        "stream_bytes": 0,
        "store_cycles": 5,
        "store_bytes": 64,
        "filled_words": 2,
        "step_cycles": 19,
    }
    assert mapping.latency_cycles == 25 + 19 + 5
    assert mapping.traffic_bytes == 384


def test_steps_over_columns_by_hand() -> None:
    """Linear 4 -> 4, one row tile; half the output buffer holds 8 bytes, 4 channels x 2 of the 3 positions.

    Image: offsets 16 bytes, channels 28, type 2, dense 16: four bursts of 5 cycles, and one for the inputs. Two passes of 7.
    The fill of the second column tile (2) hides behind the first pass, the drain of the first (4 x 2 / 4) behind the second.
    """
    machine = small_machine(output__size_kib=16 / 1024)
    mapping = run_layer(dense_layer(machine, linear(4, 4, 3)), machine).mapping
    assert mapping.loop_order == "weights outer"  # both orders are the same two steps
    assert mapping.steps.tolist() == [[0, 0, 1, 0, 2], [0, 0, 1, 2, 3]]
    assert mapping.column("step_cycles").tolist() == [2 + 7, 7 + 1]
    assert mapping.latency_cycles == 25 + 9 + 8 + 5
    assert mapping.traffic_bytes == (5 + 2) * 64


def test_the_better_loop_order_by_hand() -> None:
    """Linear 4 -> 8, half the output buffer holds 16 bytes.

    Weights outer takes both row tiles (8 channels leave room for one position) and groups of 2 and 1 positions: four passes.
    Columns outer takes all 3 positions (the fullest row tile has 4 channels) and one row tile after the other: two passes.
    """
    machine = small_machine(output__size_kib=32 / 1024)
    mapping = run_layer(dense_layer(machine, linear(8, 4, 3)), machine).mapping
    assert mapping.loop_order == "columns outer"
    assert mapping.steps.tolist() == [[0, 0, 1, 0, 3], [0, 1, 2, 0, 3]]
    assert mapping.column("step_cycles").tolist() == [2 + 7, 7 + 3]
    assert mapping.latency_cycles == 25 + 9 + 10 + 5


@pytest.mark.parametrize(
    ("gb_per_s", "clock_mhz", "burst", "cycles"),
    [
        (12.8, 1000, 64, 5),  # 64 bytes at 12.8 per cycle: exactly 5
        (12.8, 1000, 65, 6),  # 65 / 12.8 = 5.08
        (0.1, 1000, 64, 640),  # exact in decimal: 0.1 is no binary fraction
        (0.7, 700, 7, 7),  # 1 byte per cycle
        (33.333, 333.3, 100, 1),  # 100.009 bytes per cycle
        (33.33, 333.3, 100, 1),  # exactly 100
        (33.32, 333.3, 100, 2),
        (6.4, 800, 32, 4),
    ],
)
def test_transfer_cycles_are_exact(gb_per_s: float, clock_mhz: float, burst: int, cycles: int) -> None:
    """A linear layer of one vector: its input is one burst."""
    machine = small_machine(dram__gb_per_s=gb_per_s, clock_mhz=clock_mhz, dram__burst_bytes=burst)
    mapping = run_layer(dense_layer(machine, linear(2, 2)), machine).mapping
    assert (mapping.column("load_input_cycles")[0], mapping.column("load_input_bytes")[0]) == (cycles, burst)


# ---------------------------------------------------------------- boundaries: N − 1 and N


def kib(size_bytes: int) -> float:
    return size_bytes / 1024


def test_input_is_whole_exactly_up_to_the_buffer() -> None:
    shape = conv(2, 2, (4, 5), 3, padding=((1, 1), (1, 1)))  # 4 x 5 x 2 = 40 bytes
    for size, residence in ((40, "whole"), (39, "grouped")):
        machine = small_machine(activation_buffer__size_kib=kib(size), array__columns=1)
        assert run_layer(dense_layer(machine, shape), machine).mapping.input_residence == residence


def test_input_rows_that_no_tap_reaches_are_not_needed() -> None:
    """Kernel 1, stride 2 on four rows: rows 1 and 3 are never read."""
    shape = conv(2, 2, (4, 5), 1, stride=(2, 1))
    machine = small_machine(activation_buffer__size_kib=kib(20), dram__burst_bytes=1)
    mapping = run_layer(dense_layer(machine, shape), machine).mapping
    assert mapping.input_residence == "whole"
    assert mapping.totals["load_input_bytes"] == 20


def test_column_groups_fill_half_the_activation_buffer_exactly() -> None:
    """Rows of 10 bytes, kernel 3: a group of n output rows needs n + 2 input rows; five rows are 50 bytes."""
    shape = conv(2, 2, (12, 5), 3, padding=((0, 0), (1, 1)))
    for half, group in ((50, 3), (49, 2)):
        machine = small_machine(activation_buffer__size_kib=kib(2 * half), dram__burst_bytes=1)
        mapping = run_layer(dense_layer(machine, shape), machine).mapping
        first = mapping.steps[0]
        assert first[4] - first[3] == group
        # Two rows of the group before stay: as many new input rows as output rows.
        assert mapping.column("load_input_bytes")[:2].tolist() == [(group + 2) * 10, group * 10]


def test_output_rows_are_split_exactly_where_one_does_not_fit() -> None:
    """Two channels x 9 positions are 18 bytes of output."""
    shape = conv(2, 1, (2, 9), 1)
    for half, steps in ((18, 2), (17, 6)):
        machine = small_machine(output__size_kib=kib(2 * half))
        mapping = run_layer(dense_layer(machine, shape), machine).mapping
        groups = [(a, b) for _, _, _, a, b in mapping.steps.tolist()]
        assert len(groups) == (2 if steps == 2 else 4)  # rows of 9, or tiles of 3 in groups of two and one
        assert groups[-1][1] == steps


@pytest.mark.parametrize(
    ("dense_bytes_per_row", "residence"),
    [(32, "whole"), (31, "grouped"), (16, "grouped"), (15, "streamed")],
)
def test_weights_are_whole_grouped_or_streamed_at_the_byte(dense_bytes_per_row: int, residence: str) -> None:
    """Linear 4 -> 16: four tiles of two block rows, 8 bytes of dense weights each; half a share has to hold one of them."""
    machine = small_machine(weights__dense_kib=kib(2 * dense_bytes_per_row))
    mapping = run_layer(dense_layer(machine, linear(16, 4)), machine).mapping
    assert mapping.weight_residence == residence


def test_a_share_is_rounded_down_before_it_is_halved() -> None:
    """65 bytes over 2 rows: 32 each, half 16; the spare byte helps neither."""
    machine = small_machine(weights__dense_kib=kib(65))
    assert run_layer(dense_layer(machine, linear(16, 4)), machine).mapping.weight_residence == "whole"
    machine = small_machine(weights__dense_kib=kib(63))
    mapping = run_layer(dense_layer(machine, linear(16, 4)), machine).mapping
    assert mapping.weight_residence == "grouped"
    assert {b - a for _, a, b, _, _ in mapping.steps.tolist()} == {
        1
    }  # 31 // 2 = 15 holds one tile of 8 bytes


def test_a_layer_that_does_not_fit_names_demand_capacity_and_gap() -> None:
    """One row tile is 4 channels, one column tile 3 positions: 12 bytes of output, 6 x 3 bytes of input."""
    shape = conv(4, 6, (3, 9), 1)
    machine = small_machine(output__size_kib=kib(22), activation_buffer__size_kib=kib(34))
    layer = dense_layer(machine, shape)
    with pytest.raises(FitError) as caught:
        run_layer(layer, machine)
    text = str(caught.value)
    assert "layer conv does not fit machine small" in text
    assert "outputs of one pass needs 12 bytes, half of output.size_kib holds 11: 1 bytes too few" in text
    assert (
        "input of one column tile needs 18 bytes, half of activation_buffer.size_kib holds 17: 1 bytes"
        in text
    )
    # What it says would close the gap does.
    sizes = dict(re.findall(r"Raise ([a-z_.]+) to ([0-9.e-]+)", text))
    larger = machine.with_fields({field: float(size) for field, size in sizes.items()})
    assert len(sizes) == 2
    assert_same(run_layer(layer, larger).mapping, reference_of(layer, larger))


def test_a_linear_layer_that_does_not_fit_is_refused() -> None:
    machine = small_machine(activation_buffer__size_kib=kib(39))
    with pytest.raises(FitError, match=r"needs 20 bytes, half of activation_buffer\.size_kib holds 19"):
        run_layer(dense_layer(machine, linear(2, 20, 2)), machine)
    assert run_layer(dense_layer(machine, linear(2, 20)), machine).mapping.input_residence == "whole"


def test_more_block_rows_than_a_row_order_can_number_are_refused() -> None:
    machine = small_machine(features__row_balance="sorted", array__block=[1, 1])
    fits, too_many = (Layer(linear(m, 1), (1, 1), np.zeros((1, m, 1), np.uint8)) for m in (65536, 65537))
    run_layer(fits, machine)
    with pytest.raises(FitError, match=r"65,537 block rows .* row_balance"):
        run_layer(too_many, machine)
    run_layer(too_many, machine.with_fields({"features.row_balance": "none"}))


def test_drain_stretches_the_next_pass_but_not_its_own() -> None:
    """All pruned: a pass of 2 block columns takes 1 cycle (window 2), its drain of 4 x 3 outputs at 1 per cycle 12."""
    machine = small_machine(output__words_per_cycle=1)
    layer = Layer(linear(12, 4, 3), (2, 2), np.zeros((1, 6, 2), np.uint8))
    mapping = run_layer(layer, machine).mapping
    assert mapping.totals["pass_cycles"] == 3
    assert mapping.totals["drain_stall_cycles"] == 11 + 11 + 12


def test_fill_of_the_next_column_tile_shows_where_a_pass_is_shorter() -> None:
    """All pruned, 6 block columns: passes of 3 cycles, fills of 6; two column tiles, one row tile."""
    machine = small_machine()
    layer = Layer(linear(4, 12, 6), (2, 2), np.zeros((1, 2, 6), np.uint8))
    mapping = run_layer(layer, machine).mapping
    assert mapping.totals["pass_cycles"] == 6
    assert mapping.totals["fill_stall_cycles"] == 6 + (6 - 3)


def test_a_narrower_tile_at_the_same_place_is_filled_anew() -> None:
    """Linear 6 -> 5 with three vectors on one row, sorted: the ragged block row (1 channel) has most blocks and goes first.

    Half the output buffer holds 4 bytes: that row meets all 3 positions in one tile, the rows of 2 channels meet 2 and then 1.
    Half a share of 12 bytes holds one block row's 12 or 8 bytes of dense weights. So five passes, each over another tile than
    the pass before it: 3 words each.
    """
    machine = small_machine(
        array__rows=1,
        array__columns=4,
        features__row_balance="sorted",
        weights__dense_kib=kib(24),
        output__size_kib=kib(8),
    )
    types = np.array([[[2, 2, 0], [2, 2, 0], [2, 2, 2]]], np.uint8)
    layer = Layer(linear(5, 6, 3), (2, 2), types)
    mapping = run_layer(layer, machine).mapping
    assert mapping.loop_order == "weights outer"
    assert mapping.steps[:, 3:].tolist() == [[0, 3], [0, 2], [2, 3], [0, 2], [2, 3]]
    assert mapping.totals["filled_words"] == 15
    assert_same(mapping, reference_of(layer, machine))
