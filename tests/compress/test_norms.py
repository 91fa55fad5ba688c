"""Statistics of batch normalisation anew, for weights that were rounded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compress import rate_distortion
from compress.curvature import curvatures
from compress.fit import compress
from compress.layers import CompressedLayer
from compress.norms import BATCH, reestimate_norms
from compress.rate_distortion import coarsen_network, coarsen_within, round_biases, set_weights
from compress.rules import CompressionConfig, Recipe


def inputs_of(count: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1


@pytest.mark.parametrize("count", [2, BATCH, BATCH + 1, 3 * BATCH])
def test_they_are_the_means_over_batches(count: int) -> None:
    inputs = inputs_of(count)
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(6, momentum=0.3))
    model[1](inputs[:2] + 7)
    model[0].train()
    model[1].eval()
    reestimate_norms(model, inputs)
    parts = inputs.chunk(-(-count // BATCH))
    assert torch.allclose(
        model[1].running_mean, torch.stack([part.mean(0) for part in parts]).mean(0), atol=1e-5
    )
    assert torch.allclose(
        model[1].running_var, torch.stack([part.var(0) for part in parts]).mean(0), rtol=1e-4
    )
    assert (model[1].momentum, int(model[1].num_batches_tracked)) == (0.3, 1)
    assert (model[0].training, model[1].training) == (True, False)


def test_what_has_none_or_is_frozen_or_sees_one_input_stays() -> None:
    frozen = nn.BatchNorm1d(6).requires_grad_(False)
    for norm, inputs in (
        (frozen, inputs_of(9)),
        (nn.BatchNorm1d(6), inputs_of(1)),
        (nn.BatchNorm1d(6, track_running_stats=False), inputs_of(9)),
    ):
        before = copy.deepcopy(norm.state_dict())
        reestimate_norms(nn.Sequential(norm).eval(), inputs)
        assert norm.state_dict().keys() == before.keys()
        assert all(torch.equal(values, before[name]) for name, values in norm.state_dict().items())


def test_they_are_put_back_where_the_network_fails() -> None:
    norm = nn.BatchNorm1d(6)
    norm(inputs_of(9))
    state = copy.deepcopy(norm.eval().state_dict())
    with pytest.raises(RuntimeError):
        reestimate_norms(nn.Sequential(norm, nn.Linear(5, 2)), inputs_of(9))
    assert (norm.training, norm.momentum) == (False, 0.1)
    assert all(torch.equal(values, state[name]) for name, values in norm.state_dict().items())


def test_the_scale_and_shift_that_weights_lose_come_back() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4)
        ).eval()
    inputs = inputs_of(200)
    reestimate_norms(model, inputs)
    with torch.no_grad():
        expected = model(inputs)
        model[0].weight *= 0.7
        model[3].bias += 2
        assert not torch.allclose(model(inputs), expected, atol=0.1)
        reestimate_norms(model, inputs)
        assert torch.allclose(model(inputs), expected, atol=1e-3)


def trained() -> tuple[nn.Module, dict[str, CompressedLayer], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(512) % 8
    inputs = torch.eye(8)[labels] * 2 + 0.5 * torch.randn(512, 8, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
        config = CompressionConfig(block=(2, 2), pruned=0.3, unified=0.3, exempt_first_last=False)
        result = compress(
            model,
            config,
            (inputs, labels),
            Recipe(epochs_admm=4, epochs_retrain=20, batch_size=32, lr_retrain=1e-2),
        )
    return model.eval(), result.layers, inputs, labels


def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(inputs), labels))


def test_coarser_networks_get_them() -> None:
    model, layers, inputs, labels = trained()
    curvature = curvatures(model, layers, inputs)
    plain = copy.deepcopy(model)
    set_weights(plain, coarsen_network(copy.deepcopy(model), layers, curvature, 3e-4, inputs))
    coarsen_network(model, layers, curvature, 3e-4, inputs)
    assert loss_of(model, inputs, labels) < loss_of(plain, inputs, labels)


def test_a_budget_counts_with_them_and_refused_ones_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers, inputs, labels = trained()
    round_biases(model, layers)
    before, state = loss_of(model, inputs, labels), copy.deepcopy(model.state_dict())
    tried = copy.deepcopy(model)
    _, multiplier = coarsen_within(tried, layers, inputs, labels, 0.05)
    assert multiplier > 0
    assert loss_of(tried, inputs, labels) <= before + 0.05 + 1e-6
    assert not torch.equal(tried[1].running_var, state["1.running_var"])
    monkeypatch.setattr(rate_distortion, "MULTIPLIERS", (1.0, 2.0))  # all weights become 0
    _, multiplier = coarsen_within(model, layers, inputs, labels, 0.05)
    assert multiplier == 0
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
