"""SQL over results: the tables of the store, read only, with friendly errors."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from hwsim.cli import cli
from hwsim.errors import InputError
from sweeps.query import run_query
from sweeps.store import ResultStore

pytest.importorskip("duckdb")


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    with ResultStore(tmp_path / "results", flush_points=1) as store:
        for number, block in enumerate(["4x4", "8x8", "4x4"]):
            store.append(
                [{"key": f"{number}", "block": block, "latency_cycles": 10 * number, "dram.gb_per_s": 6.4}],
                layers=[{"key": f"{number}", "layer": "fc", "macs": number}],
            )
    return store


def test_a_query_sees_every_point_once(store: ResultStore) -> None:
    found = run_query(
        store, "SELECT block, max(latency_cycles) AS most FROM points GROUP BY block ORDER BY block"
    )
    assert found.to_dict("list") == {"block": ["4x4", "8x8"], "most": [20, 10]}
    joined = run_query(
        store, "SELECT sum(layers.macs) AS macs FROM points JOIN layers USING (key) WHERE block = '4x4'"
    )
    assert joined["macs"].tolist() == [2]
    assert run_query(store, 'SELECT "dram.gb_per_s" FROM points')["dram.gb_per_s"].tolist() == [6.4] * 3
    store.compact()
    assert run_query(store, "SELECT count(*) AS n FROM points")["n"].tolist() == [3]


def test_a_query_changes_nothing_and_reaches_no_file(store: ResultStore, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()}
    (tmp_path / "secret.csv").write_text("a\n1\n")
    for sql in (
        "DELETE FROM points",
        "DROP VIEW points; SELECT 1",
        f"COPY points TO '{tmp_path / 'out.parquet'}'",
        f"SELECT * FROM '{tmp_path / 'secret.csv'}'",
        "SET enable_external_access = true",
    ):
        with contextlib.suppress(InputError):
            run_query(store, sql)
    assert not (tmp_path / "out.parquet").exists()
    assert {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()} == before
    with pytest.raises(InputError, match="disabled"):
        run_query(store, f"SELECT * FROM '{tmp_path / 'secret.csv'}'")
    assert run_query(store, "SELECT count(*) AS n FROM points")["n"].tolist() == [3]


def test_a_wrong_query_says_what_is_wrong(store: ResultStore) -> None:
    with pytest.raises(InputError, match="latency_cycles"):  # DuckDB names the nearest column
        run_query(store, "SELECT latency_cycle FROM points")
    with pytest.raises(InputError, match="tables: points, layers, energy, storage"):
        run_query(store, "SELECT * FROM point")
    with pytest.raises(InputError, match="syntax error"):
        run_query(store, "SELEC 1")


def test_without_the_package_it_says_what_to_install(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(InputError, match=r'pip install "hwsim\[query\]"'):
        run_query(store, "SELECT 1")


def test_from_the_command_line(store: ResultStore) -> None:
    def run(*more: str) -> str:
        sql = "SELECT block, latency_cycles FROM points ORDER BY latency_cycles"
        done = CliRunner().invoke(cli, ["query", str(store.path), sql, *more], catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    assert run().splitlines()[0].split() == ["block", "latency_cycles"]
    assert run("--format", "csv").splitlines() == ["block,latency_cycles", "4x4,0", "8x8,10", "4x4,20"]
    assert pd.read_json(io.StringIO(run("--format", "json")))["block"].tolist() == ["4x4", "8x8", "4x4"]
