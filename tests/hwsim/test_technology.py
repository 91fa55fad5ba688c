"""Technology tables: figures against their published sources, scaling laws, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwsim.errors import InputError
from hwsim.technology import (
    ByWidth,
    Technology,
    area_between_nodes,
    by_width,
    energy_between_nodes,
    leakage_density_between_nodes,
    load_technology,
    memory_macro,
    technology_names,
    wire_energy_between_supplies,
)

TABLES = ["22nm-aladdin", "45nm-aladdin", "45nm-horowitz"]
# CACTI 7.0, single-port SRAM, 64-bit port, itrs-lstp: KiB -> read pJ, write pJ, mm² at 45 nm, then at 22 nm.
# Provenance: runs of CACTI 7.0 made independently of those behind the tables.
CACTI_64_BIT = {
    8: (6.1, 7.9, 0.026, 1.59, 1.77, 0.0063),
    16: (11.6, 10.7, 0.051, 2.64, 2.28, 0.0151),
    32: (17.0, 15.4, 0.095, 3.79, 3.10, 0.0267),
    64: (25.9, 19.6, 0.209, 5.67, 4.43, 0.0586),
    128: (32.3, 26.1, 0.430, 7.40, 6.16, 0.119),
    256: (44.7, 38.5, 0.872, 11.9, 8.83, 0.225),
    512: (68.3, 51.3, 1.645, 15.3, 12.2, 0.442),
}


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, "utf-8")
    return path


def refused(folder: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        load_technology(write(folder, text))
    return str(caught.value)


# ---------------------------------------------------------------- figures


def test_packaged_tables():
    assert technology_names() == TABLES
    assert [load_technology(name).node_nm for name in TABLES] == [22, 45, 45]


@pytest.mark.parametrize(
    ("bits", "energy_pj"), [(8, 0.03), (16, 0.05), (32, 0.1)]
)  # Horowitz, ISSCC 2014, 45 nm
def test_horowitz_adders(bits, energy_pj):
    assert load_technology("45nm-horowitz").adder_pj(bits) == pytest.approx(energy_pj, rel=1e-12)


def test_horowitz_multipliers_and_the_law_of_width_products():
    table = load_technology("45nm-horowitz")
    assert table.multiplier_pj(8, 8) == pytest.approx(0.2, rel=1e-12)
    assert table.multiplier_pj(32, 32) == pytest.approx(3.1, rel=1e-12)
    only_8_bits = ByWidth(bits=(8,), values=(0.2,), source="Horowitz 2014", node_nm=45)
    assert by_width(only_8_bits, 32 * 32, power=2) == pytest.approx(3.1, rel=0.04)


@pytest.mark.parametrize(("name", "column"), [("45nm-horowitz", 0), ("45nm-aladdin", 0), ("22nm-aladdin", 3)])
@pytest.mark.parametrize("capacity_kib", CACTI_64_BIT)
def test_sram_is_cacti_7(name, column, capacity_kib):
    macro = load_technology(name).memory(capacity_kib * 8192, 64)
    expected = CACTI_64_BIT[capacity_kib][column : column + 3]
    found = (macro.read_energy_pj, macro.write_energy_pj, macro.area_mm2)
    assert found == pytest.approx(expected, rel=0.02)


def test_the_int8_product_differs_4_6_times_between_the_tables_of_45_nm():
    horowitz, aladdin = load_technology("45nm-horowitz"), load_technology("45nm-aladdin")
    assert aladdin.multiplier_pj(8, 8) / horowitz.multiplier_pj(8, 8) == pytest.approx(4.6, abs=0.05)


@pytest.mark.parametrize("name", TABLES)
def test_every_record_has_a_source_and_a_node(name):
    table = load_technology(name)
    for field in Technology.model_fields:
        if field not in ("name", "node_nm"):
            record = getattr(table, field)
            assert len(record.source) > 20
            assert 7 <= record.node_nm <= 130


# ---------------------------------------------------------------- scaling

nodes = st.floats(7, 130)
supplies = st.floats(0.6, 1.4)


@given(nodes, supplies, nodes, supplies, nodes, supplies)
def test_scaling_over_a_third_node_is_scaling_at_once(a, volt_a, b, volt_b, c, volt_c):
    by_way = energy_between_nodes(energy_between_nodes(1.0, a, volt_a, b, volt_b), b, volt_b, c, volt_c)
    assert by_way == pytest.approx(energy_between_nodes(1.0, a, volt_a, c, volt_c))
    assert energy_between_nodes(3.0, a, volt_a, a, volt_a) == pytest.approx(3.0)
    assert area_between_nodes(area_between_nodes(1.0, a, b), b, c) == pytest.approx(
        area_between_nodes(1.0, a, c)
    )
    assert leakage_density_between_nodes(1.0, a, b) * area_between_nodes(1.0, a, b) == pytest.approx(1.0)


@given(nodes, nodes)
def test_a_smaller_node_is_smaller(a, b):
    small, large = sorted((a, b))
    assert area_between_nodes(1.0, large, small) <= 1.0 + 1e-12


def test_published_area_factors_are_met():
    assert area_between_nodes(1.0, 45, 32) == pytest.approx(0.46)
    assert area_between_nodes(1.0, 45, 90) == pytest.approx(2.8)


def test_node_scaling_against_cacti():
    """An independent model: CACTI's SRAM between 45 and 22 nm."""
    large, small = load_technology("45nm-horowitz").sram, load_technology("22nm-aladdin").sram
    port = large.port_bits.index(64)
    for column, capacity in enumerate(large.capacity_kib):
        if 8 <= capacity <= 512:
            energy = small.read_energy_pj[port][column] / large.read_energy_pj[port][column]
            area = small.area_mm2[port][column] / large.area_mm2[port][column]
            assert energy_between_nodes(1.0, 45, 0.9, 22, 0.8) == pytest.approx(energy, rel=0.2)
            assert area_between_nodes(1.0, 45, 22) == pytest.approx(area, rel=0.2)


def test_wire_energy_follows_the_square_of_the_supply():
    assert wire_energy_between_supplies(0.121, 0.9, 0.45) == pytest.approx(0.121 / 4)
    # Keckler et al. 2011 project 200 pJ for 256 bits over 10 mm at 10 nm, 0.75 V
    assert wire_energy_between_supplies(0.121, 0.9, 0.75) == pytest.approx(200 / 2560, rel=0.1)


@pytest.mark.parametrize("name", TABLES)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 64), st.integers(1, 64))
@settings(deadline=None)
def test_wider_units_cost_more(name, a, b, more_a, more_b):
    table = load_technology(name)
    assert table.multiplier_pj(a, b) == pytest.approx(table.multiplier_pj(b, a))
    assert 0 < table.multiplier_pj(a, b) < table.multiplier_pj(a + more_a, b + more_b)
    for figure in (table.adder_pj, table.shifter_pj):
        assert 0 < figure(a) < figure(a + more_a)


# ---------------------------------------------------------------- memory macros


@pytest.mark.parametrize("name", ["45nm-horowitz", "22nm-aladdin"])
def test_macros_meet_every_point_of_the_table(name):
    table = load_technology(name).sram
    for i, port in enumerate(table.port_bits):
        for j, capacity in enumerate(table.capacity_kib):
            macro = memory_macro(table, capacity * 8192, port)
            assert macro.read_energy_pj == pytest.approx(table.read_energy_pj[i][j])
            assert macro.write_energy_pj == pytest.approx(table.write_energy_pj[i][j])
            assert macro.area_mm2 == pytest.approx(table.area_mm2[i][j])
            assert macro.leakage_mw == pytest.approx(table.leakage_mw[i][j])


def test_between_two_points_the_macro_is_the_geometric_mean():
    table = load_technology("45nm-horowitz").sram
    low, high = (memory_macro(table, kib * 8192, 64) for kib in (16, 32))
    middle = memory_macro(table, 16 * 8192 * math.sqrt(2), 64)
    assert middle.read_energy_pj == pytest.approx(math.sqrt(low.read_energy_pj * high.read_energy_pj))
    narrow, wide = (memory_macro(table, 32 * 8192, bits) for bits in (16, 64))
    both = memory_macro(table, 32 * 8192, 32)
    assert (
        min(narrow.area_mm2, wide.area_mm2) * 0.8 < both.area_mm2 < max(narrow.area_mm2, wide.area_mm2) * 1.2
    )


def test_wider_than_the_widest_port_is_macros_side_by_side():
    table = load_technology("45nm-horowitz").sram
    one, two = memory_macro(table, 8 * 8192, 512), memory_macro(table, 16 * 8192, 1024)
    assert two.read_energy_pj == pytest.approx(2 * one.read_energy_pj)
    assert two.area_mm2 == pytest.approx(2 * one.area_mm2)
    # N: the widest port is one macro; N + 2 bits: two of half the width
    assert memory_macro(table, 16 * 8192, 512).area_mm2 == pytest.approx(0.07136)
    halves, half = memory_macro(table, 16 * 8192, 514), memory_macro(table, 8 * 8192, 257)
    assert halves.write_energy_pj == pytest.approx(2 * half.write_energy_pj)


def test_larger_than_the_largest_capacity_is_several_of_which_one_is_accessed():
    table = load_technology("45nm-horowitz").sram
    one, four = memory_macro(table, 1024 * 8192, 64), memory_macro(table, 4 * 1024 * 8192, 64)
    assert four.read_energy_pj == pytest.approx(one.read_energy_pj)
    assert four.area_mm2 == pytest.approx(4 * one.area_mm2)
    assert four.leakage_mw == pytest.approx(4 * one.leakage_mw)


def test_smaller_than_the_smallest_is_the_smallest():
    table = load_technology("45nm-horowitz").sram
    assert memory_macro(table, 1, 1) == memory_macro(table, 256 * 8, 8)


@given(st.floats(1, 1e9), st.integers(1, 4096))
@settings(deadline=None)
def test_any_macro_is_finite_and_positive(capacity_bits, port_bits):
    macro = memory_macro(load_technology("22nm-aladdin").sram, capacity_bits, port_bits)
    for value in (macro.read_energy_pj, macro.write_energy_pj, macro.area_mm2, macro.leakage_mw):
        assert 0 < value < 1e7


# ---------------------------------------------------------------- files of one's own

OVERRIDE = """
name = "mine"
base = "45nm-horowitz"
[multiplier_energy_pj]
bits = [8]
values = [0.35]
source = "synthesis of my own"
node_nm = 45
supply_v = 0.9
"""


def test_a_file_replaces_records_of_its_base(tmp_path):
    mine, base = load_technology(write(tmp_path, OVERRIDE)), load_technology("45nm-horowitz")
    assert mine.name == "mine"
    assert mine.multiplier_pj(8, 8) == pytest.approx(0.35)
    assert mine.multiplier_pj(16, 8) == pytest.approx(0.7)
    assert mine.adder_pj(32) == base.adder_pj(32)
    assert mine.sram == base.sram
    assert mine.to_json() != base.to_json()


def test_a_record_of_another_node_is_scaled(tmp_path):
    text = OVERRIDE.replace("node_nm = 45", "node_nm = 90").replace("supply_v = 0.9", "supply_v = 1.2")
    mine = load_technology(write(tmp_path, text))
    assert mine.multiplier_pj(8, 8) == pytest.approx(energy_between_nodes(0.35, 90, 1.2, 45, 0.9))


def test_a_table_is_frozen_hashable_and_loaded_once():
    table = load_technology("45nm-horowitz")
    assert load_technology("45nm-horowitz") is table
    assert hash(table) == hash(Technology.model_validate_json(table.to_json()))
    with pytest.raises(ValueError, match="frozen"):
        table.name = "other"  # type: ignore[misc]


def test_all_problems_at_once_with_the_nearest_names(tmp_path):
    message = refused(
        tmp_path,
        OVERRIDE.replace("[multiplier_energy_pj]", "[multiplyer_energy_pj]")
        + "\n[gate_energy_pj]\nvalue = -1.0\nnode_nm = 45\nsupply_v = 0.9\n"
        + '\n[nand2_area_um2]\nvalue = 1.0\nnode_nm = 45\nsorce = "somewhere good"\n',
    )
    assert 'multiplyer_energy_pj: unknown field (did you mean "multiplier_energy_pj"?)' in message
    assert "gate_energy_pj.value" in message
    assert "-1.0" in message
    assert "gate_energy_pj.source: missing" in message
    assert 'nand2_area_um2.sorce: unknown field (did you mean "source"?)' in message


def test_a_number_without_its_source_is_refused(tmp_path):
    assert "multiplier_energy_pj.source: missing" in refused(
        tmp_path, OVERRIDE.replace('source = "synthesis of my own"', "")
    )


def test_a_unit_that_is_not_the_records_is_an_unknown_name(tmp_path):
    message = refused(tmp_path, OVERRIDE.replace("multiplier_energy_pj", "multiplier_energy_fj"))
    assert 'did you mean "multiplier_energy_pj"?' in message


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("values = [0.35]", "values = [0.35, 1.0]", "1 bits but 2 values"),
        ("bits = [8]\nvalues = [0.35]", "bits = [8, 8]\nvalues = [0.3, 0.4]", "must rise"),
        ("bits = [8]\nvalues = [0.35]", "bits = []\nvalues = []", "multiplier_energy_pj.bits"),
        ("bits = [8]", "bits = [8.5]", "multiplier_energy_pj.bits.0"),
        ("values = [0.35]", "values = [nan]", "multiplier_energy_pj.values.0"),
        ("values = [0.35]", "values = [inf]", "multiplier_energy_pj.values.0"),
        ("values = [0.35]", "values = [0.0]", "multiplier_energy_pj.values.0"),
        ("values = [0.35]", "values = ['0.35']", "multiplier_energy_pj.values.0"),
        ("values = [0.35]", "values = [true]", "multiplier_energy_pj.values.0"),
        ("node_nm = 45", "node_nm = 3", "multiplier_energy_pj.node_nm"),
        ("supply_v = 0.9", "supply_v = 3.3", "multiplier_energy_pj.supply_v"),
        ('source = "synthesis of my own"', 'source = ""', "multiplier_energy_pj.source"),
        ('base = "45nm-horowitz"', 'base = "45nm-horovitz"', 'did you mean "45nm-horowitz"?'),
        ('base = "45nm-horowitz"', "base = 45", "allowed: 22nm-aladdin"),
        ('base = "45nm-horowitz"', 'base = "45nm-horowitz"\nnode_nm = 32', "sram.node_nm"),
        ("[multiplier_energy_pj]", "[[multiplier_energy_pj]]", "multiplier_energy_pj"),
        ("values = [", "values = ", "not valid TOML"),
    ],
)
def test_bad_files(tmp_path, old, new, expected):
    assert expected in refused(tmp_path, OVERRIDE.replace(old, new))


def test_a_ragged_sram_table_is_refused(tmp_path):
    sram = """
[sram]
source = "a table of my own"
node_nm = 45
capacity_kib = [1, 2]
port_bits = [8]
read_energy_pj = [[1.0, 2.0]]
write_energy_pj = [[1.0, 2.0], [1.0, 2.0]]
area_mm2 = [[1.0]]
leakage_mw = [[1.0, 2.0]]
"""
    message = refused(tmp_path, OVERRIDE + sram)
    assert "write_energy_pj must have 1 rows" in message
    assert "area_mm2 must have 1 rows (port_bits) of 2 values" in message


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("[logic_utilization]\nvalue = 1.5", "at most 1"),
        ("[clock_gate_bits]\nvalue = 0.5", "at least 1"),
        ("[supply_v]\nvalue = 5.0", "allowed: 0.6 to 1.4"),
    ],
)
def test_figures_out_of_range(tmp_path, record, expected):
    tail = '\nsource = "made for this test"\nnode_nm = 45\n'
    assert expected in refused(tmp_path, OVERRIDE + record + tail)


def test_a_missing_table_names_the_nearest(tmp_path):
    with pytest.raises(InputError, match='did you mean "45nm-horowitz"'):
        load_technology("45nm-horowits")
    with pytest.raises(InputError, match="no such file"):
        load_technology(tmp_path / "none.toml")
    with pytest.raises(InputError, match="cannot be read"):
        load_technology(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(InputError, match="cannot be read"):
        load_technology(tmp_path / "latin.toml")
