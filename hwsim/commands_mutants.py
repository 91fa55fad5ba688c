"""The command that asks whether the verification catches faults."""

from __future__ import annotations

import click

__all__ = ["mutants"]


@click.command(epilog="Example: hwsim mutants --every 5")
@click.option("--list", "only_list", is_flag=True, help="Print the faults and run nothing.")
@click.option("--only", "numbers", multiple=True, type=int, help="The fault of this number; again for more.")
@click.option(
    "--every",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="A sample: every N-th fault; which ones depends on the seed.",
)
@click.option(
    "--layers", default=30, show_default=True, type=click.IntRange(min=1), help="Random layers per machine."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the first layer.")
@click.pass_context
def mutants(
    context: click.Context, only_list: bool, numbers: tuple[int, ...], every: int, layers: int, seed: int
) -> None:
    """Plant single faults in the RTL and in the compiled kernels and see what hwsim verify makes of each.

    First the design without a fault must pass all layers on the same builds; then each fault must be caught by a difference
    in cycles, in a counter or in an output. The table says by which and after how many layers. One that survives makes the
    exit code 1.
    """
    from concurrent.futures import ThreadPoolExecutor
    from functools import partial

    from hwsim.errors import InputError, Problem
    from hwsim.mutation import MUTANTS, MUTATION_MACHINES, mutation_machine, run_mutants, sample
    from hwsim.rtl_simulator import build

    known = {mutant.number: mutant for mutant in MUTANTS}
    problems = [
        Problem("--only", f"{number} is not a fault", f"1 … {max(known)}, see hwsim mutants --list")
        for number in numbers
        if number not in known
    ]
    if problems:
        raise InputError("mutants", problems)
    chosen = sample(every, seed) if not numbers else [known[number] for number in dict.fromkeys(numbers)]
    if only_list:
        for mutant in chosen:
            click.echo(f"{mutant.number:4}  {mutant.place:19}  {mutant.fault}")
        return
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(partial(build, mutants=True), map(mutation_machine, MUTATION_MACHINES)))
    click.echo(f"{'':4}  {'where':19}  {'fault':70}  {'layers':>6}  caught by")
    survivors = []
    for verdict in run_mutants(chosen, layers=layers, seed=seed):
        mutant = verdict.mutant
        if not verdict.caught:
            survivors.append(mutant.number)
        by = verdict.caught.split(": ", 1)[-1] or "SURVIVED"  # without the machine's and the layer's name
        click.echo(f"{mutant.number:4}  {mutant.place:19}  {mutant.fault:70}  {verdict.layers:6}  {by}")
    click.echo(
        f"{len(chosen) - len(survivors)} of {len(chosen)} faults caught; without a fault all layers pass"
    )
    if survivors:
        context.exit(1)
