"""Prices of the codec against the codec itself, and files that keep a budget of bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from compress import file_budget
from compress.allocation import allocate
from compress.artifact import Artifact, artifact_size
from compress.budget import Budget, FileRates, LayerRates, file_bytes, parse_budget
from compress.file_budget import compress_within, file_rates, within_file_bytes
from compress.fill import UnreachableError
from compress.one_shot import OneShotRecipe, one_shot
from compress.rebuild import make_artifact
from compress.rules import CompressionConfig, plan_layers
from hwsim.errors import InputError, Problem
from hwsim.layer import DENSE, PRUNED, UNIFIED

ALL = CompressionConfig(block=(4, 4), exempt_first_last=False)
TOLERANCE = 0.02


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 160), nn.ReLU(), nn.Linear(160, 96), nn.ReLU(), nn.Linear(96, 10))
        with torch.no_grad():
            for layer in model[::2]:
                layer.weight *= torch.exp(torch.randn(layer.weight.shape))
    return model.eval()


def built(budget: Budget | None, config: CompressionConfig = ALL) -> Artifact:
    """Projected, which is what decides the bytes, and quick."""
    model = network()
    plan = plan_layers(model, config) if budget is None else allocate(model, None, config, budget=budget)
    result = one_shot(model, torch.ones(1, 64), plan, OneShotRecipe(method="projection"))
    return make_artifact(model, result.layers, (64,), 10, recipe={"plan": plan.to_dict()})


@pytest.mark.parametrize(("pruned", "unified"), [(0.5, 0.3), (0.0, 1.0), (0.6, 0.4), (0.0, 0.0), (1.0, 0.0)])
def test_prices_add_up_to_the_file_that_they_come_from(pruned: float, unified: float) -> None:
    config = ALL.model_copy(update={"pruned": pruned, "unified": unified})
    artifact = built(None, config)
    rates = file_rates(artifact)
    layers = plan_layers(network(), config).layers
    total = rates.fixed_bytes + sum(
        file_bytes(layer, artifact.compressed[layer.name].types, rates.layers[layer.name]) for layer in layers
    )
    assert total == pytest.approx(artifact_size(artifact), rel=1e-9)


def test_symbols_that_a_file_does_not_hold_are_priced_at_full_width() -> None:
    rates = file_rates(built(None, ALL.model_copy(update={"pruned": 1.0, "unified": 0.0}))).layers["0"]
    assert (rates.magnitude_bits, rates.dense_bits, rates.sign_bits) == (8, 8, 1)


def test_a_layer_costs_what_its_rates_say() -> None:
    layer = plan_layers(nn.Sequential(nn.Linear(6, 6, bias=False)), ALL).layers[0]
    types = np.array([[[PRUNED, UNIFIED], [DENSE, DENSE]]], np.uint8)
    # 1.5 bits of entropy per type; the unified block has 4 × 2 real weights, the dense ones 2 × 4 and 2 × 2.
    rates = LayerRates(0.5, 6.0, 5.0, 0.75, 11.0)
    assert file_bytes(layer, types, rates) == pytest.approx((0.5 * 6 + 6 + 0.75 * 8 + 5 * 12) / 8 + 11)
    budget = replace(parse_budget("file_bytes=100"), rates=FileRates({"0": rates}, 40.0))
    assert budget.cost_function(nn.Sequential(), (6,))(layer, types) == file_bytes(layer, types, rates)
    assert budget.fixed_cost(nn.Sequential(nn.Linear(6, 6)), [layer]) == 40.0


@pytest.mark.parametrize("limit", [7_000, 10_000, 14_000])
def test_the_written_file_keeps_the_budget_and_uses_it(limit: int) -> None:
    turns = []

    def build(budget: Budget, turn: int) -> Artifact:
        turns.append(turn)
        return built(budget)

    artifact, budget = within_file_bytes(parse_budget(f"file_bytes={limit}"), build)
    assert (1 - TOLERANCE) * limit <= artifact_size(artifact) <= limit
    assert len(turns) <= 4
    assert budget.rates is not None
    stated = {"quantity": "file_bytes", "limit": limit, "reached": artifact_size(artifact)}
    assert artifact.results["budget"] == stated
    # Without the codec's prices the same budget leaves a good part of the file unused, or is missed.
    assert not 0.95 * limit <= artifact_size(built(parse_budget(f"file_bytes={limit}"))) <= limit


def test_more_than_the_dense_network_ends_after_its_turns() -> None:
    sizes = []

    def build(budget: Budget, turn: int) -> Artifact:
        artifact = built(budget)
        sizes.append(artifact_size(artifact))
        return artifact

    artifact, _ = within_file_bytes(parse_budget("file_bytes=1e6"), build, most_turns=2)
    assert artifact_size(artifact) == artifact.results["budget"]["reached"]
    assert max(sizes) < artifact_size(artifact) < max(sizes) + 100  # the budget is named in its results
    assert len(sizes) == 2


def test_a_budget_that_no_turn_meets_is_refused_with_the_smallest_file() -> None:
    artifact = built(parse_budget("file_bytes=8000"))
    with pytest.raises(InputError, match=r"not met in 3 turns; the smallest file has \d,\d{3} bytes"):
        within_file_bytes(parse_budget("file_bytes=1000"), lambda budget, turn: artifact, most_turns=3)


@pytest.mark.parametrize("limit", [2_300, 2_820])
def test_a_budget_that_the_upper_estimate_refuses_is_kept_by_the_file(limit: int) -> None:
    with pytest.raises(InputError, match="still costs 2,938"):
        built(parse_budget(f"file_bytes={limit}"))
    artifact, _ = within_file_bytes(parse_budget(f"file_bytes={limit}"), lambda budget, turn: built(budget))
    assert (1 - TOLERANCE) * limit <= artifact_size(artifact) <= limit
    executed = [int((layer.types != PRUNED).sum()) for layer in artifact.compressed.values()]
    assert sum(executed) > 10 * len(executed)  # the least network was built for its prices, not kept


def test_a_refusal_names_the_budget_and_the_smallest_file_that_there_is() -> None:
    def build(budget: Budget, turn: int) -> Artifact:
        return built(budget, CompressionConfig())

    with pytest.raises(
        InputError, match=r"file_bytes: 6,000 cannot be reached; the smallest file has"
    ) as error:
        within_file_bytes(parse_budget("file_bytes=6000"), build)
    (problem,) = error.value.problems
    assert "exempt" in problem.hint
    smallest = int(problem.message.split()[-2].replace(",", ""))
    artifact, _ = within_file_bytes(parse_budget(f"file_bytes={smallest + 10}"), build)
    assert artifact_size(artifact) <= smallest + 10


def refused(budget: Budget, smallest: float) -> UnreachableError:
    return UnreachableError(
        Problem("file_bytes", f"{budget.limit} cannot be reached", "larger blocks"), smallest
    )


def test_where_less_than_the_budget_is_refused_the_whole_of_it_is_tried() -> None:
    """What is aimed at after a miss lies below the budget, and no user has asked for it."""
    large, small = (built(parse_budget(f"file_bytes={limit}")) for limit in (4_000, 3_200))
    budget = parse_budget(f"file_bytes={artifact_size(small) + 100}")
    limits = []

    def build(aim: Budget, turn: int) -> Artifact:
        limits.append(aim.limit)
        if aim.limit < budget.limit - 1:
            raise refused(aim, budget.limit - 1)
        return large if turn == 0 else small

    artifact, _ = within_file_bytes(budget, build)
    assert artifact.compressed == small.compressed
    assert limits[0] == limits[2] == budget.limit > limits[1]
    with pytest.raises(InputError, match=rf"^budget: file_bytes: {budget.limit:,.0f} ") as error:
        within_file_bytes(budget, lambda aim, turn: large if aim is budget else build(aim, 0))
    assert "larger blocks" in str(error.value)


def test_a_file_that_kept_the_budget_is_not_lost_to_a_later_refusal() -> None:
    artifact = built(parse_budget("file_bytes=4000"))
    budget = parse_budget(f"file_bytes={1.5 * artifact_size(artifact)}")

    def build(aim: Budget, turn: int) -> Artifact:
        if turn > 0 and aim.limit < 1e6:
            raise refused(aim, 1e6)
        return artifact

    assert within_file_bytes(budget, build)[0].compressed == artifact.compressed


def test_a_trained_network_says_the_budget_that_was_asked_for_and_its_own_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    aims = []

    def compress(*_: object, budget: Budget, one_shot: OneShotRecipe | None, **options: object) -> Artifact:
        """Training makes a larger file of it."""
        aims.append(budget.limit)
        artifact = built(budget if one_shot else replace(budget, limit=1.1 * budget.limit))
        spent = {"quantity": "file_bytes", "limit": budget.limit, "reached": 1.0}
        return replace(artifact, results={"budget": spent, "warnings": []})

    monkeypatch.setattr(file_budget, "compress_checkpoint", compress)
    trained = compress_within(None, None, ALL, budget=parse_budget("file_bytes=10000"))  # type: ignore[arg-type]
    assert aims[-1] < 10_000
    size = artifact_size(trained)
    assert trained.results["budget"] == {"quantity": "file_bytes", "limit": 10_000, "reached": size}
    assert size > 10_000
    assert trained.results["warnings"] == [
        "the trained network does not keep the budget of 10,000 file_bytes: ask for a little less"
    ]


def test_a_budget_of_the_machine_is_tightened_until_the_final_types_keep_it() -> None:
    artifact = built(None)
    limits = []

    def build(budget: Budget, turn: int) -> Artifact:
        """Always 3 % above what was dealt out."""
        limits.append(budget.limit)
        return replace(artifact, results={"budget": {"limit": budget.limit, "reached": 1.03 * budget.limit}})

    found = file_budget.within_measured(parse_budget("latency_cycles=1000"), build)
    assert limits == pytest.approx([1000, 970])
    assert found.results["budget"] == {"limit": 1000, "reached": pytest.approx(999.1)}
    with pytest.raises(
        InputError, match=r"latency_cycles: 1,000 was not met in 6 turns; the last took 2,000"
    ):
        file_budget.within_measured(
            parse_budget("latency_cycles=1000"),
            lambda budget, turn: replace(artifact, results={"budget": {"reached": 2000}}),
        )


def test_a_budget_of_the_machine_that_was_tightened_too_far_takes_the_least() -> None:
    artifact = built(None)

    def build(budget: Budget, turn: int) -> Artifact:
        """The least that can be dealt out is 985; it comes out 30 above what was dealt out, or 5."""
        if budget.limit < 985:
            raise refused(budget, 985)
        more = 30 if budget.limit == 1000 else least
        return replace(artifact, results={"budget": {"limit": budget.limit, "reached": budget.limit + more}})

    least = 5
    found = file_budget.within_measured(parse_budget("latency_cycles=1000"), build)
    assert found.results["budget"] == {"limit": 1000, "reached": 990}
    least = 20
    with pytest.raises(
        InputError, match=r"latency_cycles: 1,000 was not met in 2 turns; the last took 1,005"
    ):
        file_budget.within_measured(parse_budget("latency_cycles=1000"), build)
