"""The projection against an exact assignment solver, brute force, and the laws of a projection."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment

from compress import assign, projection
from compress.assign import assign_types
from compress.blocks import expand_blocks, weight_to_matrix
from compress.projection import block_costs, project, project_to_counts
from hwsim.errors import InputError
from hwsim.layer import DENSE, PRUNED, UNIFIED, Layer, LayerShape, type_counts
from hwsim.machine import load_machine
from hwsim.simulator import run_layer


def total_cost(types, prune_cost, unify_cost):
    return prune_cost[types == PRUNED].sum() + unify_cost[types == UNIFIED].sum()


def solver_optimum(prune_cost, unify_cost, pruned, unified):
    """Least total cost by the Hungarian method: P slots that prune, U that unify, the rest free."""
    slots = np.zeros((prune_cost.size, prune_cost.size))
    slots[:, :pruned] = prune_cost[:, None]
    slots[:, pruned : pruned + unified] = unify_cost[:, None]
    rows, columns = linear_sum_assignment(slots)
    return slots[rows, columns].sum()


def assert_counts(types, pruned, unified):
    assert np.count_nonzero(types == PRUNED) == pruned
    assert np.count_nonzero(types == UNIFIED) == unified


@st.composite
def assignments(draw):
    """Costs (small integers collide all the time) and counts that fit them; unify need not be the cheaper."""
    size = draw(st.integers(1, 14))
    elements = draw(st.sampled_from([st.integers(0, 2), st.integers(0, 9), st.integers(0, 10**9)]))
    prune_cost, unify_cost = (draw(hnp.arrays(np.int64, size, elements=elements)) for _ in range(2))
    pruned = draw(st.integers(0, size))
    return prune_cost, unify_cost, pruned, draw(st.integers(0, size - pruned))


@given(assignments())
@settings(deadline=None, max_examples=400)
def test_exact_equals_the_assignment_solver_on_integers(case):
    types = assign_types(*case)
    assert_counts(types, *case[2:])
    assert total_cost(types, *case[:2]) == solver_optimum(*case)


@pytest.mark.parametrize("seed", range(20))
def test_exact_equals_the_assignment_solver_on_floats(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(20, 80))
    prune_cost = rng.gamma(0.5, size=size).astype(np.float32)
    unify_cost = prune_cost * rng.random(size, dtype=np.float32)
    pruned = int(rng.integers(1, size - 1))
    unified = int(rng.integers(1, size - pruned))
    types = assign_types(prune_cost, unify_cost, pruned, unified)
    assert_counts(types, pruned, unified)
    optimum = solver_optimum(prune_cost.astype(float), unify_cost.astype(float), pruned, unified)
    assert total_cost(types, prune_cost.astype(float), unify_cost.astype(float)) == pytest.approx(
        optimum, rel=1e-12
    )


def test_one_multiplier_cannot_split_equal_blocks_but_the_repair_can():
    assert assign_types(np.full(4, 4.0), np.ones(4), 1, 1).tolist() == [PRUNED, UNIFIED, DENSE, DENSE]


def test_costs_far_apart_in_size_are_still_told_apart():
    prune_cost = np.array([1.0, 1.0, 1e-12, 3e-12])
    unify_cost = np.array([1.0, 1.0, 1e-13, 1e-13])
    assert assign_types(prune_cost, unify_cost, 1, 1).tolist() == [DENSE, DENSE, PRUNED, UNIFIED]


@given(assignments())
@settings(deadline=None)
def test_prune_first_is_the_rank_order_and_never_cheaper(case):
    prune_cost, unify_cost, pruned, unified = case
    types = assign_types(*case, method="prune_first")
    assert_counts(types, pruned, unified)
    order = np.argsort(prune_cost, kind="stable")
    assert np.array_equal(np.sort(order[:pruned]), np.flatnonzero(types == PRUNED))
    survivors = np.sort(order[pruned:])
    chosen = survivors[np.argsort(unify_cost[survivors], kind="stable")[:unified]]
    assert np.array_equal(np.sort(chosen), np.flatnonzero(types == UNIFIED))
    assert total_cost(types, prune_cost, unify_cost) >= total_cost(
        assign_types(*case), prune_cost, unify_cost
    )


def test_prune_first_can_be_worse():
    prune_cost, unify_cost = np.array([2, 3, 9]), np.array([0, 3, 9])
    assert total_cost(assign_types(prune_cost, unify_cost, 1, 1), prune_cost, unify_cost) == 3
    first = assign_types(prune_cost, unify_cost, 1, 1, method="prune_first")
    assert total_cost(first, prune_cost, unify_cost) == 5


@pytest.mark.parametrize("equal", [False, True])
def test_the_sampled_guess_changes_nothing(equal, monkeypatch):
    rng = np.random.default_rng(3)
    prune_cost = rng.integers(0, 4 if equal else 10**12, 5_000)
    unify_cost = (prune_cost * rng.random(5_000)).astype(np.int64)
    plain = assign_types(prune_cost, unify_cost, 1_500, 2_500)
    monkeypatch.setattr(assign, "_SAMPLE_BLOCKS", 64)
    guessed = assign_types(prune_cost, unify_cost, 1_500, 2_500)
    assert_counts(guessed, 1_500, 2_500)
    assert total_cost(guessed, prune_cost, unify_cost) == total_cost(plain, prune_cost, unify_cost)


@pytest.mark.parametrize(
    ("prune_cost", "unify_cost", "pruned", "unified", "field"),
    [
        ([1.0, 2.0], [1.0, 2.0], 2, 1, "pruned_blocks + unified_blocks"),
        ([1.0, 2.0], [1.0, 2.0], -1, 1, "pruned_blocks"),
        ([1.0, 2.0], [1.0], 1, 0, "unify_cost"),
        ([1.0, np.nan], [1.0, 2.0], 1, 0, "prune_cost"),
        ([1.0, np.inf], [1.0, 2.0], 1, 0, "prune_cost"),
        ([1.0, 2.0], [-1.0, 2.0], 1, 0, "unify_cost"),
    ],
)
def test_a_bad_assignment_is_refused(prune_cost, unify_cost, pruned, unified, field):
    with pytest.raises(InputError) as error:
        assign_types(np.array(prune_cost), np.array(unify_cost), pruned, unified)
    assert field in [problem.field for problem in error.value.problems]


# --- costs and projection of a layer ---------------------------------------------------------------------------------

BLOCKS = [(1, 4), (4, 1), (2, 2), (4, 4), (3, 5), (16, 16)]
SHAPES = [((5, 7), 1), ((6, 3, 3), 1), ((8, 3, 2, 3), 2), ((6, 1, 3, 3), 6), ((4, 2, 2, 1, 3), 1)]


def random_weight(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", BLOCKS)
def test_costs_are_distances_to_the_nearest_points_over_real_entries_only(block):
    matrix = random_weight((2, 5, 7)).double()
    curvature = torch.rand((2, 5, 7), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for h in (None, curvature):
        costs = block_costs(matrix, block, h)
        for g, i, j in itertools.product(*map(range, costs.prune.shape)):
            rows, columns = (slice(n * s, (n + 1) * s) for n, s in ((i, block[0]), (j, block[1])))
            w = matrix[g, rows, columns]
            weight = torch.ones_like(w) if h is None else h[g, rows, columns]
            magnitude = (weight * w.abs()).sum() / weight.sum()
            assert costs.magnitude[g, i, j] == pytest.approx(float(magnitude), rel=1e-12)
            assert costs.prune[g, i, j] == pytest.approx(float((weight * w**2).sum()), rel=1e-12)
            distance = float((weight * (w - w.sign() * magnitude) ** 2).sum())
            assert costs.unify[g, i, j] == pytest.approx(distance, rel=1e-9, abs=1e-12)


def test_no_other_magnitude_or_sign_is_nearer():
    block = torch.tensor([[[0.3, -1.2, 0.0, 2.0]]])
    best = float(block_costs(block, (1, 4)).unify)
    for signs in itertools.product([-1.0, 1.0], repeat=4):
        for magnitude in np.linspace(0, 3, 61):
            other = torch.tensor(signs) * magnitude
            assert float((block[0, 0] - other).square().sum()) >= best - 1e-6


@pytest.mark.parametrize("order", ["tap_major", "channel_major"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_the_result_is_of_the_asked_form(shape, groups, block, order):
    weight = random_weight(shape)
    result = project(weight, block, 0.4, 0.3, groups=groups, column_order=order)
    pruned, unified = type_counts(result.types.numel(), 0.4, 0.3)
    assert_counts(result.types.numpy(), pruned, unified)
    assert result.weight.shape == weight.shape
    before, after = (weight_to_matrix(w, groups, order) for w in (weight, result.weight))
    types = expand_blocks(result.types, block, *before.shape[1:])
    assert (after[types == PRUNED] == 0).all()
    assert torch.equal(after[types == DENSE], before[types == DENSE])
    assert torch.equal(after[types == UNIFIED].sign(), before[types == UNIFIED].sign())
    for g, i, j in np.argwhere(result.types.numpy() == UNIFIED):
        rows, columns = (slice(n * s, (n + 1) * s) for n, s in ((i, block[0]), (j, block[1])))
        assert after[g, rows, columns].abs().unique().numel() == 1
    assert result.cost == pytest.approx(float((weight - result.weight).double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_projecting_twice_is_projecting_once(block):
    once = project(random_weight((12, 20)), block, 0.5, 0.25)
    twice = project(once.weight, block, 0.5, 0.25)
    assert torch.equal(once.types, twice.types)
    torch.testing.assert_close(once.weight, twice.weight, rtol=1e-6, atol=0)
    assert twice.cost <= 1e-6


def test_no_other_types_are_nearer():
    weight = random_weight((4, 6))
    result = project(weight, (2, 2), 0.34, 0.5)  # 2 pruned, 3 unified, 1 dense of 6
    costs = block_costs(weight[None], (2, 2))
    every = set(itertools.permutations([0, 0, 1, 1, 1, 2]))
    totals = [
        total_cost(np.array(t), costs.prune.numpy().ravel(), costs.unify.numpy().ravel()) for t in every
    ]
    assert result.cost == pytest.approx(min(totals), rel=1e-6)


def test_zero_counts_as_positive_and_pruned_zeros_are_positive():
    weight = torch.tensor([[-0.0, 2.0, -1.0, 1.0, -0.01, -0.01]])
    result = project(weight, (1, 2), 0.34, 0.66)
    assert result.types.flatten().tolist() == [UNIFIED, UNIFIED, PRUNED]
    assert result.weight.tolist() == [[1.0, 1.0, -1.0, 1.0, 0.0, 0.0]]
    assert not torch.signbit(result.weight[0, 4:]).any()


def test_all_groups_share_one_budget():
    weight = torch.cat([torch.full((2, 1, 2), 0.1), torch.full((2, 1, 2), 1.0)])
    result = project(weight, (2, 2), 0.5, 0.0, groups=2)
    assert result.types.flatten().tolist() == [PRUNED, DENSE]


def test_with_curvature_the_projection_is_nearest_in_its_norm():
    weight, h = random_weight((8, 12)), torch.rand((8, 12), generator=torch.Generator().manual_seed(5))
    ours = project(weight, (2, 3), 0.5, 0.5, curvature=h)
    plain = project(weight, (2, 3), 0.5, 0.5)

    def distance(result):
        return float((h * (weight - result.weight) ** 2).sum())

    assert ours.cost == pytest.approx(distance(ours), rel=1e-5)
    assert distance(ours) < distance(plain)
    uniform = project(weight, (2, 3), 0.5, 0.5, curvature=torch.full_like(weight, 3.0))
    torch.testing.assert_close(uniform.weight, plain.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_choose_as_float32_does(dtype):
    weight = random_weight((24, 40)).to(dtype)
    narrow, wide = project(weight, (4, 4), 0.3, 0.4), project(weight.float(), (4, 4), 0.3, 0.4)
    assert narrow.weight.dtype == dtype
    assert torch.equal(narrow.types, wide.types)
    assert torch.equal(narrow.weight, wide.weight.to(dtype))
    assert narrow.distance == wide.distance


def test_a_block_without_curvature_costs_nothing_and_keeps_its_mean():
    costs = block_costs(torch.tensor([[[1.0, -3.0]]]), (1, 2), torch.zeros(1, 1, 2))
    assert [float(value) for value in costs] == [2.0, 0.0, 0.0]


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_costs_that_overflow_or_underflow_float32_still_rank(scale):
    weight = random_weight((8, 8))
    scaled = project(weight * scale, (2, 2), 0.5, 0.25)
    assert torch.equal(scaled.types, project(weight.double(), (2, 2), 0.5, 0.25).types)
    assert torch.isfinite(scaled.weight).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_nan_is_refused_by_the_name_of_its_layer(bad):
    weight = random_weight((8, 8))
    weight[3, 5] = bad
    with pytest.raises(InputError, match=r"layer features\.3: weight: 1 of 64 weights are NaN or infinite"):
        project(weight, (4, 4), 0.5, 0.5, name="features.3")


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_bad_curvature_is_refused(bad):
    with pytest.raises(InputError, match="curvature"):
        project(random_weight((4, 4)), (2, 2), 0.5, 0.5, curvature=torch.full((4, 4), bad))


def test_chunks_do_not_show(monkeypatch):
    weight = random_weight((37, 29))
    whole = project(weight, (4, 4), 0.5, 0.3)
    monkeypatch.setattr(projection, "_CHUNK_ENTRIES", 100)
    chunked = project(weight, (4, 4), 0.5, 0.3)
    assert torch.equal(whole.types, chunked.types)
    torch.testing.assert_close(whole.weight, chunked.weight)


@pytest.mark.parametrize(("shape", "block", "field"), [((0, 4), (4, 4), "weight"), ((4, 4), (0, 4), "block")])
def test_an_empty_weight_or_block_is_refused(shape, block, field):
    with pytest.raises(InputError, match=f"layer weight: {field}"):
        project(torch.zeros(shape), block, 0.5, 0.5)


@pytest.mark.parametrize(("pruned", "unified"), [(0.6, 0.5), (-0.1, 0.5), (0.5, 1.5)])
def test_bad_ratios_are_refused(pruned, unified):
    with pytest.raises(InputError, match="ratios"):
        project(torch.ones(4, 4), (2, 2), pruned, unified)


@pytest.mark.parametrize(
    ("pruned", "unified", "expected"), [(1, 0, PRUNED), (0, 1, UNIFIED), (0, 0, DENSE)], ids=str
)
def test_the_corners(pruned, unified, expected):
    weight = random_weight((8, 8))
    result = project(weight, (4, 4), pruned, unified)
    assert (result.types == expected).all()
    assert torch.equal(result.weight, weight) == (expected == DENSE)


def test_the_input_is_left_alone_and_no_graph_is_kept():
    weight = random_weight((8, 8)).requires_grad_()
    before = weight.detach().clone()
    assert not project(weight, (4, 4), 0.5, 0.25).weight.requires_grad
    assert torch.equal(weight.detach(), before)


# --- balanced rows


def best_balanced(prune_cost, unify_cost, pruned, unified):
    """Least total cost over every way to type the blocks with these counts in each row, by enumeration."""
    total = 0
    for prunes, unifies in zip(prune_cost, unify_cost, strict=True):
        columns = range(len(prunes))
        total += min(
            sum(prunes[list(p)]) + sum(unifies[list(u)])
            for p in itertools.combinations(columns, pruned)
            for u in itertools.combinations(sorted(set(columns) - set(p)), unified)
        )
    return total


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_balanced_rows_are_the_best_under_their_constraint(data):
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    elements = st.integers(0, 9)
    prune_cost, unify_cost = (
        data.draw(hnp.arrays(np.int64, (rows, columns), elements=elements)) for _ in range(2)
    )
    pruned = data.draw(st.integers(0, columns))
    unified = data.draw(st.integers(0, columns - pruned))
    types = assign_types(prune_cost, unify_cost, rows * pruned, rows * unified, balanced_rows=True)
    for row in types:
        assert_counts(row, pruned, unified)
    assert total_cost(types, prune_cost, unify_cost) == best_balanced(prune_cost, unify_cost, pruned, unified)
    # A constraint never makes the optimum cheaper.
    free = assign_types(prune_cost, unify_cost, rows * pruned, rows * unified)
    assert total_cost(free, prune_cost, unify_cost) <= total_cost(types, prune_cost, unify_cost)


def test_balanced_rows_need_counts_that_rows_can_share():
    costs = np.ones((3, 4))
    with pytest.raises(InputError, match="cannot be shared equally by 3 block rows") as error:
        assign_types(costs, costs, 4, 5, balanced_rows=True)
    assert [problem.field for problem in error.value.problems] == ["pruned_blocks", "unified_blocks"]


def test_balanced_projection_is_a_projection():
    weight = random_weight((10, 4, 3))
    arguments = {"groups": 2, "balanced_rows": True}
    once = project_to_counts(weight, (2, 4), 6, 6, **arguments)
    per_row = [(once.types == code).sum(dim=-1).unique().tolist() for code in (PRUNED, UNIFIED)]
    assert per_row == [[1], [1]]
    twice = project_to_counts(once.weight, (2, 4), 6, 6, **arguments)
    assert torch.equal(once.types, twice.types)
    torch.testing.assert_close(once.weight, twice.weight)
    assert once.cost == pytest.approx(float((weight - once.weight).square().sum()), rel=1e-5)


def test_with_balanced_rows_a_pass_has_no_imbalance():
    """Simulated: block types alike, front end and banks that never hold a row up; without balance rows wait."""
    shape = LayerShape("fc", "linear", 96, 128, (16,))
    machine = load_machine("msa-16x16").with_fields(
        {"front_end.skip_window": 64, "operand_store.banks": 32, "front_end.queue_depth": 32}
    )
    waiting = {}
    for balanced in (False, True):
        result = project_to_counts(random_weight((128, 96)), (4, 4), 384, 384, balanced_rows=balanced)
        run = run_layer(Layer(shape, (4, 4), result.types.numpy()), machine)
        waiting[balanced] = run.totals["imbalance"]
        assert run.totals["unified"] == 384
    assert waiting[True] == 0
    assert waiting[False] > 0
