"""Channel permutation: the function stays, to the last bit in the integer model; the blocks to prune get cheaper."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from compress import zoo
from compress.admm import ADMM
from compress.fit import Recipe, compress
from compress.integer.calibration import quantize_activations
from compress.permute import (
    _best_order,
    _cost,
    _improve,
    _input_view,
    _output_view,
    _reorder,
    find_chains,
    permute_channels,
)
from compress.projection import project_to_counts
from compress.rules import CompressionConfig, plan_layers

CONFIG = CompressionConfig(
    block=(4, 4), pruned=0.5, unified=0.5, exempt_first_last=False, permute_channels=True
)


def spread(model, seed=0):
    """Weights with channels of very different size, so that gathering pays; statistics that differ by channel."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                sizes = torch.randn(len(module.weight), generator=generator).exp()
                module.weight.mul_(sizes.reshape(-1, *(1 for _ in module.weight.shape[1:])))
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for values in (module.weight, module.bias, module.running_mean):
                    values.copy_(torch.randn(values.shape, generator=generator))
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model


def built(factory, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return spread(factory(), seed).eval()


class Functional(nn.Module):
    """Convolutions of one dimension, a depthwise one, functional operations and a view between."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv1d(16, 16, 3, groups=16)
        self.norm = nn.BatchNorm1d(16)
        self.second = nn.Conv1d(16, 12, 3, bias=False)
        self.left, self.right = nn.Linear(12 * 6, 8), nn.Linear(12 * 6, 8)

    def forward(self, inputs):
        hidden = nn.functional.relu(self.norm(self.depthwise(self.first(inputs))))
        hidden = nn.functional.max_pool1d(torch.tanh(self.second(hidden)), 2)
        hidden = hidden.view(hidden.size(0), -1)
        return self.left(hidden) * self.right(hidden)


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 12, 3),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 14, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(14 * 9, 24),
        nn.BatchNorm1d(24),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(24, 5),
    )


CASES = {
    "lenet": (lenet, (1, 12, 12), {"0": ("4",), "4": ("7",), "7": ("11",)}),
    "functional": (Functional, (3, 16), {"first": ("second",), "second": ("left", "right")}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("order", ["tap_major", "channel_major"])
def test_the_function_stays_and_projecting_gets_cheaper(case, order):
    factory, shape, readers = CASES[case]
    model = built(factory)
    plan = plan_layers(model, CONFIG.model_copy(update={"column_order": order}))
    inputs = torch.randn(16, *shape, generator=torch.Generator().manual_seed(1))
    wanted, before = model(inputs), {name: values.clone() for name, values in model.state_dict().items()}
    chains = {chain.producer.name: _cost(chain) for chain in find_chains(model, plan)}
    found = permute_channels(model, plan, inputs)
    torch.testing.assert_close(model(inputs), wanted, rtol=1e-4, atol=1e-5)
    assert {item.name: item.readers for item in found.permuted} == readers
    for item in found.permuted:
        assert item.cost_after < item.cost_before
        assert sorted(item.order) == list(range(len(item.order)))
        assert item.order != tuple(range(len(item.order)))
    assert found.permuted[0].cost_before == pytest.approx(chains[found.permuted[0].name])
    for name, values in model.state_dict().items():
        assert torch.equal(values.flatten().sort().values, before[name].flatten().sort().values)


def test_the_integer_model_gives_the_same_bits():
    """All blocks dense: the same integers in another order, so every sum is the same."""
    model = built(lenet)
    inputs = torch.randn(32, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    plan = plan_layers(model, CONFIG)
    permuted = copy.deepcopy(model)
    moved = permute_channels(permuted, plan_layers(permuted, CONFIG), inputs)
    assert len(moved.permuted) == 3
    outputs = []
    dense = CompressionConfig(pruned=0.0, unified=0.0, exempt_first_last=False)
    for network in (model, permuted):
        layers = compress(
            network, dense, [(inputs, torch.zeros(32))], Recipe(epochs_admm=0, epochs_retrain=0)
        ).layers
        integer = quantize_activations(network, layers, inputs)
        outputs.append(integer.forward(inputs))
    assert torch.equal(outputs[0].integers, outputs[1].integers)
    # The scale of the output is calibrated in float, whose sums depend on the order in the last bit.
    torch.testing.assert_close(outputs[0].values, outputs[1].values)
    assert plan.layers[0].module is model[0]


def test_residuals_outputs_and_groups_are_left_alone_with_their_reason():
    model = built(lambda: zoo.build("resnet20"))
    found = permute_channels(model, plan_layers(model, CONFIG), torch.randn(2, 1, 28, 28))
    reasons = {item.name: item.reason for item in found.left}
    assert "meet those of another tensor in add" in reasons["layer1.0.conv2"]
    assert "meet those of another tensor" in reasons["conv1"]
    assert "output of the network" in reasons["fc"]
    inside = [item.name for item in found.permuted]
    assert set(inside) | set(reasons) == {layer.name for layer in plan_layers(model, CONFIG).layers}
    assert inside
    assert all(name.endswith("conv1") and "." in name for name in inside)


class Awkward(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=2 if kind == "groups" else 1)
        self.shuffle, self.norm = nn.PixelShuffle(2), nn.GroupNorm(2, 8)

    def forward(self, inputs):
        hidden = self.first(inputs)
        if self.kind == "softmax":
            hidden = torch.softmax(hidden, 1)
        if self.kind == "module":
            hidden = self.norm(hidden)
        if self.kind == "index":
            hidden = torch.cat([hidden[:, 4:], hidden[:, :4]], 1)
        if self.kind == "twice":
            hidden = self.second(hidden)
        if self.kind == "values" and float(inputs.sum()) > 0:
            hidden = -hidden
        return self.second(hidden)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("softmax", "softmax does with its channels is not known"),
        ("module", "norm (GroupNorm) does with its channels is not known"),
        ("index", "is not known"),
        ("groups", "in groups"),
        ("twice", "is not known"),
        ("values", "torch.fx cannot trace"),
    ],
)
def test_what_cannot_be_followed_is_refused(kind, reason):
    model = built(lambda: Awkward(kind))
    before = copy.deepcopy(model.state_dict())
    found = permute_channels(model, plan_layers(model, CONFIG), torch.randn(2, 1, 9, 9))
    assert reason in {item.name: item.reason for item in found.left}["first"]
    assert found.permuted == ()
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())


def test_a_change_of_the_outputs_is_put_back():
    class Peeks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)

        def forward(self, inputs):
            return self.second(self.first(inputs)) + self.first.bias[:4]

    model = built(Peeks)
    before = copy.deepcopy(model.state_dict())
    found = permute_channels(model, plan_layers(model, CONFIG), torch.randn(4, 6))
    assert {item.name: item.reason for item in found.left}["first"] == (
        "reordering its channels changed the network's outputs"
    )
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())


def test_only_layers_that_ask_are_moved():
    model = built(lenet)
    config = CONFIG.model_copy(update={"permute_channels": False})
    config = CompressionConfig.model_validate(
        config.model_dump() | {"rules": [{"pattern": "4", "permute_channels": True}]}
    )
    found = permute_channels(model, plan_layers(model, config), torch.randn(2, 1, 12, 12))
    assert [item.name for item in found.permuted] == ["4"]
    assert found.left == ()


def views_of(chain):
    return [_output_view(chain.producer), *(_input_view(reader) for reader in chain.readers)]


def total_loss(views, order):
    return sum(view.loss(np.array(order))[0] for view in views)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("pruned", "unified"), [(0.5, 0.5), (0.5, 0.0), (0.3, 0.4)])
def test_the_order_is_close_to_the_best_of_all(seed, pruned, unified):
    """Five channels in three blocks, one of them ragged: against all 120 orders."""
    model = built(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4)), seed)
    config = CompressionConfig(
        block=(2, 2), pruned=pruned, unified=unified, exempt_first_last=False, permute_channels=True
    )
    chain = find_chains(model, plan_layers(model, config))[0]
    views = views_of(chain)
    every = sorted(total_loss(views, order) for order in itertools.permutations(range(5)))
    found = total_loss(views, _best_order(chain))
    assert found >= every[0] - 1e-12
    assert found <= every[len(every) // 20]


@pytest.mark.parametrize(("pruned", "unified"), [(0.5, 0.5), (0.75, 0.0), (0.3, 0.4), (0.0, 1.0)])
def test_every_swap_that_pays_by_its_worth_lowers_the_loss(pruned, unified):
    """What is kept is convex: it grows by at least what the tangent promises."""
    config = CONFIG.model_copy(update={"pruned": pruned, "unified": unified})
    model = built(lenet)
    rng = np.random.default_rng(0)
    for chain in find_chains(model, plan_layers(model, config))[:3]:
        for view in views_of(chain):
            channels = len(view.energy)
            for _ in range(20):
                order = rng.permutation(channels)
                loss, worth = view.loss(order)
                other = order.copy()
                a, b = rng.choice(channels, 2, replace=False)
                other[a], other[b] = order[b], order[a]
                places = range(channels)
                promised = worth[other, places].sum() - worth[order, places].sum()
                assert view.loss(other)[0] <= loss - promised + 1e-12
        start = np.arange(channels)
        assert _improve(views_of(chain), start)[0] <= total_loss(views_of(chain), start)


def test_the_loss_of_a_view_is_that_of_projecting_the_reordered_weight():
    for order in ("tap_major", "channel_major"):
        model = built(lenet)
        plan = plan_layers(model, CONFIG.model_copy(update={"column_order": order}))
        for chain in find_chains(model, plan)[:3]:
            views = views_of(chain)
            places = np.random.default_rng(0).permutation(len(views[0].energy))
            expected = total_loss(views, places)
            _reorder(chain, places)
            assert _cost(chain) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", [1, 40])
@pytest.mark.parametrize("unified", [0.0, 0.25])
def test_with_balanced_rows_what_is_said_is_what_projecting_loses(seed, unified):
    """Chosen by types that no row has to share, an order can make the balanced projection lose more."""
    config = CompressionConfig(
        block=(2, 2),
        pruned=0.75,
        unified=unified,
        exempt_first_last=False,
        balanced_rows=True,
        permute_channels=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    plan = plan_layers(model, config)

    def lost():
        total = 0.0
        for layer in plan.layers:
            weight = layer.module.weight.detach()
            found = project_to_counts(weight, (2, 2), *layer.counts, balanced_rows=True)
            total += found.cost / float(weight.double().square().sum())
        return total

    before = lost()
    (item,) = permute_channels(model, plan, torch.randn(4, 8)).permuted
    assert item.cost_before == pytest.approx(before, rel=1e-5)
    assert item.cost_after == pytest.approx(lost(), rel=1e-5)
    assert lost() < before


class Several(nn.Module):
    """Outputs in a tuple and a dict; ``index`` is of whole numbers."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(6, 16), nn.Linear(16, 4), kind

    def forward(self, inputs):
        outputs = self.second(self.first(inputs))
        if self.kind == "none":
            return "no tensor"
        if self.kind == "index":
            return outputs.argmax(1), outputs > 0
        found = outputs + self.first.bias[:4] if self.kind == "changed" else outputs
        return (outputs, {"found": found, "none": outputs[:0], "sizes": [1, 2]})


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("same", None),
        ("index", None),
        ("changed", "reordering its channels changed the network's outputs"),
        ("none", "the network gives no tensors to compare before and after"),
    ],
)
def test_all_outputs_of_a_network_are_compared(kind, reason):
    model = built(lambda: Several(kind))
    plan, inputs = plan_layers(model, CONFIG), torch.randn(8, 6)
    before = copy.deepcopy(model.state_dict())
    found = permute_channels(model, plan, inputs)
    reasons = {item.name: item.reason for item in found.left}
    if reason is None:
        assert [item.name for item in found.permuted] == ["first"], reasons
    else:
        assert reasons["first"] == reason
        assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())


def test_it_is_part_of_compressing_and_does_not_move_the_data():
    inputs = torch.randn(64, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    targets = torch.randint(0, 5, (64,), generator=torch.Generator().manual_seed(2))
    recipe = Recipe(epochs_admm=1, epochs_retrain=1, batch_size=16)
    result = compress(built(lenet), CONFIG, (inputs, targets), recipe)
    assert [item.name for item in result.permutation.permuted] == ["0", "4", "7"]
    by_hand = built(lenet)
    permute_channels(by_hand, plan_layers(by_hand, CONFIG), inputs)
    plain = CONFIG.model_copy(update={"permute_channels": False})
    other = compress(by_hand, plain, (inputs, targets), recipe)
    for name, layer in result.layers.items():
        assert np.array_equal(layer.types, other.layers[name].types)
        assert np.array_equal(layer.weights.magnitudes, other.layers[name].weights.magnitudes)
    assert result.permutation.to_dict()["permuted"][0]["readers"] == ["4"]
    assert other.permutation.permuted == ()


def test_one_shot_the_projection_loses_less():
    lost = []
    for wanted in (False, True):
        model = built(lenet)
        config = CONFIG.model_copy(update={"permute_channels": wanted})
        plan = plan_layers(model, config)
        if wanted:
            permute_channels(model, plan, torch.randn(2, 1, 12, 12))
        before = {layer.name: layer.module.weight.detach().clone() for layer in plan.layers}
        ADMM(model, plan).finalize()
        lost.append(
            sum(
                float((before[layer.name] - layer.module.weight.detach()).square().sum())
                for layer in plan.layers
            )
        )
    assert lost[1] < lost[0]
