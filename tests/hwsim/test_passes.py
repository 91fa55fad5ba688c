"""The pass kernel against the plain-Python oracle and against the reference of the documentation, and its laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hwsim.kernels.counts import count_types
from hwsim.kernels.passes import MAX_BANKS, MAX_BLOCK_COLUMNS, PassConfig, run_passes
from hwsim.layer import DENSE, PRUNED, UNIFIED
from hwsim.oracle import COUNTERS, oracle_layer, oracle_pass
from hwsim.simulator import pass_counters
from tests.hwsim import reference
from tests.hwsim.strategies import PassCase, pass_case, pass_cases

Counters = dict[str, int]
CLASSES = COUNTERS[7:]


def kernel(case: PassCase) -> list[list[list[Counters]]]:
    """``[G][T][segments]`` counters of the compiled kernel."""
    counters = run_passes(case.types, case.order, case.config).tolist()
    return [[[dict(zip(COUNTERS, s, strict=True)) for s in tile] for tile in group] for group in counters]


def one(case: PassCase) -> Counters:
    """The counters of a case that is one pass in one segment."""
    [[[count]]] = kernel(case)
    return count


def tiles_of(case: PassCase) -> list[tuple[int, int, list[list[int]]]]:
    """``(group, row tile, types of its rows)`` of every row tile."""
    rows = case.config.rows
    return [
        (g, tile, [case.types[g, row].tolist() for row in order[tile * rows : (tile + 1) * rows]])
        for g, order in enumerate(case.order.tolist())
        for tile in range(-(-len(order) // rows))
    ]


def spans_of(case: PassCase) -> list[tuple[int, int]]:
    k_blocks, size = case.types.shape[2], case.config.segment_words
    return [(first, min(first + size, k_blocks)) for first in range(0, k_blocks, size)]


def by_reference(case: PassCase) -> list[list[list[Counters]]]:
    config = case.config
    result: list[list[list[Counters]]] = [[] for _ in case.types]
    for group, _, rows in tiles_of(case):
        result[group].append(
            reference.run_pass(
                rows,
                spans_of(case),
                array_rows=config.rows,
                occ=(0, config.unified_cycles, config.dense_cycles),
                skip_window=config.skip_window,
                queue_depth=config.queue_depth,
                banks=config.banks,
            )
        )
    return result


def by_oracle(case: PassCase) -> list[list[list[Counters]]]:
    config = case.config._asdict()
    del config["segment_words"]
    result: list[list[list[Counters]]] = [[] for _ in case.types]
    for group, _, rows in tiles_of(case):
        spans = spans_of(case)
        result[group].append([oracle_pass(rows, begin=a, end=b, **config) for a, b in spans])
    return result


def random_case(seed: int, p: float, u: float, **config: int | tuple[int, int]) -> PassCase:
    types = np.random.default_rng(seed).choice(3, (17, 150), p=[p, u, 1 - p - u])
    return pass_case(types.tolist(), **config)  # type: ignore[arg-type]


# ---------------------------------------------------------------- three implementations


@settings(deadline=None, max_examples=250)
@given(pass_cases())
@example(pass_case(["2"]))  # one block
@example(pass_case(["0"]))  # one block, pruned
@example(pass_case(["1"], rows=1, skip_window=1, queue_depth=1, banks=1))  # everything is 1
@example(pass_case(["0120"], rows=6))  # one block row in a tall array
@example(pass_case(["000000000"] * 5, rows=3))  # all pruned
@example(pass_case(["222222222"] * 5, rows=3))  # all dense
@example(pass_case(["111111111"] * 5, rows=3))  # all unified
@example(pass_case(["111111111"] * 5, rows=3, queue_depth=1))  # occupancy 1 and a queue of 1
@example(pass_case(["000001", "100000", "222222", "000000"], banks=1))  # ragged rows, one bank
@example(pass_case(["12012012"] * 7, rows=3, order=[6, 0, 5, 1, 4, 2, 3]))  # more rows than a tile, an order
@example(pass_case(["12012012"] * 3, occ=(17, 1)))
@example(pass_case(["12012012"] * 3, occ=(1, 17)))
@example(pass_case(["12012012", "21021021"], segment_words=3))  # several segments, the last one shorter
@example(pass_case(["0000000000002", "2000000000000"], segment_words=4))  # segments without a block
@example(pass_case(["0210", "2222"], banks=MAX_BANKS, skip_window=4096, queue_depth=4096))
@example(random_case(0, 0.5, 0.5, rows=16, banks=16, skip_window=8, queue_depth=4))
@example(random_case(1, 0.9, 0.05, rows=16, banks=16, skip_window=8, queue_depth=4))
@example(random_case(2, 0.3, 0.4, rows=16, banks=4, skip_window=8, queue_depth=1, occ=(1, 4)))
@example(random_case(3, 0.0, 0.5, rows=8, banks=2, skip_window=1, queue_depth=2, occ=(1, 17)))
def test_kernel_oracle_and_reference_agree_on_every_counter(case: PassCase) -> None:
    expected = by_reference(case)
    assert kernel(case) == expected
    assert by_oracle(case) == expected


def test_oracle_of_a_layer_is_its_passes_in_order() -> None:
    types = [[2, 0, 1], [0, 0, 2], [1, 1, 1]]
    config = {"skip_window": 2, "queue_depth": 2, "banks": 2, "unified_cycles": 1, "dense_cycles": 4}
    tiles = oracle_layer(types, [2, 0, 1], rows=2, **config)
    assert tiles == [
        oracle_pass([types[2], types[0]], rows=2, **config),
        oracle_pass([types[1]], rows=2, **config),
    ]


def test_column_numbers_near_the_kernel_limit_are_exact() -> None:
    """Blocks at the far end of the widest layer, in one segment and in the highest bank."""
    types = np.zeros((1, 2, MAX_BLOCK_COLUMNS), np.uint8)
    types[0, 0, -1] = types[0, 1, -1] = DENSE
    types[0, 1, 0] = UNIFIED
    config = PassConfig(2, 4096, 2, MAX_BANKS, 1, 4, MAX_BLOCK_COLUMNS)
    case = PassCase(types, np.array([[0, 1]]), config)
    assert kernel(case) == by_reference(case)


# ---------------------------------------------------------------- laws


@settings(deadline=None, max_examples=100)
@given(pass_cases())
def test_laws_of_the_counters(case: PassCase) -> None:
    counters = kernel(case)
    config = case.config
    for group, tile, rows in tiles_of(case):
        for (begin, end), count in zip(spans_of(case), counters[group][tile], strict=True):
            part = [row[begin:end] for row in rows]
            assert sum(count[name] for name in CLASSES) == config.rows * count["cycles"]
            assert count["latches"] == count["unified"] + count["dense"]
            assert count["unified"] == sum(row.count(UNIFIED) for row in part)
            assert count["dense"] == sum(row.count(DENSE) for row in part)
            assert count["scanned"] == len(part) * (end - begin)
            assert (
                count["busy"]
                == count["unified"] * config.unified_cycles + count["dense"] * config.dense_cycles
            )
            assert count["examined"] >= count["scanned"]
            distinct = {j for row in part for j, code in enumerate(row, begin) if code != PRUNED}
            assert len(distinct) <= count["words"] <= count["latches"]
            assert count["fetch"] <= count["latches"]
            assert count["accept"] <= count["latches"]
            assert count["imbalance"] >= (config.rows - len(part)) * count["cycles"]


@settings(deadline=None, max_examples=100)
@given(pass_cases())
def test_a_pass_takes_no_less_than_each_unit_alone(case: PassCase) -> None:
    counters = kernel(case)
    config = case.config
    occ = {PRUNED: 0, UNIFIED: config.unified_cycles, DENSE: config.dense_cycles}
    for group, tile, rows in tiles_of(case):
        for (begin, end), count in zip(spans_of(case), counters[group][tile], strict=True):
            assert count["cycles"] >= -(-(end - begin) // config.skip_window)
            for row in rows:
                work = sum(occ[code] for code in row[begin:end])
                assert count["cycles"] >= (work + 3 if work else 0)
            per_bank = [0] * config.banks
            for j in range(begin, end):
                per_bank[j % config.banks] += any(row[j] != PRUNED for row in rows)
            assert count["cycles"] >= max(per_bank)


@settings(deadline=None, max_examples=60)
@given(pass_cases(), st.integers(0, 2**32 - 1))
def test_more_pruning_never_executes_or_reads_more(case: PassCase, seed: int) -> None:
    kept = np.random.default_rng(seed).random(case.types.shape) < 0.7
    fewer = PassCase(case.types * kept.astype(np.uint8), case.order, case.config)
    before, after = (run_passes(c.types, c.order, c.config).sum(axis=(0, 1, 2)) for c in (case, fewer))
    for name in ("latches", "unified", "dense", "busy"):
        assert after[COUNTERS.index(name)] <= before[COUNTERS.index(name)]


@settings(deadline=None, max_examples=60)
@given(pass_cases(), st.integers(0, 2**32 - 1))
def test_rows_of_a_tile_may_change_places(case: PassCase, seed: int) -> None:
    """The smallest block column wins a bank, whoever asks: which row of the array holds a block row is all the same."""
    rng = np.random.default_rng(seed)
    order = case.order.copy()
    rows = case.config.rows
    for group in order:
        for first in range(0, len(group), rows):
            rng.shuffle(group[first : first + rows])
    moved = PassCase(case.types, order, case.config)
    assert kernel(moved) == kernel(case)


@settings(deadline=None, max_examples=60)
@given(pass_cases())
def test_a_bank_per_block_column_leaves_no_conflict(case: PassCase) -> None:
    wide = case.config._replace(banks=case.types.shape[2])
    counters = run_passes(case.types, case.order, wide)
    assert not counters[..., COUNTERS.index("conflict")].any()


@settings(deadline=None, max_examples=60)
@given(pass_cases())
def test_a_missing_row_counts_as_imbalance_only(case: PassCase) -> None:
    """One row tile in an array that is just high enough, and in one of three rows more."""
    high_enough = case.config._replace(rows=case.types.shape[1])
    full = PassCase(case.types, case.order, high_enough)
    taller = PassCase(case.types, case.order, high_enough._replace(rows=high_enough.rows + 3))
    for [segments], [more] in zip(kernel(full), kernel(taller), strict=True):
        for count, other in zip(segments, more, strict=True):
            assert other == count | {"imbalance": count["imbalance"] + 3 * count["cycles"]}


@settings(deadline=None, max_examples=60)
@given(pass_cases(), st.sampled_from([UNIFIED, DENSE]))
def test_uniform_shortcut_equals_the_full_kernel(case: PassCase, code: int) -> None:
    types = np.full_like(case.types, code)
    short = pass_counters(types, case.order, case.config, uniform=True)
    np.testing.assert_array_equal(short, run_passes(types, case.order, case.config))


def test_uniform_shortcut_takes_a_broadcast_array() -> None:
    """The dense baseline hands a read-only view over, which the kernel itself would not take."""
    types = np.broadcast_to(np.uint8(DENSE), (2, 5, 7))
    config = PassConfig(3, 4, 2, 4, 1, 2, 4)
    order = np.tile(np.arange(5), (2, 1))
    short = pass_counters(types, order, config, uniform=True)
    np.testing.assert_array_equal(short, run_passes(np.array(types), order, config))


@given(pass_cases())
@settings(deadline=None, max_examples=30)
def test_counts_of_block_rows(case: PassCase) -> None:
    counts = count_types(case.types)
    for code in (PRUNED, UNIFIED, DENSE):
        np.testing.assert_array_equal(counts[:, :, code], (case.types == code).sum(axis=2))


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(("occupancy", "queue_depth"), [(1, 2), (2, 1), (2, 2), (4, 4), (17, 1)])
@pytest.mark.parametrize("k_blocks", [1, 2, 9, 40])
def test_rows_that_are_alike_take_kb_o_plus_3(
    rows: int, occupancy: int, queue_depth: int, k_blocks: int
) -> None:
    case = pass_case(
        ["1" * k_blocks] * rows,
        rows=rows,
        occ=(occupancy, 1),
        queue_depth=queue_depth,
        skip_window=1,
        banks=1,
    )
    count = one(case)
    assert count["cycles"] == k_blocks * occupancy + 3
    assert count["words"] == k_blocks
    assert count["latches"] == rows * k_blocks


@pytest.mark.parametrize("k_blocks", [1, 2, 9, 40])
def test_a_queue_of_one_is_refilled_every_other_cycle(k_blocks: int) -> None:
    """Occupancy 1 and Q = 1: block i is pushed in cycle 2i − 1, fetched in 2i, taken in 2i + 1, done after 2i + 2."""
    count = one(pass_case(["1" * k_blocks], queue_depth=1, occ=(1, 1), rows=1))
    assert count["cycles"] == 2 * k_blocks + 2
    assert (count["starved"], count["fetch"], count["accept"], count["busy"]) == (1, 1, k_blocks, k_blocks)


@pytest.mark.parametrize(("k_blocks", "window"), [(1, 1), (8, 8), (9, 8), (40, 7)])
def test_an_empty_row_is_scanned_a_window_per_cycle(k_blocks: int, window: int) -> None:
    count = one(pass_case(["0" * k_blocks], skip_window=window, rows=1))
    cycles = -(-k_blocks // window)
    assert count == dict.fromkeys(COUNTERS, 0) | {
        "cycles": cycles,
        "scanned": k_blocks,
        "examined": k_blocks,
        "starved": cycles,
    }


# ---------------------------------------------------------------- boundaries: N − 1 and N


@pytest.mark.parametrize("window", [1, 2, 8])
def test_window_edge(window: int) -> None:
    """A block at distance S − 1 is found in the first cycle, at distance S in the second."""
    inside = one(pass_case(["0" * (window - 1) + "2"], skip_window=window, occ=(1, 4)))
    beyond = one(pass_case(["0" * window + "2"], skip_window=window, occ=(1, 4)))
    assert inside["cycles"] == 4 + 3
    assert beyond["cycles"] == 4 + 3 + 1


def test_queue_depth_lets_the_scan_run_ahead() -> None:
    """Four blocks of 17 cycles, 60 pruned, one block: 60 cycles of scanning hide behind 68 of work, if they may begin early.

    One block executes, one waits as operand, two in the queue: with Q = 3 there is room for the scan to go on, with Q = 2
    it stops until the second block is taken.
    """
    types = ["2222" + "0" * 60 + "2"]
    hidden = one(pass_case(types, skip_window=1, queue_depth=3, occ=(1, 17), rows=1))
    late = one(pass_case(types, skip_window=1, queue_depth=2, occ=(1, 17), rows=1))
    assert hidden["cycles"] == 5 * 17 + 3
    assert hidden["starved"] == 1
    # The third block leaves the queue in cycle 3 + 17, the last one is pushed 61 cycles later, fetched, taken, executed.
    assert late["cycles"] == 20 + 61 + 2 + 17


@pytest.mark.parametrize("banks", [2, 5, 16])
def test_bank_conflict_at_distance_a(banks: int) -> None:
    """Two rows ask for columns 0 and d in the same cycle: one bank at d = A, two at d = A − 1."""

    def rows(distance: int) -> list[str]:
        return ["2" + "0" * banks, "0" * distance + "2" + "0" * (banks - distance)]

    apart = one(pass_case(rows(banks - 1), banks=banks, skip_window=64, rows=2))
    same = one(pass_case(rows(banks), banks=banks, skip_window=64, rows=2))
    assert (apart["conflict"], same["conflict"]) == (0, 1)
    assert same["cycles"] == apart["cycles"] + 1


def test_a_word_is_shared_by_the_rows_that_ask_together() -> None:
    alike = one(pass_case(["2020", "2020"], rows=2))
    apart = one(pass_case(["2020", "0202"], rows=2))
    assert (alike["words"], alike["latches"]) == (2, 4)
    assert (apart["words"], apart["latches"]) == (4, 4)


def test_segments_begin_where_half_the_store_is_full() -> None:
    types = ["2" * 12]
    assert len(kernel(pass_case(types, segment_words=12))[0][0]) == 1
    first, second = kernel(pass_case(types, segment_words=11))[0][0]
    assert (first["cycles"], second["cycles"]) == (11 * 2 + 3, 1 * 2 + 3)
