"""The search: its laws, the same way again after a kill, what it finds beside the enumeration, and bad questions."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import sweeps.runner
from hwsim.cli import cli
from hwsim.errors import InputError
from sweeps.batch import Grid
from sweeps.pareto import knee_point, knee_rows, not_dominated
from sweeps.runner import run_sweep
from sweeps.search import (
    Constraint,
    Search,
    SearchSettings,
    ask,
    found_front,
    found_knees,
    run_search,
    save_search,
)
from sweeps.search.outcome import Scale, hypervolume_history
from sweeps.search.page import _across
from sweeps.search.proof import enumerate_space, prove
from sweeps.search.proposals import SAMPLERS, History, Proposer, Sampler
from sweeps.search.surrogate import predict, promising
from sweeps.space import Space
from sweeps.store import ResultStore

THREE = ["latency_ms", "energy_pj", "area_mm2"]


def small_space(**changes: object) -> Space:
    """144 points; at 1 KiB the operand store does not hold a word of 16 columns with blocks of 1x16."""
    content: dict[str, object] = {
        "networks": ["lenet300"],
        "blocks": ["4x4", "1x16"],
        "ratios": [[0.5, 0.5], [0.75, 0.25], [0.5, 0.25]],
        "machine": {
            "base": "msa-8x8",
            "axes": {
                "array.rows": [8, 4],  # not in order: places are by size
                "array.columns": [4, 8, 16],
                "operand_store.size_kib": [0.25, 40],
                "dram.gb_per_s": [3.2, 12.8],
            },
        },
        "random": {},
    }
    return Space(**{**content, **changes})


@pytest.fixture(scope="module")
def enumerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds every point of the small space."""
    folder = tmp_path_factory.mktemp("enumerated")
    run_sweep(small_space(), folder, workers=1, details="none")
    return folder


def searched(
    folder: Path, sampler: Sampler, evaluations: int = 40, seed: int = 0, **changes: object
) -> Search:
    space = small_space(**changes)
    question = ask(space, THREE, constraints=["average_power_mw<=400"])
    return run_search(space, folder, question, SearchSettings(sampler, evaluations, seed), workers=1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_keeps_the_laws(sampler: Sampler, enumerated: Path) -> None:
    """Different points, as many as asked; same seed same trials; feasible is what the columns say; nothing computed twice."""
    found = searched(enumerated, sampler)
    again = searched(enumerated, sampler)
    other = searched(enumerated, sampler, seed=1)
    trials = found.trials
    pd.testing.assert_frame_equal(trials, again.trials)
    assert trials["number"].tolist() != other.trials["number"].tolist()
    assert len(trials) == 40
    assert trials["number"].is_unique
    assert trials["key"].tolist() == Grid(small_space()).keys(
        Grid(small_space()).codes(trials["number"].to_numpy())
    )
    kept = trials["error"].isna() & (trials["average_power_mw"] <= 400)
    assert kept.tolist() == trials["feasible"].tolist()
    assert 0 < kept.sum() < 40
    assert (found.computed, found.reused) == (0, 40)


def test_the_front_is_feasible_and_the_hypervolume_never_falls(enumerated: Path) -> None:
    found = searched(enumerated, "hybrid")
    front = found_front(found.trials, found.question)
    assert front["feasible"].all()
    assert set(front["key"]) <= set(found.trials.loc[found.trials["feasible"], "key"])
    scale = Scale.of(found.question.costs(front))
    history = hypervolume_history(found.trials, found.question, scale)
    assert (history["hypervolume"].diff().dropna() >= 0).all()
    assert history["hypervolume"].iloc[-1] == pytest.approx(scale.hypervolume(found.question.costs(front)))
    assert 0 < history["hypervolume"].iloc[-1] < 1
    assert history["evaluation"].iloc[-1] == 40


def test_results_are_those_of_a_sweep(enumerated: Path, tmp_path: Path) -> None:
    """To the last bit, through a store of its own; a store that holds more leads to the same trials."""
    alone = searched(tmp_path, "hybrid", evaluations=30)
    pd.testing.assert_frame_equal(alone.trials, searched(enumerated, "hybrid", evaluations=30).trials)
    assert (alone.computed, alone.reused) == (30, 0)
    frame = ResultStore(enumerated).to_frame().set_index("key")
    stored = ResultStore(tmp_path).to_frame().set_index("key")
    assert set(stored.index) == set(alone.trials["key"])
    for name in ("latency_cycles", "energy_pj", "area_mm2"):
        assert stored[name].astype(float).equals(frame.loc[stored.index, name].astype(float))


def test_a_search_of_more_points_than_there_are_is_the_enumeration(enumerated: Path) -> None:
    found = searched(enumerated, "hybrid", evaluations=10_000)
    space = small_space()
    assert sorted(found.trials["number"]) == list(range(len(space)))
    truth = enumerate_space(space, enumerated, found.question)
    expected = found_front(truth, found.question)
    assert set(found_front(found.trials, found.question)["key"]) == set(expected["key"])


class Stop(Exception):
    pass


def test_interrupted_and_resumed_is_uninterrupted(enumerated: Path, tmp_path: Path) -> None:
    whole = searched(enumerated, "hybrid").trials
    space = small_space()
    question = ask(space, THREE, constraints=["average_power_mw<=400"])
    for most in (5, 17, 31):

        def stop(now: object, most: int = most) -> None:
            if getattr(now, "evaluated", 0) >= most:
                raise Stop

        with pytest.raises(Stop):
            run_search(space, tmp_path, question, SearchSettings("hybrid", 40), workers=1, progress=stop)
    resumed = run_search(space, tmp_path, question, SearchSettings("hybrid", 40), workers=1)
    pd.testing.assert_frame_equal(resumed.trials, whole)
    assert 0 < resumed.reused < 40


SPACE = """
name = "killed"
networks = ["lenet300"]
blocks = ["4x4", "1x16"]
ratios = [[0.5, 0.5], [0.75, 0.25], [0.5, 0.25]]
[machine]
base = "msa-8x8"
[machine.axes]
"array.rows" = [8, 4]
"array.columns" = [4, 8, 16]
"operand_store.size_kib" = [0.25, 40]
"dram.gb_per_s" = [3.2, 12.8]
[random]
"""


def test_killed_and_started_again(enumerated: Path, tmp_path: Path) -> None:
    """kill -9 of the command while it works, then the same command: the trials are those of a search that nobody killed."""
    (tmp_path / "space.toml").write_text(SPACE, "utf-8")
    goals = [part for name in THREE for part in ("--minimise", name)]
    arguments = ["search", str(tmp_path / "space.toml"), *goals, "--constraint", "average_power_mw<=400"]
    arguments += ["--evaluations", "40", "--out", str(tmp_path / "out"), "--workers", "1"]
    running = subprocess.Popen([sys.executable, "-m", "hwsim", *arguments], stderr=subprocess.DEVNULL)
    store = ResultStore(tmp_path / "out")
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "points").is_dir() or len(store.keys()) < 10:
        assert time.monotonic() < deadline
        assert running.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert len(store.keys()) < 40
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "were there already" in result.output
    trials = pd.read_csv(tmp_path / "out/search/trials.csv")
    assert trials["number"].tolist() == searched(enumerated, "hybrid").trials["number"].tolist()
    assert trials["latency_ms"].equals(searched(enumerated, "hybrid").trials["latency_ms"])
    assert set(trials["key"]) == store.keys()
    for name in ("front.csv", "search.json", "hypervolume.png", "hypervolume.pdf", "hypervolume.csv"):
        assert (tmp_path / "out/search" / name).stat().st_size > 0
    assert json.loads((tmp_path / "out/search/search.json").read_text())["seed"] == 0
    assert "knee of latency_ms and energy_pj" in result.output
    query = CliRunner().invoke(cli, ["query", str(tmp_path / "out"), "SELECT count(*) AS n FROM points"])
    assert "40" in query.output


def test_one_pool_serves_the_whole_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches that train: their processes are started once, and the store's parts are merged at the end only."""
    opened, merged = [], []
    open_pool, compact = sweeps.runner.open_pool, ResultStore.compact

    def counted(*arguments: object) -> object:
        opened.append(arguments)
        return open_pool(*arguments)

    monkeypatch.setattr("sweeps.runner.open_pool", counted)
    monkeypatch.setattr(ResultStore, "compact", lambda store: (merged.append(1), compact(store)))
    training = {"dataset": "digits", "train_images": 100, "test_images": 50, "dense_epochs": 1}
    training |= {"admm_epochs": 1, "retrain_epochs": 1}
    space = small_space(random=None, training=training, machine={"base": "msa-8x8"}, blocks=["4x4"])
    settings = SearchSettings("random", 3)
    found = run_search(space, tmp_path, ask(space, ["latency_ms", "energy_pj"]), settings, workers=1)
    assert found.computed == len(list((tmp_path / "artifacts").iterdir())) == 3
    assert (len(opened), len(merged)) == (1, 1)
    run_search(space, tmp_path, ask(space, ["latency_ms", "energy_pj"]), settings, workers=1)
    assert (len(opened), len(merged)) == (1, 1), "nothing to train and nothing new: no pool, no merging"


def test_the_proof_in_short(enumerated: Path) -> None:
    """A quarter of a small space; the long one is slow and fills docs/search.md."""
    space = small_space()
    proof = prove(
        space, enumerated, ask(space, THREE), evaluations=36, seeds=range(3), samplers=["hybrid", "random"]
    )
    runs = proof.runs.groupby("sampler")["hypervolume_ratio"].agg(["mean", "min"])
    assert runs.loc["hybrid", "min"] >= 0.98
    assert runs.loc["hybrid", "mean"] > runs.loc["random", "mean"]
    assert proof.runs["hypervolume_ratio"].le(1 + 1e-9).all()
    assert proof.points == 144


def test_the_table_over_all_questions() -> None:
    """A seed that misses the goal counts as a question that was not reached, however soon the others were."""

    def runs(**to_goal: list[float]) -> pd.DataFrame:
        rows = [
            {
                "sampler": name,
                "evaluations_to_goal": points,
                "hypervolume_ratio": 0.5 if np.isnan(points) else 0.99,
            }
            for name, several in to_goal.items()
            for points in several
        ]
        return pd.DataFrame(rows)

    nan = float("nan")
    text = _across(
        [
            runs(hybrid=[10, 20, 30], tpe=[5, 15, 90]),
            runs(hybrid=[10, 20, nan], tpe=[50, 60, 70]),
            runs(hybrid=[10, 20, 30], tpe=[1, 2, nan]),
        ]
    )
    assert "All 3 questions" in text
    assert "| hybrid | 2 of 3 | – | 0.5000 |" in text
    assert "| tpe | 2 of 3 | 2 | 0.5000 |" in text


@pytest.mark.slow
def test_the_proof(tmp_path: Path) -> None:
    """The first question of docs/search.md: a tenth of 4,608 points, five seeds."""
    import tomllib
    from importlib import resources

    from sweeps.space import parse_space

    text = resources.files("sweeps").joinpath("spaces", "search-proof.toml").read_text("utf-8")
    space = parse_space(tomllib.loads(text), "search-proof.toml")
    proof = prove(
        space, tmp_path, ask(space, THREE), evaluations=len(space) // 10, samplers=["hybrid", "random"]
    )
    runs = proof.runs.set_index("sampler")
    assert runs.loc["hybrid", "hypervolume_ratio"].min() >= 0.98
    assert (runs.loc["hybrid", "knees_found"] == runs.loc["hybrid", "knees"]).all()
    assert runs.loc["hybrid", "hypervolume_ratio"].min() > runs.loc["random", "hypervolume_ratio"].max()


def test_bad_questions_are_told_all_at_once() -> None:
    with pytest.raises(InputError) as caught:
        ask(
            small_space(seeds=[0, 1]),
            ["latency_cycle"],
            ["accuracy_integer", "block", "energy_pj"],
            ["area_mm<=4", "energy_pj<4", "latency_ms>=fast", "macs<=nan"],
        )
    text = str(caught.value)
    assert len(caught.value.problems) == 9
    for part in (
        'did you mean "latency_cycles"?',
        "known of trained weights only",
        'no numeric column "block"',
        "4 columns, a search has two or three",
        'did you mean "area_mm2"?',
        "'energy_pj<4' is not a bound",
        "'fast' is not a finite number",
        "'nan' is not a finite number",
        "choose the luckiest",
    ):
        assert part in text


def test_one_objective_or_the_same_twice_is_refused() -> None:
    with pytest.raises(InputError, match="1 columns"):
        ask(small_space(), ["latency_ms"])
    with pytest.raises(InputError, match="named twice"):
        ask(small_space(), ["latency_ms"], ["latency_ms"])
    with pytest.raises(InputError, match="at least 1"):
        run_search(small_space(), "nowhere", ask(small_space(), THREE), SearchSettings(evaluations=0))


def test_axes_and_trained_columns_can_be_asked_for() -> None:
    axes = ask(small_space(), ["latency_ms"], ["pruned"], ["array.rows<=4", "dram.gb_per_s>=3.2"])
    assert axes.constraints == (
        Constraint("array.rows", 4.0),
        Constraint("dram.gb_per_s", 3.2, at_least=True),
    )
    trained = small_space(random=None, training={"dataset": "digits"})
    assert ask(trained, ["latency_ms"], ["accuracy_integer"], ["accuracy_integer>=0.88"]).objectives == (
        "latency_ms",
        "accuracy_integer",
    )


def test_no_front_of_an_earlier_question_stays(enumerated: Path, tmp_path: Path) -> None:
    save_search(searched(enumerated, "random"), tmp_path)
    question = ask(small_space(), ["latency_ms", "area_mm2"], constraints=["area_mm2<=0.001"])
    found = run_search(small_space(), enumerated, question, SearchSettings("random", 10), workers=1)
    with pytest.raises(InputError, match="none of 10 points"):
        save_search(found, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["search.json", "trials.csv"]


@pytest.mark.parametrize("sampler", ["hybrid", "nsga2"])
def test_a_space_too_large_to_look_at_every_point(sampler: Sampler, tmp_path: Path) -> None:
    """Over 20,000 points the model draws its candidates: the same ones again, from the store and without one."""
    machine = {
        "base": "msa-8x8",
        "axes": {
            "array.rows": list(range(1, 13)),
            "array.columns": list(range(1, 13)),
            "clock_mhz": list(range(100, 2100, 100)),
            "dram.gb_per_s": [3.2, 6.4, 12.8, 25.6],
        },
    }
    space = small_space(machine=machine, blocks=["4x4"], ratios=[[0.5, 0.5], [0.75, 0.25]])
    assert len(space) > 20_000
    question = ask(space, THREE, constraints=["average_power_mw<=400"])
    settings = SearchSettings(sampler, 60)
    found = run_search(space, tmp_path / "a", question, settings, workers=1)
    again = run_search(space, tmp_path / "a", question, settings, workers=1)
    other = run_search(space, tmp_path / "b", question, settings, workers=1)
    pd.testing.assert_frame_equal(found.trials, again.trials)
    pd.testing.assert_frame_equal(found.trials, other.trials)
    assert found.trials["number"].is_unique
    assert (found.computed, again.computed, len(found.trials)) == (60, 0, 60)
    assert found.trials.loc[found.trials["feasible"], "average_power_mw"].max() <= 400


def test_nothing_feasible_says_how_near_it_came(enumerated: Path, tmp_path: Path) -> None:
    space = small_space()
    question = ask(space, ["latency_ms", "area_mm2"], constraints=["area_mm2<=0.001"])
    found = run_search(space, enumerated, question, SearchSettings("hybrid", 30), workers=1)
    assert not found.trials["feasible"].any()
    with pytest.raises(InputError, match=r"is the least that was found") as caught:
        save_search(found, tmp_path)
    assert f"{found.trials['area_mm2'].min():.6g}" in str(caught.value)
    assert (tmp_path / "trials.csv").exists()


def test_a_space_in_which_nothing_fits(tmp_path: Path) -> None:
    axes = {"operand_store.size_kib": [0.0625, 0.125], "array.columns": [16, 32]}
    space = small_space(blocks=["1x16"], machine={"base": "msa-8x8", "axes": axes})
    found = run_search(space, tmp_path, ask(space, THREE), SearchSettings("hybrid", 12), workers=1)
    assert len(found.trials) == 12
    assert found.trials["error"].notna().all()
    with pytest.raises(InputError, match="do not fit their machine"):
        found_front(found.trials, found.question)


def test_maximise_is_minimise_turned_round(enumerated: Path) -> None:
    space = small_space()
    found = run_search(
        space,
        enumerated,
        ask(space, ["latency_ms"], ["peak_gmac_per_s"]),
        SearchSettings("hybrid", 40),
        workers=1,
    )
    front = found_front(found.trials, found.question)
    fits = found.trials[found.trials["feasible"]]
    assert front["peak_gmac_per_s"].max() == fits["peak_gmac_per_s"].max()
    knee = found_knees(front, found.question)["latency_ms", "peak_gmac_per_s"]
    assert knee["key"] == knee_point(front, minimise=["latency_ms"], maximise=["peak_gmac_per_s"])["key"]


def test_places_are_by_size_and_neighbours_one_step_away() -> None:
    grid = Grid(small_space())
    steps = Proposer(grid, 2, "random", 10, 0).steps
    for number in (0, 77, len(grid) - 1):
        assert steps.number(steps.places(number).tolist()) == number
        for other in steps.neighbours(number):
            assert number in steps.neighbours(other)
            distance = np.abs(steps.places(other) - steps.places(number))
            assert (distance > 0).sum() == 1
            axis = int(distance.argmax())
            assert distance[axis] == 1 or not steps.ordered[axis]
    rows = grid.names.index("array.rows")
    assert grid.values[rows][grid.codes(np.array([steps.number([0] * len(grid.names))]))[0, rows]] == 4


def test_a_proposer_never_stalls() -> None:
    """With all but one point known, the one that is left is proposed."""
    grid = Grid(small_space(ratios=[[0.5, 0.5]]))
    for sampler in SAMPLERS:
        proposer, history = Proposer(grid, 2, sampler, len(grid), 3), History()
        for number in range(len(grid) - 1):
            history.add(number, np.array([number, -number], float), np.zeros(0), 0.0)
        assert len(grid) - 1 in proposer.ask(history)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_the_model_knows_products_of_axes(seed: int) -> None:
    """Half the points of a product of contributions give the other half within 5 % of their spread."""
    rng = np.random.default_rng(seed)
    codes = np.stack(np.unravel_index(np.arange(256), (4, 4, 4, 4)), axis=1)
    values = sum(rng.normal(size=4)[codes[:, axis]] for axis in range(4))
    known = rng.permutation(256)[:128]
    expected = predict(codes[known], np.asarray(values)[known, None], codes)[:, 0]
    assert np.sqrt(np.mean((expected - values) ** 2)) < 0.05 * np.std(values)


def test_the_model_proposes_the_front_of_what_it_knows() -> None:
    codes = np.stack(np.unravel_index(np.arange(64), (8, 8)), axis=1)
    costs = np.exp(np.column_stack([codes[:, 0] - codes[:, 1], 0.5 * codes[:, 1] - codes[:, 0]]))
    margins = codes[:, :1] / 5.0 - 1.0  # at most place 5 on the first axis
    known = np.setdiff1d(np.arange(64), [5 * 8 + 7, 5 * 8 + 3, 7 * 8 + 7, 2])
    left = np.array([2, 5 * 8 + 3, 5 * 8 + 7, 7 * 8 + 7])
    rng = np.random.default_rng(0)
    chosen = promising(codes[known], costs[known], margins[known], np.ones(60, bool), codes[left], 2, rng)
    front = not_dominated(costs[margins[:, 0] <= 0])
    assert front.any()
    assert 7 * 8 + 7 not in left[chosen], "it breaks the constraint"


@given(st.lists(st.tuples(*[st.integers(0, 5).map(float)] * 3), min_size=1, max_size=20))
@settings(deadline=None)
def test_knees_of_all_pairs_are_those_of_the_pairs(costs: list[tuple[float, ...]]) -> None:
    frame = pd.DataFrame(costs, columns=["a", "b", "c"])
    rows = knee_rows(frame.to_numpy())
    assert list(rows) == [(0, 1), (0, 2), (1, 2), (0, 1, 2)]
    for subset, row in rows.items():
        names = [frame.columns[i] for i in subset]
        assert row == knee_point(frame, minimise=names).name


def test_a_front_that_is_one_point_has_a_box() -> None:
    scale = Scale.of(np.array([[2.0, 0.0]]))
    assert scale.reference.tolist() == pytest.approx([2.2, 0.1])
    assert scale.hypervolume(np.array([[2.0, 0.0]])) == pytest.approx(1.0)
    assert scale.hypervolume(np.zeros((0, 2))) == 0.0
