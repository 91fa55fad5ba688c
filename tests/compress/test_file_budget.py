"""Prices of the codec against the codec itself, and files that keep a budget of bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from compress import file_budget
from compress.allocate import allocate
from compress.artifact import Artifact, artifact_size
from compress.budget import Budget, FileRates, LayerRates, file_bytes, parse_budget
from compress.file_budget import file_rates, within_file_bytes
from compress.one_shot import OneShotRecipe, one_shot
from compress.rebuild import make_artifact
from compress.rules import CompressionConfig, plan_layers
from hwsim.errors import InputError
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
