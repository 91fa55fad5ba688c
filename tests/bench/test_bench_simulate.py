"""What a simulation costs: ResNet-18 on 16 x 16 processing elements, cycle exact, all layers, one core.

Run with ``pytest tests/bench/test_bench_simulate.py --benchmark-enable``. Nothing here fails for being slow. Goals: pass counts
of all layers under 4 ms, the whole of `simulate` under 20 ms, a fresh process that simulates one layer under 3 s the second
time.
"""

import subprocess
import sys
import time

import numpy as np
import pytest
from numba import njit

from hwsim.kernels.passes import run_passes
from hwsim.layer import Layer, LayerShape, random_types
from hwsim.lowering import effective_counts, execution_order, pass_config
from hwsim.machine import load_machine
from hwsim.simulator import _dense_runs, simulate

MACHINE = "msa-16x16"
BLOCK = (4, 4)


def conv(name, c_in, c_out, size, kernel, stride):
    pad = kernel // 2
    return LayerShape(
        name,
        "conv",
        in_channels=c_in,
        out_channels=c_out,
        input_size=(size, size),
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dilation=(1, 1),
    )


def resnet18():
    """The 20 convolutions and the classifier of ResNet-18 at 1 x 3 x 224 x 224."""
    shapes = [conv("conv1", 3, 64, 224, 7, 2)]
    shapes += [conv(f"layer1.{i}.conv{j}", 64, 64, 56, 3, 1) for i in range(2) for j in (1, 2)]
    for stage, (c_in, size) in enumerate([(64, 56), (128, 28), (256, 14)], start=2):
        c_out = 2 * c_in
        shapes += [
            conv(f"layer{stage}.0.conv1", c_in, c_out, size, 3, 2),
            conv(f"layer{stage}.0.conv2", c_out, c_out, size // 2, 3, 1),
            conv(f"layer{stage}.0.downsample", c_in, c_out, size, 1, 2),
            conv(f"layer{stage}.1.conv1", c_out, c_out, size // 2, 3, 1),
            conv(f"layer{stage}.1.conv2", c_out, c_out, size // 2, 3, 1),
        ]
    return [*shapes, LayerShape("fc", "linear", in_channels=512, out_channels=1000)]


@pytest.fixture(scope="module")
def layers():
    rng = np.random.default_rng(0)
    shapes = resnet18()
    assert len(shapes) == 21
    assert sum(shape.weight_count for shape in shapes) == 11_678_912
    assert sum(shape.macs for shape in shapes) == 1_814_073_344
    return [Layer(shape, BLOCK, random_types(shape, BLOCK, 0.5, 0.5, rng)) for shape in shapes]


@njit(nogil=True)
def step_every_unit(types, order, rows, window, depth, banks, unified_cycles, dense_cycles):
    """The straightforward kernel: every row steps its scan, fetch and execute in every cycle, one segment."""
    groups, m_blocks, end = types.shape
    tiles = (m_blocks + rows - 1) // rows
    out = np.zeros((groups, tiles, 1, 13), np.int64)
    scan, head, held = np.empty(rows, np.int64), np.empty(rows, np.int64), np.empty(rows, np.int64)
    queue = np.empty((rows, depth), np.int64)
    operand, busy, wanted = np.empty(rows, np.int64), np.empty(rows, np.int64), np.empty(rows, np.int64)
    best = np.empty(banks, np.int64)
    for group in range(groups):
        for tile in range(tiles):
            block_rows = order[group, tile * rows : (tile + 1) * rows]
            count = out[group, tile, 0]
            live = block_rows.size
            scan[:], head[:], held[:], operand[:], busy[:] = 0, 0, 0, -1, 0
            unfinished = True
            while unfinished:
                count[0] += 1
                best[:] = end
                for r in range(live):
                    wanted[r] = -1
                    if held[r] > 0 and (operand[r] < 0 or busy[r] <= 1):
                        wanted[r] = queue[r, head[r]]
                        bank = wanted[r] % banks
                        best[bank] = min(best[bank], wanted[r])
                for bank in range(banks):
                    count[1] += best[bank] < end
                count[8] += rows - live
                unfinished = False
                for r in range(live):
                    row = types[group, block_rows[r]]
                    granted = wanted[r] >= 0 and best[wanted[r] % banks] == wanted[r]
                    if busy[r] > 0:
                        count[7] += 1
                    elif scan[r] == end and held[r] == 0 and operand[r] < 0:
                        count[8] += 1
                        continue
                    elif operand[r] >= 0:
                        count[9] += 1
                    elif held[r] > 0:
                        count[10 if granted else 11] += 1
                    else:
                        count[12] += 1
                    room = held[r] < depth
                    if busy[r] <= 1 and operand[r] >= 0:
                        dense = row[operand[r]] == 2
                        busy[r] = dense_cycles if dense else unified_cycles
                        count[6 if dense else 5] += 1
                        operand[r] = -1
                    elif busy[r] > 0:
                        busy[r] -= 1
                    if granted:
                        operand[r] = wanted[r]
                        head[r] = (head[r] + 1) % depth
                        held[r] -= 1
                        count[2] += 1
                    if scan[r] < end and room:
                        stop = min(scan[r] + window, end)
                        count[4] += stop - scan[r]
                        before = scan[r]
                        while scan[r] < stop:
                            code = row[scan[r]]
                            scan[r] += 1
                            if code != 0:
                                queue[r, (head[r] + held[r]) % depth] = scan[r] - 1
                                held[r] += 1
                                break
                        count[3] += scan[r] - before
                    if scan[r] < end or held[r] > 0 or operand[r] >= 0 or busy[r] > 0:
                        unfinished = True
    return out


def seconds_of(call, rounds=15):
    """Best and median time of a call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times), sorted(times)[rounds // 2]


@pytest.mark.benchmark(group="ResNet-18, pass counts of all layers, one core")
def test_pass_counts(benchmark, layers):
    machine = load_machine(MACHINE)
    config = pass_config(machine)
    work = [
        (layer.types, execution_order(effective_counts(layer.types, machine), machine)) for layer in layers
    ]
    executed = sum(int((types != 0).sum()) for types, _ in work)

    def event_driven():
        return [run_passes(types, order, config) for types, order in work]

    def straightforward():
        return [step_every_unit(types, order, *config[:6]) for types, order in work]

    for mine, plain in zip(event_driven(), straightforward(), strict=True):
        np.testing.assert_array_equal(mine, plain)
    benchmark(event_driven)
    if benchmark.enabled:
        best, median = seconds_of(straightforward)
        stats = benchmark.stats.stats
        benchmark.extra_info |= {
            "executed_blocks": executed,
            "ns_per_executed_block": {
                "min": stats.min / executed * 1e9,
                "median": stats.median / executed * 1e9,
            },
            "straightforward_ms": {"min": best * 1e3, "median": median * 1e3},
            "straightforward_ns_per_block": best / executed * 1e9,
            "times_faster": {"min": best / stats.min, "median": median / stats.median},
        }


@pytest.mark.benchmark(group="ResNet-18, simulate() with steps, energy, tables and both dense baselines")
def test_simulate_again(benchmark, layers):
    """The dense baselines depend on geometry alone: a second call finds them."""
    report = benchmark(simulate, MACHINE, layers)
    assert report.summary["weight_count"] == 11_678_912


@pytest.mark.benchmark(group="ResNet-18, simulate() with steps, energy, tables and both dense baselines")
def test_simulate_with_cold_baselines(benchmark, layers):
    rounds = 30 if benchmark.enabled else 1
    report = benchmark.pedantic(
        simulate, (MACHINE, layers), setup=_dense_runs.cache_clear, rounds=rounds, warmup_rounds=1
    )
    assert report.summary["weight_count"] == 11_678_912


ONE_LAYER = """
import numpy as np
from hwsim import Layer, LayerShape, simulate
from hwsim.layer import random_types
shape = LayerShape("fc", "linear", in_channels=512, out_channels=1000)
types = random_types(shape, (4, 4), 0.5, 0.5, np.random.default_rng(0))
print(simulate("msa-16x16", [Layer(shape, (4, 4), types)]))
"""


@pytest.mark.benchmark(group="a fresh process, to its first output, compile cache warm")
def test_fresh_process(benchmark):
    def run():
        return subprocess.run([sys.executable, "-c", ONE_LAYER], check=True, capture_output=True, text=True)

    run()  # fills the compile cache
    result = benchmark.pedantic(run, rounds=5 if benchmark.enabled else 1)
    assert "speed-up against dense" in result.stdout
