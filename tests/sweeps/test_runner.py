"""Sweeps: what is computed, what is reused, what survives an interruption, and what a point that does not fit gives."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import safetensors.torch
import torch

from compress.fit import Progress
from hwsim import simulate
from hwsim.kernels import are_compiled
from hwsim.layer import random_layers
from hwsim.machine import load_machine
from sweeps import tasks
from sweeps.batch import Grid
from sweeps.runner import SweepProgress, run_sweep
from sweeps.space import Space, Training, load_space
from sweeps.store import ResultStore

TINY = Training(
    dataset="digits", train_images=300, test_images=100, dense_epochs=1, admm_epochs=1, retrain_epochs=1
)


def random_space(**changes: object) -> Space:
    content: dict[str, object] = {
        "networks": ["lenet5"],
        "blocks": ["4x4", "8x8"],
        "ratios": [[0.5, 0.5], [0.25, 0.5]],
        "machine": {"base": "msa-16x16", "axes": {"dram.gb_per_s": [6.4, 12.8]}},
        "random": {},
    }
    return Space(**{**content, **changes})


def results(folder: Path) -> pd.DataFrame:
    return ResultStore(folder).to_frame().sort_values("key").reset_index(drop=True)


def test_every_point_once_and_nothing_twice(tmp_path: Path) -> None:
    first = run_sweep(random_space(), tmp_path)
    again = run_sweep(random_space(), tmp_path)
    assert (first.computed, first.reused) == (8, 0)
    assert (again.computed, again.reused) == (0, 8)
    frame = results(tmp_path)
    assert frame["key"].is_unique
    assert frame["error"].isna().all()
    assert (frame["speedup_with_memory"] > 1).all()


def test_the_bar_says_that_kernels_compile_until_the_first_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for compiled in (False, True):
        seen: list[SweepProgress] = []
        monkeypatch.setattr("sweeps.runner.are_compiled", lambda compiled=compiled: compiled)
        run_sweep(random_space(), tmp_path / str(compiled), details="none", progress=seen.append)
        told = [now.points_done for now in seen if "compiling kernels" in now.doing]
        assert told == ([] if compiled else [0]), "before the first result, and only there"


def test_what_is_compiled_is_known_from_the_files(tmp_path: Path) -> None:
    """Kernels that ran in this process are kept; where the folder of the compiled ones is empty, none is."""
    run_sweep(random_space(blocks=["4x4"], ratios=[[0.5, 0.5]]), tmp_path)
    assert are_compiled()
    command = [sys.executable, "-c", "from hwsim.kernels import are_compiled; print(are_compiled())"]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "empty")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_larger_space_computes_only_what_is_new(tmp_path: Path) -> None:
    run_sweep(random_space(ratios=[[0.5, 0.5]]), tmp_path)
    before = results(tmp_path)
    larger = run_sweep(random_space(), tmp_path)
    assert (larger.computed, larger.reused) == (4, 4)
    merged = before.merge(results(tmp_path), on="key", suffixes=("", "_after"))
    assert (merged["latency_cycles"] == merged["latency_cycles_after"]).all()


def test_a_point_is_what_simulate_says(tmp_path: Path) -> None:
    from compress.zoo_shapes import zoo_shapes

    space = random_space(blocks=["4x4"], ratios=[[0.5, 0.5]], machine={"base": "msa-16x16"}, seeds=[3])
    run_sweep(space, tmp_path)
    row = results(tmp_path).iloc[0]
    report = simulate(load_machine("msa-16x16"), random_layers(zoo_shapes("lenet5"), (4, 4), 0.5, 0.5, 3))
    for name in ("latency_cycles", "compute_cycles", "dram_bytes", "image_bytes"):
        assert row[name] == report.summary[name]
    assert row["energy_pj"] == pytest.approx(report.summary["energy_pj"])
    layers = ResultStore(tmp_path).to_frame("layers")
    assert layers["latency_cycles"].sum() == report.summary["latency_cycles"]
    storage = ResultStore(tmp_path).to_frame("storage")
    assert storage["size_bits"].sum() == 8 * report.summary["image_bytes"]


def stop_after(points: int) -> Callable[[SweepProgress], None]:
    def progress(now: SweepProgress) -> None:
        if now.points_done >= points:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    run_sweep(random_space(), whole)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(random_space(), pieces, progress=stop_after(3))
    kept = len(results(pieces))
    assert 3 <= kept < 8
    resumed = run_sweep(random_space(), pieces)
    assert (resumed.computed, resumed.reused) == (8 - kept, kept)
    pd.testing.assert_frame_equal(results(whole), results(pieces))


def test_a_point_that_does_not_fit_says_so_and_is_not_tried_again(tmp_path: Path) -> None:
    space = random_space(
        blocks=["4x4"],
        ratios=[[0.5, 0.5]],
        machine={"base": "msa-16x16", "axes": {"output.size_kib": [0.125, 64]}},
    )
    run_sweep(space, tmp_path)
    frame = results(tmp_path).set_index("output.size_kib")
    assert "output.size_kib" in frame.loc[0.125, "error"]
    assert pd.isna(frame.loc[0.125, "latency_cycles"])
    assert frame.loc[64, "latency_cycles"] > 0
    assert run_sweep(space, tmp_path).computed == 0


def test_one_training_serves_every_machine(tmp_path: Path) -> None:
    space = random_space(blocks=["4x4"], ratios=[[0.5, 0.5]], random=None, training=TINY)
    seen: list[SweepProgress] = []
    result = run_sweep(space, tmp_path, workers=1, progress=seen.append)
    assert result.computed == 2
    assert len(list((tmp_path / "artifacts").iterdir())) == 1
    frame = results(tmp_path)
    assert frame["accuracy_integer"].nunique() == 1
    assert frame["accuracy_integer"].between(0, 1).all()
    assert frame["file_bytes"].iloc[0] == next((tmp_path / "artifacts").iterdir()).stat().st_size
    assert seen[-1].done == pytest.approx(seen[-1].total)
    assert all(a.done <= b.done for a, b in itertools.pairwise(seen))
    # A machine that was not there before needs no training: the artifact is younger than nothing new.
    wider = random_space(
        blocks=["4x4"],
        ratios=[[0.5, 0.5]],
        random=None,
        training=TINY,
        machine={"base": "msa-16x16", "axes": {"dram.gb_per_s": [6.4, 12.8, 25.6]}},
    )
    stamp = next((tmp_path / "artifacts").iterdir()).stat().st_mtime_ns
    assert run_sweep(wider, tmp_path, workers=1).computed == 1
    assert next((tmp_path / "artifacts").iterdir()).stat().st_mtime_ns == stamp


def test_a_stopped_training_goes_on_from_its_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a worker does when it is told to stop, and when the task comes back."""
    training = TINY.model_copy(update={"dense_epochs": 4, "train_images": 100})
    point = Grid(random_space(random=None, training=training)).point(0)
    seen: list[tuple[str, str, Progress]] = []
    monkeypatch.setattr(tasks._Reporting, "send", staticmethod(seen.append))
    whole = tasks.train("dense", point, None, None)
    monkeypatch.setattr(tasks._Reporting, "stopped", staticmethod(lambda: len(seen) >= 4 + 2))
    with pytest.raises(tasks.Stopped):
        tasks.train("dense", point, None, tmp_path / "state")
    seen.clear()
    resumed = tasks.train("dense", point, None, tmp_path / "state")
    assert [update.epoch for _, _, update in seen] == [3, 4]
    tensors = [safetensors.torch.load(content) for content in (whole, resumed)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(values, tensors[1][name]) for name, values in tensors[0].items())


def test_an_interrupted_sweep_keeps_the_state_of_its_training_until_it_is_done(tmp_path: Path) -> None:
    training = TINY.model_copy(update={"dense_epochs": 3})
    space = random_space(blocks=["4x4"], ratios=[[0.5, 0.5]], random=None, training=training)

    def stop(now: SweepProgress) -> None:
        if now.done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(space, tmp_path, workers=1, progress=stop)
    assert len(list((tmp_path / "unfinished").iterdir())) == 1
    assert run_sweep(space, tmp_path, workers=1).computed == 2
    assert list((tmp_path / "unfinished").iterdir()) == []


def test_a_damaged_artifact_is_an_error_not_a_result(tmp_path: Path) -> None:
    from hwsim.errors import FormatError

    space = random_space(blocks=["4x4"], ratios=[[0.5, 0.5]], random=None, training=TINY)
    run_sweep(space, tmp_path, workers=1)
    artifact = next((tmp_path / "artifacts").iterdir())
    content = bytearray(artifact.read_bytes())
    content[len(content) // 2] ^= 1
    artifact.write_bytes(content)
    wider = space.model_copy(update={"machine": random_space(machine={"base": "msa-8x8"}).machine})
    with pytest.raises(FormatError, match=artifact.name):
        run_sweep(wider, tmp_path, workers=1)


def test_a_large_space_is_evaluated_by_processes_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = random_space()
    run_sweep(space, tmp_path / "here")
    monkeypatch.setattr("sweeps.runner._WORTH_PROCESSES", 1)
    result = run_sweep(space, tmp_path / "processes", workers=2)
    assert result.computed == 8
    pd.testing.assert_frame_equal(results(tmp_path / "here"), results(tmp_path / "processes"))


def test_rows_of_layers_are_kept_where_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = random_space(blocks=["4x4"], ratios=[[0.5, 0.5]])
    run_sweep(space, tmp_path / "none", details="none")
    assert ResultStore(tmp_path / "none").to_frame("layers").empty
    monkeypatch.setattr("sweeps.runner._DETAIL_POINTS", 1)
    run_sweep(space, tmp_path / "auto")
    assert ResultStore(tmp_path / "auto").to_frame("energy").empty
    run_sweep(space, tmp_path / "all", details="all")
    layers = ResultStore(tmp_path / "all").to_frame("layers")
    assert layers["key"].nunique() == 2
    pd.testing.assert_frame_equal(results(tmp_path / "none"), results(tmp_path / "all"))


KILLED = """
import sys
from pathlib import Path
from sweeps.runner import run_sweep
from sweeps.space import load_space
run_sweep(load_space(Path(sys.argv[1])), sys.argv[2], workers=1, progress=lambda now: print(now.points_done, flush=True))
"""


@pytest.mark.slow
def test_a_sweep_killed_at_random_moments_and_resumed(tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text(
        'networks = ["lenet5"]\nblocks = ["4x4", "8x8"]\nratios = [[0.5, 0.5], [0.25, 0.5]]\nseeds = [0, 1, 2, 3, 4]\n'
        "[random]\n"
        '[machine]\nbase = "msa-16x16"\n[machine.axes]\n"dram.gb_per_s" = [6.4, 12.8]\n"front_end.skip_window" = [2, 4, 8]\n'
    )
    space = load_space(tmp_path / "space.toml")
    run_sweep(space, tmp_path / "whole")
    chance = random.Random(3)
    for _ in range(5):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "space.toml"), str(tmp_path / "pieces")]
        sweep = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert sweep.stdout is not None
        sweep.stdout.readline()
        time.sleep(chance.uniform(0, 1))
        sweep.kill()
        sweep.communicate()
    run_sweep(space, tmp_path / "pieces")
    pd.testing.assert_frame_equal(results(tmp_path / "whole"), results(tmp_path / "pieces"))
    for table in ("layers", "energy", "storage"):
        whole, pieces = (ResultStore(tmp_path / name).to_frame(table) for name in ("whole", "pieces"))
        pd.testing.assert_frame_equal(whole, pieces)
