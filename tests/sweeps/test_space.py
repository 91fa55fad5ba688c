"""Design spaces: their points and keys, the machines that follow a block shape, every problem of a bad one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sweeps
import sweeps.space
from hwsim.errors import InputError
from hwsim.machine import Machine, load_machine
from hwsim.technology import technology_names
from sweeps.space import Space, load_space, machine_for_block, parse_space

BASE = load_machine("msa-16x16")
OTHER_TABLE = next(name for name in technology_names() if name != BASE.technology.table)
SMALL = {"networks": ["lenet-5"], "blocks": ["4x4"], "ratios": [[0.5, 0.5]], "random": {}}


def problems_of(**data: object) -> dict[str, str]:
    with pytest.raises(InputError) as caught:
        Space(**data)
    return {problem.field: f"{problem.message} ({problem.hint})" for problem in caught.value.problems}


def only_point(**changes: object):
    (point,) = Space(**(SMALL | changes)).points()
    return point


def area_mm2(machine: Machine) -> float:
    """A stand-in for the technology table: lanes and accumulators of all PEs."""
    g_o, g_k = machine.array.block
    array = machine.array
    return array.rows * array.columns * (array.multipliers + array.sign_adders + 2 * g_o + g_k) * 1e-4


# ------------------------------------------------------------------------------------------------ the product


def test_points_are_the_product_with_machine_fields_fastest():
    space = Space(
        networks=["a", "b"],
        blocks=["4x4", "1x16"],
        ratios=[[0.5, 0.5], [0.75, 0.25]],
        hold=["lanes", "area"],
        seeds=[0, 1],
        random={},
        machine={"base": "msa-16x16", "axes": {"dram.gb_per_s": [6.4, 12.8], "clock_mhz": [500, 1000]}},
    )
    points = list(space.points())
    assert len(points) == len(space) == 2**7
    assert len({point.key for point in points}) == len(points)
    assert [point.fields for point in points[:4]] == [
        (("dram.gb_per_s", bandwidth), ("clock_mhz", clock))
        for bandwidth in (6.4, 12.8)
        for clock in (500.0, 1000.0)
    ]
    runs = [point.training_key for point in points]
    changes = sum(before != after for before, after in itertools.pairwise(runs))
    assert changes == len(set(runs)) - 1, "points with the same weights follow each other"
    assert list(space.points()) == points


def test_len_counts_without_making_the_points():
    axes = {"dram.gb_per_s": [1 + i / 10 for i in range(100)], "clock_mhz": [float(i) for i in range(1, 101)]}
    space = Space(**SMALL | {"seeds": list(range(100)), "machine": {"base": "msa-16x16", "axes": axes}})
    assert len(space) == 10**6
    assert next(space.points()).seed == 0


def test_machine_fields_reach_the_machine():
    point = only_point(machine={"base": "msa-16x16", "axes": {"dram.gb_per_s": [3]}})
    machine = point.machine(area_mm2)
    assert machine == BASE.with_fields({"dram.gb_per_s": 3.0})
    assert point.columns()["dram.gb_per_s"] == 3.0


# ------------------------------------------------------------------------------------------------ keys


def test_key_is_stable_across_processes():
    code = (
        "from sweeps.space import Space\n"
        f"(point,) = Space(**{SMALL!r}).points()\n"
        "print(point.key, point.training_key, point.dense_key)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    point = only_point()
    assert run.stdout.split() == [point.key, point.training_key, point.dense_key]
    assert len(point.key) == 64
    assert int(point.key, 16) >= 0


@pytest.mark.parametrize(
    "changes",
    [
        {"networks": ["lenet-300-100"]},
        {"blocks": ["8x4"]},
        {"ratios": [[0.5, 0.25]]},
        {"ratios": [[0.25, 0.5]]},
        {"hold": "area"},
        {"seeds": [1]},
        {"batch": 2},
        {"random": {"exempt": "none"}},
        {"random": None, "training": {}},
        *(
            {"machine": {"base": BASE.with_fields({name: value})}}
            for name, value in [
                ("array.columns", 15),
                ("array.multipliers", 5),
                ("front_end.skip_window", 9),
                ("dram.gb_per_s", 12.9),
                ("features.row_balance", "sorted"),
                ("technology.table", OTHER_TABLE),
                ("precision.magnitude_bits", 7),
            ]
        ),
    ],
)
def test_key_changes_with_every_input(changes):
    assert only_point(**changes).key != only_point().key


@pytest.mark.parametrize(
    "field", ["train_images", "test_images", "batch_size", "dense_epochs", "admm_epochs"]
)
def test_training_settings_are_part_of_the_keys(field):
    points = [only_point(random=None, training={field: value}) for value in (10, 11)]
    assert points[0].key != points[1].key
    assert points[0].training_key != points[1].training_key
    shares_dense = points[0].dense_key == points[1].dense_key
    assert shares_dense == (field in {"test_images", "admm_epochs"})


def test_versions_are_part_of_the_keys(monkeypatch):
    before = only_point()
    keys = before.key, before.training_key
    monkeypatch.setattr(sweeps.space, "MODEL_VERSION", "next")
    after = only_point()
    assert after.key != keys[0]
    assert after.training_key == keys[1], "a new cycle model needs no new training"
    monkeypatch.setattr(sweeps.space, "METHOD_VERSION", "next")
    assert only_point().training_key != keys[1]


def test_weights_are_shared_by_points_that_differ_in_the_machine_only():
    machine = {"base": "msa-16x16", "axes": {"dram.gb_per_s": [6.4, 12.8], "array.columns": [8, 16]}}
    space = Space(**SMALL | {"machine": machine, "hold": ["lanes", "area"]})
    assert len({point.key for point in space.points()}) == 8
    assert len({point.training_key for point in space.points()}) == 1


def test_training_settings_have_a_name_of_their_own():
    names = {
        only_point(random=None, training={"admm_epochs": epochs}, seeds=[seed]).columns()["training_settings"]
        for epochs in (1, 2)
        for seed in (0, 1)
    }
    assert len(names) == 2
    assert only_point().columns()["training_settings"].startswith("randomtypes-")


def test_number_formats_belong_to_the_training():
    bits = {"base": "msa-16x16", "axes": {"precision.weight_bits": [4, 8]}}
    assert len({point.training_key for point in Space(**SMALL | {"machine": bits}).points()}) == 2


def test_the_same_machine_said_differently_has_the_same_key():
    axis = {"base": "msa-16x16", "axes": {"dram.gb_per_s": [12.8]}}
    integer = {"base": "msa-16x16", "axes": {"clock_mhz": [1000]}}
    assert only_point(machine=axis).key == only_point().key
    assert only_point(machine=integer).key == only_point().key
    assert only_point(ratios=[[0.0, 1]]).key == only_point(ratios=[(-0.0, 1.0)]).key


def test_content_of_a_technology_file_is_part_of_the_key(tmp_path):
    table = tmp_path / "mine.toml"
    keys = []
    for base in (BASE.technology.table, OTHER_TABLE):
        table.write_text(f'base = "{base}"')
        keys.append(only_point(machine={"base": BASE.with_fields({"technology.table": str(table)})}).key)
    assert keys[0] != keys[1]


def test_unknown_technology_is_refused_with_the_space():
    axes = {"technology.table": [BASE.technology.table, BASE.technology.table[:-1]]}
    found = problems_of(**SMALL | {"machine": {"base": "msa-16x16", "axes": axes}})
    assert f'did you mean "{BASE.technology.table}"' in found["machine.technology.table"]


def test_resolved_is_plain_json_and_hashes_to_the_key():
    resolved = only_point().resolved()
    assert json.loads(json.dumps(resolved)) == resolved
    assert resolved["machine"] == json.loads(BASE.to_json())


def test_space_resolves_to_itself():
    space = Space(**SMALL | {"machine": {"base": "msa-16x16", "axes": {"clock_mhz": [500]}}})
    again = Space(**json.loads(json.dumps(space.resolved())))
    assert [point.key for point in again.points()] == [point.key for point in space.points()]


# ------------------------------------------------------------------------------------------------ files


TOML = """
name = "first light"
networks = ["lenet-5"]
blocks = ["4x4", "8x1"]
ratios = [[0.5, 0.5], [0.3, 0.7]]
hold = ["lanes", "area"]
seeds = [1]

[machine]
base = "mine.toml"
[machine.axes]
"dram.gb_per_s" = [6.4, 12.8]

[training]
dataset = "fashion-mnist"
train_images = 1000
"""


def test_file_with_a_machine_beside_it(tmp_path):
    from importlib import resources

    preset = resources.files("hwsim").joinpath("presets", "msa-16x16.toml").read_text("utf-8")
    (tmp_path / "mine.toml").write_text(preset.replace('name = "msa-16x16"', 'name = "mine"'))
    (tmp_path / "space.toml").write_text(TOML)
    space = load_space(tmp_path / "space.toml", networks=["lenet-5"], datasets=["fashion-mnist"])
    assert len(space) == 2 * 2 * 2 * 2
    assert {point.base.name for point in space.points()} == {"mine"}
    assert space.training is not None
    assert space.training.train_images == 1000


@pytest.mark.parametrize(
    ("content", "message"), [(b"networks = [", "not valid TOML"), (b"\xff\xfe", "cannot be read")]
)
def test_file_that_is_no_toml(tmp_path, content, message):
    path = tmp_path / "space.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_space(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_space(tmp_path / "missing.toml")


# ------------------------------------------------------------------------------------------------ bad input


def test_every_problem_at_once_with_the_nearest_name():
    found = problems_of(
        networks=["lenet-5"],
        blocks=["4x4", "4by4", "0x4", "257x1"],
        ratios=[[0.6, 0.6], [0.5], [-0.1, 0.5], [math.nan, 0]],
        hold="lane",
        sedes=[0],
        seeds=[-1],
        random={"exemt": "none"},
        machine={"base": "msa-16x61", "axes": {}},
    )
    assert {"blocks.1", "blocks.2", "blocks.3", "ratios.0", "ratios.1.1", "ratios.2.0", "ratios.3.0"} <= set(
        found
    )
    assert "p + u exceeds 1" in found["ratios.0"]
    assert 'did you mean "seeds"' in found["sedes"]
    assert 'did you mean "exempt"' in found["random.exemt"]
    assert 'did you mean "msa-16x16"' in found["machine.base"]
    assert "'lanes' or 'area'" in found["hold.0"]
    assert "greater than or equal to 0" in found["seeds.0"]
    assert not {"blocks.0", "networks.0"} & set(found)


def test_machine_axes_are_checked_value_by_value():
    axes = {
        "dram.gbs": [1],
        "array.rows": [16, 0, "many"],
        "clock_mhz": [1000, 1000.0],
        "array.block": [[4, 4]],
        "dram": [1],
        "array.columns": [],
    }
    found = problems_of(**SMALL | {"machine": {"base": "msa-16x16", "axes": axes}})
    assert 'did you mean "dram.gb_per_s"' in found["machine.axes.dram.gbs"]
    assert "greater than or equal to 1" in found["machine.axes.array.rows: 0"]
    assert "machine.axes.array.rows: 'many'" in found
    assert "listed twice" in found["machine.axes.clock_mhz"]
    assert "under `blocks`" in found["machine.axes.array.block"]
    assert "no such machine field" in found["machine.axes.dram"]
    assert "empty" in found["machine.axes.array.columns"]


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"networks": []}, "networks", "empty"),
        ({"networks": ["a", "a"]}, "networks", "'a' is listed twice"),
        ({"ratios": [[0.5, 0.5], [0.50, 0.5]]}, "ratios", "listed twice"),
        ({"blocks": ["4x4", "04x4"]}, "blocks", "'4x4' is listed twice"),
        ({"blocks": "4x4"}, "blocks", "list"),
        ({"hold": "lane"}, "hold.0", 'did you mean "lanes"'),
        ({"random": None}, "training, random", "neither is given"),
        ({"training": {}}, "training, random", "both are given"),
        ({"blocks": ["3x1"]}, "blocks: 3x1", "64 accumulators per column"),
        ({"seeds": [0.5]}, "seeds.0", "integer"),
        ({"batch": 0}, "batch", "greater than or equal to 1"),
        (
            {"machine": {"base": "msa-16x16", "axes": {"array.rows": [16, 9]}}, "blocks": ["8x1"]},
            "blocks: 8x1",
            "36 acc",
        ),
    ],
)
def test_bad_spaces(changes, field, message):
    assert message in problems_of(**SMALL | changes)[field]


def test_unknown_names_are_reported_beside_the_other_problems():
    data = {"networks": ["lenet5"], "blocks": ["4"], "ratios": [[0, 1]], "training": {"dataset": "fashion"}}
    with pytest.raises(InputError) as caught:
        parse_space(data, "space.toml", networks=["lenet-5", "vgg-16"], datasets=["fashion-mnist"])
    text = str(caught.value)
    assert text.startswith("space.toml: 3 problems")
    assert 'did you mean "lenet-5"?' in text
    assert 'did you mean "fashion-mnist"?' in text
    assert "blocks.0" in text


@given(
    st.dictionaries(
        st.sampled_from([*Space.model_fields, "bogus"]),
        st.one_of(
            st.none(),
            st.integers(-2, 3),
            st.text(max_size=4),
            st.lists(
                st.one_of(st.sampled_from(["4x4", "1x1"]), st.lists(st.floats(), max_size=3)), max_size=2
            ),
            st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
        ),
    )
)
@settings(deadline=None, max_examples=150)
def test_any_data_gives_a_space_or_an_input_error(data):
    try:
        space = Space(**data)
    except InputError:
        return
    assert len(space) == len(list(space.points())) > 0


# ------------------------------------------------------------------------------------------------ machines


@pytest.mark.parametrize("block", [(1, 4), (4, 1), (2, 2), (1, 16), (16, 1), (16, 16), (64, 3)])
def test_lanes_move_block_and_rows_only(block):
    machine = machine_for_block(BASE, block, "lanes", area_mm2)
    assert machine.array.rows * block[0] == 64
    assert machine == BASE.with_fields({"array.block": list(block), "array.rows": 64 // block[0]})


@pytest.mark.parametrize("hold", ["lanes", "area"])
def test_the_base_block_gives_the_base_machine(hold):
    assert machine_for_block(BASE, BASE.array.block, hold, area_mm2) == BASE


@given(
    st.sampled_from([(1, 4), (2, 2), (4, 1), (4, 8), (8, 8), (16, 16), (64, 1)]),
    st.integers(1, 64),
    st.sampled_from([1, 4, 16, 64]),
)
@settings(deadline=None, max_examples=60)
def test_area_takes_the_most_columns_that_fit(block, columns, adders):
    base = BASE.with_fields({"array.columns": columns, "array.sign_adders": adders})
    one_column = machine_for_block(base.with_fields({"array.columns": 1}), block, "lanes", area_mm2)
    if area_mm2(one_column) > area_mm2(base):
        with pytest.raises(InputError, match="one column alone"):
            machine_for_block(base, block, "area", area_mm2)
        return
    machine = machine_for_block(base, block, "area", area_mm2)
    assert area_mm2(machine) <= area_mm2(base)
    one_more = machine.with_fields({"array.columns": machine.array.columns + 1})
    assert area_mm2(one_more) > area_mm2(base)
    assert machine.array.rows * block[0] == base.array.rows * base.array.block[0]


def test_area_stops_where_a_word_no_longer_fits_the_operand_store():
    base = BASE.with_fields({"operand_store.size_kib": 2.0})
    machine = machine_for_block(base, (4, 16), "area", lambda machine: 1.0)
    assert machine.word_bits == 1024 * 8
    with pytest.raises(InputError, match="no pass can be fed"):
        machine.with_fields({"array.columns": machine.array.columns + 1})


def test_accumulators_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match=r"64 accumulators.*do not divide by 3.*1, 2, 4, 8, 16, 32, 64"):
        machine_for_block(BASE, (3, 4), "lanes", area_mm2)
    with pytest.raises(InputError, match='did you mean "lanes"'):
        machine_for_block(BASE, (4, 4), "lane", area_mm2)  # type: ignore[arg-type]


def test_a_machine_that_cannot_be_is_refused_at_its_point():
    point = dataclasses.replace(only_point(), block=(16, 16), fields=(("weights.dense_kib", 0.25),))
    with pytest.raises(InputError, match="cannot be fed"):
        point.machine(area_mm2)


def test_importing_the_package_is_cheap():
    code = "import sys, sweeps, sweeps.space; print({'torch', 'numba', 'pandas', 'pyarrow', 'matplotlib'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_every_exported_name_can_be_had():
    assert all(getattr(sweeps, name) is not None for name in sweeps.__all__)
    with pytest.raises(AttributeError, match="bogus"):
        sweeps.bogus  # noqa: B018


def test_every_problem_at_once():
    """Those of single fields and those that only all fields together show."""
    found = problems_of(
        **SMALL
        | {
            "networks": ["a", "a"],
            "blocks": ["4by4"],
            "seeds": [-1],
            "training": {"epochs": 3},
            "machine": {"base": "msa-16x16", "axes": {"dram.gb_per_sec": [1.0], "array.rows": [0]}},
        }
    )
    assert set(found) == {
        "networks",
        "blocks.0",
        "seeds.0",
        "training.epochs",
        "training, random",
        "machine.axes.dram.gb_per_sec",
        "machine.axes.array.rows: 0",
    }
    assert 'did you mean "dram.gb_per_s"' in found["machine.axes.dram.gb_per_sec"]
    assert "unknown field" in found["training.epochs"]


def test_every_problem_at_once_of_machine_and_blocks():
    """What is checked of the parts together does not wait until the fields by themselves are right."""
    found = problems_of(
        **SMALL
        | {
            "blocks": ["3x4", "4by4"],
            "seeds": [-1],
            "machine": {"base": "msa-16x16", "axes": {"array.rows": [16, 24], "dram.gb_per_s": []}},
        }
    )
    assert set(found) == {"blocks.1", "seeds.0", "blocks: 3x4", "machine.axes.dram.gb_per_s"}
    assert "64 accumulators" in found["blocks: 3x4"], "with 24 rows they divide"


def test_axes_are_checked_under_a_base_that_is_not_valid():
    axes = {
        "dram.gb_per_sec": [1.0],
        "array.rows": [0, 16, 16],
        "clock_mhz": ["fast"],
        "front_end.queue_depth": [],
        "technology.table": ["45nm-horowits"],
        "array.block": [[4, 4]],
    }
    found = problems_of(**SMALL | {"machine": {"base": "msa-16x61", "axes": axes}})
    assert set(found) == {
        "machine.base",
        "machine.axes.dram.gb_per_sec",
        "machine.axes.array.rows: 0",
        "machine.axes.array.rows",
        "machine.axes.clock_mhz: 'fast'",
        "machine.axes.front_end.queue_depth",
        "machine.technology.table",
        "machine.axes.array.block",
    }
    assert "greater than or equal to 1" in found["machine.axes.array.rows: 0"]
    assert "45nm-horowitz" in found["machine.technology.table"]


def test_a_machine_that_is_no_table_is_one_problem():
    assert set(problems_of(**SMALL | {"machine": 3})) == {"machine"}
    assert set(problems_of(**SMALL | {"machine": {"base": 3, "axes": 4}})) == {"machine.base", "machine.axes"}
