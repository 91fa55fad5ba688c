"""ADMM against a plain transcription of its three lines, closed forms, and exact resumption."""

import copy
import logging
import math

import pytest
import safetensors.torch
import torch
from torch import nn

from compress.admm import ADMM, project_to_types, ramp_share
from compress.projection import project
from compress.rules import CompressionConfig, plan_layers
from hwsim.errors import FormatError, InputError
from hwsim.layer import DENSE, PRUNED, UNIFIED

CONFIG = CompressionConfig(block=(2, 3), pruned=0.4, unified=0.4, exempt_first_last=False)


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(2, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5))


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 2, 4, 4, generator=generator), torch.randint(0, 5, (16,), generator=generator)


def train(model, admm, steps, every=5):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(1, steps + 1):
        inputs, targets = batch(step)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(inputs), targets) + admm.penalty()).backward()
        optimizer.step()
        if step % every == 0:
            admm.step()


def move(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_updates_are_those_of_the_definition():
    model = network()
    rho, growth, ceiling = 0.2, 1.5, 0.4
    admm = ADMM(model, CONFIG, rho=rho, rho_growth=growth, rho_max=ceiling)
    layers = {"0": (model[0], 2), "3": (model[3], 1)}

    def nearest(tensor, groups):
        return project(tensor, (2, 3), 0.4, 0.4, groups=groups)

    z = {name: nearest(module.weight, groups).weight for name, (module, groups) in layers.items()}
    types = {name: nearest(module.weight, groups).types for name, (module, groups) in layers.items()}
    u = {name: torch.zeros_like(module.weight) for name, (module, _) in layers.items()}
    for update in range(1, 5):
        move(model, update)
        expected = sum(rho / 2 * (m.weight - z[n] + u[n]).square().sum() for n, (m, _) in layers.items())
        torch.testing.assert_close(admm.penalty(), expected)
        residuals = {residual.layer: residual for residual in admm.step()}
        for name, (module, groups) in layers.items():
            weight = module.weight.detach()
            result = nearest(weight + u[name], groups)
            residual = residuals[name]
            assert (residual.update, residual.rho) == (update, pytest.approx(rho))
            assert residual.primal == pytest.approx(float((weight - result.weight).norm() / weight.norm()))
            assert residual.dual == pytest.approx(
                rho * float((result.weight - z[name]).norm() / weight.norm())
            )
            assert residual.type_changes == pytest.approx(
                float((result.types != types[name]).double().mean())
            )
            flips = (result.weight.sign() * z[name].sign() == -1).double().mean()
            assert residual.sign_flips == pytest.approx(float(flips))
            u[name] = u[name] + weight - result.weight
            z[name], types[name] = result.weight, result.types
        grown = min(rho * growth, ceiling)
        u = {name: value * rho / grown for name, value in u.items()}
        rho = grown
    assert admm.rho == {"0": ceiling, "3": ceiling}
    assert len(admm.residuals) == 8


@pytest.mark.parametrize("with_curvature", [False, True])
def test_the_gradient_is_that_of_the_squared_norm(with_curvature):
    model = network()
    h = {"3": torch.rand(5, 24, generator=torch.Generator().manual_seed(2))} if with_curvature else {}
    admm = ADMM(model, CONFIG, rho={"0": 0.3, "3": 0.7}, curvature=h)
    move(model, 1)
    admm.step()
    move(model, 2)
    (3 * admm.penalty()).backward()
    state = admm.state_dict()
    for name, rho in admm.rho.items():
        module = model.get_submodule(name)
        difference = module.weight - state[f"{name}.target"] + state[f"{name}.dual"]
        weighted = difference * h.get(name, 1.0)
        torch.testing.assert_close(module.weight.grad, 3 * rho * weighted.detach())
        assert module.bias.grad is None
    plain = sum(
        rho
        / 2
        * (
            h.get(n, 1.0) * (model.get_submodule(n).weight - state[f"{n}.target"] + state[f"{n}.dual"]) ** 2
        ).sum()
        for n, rho in admm.rho.items()
    )
    torch.testing.assert_close(admm.penalty(), plain)


def test_weights_of_the_asked_form_have_no_penalty_and_no_residual():
    model = network()
    ADMM(model, CONFIG).finalize()
    admm = ADMM(model, CONFIG)
    assert float(admm.penalty().detach()) == pytest.approx(0, abs=1e-10)
    for residual in admm.step():
        assert residual.primal == pytest.approx(0, abs=1e-6)
        assert (residual.type_changes, residual.sign_flips) == (0, 0)
    assert admm.warnings() == []


def test_the_penalty_alone_converges_to_the_asked_form():
    model = network()
    admm = ADMM(model, CONFIG, rho=1.0, rho_growth=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(40):
        optimizer.zero_grad()
        admm.penalty().backward()
        optimizer.step()
        if step % 4 == 3:
            admm.step()
    assert all(residual.primal < 1e-2 for residual in admm.residuals[-2:])
    assert admm.residuals[0].primal > admm.residuals[-2].primal


def test_exempt_layers_are_left_alone_and_come_out_dense():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    before = copy.deepcopy(model.state_dict())
    admm = ADMM(model, CompressionConfig(block=(2, 2)))
    admm.penalty().backward()
    assert model[0].weight.grad is None
    types = admm.finalize()
    assert {name: bool((code == DENSE).all()) for name, code in types.items()} == {
        "0": True,
        "1": False,
        "2": True,
    }
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[1].weight, before["1.weight"])


def test_with_nothing_to_compress_the_penalty_is_zero():
    model = nn.Sequential(nn.Linear(4, 6))
    admm = ADMM(model, CompressionConfig(pruned=0, unified=0))
    assert float(admm.penalty().detach()) == 0
    assert list(admm.step()) == []
    assert admm.warnings() == []
    admm.load_state_dict(admm.state_dict())
    assert admm.updates == 1


def test_finalize_projects_the_weights_themselves():
    model = network()
    admm = ADMM(model, CONFIG)
    train(model, admm, 10)
    expected = project(model[3].weight, (2, 3), 0.4, 0.4)
    types = admm.finalize()
    assert torch.equal(model[3].weight, expected.weight)
    assert torch.equal(types["3"], expected.types)


def test_resuming_from_a_file_is_exact(tmp_path):
    model = network()
    admm = ADMM(model, CONFIG, rho=0.1)
    train(model, admm, 12)
    path = tmp_path / "admm.safetensors"
    safetensors.torch.save_file(admm.state_dict(), path)
    other = copy.deepcopy(model)
    resumed = ADMM(other, CONFIG, rho=0.9)
    resumed.load_state_dict(safetensors.torch.load_file(path))
    assert resumed.residuals == admm.residuals
    train(model, admm, 12)
    train(other, resumed, 12)
    for one, two in zip(admm.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert one[0] == two[0]
        assert torch.equal(one[1], two[1])
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))
    assert [residual.update for residual in resumed.residuals] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_a_saved_state_does_not_move_with_the_training():
    model = network()
    admm = ADMM(model, CONFIG)
    state = admm.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    train(model, admm, 5)
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_a_state_of_another_network_is_refused_with_every_problem():
    admm = ADMM(network(), CONFIG)
    state = admm.state_dict()
    state["3.target"] = torch.zeros(2, 2)
    state["residuals"] = torch.zeros(1, 5, 6, dtype=torch.float64)
    state["3.dul"] = state.pop("3.dual")
    with pytest.raises(FormatError) as error:
        admm.load_state_dict(state)
    assert {problem.field for problem in error.value.problems} == {"3.target", "residuals", "3.dul", "3.dual"}
    assert admm.updates == 0


def test_warnings_say_what_to_change(caplog):
    model = network()
    admm = ADMM(model, CONFIG, rho=1e-4)
    assert "never called" in admm.warnings()[0]
    train(model, admm, 5)
    (line,) = admm.warnings()
    assert "raise rho" in line
    assert "primal residual" in line
    assert "2 of 2 layers (" in line
    for last in admm.residuals[-2:]:
        assert f"{last.layer} {last.primal:.2g}" in line
    with caplog.at_level(logging.WARNING, logger="compress.admm"):
        admm.finalize()
    assert len(caplog.records) == 1


def test_unsettled_types_are_warned_of():
    model = network()
    admm = ADMM(model, CONFIG)
    move(model, 1)
    admm.step()
    lines = admm.warnings(tolerance=2.0, type_tolerance=0.0)
    assert len(lines) == 1
    assert "block types that changed" in lines[0]


def test_a_diverged_training_is_refused_by_layer():
    model = network()
    admm = ADMM(model, CONFIG)
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    for action in (admm.step, admm.finalize):
        with pytest.raises(InputError, match="layer 3: weight: 1 of 120"):
            action()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"rho": 0.0}, "rho.0"),
        ({"rho": float("nan")}, "rho.0"),
        ({"rho": {"0": 0.1}}, "rho.3"),
        ({"rho": {"0": 0.1, "3": 0.1, "2": 0.1}}, "rho.2"),
        ({"rho_growth": 0.9}, "rho_growth"),
        ({"rho_max": -1.0}, "rho_max"),
        ({"curvature": {"3": torch.ones(2, 2)}}, "curvature.3"),
        ({"curvature": {"9": torch.ones(2, 2)}}, "curvature.9"),
    ],
)
def test_bad_settings_are_refused(arguments, field):
    with pytest.raises(InputError) as error:
        ADMM(network(), CONFIG, **arguments)
    assert field in [problem.field for problem in error.value.problems]


def test_a_plan_can_be_given_instead_of_a_configuration():
    model = network()
    plan = plan_layers(model, CONFIG)
    assert ADMM(model, plan).plan is plan


def test_progressive_ratios_follow_the_ramp_exactly():
    model = network()
    plan = plan_layers(model, CONFIG)
    admm = ADMM(model, plan, ramp_updates=3)
    full = {layer.name: layer.counts for layer in plan.layers}

    def counts():
        return {
            name: tuple(int((admm.state_dict()[f"{name}.types"] == code).sum()) for code in (PRUNED, UNIFIED))
            for name in full
        }

    seen = [counts()]
    for _ in range(4):
        move(model, len(seen))
        admm.step()
        seen.append(counts())
    for update, found in enumerate(seen):
        share = 1 - (1 - min(update + 1, 4) / 4) ** 3
        assert found == {name: tuple(math.floor(share * count) for count in full[name]) for name in full}
    assert seen[3] == seen[4] == full
    assert [ramp_share(update, 0) for update in (0, 1, 9)] == [1.0, 1.0, 1.0]


def test_a_ramp_that_was_not_finished_is_warned_of_and_still_projected_in_full():
    model = network()
    admm = ADMM(model, CONFIG, ramp_updates=5)
    train(model, admm, 5)
    assert "only 1 of the 5 updates" in admm.warnings()[0]
    types = admm.finalize()
    for layer in admm.plan.layers:
        assert tuple(int((types[layer.name] == code).sum()) for code in (PRUNED, UNIFIED)) == layer.counts


def test_balanced_rows_hold_at_every_update():
    config = CONFIG.model_copy(update={"balanced_rows": True})
    model = network()
    admm = ADMM(model, config, ramp_updates=2)
    for seed in range(4):
        for layer in admm.plan.layers:
            types = admm.state_dict()[f"{layer.name}.types"]
            for code in (PRUNED, UNIFIED):
                assert len((types == code).sum(dim=-1).unique()) == 1
        move(model, seed)
        admm.step()


@pytest.mark.parametrize(
    ("primal", "changes", "expected"),
    [
        (0.1, 0.02, None),
        (math.nextafter(0.1, 1), 0.0, "primal residual"),
        (0.0, math.nextafter(0.02, 1), "block types that changed"),
        (0.05, 0.0, None),
    ],
)
def test_the_tolerances_of_the_warnings_are_those_documented(primal, changes, expected):
    """At the tolerance all is well, above it not; each warning names what to change."""
    admm = ADMM(network(), CONFIG)
    numbers = [[1.0, 0.03, primal, 0.0, changes, 0.0]] * 2
    admm.load_state_dict(admm.state_dict() | {"residuals": torch.tensor([numbers], dtype=torch.float64)})
    lines = admm.warnings()
    assert len(lines) == (0 if expected is None else 1)
    for line in lines:
        assert expected in line
        assert "rho" in line
        assert "more updates" in line


def test_projecting_to_given_types_is_the_nearest_with_them():
    model = network()
    layer = plan_layers(model, CONFIG).layers[1]
    weight = layer.module.weight.detach().clone()
    projection = project(weight, (2, 3), 0.4, 0.4)
    project_to_types(layer, projection.types)
    assert torch.equal(layer.module.weight, projection.weight)


def test_curvature_of_a_layer_that_stays_whole_does_no_harm():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    ADMM(model, CompressionConfig(block=(2, 2)), curvature={"0": torch.ones(6, 4)})


def test_a_negative_ramp_is_refused():
    with pytest.raises(InputError, match="ramp_updates"):
        ADMM(network(), CONFIG, ramp_updates=-1)
