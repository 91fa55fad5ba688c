"""A real scheduler and real workers on loopback: one is killed in the middle, nothing is lost, the result is the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from hwsim.errors import InputError
from sweeps.runner import SweepProgress, run_sweep
from sweeps.space import Space
from sweeps.store import ResultStore

pytest.importorskip("distributed")


def space() -> Space:
    """Enough points with passes of their own that a run has a middle: 8 tasks."""
    axes = {"front_end.skip_window": [1, 4, 8], "operand_store.banks": [4, 8]}
    return Space(
        networks=["lenet5"],
        blocks=["4x4"],
        ratios=[[0.5, 0.5], [0.25, 0.5]],
        seeds=[0, 1, 2, 3],
        machine={"base": "msa-16x16", "axes": axes},
        random={},
    )


def results(folder: Path) -> pd.DataFrame:
    return ResultStore(folder).to_frame()


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"DASK_DISTRIBUTED__WORKER__DAEMON": "False"} | environment,
    )


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    """The address of a scheduler, and its two worker processes."""
    found = tmp_path / "scheduler.json"
    scheduler = start(
        "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
        "--scheduler-file", str(found),
    )  # fmt: skip
    workers: list[subprocess.Popen[str]] = []
    try:
        deadline = time.monotonic() + 60
        while not found.exists() or not found.read_text():
            assert scheduler.poll() is None, scheduler.communicate()[1]
            assert time.monotonic() < deadline, "the scheduler does not start"
            time.sleep(0.1)
        address = pd.read_json(found, typ="series")["address"]
        for _ in range(2):
            workers.append(
                start(
                    "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard",
                    "--local-directory", str(tmp_path),
                )
            )  # fmt: skip
        yield address, workers
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.communicate()


def test_a_worker_killed_in_the_middle_loses_nothing(
    tmp_path: Path, cluster: tuple[str, list[subprocess.Popen[str]]]
) -> None:
    address, workers = cluster
    killed: list[int] = []

    def kill_one(now: SweepProgress) -> None:
        if not killed and 0 < now.points_done < now.points_total:
            workers[0].send_signal(signal.SIGKILL)
            killed.append(now.points_done)

    run_sweep(space(), tmp_path / "here", workers=1)
    result = run_sweep(space(), tmp_path / "there", scheduler=address, progress=kill_one)
    assert killed, "the run had a middle"
    assert workers[0].wait(30) == -signal.SIGKILL
    assert result.computed == len(space())
    pd.testing.assert_frame_equal(results(tmp_path / "here"), results(tmp_path / "there"))
    for table in ("layers", "energy", "storage"):
        here, there = (ResultStore(tmp_path / name).to_frame(table) for name in ("here", "there"))
        pd.testing.assert_frame_equal(here, there)
    assert run_sweep(space(), tmp_path / "there", scheduler=address).computed == 0


def test_no_scheduler_at_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.executors._CONNECT_SECONDS", 0.5)
    with pytest.raises(InputError, match=r"scheduler: found 'tcp://127\.0\.0\.1:9'"):
        run_sweep(space(), tmp_path, scheduler="tcp://127.0.0.1:9")
    with pytest.raises(InputError, match="scheduler: found 'nonsense://x'"):
        run_sweep(space(), tmp_path, scheduler="nonsense://x")


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r'pip install "hwsim\[cluster\]"'):
        run_sweep(space(), tmp_path, scheduler="tcp://127.0.0.1:9")


def test_a_local_cluster_from_the_command_line(tmp_path: Path) -> None:
    from hwsim.cli import cli

    (tmp_path / "space.toml").write_text(
        'networks = ["lenet5"]\nblocks = ["4x4"]\nratios = [[0.5, 0.5]]\n[random]\n'
        '[machine]\nbase = "msa-16x16"\n[machine.axes]\n"dram.gb_per_s" = [6.4, 12.8]\n'
    )
    arguments = [
        "sweep",
        str(tmp_path / "space.toml"),
        "--out",
        str(tmp_path / "out"),
        "--scheduler",
        "local",
        "--workers",
        "1",
    ]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert len(results(tmp_path / "out")) == 2
