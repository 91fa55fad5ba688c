"""How coarse integers may be, layer by layer: against brute-force derivatives, closed forms, and what rounding really costs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compress.artifact import save_artifact
from compress.one_shot import OneShotRecipe, one_shot
from compress.one_shot.form import Form
from compress.one_shot.solver import quantized
from compress.one_shot.steps import least_steps
from compress.rebuild import make_artifact
from compress.rules import CompressionConfig, Plan, plan_layers
from hwsim.errors import InputError
from hwsim.layer import DENSE, UNIFIED


def network(outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 8, 3, groups=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(8 * 4 * 4, outputs),
        ).eval()


def inputs(count: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def dense_plan(model: nn.Module, pruned: float = 0.0) -> Plan:
    return plan_layers(
        model, CompressionConfig(block=(2, 2), pruned=pruned, unified=0.0, exempt_first_last=False)
    )


def true_squares(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Mean over samples and weights of Σ over outputs of the squared derivative, output by output."""
    found = {}
    for name, module in model.named_modules():
        if not hasattr(module, "weight"):
            continue
        total = 0.0
        for sample in x:
            outputs = model(sample[None])[0]
            for output in outputs:
                (slope,) = torch.autograd.grad(output, module.weight, retain_graph=True)
                total += float(slope.double().square().sum())
        found[name] = total / len(x) / module.weight.numel()
    return found


def test_steps_are_those_of_equal_slopes_with_derivatives_by_brute_force() -> None:
    model, x = network(outputs=1), inputs()
    found = least_steps(model, dense_plan(model), list(x.split(7)), 0.01)
    squares = true_squares(model, x)
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if "weight" in name)
    energy = float(model(x).detach().double().square().sum()) / len(x)
    for name, step in found.items():
        # With a single output its sign is squared away: the estimate is exact.
        assert step == pytest.approx((12 * 0.01 * energy / (weights * squares[name])) ** 0.5, rel=1e-4)
    assert set(found) == {"0", "2", "5"}


def test_random_signs_agree_with_all_outputs() -> None:
    model, x = network(outputs=6), inputs(200)
    found = least_steps(model, dense_plan(model), [x], 0.01)
    squares = true_squares(model, x)
    slopes = torch.tensor([squares[name] * step**2 for name, step in found.items()])
    assert float(slopes.max() / slopes.min()) < 1.2


@pytest.mark.parametrize("share", [1e-5, 1e-3])
def test_rounding_with_these_steps_costs_that_share(share: float) -> None:
    original, x = network(), inputs(100)
    steps = least_steps(original, dense_plan(original), [x], share)
    model = copy.deepcopy(original)
    with torch.no_grad():
        for name, step in steps.items():
            weight = model.get_submodule(name).weight
            weight.copy_(torch.round(weight / step) * step)
        wanted = original(x)
        cost = float((model(x) - wanted).square().sum() / wanted.square().sum())
    assert 0.4 * share < cost < 2.5 * share


def test_twice_the_root_of_the_error_is_twice_the_step() -> None:
    model, x = network(), inputs()
    once, four = (least_steps(model, dense_plan(model), [x], share) for share in (0.002, 0.008))
    assert {name: pytest.approx(2 * step) for name, step in once.items()} == four


def test_nothing_asked_for_looks_at_nothing() -> None:
    model = network()
    assert least_steps(model, dense_plan(model), [torch.full((2, 1, 8, 8), torch.nan)], 0.0) == {}


@pytest.mark.parametrize("pruned", [0.5, 0.8])
def test_what_is_pruned_costs_nothing(pruned: float) -> None:
    model, x = network(), inputs()
    every, some = (least_steps(model, dense_plan(model, share), [x], 0.01) for share in (0.0, pruned))
    for name, step in every.items():
        assert some[name] == pytest.approx(step / (1 - pruned) ** 0.5, rel=0.05)  # counts are whole blocks


class _Layouts(nn.Module):
    """The same function of ``[n, t, 8]`` whatever comes first inside."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layout, self.a, self.b, self.c = layout, nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        x = {"plain": x, "folded": x.flatten(0, 1), "transposed": x.transpose(0, 1)}[self.layout]
        h = self.b(self.a(x).relu()).relu()
        h = {"plain": h, "folded": h.reshape(n, t, -1), "transposed": h.transpose(0, 1)}[self.layout]
        return self.c(h.mean(dim=1))


def test_the_layout_inside_a_network_does_not_matter() -> None:
    x = torch.randn(32, 9, 8, generator=torch.Generator().manual_seed(2))
    with torch.random.fork_rng(devices=[]):
        models = [_Layouts(layout) for layout in ("plain", "folded", "transposed")]
    plain, *others = ([*least_steps(m, dense_plan(m), [x], 0.01).values()] for m in models)
    for found in others:
        assert found == pytest.approx(plain, rel=1e-4)


def test_a_layer_used_twice_counts_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            many = self.layer(x[:, None].expand(-1, 3, -1).flatten(0, 1)).reshape(len(x), 3, 8).sum(dim=1)
            return self.head(self.layer(x).relu() + many)

    model, x = Twice(), torch.randn(20, 8)
    found = least_steps(model, dense_plan(model), [x], 0.01)
    squares = true_squares(model, x)
    ratio = squares["layer"] * found["layer"] ** 2 / (squares["head"] * found["head"] ** 2)
    assert ratio == pytest.approx(1, rel=1e-4)


def test_a_network_may_change_in_place_what_a_layer_has_read() -> None:
    class Residual(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.in_place, self.a, self.b, self.c = (
                in_place,
                nn.Linear(8, 8),
                nn.Linear(8, 8),
                nn.Linear(8, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            y = self.b(h)
            h = h.add_(y) if self.in_place else h + y
            return self.c(h.sigmoid())

    with torch.random.fork_rng(devices=[]):
        models = [Residual(in_place) for in_place in (False, True)]
    x = torch.randn(20, 8)
    apart, in_place = (least_steps(model, dense_plan(model), [x], 0.01) for model in models)
    assert in_place == pytest.approx(apart)


def test_a_layer_that_never_runs_keeps_its_bits() -> None:
    model = network()
    model.unused = nn.Linear(4, 4)
    model.forward = lambda x: nn.Sequential(*list(model)[:6])(x)
    found = least_steps(model, dense_plan(model), [inputs()], 0.01)
    assert found["unused"] == 0
    assert min(step for name, step in found.items() if name != "unused") > 0


def test_values_that_are_not_finite_are_refused() -> None:
    model = network()
    with torch.no_grad():
        model[5].weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        least_steps(model, dense_plan(model), [inputs()], 0.01)


class _Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).argmax(dim=1)


class _Switched(_Whole):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("model", [_Whole(), _Switched()])
def test_outputs_without_derivatives_are_refused(model: nn.Module) -> None:
    with pytest.raises(InputError, match="no derivative"):
        least_steps(model, dense_plan(model), [torch.randn(4, 8)], 0.01)


def test_outputs_may_be_packed_with_whole_numbers_among_them() -> None:
    class Packed(_Whole):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"real": self.layer(x), "class": self.layer(x).argmax(dim=1)}

    model = Packed()
    plain = nn.Sequential(model.layer)
    x = torch.randn(16, 8)
    steps = [least_steps(each, dense_plan(each), [x], 0.01) for each in (model, plain)]
    assert list(steps[0].values()) == pytest.approx(list(steps[1].values()))


# --- a layer


def one_layer(types: list[list[int]], block: tuple[int, int] = (2, 2)) -> tuple[Plan, Form]:
    types_tensor = torch.tensor([types], dtype=torch.uint8)
    m, k = len(types) * block[0], len(types[0]) * block[1]
    model = nn.Sequential(nn.Linear(k, m, bias=False))
    plan = plan_layers(model, CompressionConfig(block=block, exempt_first_last=False))
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn(1, m, k, generator=random, dtype=torch.float64)
    return plan, Form.of_matrix(matrix, types_tensor, block)


@pytest.mark.parametrize(
    ("types", "block", "factor", "stride"),
    [
        ([[DENSE, DENSE]], (4, 4), 10.0, 1),  # no magnitude is there
        ([[DENSE, UNIFIED]], (4, 4), 10.0, 4),  # the root of 16 weights
        ([[DENSE, UNIFIED]], (2, 4), 10.0, 2),  # the root of 8, down to a power of two
        ([[DENSE, UNIFIED]], (4, 4), 3.9, 2),  # no finer than the bits ask for
        ([[DENSE, UNIFIED]], (4, 4), 4.0, 2),  # 127 is no multiple of 4
        ([[DENSE, UNIFIED]], (4, 4), 4.2, 4),
        ([[UNIFIED, UNIFIED]], (4, 4), 10.0, 4),
    ],
)
def test_magnitudes_are_finer_by_the_root_of_their_weights(types, block, factor: float, stride: int) -> None:
    plan, form = one_layer(types, block)
    layer = plan.layers[0]
    finest = quantized(layer, form, None)
    least = float(np.float32(finest.weights.step_size * factor))
    coarse = quantized(layer, form, None, least_step=least)
    assert coarse.weights.step_size == pytest.approx(least / stride)
    assert not (coarse.weights.dense % stride).any()
    if DENSE in types[0]:
        assert np.abs(coarse.weights.dense).max() >= stride
        dense = form.dense[0].numpy()
        found = coarse.weights.dense[0] * coarse.weights.step_size
        assert np.abs(found - dense).max() <= least / 2 * 1.001


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_bits_still_reach_the_largest_weight(bits: int) -> None:
    plan, form = one_layer([[DENSE, UNIFIED], [DENSE, DENSE]], (4, 4))
    settings = plan.layers[0].settings.model_copy(update={"weight_bits": bits})
    layer = replace(plan.layers[0], settings=settings)
    least = 2 * quantized(layer, form, None).weights.step_size
    coarse = quantized(layer, form, None, least_step=least).weights
    found = coarse.dense[0] * coarse.step_size
    inside = np.abs(form.dense[0].numpy()) < (2 ** (bits - 1) - 1) * least
    assert np.abs(found - form.dense[0].numpy())[inside].max() <= least / 2 * 1.001
    assert coarse.dense.max() > 0


def test_a_step_that_is_fine_already_stays() -> None:
    plan, form = one_layer([[DENSE, UNIFIED]])
    finest = quantized(plan.layers[0], form, None)
    for least in (0.0, finest.weights.step_size):
        again = quantized(plan.layers[0], form, None, least_step=least)
        assert again.weights.step_size == finest.weights.step_size
        assert np.array_equal(again.weights.dense, finest.weights.dense)


def test_a_step_above_all_weights_leaves_zeros() -> None:
    plan, form = one_layer([[DENSE, UNIFIED]])
    coarse = quantized(plan.layers[0], form, None, least_step=1e6)
    assert not coarse.weights.dense.any()
    assert not coarse.weights.magnitudes.any()


# --- a network


@pytest.mark.parametrize("method", ["hessian", "projection"])
@pytest.mark.parametrize("unified", [0.0, 0.3])
def test_more_error_is_a_smaller_file(tmp_path: Path, method, unified: float) -> None:
    sizes, costs = [], []
    for share in (0.0, 1e-3, 3e-2):
        original, x = network(), inputs(64)
        model = copy.deepcopy(original)
        config = CompressionConfig(block=(2, 2), pruned=0.0, unified=unified, exempt_first_last=False)
        result = one_shot(model, x, config, OneShotRecipe(method=method, rounding_error=share))
        artifact = make_artifact(model, result.layers, (1, 8, 8), 3)
        sizes.append(save_artifact(tmp_path / "a.hws.safetensors", artifact))
        with torch.no_grad():
            costs.append(float((model(x) - original(x)).square().sum()))
    assert sizes == sorted(sizes, reverse=True)
    assert unified or costs == sorted(costs)  # what blocks cost hides what rounding does
    assert sizes[2] < 0.95 * sizes[0]


@pytest.mark.parametrize("share", [0.003, 0.1, 1.0])
def test_a_branch_that_rounds_to_nothing_leaves_constant_inputs(share: float) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.i, self.b1, self.b2, self.o = (nn.Linear(*s) for s in ((8, 16), (16, 16), (16, 16), (16, 4)))

        def forward(self, x: Tensor) -> Tensor:
            h = self.i(x).relu()
            return self.o(h + 0.1 * self.b2(self.b1(h).relu()))

    with torch.random.fork_rng(devices=[]):
        original = Branch()
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(4))
    model = copy.deepcopy(original)
    config = CompressionConfig(pruned=0.0, unified=0.0, exempt_first_last=False)
    one_shot(model, x, config, OneShotRecipe(rounding_error=share))
    with torch.no_grad():
        wanted = original(x)
        assert float((model(x) - wanted).square().sum() / wanted.square().sum()) < 1.5 * share


def test_the_fit_makes_up_for_coarse_steps() -> None:
    costs = {}
    for method in ("hessian", "projection"):
        original, x = network(), inputs(256)
        model = copy.deepcopy(original)
        one_shot(
            model,
            x,
            CompressionConfig(pruned=0.0, unified=0.0, exempt_first_last=False),
            OneShotRecipe(method=method, rounding_error=0.05),  # type: ignore[arg-type]
        )
        unseen = inputs(256, seed=9)
        with torch.no_grad():
            costs[method] = float((model(unseen) - original(unseen)).square().sum())
    assert costs["hessian"] < costs["projection"]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ValidationError):
        OneShotRecipe(rounding_error=share)
