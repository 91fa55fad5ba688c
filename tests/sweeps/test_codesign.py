"""Co-design: laws of the alternation against every machine tried one by one, budgets in simulation, resuming, bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from compress import zoo
from compress.artifact import load_artifact
from compress.data import Dataset
from compress.train import Checkpoint
from hwsim import simulate
from hwsim.cli import cli
from hwsim.errors import FormatError, InputError
from hwsim.machine import Machine, load_machine, preset_names
from sweeps.codesign import alternation
from sweeps.codesign.alternation import Bench, Network, Step, alternate, cheapest, exhaustive
from sweeps.codesign.compare import paired, speed_ups
from sweeps.codesign.folder import machine_toml, read_json
from sweeps.codesign.page import load_study, write_page
from sweeps.codesign.run import ARTIFACT, MACHINE, codesign
from sweeps.codesign.settings import (
    CoDesignSpace,
    Goal,
    load_codesign_space,
    parse_codesign_space,
    parse_goal,
)
from sweeps.codesign.study import Study
from sweeps.codesign.uniform import best_uniform
from sweeps.weights import images_of

TINY = {
    "dataset": "digits",
    "train_images": 200,
    "test_images": 100,
    "dense_epochs": 1,
    "admm_epochs": 2,
    "retrain_epochs": 2,
    "exempt": "none",
}
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def space_of(**changes: Any) -> CoDesignSpace:
    content: dict[str, Any] = {
        "blocks": ["2x4", "4x4", "8x4"],
        "machine": {
            "base": "msa-8x8",
            "axes": {"array.columns": [4, 8], "array.multipliers": [2, 4], "dram.gb_per_s": [3.2]},
        },
        "training": TINY,
    }
    return CoDesignSpace(**{**content, **changes})


@pytest.fixture(scope="module")
def network() -> Network:
    """Two convolutions and a linear layer, drawn from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(256, 10)
        )
    return Network(model, (2, 6, 6))


GOALS = (
    Goal("latency_us", 1.0),
    Goal("latency_cycles", 1200),
    Goal("energy_pj", 3e5),
    Goal("image_bytes", 700),
    Goal("file_bytes", 900),
)


# --- the alternation


@pytest.mark.parametrize("goal", GOALS, ids=str)
def test_on_a_small_space_it_finds_what_trying_every_machine_finds(network: Network, goal: Goal) -> None:
    found, best = alternate(network, space_of(), goal).best, exhaustive(network, space_of(), goal)
    assert best is not None
    assert found.damage == pytest.approx(best.damage, abs=1e-12)


@pytest.mark.parametrize("goal", GOALS[:3], ids=str)
def test_it_never_ends_worse_than_it_starts(network: Network, goal: Goal) -> None:
    space = space_of()
    done = alternate(network, space, goal)
    bench = Bench(network, space.machines()[0])
    starts = [step for step in done.steps if step.number == 0 and not step.problem]
    assert starts
    assert all(done.best.damage <= step.damage for step in starts)
    for before, after in zip(done.steps, done.steps[1:], strict=False):
        if before.start != after.start:
            continue
        assert before.plan is not None
        figures = bench.measure_plan(before.plan)
        own, chosen = (figures[bench.machines.index(step.machine)] for step in (before, after))
        assert own is not None
        assert chosen is not None
        assert chosen.values[goal.objective] <= own.values[goal.objective]


def test_every_plan_pays_its_budget(network: Network) -> None:
    goal = Goal("latency_us", 1.0)
    for step in alternate(network, space_of(), goal).steps:
        if step.plan is not None:
            assert step.plan.allocation is not None
            assert step.plan.allocation.reached <= step.machine.clock_mhz * goal.limit


def test_more_budget_never_does_more_damage(network: Network) -> None:
    damages = [
        alternate(network, space_of(), Goal("latency_us", limit)).best.damage for limit in (0.9, 1.0, 1.2)
    ]
    assert damages == sorted(damages, reverse=True)
    assert damages[0] > damages[-1]


def test_area_and_energy_are_kept(network: Network) -> None:
    goal = Goal("latency_us", 1.0)
    free = alternate(network, space_of(), goal).best
    assert free.figures is not None
    limits = {"area_mm2": 0.97 * free.figures.values["area_mm2"]}
    bound = alternate(network, space_of(constraints=limits), goal).best
    assert bound.figures is not None
    assert bound.figures.values["area_mm2"] <= limits["area_mm2"]
    assert bound.damage >= free.damage
    with pytest.raises(InputError, match="energy_pj"):
        alternate(network, space_of(constraints={"energy_pj": 1.0}), goal)


def test_a_clock_is_compared_in_time(network: Network) -> None:
    """A faster clock is a shorter time, but more cycles for the same DRAM: cycles would choose the slow one."""
    axes = {"clock_mhz": [250, 1000]}
    best = alternate(
        network, space_of(machine={"base": "msa-8x8", "axes": axes}, blocks=["4x4"]), Goal("latency_us", 1.2)
    ).best
    assert best.machine.clock_mhz == 1000


def test_a_cycle_and_a_join_are_told(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    space, goal = space_of(), Goal("latency_us", 1.0)
    machines = space.machines()[0]
    follows = dict(zip(machines[:4], [machines[1], machines[2], machines[1], machines[0]], strict=True))

    def step(self: Any, start: int, number: int, machine: Machine) -> tuple[Step, Machine]:
        return Step(start, number, machine, None, 1.0, None), follows[machine]

    monkeypatch.setattr(alternation._Search, "step", step)
    search = alternation._Search(network, space, goal, Bench(network, machines))
    assert "cycle of 2" in search.run(0, machines[0])
    assert "joined start 0" in search.run(1, machines[3])
    monkeypatch.setitem(follows, machines[3], machines[3])
    other = alternation._Search(network, space, goal, Bench(network, machines))
    assert "settled after 1" in other.run(0, machines[3])


def test_a_plan_runs_only_where_the_native_block_divides_it(network: Network) -> None:
    space = space_of()
    machines = space.machines()[0]
    bench = Bench(network, machines)
    best = alternate(network, space_of(blocks=["4x4"]), Goal("latency_us", 1.0)).best
    assert best.plan is not None
    found = {m.array.block: f for m, f in zip(machines, bench.measure_plan(best.plan), strict=True)}
    assert found[8, 4] is None
    assert found[4, 4] is not None
    assert found[2, 4] is not None


def test_curvature_decides_what_is_kept(network: Network) -> None:
    """A layer whose weights do not matter at all gives its budget away."""
    ones = {name: torch.ones_like(network.model[int(name)].weight) for name in ("0", "2", "4")}  # type: ignore[index, union-attr, arg-type]
    space = space_of(weighing="fisher")
    kept = []
    for first_half in (1.0, 1e-9):
        weight = ones["2"].clone()
        weight[:8] *= first_half
        h = Network(network.model, network.input_shape, {**ones, "2": weight})
        plan = alternate(h, space, Goal("latency_us", 1.0)).best.plan
        assert plan is not None
        counts = {layer.name: math.prod(layer.types_shape) - layer.counts[0] for layer in plan.layers}
        kept.append(counts["2"])
    assert kept[1] < kept[0]


# --- the rival


def test_uniform_ratios_use_all_of_the_budget(network: Network) -> None:
    space, goal = space_of(), Goal("latency_us", 1.0)
    choice = best_uniform(network, space, goal, exempt_first_last=False)
    assert choice.figures.values["latency_us"] <= goal.limit
    bench = Bench(network, space.machines()[0])
    from compress.rules import plan_layers

    one_less = choice.config.model_copy(
        update={"pruned": choice.config.pruned - 1 / 200, "unified": choice.config.unified + 1 / 200}
    )
    figures = bench.measure_plan(plan_layers(network.model, one_less))
    assert cheapest(figures, goal, {}, bound=goal.limit) is None
    assert alternate(network, space, goal).best.damage <= choice.damage


def test_uniform_ratios_that_cannot_be(network: Network) -> None:
    with pytest.raises(InputError, match="cannot be reached"):
        best_uniform(network, space_of(), Goal("latency_us", 0.01), exempt_first_last=True)


# --- the whole run


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return images_of(run_space().training, 0)


@pytest.fixture(scope="module")
def dense() -> Checkpoint:
    return Checkpoint(zoo.build("lenet300", 10, 1).eval(), "lenet300", 10, 1)


class Killed(Exception):
    pass


LENET_GOAL = Goal("latency_us", 4)


def run_space(**changes: Any) -> CoDesignSpace:
    """Two machines and large blocks: what a run does, quickly."""
    machine = {"base": "msa-8x8", "axes": {"array.columns": [4, 8]}}
    return space_of(blocks=["8x4", "8x8"], machine=machine, **changes)


@pytest.fixture(scope="module")
def finished(dense: Checkpoint, digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codesign")
    codesign(dense, digits, run_space(), LENET_GOAL, folder, seed=5)
    return folder


def test_the_trained_winner_keeps_its_budget_in_simulation(finished: Path) -> None:
    machine = load_machine(finished / MACHINE)
    report = simulate(machine, load_artifact(finished / ARTIFACT).layers())
    assert report.summary["latency_cycles"] <= LENET_GOAL.limit * machine.clock_mhz
    result = read_json(finished / "result.json")
    assert result is not None
    assert result["trained"]["latency_cycles"] == report.summary["latency_cycles"]
    assert result["limits_broken"] == []
    assert result["accuracy"]["integer"] > 0


@pytest.mark.parametrize("at", ["choosing", "admm epoch 2/2", "retrain epoch 2/2"])
def test_a_killed_run_ends_like_one_that_was_not(
    at: str, finished: Path, dense: Checkpoint, digits: Dataset, tmp_path: Path
) -> None:
    def kill(doing: str, _done: float, _total: float) -> None:
        if at in doing:
            raise Killed

    with pytest.raises(Killed):
        codesign(dense, digits, run_space(), LENET_GOAL, tmp_path, seed=5, tell=kill)
    doings: list[str] = []
    codesign(
        dense, digits, run_space(), LENET_GOAL, tmp_path, seed=5, tell=lambda doing, *_: doings.append(doing)
    )
    if at != "choosing":
        assert "training, admm epoch 1/2" not in doings
    for name in (MACHINE, ARTIFACT, "alternation.json", "alternation.csv", "result.json"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_finished_run_is_not_run_again(finished: Path, dense: Checkpoint, digits: Dataset) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / MACHINE, finished / ARTIFACT)}
    doings: list[str] = []
    codesign(
        dense, digits, run_space(), LENET_GOAL, finished, seed=5, tell=lambda doing, *_: doings.append(doing)
    )
    assert doings == []
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_folder_of_another_run_is_refused(finished: Path, dense: Checkpoint, digits: Dataset) -> None:
    with pytest.raises(InputError) as caught:
        codesign(dense, digits, run_space(weighing="fisher"), Goal("latency_us", 5), finished, seed=6)
    assert {problem.field for problem in caught.value.problems} == {"goal.limit", "space.weighing", "seed"}


def test_damaged_files_of_a_folder(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes((finished / "result.json").read_bytes()[:-20])
    (tmp_path / "b.json").write_text('{"format": "other"}')
    (tmp_path / "c.json").write_text('{"format": "hwsim-codesign", "format_version": 99}')
    for name in "abc":
        with pytest.raises(FormatError):
            read_json(tmp_path / f"{name}.json")


@pytest.mark.parametrize("name", preset_names())
def test_machine_files_read_back(name: str, tmp_path: Path) -> None:
    machine = load_machine(name)
    (tmp_path / "machine.toml").write_text(machine_toml(machine), "utf-8")
    assert load_machine(tmp_path / "machine.toml") == machine


# --- statistics


def test_paired_interval_is_that_of_student() -> None:
    # t(0.975, 2) = 4.302653 (any table, ours with 3 decimals); deviation 1, so half the interval is 4.302653/√3.
    found = paired([1.0, 2.0, 3.0])
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), abs=3e-4)
    assert paired([2.0]).mean == 2
    assert math.isnan(paired([2.0]).low)


def run(side: str, latency: float, accuracy: float, seed: int = 0, limit: float = 1.0) -> dict[str, Any]:
    return {
        "side": side,
        "seed": seed,
        "limit": limit,
        "trained": {"latency_us": latency},
        "accuracy": {"integer": accuracy},
    }


def test_speed_at_equal_accuracy() -> None:
    curve = [run("a", 2, 0.6), run("a", 4, 0.8), run("a", 5, 0.7), run("a", 1, 0.99, seed=1)]
    rivals = [run("b", 6, accuracy, limit=i) for i, accuracy in enumerate((0.7, 0.5, 0.9, 0.8, 0.6))]
    found = {each.limit: each for each in speed_ups([*curve, *rivals], "a", "b")}
    assert (found[0].factor, found[0].is_bound) == (pytest.approx(2.0), False)  # 0.7 at 3 µs
    assert (found[1].factor, found[1].is_bound) == (3.0, True)
    assert found[2].factor is None
    assert (found[3].factor, found[4].factor) == (pytest.approx(1.5), pytest.approx(3.0))


# --- bad input


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("latency=5", "latency_us"),
        ("latency_us", "NAME=LIMIT"),
        ("latency_us=", "positive"),
        ("latency_us=-1", "positive"),
        ("energy_pj=nan", "positive"),
        ("energy_pj=inf", "positive"),
    ],
)
def test_bad_goals(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_goal(text)


def test_a_space_tells_every_problem_at_once() -> None:
    data = {
        "blocks": ["4by4"],
        "machine": {"base": "msa-8x8", "axes": {"array.colums": [4]}},
        "constraints": {"area": 3},
        "weighing": "hesian",
        "training": {"dataset": "mnist", "epochs": 3},
    }
    with pytest.raises(InputError) as caught:
        parse_codesign_space(data, "space.toml")
    text = str(caught.value)
    for said in (
        "OUTPUTSxREDUCTION",
        "array.columns",
        "area_mm2",
        "hessian",
        "fashion-mnist",
        "training.epochs",
    ):
        assert said in text, said


@pytest.mark.parametrize("blocks", [[], ["4x4", "4x4"], ["0x4"], ["4x4x4"], ["300x1"], ["4x"]])
def test_bad_block_shapes(blocks: list[str]) -> None:
    with pytest.raises(InputError, match="blocks"):
        space_of(blocks=blocks)


def test_a_list_of_one_wrong_entry_is_not_called_empty() -> None:
    with pytest.raises(InputError, match='did you mean "lanes"') as caught:
        CoDesignSpace(blocks=["4x4"], hold=["lane"], machine={"base": "msa-8x8"})
    assert len(caught.value.problems) == 1


def test_number_formats_are_no_axis() -> None:
    with pytest.raises(InputError, match=r"precision\.weight_bits"):
        space_of(machine={"base": "msa-8x8", "axes": {"precision.weight_bits": [4, 8]}})


def test_goals_that_do_not_suit_a_space(network: Network) -> None:
    clocks = space_of(machine={"base": "msa-8x8", "axes": {"clock_mhz": [500, 1000]}})
    with pytest.raises(InputError, match="latency_us"):
        alternate(network, clocks, Goal("latency_cycles", 5000))
    with pytest.raises(InputError, match="limited by the budget already"):
        alternate(network, space_of(constraints={"energy_pj": 1e6}), Goal("energy_pj", 1e6))
    with pytest.raises(InputError, match="none of 12 combinations"):
        alternate(network, space_of(constraints={"area_mm2": 0.01}), Goal("latency_us", 5))
    with pytest.raises(InputError, match="cannot be reached"):
        alternate(network, space_of(), Goal("latency_us", 0.01))


def test_the_space_that_ships_is_valid() -> None:
    shipped = Path(alternation.__file__).parents[1] / "spaces" / "codesign.toml"
    machines, refused = load_codesign_space(shipped).machines()
    assert len(machines) > 100
    assert refused


def test_the_command_tells_all_problems_at_once(tmp_path: Path) -> None:
    space = tmp_path / "space.toml"
    space.write_text('blocks = ["4x4"]\n[machine]\nbase = "msa-9x9"\n')
    result = CliRunner().invoke(
        cli,
        ["codesign", "lenet6", "--budget", "latency=3", "--space", str(space), "--out", str(tmp_path / "o")],
    )
    text = str(result.exception)
    assert isinstance(result.exception, InputError)
    for said in ("lenet5", "latency_us", "msa-9x9"):
        assert said in text, said
    assert not (tmp_path / "o").exists()


def test_the_command(tmp_path: Path) -> None:
    space = tmp_path / "space.toml"
    training = "\n".join(f"{name} = {json.dumps(value)}" for name, value in TINY.items())
    space.write_text(
        'blocks = ["8x8"]\n[machine]\nbase = "msa-8x8"\n[machine.axes]\n"array.columns" = [4, 8]\n[training]\n'
        + training.replace("_epochs = 2", "_epochs = 1")
    )
    arguments = ["codesign", "lenet300", "--budget", "latency_us=4", "--space", str(space)]
    result = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "o")], catch_exceptions=False)
    assert result.exit_code == 0
    for said in ("machine ", "accuracy ", "budget ", "start 0"):
        assert said in result.output
    for name in (MACHINE, ARTIFACT, "report.json", "alternation.csv", "asked.json", "result.json"):
        assert (tmp_path / "o" / name).exists()
    explained = CliRunner().invoke(
        cli, ["explain", str(tmp_path / "o" / "report.json")], catch_exceptions=False
    )
    assert explained.exit_code == 0
    trained = sorted((tmp_path / "o" / "dense").iterdir())
    other = CliRunner().invoke(cli, [*arguments, "--seed", "1", "--out", str(tmp_path / "o")])
    assert isinstance(other.exception, InputError)
    assert "seed" in [problem.field for problem in other.exception.problems]
    assert (
        sorted((tmp_path / "o" / "dense").iterdir()) == trained
    )  # refused before a network is trained for it


def test_the_study_command_tells_all_problems_at_once(tmp_path: Path) -> None:
    space = tmp_path / "space.toml"
    space.write_text('blocks = ["4x4"]\n[machine]\nbase = "msa-9x9"\n')
    arguments = ["--runs", str(tmp_path / "runs"), "--network", "lenet6", "--budget", "latency=3"]
    result = CliRunner().invoke(cli, ["codesign-study", *arguments, "--space", str(space)])
    assert isinstance(result.exception, InputError)
    for said in ("lenet5", "latency", "msa-9x9"):
        assert said in str(result.exception), said


# --- the page


def test_the_page_is_what_its_numbers_say(tmp_path: Path) -> None:
    study = load_study(DOCS / "codesign.json")
    write_page(study, tmp_path / "codesign.md")
    assert (tmp_path / "codesign.md").read_text("utf-8") == (DOCS / "codesign.md").read_text("utf-8")
    assert "{{" not in (DOCS / "codesign.md").read_text("utf-8")


def test_a_study_goes_on_and_writes_its_page(tmp_path: Path) -> None:
    space = tmp_path / "space.toml"
    training = "\n".join(f"{name} = {json.dumps(value)}" for name, value in TINY.items())
    space.write_text(
        'blocks = ["8x8"]\n[machine]\nbase = "msa-8x8"\n[training]\n'
        + training.replace("_epochs = 2", "_epochs = 1")
    )
    arguments = ["codesign-study", "--network", "lenet300", "--seeds", "2", "--space", str(space)]
    arguments += [
        "--budget",
        "latency_us=6",
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "page.md"),
    ]
    CliRunner().invoke(cli, arguments, catch_exceptions=False)
    page = (tmp_path / "page.md").read_text("utf-8")
    assert "2 seeds at every budget" in page
    assert "{{" not in page
    assert (tmp_path / "images" / "codesign.png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}
    assert before
    CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert (tmp_path / "page.md").read_text("utf-8") == page


def test_a_study_is_of_latencies() -> None:
    with pytest.raises(InputError) as caught:
        Study("lenet5", (Goal("energy_pj", 1e6),), (0, 0))
    assert len(caught.value.problems) == 2


def test_a_page_without_numbers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--runs"):
        load_study(tmp_path / "codesign.json")
