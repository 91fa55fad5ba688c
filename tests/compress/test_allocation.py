"""Allocations against closed forms, brute force and a MILP solver; budgets against the simulator's own totals."""

import itertools
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from compress import allocation as module
from compress.admm import ADMM
from compress.allocation import allocate, budget_spent, erdos_renyi_densities, keep_within
from compress.budget import Budget, file_bytes, parse_budget
from compress.fill import LayerOption, UnreachableError, least_damage, option_of
from compress.rules import CompressionConfig, plan_layers
from compress.shapes import layer_shapes
from hwsim.errors import InputError
from hwsim.layer import DENSE, PRUNED, UNIFIED, Layer
from hwsim.machine import load_machine
from hwsim.simulator import simulate

ALL = CompressionConfig(exempt_first_last=False)
NONE = CompressionConfig(rules=[{"pattern": "*", "exempt": True}])


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(2, 12, 3),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, groups=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 16, 40),
            nn.ReLU(),
            nn.Linear(40, 10),
        )
        with torch.no_grad():  # heavy tails, so that blocks differ
            for parameter in model.parameters():
                parameter.mul_(torch.randn(parameter.shape).square())
    return model


def samples(count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 8, 8, generator=generator), torch.randint(
        0, 10, (count,), generator=generator
    )


def blocks_of(layer):
    return math.prod(layer.types_shape)


# --- Erdős–Rényi


def test_erdos_renyi_is_the_closed_form_where_nothing_is_capped():
    sizes = [(300, 784), (100, 300), (64, 32, 3, 3)]
    kept = 0.05
    densities = erdos_renyi_densities(sizes, kept)
    weights = np.array([300 * 784, 100 * 300, 64 * 32 * 9])
    raw = np.array([1084 / 235200, 400 / 30000, 102 / 18432])
    epsilon = kept * weights.sum() / (raw * weights).sum()
    assert densities == pytest.approx(epsilon * raw)
    # ε is the same for all: a layer keeps ε·Σ sizes weights.
    assert densities * weights == pytest.approx(epsilon * np.array([1084, 400, 102]))


@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=8), st.floats(0.001, 1)
)
@settings(deadline=None)
def test_erdos_renyi_keeps_exactly_the_asked_share_and_never_more_than_a_layer_has(sizes, kept):
    densities = erdos_renyi_densities(sizes, kept)
    weights = np.array([math.prod(size) for size in sizes])
    assert (densities <= 1).all()
    assert (densities > 0).all()
    assert (densities * weights).sum() == pytest.approx(kept * weights.sum())
    free = densities < 1
    if free.any():
        epsilon = (densities * weights / [sum(size) for size in sizes])[free]
        assert epsilon == pytest.approx(np.full(free.sum(), epsilon[0]))


@pytest.mark.parametrize("method", ["uniform", "erdos-renyi", "magnitude", "fisher", "hessian"])
@pytest.mark.parametrize(("pruned", "unified"), [(0.75, 0.25), (0.9, 0.05), (0.5, 0.0), (0.0, 0.4)])
def test_a_ratio_that_is_spread_keeps_its_totals_exactly(method, pruned, unified):
    model = network()
    config = CompressionConfig(block=(2, 4), pruned=pruned, unified=unified, exempt_first_last=False)
    uniform = plan_layers(model, config)
    plan = allocate(model, samples(), config, method=method)
    for i in (0, 1):
        assert sum(layer.counts[i] for layer in plan.layers) == sum(
            layer.counts[i] for layer in uniform.layers
        )
    for layer in plan.layers:
        assert min(layer.counts) >= 0
        assert sum(layer.counts) <= blocks_of(layer)
    assert plan.allocation.method == method
    types = ADMM(model, plan).finalize()
    for layer in plan.layers:
        found = [int((types[layer.name] == code).sum()) for code in (PRUNED, UNIFIED)]
        assert tuple(found) == layer.counts


def test_erdos_renyi_over_layers_is_its_closed_form_to_half_a_block():
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 128), nn.Linear(128, 32))
    config = CompressionConfig(block=(4, 4), pruned=0.9, unified=0.1, exempt_first_last=False)
    plan = allocate(model, None, config, method="erdos-renyi")
    executed = [blocks_of(layer) - layer.counts[0] for layer in plan.layers]
    total = sum(blocks_of(layer) for layer in plan.layers)
    epsilon = (total - int(0.9 * total) - 0) * 16 / (160 + 224 + 160)
    for blocks, sizes in zip(executed, (160, 224, 160), strict=True):
        assert abs(blocks - epsilon * sizes / 16) <= 1


def test_exempt_layers_stay_dense_whatever_the_allocation():
    for arguments in ({"method": "erdos-renyi"}, {"method": "magnitude"}, {"budget": "image_bytes=5000"}):
        plan = allocate(network(), samples(), CompressionConfig(), **arguments)
        assert [layer.counts == (0, 0) for layer in plan.layers] == [True, False, False, True]


def test_ranking_keeps_the_greatest_product_of_kept_energies():
    """Against every choice of as many blocks, two layers of six."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape).exp())
    config = CompressionConfig(block=(1, 1), pruned=0.5, unified=0.0, exempt_first_last=False)
    plan = allocate(model, None, config, method="magnitude")
    energies = [np.sort(layer.module.weight.detach().numpy().ravel() ** 2)[::-1] for layer in plan.layers]

    def product(counts):
        return math.prod(e[:c].sum() / e.sum() for e, c in zip(energies, counts, strict=True))

    best = max(((a, 6 - a) for a in range(7)), key=product)
    assert tuple(6 - layer.counts[0] for layer in plan.layers) == best


# --- a budget: the choice


def fake_layer(model, index):
    return plan_layers(model, CompressionConfig(block=(1, 1), exempt_first_last=False)).layers[index]


def additive(prices):
    """A cost with one price per type, alike in all layers."""
    return lambda layer, types: float(np.asarray(prices)[types].sum())


def small_instance(seed, layers=3, blocks=4):
    rng = np.random.default_rng(seed)
    model = nn.Sequential(*(nn.Linear(blocks, 1, bias=False) for _ in range(layers)))
    cost = additive([0.0, float(rng.integers(1, 4)), float(rng.integers(4, 9))])
    options = []
    for i in range(layers):
        prune = rng.gamma(0.5, size=(1, 1, blocks)) + 1e-3
        unify = prune * rng.random((1, 1, blocks))
        options.append(option_of(fake_layer(model, i), prune / prune.sum(), unify / prune.sum(), cost))
    return options, cost


def every_choice(option: LayerOption, cost):
    """``(cost, damage)`` of every way to type the blocks of a layer with at least one executed."""
    found = []
    for codes in itertools.product((PRUNED, UNIFIED, DENSE), repeat=option.prune.size):
        types = np.array(codes, np.uint8).reshape(option.prune.shape)
        lost = option.prune[types == PRUNED].sum() + option.unify[types == UNIFIED].sum()
        kept = option.prune.sum() - lost
        if kept > 1e-12 and (types != PRUNED).any():
            found.append((cost(option.layer, types), -math.log(min(kept / option.prune.sum(), 1.0))))
    return found


def solver_optimum(options, cost, limit):
    """Least damage by mixed-integer programming: one way to type each layer, all costs within the limit."""
    choices = [every_choice(option, cost) for option in options]
    costs, damages = (np.array([pair[i] for each in choices for pair in each]) for i in (0, 1))
    owner = np.repeat(np.arange(len(choices)), [len(each) for each in choices])
    one_each = (owner == np.arange(len(choices))[:, None]).astype(float)
    result = milp(
        damages,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs, -np.inf, limit)],
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    return result.fun if result.success else None


def test_a_budget_is_spent_nearly_as_well_as_a_solver_does():
    """The solver's optimum is never beaten, mostly met, and with one dense block less to spend it never misses."""
    gaps = []
    for seed in range(4):
        options, cost = small_instance(seed)
        dearest = sum(cost(option.layer, np.full(option.prune.shape, DENSE, np.uint8)) for option in options)
        for limit in np.arange(24, dearest + 1, 7.0):
            choices = least_damage([[option] for option in options], cost, 0.0, limit, "test")
            spent = sum(choice.cost for choice in choices)
            damage = sum(choice.damage for choice in choices)
            assert spent == sum(cost(choice.layer, choice.types) for choice in choices) <= limit
            optimum = solver_optimum(options, cost, limit)
            assert damage >= optimum - 1e-9
            gaps.append(damage - optimum)
            if limit - options[0].dense_price >= 24:
                assert damage <= solver_optimum(options, cost, limit - options[0].dense_price) + 1e-9
    assert np.mean(np.array(gaps) <= 1e-9) >= 0.5
    assert np.quantile(gaps, 0.8) < 0.03


def test_with_equal_prices_the_budget_is_always_optimal():
    """One price, no dense blocks worth buying: the greedy order is the optimum at every limit."""
    rng = np.random.default_rng(0)
    model = nn.Sequential(*(nn.Linear(5, 1, bias=False) for _ in range(3)))
    cost = additive([0.0, 1.0, 1000.0])
    options = []
    for i in range(3):
        prune = rng.gamma(0.4, size=(1, 1, 5))
        options.append(option_of(fake_layer(model, i), prune / prune.sum(), 0 * prune, cost))
    for limit in range(3, 16):
        choices = least_damage([[option] for option in options], cost, 0.0, limit, "test")
        energies = [np.sort(option.prune.ravel())[::-1] for option in options]
        best = min(
            sum(-math.log(e[:n].sum() / e.sum()) for e, n in zip(energies, counts, strict=True))
            for counts in itertools.product(range(1, 6), repeat=3)
            if sum(counts) <= limit
        )
        assert sum(choice.damage for choice in choices) == pytest.approx(best, abs=1e-12)
        assert sum(choice.cost for choice in choices) == limit


@given(st.integers(0, 10_000), st.integers(12, 90), st.integers(0, 20))
@settings(deadline=None, max_examples=40)
def test_the_damage_never_grows_by_more_than_a_step_with_the_budget(seed, limit, more):
    """The greedy fill may lose a little where a dense step no longer fits, the multiplier's part never does."""
    options, cost = small_instance(seed)
    less, greater = (
        sum(
            choice.damage
            for choice in least_damage([[option] for option in options], cost, 0.0, each, "test")
        )
        for each in (limit, limit + 8 + more)
    )
    assert greater <= less + 1e-12


def test_the_cheaper_of_two_shapes_is_taken_where_it_loses_nothing():
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    prune = rng.random((1, 1, 4)) + 0.5
    layer = fake_layer(model, 0)
    cheap, dear = (
        LayerOption(layer, prune, prune * 0.1, floor, price, 4 * price) for floor, price in ((1, 2), (4, 3))
    )
    for options in ([cheap, dear], [dear, cheap]):
        chosen = least_damage([options], additive([0, 2, 8]), 0.0, 6.0, "test")
        assert chosen[0].cost <= 6
    assert module._options(layer, [(1, 1), (1, 1), (1, 2)], None, file_bytes)[1].layer.settings.block == (
        1,
        2,
    )


def test_a_layer_without_any_energy_does_no_harm():
    model = network()
    with torch.no_grad():
        model[5].weight.zero_()
    plan = allocate(model, samples(), ALL, budget="image_bytes=4000")
    assert plan.allocation.reached <= 4000
    assert all(sum(layer.counts) <= blocks_of(layer) for layer in plan.layers)


# --- a budget: what it costs

BUDGETS = ["image_bytes=5000", "latency_cycles=1200,machine=msa-16x16", "energy_pj=1e6", "file_bytes=3500"]


@pytest.mark.parametrize("text", BUDGETS)
def test_a_budget_is_reached_from_below_and_to_the_last_block(text):
    model = network()
    budget = parse_budget(text)
    plan = allocate(model, samples(), ALL, budget=budget)
    allocation = plan.allocation
    assert allocation.reached <= budget.limit
    assert allocation.reached > 0.985 * budget.limit
    fixed = budget.fixed_cost(model, plan.layers)
    assert fixed + sum(row["cost"] for row in allocation.layers.values()) == pytest.approx(allocation.reached)
    assert (fixed > 0) == (budget.quantity == "file_bytes")


@pytest.mark.parametrize("text", BUDGETS[:3])
def test_the_cost_of_a_plan_is_what_the_simulator_reports(text):
    model = network()
    budget = parse_budget(text)
    plan = allocate(model, samples(), ALL, budget=budget, blocks=[(4, 4), (8, 8)])
    shapes = layer_shapes(model, (2, 8, 8))
    types = ADMM(model, plan).finalize()
    layers = [
        Layer(shape, layer.settings.block, types[layer.name].numpy())
        for layer, shape in zip(plan.layers, shapes, strict=True)
    ]
    summary = simulate(budget.machine, layers).summary
    as_arrays = {name: codes.numpy() for name, codes in types.items()}
    spent = budget_spent(budget, model, plan, as_arrays, (2, 8, 8))
    assert spent == pytest.approx(summary[budget.quantity], rel=1e-12)
    if budget.quantity == "image_bytes":  # bytes do not depend on where the blocks of a type are
        assert spent == plan.allocation.reached


def test_larger_budgets_keep_more_of_every_quantity():
    model, data = network(), samples()
    for quantity, limits in (
        ("image_bytes", (2500, 3500, 5000, 7000)),
        ("latency_cycles", (900, 1100, 1400, 2000)),
        ("file_bytes", (1500, 2500, 4000, 6000)),
    ):
        kept = []
        for limit in limits:
            plan = allocate(model, data, ALL, budget=f"{quantity}={limit}")
            shares = [row["energy_kept_percent"] for row in plan.allocation.layers.values()]
            kept.append(math.prod(shares))
        assert kept == sorted(kept)
        assert kept[0] < kept[-1]


def test_a_budget_for_everything_leaves_the_network_dense():
    plan = allocate(network(), samples(), ALL, budget="image_bytes=1e6")
    assert all(layer.counts == (0, 0) for layer in plan.layers)


@pytest.mark.parametrize("text", ["image_bytes=1000", "latency_cycles=10", "file_bytes=100", "energy_pj=1"])
def test_an_impossible_budget_says_what_is_possible(text):
    model = network()
    with pytest.raises(InputError) as error:
        allocate(model, samples(), CompressionConfig(), budget=text)
    (problem,) = error.value.problems
    quantity, _, limit = text.partition("=")
    assert problem.field == quantity
    assert "cannot be reached" in problem.message
    assert "exempt" in problem.hint
    smallest = float(problem.message.split("still costs ")[1].split(", ")[0].replace(",", ""))
    gap = float(problem.message.split(", ")[-1].split(" more")[0].replace(",", ""))
    assert gap == pytest.approx(smallest - float(limit))
    assert allocate(model, samples(), CompressionConfig(), budget=f"{quantity}={smallest * 1.000001}")


def test_the_smallest_that_a_refusal_names_is_met_with_several_block_shapes_too():
    """The shape of the largest blocks comes first; a single block of it costs more."""
    arguments = {"blocks": [(8, 8), (4, 4)], "method": "magnitude"}
    for text in ("image_bytes=100", "latency_cycles=10", "file_bytes=100"):
        budget = parse_budget(text)
        with pytest.raises(UnreachableError) as error:
            allocate(network(), samples(), ALL, budget=budget, **arguments)
        smallest = error.value.smallest
        assert f"still costs {smallest:,.10g}" in str(error.value)
        again = pickle.loads(pickle.dumps(error.value))
        assert (again.smallest, str(again)) == (smallest, str(error.value))
        least = module.replace(budget, limit=smallest)
        assert allocate(network(), samples(), ALL, budget=least, **arguments).allocation.reached == smallest
        with pytest.raises(UnreachableError) as error:
            allocate(network(), samples(), ALL, budget=budget, blocks=[(4, 4)])
        assert smallest <= error.value.smallest


def test_each_layer_gets_the_block_shape_that_suits_it():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Energy by whole 8 × 8 squares in one layer, by rows of 1 × 8 in the other.
        squares = torch.randn(8, 8, generator=generator).exp()
        rows = torch.randn(64, 8, generator=generator).exp()
        model[0].weight.copy_(squares.repeat_interleave(8, 0).repeat_interleave(8, 1))
        model[1].weight.copy_(rows.repeat_interleave(8, 1))
    plan = allocate(model, None, ALL, budget="file_bytes=1600", blocks=[(8, 8), (1, 8)], input_shape=(64,))
    assert [layer.settings.block for layer in plan.layers] == [(8, 8), (1, 8)]
    one_shape = [
        allocate(model, None, ALL, budget="file_bytes=1600", blocks=[block], input_shape=(64,))
        for block in ((8, 8), (1, 8))
    ]

    def damage(plan):
        return -sum(math.log(row["energy_kept_percent"]) for row in plan.allocation.layers.values())

    assert damage(plan) < min(map(damage, one_shape))


def test_balanced_rows_share_every_budget_equally():
    model = network()
    config = CompressionConfig(exempt_first_last=False, balanced_rows=True)
    for arguments in (
        {"budget": "latency_cycles=1300"},
        {"budget": "image_bytes=4000"},
        {"method": "magnitude"},
        {"method": "erdos-renyi"},
    ):
        plan = allocate(model, samples(), config, **arguments)
        types = ADMM(model, plan).finalize()
        for layer in plan.layers:
            per_row = (types[layer.name] == PRUNED).sum(dim=-1)
            assert per_row.min() == per_row.max()
        if plan.allocation.quantity:
            assert plan.allocation.reached <= plan.allocation.limit


@pytest.mark.parametrize("method", ["magnitude", "erdos-renyi"])
def test_balanced_rows_leave_no_layer_without_a_block(method):
    """61 of 64 blocks in 16 rows of 4 are nearest to all of them, which would cut the network in two."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 64), nn.Linear(64, 16))
    with torch.no_grad():
        model[1].weight.mul_(0.1 if method == "magnitude" else 1)
    config = CompressionConfig(pruned=0.95, unified=0.05, exempt_first_last=False, balanced_rows=True)
    plan = allocate(model, None, config, method=method)
    for layer in plan.layers:
        assert layer.counts[0] < blocks_of(layer)
        assert sum(layer.counts) == blocks_of(layer)
    everything = CompressionConfig(pruned=1.0, unified=0.0, exempt_first_last=False, balanced_rows=True)
    plan = allocate(model, None, everything, method=method)
    if method == "magnitude":  # the other keeps a block of every layer whatever is asked for
        assert all(layer.counts == (blocks_of(layer), 0) for layer in plan.layers)


def test_curvature_can_be_given_and_decides():
    model = network()
    plan = plan_layers(model, ALL)
    h = {layer.name: torch.ones(layer.weight_shape) for layer in plan.layers}
    plain = allocate(model, samples(), ALL, budget="image_bytes=4000")
    same = allocate(model, samples(), ALL, budget="image_bytes=4000", method="fisher", curvature_of=h)
    assert [layer.counts for layer in plain.layers] == [layer.counts for layer in same.layers]
    weight = model[5].weight.detach()
    h["5"] = 1 / weight.square()  # every weight is as dear as any other: pruning any of them hurts
    other = allocate(model, samples(), ALL, budget="image_bytes=4000", method="fisher", curvature_of=h)
    assert other.layers[2].counts[0] < plain.layers[2].counts[0]


def test_final_types_are_brought_within_the_budget():
    model = network()
    budget = parse_budget("latency_cycles=1200")
    plan = allocate(model, samples(), ALL, budget=budget)
    types = ADMM(model, plan).finalize()
    tighter = parse_budget(f"latency_cycles={spent_by(budget, model, plan, types) - 25}")
    kept = keep_within(tighter, model, plan, types, (2, 8, 8))
    assert spent_by(tighter, model, plan, kept) <= tighter.limit
    changed = sum(int((kept[name] != types[name]).sum()) for name in types)
    assert 0 < changed < 0.2 * sum(codes.numel() for codes in types.values())
    assert all((kept[name] <= types[name]).all() for name in types)
    for other in ("latency_cycles=1e6", "latency_cycles=10"):  # kept already, and by no types at all
        same = keep_within(parse_budget(other), model, plan, types, (2, 8, 8))
        assert all(torch.equal(same[name], types[name]) for name in types)


def test_a_limit_that_is_lowered_too_far_ends_at_the_least_types(monkeypatch):
    """The first answer changes nothing here, so that the limit is lowered by more than there is to save."""
    model = network()
    budget = parse_budget("latency_cycles=1200")
    types = ADMM(model, plan := allocate(model, samples(), ALL, budget=budget)).finalize()
    with pytest.raises(UnreachableError) as error:
        allocate(model, samples(), ALL, budget="latency_cycles=10")
    smallest = error.value.smallest
    tight = parse_budget(f"latency_cycles={smallest + 1}")
    limits = []

    def at_first_idle(options, cost, fixed, limit, quantity):
        limits.append(limit)
        return least_damage(options, cost, fixed, limit if len(limits) > 1 else 1e9, quantity)

    monkeypatch.setattr(module, "least_damage", at_first_idle)
    kept = keep_within(tight, model, plan, types, (2, 8, 8))
    assert limits[0] == tight.limit
    assert limits[1] < smallest == limits[2]
    assert spent_by(tight, model, plan, kept) <= tight.limit


def spent_by(budget, model, plan, types):
    return budget_spent(
        budget, model, plan, {name: codes.numpy() for name, codes in types.items()}, (2, 8, 8)
    )


# --- what a user sees


def test_the_plan_prints_as_a_table_and_goes_into_json():
    plan = allocate(network(), samples(), ALL, budget="image_bytes=4000")
    text, page = str(plan), plan._repr_html_()
    assert [line.split()[0] for line in text.splitlines()] == ["layer", "0", "2", "5", "7", "allocation:"]
    assert all(len(line) <= 100 for line in text.splitlines())
    assert f"image_bytes {plan.allocation.reached:,.0f} of 4,000 on msa-16x16" in text
    assert page.count("<tr>") == 5
    assert "energy_kept_percent" in page
    stored = json.loads(json.dumps(plan.to_dict()))
    assert stored["allocation"]["limit"] == 4000
    for row, layer in zip(stored["layers"], plan.layers, strict=True):
        assert (row["pruned"], row["unified"]) == layer.counts
        assert row["pruned"] + row["unified"] + row["dense"] == row["blocks"] == blocks_of(layer)
    assert str(plan_layers(network(), ALL)).splitlines()[0].split()[:3] == ["layer", "block", "blocks"]


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        ("image_byte=3", "image_byte", 'did you mean "image_bytes"'),
        ("image_bytes", "image_bytes", "not NAME=VALUE"),
        ("image_bytes=-1", "image_bytes", "must be a positive number"),
        ("image_bytes=many", "image_bytes", "must be a positive number"),
        ("image_bytes=1,image_bytes=2", "image_bytes", "given twice"),
        ("image_bytes=1,latency_cycles=2", "", "must name one"),
        ("machine=msa-16x16", "", "must name one"),
        ("file_bytes=1,machine=msa-16x16", "machine", "every machine"),
        ("latency_cycles=inf", "latency_cycles", "positive"),
    ],
)
def test_a_budget_that_cannot_be_read_is_refused(text, field, message):
    with pytest.raises(InputError) as error:
        parse_budget(text)
    assert field in [problem.field for problem in error.value.problems]
    assert message in str(error.value)


def test_an_unknown_machine_is_refused():
    with pytest.raises(InputError, match="msa-16x16"):
        parse_budget("latency_cycles=1,machine=msa-16x15")


def test_a_machine_that_cannot_run_the_blocks_is_named():
    with pytest.raises(InputError, match="native block"):
        allocate(network(), samples(), CompressionConfig(block=(3, 3)), budget="image_bytes=4000")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"method": "magnitud"}, "method"),
        ({"method": "uniform", "budget": "file_bytes=9"}, "method"),
        ({"method": "erdos-renyi", "budget": "file_bytes=9"}, "method"),
        ({"method": "fisher"}, "data"),
        ({"budget": "image_bytes=9"}, "data"),
        ({"blocks": [(4, 4)]}, "blocks"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, field):
    with pytest.raises(InputError) as error:
        allocate(network(), None, ALL, **arguments)
    assert field in [problem.field for problem in error.value.problems]


@pytest.mark.parametrize("method", ["uniform", "erdos-renyi", "magnitude", "fisher", "hessian"])
@pytest.mark.parametrize("pruned", [0.0, 0.05])
def test_where_nothing_is_to_be_dealt_out_every_block_stays_dense(method, pruned):
    """Of 16 blocks 5 % are none."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 2), nn.Linear(2, 10))
    config = CompressionConfig(pruned=pruned, unified=0.0, block=(2, 8), exempt_first_last=False)
    plan = allocate(model, samples(), config, method=method)
    assert [layer.counts for layer in plan.layers] == [(0, 0), (0, 0)]
    assert plan.allocation.method == method


def test_a_budget_where_every_layer_is_exempt_is_refused():
    with pytest.raises(InputError, match="file_bytes: 5,000, but every layer is exempt") as error:
        allocate(network(), samples(), NONE, budget="file_bytes=5000")
    assert "exempt = false" in str(error.value)
    model = network()
    plan = plan_layers(model, NONE)
    types = ADMM(model, plan).finalize()
    kept = keep_within(parse_budget("file_bytes=9"), model, plan, types, (2, 8, 8))
    assert all(torch.equal(kept[name], types[name]) for name in types)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("latency_cycles", 900.0), "machine: latency_cycles depends on the machine, and none is given"),
        (("image_bytes", 900.0), "machine: image_bytes"),
        (("file_bytes", 900.0, load_machine("msa-16x16")), "machine: a file has the same bytes"),
        (("file_bytes", 0.0), "file_bytes: 0, must be a positive number"),
        (("file_bytes", math.nan), "file_bytes: nan, must be"),
        (("energy_pj", math.inf, load_machine("msa-16x16")), "energy_pj: inf, must be"),
        (("latency", 900.0), 'quantity: "latency" is no such quantity'),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Budget(*arguments)


def test_the_file_estimate_counts_what_is_packed():
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    layer = plan_layers(model, CompressionConfig(block=(4, 4), exempt_first_last=False)).layers[0]
    types = np.array([[[PRUNED, UNIFIED], [DENSE, DENSE]]], np.uint8)
    # Entropy of ¼, ¼, ½ is 1.5 bits; the unified block has 4 × 2 real weights, the dense ones 2 × 4 and 2 × 2.
    assert file_bytes(layer, types) == pytest.approx((4 * 1.5 + 8 + 8 + 12 * 8) / 8 + 7 * 6)
    assert file_bytes(layer, np.zeros_like(types)) == pytest.approx(7 * 6)


def test_a_machine_of_your_own_is_a_budget_too():
    machine = load_machine("msa-16x16").with_fields({"dram.gb_per_s": 1.0})
    slow, fast = (
        allocate(network(), samples(), ALL, budget=Budget("latency_cycles", 4500, chosen))
        for chosen in (machine, load_machine("msa-16x16"))
    )
    assert sum(layer.counts[0] for layer in slow.layers) > sum(layer.counts[0] for layer in fast.layers)
