"""What docs/microarchitecture.md says in tables and formulas, against the code: names, occupancies, orders, segments."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from hwsim.conformance import count_passes
from hwsim.errors import InputError
from hwsim.layer import Layer
from hwsim.lowering import (
    effective_counts,
    effective_types,
    execution_order,
    lower_machine,
    occupancy,
    pass_config,
)
from hwsim.machine import Machine, load_machine
from hwsim.oracle import COUNTERS
from tests.hwsim import reference
from tests.hwsim.strategies import layers_on_machines, small_machine

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "microarchitecture.md").read_text("utf-8")


def section(title: str) -> str:
    """The text from one heading to the next of the same rank."""
    _, _, rest = PAGE.partition(f"\n## {title}\n")
    assert rest, f"no section {title!r}"
    return rest.partition("\n## ")[0]


# ---------------------------------------------------------------- names on the page


def test_the_page_lists_the_counters_in_order() -> None:
    table = section("3. A pass").partition("### Counters")[2].partition("\n\n### ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert names[:-2] == list(COUNTERS[:7])
    assert names[-2:] == [COUNTERS[7], COUNTERS[-1]]  # "`busy` … `starved`"
    classes = table.partition("Each row-cycle")[2]
    positions = [classes.index(f"`{name}`") for name in COUNTERS[7:]]
    assert positions == sorted(positions)


def test_the_page_lists_every_field_of_a_machine_file() -> None:
    text = section("2. Machine") + section("1. Work") + section("3. A pass")
    named = set(re.findall(r"[a-z_]{3,}", text))
    fields = {name.rpartition(".")[2] for name in Machine.field_names()} - {"name", "clock_mhz", "table"}
    assert fields <= named


def test_reference_and_code_name_the_counters_alike() -> None:
    assert reference.COUNTERS == COUNTERS


# ---------------------------------------------------------------- formulas of sections 1 to 3


@settings(deadline=None, max_examples=100)
@given(layers_on_machines())
def test_lowering_follows_the_page(case: tuple[Layer, Machine]) -> None:
    layer, machine = case
    types = reference.converted(layer.types.tolist(), machine)
    np.testing.assert_array_equal(effective_types(layer.types, machine), types)
    assert occupancy(machine) == reference.occupancies(machine)[1:]
    order = execution_order(effective_counts(layer.types, machine), machine)
    assert order.tolist() == [reference.execution_order(group, machine) for group in types]
    words = lower_machine(machine).pass_config.segment_words
    k_blocks = layer.types.shape[2]
    spans = [(a, min(a + words, k_blocks)) for a in range(0, k_blocks, words)]
    assert spans == reference.segments_of(k_blocks, machine)


@pytest.mark.parametrize(
    ("changes", "unified", "dense"),
    [
        ({}, 1, 4),  # 16 products on 4 multipliers; 4 products of magnitudes on 4 multipliers
        ({"array.multipliers": 16}, 1, 2),  # the 64-bit port needs two cycles for 16 weights of 8 bits
        ({"array.multipliers": 15, "weights.dense_port_bits": 128}, 1, 2),  # one multiplier too few
        ({"array.multipliers": 16, "weights.dense_port_bits": 128}, 1, 1),
        ({"array.multipliers": 16, "weights.dense_port_bits": 127}, 1, 2),  # one bit too few
        ({"array.multipliers": 3}, 2, 6),  # four magnitudes on three multipliers
        ({"array.sign_adders": 15}, 2, 4),
        ({"weights.sign_port_bits": 24}, 1, 4),  # 16 signs and 8 bits of magnitude
        ({"weights.sign_port_bits": 23}, 2, 4),
    ],
)
def test_occupancy_at_each_of_its_limits(changes: dict[str, int], unified: int, dense: int) -> None:
    assert occupancy(load_machine("msa-16x16").with_fields(changes)) == (unified, dense)


def test_sorted_order_is_by_occupancy_not_by_blocks() -> None:
    """Two DENSE blocks of 4 cycles outweigh four UNIFIED ones of 2; ties keep their order."""
    machine = small_machine(features__row_balance="sorted", array__sign_adders=2, array__multipliers=1)
    assert occupancy(machine) == (2, 4)
    types = np.array([[[0, 0, 0, 1], [1, 1, 1, 0], [2, 2, 0, 0], [0, 0, 2, 1], [1, 0, 1, 1]]], np.uint8)
    order = execution_order(effective_counts(types, machine), machine)
    assert order.tolist() == [[2, 1, 3, 4, 0]]


# ---------------------------------------------------------------- the conformance command


def by_reference(types: list[list[int]], machine: Machine) -> list[dict[str, int]]:
    [converted] = reference.converted([types], machine)
    order = reference.execution_order(converted, machine)
    rows = machine.array.rows
    return [
        reference.run_segment(
            [converted[row] for row in order[first : first + rows]],
            (0, len(types[0])),
            array_rows=rows,
            occ=reference.occupancies(machine),
            skip_window=machine.front_end.skip_window,
            queue_depth=machine.front_end.queue_depth,
            banks=machine.operand_store.banks,
        )
        for first in range(0, len(order), rows)
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"features.row_balance": "sorted"},
        {"features.skip_pruned": False},
        {"features.unified_path": False},
        {"features.skip_pruned": False, "features.unified_path": False},
    ],
)
def test_conformance_counts_equal_the_reference(
    tmp_path: Path, seed: int, changes: dict[str, object]
) -> None:
    """In one segment, though the small machine's operand store holds far fewer words than there are block columns."""
    machine = small_machine().with_fields(changes)
    types = np.random.default_rng(seed).choice(3, (7, 300), p=[0.5, 0.3, 0.2]).astype(np.uint8)
    assert lower_machine(machine).pass_config.segment_words < 300
    assert pass_config(machine, one_segment=True).segment_words >= 300
    np.save(tmp_path / "types.npy", types)
    tiles, total = count_passes(machine, tmp_path / "types.npy")
    expected = by_reference(types.tolist(), machine)
    assert [{name: tile[name] for name in COUNTERS} for tile in tiles] == expected
    assert total == {name: sum(tile[name] for tile in expected) for name in COUNTERS}
    rows = [row for tile in tiles for row in tile["block_rows"]]
    assert sorted(rows) == list(range(7))


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.array([[0, 3]], np.uint8), r"code 3 at \[0, 1\]"),
        (np.zeros((0, 4), np.uint8), "empty"),
        (np.zeros((4, 0), np.uint8), "empty"),
        (np.ones((2, 2)), "float64, must be uint8"),
        (np.full((2, 2), np.nan), "float64, must be uint8"),
        (np.ones((2, 2), np.int64), "int64, must be uint8"),
        (np.ones((2, 2), bool), "bool, must be uint8"),
        (np.ones(4, np.uint8), "1 dimensions, must be 2"),
        (np.ones((1, 2, 2), np.uint8), "3 dimensions, must be 2"),
        (np.uint8(1), "0 dimensions, must be 2"),
        (np.array([[0, None]], object), "not a readable NumPy"),
    ],
)
def test_conformance_refuses_what_is_no_type_array(tmp_path: Path, array: np.ndarray, complaint: str) -> None:
    np.save(tmp_path / "types.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=complaint):
        count_passes(small_machine(), tmp_path / "types.npy")


def test_conformance_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        count_passes(small_machine(), tmp_path / "absent.npy")
    (tmp_path / "text.npy").write_text("0 1 2")
    with pytest.raises(InputError, match="not a readable NumPy"):
        count_passes(small_machine(), tmp_path / "text.npy")
    (tmp_path / "empty.npy").write_bytes(b"")
    with pytest.raises(InputError, match="not a readable NumPy"):
        count_passes(small_machine(), tmp_path / "empty.npy")
    np.save(tmp_path / "whole.npy", np.ones((9, 9), np.uint8))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-1])
    with pytest.raises(InputError, match="not a readable NumPy"):
        count_passes(small_machine(), tmp_path / "cut.npy")
    np.savez(tmp_path / "types.npz", np.ones((2, 2), np.uint8))
    with pytest.raises(InputError, match="npz"):
        count_passes(small_machine(), tmp_path / "types.npz")
