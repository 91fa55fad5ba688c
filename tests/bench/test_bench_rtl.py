"""The RTL's speed, and the compiled kernel's against it, on a layer of ResNet-18.

Run with ``pytest tests/bench/test_bench_rtl.py -m "" --benchmark-enable``. Nothing
here fails for being slow. Goal: the kernel is
1,000 times faster than the RTL. They do not do the same work: the RTL computes every output, the kernel only counts.
"""

import shutil
import time

import pytest

from hwsim.errors import InputError
from hwsim.kernels.passes import run_passes
from hwsim.lowering import effective_counts, execution_order, pass_config
from hwsim.machine import load_machine
from hwsim.rtl_simulator import RtlSimulator, find_verilator
from hwsim.simulator import run_layer
from hwsim.verify import LayerSpec

MACHINE = "msa-8x8"
DOWNSAMPLE = LayerSpec(m=128, k=64, n=28, height=28, stride=2, pruned=0.5, unified=0.5)
"""layer2.0.downsample: 1 x 1, stride 2, 64 to 128 channels, 28 x 28 outputs."""


def can_build():
    try:
        find_verilator()
    except InputError:
        return False
    return all(shutil.which(tool) for tool in ("g++", "make", "perl"))


def best_seconds(call, rounds=15):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.slow
@pytest.mark.skipif(not can_build(), reason="Verilator, g++, make or perl is not there")
@pytest.mark.benchmark(group="ResNet-18 layer2.0.downsample, RTL on 8 x 8")
def test_rtl_against_kernel(benchmark):
    machine = load_machine(MACHINE)
    layer, inputs = DOWNSAMPLE.layer(machine), DOWNSAMPLE.inputs(machine)
    run = run_layer(layer, machine)
    config = pass_config(machine)
    order = execution_order(effective_counts(layer.types, machine), machine)
    with RtlSimulator(machine) as simulator:
        result = benchmark.pedantic(simulator.run, (run, inputs), rounds=3 if benchmark.enabled else 1)
    assert result.outputs.shape == (128, 784)
    if benchmark.enabled:
        rtl_seconds = benchmark.stats.stats.min
        passes_seconds = best_seconds(lambda: run_passes(layer.types, order, config))
        layer_seconds = best_seconds(lambda: run_layer(layer, machine))
        benchmark.extra_info |= {
            "cycles": result.layer_cycles,
            "rtl_cycles_per_second": result.layer_cycles / rtl_seconds,
            "kernel_times_faster": rtl_seconds / passes_seconds,
            "run_layer_times_faster": rtl_seconds / layer_seconds,
        }
