"""Energies: enumerated blocks, figures worked out by hand, linearity, and the tables of docs/assumptions.md.

``python tests/hwsim/test_energy.py`` writes the generated part of ``docs/assumptions.md`` anew.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwsim.area import AREA_COMPONENTS, array_geometry, dense_at_equal_area, leakage_mw, machine_area
from hwsim.energy import (
    ENERGY_COMPONENTS,
    EVENTS,
    EventCounts,
    block_energy_pj,
    clock_pj_per_cycle,
    energy_per_event,
    layer_energy,
)
from hwsim.errors import InputError
from hwsim.machine import Machine, load_machine
from hwsim.technology import ByWidth, Figure, Technology, load_technology

TABLES = ["45nm-horowitz", "45nm-aladdin", "22nm-aladdin"]
ASSUMPTIONS = Path(__file__).resolve().parents[2] / "docs" / "assumptions.md"
BEGIN, END = "<!-- generated: begin -->\n", "<!-- generated: end -->\n"


# ---------------------------------------------------------------- the generated part of docs/assumptions.md


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def figure_rows() -> list[list[str]]:
    """Every record once, in the first table that has it."""
    rows, seen = [], set()
    for name in TABLES:
        table = load_technology(name)
        for field in Technology.model_fields:
            record = getattr(table, field)
            if field in ("name", "node_nm") or record in seen:
                continue
            seen.add(record)
            if isinstance(record, ByWidth):
                points = zip(record.values, record.bits, strict=True)
                value = ", ".join(f"{v:g} ({bits} bits)" for v, bits in points)
            else:
                value = f"{record.value:g}" if isinstance(record, Figure) else "table"
            rows.append([name, f"`{field}`", value, f"{record.node_nm:g}", record.source])
    return rows


def rows_with_all_banks(machine: Machine, technology: Technology) -> int:
    """Rows of the dense machine of equal area if its operand store kept the banks it has no use for."""
    budget_mm2, rows = sum(machine_area(machine, technology).values()), machine.array.rows
    changes = {"features.skip_pruned": False, "features.unified_path": False}
    while True:
        row_kib = machine.weights.dense_kib / machine.array.rows
        changes |= {"array.rows": rows + 1, "weights.dense_kib": row_kib * (rows + 1)}
        if sum(machine_area(machine.with_fields(changes), technology).values()) > budget_mm2:
            return rows
        rows += 1


def generated_part() -> str:
    machine = load_machine("msa-16x16")
    technologies = [load_technology(name) for name in TABLES]
    energies = [energy_per_event(machine, technology) for technology in technologies]
    areas = [machine_area(machine, technology) for technology in technologies]

    def line(head: list[str], values: list[float]) -> list[str]:
        return head + [f"{value:.3g}" for value in values]

    per_event = [
        line([f"`{event}`", component], [energy.event_pj(event, component) for energy in energies])
        for event in EVENTS
        for component in ENERGY_COMPONENTS
        if any(energy.event_pj(event, component) for energy in energies)
    ]
    per_block = [
        line([f"{block} block"], [block_energy_pj(machine, t, block) for t in technologies])
        for block in ("dense", "unified")
    ]
    by_component = [line([name], [area[name] for area in areas]) for name in AREA_COMPONENTS]
    by_component.append(line(["**sum**"], [sum(area.values()) for area in areas]))
    dense = [dense_at_equal_area(machine, technology) for technology in technologies]
    by_component.append(
        line(
            ["dense machine of equal area"],
            [sum(machine_area(m, t).values()) for m, t in zip(dense, technologies, strict=True)],
        )
    )
    by_component.append(["its rows", *(str(m.array.rows) for m in dense)])
    by_component.append(
        ["its rows, had it kept the banks", *(str(rows_with_all_banks(machine, t)) for t in technologies)]
    )
    return "\n".join(
        [
            f"Arithmetic of one block in one column of `{machine.name}` (products, sums, accumulators, operand "
            "registers), in pJ:\n",
            markdown_table(["", *TABLES], per_block),
            f"Energy per event of `{machine.name}`, in pJ (a word is {machine.word_bits} bits, a cycle 1 ns; "
            "`dram` is the machine file's figure):\n",
            markdown_table(["event", "component", *TABLES], per_event),
            f"Area of `{machine.name}`, in mm²:\n",
            markdown_table(["component", *TABLES], by_component),
            "Figures and sources, each in the first table that has it:\n",
            markdown_table(["table", "record", "value", "node (nm)", "source"], figure_rows()),
        ]
    )


def test_the_tables_in_the_documentation_are_those_of_the_packaged_figures():
    text = ASSUMPTIONS.read_text("utf-8")
    found = text.split(BEGIN)[1].split(END)[0]
    assert found == generated_part(), "run python tests/hwsim/test_energy.py"


# ---------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def msa() -> Machine:
    return load_machine("msa-16x16")


@pytest.fixture(scope="module", params=TABLES)
def technology(request):
    return load_technology(request.param)


@pytest.fixture(scope="module")
def horowitz() -> Technology:
    return load_technology("45nm-horowitz")


machines = st.builds(
    lambda g_o, g_k, multipliers, sign_adders, rows, weight_bits, activation_bits: load_machine(
        "msa-16x16"
    ).with_fields(
        {
            "array.block": [g_o, g_k],
            "array.multipliers": multipliers,
            "array.sign_adders": sign_adders,
            "array.rows": rows,
            "precision.weight_bits": weight_bits,
            "precision.activation_bits": activation_bits,
        }
    ),
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(2, 16),
    st.integers(2, 16),
)
counts = st.lists(st.integers(0, 10**9), min_size=len(EVENTS), max_size=len(EVENTS))


# ---------------------------------------------------------------- blocks, enumerated


def enumerated_dense_block(machine: Machine, technology: Technology) -> dict[str, float]:
    """Every product, sum and update of one dense block, one after the other."""
    (g_o, g_k), precision = machine.array.block, machine.precision
    lanes = min(machine.array.multipliers, g_k)
    energy = {"multipliers": 0.0, "dense_adder_tree": 0.0, "accumulators": 0.0}
    sum_width = precision.weight_bits + precision.activation_bits + math.ceil(math.log2(lanes))
    for _ in range(g_o):
        for start in range(0, g_k, lanes):
            products = list(range(start, min(start + lanes, g_k)))
            for _ in products:
                energy["multipliers"] += technology.multiplier_pj(
                    precision.weight_bits, precision.activation_bits
                )
            while len(products) > 1:
                products = [*products[2:], products[0]]
                energy["dense_adder_tree"] += technology.adder_pj(sum_width)
            energy["accumulators"] += technology.adder_pj(precision.accumulator_bits)
            energy["accumulators"] += precision.accumulator_bits * technology.register_pj
    return energy


def enumerated_unified_block(machine: Machine, technology: Technology) -> dict[str, float]:
    (g_o, g_k), precision = machine.array.block, machine.precision
    sum_width = precision.activation_bits + math.ceil(math.log2(g_k)) + 1
    energy = {"multipliers": 0.0, "sign_adders": 0.0, "accumulators": 0.0}
    for _ in range(g_o):
        for _ in range(g_k):
            energy["sign_adders"] += technology.adder_pj(sum_width)
            energy["sign_adders"] += precision.activation_bits * technology.gate_pj
        energy["multipliers"] += technology.multiplier_pj(precision.magnitude_bits, sum_width)
        energy["accumulators"] += technology.adder_pj(precision.accumulator_bits)
        energy["accumulators"] += precision.accumulator_bits * technology.register_pj
    return energy


@given(machines, st.sampled_from(TABLES))
@settings(deadline=None, max_examples=40)
def test_blocks_against_enumeration(machine, name):
    technology = load_technology(name)
    table = energy_per_event(machine, technology)
    for event, expected in (
        ("dense_column_blocks", enumerated_dense_block(machine, technology)),
        ("unified_column_blocks", enumerated_unified_block(machine, technology)),
    ):
        found = {c: table.event_pj(event, c) for c in ENERGY_COMPONENTS if table.event_pj(event, c) > 0}
        assert found == pytest.approx({c: value for c, value in expected.items() if value > 0})


def test_blocks_of_the_reference_machine_by_hand(msa, horowitz):
    """Horowitz 2014: 8-bit product 0.2 pJ, additions 0.03 / 0.05 / 0.1 pJ at 8 / 16 / 32 bits."""
    table, register, gate = energy_per_event(msa, horowitz), horowitz.register_pj, horowitz.gate_pj
    update = 0.1 + 32 * register
    expected = {
        ("dense_column_blocks", "multipliers"): 16 * 0.2,
        ("dense_column_blocks", "dense_adder_tree"): 12 * (0.05 + 0.05 * 2 / 16),  # 18 bits
        ("dense_column_blocks", "accumulators"): 4 * update,
        ("unified_column_blocks", "multipliers"): 4 * (0.2 + 2.9 * 24 / 960),  # 8 × 11 bits
        ("unified_column_blocks", "sign_adders"): 16 * (0.03 + 0.02 * 3 / 8 + 8 * gate),  # 11 bits
        ("unified_column_blocks", "accumulators"): 4 * update,
    }
    for (event, component), value in expected.items():
        assert table.event_pj(event, component) == pytest.approx(value), (event, component)
    registers = 2 * 4 * 8 * register
    dense = 3.2 + 12 * 0.05625 + 4 * update + registers
    assert block_energy_pj(msa, horowitz, "dense") == pytest.approx(dense)


@pytest.mark.parametrize(
    ("name", "ratio"), [("45nm-horowitz", 1.50), ("45nm-aladdin", 2.04), ("22nm-aladdin", 2.04)]
)
def test_what_unification_saves_in_arithmetic_depends_on_the_table(msa, name, ratio):
    """Golden: dense over unified block; the figures that docs/assumptions.md quotes."""
    technology = load_technology(name)
    dense, unified = (block_energy_pj(msa, technology, block) for block in ("dense", "unified"))
    assert dense / unified == pytest.approx(ratio, abs=0.01)


# ---------------------------------------------------------------- other events, by hand


def test_words_of_the_reference_machine(msa, horowitz):
    table, geometry = energy_per_event(msa, horowitz), array_geometry(msa, horowitz)
    register, gate, wire = horowitz.register_pj, horowitz.gate_pj, horowitz.wire_pj_per_mm
    store = horowitz.memory(5 * 8192, 512)  # 160 KiB in 16 banks of two halves
    way_mm = geometry.height_mm + geometry.width_mm / 2
    expected = {
        ("words_read", "operand_store_read"): store.read_energy_pj,
        ("words_read", "multicast"): 512 * way_mm * wire,
        ("words_read", "arbiter"): 15 * (0.05 + 0.05 * 4 / 16 + 20 * gate),
        ("latches", "multicast"): 512 * 4 * gate,
        ("latches", "operand_registers"): 2 * 512 * register,
        ("latches", "front_end"): 22 * (register + 2 * gate),
        ("words_filled", "operand_store_fill"): store.write_energy_pj,
        ("words_filled", "expander"): 512 * (4 * gate + register + geometry.width_mm * wire),
        ("codes_examined", "front_end"): 2 * (register + 3 * gate) + 4 * gate,
    }
    for (event, component), value in expected.items():
        assert table.event_pj(event, component) == pytest.approx(value), (event, component)


def test_memories_are_charged_at_their_word_width(msa, horowitz):
    """CACTI 7, 45 nm: 8 KiB with 16 bits 4.80 pJ per read, 4 KiB with 8 bits 3.31, 64 KiB with 512 bits 76.7."""
    table = energy_per_event(msa, horowitz)
    assert table.event_pj("sign_bits_read", "sign_memory") == pytest.approx(4.80 / 16, rel=1e-2)
    assert table.event_pj("magnitude_bits_read", "magnitude_memory") == pytest.approx(3.31 / 8, rel=1e-2)
    assert table.event_pj("output_bits_read", "output_buffer") == pytest.approx(76.7 / 512, rel=1e-2)
    along = horowitz.register_pj + array_geometry(msa, horowitz).width_mm * horowitz.wire_pj_per_mm
    for stream in ("sign", "magnitude", "dense"):
        assert table.event_pj(f"{stream}_bits_read", "weight_broadcast") == pytest.approx(along)
    assert table.event_pj("type_bits_read", "weight_broadcast") == 0


def test_requantizer_and_dram(msa, horowitz):
    table = energy_per_event(msa, horowitz)
    product = 0.2 + 2.9 * (32 * 16 - 64) / 960
    expected = product + 2 * 0.1 + horowitz.shifter_pj(32) + 40 * horowitz.register_pj
    assert table.event_pj("outputs_requantised") == pytest.approx(expected)
    assert table.event_pj("dram_bits") == 12.0
    assert (
        energy_per_event(msa.with_fields({"dram.pj_per_bit": 2.25}), horowitz).event_pj("dram_bits") == 2.25
    )


def test_leakage_is_power_times_time(msa, technology):
    for clock_mhz in (250, 1000):
        machine = msa.with_fields({"clock_mhz": clock_mhz})
        energy = layer_energy(EventCounts(cycles=1_000_000), machine, technology)
        seconds = 1_000_000 / (clock_mhz * 1e6)
        joule = leakage_mw(machine, technology) * 1e-3 * seconds
        assert energy[ENERGY_COMPONENTS.index("leakage")] * 1e-12 == pytest.approx(joule)


def test_clock_power_is_a_tenth_of_a_busy_array(msa, technology):
    """A sanity bound, not a law: clock trees take some percent to some tens of percent of a datapath's power."""
    busy = 256 * block_energy_pj(msa, technology, "unified")  # every PE a unified block per cycle
    assert 0.02 < clock_pj_per_cycle(msa, technology) / busy < 0.3


def test_energies_belong_to_the_component_of_their_name(msa, technology):
    pj = energy_per_event(msa, technology).pj
    assert pj.shape == (len(EVENTS), len(ENERGY_COMPONENTS))
    assert (pj >= 0).all()
    assert (pj.sum(axis=0) > 0).all(), "every component is charged for something"
    assert (pj.sum(axis=1) > 0).all(), "every event costs something"
    assert not pj.flags.writeable


# ---------------------------------------------------------------- laws


def as_events(values) -> EventCounts:
    return EventCounts(*values)


@given(counts, counts, st.integers(0, 1000), st.sampled_from(TABLES))
@settings(deadline=None, max_examples=60)
def test_energy_is_linear_in_the_events(first, second, factor, name):
    machine, technology = load_machine("msa-16x16"), load_technology(name)
    total = layer_energy(
        as_events([a + factor * b for a, b in zip(first, second, strict=True)]), machine, technology
    )
    parts = layer_energy(as_events(first), machine, technology)
    parts = parts + factor * layer_energy(as_events(second), machine, technology)
    np.testing.assert_allclose(total, parts, rtol=1e-12)


@given(counts, st.sampled_from(EVENTS), st.integers(1, 10**6))
@settings(deadline=None, max_examples=60)
def test_one_more_event_is_never_cheaper(values, event, more):
    machine, technology = load_machine("msa-16x16"), load_technology("45nm-aladdin")
    events = as_events(values)
    grown = replace(events, **{event: getattr(events, event) + more})
    before, after = (layer_energy(e, machine, technology) for e in (events, grown))
    assert (after >= before).all()
    assert after.sum() - before.sum() == pytest.approx(
        more * energy_per_event(machine, technology).event_pj(event), rel=1e-3, abs=1e-2
    )


def test_layers_are_charged_one_by_one(msa, technology):
    rng = np.random.default_rng(3)
    table = rng.integers(0, 10**8, (len(EVENTS), 21))
    together = layer_energy(as_events(list(table)), msa, technology)
    assert together.shape == (21, len(ENERGY_COMPONENTS))
    for layer in range(21):
        alone = layer_energy(as_events([int(x) for x in table[:, layer]]), msa, technology)
        assert alone.shape == (len(ENERGY_COMPONENTS),)
        np.testing.assert_allclose(together[layer], alone, rtol=1e-12)
    expected = table.T.astype(float) @ energy_per_event(msa, technology).pj
    np.testing.assert_allclose(together.sum(axis=1), expected.sum(axis=1))


def test_integers_count_for_every_layer(msa, technology):
    one = layer_energy(EventCounts(cycles=7), msa, technology)
    both = layer_energy(EventCounts(cycles=np.array([7, 7]), dram_bits=0), msa, technology)
    np.testing.assert_array_equal(both, [one, one])


def test_no_events_no_energy(msa, technology):
    assert layer_energy(EventCounts(), msa, technology).sum() == 0


def test_a_larger_array_has_longer_wires(msa, technology):
    small = energy_per_event(msa, technology)
    large = energy_per_event(msa.with_fields({"array.rows": 32}), technology)
    assert large.event_pj("words_read", "multicast") > 1.5 * small.event_pj("words_read", "multicast")


# ---------------------------------------------------------------- features


def test_a_dense_machine_pays_for_no_front_end(msa, technology):
    dense = msa.with_fields({"features.skip_pruned": False, "features.unified_path": False})
    energy = layer_energy(
        EventCounts(dense_column_blocks=10, latches=10, words_read=10, codes_examined=80), dense, technology
    )
    by_name = dict(zip(ENERGY_COMPONENTS, energy, strict=True))
    assert by_name["front_end"] == by_name["arbiter"] == 0
    assert by_name["multipliers"] > 0


@pytest.mark.parametrize(
    ("features", "event"),
    [
        ({"features.unified_path": False}, "unified_column_blocks"),
        ({"features.unified_path": False}, "sign_bits_read"),
        ({"features.unified_path": False}, "magnitude_bits_written"),
        ({"features.unified_path": False, "features.skip_pruned": False}, "type_bits_read"),
    ],
)
def test_events_of_parts_that_are_not_there_are_refused(msa, horowitz, features, event):
    machine = msa.with_fields(features)
    layer_energy(EventCounts(**{event: 0}), machine, horowitz)
    with pytest.raises(InputError, match=f"{event}: counted, but"):
        layer_energy(EventCounts(**{event: np.array([0, 1])}), machine, horowitz)


# ---------------------------------------------------------------- bad input


def test_all_bad_counts_are_named_at_once(msa, horowitz):
    with pytest.raises(InputError) as caught:
        layer_energy(EventCounts(cycles=-1, latches=np.array([3, -2])), msa, horowitz)
    assert "cycles: -1" in str(caught.value)
    assert "latches: -2" in str(caught.value)
    with pytest.raises(InputError, match="dram_bits: float64 counts, must be integers"):
        layer_energy(EventCounts(dram_bits=np.array([1.5])), msa, horowitz)
    with pytest.raises(InputError, match="cycles: bool counts"):
        layer_energy(EventCounts(cycles=True), msa, horowitz)


@pytest.mark.parametrize("other", [np.zeros(4, int), np.zeros((3, 1), int)])
def test_arrays_of_different_shapes_are_refused(msa, horowitz, other):
    with pytest.raises(InputError, match="arrays of one length"):
        layer_energy(EventCounts(cycles=np.zeros(3, int), latches=other), msa, horowitz)


def test_an_empty_network_has_no_layers(msa, horowitz):
    assert layer_energy(EventCounts(cycles=np.zeros(0, int)), msa, horowitz).shape == (
        0,
        len(ENERGY_COMPONENTS),
    )


if __name__ == "__main__":
    head, rest = ASSUMPTIONS.read_text("utf-8").split(BEGIN)
    ASSUMPTIONS.write_text(head + BEGIN + generated_part() + END + rest.split(END)[1], "utf-8")
