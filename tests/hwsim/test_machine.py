"""Machine files: presets, round trips, every kind of bad field, all problems at once."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest

import hwsim
from hwsim.errors import InputError
from hwsim.layer import Layer, LayerShape, random_types
from hwsim.machine import Machine, load_machine, parse_machine, preset_names
from hwsim.simulator import simulate
from tests.hwsim.strategies import machine_dict, small_machine


def toml_of(data: dict[str, Any]) -> str:
    """The dict as TOML; JSON's scalars and arrays are TOML's."""
    top = [f"{name} = {json.dumps(value)}" for name, value in data.items() if not isinstance(value, dict)]
    for name, part in data.items():
        if isinstance(part, dict):
            top += [f"[{name}]", *(f"{field} = {json.dumps(value)}" for field, value in part.items())]
    return "\n".join(top)


def problems_of(data: dict[str, Any]) -> dict[str, str]:
    """Field -> the rest of the message, of every problem."""
    with pytest.raises(InputError) as caught:
        parse_machine(data, "m.toml")
    assert caught.value.source == "m.toml"
    return {p.field: f"{p.message} ({p.hint})" for p in caught.value.problems}


# ---------------------------------------------------------------- presets and files


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_loads_and_simulates(name: str) -> None:
    machine = load_machine(name)
    assert machine.name == name
    shape = LayerShape("fc", "linear", in_channels=800, out_channels=500)
    types = random_types(shape, machine.array.block, 0.5, 0.5, np.random.default_rng(0))
    report = simulate(machine, [Layer(shape, machine.array.block, types)])
    assert report.summary["speedup_compute_only"] > 1
    assert math.isfinite(report.summary["speedup_equal_area"])
    assert report.warnings == ()


def test_presets_of_three_sizes_ship() -> None:
    sizes = {(m.array.rows, m.array.columns) for m in map(load_machine, preset_names())}
    assert {(8, 8), (16, 16), (32, 32)} <= sizes
    assert "load_machine" in dir(hwsim)
    assert hwsim.preset_names() == preset_names()


def test_a_file_loads_like_its_dict(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(toml_of(machine_dict()))
    assert load_machine(path) == load_machine(str(path)) == small_machine()


def test_json_is_canonical_and_reads_back() -> None:
    machine = small_machine()
    data = json.loads(machine.to_json())
    assert parse_machine(data, "json") == machine
    assert parse_machine(dict(reversed(data.items())), "json").to_json() == machine.to_json()
    other = machine.with_fields({"array.rows": 3})
    assert other.to_json() != machine.to_json()
    assert hash(other) != hash(machine)


def test_features_and_technology_have_defaults() -> None:
    data = machine_dict()
    del data["features"]
    machine = parse_machine(data, "m.toml")
    assert (machine.features.skip_pruned, machine.features.unified_path) == (True, True)
    assert machine.features.row_balance == "none"
    assert not machine.is_dense
    assert machine.technology.table == "45nm-horowitz"


def test_a_machine_is_immutable() -> None:
    machine = small_machine()
    with pytest.raises(pydantic.ValidationError):
        machine.array.rows = 5  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError):
        machine.name = "other"  # type: ignore[misc]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'no such machine file and no such preset .*"msa-16x16"'):
        load_machine("msa-16x61")
    with pytest.raises(InputError, match="no such machine file"):
        load_machine(tmp_path / "absent.toml")
    with pytest.raises(InputError, match="cannot be read"):
        load_machine(tmp_path)
    (tmp_path / "broken.toml").write_text("name = ")
    with pytest.raises(InputError, match=r"broken\.toml: not valid TOML"):
        load_machine(tmp_path / "broken.toml")
    (tmp_path / "twice.toml").write_text('name = "a"\nname = "b"\n')
    with pytest.raises(InputError, match="not valid TOML"):
        load_machine(tmp_path / "twice.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        load_machine(tmp_path / "binary.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(InputError, match="missing"):
        load_machine(tmp_path / "empty.toml")


# ---------------------------------------------------------------- bad fields


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("array__colums", "columns"),
        ("array__row", "rows"),
        ("front_end__skip_windows", "skip_window"),
        ("weights__dense_kb", "dense_kib"),
        ("dram__gbs_per_s", "gb_per_s"),
        ("features__row_balanced", "row_balance"),
        ("activation_bufer", "activation_buffer"),
    ],
)
def test_a_misspelt_field_names_the_nearest(path: str, nearest: str) -> None:
    found = problems_of(machine_dict(**{path: 1}))
    assert found == {path.replace("__", "."): f'unknown field (did you mean "{nearest}"?)'}


BAD_VALUES = [
    ("array__rows", -1),
    ("array__rows", 0),
    ("array__rows", 4097),
    ("array__rows", 2.0),
    ("array__rows", 2.5),
    ("array__rows", "2"),
    ("array__rows", True),
    ("array__rows", None),
    ("array__rows", [2]),
    ("array__columns", 0),
    ("array__block", [2]),
    ("array__block", [2, 2, 2]),
    ("array__block", [0, 2]),
    ("array__block", [2, 257]),
    ("array__block", "2x2"),
    ("array__multipliers", 0),
    ("array__sign_adders", -4),
    ("front_end__skip_window", 0),
    ("front_end__queue_depth", 0),
    ("activation_buffer__size_kib", -1),
    ("activation_buffer__size_kib", 0),
    ("activation_buffer__size_kib", math.nan),
    ("activation_buffer__size_kib", math.inf),
    ("activation_buffer__size_kib", "large"),
    ("activation_buffer__size_kib", "256"),
    ("activation_buffer__size_kib", True),
    ("operand_store__banks", 0),
    ("operand_store__banks", 4097),
    ("operand_store__fill_words_per_cycle", 0),
    ("weights__dense_port_bits", 0),
    ("weights__sign_kib", 0),
    ("output__words_per_cycle", 0),
    ("precision__weight_bits", 1),
    ("precision__weight_bits", 17),
    ("precision__magnitude_bits", 0),
    ("precision__activation_bits", 17),
    ("precision__accumulator_bits", 63),
    ("clock_mhz", 0),
    ("clock_mhz", -1000),
    ("clock_mhz", math.nan),
    ("clock_mhz", "1000"),
    ("dram__gb_per_s", 0),
    ("dram__gb_per_s", math.nan),
    ("dram__burst_bytes", 0),
    ("dram__burst_bytes", 1.5),
    ("dram__pj_per_bit", -1),
    ("dram__pj_per_bit", math.nan),
    ("dram__pj_per_bit", True),
    ("features__skip_pruned", "perhaps"),
    ("features__skip_pruned", "off"),
    ("features__unified_path", 1),
    ("features__row_balance", "sort"),
    ("name", ""),
    ("name", 5),
    ("array", 5),
    ("dram", None),
]


@pytest.mark.parametrize(("path", "value"), BAD_VALUES, ids=[f"{path}={value}" for path, value in BAD_VALUES])
def test_a_bad_value_is_refused_at_its_field(path: str, value: Any) -> None:
    found = problems_of(machine_dict(**{path: value}))
    field = path.replace("__", ".")
    assert len(found) == 1
    [name] = found
    assert name == field or name.startswith(f"{field}.")
    if not isinstance(value, list):
        assert f"found {value!r}" in found[name]


@pytest.mark.parametrize(
    "path", ["name", "clock_mhz", "array", "array__rows", "dram__burst_bytes", "weights__type_kib"]
)
def test_a_missing_field_is_named(path: str) -> None:
    data = machine_dict()
    part, _, field = path.partition("__")
    if field:
        del data[part][field]
    else:
        del data[part]
    assert problems_of(data) == {path.replace("__", "."): "missing (required)"}


def test_every_problem_is_reported_at_once() -> None:
    data = machine_dict(array__colums=3, array__rows=-2, dram__gb_per_s=math.nan, typo=1)
    del data["output"]
    assert set(problems_of(data)) == {"array.colums", "array.rows", "dram.gb_per_s", "typo", "output"}


def test_a_rate_of_many_decimals_is_refused() -> None:
    """Cycles of transfers are exact rationals of the decimal; a third of a GB/s has none."""
    assert "six decimals" in problems_of(machine_dict(dram__gb_per_s=1 / 3))["dram"]
    assert "six decimals" in problems_of(machine_dict(clock_mhz=1000 / 3))["clock_mhz"]
    parse_machine(machine_dict(dram__gb_per_s=0.333333), "m.toml")


# ---------------------------------------------------------------- parts that do not fit together


def test_a_store_that_holds_no_word_cannot_feed_a_pass() -> None:
    """A word is g_k x C x 8 bits = 2 x 3 x 8 = 48 bits: both halves need 12 bytes."""
    small_machine(operand_store__size_kib=12 / 1024)
    found = problems_of(machine_dict(operand_store__size_kib=11 / 1024))
    assert "no pass can be fed" in found["operand_store.size_kib"]
    assert f"at least {12 / 1024} KiB" in found["operand_store.size_kib"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"operand_store__size_kib": 1 / 1024, "array__columns": 37}, "operand_store__size_kib"),
        ({"operand_store__size_kib": 1 / 1024, "precision__activation_bits": 3}, "operand_store__size_kib"),
        ({"weights__dense_kib": 1 / 1024, "array__rows": 379}, "weights__dense_kib"),
    ],
)
def test_the_size_that_a_message_asks_for_is_enough(changes: dict[str, Any], field: str) -> None:
    """Figures of seven digits and more, and half bytes."""
    changes = {f"weights__{name}_kib": 4 for name in ("type", "sign", "magnitude")} | changes
    text = problems_of(machine_dict(**changes))[field.replace("__", ".")]
    asked = re.search(r"at least ([0-9.e-]+) KiB", text)
    assert asked is not None
    small_machine(**(changes | {field: float(asked[1])}))


@pytest.mark.parametrize(
    ("field", "bytes_needed"), [("dense_kib", 4), ("sign_kib", 1), ("magnitude_kib", 1), ("type_kib", 1)]
)
def test_a_row_that_cannot_hold_one_block_cannot_be_fed(field: str, bytes_needed: int) -> None:
    """2 x 2 blocks of 8 bits, two rows: 4 bytes of dense weights, 4 bits of signs, 8 of magnitude, 2 of type."""
    small_machine(**{f"weights__{field}": 2 * bytes_needed / 1024})
    found = problems_of(machine_dict(**{f"weights__{field}": (2 * bytes_needed - 1) / 1024}))
    assert "the row cannot be fed" in found[f"weights.{field}"]


def test_a_large_block_fails_every_memory_that_it_outgrows() -> None:
    found = problems_of(machine_dict(array__block=[256, 256]))
    assert set(found) == {"operand_store.size_kib", "weights.dense_kib", "weights.sign_kib"}


def test_a_dense_machine_needs_no_sign_memory() -> None:
    """Its block is then fed from the dense memory alone."""
    off = {"features__skip_pruned": False, "features__unified_path": False}
    tiny = {f"weights__{name}_kib": 1 / 1024 for name in ("type", "sign", "magnitude")}
    machine = small_machine(**off, **tiny)
    assert machine.is_dense
    assert set(problems_of(machine_dict(**tiny))) == {
        f"weights.{name}_kib" for name in ("type", "sign", "magnitude")
    }


@pytest.mark.parametrize("part", ["activation_buffer", "operand_store", "output"])
def test_a_buffer_is_a_whole_number_of_bytes(part: str) -> None:
    assert (
        "whole number of bytes" in problems_of(machine_dict(**{f"{part}__size_kib": 0.1}))[f"{part}.size_kib"]
    )


# ---------------------------------------------------------------- changes


def test_with_fields_changes_what_it_names_only() -> None:
    machine = small_machine()
    other = machine.with_fields({"array.rows": 3, "features.row_balance": "sorted", "name": "new"})
    assert (other.array.rows, other.features.row_balance, other.name) == (3, "sorted", "new")
    assert other.with_fields({"array.rows": 2, "features.row_balance": "none", "name": "small"}) == machine


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("array.row", '"array.rows"'),
        ("rows", "array.rows"),
        ("arry.rows", '"array.rows"'),
        ("array", "array."),
        ("array.rows.more", "array.rows"),
        ("", "allowed"),
    ],
)
def test_with_fields_refuses_names_it_does_not_know(field: str, hint: str) -> None:
    with pytest.raises(InputError, match="no such field") as caught:
        small_machine().with_fields({field: 1})
    assert hint in str(caught.value)


def test_with_fields_validates_the_result_and_names_all_unknown_fields() -> None:
    with pytest.raises(InputError, match=r"array\.rows"):
        small_machine().with_fields({"array.rows": 0})
    with pytest.raises(InputError) as caught:
        small_machine().with_fields({"a.b": 0, "c": 1})
    assert [problem.field for problem in caught.value.problems] == ["a.b", "c"]


def test_field_names_are_those_of_the_description() -> None:
    names = Machine.field_names()
    assert len(names) == len(set(names))
    flat = []
    for name, value in json.loads(small_machine().to_json()).items():
        flat += [f"{name}.{field}" for field in value] if isinstance(value, dict) else [name]
    assert sorted(names) == sorted(flat)


def test_html_view_has_every_field() -> None:
    html = small_machine()._repr_html_()
    for name in Machine.field_names():
        assert f"<td>{name}</td>" in html
