"""Whole networks in one shot: order, targets, statistics, and what comes out of it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.one_shot import OneShotRecipe, observe, one_shot
from compress.one_shot import network as module
from compress.projection import project_to_counts
from compress.rebuild import make_artifact, rebuild
from compress.rules import CompressionConfig, plan_layers
from hwsim.errors import FormatError, InputError
from hwsim.layer import DENSE, PRUNED, UNIFIED

ALL = CompressionConfig(block=(2, 2), pruned=0.5, unified=0.25, exempt_first_last=False)


def network(seed: int = 0) -> nn.Module:
    """A convolution with normalisation, a depthwise one, a grouped one, a head; statistics of a training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, stride=2, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 12, 1, groups=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 9, 16),
            nn.ReLU(),
            nn.Linear(16, 5),
        )
        for _ in range(20):
            model(samples(32, int(torch.randint(1 << 20, ()))))
    return model.eval()


def samples(count: int = 96, seed: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 2, 4, 4, generator=random)
    return nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear") + 0.3


@torch.no_grad()
def error(model: nn.Module, original: nn.Module, inputs: Tensor) -> float:
    wanted = original(inputs)
    return float((model(inputs) - wanted).square().sum() / wanted.square().sum())


def compressed(recipe: OneShotRecipe | None = None, config: CompressionConfig = ALL, **options):
    original = network()
    model = copy.deepcopy(original)
    result = one_shot(model, samples(), config, recipe, **options)
    return original, model, result


def test_the_plan_is_met_and_the_errors_are_what_the_layers_say() -> None:
    _, model, result = compressed()
    for layer in result.plan.layers:
        types = result.layers[layer.name].types
        found = tuple(int((types == code).sum()) for code in (PRUNED, UNIFIED, DENSE))
        assert found[:2] == layer.counts
        assert types.shape == layer.types_shape
    assert [each.layer for each in result.errors] == ["0", "3", "6", "9", "11"]
    assert all(0 <= each.reached_percent <= each.projected_percent for each in result.errors)
    assert all(each.is_fitted for each in result.errors)
    assert not result.warnings
    assert not model.training


def test_it_beats_the_projection_and_layers_that_do_not_know_of_each_other() -> None:
    """On other inputs than those of the calibration."""
    losses = {}
    for name, recipe in {
        "projection": OneShotRecipe(method="projection"),
        "layer": OneShotRecipe(target="layer"),
        "network": OneShotRecipe(),
        "no statistics": OneShotRecipe(refit_bias=False),
    }.items():
        original, model, _ = compressed(recipe)
        losses[name] = error(model, original, samples(200, seed=9))
    assert losses["network"] < 0.25 * losses["projection"]
    assert losses["layer"] < 0.5 * losses["projection"]
    assert losses["network"] < losses["layer"]
    assert losses["network"] < losses["no statistics"]
    # Every layer by itself, on the inputs of the original network, put together.
    original = network()
    together = copy.deepcopy(original)
    for layer in plan_layers(original, ALL).layers:
        alone = copy.deepcopy(original)
        rest = [
            {"pattern": other.name, "exempt": True}
            for other in plan_layers(alone, ALL).layers
            if other.name != layer.name
        ]
        one_shot(
            alone,
            samples(),
            ALL.model_copy(update={"rules": parse_rules(rest)}),
            OneShotRecipe(target="layer"),
        )
        with torch.no_grad():
            for name, values in alone.get_submodule(layer.name).named_parameters():
                together.get_submodule(layer.name).get_parameter(name).copy_(values)
            if layer.name in ("0", "3"):
                follower = int(layer.name) + 1
                together[follower].load_state_dict(alone[follower].state_dict())
    assert losses["network"] < error(together, original, samples(200, seed=9))


def parse_rules(rules: list[dict]):
    return CompressionConfig(rules=rules).rules


def test_a_projection_is_the_projection_of_the_weights() -> None:
    original, model, result = compressed(OneShotRecipe(method="projection"))
    assert result.errors == ()
    for layer in result.plan.layers:
        weight = original.get_submodule(layer.name).get_parameter("weight")
        expected = project_to_counts(weight, (2, 2), *layer.counts, groups=layer.groups)
        found = result.layers[layer.name]
        assert torch.equal(torch.from_numpy(found.types), expected.types)
        step = found.weights.step_size
        assert (model.get_submodule(layer.name).weight - expected.weight).abs().max() <= 8 * step
    assert torch.equal(model[1].running_mean, original[1].running_mean)
    assert torch.equal(model[6].bias, original[6].bias)


def test_nothing_to_compress_changes_next_to_nothing() -> None:
    """All blocks dense at 8 bits: only rounding is left, and statistics stay."""
    config = ALL.model_copy(update={"pruned": 0.0, "unified": 0.0})
    original, model, result = compressed(OneShotRecipe(refit_variance=True), config)
    assert error(model, original, samples(50, seed=3)) < 1e-3
    torch.testing.assert_close(model[1].running_mean, original[1].running_mean, atol=0.02, rtol=0.02)
    torch.testing.assert_close(model[1].running_var, original[1].running_var, rtol=0.05, atol=1e-4)
    assert all(each.iterations == 0 for each in result.errors)


def channel_means(model: nn.Module, at: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        outputs = model[: at + 1](inputs).transpose(0, 1).flatten(1)
    return outputs.mean(dim=1), outputs.var(dim=1, correction=0)


def test_means_and_variances_are_those_of_the_original() -> None:
    """After each normalisation, and after a convolution with a bias."""
    found = {}
    for refit_bias, refit_variance in ((True, True), (True, False), (False, False)):
        recipe = OneShotRecipe(refit_bias=refit_bias, refit_variance=refit_variance, held_out=0.0)
        original, found[refit_bias, refit_variance], _ = compressed(recipe)
    for at in (1, 4, 6):
        wanted = channel_means(original, at, samples())
        both, means, neither = (channel_means(model, at, samples()) for model in found.values())
        torch.testing.assert_close(both[0], wanted[0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(means[0], wanted[0], atol=1e-3, rtol=1e-3)
        assert (neither[0] - wanted[0]).abs().max() > 0.01
        if at != 6:
            torch.testing.assert_close(both[1], wanted[1], atol=1e-3, rtol=1e-2)
            assert (means[1] - wanted[1]).abs().max() > 0.02


@torch.no_grad()
@pytest.mark.parametrize("target", ["network", "layer"])
def test_a_fit_that_follows_few_inputs_too_closely_gives_way_to_the_projection(target: str) -> None:
    """60 samples that lie in no small subspace, 400 inputs of a layer: fitted, new inputs come out worse than projected."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(400, 24), nn.ReLU(), nn.Linear(24, 6))
    config = CompressionConfig(block=(2, 2), pruned=0.0, unified=0.0, weight_bits=5, exempt_first_last=False)
    inputs, others = torch.randn(60, 400), torch.randn(400, 400)
    found, kept = {}, {}
    for name, options in (
        ("judged", {}),
        ("fitted", {"held_out": 0.0}),
        ("projected", {"method": "projection"}),
    ):
        model = copy.deepcopy(original)
        recipe = OneShotRecipe(target=target, damping=1e-4, refit_bias=False, **options)
        result = one_shot(model, inputs, config, recipe)
        found[name] = error(model, original, others)
        kept[name] = [each.is_fitted for each in result.errors]
    assert found["fitted"] > 1.2 * found["projected"]
    assert found["judged"] <= 1.02 * found["projected"]
    assert kept["judged"][0] is False
    assert kept["fitted"] == [True, True]


@pytest.mark.parametrize(
    ("sizes", "share", "apart"),
    [
        ([8], 0.25, [3, 7]),
        ([3], 0.25, []),
        ([4], 0.25, [3]),
        ([1, 1, 1, 1, 1], 0.25, [3]),
        ([3, 3], 0.5, [1, 3, 5]),
        ([1], 0.5, []),
        ([8], 0.0, []),
    ],
)
def test_samples_are_held_out_evenly(sizes: list[int], share: float, apart: list[int]) -> None:
    batches = list(torch.arange(sum(sizes)).split(sizes))
    seen, held_out = module._split(batches, share)
    assert torch.cat([*held_out, torch.empty(0, dtype=torch.long)]).tolist() == apart
    together = torch.cat([*seen, *held_out]).sort().values
    assert together.tolist() == list(range(sum(sizes)))


def test_fewer_samples_than_inputs_are_enough_to_run() -> None:
    original = network()
    for count in (1, 2):
        model = copy.deepcopy(original)
        one_shot(model, samples(count), ALL)
        assert math.isfinite(error(model, original, samples(20, seed=4)))


def test_too_little_damping_is_refused_by_name() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64))
        inputs = torch.randn(8, 64)
    with pytest.raises(InputError, match=r"layer 0: damping: 1e-15"):
        one_shot(model, inputs, ALL, OneShotRecipe(damping=1e-15))


def test_batches_of_any_size_give_the_same_errors() -> None:
    """Without ADMM: sums in another order may send its signs another way."""
    found = []
    for inputs, size in ((samples(), 96), (list(samples().split(5)), 1), (samples(), 7)):
        recipe = OneShotRecipe(max_iterations=0, sign_turns=0, batch_size=size, held_out=0.0)
        found.append([each.reached_percent for each in one_shot(network(), inputs, ALL, recipe).errors])
    assert found[1] == pytest.approx(found[0], rel=0.02)
    assert found[2] == pytest.approx(found[0], rel=0.02)


class Twice(nn.Module):
    """Runs a layer twice, another one never, in an order that is not that of registration."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 4)
        self.shared = nn.Linear(6, 6)
        self.spare = nn.Linear(6, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.shared(torch.relu(self.shared(inputs))))


def test_layers_run_twice_or_never() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Twice()
        inputs = torch.randn(60, 6)
    seen = []
    spare = model.spare.weight.detach().clone()
    result = one_shot(model, inputs, ALL, progress=seen.append)
    assert [(now.layer, now.number, now.layers) for now in seen] == [
        ("shared", 1, 3),
        ("last", 2, 3),
        ("spare", 3, 3),
    ]
    assert list(result.layers) == ["last", "shared", "spare"]
    assert [each.layer for each in result.errors] == ["shared", "last"]
    assert result.warnings == ("spare: it never runs; its weights are projected as they are",)
    expected = project_to_counts(spare, (2, 2), *result.plan.layers[2].counts)
    assert torch.equal(torch.from_numpy(result.layers["spare"].types), expected.types)


class Readers(nn.Module):
    """Three layers that read one tensor, and a fourth that reads it after it was changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.late = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = 1.5 * x
        mixed = self.q(x) * self.k(x) + self.v(x)
        x.relu_()
        return mixed + self.late(x)


def test_layers_that_read_the_same_inputs_share_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original, inputs = Readers().eval(), torch.randn(64, 12)
    plain, looked = observe._observe, []

    def count(step: observe.Step, *arguments: object) -> observe.Observed:
        looked.append(step.layer.name)
        return plain(step, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(observe, "_observe", count)
    shared = one_shot(copy.deepcopy(original), inputs, ALL)
    assert looked == ["q", "late"]
    look = observe.Observer.look
    monkeypatch.setattr(
        observe.Observer, "look", lambda self, step, weight: look(self, replace(step, source=None), weight)
    )
    alone = one_shot(copy.deepcopy(original), inputs, ALL)
    assert looked == ["q", "late", "q", "k", "v", "late"]
    assert shared.errors == alone.errors


def test_inputs_of_the_original_are_held_for_later_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(held_bytes: int) -> tuple[dict[str, Tensor], int]:
        monkeypatch.setattr(observe, "MAX_HELD_BYTES", held_bytes)
        model, passes = network(), []
        inputs = observe._OriginalInputs._inputs
        monkeypatch.setattr(
            observe._OriginalInputs, "_inputs", lambda *given: passes.append(1) or inputs(*given)
        )
        one_shot(model, list(samples(96).split(40)), ALL, OneShotRecipe(target="network"))
        monkeypatch.setattr(observe._OriginalInputs, "_inputs", inputs)
        return model.state_dict(), len(passes)

    one_by_one, several, all_at_once = (found(size) for size in (0, 60_000, 1 << 28))
    # Five layers, three batches. Of the first batch 36 samples see the layers: 128, 512, 72, 108 and 16 numbers each.
    assert [one_by_one[1], several[1], all_at_once[1]] == [15, 9, 3]
    for state, _ in (several, all_at_once):
        assert all(torch.equal(values, one_by_one[0][name]) for name, values in state.items())


def test_it_is_reproducible_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    models = [compressed()[1] for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    for name, values in models[0].state_dict().items():
        assert torch.equal(values, models[1].state_dict()[name])


def test_the_evaluation_is_called_before_and_after() -> None:
    original = network()
    seen = []

    def evaluate(model: nn.Module) -> float:
        seen.append(error(model, original, samples()))
        return seen[-1]

    result = one_shot(copy.deepcopy(original), samples(), ALL, evaluate=evaluate)
    assert (result.accuracy_dense, result.accuracy_compressed) == (0.0, seen[1])


def test_the_artifact_gives_the_same_network_back(tmp_path: Path) -> None:
    _, model, result = compressed()
    artifact = make_artifact(model, result.layers, (2, 8, 8), 5)
    again = rebuild(artifact, network)
    with torch.no_grad():
        assert torch.equal(again(samples(5)), model(samples(5)))


# --- a run that is stopped


class _Stopped(Exception):
    pass


def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, wanted, expected = compressed()

    def stop(now: module.OneShotProgress) -> None:
        if now.number == 3:
            raise _Stopped

    with pytest.raises(_Stopped):
        compressed(progress=stop, checkpoint=tmp_path)
    solved = []
    compress_layer = module._compress_layer
    monkeypatch.setattr(
        module,
        "_compress_layer",
        lambda step, *rest: solved.append(step.layer.name) or compress_layer(step, *rest),
    )
    _, model, result = compressed(checkpoint=tmp_path)
    assert solved == ["9", "11"]
    assert result.errors == expected.errors
    for name, values in wanted.state_dict().items():
        assert torch.equal(values, model.state_dict()[name]), name


@pytest.mark.parametrize("share", [0.0, 0.01])
def test_runs_that_stopped_before_there_was_a_rounding_error_go_on(share: float) -> None:
    model = network()
    recipe = OneShotRecipe(rounding_error=share)
    identity = module._identity(model, plan_layers(model, ALL), recipe, [samples(4)])
    assert identity["recipe"].get("rounding_error") == (share or None)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    compressed(checkpoint=tmp_path)
    with pytest.raises(InputError) as caught:
        compressed(OneShotRecipe(damping=0.5), checkpoint=tmp_path)
    assert [problem.field for problem in caught.value.problems] == ["recipe.damping"]
    path = next(iter(sorted(tmp_path.iterdir())))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match="sha256"):
        compressed(checkpoint=tmp_path)


# --- bad input


@pytest.mark.parametrize("inputs", [torch.zeros(0, 2, 8, 8), []])
def test_no_inputs_are_refused(inputs) -> None:
    with pytest.raises(InputError, match="no samples"):
        one_shot(network(), inputs, ALL)


def test_inputs_that_are_not_finite_are_refused() -> None:
    inputs = samples()
    inputs[3, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        one_shot(network(), inputs, ALL)


def test_a_hessian_that_does_not_fit_is_refused_at_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "MAX_HESSIAN_ENTRIES", 108**2)
    one_shot(network(), samples(8), ALL)
    monkeypatch.setattr(observe, "MAX_HESSIAN_ENTRIES", 108**2 - 1)
    with pytest.raises(InputError, match=r"layer 9.*GiB"):
        one_shot(network(), samples(8), ALL)


def test_channels_may_be_permuted_first() -> None:
    config = ALL.model_copy(update={"permute_channels": True})
    original, model, result = compressed(config=config)
    assert len(result.permutation.permuted) > 0
    assert error(model, original, samples()) < 0.5
