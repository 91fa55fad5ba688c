"""The command that checks the cycle model against the RTL."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hwsim.machine import Machine
    from hwsim.verify import Summary

    Task = tuple[Machine, int, int]

__all__ = ["verify"]

LONG_MACHINES, LONG_LAYERS = 200, 500
"""The long mode: 100,000 layers."""
_COLUMNS = (
    f"{'machine':20} {'layers':>6} {'skipped':>7} {'steps':>6} {'segments':>8} {'cycles':>10} {'outputs':>9} "
    f"{'waiting':>7} {'cycles waited':>13} {'seconds':>7} {'RTL cycles/s':>12}"
)


@click.command(epilog="Example: hwsim verify --machine small --layers 200")
@click.option(
    "--machine",
    "names",
    multiple=True,
    help="A machine of the verification, a preset, or the path of a machine file; again for more. Default: all of the first.",
)
@click.option(
    "--random-machines", default=0, type=click.IntRange(min=0), help="So many random machines instead."
)
@click.option("--long", "is_long", is_flag=True, help="100,000 layers: 200 random machines, 500 layers each.")
@click.option("--layers", type=click.IntRange(min=1), help="Random layers per machine.  [default: 60]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the first layer.")
@click.option(
    "--jobs", default=2, show_default=True, type=click.IntRange(min=1), help="Machines at the same time."
)
@click.option(
    "--results",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Keep finished machines here and skip those it has: a run that was stopped goes on.",
)
@click.option(
    "--reproducer",
    default="verify-failure.json",
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where a difference is written.",
)
@click.option(
    "--replay",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Run the one layer of such a file instead.",
)
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With --replay: write waveforms (VCD) here.",
)
@click.pass_context
def verify(
    context: click.Context,
    names: tuple[str, ...],
    random_machines: int,
    is_long: bool,
    layers: int | None,
    seed: int,
    jobs: int,
    results: Path | None,
    reproducer: Path,
    replay: Path | None,
    trace: Path | None,
) -> None:
    """Run random layers through the RTL of the array and compare it with the simulator.

    Compared are the end of every step, all 13 counters of every segment (RTL, compiled kernel and plain-Python oracle) and
    every output integer. Steps are compared with the causal model, that model without its waits with the formula of the
    simulator; "waiting" are the layers that take longer than the formula. At the first difference the layer is shrunk and
    written to a file, and the exit code is 1.
    """
    from hwsim.machine import load_machine
    from hwsim.verify import VERIFICATION_MACHINES, random_machine, verification_machine

    if trace is not None and replay is None:
        raise click.UsageError("--trace needs --replay, the layer to trace")
    if names and (random_machines or is_long):
        raise click.UsageError("--machine and random machines exclude each other")
    if replay is not None:
        _replay(context, replay, trace)
        return
    if is_long:
        random_machines, layers = random_machines or LONG_MACHINES, layers or LONG_LAYERS
    per_machine = layers or 60
    if random_machines:
        # Other layers for every machine.
        tasks = [
            (random_machine(number), per_machine, number * per_machine)
            for number in range(seed, seed + random_machines)
        ]
    else:
        machines = (
            verification_machine(name) if name in VERIFICATION_MACHINES else load_machine(name)
            for name in names or VERIFICATION_MACHINES
        )
        tasks = [(machine, per_machine, seed) for machine in machines]
    click.echo(
        f"{len(tasks)} machines, {per_machine:,} layers each; a design is built before its first layer",
        err=True,
    )
    click.echo(_COLUMNS)
    begun, summaries, run = time.perf_counter(), [], 0
    for found, is_new in _run(tasks, jobs, results):
        if isinstance(found, str):
            from hwsim.files import write_atomically

            write_atomically(reproducer, found.encode())
            click.echo(f"differs: {_problem_of(found)}\nreproducer: {reproducer}", err=True)
            context.exit(1)
        summaries.append(found)
        click.echo(_row(found))
        run += is_new  # a machine kept from a stopped run says nothing about the time of the others
        if run and len(summaries) < len(tasks):
            left = (time.perf_counter() - begun) / run * (len(tasks) - len(summaries))
            click.echo(f"{len(summaries)} of {len(tasks)} machines, {left / 60:.1f} min left", err=True)
    click.echo(
        f"all equal: {sum(s.layers for s in summaries):,} layers, {sum(s.steps for s in summaries):,} steps, "
        f"{sum(s.cycles for s in summaries):,} cycles, {sum(s.outputs for s in summaries):,} outputs "
        f"on {len(summaries)} machines in {time.perf_counter() - begun:.0f} s"
    )


def _replay(context: click.Context, replay: Path, trace: Path | None) -> None:
    from hwsim.rtl_simulator import Mismatch, RtlSimulator
    from hwsim.verify import check, load_reproducer

    machine, spec = load_reproducer(replay)
    with RtlSimulator(machine, trace=trace) as simulator:
        try:
            result = check(simulator, spec)
        except Mismatch as problem:
            click.echo(f"differs: {problem}", err=True)
            context.exit(1)
    click.echo("does not fit the machine" if result is None else f"all equal, {result.layer_cycles:,} cycles")


def _run(tasks: list[Task], jobs: int, results: Path | None) -> Iterator[tuple[Summary | str, bool]]:
    """Summaries, or the reproducer of a difference, as machines finish (kept ones first), and whether each ran now."""
    from hwsim.rtl_simulator import sources_digest
    from hwsim.verify import load_results, result_line

    key = sources_digest()
    known = load_results(results, key) if results is not None and results.exists() else {}
    left = []
    for task in tasks:
        kept = known.get((task[0].name, task[1], task[2]))
        if kept is None:
            left.append(task)
        else:
            yield kept, False
    for task, found in _finished(left, jobs):
        if results is not None and not isinstance(found, str):
            with results.open("a", encoding="utf-8") as file:
                file.write(result_line(found, task[1], task[2], key))
        yield found, True


def _finished(tasks: list[Task], jobs: int) -> Iterable[tuple[Task, Summary | str]]:
    if jobs == 1 or len(tasks) == 1:
        for task in tasks:
            yield task, _verified(task)
        return
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        futures = {pool.submit(_verified, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _verified(task: Task) -> Summary | str:
    """One machine; of a difference the text of its reproducer, which travels between processes."""
    from hwsim.verify import Failure, verify_machine

    try:
        return verify_machine(*task)
    except Failure as failure:
        return failure.to_json()


def _problem_of(reproducer: str) -> str:
    import json

    return str(json.loads(reproducer)["problem"])


def _row(found: Summary) -> str:
    return (
        f"{found.machine:20} {found.layers:6,} {found.skipped:7,} {found.steps:6,} {found.segments:8,} {found.cycles:10,} "
        f"{found.outputs:9,} {found.waiting:7,} {found.wait_cycles:13,} {found.seconds:7.1f} "
        f"{found.cycles / max(found.rtl_seconds, 1e-9):12,.0f}"
    )
