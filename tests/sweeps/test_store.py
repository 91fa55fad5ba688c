"""The result store: what was written is read, whoever is killed, whatever fills up, however many write."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sweeps.parts
import sweeps.store
from hwsim.errors import FormatError, HwsimError, InputError
from sweeps.store import TABLES, PointReader, ResultStore


def rows_of(number: int) -> dict[str, list[dict[str, object]]]:
    """Everything that belongs to one point, made from its number."""
    key = f"{number:064x}"
    layers = ("conv1", "fc1")
    return {
        "points": [
            {
                "key": key,
                "network": "lenet-5",
                "block_rows": number % 3,
                "seed": number,
                "latency_cycles": 7 * number,
            }
        ],
        "layers": [{"key": key, "layer": name, "macs": number} for name in layers],
        "energy": [
            {"key": key, "layer": name, "component": part, "energy_pj": number / 3}
            for name in layers
            for part in ("dram", "multipliers")
        ],
        "storage": [{"key": key, "layer": name, "stream": "sign", "size_bits": number} for name in layers],
    }


def append(store: ResultStore, number: int) -> int:
    rows = rows_of(number)
    return store.append(rows["points"], layers=rows["layers"], energy=rows["energy"], storage=rows["storage"])


def expected_frames(numbers: range) -> dict[str, pd.DataFrame]:
    """The whole content as one writer that is never disturbed writes it."""
    frames = {}
    for table in TABLES:
        frame = pd.DataFrame([row for number in numbers for row in rows_of(number)[table]])
        order = ["block_rows", "seed"] if table == "points" else ["key"]
        frames[table] = frame.sort_values(order, kind="stable", ignore_index=True)
    return frames


def assert_holds(path: Path, numbers: range) -> None:
    """Every point of ``numbers`` is there once, in every table, for the store's reader and for pandas alone."""
    store = ResultStore(path)
    assert store.keys() == {f"{number:064x}" for number in numbers}
    for table, expected in expected_frames(numbers).items():
        found = store.to_frame(table)
        pd.testing.assert_frame_equal(found[list(expected)], expected)
        assert len(pd.read_parquet(path / table)) == len(expected)


def parts(path: Path, table: str = "points") -> list[Path]:
    return sorted((path / table).glob("*.parquet"))


# ------------------------------------------------------------------------------------------------ reading and writing


def test_what_is_written_is_read(tmp_path):
    with ResultStore(tmp_path / "results", flush_points=4) as store:
        assert [append(store, number) for number in range(10)] == [1] * 10
    assert_holds(tmp_path / "results", range(10))
    assert len(parts(tmp_path / "results")) == 3, "two full batches and the rest at the end"


def test_frame_does_not_depend_on_the_order_of_writing(tmp_path):
    numbers = list(range(12))
    random.Random(1).shuffle(numbers)
    with ResultStore(tmp_path, flush_points=5) as store:
        for number in numbers:
            append(store, number)
    assert_holds(tmp_path, range(12))


def test_points_that_are_stored_are_passed_over(tmp_path):
    with ResultStore(tmp_path) as store:
        append(store, 1)
        assert append(store, 1) == 0
    with ResultStore(tmp_path) as store:
        assert store.keys() == {f"{1:064x}"}
        assert append(store, 1) == 0
        assert append(store, 2) == 1
    assert_holds(tmp_path, range(1, 3))


def test_flush_policy(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sweeps.store.time, "monotonic", lambda: now[0])
    store = ResultStore(tmp_path, flush_points=3, flush_seconds=10)
    counts = []
    for number, seconds in enumerate([0, 9.9, 10, 11, 12, 13]):
        now[0] = seconds
        append(store, number)
        counts.append(len(parts(tmp_path)))
    assert counts == [0, 0, 1, 1, 1, 2]


def test_columns_of_their_own_and_missing_ones(tmp_path):
    with ResultStore(tmp_path, flush_points=1) as store:
        store.append([{"key": "a", "dram.gb_per_s": 6.4, "note": None, "error": "does not fit"}])
        store.append([{"key": "b", "dram.gb_per_s": 3, "features.skip_pruned": True}])
        store.append([{"key": "c", "technology.table": "22nm"}])
    frame = ResultStore(tmp_path).to_frame().set_index("key")
    known = [name for name in TABLES["points"] if name != "key"]
    assert list(frame.columns) == [*known, "dram.gb_per_s", "features.skip_pruned", "technology.table"]
    assert frame["dram.gb_per_s"].tolist()[:2] == [6.4, 3.0]
    assert frame.loc["a", "error"] == "does not fit"
    assert frame["seed"].isna().all()


def test_only_the_columns_asked_for(tmp_path):
    with ResultStore(tmp_path) as store:
        append(store, 3)
    assert list(store.to_frame(columns=["latency_cycles", "key"]).columns) == ["latency_cycles", "key"]
    assert (
        store.to_frame("energy", columns=["component"])["component"].tolist() == ["dram", "multipliers"] * 2
    )
    with pytest.raises(InputError, match='did you mean "latency_cycles"'):
        store.to_frame(columns=["latency_cycle"])
    with pytest.raises(InputError, match='did you mean "layers"'):
        store.to_frame("layer")


def test_numpy_values_and_exact_integers(tmp_path):
    with ResultStore(tmp_path) as store:
        store.append(
            [{"key": "a", "latency_cycles": np.int64(2**53 + 1), "energy_pj": np.float64(0.1), "seed": 3.0}]
        )
    row = store.to_frame().iloc[0]
    assert (row["latency_cycles"], row["energy_pj"], row["seed"]) == (2**53 + 1, 0.1, 3)


def test_reading_where_nothing_is(tmp_path):
    assert ResultStore(tmp_path / "none").keys() == set()
    assert not (tmp_path / "none").exists(), "reading makes no folder"
    with pytest.raises(InputError, match="no result store here"):
        ResultStore(tmp_path / "none").to_frame()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        ResultStore(tmp_path / "file")


def test_an_empty_store_has_the_columns(tmp_path):
    store = ResultStore(tmp_path)
    store.record_run({})
    for table, columns in TABLES.items():
        assert list(store.to_frame(table).columns) == list(columns)
        assert store.to_frame(table).empty


# ------------------------------------------------------------------------------------------------ bad rows


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        ({"network": "a"}, "points.key", "missing"),
        ({"key": 5}, "points.key", "int64"),
        ({"key": "a", "energy_pj": math.nan}, "points.energy_pj", "NaN or infinite"),
        ({"key": "a", "energy_pj": -math.inf}, "points.energy_pj", "NaN or infinite"),
        ({"key": "a", "mine": math.nan}, "points.mine", "NaN or infinite"),
        ({"key": "a", "latency_cycles": 1.5}, "points.latency_cycles", "truncated"),
        ({"key": "a", "latency_cycles": 2**63}, "points.latency_cycles", ""),
        ({"key": "a", "latency_cycles": "7"}, "points.latency_cycles", "string"),
        ({"key": "a", "latency_cycles": True}, "points.latency_cycles", "bool"),
        ({"key": "a", "energy_pj": 2**53 + 1}, "points.energy_pj", ""),
        ({"key": "a", "network": 3}, "points.network", "int64"),
        ({"key": "a", "mine": [1]}, "points.mine", "list"),
        ({"key": "a", "mine": b"x"}, "points.mine", "binary"),
        ({"key": "a", "mine": object()}, "points.mine", ""),
    ],
)
def test_values_that_a_column_cannot_hold(tmp_path, row, field, message):
    store = ResultStore(tmp_path)
    append(store, 1)
    with pytest.raises(InputError) as caught:
        store.append([row])
    assert any(problem.field == field and message in problem.message for problem in caught.value.problems)
    store.close()
    assert_holds(tmp_path, range(1, 2))


def test_rows_that_do_not_belong_together(tmp_path):
    store = ResultStore(tmp_path)
    with pytest.raises(InputError, match="there twice"):
        store.append([{"key": "a"}, {"key": "a"}])
    with pytest.raises(InputError, match="'b' is none of the points"):
        store.append([{"key": "a"}], layers=[{"key": "b", "layer": "conv1"}])
    store.append([{"key": "a", "mine": 1}])
    with pytest.raises(InputError, match="changed its type"):
        store.append([{"key": "b", "mine": "text"}])


# ------------------------------------------------------------------------------------------------ crashes


class Crash(BaseException):
    """Stands for the end of the process."""


_SYSTEM_CALLS = ("open", "fsync", "replace", "mkdir", "unlink", "stat", "scandir", "listdir")


class CrashAfter:
    """From its n-th system call on, the process does nothing any more: no cleaning up either."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.left = count
        for name in _SYSTEM_CALLS:
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name)))
        monkeypatch.setattr(Path, "open", self._wrap(Path.open))

    def _wrap(self, call):
        def counted(*args, **kwargs):
            if self.left <= 0:
                raise Crash
            self.left -= 1
            return call(*args, **kwargs)

        return counted


@pytest.mark.parametrize("second_batch", [False, True])
def test_a_crash_at_any_system_call_leaves_all_or_nothing_of_a_batch(tmp_path, monkeypatch, second_batch):
    monkeypatch.setattr(
        os, "fsync", lambda file: None
    )  # still counted as a moment to crash, but not waited for
    outcomes = set()
    with ResultStore(tmp_path / "whole") as store:
        append(store, 0)
    for count in range(1000):
        path = tmp_path / str(count)
        if second_batch:
            shutil.copytree(tmp_path / "whole", path)
        store = ResultStore(path)
        append(store, 1)
        append(store, 2)
        with pytest.MonkeyPatch.context() as patch:
            CrashAfter(patch, count)
            try:
                store.flush()
            except Crash:
                finished = False
            else:
                finished = True
        stored = ResultStore(path).keys()
        new = {f"{number:064x}" for number in (1, 2)}
        assert stored & new in (set(), new)
        assert f"{0:064x}" in stored or not second_batch
        outcomes.add(len(stored & new))
        with ResultStore(path) as resumed:
            for number in range(4):
                append(resumed, number)
        rows = [sum(pq.read_metadata(part).num_rows for part in parts(path, table)) for table in TABLES]
        assert rows == [4, 8, 16, 8], "no row is lost and none is there twice, in the files themselves"
        assert not list(path.rglob("*.tmp"))
        if finished:
            break
    assert finished
    assert_holds(path, range(4))
    assert outcomes == {0, 2}
    assert count > 20, "the test sees the system calls"


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from test_store import ResultStore, append
with ResultStore(sys.argv[2], flush_points=3, flush_seconds=1e9) as store:
    stored = store.keys()
    print("ready", flush=True)
    for number in range(int(sys.argv[3]), int(sys.argv[4])):
        if f"{number:064x}" not in stored:
            append(store, number)
"""


def start_writer(path: Path, first: int, end: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(path), str(first), str(end)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


KILLS = 24
KILLER = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import sweeps.store
from test_store import ResultStore, append
sweeps.store._PARTS_TO_MERGE = 3
for line in sys.stdin:
    writer = os.fork()
    if writer == 0:
        with ResultStore(sys.argv[2], flush_points=3, flush_seconds=1e9) as store:
            stored = store.keys()
            for number in range(100_000):
                if f"{number:064x}" not in stored:
                    append(store, number)
        os._exit(1)
    time.sleep(float(line))
    os.kill(writer, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]), flush=True)
"""


def test_killed_at_random_moments_and_resumed(tmp_path):
    """SIGKILL while it writes and merges parts: the crash test above covers every moment of a batch, this is the real thing."""
    chance = random.Random(5)
    path = tmp_path / "results"
    arguments = [sys.executable, "-c", KILLER, str(Path(__file__).parent), str(path)]
    killer = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert killer.stdin is not None
    assert killer.stdout is not None
    counts = [0]
    for _ in range(KILLS):
        killer.stdin.write(f"{chance.uniform(0.0, 0.4)}\n")
        killer.stdin.flush()
        assert int(killer.stdout.readline()) == -signal.SIGKILL
        stored = ResultStore(path).keys() if path.exists() else set()
        assert stored == {f"{number:064x}" for number in range(len(stored))}, (
            "a point was lost, or is none of ours"
        )
        assert len(stored) >= counts[-1]
        for part in path.rglob("*.parquet"):
            pq.read_metadata(part)
        counts.append(len(stored))
    killer.communicate()
    assert len(set(counts)) > KILLS // 4, "it was killed at work"
    with ResultStore(path) as store:
        for number in range(counts[-1] + 5):
            append(store, number)
    store.compact()
    assert_holds(path, range(counts[-1] + 5))
    assert not list(path.rglob("*.tmp"))
    assert [len(parts(path, table)) for table in TABLES] == [1] * 4


# ------------------------------------------------------------------------------------------------ few files


def test_small_parts_become_one_that_holds_the_same(tmp_path):
    with ResultStore(tmp_path, flush_points=2) as store:
        for number in range(20):
            append(store, number)
    before = {table: store.to_frame(table) for table in TABLES}
    reader = ResultStore(tmp_path)
    assert len(reader.keys()) == 20
    store.compact()
    assert [len(parts(tmp_path, table)) for table in TABLES] == [1] * 4
    assert_holds(tmp_path, range(20))
    for table, frame in before.items():
        pd.testing.assert_frame_equal(ResultStore(tmp_path).to_frame(table), frame)
        pd.testing.assert_frame_equal(reader.to_frame(table), frame)  # it had seen the small parts
    store.compact()
    assert len(parts(tmp_path)) == 1
    assert append(store, 3) == 0


def test_parts_are_merged_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps.store, "_PARTS_TO_MERGE", 4)
    with ResultStore(tmp_path, flush_points=1) as store:
        for number in range(19):
            append(store, number)
    assert_holds(tmp_path, range(19))
    assert len(parts(tmp_path)) == 4, "one of sixteen points and three of one"


def test_a_reader_reads_every_part_once(tmp_path, monkeypatch):
    """What others write and merge meanwhile included; the rows are those of the whole table."""
    read = []
    read_part = sweeps.store.read_part

    def noted(path, columns=None):
        if columns != ["key"]:
            read.append(path)
        return read_part(path, columns)

    monkeypatch.setattr(sweeps.store, "read_part", noted)
    store = ResultStore(tmp_path)
    reader = PointReader(store, ["latency_cycles", "error", "missing"])
    assert reader.rows(["p0"]).num_rows == 0
    for batch in range(3):
        with ResultStore(tmp_path) as other:
            other.append([{"key": f"p{2 * batch + i}", "latency_cycles": 10 * batch + i} for i in range(2)])
        found = reader.rows(["p0", f"p{2 * batch + 1}", "stranger"])
        assert found.column_names == ["key", "latency_cycles", "error", "missing"]
        expected = {("p0", 0), (f"p{2 * batch + 1}", 10 * batch + 1)}
        assert (
            set(zip(*(found[name].to_pylist() for name in ("key", "latency_cycles")), strict=True))
            == expected
        )
        assert found["missing"].null_count == found.num_rows
    assert len(read) == len(set(read)) == 3
    ResultStore(tmp_path).compact()
    read.clear()
    assert reader.rows([f"p{i}" for i in range(6)]).num_rows == 6
    assert len(read) == 1, "the merged part"


def test_large_parts_are_left_alone(tmp_path, monkeypatch):
    with ResultStore(tmp_path, flush_points=2) as store:
        for number in range(4):
            append(store, number)
    names = parts(tmp_path)
    monkeypatch.setattr(sweeps.store, "_WORTH_MERGING_BYTES", 1)
    store.compact()
    assert parts(tmp_path) == names


def test_merging_counts_a_point_that_is_there_twice_once(tmp_path):
    for name in ("first", "second"):
        with ResultStore(tmp_path / name) as store:
            append(store, 1)
            append(store, {"first": 2, "second": 3}[name])
    for table in TABLES:
        for part in parts(tmp_path / "second", table):
            (tmp_path / "first" / table / part.name).write_bytes(part.read_bytes())
    ResultStore(tmp_path / "first").compact()
    assert_holds(tmp_path / "first", range(1, 4))


def test_a_damaged_part_is_neither_merged_nor_removed(tmp_path):
    with ResultStore(tmp_path, flush_points=1) as store:
        for number in range(4):
            append(store, number)
    damaged = parts(tmp_path)[1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    ResultStore(tmp_path).compact()
    assert damaged.exists()
    assert len(parts(tmp_path)) == 2
    with pytest.raises(FormatError, match=damaged.name):
        ResultStore(tmp_path).keys()


def test_a_full_disk_while_merging_leaves_everything_as_it_was(tmp_path, monkeypatch):
    with ResultStore(tmp_path, flush_points=1) as store:
        for number in range(4):
            append(store, number)
    names = {table: parts(tmp_path, table) for table in TABLES}
    with pytest.MonkeyPatch.context() as patch:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(HwsimError, match="disk is full"):
            store.compact()
    assert {table: parts(tmp_path, table) for table in TABLES} == names
    assert_holds(tmp_path, range(4))


def test_arrow_tables_are_held_to_the_same_rules(tmp_path):
    store = ResultStore(tmp_path)
    good = {"key": ["a", "b"], "latency_cycles": [1, None], "mine": ["x", "y"]}
    assert store.append_tables({"points": pa.table(good)}) == 2
    for column, values, message in (
        ("key", ["c", None], "missing"),
        ("latency_cycles", [1.5, 2.0], "truncated"),
        ("energy_pj", [math.nan, 1.0], "NaN or infinite"),
        ("network", [1, 2], "int64"),
    ):
        with pytest.raises(InputError, match=message):
            store.append_tables({"points": pa.table({"key": ["c", "d"]} | {column: values})})
    store.close()
    assert ResultStore(tmp_path).to_frame(columns=["key", "mine"]).values.tolist() == [["a", "x"], ["b", "y"]]


def test_two_writers_at_once(tmp_path):
    """They overlap: each of the points in the middle is computed by both and stored once."""
    writers = [start_writer(tmp_path, 0, 40), start_writer(tmp_path, 20, 60)]
    assert [writer.communicate()[1] or writer.returncode for writer in writers] == [0, 0]
    assert_holds(tmp_path, range(60))


def test_writers_in_turn_do_not_store_a_point_twice(tmp_path):
    first, second = ResultStore(tmp_path), ResultStore(tmp_path)
    for store in (first, second):
        append(store, 1)
        append(store, 2)
    append(second, 3)
    first.close()
    second.close()
    assert_holds(tmp_path, range(1, 4))


def test_a_writer_waits_for_its_turn_and_says_when_it_never_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps.parts, "_LOCK_SECONDS", 0.0)
    first, second = ResultStore(tmp_path), ResultStore(tmp_path)
    append(second, 1)
    with first._turn(), pytest.raises(HwsimError, match="another process has held the store"):
        second.flush()
    second.close()
    assert_holds(tmp_path, range(1, 2))


def test_folders_copied_together_count_the_first_batch(tmp_path):
    """Both stores have point 1, with other numbers; all its rows come from the store that wrote it first."""
    for name, number in (("first", 10), ("second", 20)):
        with ResultStore(tmp_path / name) as store:
            store.append(
                [{"key": "a", "seed": number}], layers=[{"key": "a", "layer": "conv1", "macs": number}]
            )
            append(store, number)
    for table in ("points", "layers", "energy", "storage"):
        for part in parts(tmp_path / "second", table):
            (tmp_path / "first" / table / part.name).write_bytes(part.read_bytes())
    store = ResultStore(tmp_path / "first")
    points, layers = store.to_frame("points"), store.to_frame("layers")
    assert points["key"].is_unique
    assert len(points) == 3
    assert points.set_index("key").loc["a", "seed"] == 10
    assert layers.loc[layers["key"] == "a", "macs"].tolist() == [10]


# ------------------------------------------------------------------------------------------------ full disk


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("at", range(8))
def test_full_disk_leaves_the_store_whole_and_the_points_in_memory(tmp_path, monkeypatch, call, at):
    with ResultStore(tmp_path) as store:
        append(store, 0)
    store = ResultStore(tmp_path)
    append(store, 1)
    real, calls = getattr(os, call), []

    def full(*args):
        calls.append(args)
        if len(calls) > at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, call, full)
    failed = False
    try:
        store.flush()
    except HwsimError as error:
        failed = True
        text = str(error)
    monkeypatch.undo()
    if failed:
        assert "the disk is full" in text
        assert "No space left" in text
        assert "not computed again" in text
        assert not list(tmp_path.rglob("*.tmp"))
    assert failed == (len(calls) > at)
    assert ResultStore(tmp_path).keys() >= {f"{0:064x}"}
    store.close()
    assert_holds(tmp_path, range(2))


def test_a_real_limit_on_file_size(tmp_path):
    """The kernel refuses the write in the middle of a file."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from test_store import ResultStore, append, HwsimError\n"
        "store = ResultStore(sys.argv[2])\n"
        "append(store, 0)\n"
        "store.flush()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))\n"
        "append(store, 1)\n"
        "try:\n    store.flush()\nexcept HwsimError as error:\n    print(error)\n"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "the disk is full" in run.stdout
    assert_holds(tmp_path, range(1))
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights(tmp_path):
    tmp_path.chmod(0o500)
    store = ResultStore(tmp_path / "results")
    append(store, 1)
    with pytest.raises(HwsimError, match="check the folder and its rights"):
        store.flush()


def test_a_path_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    store = ResultStore(tmp_path / "file" / "results")
    append(store, 1)
    with pytest.raises(HwsimError, match="cannot be written"):
        store.flush()


# ------------------------------------------------------------------------------------------------ damage


@pytest.fixture(scope="module")
def small_store(tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "results"
    with ResultStore(path) as store:
        append(store, 1)
    return path


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_damaged_part_is_never_read_as_a_result(small_store, data):
    (part,) = parts(small_store, data.draw(st.sampled_from(["points", "layers"])))
    whole = part.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    part.write_bytes(
        whole[:at]
        if cut
        else whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    )
    try:
        with pytest.raises(FormatError) as caught:
            ResultStore(small_store).to_frame(part.parent.name)
    finally:
        part.write_bytes(whole)
    assert part.name in str(caught.value)
    assert "run the sweep again" in str(caught.value)


def test_deleting_a_damaged_part_costs_its_points_only(tmp_path):
    for number in (0, 1):
        with ResultStore(tmp_path) as store:
            append(store, number)
    part = parts(tmp_path)[0]
    part.write_bytes(b"")
    with pytest.raises(FormatError):
        ResultStore(tmp_path).keys()
    part.unlink()
    assert ResultStore(tmp_path).keys() == {f"{1:064x}"}
    assert ResultStore(tmp_path).to_frame("layers")["macs"].tolist() == [1, 1], (
        "no rows of points that are gone"
    )
    with ResultStore(tmp_path) as store:
        append(store, 0)
    assert_holds(tmp_path, range(2))


def test_damage_by_others_does_not_cost_results_in_memory(tmp_path):
    first, second = ResultStore(tmp_path), ResultStore(tmp_path)
    append(first, 0)
    append(second, 1)
    first.close()
    (part,) = parts(tmp_path)
    part.write_bytes(b"")
    second.close()
    part.unlink()
    assert ResultStore(tmp_path).keys() == {f"{1:064x}"}


def test_parts_of_another_version_are_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        for module in (sweeps.store, sweeps.parts):
            patch.setattr(module, "SCHEMA_VERSION", "99")
        with ResultStore(tmp_path) as store:
            append(store, 1)
    with pytest.raises(FormatError, match=r"store version '99', this program reads '1'"):
        ResultStore(tmp_path).to_frame()
    with pytest.raises(FormatError, match=r"store version '99', this program reads '1'"):
        ResultStore(tmp_path).manifest()


def test_other_files_beside_the_parts_are_left_alone(tmp_path):
    with ResultStore(tmp_path) as store:
        append(store, 1)
    note = tmp_path / "layers" / "note.txt"
    note.write_text("mine")
    with ResultStore(tmp_path) as store:
        append(store, 2)
    assert note.read_text() == "mine"


# ------------------------------------------------------------------------------------------------ manifest


def test_manifest_names_configuration_seeds_and_versions_once(tmp_path):
    configuration = {"name": "first", "seeds": [0, 1]}
    for _ in range(2):
        ResultStore(tmp_path).record_run(configuration)
    ResultStore(tmp_path).record_run({"name": "second"})
    runs = json.loads((tmp_path / "manifest.json").read_text())["runs"]
    assert [run["configuration"] for run in runs] == [configuration, {"name": "second"}]
    assert {"hwsim", "numpy", "torch", "python", "model"} <= set(runs[0]["versions"])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"runs": []}', '{"store_schema": "1", "runs": 3}'])
def test_damaged_manifest(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(FormatError, match=r"manifest\.json"):
        ResultStore(tmp_path).record_run({})
    assert (tmp_path / "manifest.json").read_text() == content


def test_parts_carry_version_and_compression(tmp_path):
    with ResultStore(tmp_path) as store:
        append(store, 1)
    metadata = pq.read_metadata(parts(tmp_path)[0])
    assert metadata.metadata[b"hwsim.store_schema"] == b"1"
    assert metadata.row_group(0).column(0).compression == "ZSTD"
