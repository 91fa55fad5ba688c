"""Areas: closed forms, what features take away, growth laws, and the dense machine of equal area."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwsim.area import (
    AREA_COMPONENTS,
    Memory,
    array_geometry,
    datapath,
    dense_at_equal_area,
    leakage_mw,
    log2_ceil,
    logic_area_mm2,
    machine_area,
    memories,
    register_bits,
)
from hwsim.gates import area_model
from hwsim.machine import Machine, load_machine
from hwsim.technology import load_technology

TABLES = ["45nm-horowitz", "45nm-aladdin", "22nm-aladdin"]
DENSE = {"features.skip_pruned": False, "features.unified_path": False}
SKIP_PARTS = {"front_end", "arbiter", "type_memory"}
UNIFIED_PARTS = {"sign_adders", "sign_memory", "magnitude_memory"}
MEMORIES = {
    "operand_store",
    "type_memory",
    "sign_memory",
    "magnitude_memory",
    "dense_memory",
    "activation_buffer",
    "output_buffer",
}


@pytest.fixture(scope="module")
def msa() -> Machine:
    return load_machine("msa-16x16")


@pytest.fixture(scope="module", params=TABLES)
def technology(request):
    return load_technology(request.param)


def total(machine, technology) -> float:
    return sum(machine_area(machine, technology).values())


machines = st.builds(
    lambda rows, columns, g_o, g_k, multipliers, sign_adders, banks, skip, unified: load_machine(
        "msa-16x16"
    ).with_fields(
        {
            "array.rows": rows,
            "array.columns": columns,
            "array.block": [g_o, g_k],
            "array.multipliers": multipliers,
            "array.sign_adders": sign_adders,
            "operand_store.banks": banks,
            "features.skip_pruned": skip,
            "features.unified_path": unified,
        }
    ),
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 24),
    st.booleans(),
    st.booleans(),
)


# ---------------------------------------------------------------- closed forms


def test_log2_ceil_at_the_boundaries():
    for power in range(1, 20):
        assert log2_ceil(2**power) == power
        assert log2_ceil(2**power + 1) == power + 1


def test_datapath_of_the_reference_machine(msa):
    widths = datapath(msa)
    assert (widths.sum_bits, widths.product_bits) == (11, 18)  # 8 + 2 + 1; 8 + 8 + 2
    assert (widths.tree_inputs, widths.dense_updates, widths.dense_tree_adds) == (4, 4, 12)


@given(machines)
@settings(deadline=None, max_examples=40)
def test_tree_additions_and_updates_are_one_per_weight(machine):
    widths, (g_o, g_k) = datapath(machine), machine.array.block
    assert widths.dense_tree_adds + widths.dense_updates == g_o * g_k
    assert widths.dense_updates >= g_o
    assert widths.dense_tree_adds >= 0


def test_memories_of_the_reference_machine(msa):
    kib = 8192
    assert memories(msa) == {
        "operand_store": Memory(32, 5 * kib, 512),
        "dense_memory": Memory(16, 40 * kib, 64),
        "activation_buffer": Memory(16, 16 * kib, 32),
        "output_buffer": Memory(1, 64 * kib, 512),
        "type_memory": Memory(16, 1 * kib, 16),
        "sign_memory": Memory(16, 8 * kib, 16),
        "magnitude_memory": Memory(16, 4 * kib, 8),
    }


def test_areas_of_the_reference_machine_by_hand(msa):
    """Sizes of the parts written out, × the stored coefficients, in NAND2 of 0.798 µm² placed at a density of 0.7."""
    area = machine_area(msa, load_technology("45nm-horowitz"))
    gate_mm2 = 0.798e-6 / 0.7
    each = area_model()["coefficients"]
    # 4 multipliers of 9 × 11 bits; each takes one input, and the sum of one output
    multipliers = 4 * 8 * 10 * each["pe.multiplier_adders"] + 4 * 11 * each["pe.operand_select_bits"]
    assert area["multipliers"] == pytest.approx(256 * multipliers * gate_mm2)
    # four sums of four inputs, 11 bits
    assert area["sign_adders"] == pytest.approx(256 * 12 * 11 * each["pe.sign_adder_bits"] * gate_mm2)
    # 3 adders of 20 + 2 bits
    assert area["dense_adder_tree"] == pytest.approx(256 * 3 * 22 * each["pe.tree_adder_bits"] * gate_mm2)
    # one tree of 22 bits and a product of 20 bits reach each of 4 outputs
    accumulators = (
        256 * each["pe.accumulator_bits"]
        + 128 * each["pe.accumulator_adder_bits"]
        + 4 * (22 + 20) * each["pe.accumulator_select_bits"]
    )
    assert area["accumulators"] == pytest.approx(256 * accumulators * gate_mm2)
    assert area["operand_registers"] == pytest.approx(16 * 1024 * each["row_control.word_bits"] * gate_mm2)
    multicast = 15 * 32 * each["multicast.select_bits"] + each["multicast.pe"]
    assert area["multicast"] == pytest.approx(256 * multicast * gate_mm2)
    front_end = (
        each["front_end.row"]
        + 3 * each["front_end.window_bits"]
        + 4 * 21 * each["front_end.queue_bits"]
        + 8 * each["row_control.window"]
    )
    assert area["front_end"] == pytest.approx(16 * front_end * gate_mm2)
    assert area["sign_memory"] == pytest.approx(16 * 0.02567)  # CACTI: 8 KiB with a 16-bit port
    assert area["type_memory"] == pytest.approx(16 * 0.003376)  # 1 KiB, 16 bits
    assert area["output_buffer"] == pytest.approx(0.222)  # 64 KiB, 512 bits


def test_components_sum_to_the_total_of_logic_and_memories(msa, technology):
    area = machine_area(msa, technology)
    assert tuple(area) == AREA_COMPONENTS
    logic = sum(value for name, value in area.items() if name not in MEMORIES)
    assert logic == pytest.approx(logic_area_mm2(msa, technology))
    assert all(value > 0 for value in area.values())


def test_registers_of_the_reference_machine(msa):
    pes = 256 * (2 * 4 * 32 + 2 * 32)
    front_end = 16 * (2 * 2 * 8 + 4 * 22 + 20)
    rest = 16 * 128 + 512 + 64 * 40  # weights of a row, expander, requantiser
    assert register_bits(msa, load_technology("45nm-horowitz")) == pes + front_end + rest


def test_geometry_holds_the_array(msa, technology):
    geometry, area = array_geometry(msa, technology), machine_area(msa, technology)
    inside = (
        "multipliers",
        "sign_adders",
        "dense_adder_tree",
        "accumulators",
        "operand_registers",
        "multicast",
    )
    assert geometry.height_mm * geometry.width_mm == pytest.approx(sum(area[name] for name in inside))
    wide = array_geometry(msa.with_fields({"array.rows": 8}), technology)
    assert wide.width_mm == pytest.approx(2 * wide.height_mm)


# ---------------------------------------------------------------- features


@pytest.mark.parametrize(
    ("skip", "unified", "absent"),
    [
        (True, True, set()),
        (True, False, UNIFIED_PARTS),
        (False, True, set()),
        (False, False, SKIP_PARTS | UNIFIED_PARTS),
    ],
)
def test_features_take_parts_away(msa, technology, skip, unified, absent):
    machine = msa.with_fields({"features.skip_pruned": skip, "features.unified_path": unified})
    area = machine_area(machine, technology)
    assert {name for name, value in area.items() if value == 0} == absent


def test_without_the_unified_path_the_multipliers_are_narrower(msa, technology):
    off = machine_area(msa.with_fields({"features.unified_path": False}), technology)
    on = machine_area(msa, technology)
    # 8 × 8 instead of 9 × 11 bits and no choice of operand; one accumulator adder instead of four
    each = area_model()["coefficients"]["pe.multiplier_adders"]
    assert off["multipliers"] == pytest.approx(1024 * 49 * each * technology.nand2_um2 * 1e-6 / 0.7)
    assert off["multipliers"] < on["multipliers"] * 49 / 80
    assert off["weight_broadcast"] < on["weight_broadcast"]


# ---------------------------------------------------------------- growth


def test_the_multicast_network_grows_with_each_of_its_factors(msa, technology):
    """Its area goes with (A − 1)·R·g_k·C·activation_bits, and a little for every PE."""
    area = machine_area(msa, technology)["multicast"]
    for field, value, ratio in (
        ("operand_store.banks", 32, 31 / 15),
        ("array.rows", 32, 2),
        ("array.block", [4, 8], 2),
        ("array.columns", 32, 2),
        ("precision.activation_bits", 16, 2),
    ):
        changed = msa.with_fields({field: value})
        assert machine_area(changed, technology)["multicast"] == pytest.approx(ratio * area, rel=0.02)
    assert machine_area(msa.with_fields({"operand_store.banks": 1}), technology)["multicast"] == 0


@given(machines, st.sampled_from(TABLES))
@settings(deadline=None, max_examples=40)
def test_more_of_anything_in_logic_is_larger(machine, name):
    technology = load_technology(name)
    area = machine_area(machine, technology)
    assert all(value >= 0 for value in area.values())
    for field in ("array.rows", "array.columns", "front_end.queue_depth", "front_end.skip_window"):
        part, leaf = field.split(".")
        more = machine.with_fields({field: getattr(getattr(machine, part), leaf) + 1})
        grown = machine_area(more, technology)
        for component in AREA_COMPONENTS:
            if component not in MEMORIES:
                assert grown[component] >= area[component] * (1 - 1e-12), (field, component)
    assert leakage_mw(machine, technology) > 0


def test_leakage_is_that_of_logic_and_macros(msa):
    technology = load_technology("45nm-horowitz")
    cells_mm2 = logic_area_mm2(msa, technology) * 0.7
    sram_mw = sum(
        memory.macros * technology.memory(memory.capacity_bits, memory.port_bits).leakage_mw
        for memory in memories(msa).values()
    )
    logic_mw = cells_mm2 * 12.3 * 0.46**0.34553  # Aladdin at 40 nm: a circuit leaks the same on a larger area
    assert leakage_mw(msa, technology) == pytest.approx(logic_mw + sram_mw, rel=1e-4)


# ---------------------------------------------------------------- equal area


def one_row_more(dense: Machine) -> Machine:
    rows = dense.array.rows
    return dense.with_fields(
        {"array.rows": rows + 1, "weights.dense_kib": dense.weights.dense_kib * (rows + 1) / rows}
    )


@pytest.mark.parametrize(
    "preset_fields", [{}, {"array.rows": 8}, {"array.block": [8, 8]}, {"array.columns": 4}]
)
def test_dense_at_equal_area_is_as_large_as_fits(msa, technology, preset_fields):
    machine = msa.with_fields(preset_fields)
    dense = dense_at_equal_area(machine, technology)
    assert dense.is_dense
    assert dense.array.rows >= machine.array.rows
    assert total(dense, technology) <= total(machine, technology)  # N rows fit
    assert total(one_row_more(dense), technology) > total(machine, technology)  # N + 1 do not


def test_dense_at_equal_area_keeps_a_rows_memory_and_all_else(msa, technology):
    dense = dense_at_equal_area(msa, technology)
    assert memories(dense)["dense_memory"].capacity_bits == memories(msa)["dense_memory"].capacity_bits
    restored = dense.with_fields(
        {
            "name": msa.name,
            "array.rows": 16,
            "weights.dense_kib": 640,
            "operand_store.banks": 16,
            "features.skip_pruned": True,
            "features.unified_path": True,
        }
    )
    assert restored == msa


def test_a_dense_machine_is_its_own_equal(msa, technology):
    dense = dense_at_equal_area(msa, technology)
    assert dense_at_equal_area(dense, technology) == dense
    off = msa.with_fields(DENSE)
    assert dense_at_equal_area(off, technology) == off


def test_only_one_feature_buys_fewer_rows(msa, technology):
    both = dense_at_equal_area(msa, technology).array.rows
    skip_only = dense_at_equal_area(msa.with_fields({"features.unified_path": False}), technology).array.rows
    assert 16 <= skip_only < both


def test_rows_end_where_the_machine_description_ends(msa):
    """Free rows (negligible areas) stop at the largest machine instead of running for ever."""
    technology = load_technology("45nm-horowitz")
    tiny = {
        name: getattr(technology, name).model_copy(update={"value": 1e-12})
        for name in ("nand2_area_um2", "interface_gates")
    }
    areas = tuple(tuple(1e-12 * (1 + c) for c in range(13)) for _ in range(7))
    free = technology.model_copy(
        update=tiny | {"sram": technology.sram.model_copy(update={"area_mm2": areas})}
    )
    machine = msa.with_fields(
        {"array.rows": 4090, "weights.dense_kib": 640 * 4090 / 16, "weights.sign_kib": 4096}
    )
    machine = machine.with_fields({"weights.type_kib": 4096, "weights.magnitude_kib": 4096})
    assert dense_at_equal_area(machine, free).array.rows == 4096
