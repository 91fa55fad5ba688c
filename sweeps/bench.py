"""How many points a second, by kind of axis, with the profile that explains it: `hwsim bench` writes docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hwsim.evaluate import Evaluator
    from hwsim.layer import Layer
    from hwsim.machine import Machine

__all__ = [
    "KINDS",
    "bench",
    "bench_layers",
    "gain_of_two",
    "points_of_kind",
    "seconds_of_kind",
    "simulate_seconds",
]

MACHINE = "msa-16x16"
KINDS = {
    "rates": ("DRAM bandwidth, clock, technology", 100_000),
    "buffers": ("buffer sizes (other steps)", 2_000),
    "passes": ("front end, banks (other pass counts)", 200),
    "layer": ("ratios of one layer, the others reused", None),
}
"""What changes from point to point, and the goal in points per second; see `prepare_kind`."""

PEERS = (("MAESTRO", "49"), ("Timeloop's model", "1.6"), ("SCALE-Sim", "0.001"))
"""Source: ResNet-18 on 16 x 16 processing elements with each tool's own defaults, two shared virtual processors, 2026."""


@click.command(epilog="Example: hwsim bench --out performance.md")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the page here too.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="The best round counts.")
@click.option(
    "--points", type=click.IntRange(1000), default=1_000_000, show_default=True, help="Of the large sweep."
)
def bench(out: Path | None, rounds: int, points: int) -> None:
    """Measure on this machine how many points of a design space are evaluated per second, and where the time goes.

    ResNet-18, random block maps with p = u = 0.5. Takes about three minutes; run it on an idle machine.
    """
    from hwsim.files import write_atomically

    text = _page(rounds, points)
    if out is not None:
        write_atomically(out, text.encode())
    click.echo(text)


def bench_layers() -> list[Layer]:
    """The 21 layers of ResNet-18 at 4x4 blocks, p = u = 0.5 in all but the first and the last."""
    from compress.zoo_shapes import zoo_shapes
    from hwsim.layer import random_layers

    return random_layers(zoo_shapes("resnet18"), (4, 4), 0.5, 0.5, seed=0)


def points_of_kind(kind: str) -> int:
    """How many points one round of `prepare_kind` evaluates."""
    return {"rates": 60_000, "buffers": 512, "passes": 36, "layer": 36}[kind]


def prepare_kind(kind: str, layers: list[Layer], base: Machine) -> Callable[[Evaluator], None]:
    """What a round of a kind does with an evaluator that knows the base machine.

    ``rates``: 3 technologies × 40 clocks × 500 bandwidths. ``buffers``: 8 × 8 × 8 sizes. ``passes``: 36 front ends.
    ``layer``: 36 maps of one layer.
    """
    import itertools

    import numpy as np

    from hwsim.evaluate import Rates
    from hwsim.layer import Layer, random_types

    def machines(axes: dict[str, Any]) -> list[Machine]:
        return [
            base.with_fields(dict(zip(axes, values, strict=True)))
            for values in itertools.product(*axes.values())
        ]

    if kind == "rates":
        tables = machines({"technology.table": ["45nm-horowitz", "45nm-aladdin", "22nm-aladdin"]})
        table, clock, bandwidth = np.unravel_index(np.arange(60_000), (3, 40, 500))
        same = np.ones(60_000)
        rates = Rates(
            500 + 10 * clock.astype(np.float64),
            (np.arange(1, 501) / 5)[bandwidth],
            64 * same.astype(np.int64),
            12 * same,
        )
        return lambda evaluator: _check(evaluator.evaluate(layers, tables, table, rates))
    if kind == "layer":
        rng = np.random.default_rng(1)
        shape = layers[5].shape
        variants = [
            [*layers[:5], Layer(shape, (4, 4), random_types(shape, (4, 4), 0.5, 0.4, rng)), *layers[6:]]
            for _ in range(36)
        ]

        def one_layer(evaluator: Evaluator) -> None:
            for variant in variants:
                _check(evaluator.evaluate(variant, [base]))

        return one_layer
    if kind == "buffers":
        axes: dict[str, Any] = {
            "activation_buffer.size_kib": list(range(200, 264, 8)),
            "output.size_kib": list(range(32, 96, 8)),
            "weights.dense_kib": list(range(500, 820, 40)),
        }
    else:
        axes = {
            "front_end.skip_window": [4, 8, 12],
            "operand_store.banks": [8, 12, 16, 24],
            "front_end.queue_depth": [2, 4, 6],
        }
    # making the machines is part of the work
    return lambda evaluator: _check(evaluator.evaluate(layers, machines(axes)))


def _check(results: Any) -> None:
    if any(error is not None for error in results.error):
        raise RuntimeError("a point of the benchmark does not fit its machine")


def seconds_of_kind(kind: str, layers: list[Layer], rounds: int) -> tuple[float, float]:
    """Processor and wall seconds of the best round; the base machine is known before it, nothing else is."""
    import time

    from hwsim.evaluate import Evaluator
    from hwsim.machine import load_machine

    base = load_machine(MACHINE)
    work = prepare_kind(kind, layers, base)
    processor, wall = [], []
    for _ in range(rounds):
        evaluator = Evaluator()
        evaluator.evaluate(layers, [base])
        start, used = time.perf_counter(), time.process_time()
        work(evaluator)
        processor.append(time.process_time() - used)
        wall.append(time.perf_counter() - start)
    return min(processor), min(wall)


def simulate_seconds(layers: list[Layer], rounds: int) -> float:
    """Processor seconds of one `simulate`, its baselines known."""
    import time

    from hwsim.simulator import simulate

    simulate(MACHINE, layers)
    times = []
    for _ in range(rounds):
        start = time.process_time()
        simulate(MACHINE, layers)
        times.append(time.process_time() - start)
    return min(times)


_WINDOWS, _DEPTHS, _BANKS = range(1, 33), range(1, 17), (8, 12, 16, 24)


def sweep_rate(workers: int) -> float:
    """Points per second of `run_sweep` over axes that change the pass counts, after the first quarter of the points."""
    import tempfile
    import time

    from sweeps.runner import SweepProgress, run_sweep
    from sweeps.space import Space

    axes = {
        "front_end.skip_window": list(_WINDOWS),
        "front_end.queue_depth": list(_DEPTHS),
        "operand_store.banks": list(_BANKS),
    }
    space = Space(
        networks=["resnet18"],
        blocks=["4x4"],
        ratios=[[0.5, 0.5]],
        random={},
        machine={"base": MACHINE, "axes": axes},
    )
    done: list[tuple[float, int]] = []

    def note(progress: SweepProgress) -> None:
        if progress.points_done >= len(space) // 4:
            done.append((time.perf_counter(), progress.points_done))

    with tempfile.TemporaryDirectory(prefix="hwsim-") as folder:
        run_sweep(space, folder, workers=workers, details="none", progress=note)
    return (done[-1][1] - done[0][1]) / (done[-1][0] - done[0][0])


def _arithmetic(_: int) -> int:
    value = 1
    for _ in range(8_000_000):
        value = (value * 1103515245 + 12345) % 2147483648
    return value


def gain_of_two(rounds: int) -> tuple[float, float]:
    """``(sweep, arithmetic)``: how many times faster two processes work than one; the median of some rounds."""
    import multiprocessing
    import statistics
    import time
    from concurrent.futures import ProcessPoolExecutor

    sweep, arithmetic = [], []
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_arithmetic, range(2)))
        for _ in range(rounds):
            start = time.perf_counter()
            for number in range(2):
                pool.submit(_arithmetic, number).result()
            one = time.perf_counter() - start
            start = time.perf_counter()
            list(pool.map(_arithmetic, range(2)))
            arithmetic.append(one / (time.perf_counter() - start))
            rates = []
            for workers in (1, 2):  # in a new process each: this one would keep what it found
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                    rates.append(fresh.submit(sweep_rate, workers).result())
            sweep.append(rates[1] / rates[0])
    return statistics.median(sweep), statistics.median(arithmetic)


def shares_of_kind(kind: str, layers: list[Layer]) -> list[tuple[str, float]]:
    """Where the time of a round goes: functions and their share of the processor time, the largest first."""
    import cProfile
    import pstats

    from hwsim.evaluate import Evaluator
    from hwsim.machine import load_machine

    base = load_machine(MACHINE)
    work = prepare_kind(kind, layers, base)
    evaluator = Evaluator()
    evaluator.evaluate(layers, [base])
    profile = cProfile.Profile()
    profile.runcall(work, evaluator)
    stats: Any = pstats.Stats(profile)
    total = stats.total_tt
    own = [(f"`{Path(file).stem}.{name}`" if file != "~" else f"`{name.strip('<>')}`", times[2] / total)
           for (file, _, name), times in stats.stats.items()]  # fmt: skip
    return sorted(own, key=lambda item: -item[1])[:5]


_LARGE = """
import resource, sys, time
from sweeps.runner import run_sweep
from sweeps.space import Space

points = int(sys.argv[2])
bandwidths = max(points // 300, 1)
space = Space(
    networks=["resnet18"], blocks=["4x4"], ratios=[[0.5, 0.5]], random={},
    machine={"base": "msa-16x16", "axes": {
        "technology.table": ["45nm-horowitz", "45nm-aladdin", "22nm-aladdin"],
        "clock_mhz": [500.0 + 10 * i for i in range(100)],
        "dram.gb_per_s": [(i + 1) / 50 for i in range(bandwidths)]}},
)
if __name__ == "__main__":
    start = time.perf_counter()
    run_sweep(space, sys.argv[1], workers=2)
    seconds = time.perf_counter() - start
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    used = sum(each.ru_utime + each.ru_stime for each in (own, others))
    print(len(space), seconds, used, (own.ru_maxrss + 2 * others.ru_maxrss) / 2**20)
"""


def large_sweep(points: int) -> tuple[int, float, float, float, int, int]:
    """A whole sweep of two processes: points, seconds, processor seconds, GiB, files and bytes on disk.

    Processor time is that of all processes with their start; memory the largest that the parent, and twice the largest that one
    of the two others, ever had: no less than all of them together at any time.
    """
    import subprocess
    import sys
    import tempfile

    with tempfile.TemporaryDirectory(prefix="hwsim-") as name:
        script, folder = Path(name, "large.py"), Path(name, "results")
        script.write_text(_LARGE, "utf-8")  # a file, since the processes that it starts look for it
        command = [sys.executable, str(script), str(folder), str(points)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        files = list((folder / "points").glob("*.parquet"))
        size_bytes = sum(file.stat().st_size for file in files)
    count, seconds, used, gib = done.stdout.split()
    return int(count), float(seconds), float(used), float(gib), len(files), size_bytes


def _page(rounds: int, points: int) -> str:
    import os
    import platform

    layers = bench_layers()
    one = simulate_seconds(layers, rounds)
    rows = []
    profiles = []
    for kind, (text, goal) in KINDS.items():
        processor, wall = (
            points_of_kind(kind) / seconds for seconds in seconds_of_kind(kind, layers, rounds)
        )
        goal_text = f"{goal:,}" if goal else "–"
        rows.append(f"| {text} | {processor:,.0f} | {wall:,.0f} | {goal_text} | {processor * one:,.1f} |")
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares_of_kind(kind, layers))
        profiles.append(f"| {text} | {shares} |")
    sweep_gain, plain_gain = gain_of_two(max(rounds, 3))
    count, seconds, used, gib, files, size_bytes = large_sweep(points)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    large = [
        "## A large space",
        "",
        f"{count:,} points (3 technologies × 100 clocks × bandwidths) by `hwsim sweep --workers 2`, keys and Parquet files",
        f"included: {seconds:,.0f} s, {used:,.0f} s of processor time of all processes ({count / used:,.0f} points per second",
        f"of that), at most {gib:.2f} GiB of memory in all processes together, {files} file(s) of",
        f"{size_bytes / count:.0f} bytes per point. Goal: under 2 GB.",
        "",
        f"Measured with Python {platform.python_version()} on {platform.machine()}, {os.cpu_count()} processors; load averages",
        f"at the end: {load}. Other work on the processors slows all of it: `simulate()` took {1e3 * one:.1f} ms meanwhile.",
        "",
    ]
    return "\n".join(_lines(rows, profiles, one, sweep_gain, plain_gain) + large)


def _lines(
    rows: list[str], profiles: list[str], one: float, sweep_gain: float, plain_gain: float
) -> list[str]:
    machines = len(_WINDOWS) * len(_DEPTHS) * len(_BANKS)
    peers = ", ".join(f"{name} {speed}" for name, speed in PEERS)
    return [
        "# Performance",
        "",
        "<!-- Written by `make performance` (`hwsim bench`); do not edit. -->",
        "",
        "What a point costs depends on what changed since the point before (`hwsim.evaluate`). ResNet-18, 21 layers, real",
        "block maps (random, 4×4, p = u = 0.5), on msa-16x16; both dense baselines, energy and area included. Points per",
        "second of processor time and of wall time on one core, best of some rounds (other work on the machine lengthens wall",
        "time first); the last column: points in the processor time of one `simulate()`.",
        "",
        "| what changes from point to point | points/s of processor time | points/s of wall time | goal | per `simulate()` |",
        "|---|---|---|---|---|",
        *rows,
        f"| one by one, `simulate()` with its tables | {1 / one:,.0f} | – | – | 1 |",
        "",
        f"For scale, models of the same network without block sparsity, in points/s: {peers}.",
        "These were measured on another machine (two shared virtual processors), so compare orders of magnitude.",
        "",
        "## Two processes",
        "",
        f"`hwsim sweep --workers 2` over {machines:,} front ends (other pass counts) is",
        f"{sweep_gain:.2f} times as fast as `--workers 1`, in points per second of wall time after the first quarter of them.",
        f"Two processes of plain integer arithmetic are {plain_gain:.2f} times as fast as one in the same run: the sweep gains",
        f"{100 * sweep_gain / plain_gain:.0f} % of that. Goal: 90 %.",
        "",
        "## Where the time goes",
        "",
        "Own time of the five most expensive functions (under the profiler, which makes many small calls look dearer):",
        "",
        "| what changes | functions |",
        "|---|---|",
        *profiles,
        "",
        "- DRAM and clock: `network_totals` compares, for each class of like steps, what passes and what transfers take.",
        "  Neither the passes nor the steps are looked at again.",
        "- Buffer sizes: most time goes into the machine (its validation, its area, the dense machine of equal area);",
        "  steps and transfers are planned once for all sizes that hold a layer alike.",
        "- Pass counts: the pass kernel `run_executed`. Steps and transfers do not depend on it, the blocks that are not",
        "  pruned are listed once, dense baselines have a closed form.",
        "",
    ]
