"""Commands that answer questions about results: `hwsim explain` and `hwsim diff`. Only click is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.cli_hardware import map_options, random_map

if TYPE_CHECKING:
    from compress.subjects import RandomMap, Subject
    from hwsim.machine import Machine
    from hwsim.report import Report

__all__ = ["diff", "explain"]


@click.command(
    epilog="Example: hwsim explain resnet18 layer1.0.conv1 --pruned 0.5 --unified 0.5 --machine msa-16x16"
)
@click.argument("result")
@click.argument("layer", required=False)
@map_options
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
def explain(
    result: str, layer: str | None, machine: str, batch: int, as_json: bool, **map_settings: Any
) -> None:
    """Where the cycles of RESULT (or of one LAYER) went, and what would help.

    RESULT is a compressed model file or a network by name, on --machine; a report.json of hwsim simulate; or results of a
    sweep, with the point after an @: RESULTS@best (or just RESULTS), @fastest, @smallest, @knee, or the beginning of a key.
    The advice is measured: each change of the machine is simulated.
    """
    import json

    from hwsim.explain import explain as account
    from hwsim.machine import load_machine

    subject = _subject(result, load_machine(machine), random_map(**map_settings), batch)
    found = account(subject.machine, subject.layers, network=subject.network, layer=layer)
    if as_json:
        tables = {name: getattr(found, name) for name in ("layers", "parts", "levers")}
        records = {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
        click.echo(json.dumps({"origin": subject.origin, **records}))
    else:
        click.echo(str(found))


@click.command(epilog="Example: hwsim diff results/demo@fastest results/demo@knee")
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@map_options
@click.option("--on", "model", help="Two machines: also simulate this network or compressed file on both.")
def diff(before: str, after: str, machine: str, batch: int, model: str | None, **map_settings: Any) -> None:
    """What changed from A to B: configuration, totals, and per layer cycles, energy, bytes and bounds.

    A and B are anything that hwsim explain takes, or two machines.
    """
    from hwsim.diff import diff_machines, diff_reports
    from hwsim.errors import InputError
    from hwsim.machine import load_machine

    maps = random_map(**map_settings)
    if _is_machine(before) and _is_machine(after):
        machines = [load_machine(name) for name in (before, after)]
        if model is None:
            click.echo(str(diff_machines(*machines)))
            return
        reports = [_subject(model, chosen, maps, batch).simulate() for chosen in machines]
    elif _is_machine(before) or _is_machine(after):
        raise InputError("diff", "one is a machine and the other is not: give two of a kind")
    else:
        chosen = load_machine(machine)
        reports = [_report(text, chosen, maps, batch) for text in (before, after)]
    click.echo(str(diff_reports(*reports)))


def _is_machine(text: str) -> bool:
    from hwsim.machine import preset_names

    return text in preset_names() or Path(text).suffix == ".toml"


def _report(text: str, machine: Machine, random_map: RandomMap, batch: int) -> Report:
    if Path(text).suffix == ".json":
        from hwsim.report import load_report

        return load_report(text)
    return _subject(text, machine, random_map, batch).simulate()


def _subject(text: str, machine: Machine, random_map: RandomMap, batch: int) -> Subject:
    from compress.subjects import load_subject, report_subject
    from sweeps.points import choose_point, is_results, point_subject, split_choice

    if Path(text).suffix == ".json":
        from hwsim.report import load_report

        report = load_report(text)
        if report.origin.get("kind") == "point":
            text = f"{report.origin.get('results')}@{report.origin.get('key')}"
        else:
            return report_subject(report, text)
    path, choice = split_choice(text)
    if is_results(path):
        from sweeps.store import ResultStore

        store = ResultStore(path)
        return point_subject(store, choose_point(store.to_frame(), choice))
    if "@" in text or path.is_dir():
        from hwsim.errors import InputError

        raise InputError(
            str(path), "no results here (no points/ inside); run hwsim sweep or hwsim demo first"
        )
    return load_subject(text, machine, random_map, batch)
