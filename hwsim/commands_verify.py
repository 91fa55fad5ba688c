"""The command that checks the cycle model against the RTL."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["verify"]


@click.command(epilog="Example: hwsim verify --machine small --layers 200")
@click.option(
    "--machine",
    "names",
    multiple=True,
    help="A machine of the verification, a preset, or the path of a machine file; again for more. Default: all of the first.",
)
@click.option(
    "--layers", default=70, show_default=True, type=click.IntRange(min=1), help="Random layers per machine."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the first layer.")
@click.option(
    "--jobs", default=2, show_default=True, type=click.IntRange(min=1), help="Builds at the same time."
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
    layers: int,
    seed: int,
    jobs: int,
    reproducer: Path,
    replay: Path | None,
    trace: Path | None,
) -> None:
    """Run random layers through the RTL of the array and compare it with the simulator.

    Compared are the cycles of the layer, all 13 counters of every segment (RTL, compiled kernel and plain-Python oracle) and
    every output integer. At the first difference the layer is shrunk and written to a file, and the exit code is 1.
    """
    from concurrent.futures import ThreadPoolExecutor

    from hwsim.machine import load_machine
    from hwsim.rtl_simulator import Mismatch, RtlSimulator, build
    from hwsim.verify import (
        VERIFICATION_MACHINES,
        Failure,
        check,
        load_reproducer,
        verification_machine,
        verify_machine,
    )

    if trace is not None and replay is None:
        raise click.UsageError("--trace needs --replay, the layer to trace")
    if replay is not None:
        machine, spec = load_reproducer(replay)
        with RtlSimulator(machine, trace=trace) as simulator:
            try:
                result = check(simulator, spec)
            except Mismatch as problem:
                click.echo(f"differs: {problem}", err=True)
                context.exit(1)
        click.echo(
            "does not fit the machine" if result is None else f"all equal, {result.layer_cycles:,} cycles"
        )
        return
    machines = [
        verification_machine(name) if name in VERIFICATION_MACHINES else load_machine(name)
        for name in names or VERIFICATION_MACHINES
    ]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(build, machines))
    click.echo(
        f"{'machine':20} {'layers':>7} {'skipped':>7} {'segments':>9} {'cycles':>11} {'outputs':>9} "
        f"{'seconds':>8} {'RTL cycles/s':>12}"
    )
    for machine in machines:
        try:
            found = verify_machine(machine, layers, seed)
        except Failure as failure:
            reproducer.write_text(failure.to_json(), "utf-8")
            click.echo(f"differs: {failure}\nreproducer: {reproducer}", err=True)
            context.exit(1)
        click.echo(
            f"{found.machine:20} {found.layers:7,} {found.skipped:7,} {found.segments:9,} {found.cycles:11,} "
            f"{found.outputs:9,} {found.seconds:8.1f} {found.cycles / found.rtl_seconds:12,.0f}"
        )
    click.echo("all equal")
