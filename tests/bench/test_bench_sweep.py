"""How fast points are evaluated, by what changes from one to the next: ResNet-18, real block maps, one core.

Run with ``pytest tests/bench/test_bench_sweep.py --benchmark-enable``. Nothing here fails for being slow. ``extra_info`` has
the points per second and, measured in the same run, how many points take the time of one `simulate`. `hwsim bench` (``make
performance``) writes the same figures into docs/performance.md.
"""

import pytest

from hwsim.evaluate import Evaluator
from hwsim.machine import load_machine
from sweeps.bench import KINDS, MACHINE, bench_layers, points_of_kind, prepare_kind, simulate_seconds


@pytest.fixture(scope="module")
def layers():
    return bench_layers()


@pytest.mark.benchmark(group="points of a space, ResNet-18, one core")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rates"] + ["rates"])
def test_points(benchmark, layers, kind):
    base = load_machine(MACHINE)
    work = prepare_kind(kind, layers, base)

    def setup():
        evaluator = Evaluator()
        evaluator.evaluate(layers, [base])
        return (evaluator,), {}

    benchmark.pedantic(work, setup=setup, rounds=5 if benchmark.enabled else 1)
    if benchmark.enabled:
        per_second = points_of_kind(kind) / benchmark.stats.stats.min
        one = simulate_seconds(layers, 5)
        benchmark.extra_info |= {
            "points_per_s": per_second,
            "goal": KINDS[kind][1],
            "points_per_simulate": per_second * one,
        }
