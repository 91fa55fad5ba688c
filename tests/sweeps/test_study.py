"""Studies: a result is a function of its description, survives being stopped, and the page says only what is stored."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from compress import zoo
from compress.artifact import load_artifact
from compress.fit import Progress
from compress.pretrained.crepe import PITCHES
from hwsim.cli import cli
from hwsim.errors import FormatError, InputError
from sweeps.cli_study import study
from sweeps.statistics import T_975, estimate, paired_difference
from sweeps.study import catalogue, methods, pitch, report, runner, tasks
from sweeps.study.catalogue import STUDIES
from sweeps.study.channels import narrow_lenet5, narrow_resnet
from sweeps.study.dense import train_dense
from sweeps.study.folder import Result, StudyFolder, read_results, result_from_json
from sweeps.study.methods import execute
from sweeps.study.one_shot import SUBJECTS
from sweeps.study.report import write_results_page
from sweeps.study.rows import rows_of
from sweeps.study.runner import run_study, select
from sweeps.study.runs import METHODS, ONE_SHOT, Run, Training, run_from_json
from sweeps.study.task_names import MEASURES, TITLES
from sweeps.study.tasks import Examples, find_task

TINY = Training(
    dense_epochs=1,
    admm_epochs=1,
    retrain_epochs=1,
    batch_size=32,
    train_images=192,
    max_loss=0.05,
    distill=0.5,
)
JOINT = Run("lenet5", "joint", 0, "50x", pruned=0.5, unified=0.5, target_bytes=40_000, training=TINY)


@pytest.fixture(autouse=True)
def _small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few random images with a bright bar where the class says: as quick as it gets, and learnable."""
    random = torch.Generator().manual_seed(5)
    labels = torch.arange(320) % 10
    images = 0.3 * torch.randn(320, 1, 28, 28, generator=random)
    for row, label in enumerate(labels.tolist()):
        images[row, 0, 2 * label + 3 : 2 * label + 6] += 2
    examples = Examples((images[:256], labels[:256]), (images[256:], labels[256:]), "bars")
    for name in ("lenet5", "resnet20"):
        task = replace(find_task(name), examples=lambda: examples)
        monkeypatch.setattr(tasks, "TASKS", {**tasks.TASKS, name: task})


def stored(run: Run, accuracy: float, size: int = 30_000, **details: object) -> Result:
    measure = MEASURES[run.task]
    quality = {measure.name: accuracy}
    return Result(run, quality, size, 50_000, 1_724_320, {}, 60.0, 90.0, 12, details, {"torch": "2"}, "abc")


# --- runs


def test_all_planned_runs_are_distinct_and_known() -> None:
    for name, runs in STUDIES.items():
        found = runs()
        assert (
            len({run.key for run in found}) == len({(run.group, run.seed) for run in found}) == len(found)
        ), name
        assert {run.task for run in found} <= {*tasks.TASKS, *SUBJECTS} == set(MEASURES) == set(TITLES)


def test_the_first_study_has_what_was_asked_for() -> None:
    runs = STUDIES["fashion-mnist"]()
    lenet5 = [run for run in runs if run.task == "lenet5"]
    assert {run.method for run in lenet5} == set(METHODS) - set(ONE_SHOT)
    for method in ("pruned", "unified", "binary", "joint", "budget"):
        shapes = {run.shape for run in lenet5 if run.method == method}
        assert shapes == {"1x4", "4x4", "8x8", "16x1"}, method
    assert all(sum(run.group == one.group for run in lenet5) == 5 for one in lenet5)
    resnet = [run for run in runs if run.task == "resnet20"]
    seeds = {method: {run.seed for run in resnet if run.method == method} for method in METHODS}
    assert all(seeds[method] == {0, 1, 2} for method in ("dense", "joint", "budget"))
    assert all(
        seeds[method] == {0} for method in ("int8", "unstructured", "channels", "pruned", "unified", "binary")
    )
    # What has 4×4 blocks or none comes first, seed by seed.
    first = [run for run in lenet5 if run.shape in ("", "4x4")]
    assert lenet5[: len(first)] == first
    assert [run.seed for run in first] == sorted(run.seed for run in first)


def test_targets_are_shares_of_the_real_network() -> None:
    for name, fp32_bytes in (("lenet5", catalogue.LENET5_FP32), ("resnet20", catalogue.RESNET20_FP32)):
        parameters = sum(values.numel() for values in zoo.build(name, 10).parameters())
        assert 4 * parameters == fp32_bytes


def test_a_key_is_of_every_field_and_survives_json() -> None:
    again = run_from_json(json.loads(json.dumps(JOINT.to_json())), "test")
    assert (again, again.key) == (JOINT, JOINT.key)
    changed = [
        replace(JOINT, seed=1),
        replace(JOINT, block=(8, 8)),
        replace(JOINT, variant="x"),
        replace(JOINT, target_bytes=1),
        replace(JOINT, training=replace(TINY, distill=0.0)),
        replace(JOINT, weight_bits=6),
        replace(JOINT, rounding_error=0.01),
        replace(JOINT, training=replace(TINY, teacher_epochs=3)),
    ]
    assert len({run.key for run in (JOINT, *changed)}) == 1 + len(changed)


def test_fields_that_came_later_leave_older_results_their_keys() -> None:
    """The key of a run that results were stored under before there were such fields."""
    assert Run("lenet5", "start", training=catalogue.LENET5).key == "4c67c3434a490de0"


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "magic"},
        {"seed": -1},
        {"width": 0.0},
        {"pruned": 0.8, "unified": 0.4},
        {"target_bytes": -1},
    ],
)
def test_what_is_no_run_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(fields))):
        Run(**{"task": "lenet5", "method": "joint", **fields})


def test_an_unknown_field_is_named() -> None:
    data = JOINT.to_json()
    with pytest.raises(InputError, match='did you mean "seed"'):
        run_from_json({**data, "sed": 1}, "file.json")
    with pytest.raises(InputError, match=r"training\.rohs"):
        run_from_json({**data, "training": {**data["training"], "rohs": 1}}, "file.json")


# --- doing them


def test_a_study_end_to_end(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    runs = [
        Run("lenet5", "start", training=TINY),
        Run("lenet5", "dense", training=TINY),
        Run("lenet5", "int8", training=TINY),
        Run("lenet5", "channels", width=0.3, target_bytes=40_000, training=TINY),
        Run("lenet5", "unstructured", block=(1, 1), pruned=0.9, allocation="magnitude", training=TINY),
        replace(JOINT, method="budget", pruned=0.0, unified=0.0, budget="file_bytes=60000", permute=True),
        JOINT,
    ]
    seen: list[runner.StudyProgress] = []
    assert run_study(runs, folder, progress=seen.append) == len(runs)
    assert run_study(runs, folder, progress=lambda _: pytest.fail("done already")) == 0
    assert [item.run for item in seen if item.result is not None] == runs
    assert seen[0].hours_left > seen[-1].hours_left == 0
    results = {result.run.key: result for result in read_results(tmp_path)}
    for run in runs:
        result = results[run.key]
        assert result == result_from_json(result.to_json(), "again")
        assert 0 <= result.quality["accuracy"] <= 1
        assert result.epochs == {"start": 0, "int8": 0, "dense": 3}.get(run.method, 2)
        if run.method not in ("start", "dense"):
            assert result.file_bytes == folder.file_path(run).stat().st_size
            load_artifact(folder.file_path(run))
        if run.target_bytes:
            assert result.file_bytes <= run.target_bytes < folder.trained_path(run).stat().st_size
    assert results[runs[0].key].file_bytes == catalogue.LENET5_FP32
    # int8 of the start network loses next to nothing, whatever the network can do.
    assert abs(results[runs[2].key].quality["accuracy"] - results[runs[0].key].quality["accuracy"]) < 0.05
    assert results[JOINT.key].image_bytes is not None
    assert results[runs[4].key].image_bytes is None
    assert len(list((tmp_path / "dense").iterdir())) == 1  # one start network for all
    assert not [path for path in (tmp_path / "running").iterdir() if path.is_dir()]


class _Killed(BaseException):
    pass


def _stop_after(phase: str, epoch: int) -> object:
    def watch(progress: Progress) -> None:
        if (progress.phase, progress.epoch, progress.batch) == (phase, epoch, 2):
            raise _Killed

    return watch


def test_a_run_that_was_stopped_ends_bit_for_bit_alike(tmp_path: Path) -> None:
    training = replace(TINY, dense_epochs=2, admm_epochs=2, retrain_epochs=2, train_images=96, max_loss=0.0)
    run = replace(JOINT, target_bytes=0, training=training)
    whole = StudyFolder(tmp_path / "whole")
    expected = execute(run, whole)
    for phase in ("train", "admm", "retrain"):
        stopped = StudyFolder(tmp_path / phase)
        with pytest.raises(_Killed):
            execute(run, stopped, _stop_after(phase, 2))  # type: ignore[arg-type]
        epochs: list[tuple[str, int]] = []
        found = execute(run, stopped, lambda now, seen=epochs: seen.append((now.phase, now.epoch)))  # type: ignore[misc]
        assert epochs[0] == (phase, 2)  # its first epoch was not done again
        assert stopped.file_path(run).read_bytes() == whole.file_path(run).read_bytes()
        assert found.quality == expected.quality
    # The time before a stop counts.
    clock = whole.state_folder(run.key) / "seconds.json"
    clock.parent.mkdir(parents=True, exist_ok=True)
    clock.write_text("[1000.0, 2000.0]")
    again = execute(run, whole)
    assert 1000 < again.seconds < 1500 < 2000 < again.wall_seconds


_HOLD = """
import signal, sys
from pathlib import Path
from sweeps.study.folder import StudyFolder
with StudyFolder(Path(sys.argv[1])).claim(sys.argv[2]) as ours:
    print("held" if ours else "not held", flush=True)
    signal.pause()
"""


def test_a_claim_keeps_others_out_and_ends_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLD, str(tmp_path), JOINT.key]
    folder = StudyFolder(tmp_path)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with folder.claim(JOINT.key) as ours:
            assert not ours
        assert run_study([JOINT], folder) == 0  # left alone, not waited for
        process.kill()
    with folder.claim(JOINT.key) as ours:
        assert ours


def test_dense_training_is_reproducible_and_refuses_the_state_of_another(tmp_path: Path) -> None:
    examples = find_task("lenet5").examples().train
    loss = find_task("lenet5").loss
    common = {"epochs": 1, "lr": 1e-3, "batch_size": 64}
    networks = [zoo.build("lenet5", 10, 0) for _ in range(2)]
    for network in networks:
        train_dense(network, examples, loss, seed=3, **common)  # type: ignore[arg-type]
    for one, other in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(one, other)
    train_dense(zoo.build("lenet5", 10, 0), examples, loss, seed=3, state_folder=tmp_path, **common)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="seed"):
        train_dense(zoo.build("lenet5", 10, 0), examples, loss, seed=4, state_folder=tmp_path, **common)  # type: ignore[arg-type]


def test_select_by_words() -> None:
    runs = STUDIES["fashion-mnist"]()
    found = select(runs, ["lenet5", "8X8", "joint, budget", "seed 2"])
    assert {(run.method, run.shape, run.seed) for run in found} == {("budget", "8x8", 2)}
    assert select(runs, []) == runs


def test_tasks_without_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(48, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    few = Examples((images, images), (images[:16], images[:16]), "noise")
    task = replace(find_task("autoencoder"), examples=lambda: few)
    monkeypatch.setattr(tasks, "TASKS", {**tasks.TASKS, "autoencoder": task})
    training = replace(TINY, batch_size=16, train_images=0)
    run = replace(JOINT, task="autoencoder", target_bytes=30_000, training=training)  # distilled, too
    result = execute(run, StudyFolder(tmp_path))
    assert result.file_bytes <= 30_000
    assert 0 < result.quality["mse"] < 1
    assert result.details["multiplier"] > 0
    assert result.fp32_bytes == catalogue.GENERALITY_FP32["autoencoder"]
    crepe = sum(values.numel() for values in pitch.crepe_tiny(0).parameters())
    assert 4 * crepe == catalogue.GENERALITY_FP32["crepe"]


# --- channels


def test_channels_that_do_nothing_can_go() -> None:
    model = zoo.build("lenet5", 10, 0).eval()
    with torch.no_grad():
        for name, dead in (("conv1", slice(0, 10)), ("conv2", slice(5, 30)), ("fc1", slice(0, 250))):
            layer = model.get_submodule(name)
            layer.get_parameter("weight")[dead] = 0
            layer.get_parameter("bias")[dead] = 0
    inputs = torch.randn(3, 1, 28, 28)
    small = narrow_lenet5(model, 0.5)
    assert small.get_submodule("fc1").get_parameter("weight").shape == (250, 400)
    torch.testing.assert_close(small(inputs), model(inputs))
    assert model.get_submodule("fc1").get_parameter("weight").shape == (500, 800)


def test_a_narrow_resnet_keeps_its_residual_stream() -> None:
    model = zoo.build("resnet20", 10, 0).eval()
    small = narrow_resnet(model, 0.25)
    assert small(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    block = small.get_submodule("layer2.1")
    assert block.get_submodule("conv1").get_parameter("weight").shape == (8, 32, 3, 3)
    assert block.get_submodule("conv2").get_parameter("weight").shape == (32, 8, 3, 3)
    torch.testing.assert_close(
        narrow_resnet(model, 1.0)(torch.ones(1, 1, 28, 28)), model(torch.ones(1, 1, 28, 28))
    )


# --- tones


def test_tones_have_the_pitch_that_they_are_said_to_have() -> None:
    inputs, targets = pitch.tones(40, seed=3)
    assert torch.equal(inputs, pitch.tones(40, seed=3)[0])
    assert not torch.equal(inputs, pitch.tones(40, seed=4)[0])
    frames = inputs.double().numpy()
    np.testing.assert_allclose(frames.std(axis=1), 1, rtol=1e-4)
    # The spectrum has its energy at multiples of the fundamental: more than around points half way between them.
    times = np.arange(1024) / pitch.SAMPLE_RATE_HZ
    window = np.hanning(1024)
    better = 0
    for frame, cents in zip(frames, targets[:, PITCHES].double().numpy(), strict=True):
        fundamental = 10 * 2 ** (cents / 1200)
        energy = [
            abs(np.sum(window * frame * np.exp(-2j * math.pi * f * times)))
            for f in (fundamental, 1.5 * fundamental)
        ]
        better += energy[0] > energy[1]
    assert better >= 38


def test_perfect_answers_are_all_right_and_a_semitone_off_all_wrong() -> None:
    _, targets = pitch.tones(50, seed=1)
    logits = torch.logit(targets[:, :PITCHES].clamp(1e-6, 1 - 1e-6))
    assert pitch.pitch_accuracy(logits, targets) == 1.0
    assert pitch.pitch_accuracy(logits.roll(5, dims=1), targets) == 0.0


@pytest.mark.parametrize("task", ["autoencoder", "crepe"])
def test_a_seed_decides_the_weights_and_nothing_else_does(task: str) -> None:
    one, again, other = (tasks.find_task(task).build(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(values, again[name]) for name, values in one.items())
    assert not all(torch.equal(values, other[name]) for name, values in one.items())


def test_crepe_is_the_one_network_before_its_sigmoid(tmp_path: Path) -> None:
    mine = pitch.crepe_tiny(0).eval()
    published = zoo.build("crepe-tiny", PITCHES, 1).eval()
    published.load_state_dict(mine.state_dict())
    frames = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(published(frames), mine(frames).sigmoid())
    path = tmp_path / "tiny.pth"
    path.write_bytes(b"nothing")
    done = CliRunner().invoke(study, ["generality", "--folder", str(tmp_path), "--crepe", str(path)])
    assert isinstance(done.exception, InputError)
    assert "no wheel" in str(done.exception)


# --- statistics


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12))
def test_an_interval_is_that_of_scipy(values: list[float]) -> None:
    found = estimate(values)
    assert found is not None
    assert found.half_width is not None
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), max(stats.sem(values), 1e-12))
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert found.half_width == pytest.approx((high - low) / 2, rel=1e-3, abs=1e-9)


def test_quantiles_are_those_of_scipy() -> None:
    np.testing.assert_allclose(T_975, stats.t.ppf(0.975, np.arange(1, 31)), rtol=5e-4)


def test_pairs_only() -> None:
    found = paired_difference({0: 3.0, 1: 4.0, 4: 100.0}, {0: 1.0, 1: 3.0, 2: -50.0})
    assert found is not None
    assert (found.mean, found.n) == (1.5, 2)
    assert estimate([]) is None
    single = estimate([7.0])
    assert single is not None
    assert single.half_width is None


# --- the page


def test_the_page_has_the_right_means_and_shows_what_is_missing(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    runs = STUDIES["fashion-mnist"]()
    dense = [run for run in runs if (run.task, run.method) == ("lenet5", "dense")]
    ours = [
        run
        for run in runs
        if (run.task, run.method, run.shape, run.point) == ("lenet5", "budget", "4x4", "50x")
    ]
    for seed, (one, other) in enumerate(zip(dense[:4], ours[:3], strict=False)):
        folder.write(stored(one, 0.90 + 0.01 * seed, size=1_724_320))
        folder.write(stored(other, 0.905 + 0.01 * seed, size=34_000 + 100 * seed))
    page = tmp_path / "results.md"
    paths = write_results_page(folder.path, page)
    text = page.read_text()
    # accuracies 90.5, 91.5, 92.5: mean 91.5, t(2) · 1/√3 = 2.48; differences 0.5 each, interval 0; bytes 34,000 … 34,200.
    assert (
        "| joint, budget | 4×4 | 50x | 91.50 ± 2.48 | +0.50 ± 0.00 | 34,100 | 50.6 | 50,000 | 3 of 5 |"
        in text
    )
    missing = next(line for line in text.splitlines() if line.startswith("*Missing*"))
    assert "joint, budget 4×4 100x;" in missing
    assert "joint, budget 4×4 50x" not in missing
    assert re.search(
        r"\| 50x \| 0\.3 \| joint, budget 4×4 \| \+0\.50 ± 0\.00 \| 3 \| yes \| \*missing\*", text
    )
    assert re.search(r"\| 100x \| 1\.0 \| \*missing\*", text)
    total = len({run.key for make in STUDIES.values() for run in make()})
    assert f"**6 of {total} planned runs are there**" in text
    assert "EfficientNet-Lite0" in text
    assert all(path.exists() for path in paths)
    # The page can be written again from its own results.json, word for word.
    other_page = tmp_path / "again" / "results.md"
    write_results_page(page.with_suffix(".json"), other_page)
    assert other_page.read_text() == text


def test_a_page_of_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "stored.json").write_text('{"results": []}')
    write_results_page(tmp_path / "stored.json", tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert "**0 of" in text
    assert not re.search(r"\d ± \d", text)


def test_a_folder_without_results_does_not_replace_the_page(tmp_path: Path) -> None:
    """A mistyped folder with the default --out would wipe the stored results beside the page."""
    (tmp_path / "study").mkdir()
    page = tmp_path / "results.md"
    page.with_suffix(".json").write_text("kept")
    with pytest.raises(InputError, match="holds no result"):
        write_results_page(tmp_path / "study", page)
    assert not page.exists()
    assert page.with_suffix(".json").read_text() == "kept"


def test_runs_of_no_study_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    folder.write(stored(JOINT, 0.99))
    write_results_page(tmp_path, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert "1 stored runs belong to no study" in text
    assert "99.00" not in text


def test_twice_as_long_is_held_against_both_dense_networks(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    accuracy = {"dense": 0.92, "budget": 0.915, "unstructured": 0.91}
    for run in STUDIES["longer"]():
        folder.write(stored(run, accuracy[run.method], size=34_000))
    for run in STUDIES["fashion-mnist"]():
        if (run.task, run.method) == ("lenet5", "dense"):
            folder.write(stored(run, 0.917 + 0.001 * run.seed, size=1_724_320))
    page = tmp_path / "results.md"
    write_results_page(folder.path, page)
    section = page.read_text().split("### Twice as long")[1].split("## 1.2")[0]
    assert "| dense |  |  | 92.00 ± 0.00 |  |  | 34,000 | 3 |" in section
    # To 92.0 each, and to 91.7, 91.8 and 91.9: half an interval is 4.303 · 0.1 / √3.
    assert (
        "| joint, budget | 4×4 | 50x | 91.50 ± 0.00 | -0.50 ± 0.00 | -0.30 ± 0.25 | 34,000 | 3 |" in section
    )
    assert "| 50x | 0.3 | joint, budget 4×4 | -0.50 ± 0.00 | 3 | no |" in section


def test_the_teacher_is_trained_for_its_own_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, taught = [], []

    def note_training(model, *rest, epochs: int, **options):
        trained.append(epochs)
        return train_dense(model, *rest, epochs=epochs, **options)

    def note_teacher(model, inputs):
        taught.append(round(float(next(model.parameters()).detach().double().sum()), 6))
        return outputs(model, inputs)

    outputs = methods._outputs
    monkeypatch.setattr(methods, "train_dense", note_training)
    monkeypatch.setattr(methods, "_outputs", note_teacher)
    folder = StudyFolder(tmp_path)
    execute(JOINT, folder)
    execute(replace(JOINT, training=replace(TINY, teacher_epochs=3)), folder)
    assert trained == [1, 3]
    assert len(set(taught)) == 2
    assert len(list((tmp_path / "dense").iterdir())) == 2


def test_ablation_compares_with_the_full_method(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    for run in STUDIES["ablation"]():
        if run.point == "50x" and run.variant in ("", "no distillation"):
            folder.write(stored(run, 0.90 if run.variant else 0.91))
    write_results_page(tmp_path, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert "| 50x | no distillation | 90.00 ± 0.00 | -1.00 ± 0.00 | 30,000 | 3 |" in text
    assert "joint, budget 4×4 50x no permutation" in text


def test_lower_is_better_where_the_measure_is_an_error(tmp_path: Path) -> None:
    runs = [run for run in STUDIES["generality"]() if run.task == "autoencoder" and run.seed == 0]
    results = [stored(run, 0.010 if run.method == "dense" else 0.012) for run in runs]
    row = next(row for row in rows_of(runs, results) if row.run.method == "budget")
    assert row.difference is not None
    assert row.difference.mean == pytest.approx(2.0)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"results": 5}', '{"results": [{"format": "other"}]}'])
def test_damaged_results_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(FormatError, match=r"results\.json"):
        read_results(path)


def test_a_damaged_result_of_a_folder_is_named(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    folder.write(stored(JOINT, 0.9))
    path = folder.result_path(JOINT)
    document = json.loads(path.read_text())
    for broken in ({**document, "version": 99}, {**document, "file_bytes": "many"}, {**document, "run": {}}):
        path.write_text(json.dumps(broken))
        with pytest.raises(InputError, match=JOINT.key):
            read_results(tmp_path)


def test_all_damaged_results_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text("{")
    (tmp_path / "results" / "b.json").write_text('{"format": "hwsim-study-result", "version": 1, "run": 3}')
    with pytest.raises(FormatError, match=r"2 problems") as caught:
        read_results(tmp_path)
    assert [problem.field for problem in caught.value.problems] == ["results/a.json", "results/b.json"]
    assert all("take the file out" in problem.hint for problem in caught.value.problems)


# --- the commands


def test_the_list_of_runs(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        cli,
        ["study", "fashion-mnist", "--folder", str(tmp_path), "--only", "joint, budget, 4x4, 50x", "--list"],
    )
    assert done.exit_code == 0
    assert done.output.count("missing") == 5
    assert "hours are left" in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fashion-mnits"], 'did you mean "fashion-mnist"'),
        (["ablation", "--only", "nonsense"], "nonsense"),
        (["generality", "--crepe", "nothing.whl", "--list"], "nothing.whl"),
    ],
)
def test_bad_input_of_the_command(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, ["study", *arguments, "--folder", str(tmp_path)])
    assert isinstance(done.exception, InputError | SystemExit)  # the second is click's own
    assert done.exit_code != 0
    assert said in f"{done.exception} {done.output}"


def test_the_report_command(tmp_path: Path) -> None:
    StudyFolder(tmp_path).write(stored(STUDIES["fashion-mnist"]()[0], 0.9))
    page = tmp_path / "page.md"
    done = CliRunner().invoke(cli, ["study-report", str(tmp_path), "--out", str(page)])
    assert done.exit_code == 0
    assert page.exists()
    assert str(page) in done.output


def test_goals_are_judged_by_what_is_stored() -> None:
    runs = [run for run in STUDIES["fashion-mnist"]() if run.task == "lenet5" and run.seed == 0]
    wanted = {"dense": 0.92, "budget": 0.905}
    results = [stored(run, wanted[run.method]) for run in runs if run.method in wanted]
    lines = "\n".join(report._goals(rows_of(runs, results)))
    assert "| 50x | 0.3 | joint, budget 4×4 | -1.50 | 1 | no |" in lines
