"""Retraining inside the form: gradients by hand, invariants to the bit, and the whole way in `compress`."""

import copy
import dataclasses
import functools
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from compress.admm import ADMM
from compress.artifact import save_artifact
from compress.blocks import expand_blocks, weight_to_matrix
from compress.fit import Recipe, _Teacher, compress
from compress.quantize import dequantize
from compress.rebuild import make_artifact
from compress.retrain import MaskedRetraining, check_invariants
from compress.rules import CompressionConfig, plan_layers
from hwsim.errors import InputError
from hwsim.layer import DENSE, PRUNED, UNIFIED

CONFIG = CompressionConfig(
    block=(2, 3), pruned=0.3, unified=0.4, rules=[{"pattern": "3", "column_order": "channel_major"}]
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The networks are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.ReLU(),
            nn.Conv2d(4, 6, 2, groups=2),
            nn.Conv2d(6, 6, 1),
            nn.Flatten(),
            nn.Linear(6, 4),
        )


def data(count=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 4, (count,), generator=generator)
    inputs = torch.randn(count, 1, 4, 4, generator=generator) * 0.3
    inputs[torch.arange(count), 0, targets, :] += 1.5
    return inputs, targets


def prepared(config=CONFIG, seed=0):
    model = network(seed)
    plan = plan_layers(model, config)
    types = ADMM(model, plan).finalize()
    return model, plan, types


def train(model, retraining, steps=10, lr=0.05):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        inputs, targets = data(seed=step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        retraining.step()


def matrices(layer, tensor):
    return weight_to_matrix(tensor.detach(), layer.groups, layer.settings.column_order)


def test_the_form_holds_at_every_step_and_signs_never_move():
    model, plan, types = prepared()
    before = {layer.name: matrices(layer, layer.module.weight) for layer in plan.layers}
    retraining = MaskedRetraining(model, plan, types)
    for _ in range(5):
        train(model, retraining, steps=2)
        for layer in plan.layers:
            now = matrices(layer, layer.module.weight)
            codes = expand_blocks(types[layer.name], layer.settings.block, layer.m, layer.k)
            assert not now[codes == PRUNED].any()
            product = (now * before[layer.name])[codes == UNIFIED]
            assert bool((product >= 0).all())


def test_the_gradient_of_a_magnitude_is_the_signed_sum_of_its_block():
    model, plan, types = prepared()
    retraining = MaskedRetraining(model, plan, types)
    layer = next(layer for layer in plan.layers if layer.name == "2")
    captured = {}

    def keep_gradient(module, inputs, weight):
        weight.register_hook(lambda gradient: captured.update(gradient=gradient))

    weight_hook = layer.module.parametrizations["weight"].register_forward_hook(keep_gradient)
    inputs, targets = data()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    weight_hook.remove()
    gradient = matrices(layer, captured["gradient"])
    codes = types["2"]
    per_weight = expand_blocks(codes, layer.settings.block, layer.m, layer.k)
    held = layer.module.parametrizations["weight"]
    assert torch.equal(held.original0.grad, torch.where(per_weight == DENSE, gradient, 0.0))
    signs = matrices(layer, layer.module.weight).sign()
    for g, i, j in np.ndindex(*codes.shape):
        rows, columns = slice(2 * i, 2 * i + 2), slice(3 * j, 3 * j + 3)
        expected = (signs * gradient)[g, rows, columns].sum() if codes[g, i, j] == UNIFIED else 0.0
        assert float(held.original1.grad[g, i, j]) == pytest.approx(float(expected), abs=1e-6)
    retraining.harvest()


def test_magnitudes_are_kept_at_or_above_zero():
    model, plan, types = prepared()
    retraining = MaskedRetraining(model, plan, types)
    held = model[2].parametrizations["weight"]
    with torch.no_grad():
        held.original1.sub_(10.0)
    retraining.step()
    unified = types["2"] == UNIFIED
    assert (held.original1.detach()[unified] == 0).all()
    layers = retraining.harvest()
    assert (layers["2"].types == types["2"].numpy()).all()
    assert not layers["2"].weights.magnitudes.any()


def test_harvest_gives_what_the_last_forward_saw_to_the_bit():
    model, plan, types = prepared()
    retraining = MaskedRetraining(model, plan, types)
    train(model, retraining)
    model.eval()
    inputs, _ = data(seed=99)
    seen = {layer.name: layer.module.weight.detach().clone() for layer in plan.layers}
    outputs = model(inputs).detach()
    layers = retraining.harvest()
    assert list(layers) == [layer.name for layer in plan.layers]
    for layer in plan.layers:
        assert not parametrize.is_parametrized(layer.module)
        assert isinstance(layer.module.weight, nn.Parameter)
        assert torch.equal(layer.module.weight, seen[layer.name])
        assert torch.equal(layer.module.weight, dequantize(layers[layer.name], layer.weight_shape))
        assert np.array_equal(layers[layer.name].types, types[layer.name].numpy())
    assert torch.equal(model(inputs).detach(), outputs)
    assert set(model.state_dict()) == set(network().state_dict())


def test_without_training_harvest_only_rounds():
    model, plan, types = prepared()
    before = {layer.name: layer.module.weight.detach().clone() for layer in plan.layers}
    layers = MaskedRetraining(model, plan, types).harvest()
    for layer in plan.layers:
        step = layers[layer.name].weights.step_size
        after = layer.module.weight.detach()
        clipped = after.abs() >= 127 * step * (1 - 1e-6)
        assert bool(((after - before[layer.name]).abs() <= step * 0.5001)[~clipped].all())
        assert clipped.double().mean() < 0.1


@pytest.mark.parametrize("ratios", [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_layers_of_one_type_only(ratios):
    config = CompressionConfig(block=(4, 4), pruned=ratios[0], unified=ratios[1], exempt_first_last=False)
    model, plan, types = prepared(config)
    retraining = MaskedRetraining(model, plan, types)
    if ratios != (1.0, 0.0):  # an all-pruned network has only biases to train
        train(model, retraining, steps=3)
    retraining.harvest()


@pytest.mark.parametrize("bits", [2, 5])
def test_few_bits_mean_few_levels(bits):
    config = CompressionConfig(block=(2, 2), pruned=0.3, unified=0.3, weight_bits=bits, magnitude_bits=bits)
    model, plan, types = prepared(config)
    retraining = MaskedRetraining(model, plan, types)
    train(model, retraining)
    layers = retraining.harvest()
    for layer in plan.layers:
        step = layers[layer.name].weights.step_size
        levels = (layer.module.weight.detach() / step).round()
        assert levels.abs().max() < 2**bits
        assert torch.equal(levels * step, layer.module.weight)


def test_the_channel_stays_fastest_in_memory():
    def trained(memory_format):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 3)
        )
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.clone(memory_format=memory_format)
        before = model[2].weight.stride()
        plan = plan_layers(
            model, CompressionConfig(block=(2, 2), pruned=0.4, unified=0.3, exempt_first_last=False)
        )
        with MaskedRetraining(model, plan, ADMM(model, plan).finalize()) as retraining:
            state = {name: values.is_contiguous() for name, values in model.state_dict().items()}
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                assert model[2].weight.stride() == before
                model(torch.randn(4, 1, 8, 8)).square().mean().backward()
                optimizer.step()
                retraining.step()
            retraining.harvest()
        return model, state

    (last, last_state), (first, first_state) = trained(torch.channels_last), trained(torch.contiguous_format)
    assert last_state == first_state  # what a checkpoint holds
    assert last[2].weight.stride() == (36, 1, 12, 4)
    for one, other in zip(last.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(one, other, check_stride=False)


def test_an_interrupt_leaves_a_plain_network():
    model, plan, types = prepared()

    def interrupted():
        with MaskedRetraining(model, plan, types) as retraining:
            train(model, retraining, steps=2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert set(model.state_dict()) == set(network().state_dict())


def test_types_that_do_not_fit_the_plan_are_refused():
    model, plan, types = prepared()
    types = dict(types)
    types["2"] = types["2"].clone()
    types["2"][types["2"] == PRUNED] = DENSE
    types["3"] = types["3"][:, :1]
    del types["0"]
    with pytest.raises(InputError) as error:
        MaskedRetraining(model, plan, types)
    assert [problem.field for problem in error.value.problems] == ["0", "2", "3"]
    assert not parametrize.is_parametrized(model[2])


def test_nan_weights_are_refused_at_harvest():
    model, plan, types = prepared()
    retraining = MaskedRetraining(model, plan, types)
    with torch.no_grad():
        model[2].parametrizations["weight"].original1.view(-1)[0] = float("nan")
    with pytest.raises(InputError, match=r"layer 2: .*NaN"):
        retraining.harvest()


# --- the checks must be able to fail ---------------------------------------------------------------------------------


def harvested():
    model, plan, types = prepared()
    return plan, MaskedRetraining(model, plan, types).harvest()


def first(codes, code, block=(2, 3)):
    g, i, j = np.argwhere(codes == code)[0]
    return g, i * block[0], j * block[1]


def test_a_sound_model_passes():
    check_invariants(*harvested())


@pytest.mark.parametrize("code", [PRUNED, UNIFIED, DENSE])
def test_one_changed_weight_is_found(code):
    plan, layers = harvested()
    layer = next(
        layer for layer in plan.layers if layer.name == "3"
    )  # 1x1 convolution: the matrix is the weight
    g, row, column = first(layers["3"].types, code)
    with torch.no_grad():
        layer.module.weight.view(1, layer.m, layer.k)[g, row, column] += 1e-3
    expected = {PRUNED: "other than zero", UNIFIED: "more than one magnitude", DENSE: "differs from integer"}[
        code
    ]
    with pytest.raises(InputError, match=expected):
        check_invariants(plan, layers)


def spoil(layer, field, change):
    array = getattr(layer.weights, field).copy()
    change(array, layer.types)
    return dataclasses.replace(layer, weights=dataclasses.replace(layer.weights, **{field: array}))


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("dense", lambda a, t: a.__setitem__(first(t, PRUNED), 3), "3.dense: is not 0 outside"),
        ("dense", lambda a, t: a.__setitem__(first(t, DENSE), 128), "3.dense: exceeds 8 bits"),
        ("signs", lambda a, t: a.__setitem__(first(t, DENSE), 1), "3.signs: is not 0 outside"),
        ("signs", lambda a, t: a.__setitem__(first(t, UNIFIED), 2), "3.signs: holds something"),
        ("magnitudes", lambda a, t: a.__setitem__(t == PRUNED, 1), "3.magnitudes: is not 0 outside"),
        ("magnitudes", lambda a, t: a.__setitem__(t == UNIFIED, 256), "3.magnitudes: exceeds 8 bits"),
    ],
)
def test_one_changed_integer_is_found(field, change, message):
    plan, layers = harvested()
    layers["3"] = spoil(layers["3"], field, change)
    with pytest.raises(InputError, match=message):
        check_invariants(plan, layers)


def test_swapped_types_missing_layers_and_odd_steps_are_found():
    plan, layers = harvested()
    types = layers["3"].types.copy()
    types[types == PRUNED] = UNIFIED
    layers["3"] = dataclasses.replace(layers["3"], types=types)
    layers["2"] = dataclasses.replace(
        layers["2"], weights=dataclasses.replace(layers["2"].weights, step_size=0.1)
    )
    del layers["0"]
    with pytest.raises(InputError) as error:
        check_invariants(plan, layers)
    assert {problem.field for problem in error.value.problems} == {"3.types", "2.step_size", "2.weight", "0"}


# --- the whole way ---------------------------------------------------------------------------------------------------


def accuracy(model):
    inputs, targets = data(200, seed=77)
    assert not model.training
    return float((model(inputs).argmax(1) == targets).float().mean())


@functools.cache
def trained_once():
    model = network(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        inputs, targets = data(64, seed=step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model


def trained():
    return copy.deepcopy(trained_once())


def small_recipe(**changes):
    return Recipe(
        **(
            {
                "epochs_admm": 3,
                "epochs_retrain": 3,
                "updates_per_epoch": 1,
                "batch_size": 32,
                "lr": 5e-3,
                "lr_retrain": 5e-3,
            }
            | changes
        )
    )


def test_compressing_keeps_the_accuracy():
    model = trained()
    result = compress(model, CONFIG, data(512, seed=5), small_recipe(), evaluate=accuracy)
    assert result.accuracy_dense > 0.9
    assert result.accuracy_retrained > result.accuracy_dense - 0.05
    assert result.accuracy_retrained == accuracy(model.eval())
    assert result.accuracy_projected <= 1
    check_invariants(result.plan, result.layers)
    assert [(r.layer, r.update) for r in result.residuals] == [(n, u) for u in (1, 2, 3) for n in ("2", "3")]
    assert {name: layer.column_order for name, layer in result.layers.items()}["3"] == "channel_major"


def test_compressing_is_reproducible_and_leaves_the_global_state_alone():
    weights = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        model = nn.Sequential(*trained()[:-1], nn.Dropout(0.2), trained()[-1])
        state = torch.get_rng_state()
        compress(
            model, CompressionConfig(block=(2, 3)), data(), small_recipe(epochs_admm=1, epochs_retrain=1)
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training
        weights.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_seeds_matter():
    results = []
    for seed in (0, 1):
        model = trained()
        compress(model, CONFIG, data(), small_recipe(epochs_admm=1, epochs_retrain=1, seed=seed))
        results.append(model[2].weight.detach())
    assert not torch.equal(*results)


def test_batches_of_a_list_and_progress():
    inputs, targets = data()
    batches = list(zip(inputs.split(20), targets.split(20), strict=True))
    seen = []
    recipe = small_recipe(epochs_admm=2, epochs_retrain=1, updates_per_epoch=2)
    result = compress(trained(), CONFIG, batches, recipe, progress=seen.append)
    assert [(p.phase, p.epoch, p.batch) for p in seen] == [
        (phase, epoch, batch)
        for phase, epochs in (("admm", 2), ("retrain", 1))
        for epoch in range(1, epochs + 1)
        for batch in (1, 2, 3)
    ]
    assert {(p.epochs, p.batches) for p in seen if p.phase == "admm"} == {(2, 3)}
    assert result.residuals[-1].update == 4


def test_one_shot_says_so():
    result = compress(trained(), CONFIG, data(), small_recipe(epochs_admm=0, epochs_retrain=0))
    assert result.residuals == ()
    assert "one-shot" in result.warnings[0]
    assert result.accuracy_dense is None


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_a_figure_that_no_file_holds_is_left_out_and_nothing_is_lost(tmp_path, caplog, figure):
    model = network()
    with caplog.at_level(logging.WARNING, logger="compress"):
        result = compress(
            model,
            CONFIG,
            data(),
            Recipe(epochs_admm=1, epochs_retrain=1),
            evaluate=lambda _: figure,
            checkpoint=tmp_path,
        )
    assert (result.accuracy_dense, result.accuracy_projected, result.accuracy_retrained) == (None, None, None)
    assert f"evaluate gave {figure}" in caplog.text
    artifact = make_artifact(model, result.layers, (1, 4, 4), 4)
    save_artifact(tmp_path / "model", artifact)


def test_an_interrupt_passes_through_and_the_model_stays_usable():
    model = trained()

    def interrupt(progress):
        if progress.phase == "retrain":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, CONFIG, data(), small_recipe(), progress=interrupt)
    assert set(model.state_dict()) == set(network().state_dict())
    assert model.training


def test_a_loss_that_becomes_nan_is_refused():
    inputs, targets = data()
    inputs[40] = float("nan")
    with pytest.raises(InputError, match="training: loss: nan at admm epoch 1"):
        compress(trained(), CONFIG, (inputs, targets), small_recipe())


@pytest.mark.parametrize(
    "bad",
    [
        (torch.zeros(4, 1, 4, 4), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(4, 1, 4, 4),),
        (torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.int64)),
        ([1], [2]),
        iter([]),
        [],
    ],
    ids=["lengths", "one", "empty tensors", "lists", "generator", "empty"],
)
def test_data_that_cannot_be_batched_is_refused(bad):
    with pytest.raises(InputError, match="training data"):
        compress(trained(), CONFIG, bad)


def test_a_larger_rho_brings_the_weights_nearer_to_their_form():
    last = []
    for rho in (1e-6, 1.0):
        recipe = small_recipe(
            epochs_admm=4, epochs_retrain=0, rho=rho, rho_growth=1.0, lr=2e-2, batch_size=16
        )
        result = compress(trained(), CONFIG, data(512), recipe)
        last.append(max(residual.primal for residual in result.residuals[-2:]))
    assert last[1] < 0.3 * last[0]


def test_magnitudes_are_projected_after_every_step_of_the_optimizer(monkeypatch):
    calls = []
    step = MaskedRetraining.step
    monkeypatch.setattr(MaskedRetraining, "step", lambda self: (calls.append(1), step(self))[1])
    compress(trained(), CONFIG, data(64), small_recipe(epochs_admm=0, epochs_retrain=3))
    assert len(calls) == 3 * 2


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_of_the_model_is_restored(training):
    model = trained().train(training)
    compress(model, CONFIG, data(), small_recipe(epochs_admm=1, epochs_retrain=1), evaluate=accuracy)
    assert model.training == training


def test_distillation_draws_to_the_outputs_of_the_uncompressed_network():
    """With nothing but distillation the labels do not matter; with none, they do."""
    inputs, targets = data(64)
    wrong = (targets + 1) % 4
    for kind in ("kl", "mse"):
        weights = []
        for labels in (targets, wrong):
            model = trained()
            recipe = small_recipe(distill=1.0, distill_loss=kind, epochs_admm=1, epochs_retrain=1)
            compress(model, CONFIG, (inputs, labels), recipe)
            weights.append(model[2].weight.detach())
        assert torch.equal(*weights)
    plain = []
    for labels in (targets, wrong):
        model = trained()
        compress(model, CONFIG, (inputs, labels), small_recipe(epochs_admm=1, epochs_retrain=1))
        plain.append(model[2].weight.detach())
    assert not torch.equal(*plain)


def test_the_distillation_loss_is_that_of_hinton():
    teacher = nn.Linear(3, 4)
    inputs, outputs = torch.randn(5, 3), torch.randn(5, 4)
    wanted = teacher(inputs).detach()
    loss = torch.tensor(2.0)
    found = _Teacher(teacher, 0.3, "kl", 3.0).blend(loss, outputs, inputs)
    p, q = (torch.softmax(values / 3.0, 1) for values in (wanted, outputs))
    expected = 0.7 * 2.0 + 0.3 * 9.0 * (p * (p / q).log()).sum(dim=1).mean()
    torch.testing.assert_close(found, expected)
    found = _Teacher(teacher, 0.3, "mse", 3.0).blend(loss, outputs, inputs)
    torch.testing.assert_close(found, 0.7 * 2.0 + 0.3 * (outputs - wanted).square().mean())
    alike = _Teacher(teacher, 1.0, "kl", 3.0).blend(loss, wanted, inputs)
    assert float(alike) == pytest.approx(0, abs=1e-6)


def test_adjusted_types_are_what_is_retrained():
    seen = []

    def adjust(model, plan, types):
        seen.append({layer.name: layer.counts for layer in plan.layers})
        lowered = {name: codes.clone() for name, codes in types.items()}
        flat = lowered["2"].view(-1)
        flat[(flat == UNIFIED).nonzero()[0]] = PRUNED
        return lowered

    result = compress(trained(), CONFIG, data(), small_recipe(epochs_admm=1, epochs_retrain=1), adjust=adjust)
    counts = {layer.name: layer.counts for layer in result.plan.layers}
    assert counts["2"] == (seen[0]["2"][0] + 1, seen[0]["2"][1] - 1)
    assert counts["3"] == seen[0]["3"]
    check_invariants(result.plan, result.layers)


def normalised():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("modes", "moves"),
    [((True, False), False), ((True, True), True), ((False, False), True)],
    ids=["frozen inside", "training", "evaluation as a whole"],
)
def test_normalisation_moves_unless_the_user_froze_it(modes, moves):
    model = normalised().train(modes[0])
    model[1].train(modes[1])
    config = CompressionConfig(block=(2, 2), exempt_first_last=False)
    recipe = Recipe(epochs_admm=1, epochs_retrain=1)
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) + 3
    compress(model, config, (inputs, torch.arange(16) % 4), recipe, evaluate=lambda _: 0.0)
    assert bool((model[1].running_mean != 0).any()) == moves
    assert int(model[1].num_batches_tracked) == 2 * moves
    assert [module.training for module in model.modules()] == [modes[0], modes[0], modes[1], modes[0]]


def test_a_run_goes_on_with_the_same_modules_frozen(tmp_path):
    config = CompressionConfig(block=(2, 2), exempt_first_last=False)
    arguments = config, (torch.randn(16, 8), torch.arange(16) % 4), Recipe(epochs_admm=1, epochs_retrain=0)
    compress(normalised(), *arguments, checkpoint=tmp_path)
    model = normalised()
    model[1].eval()
    with pytest.raises(InputError, match="frozen"):
        compress(model, *arguments, checkpoint=tmp_path)
