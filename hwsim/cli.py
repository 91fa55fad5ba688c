"""The command line: one group whose commands live in the packages and are imported when they are called.

`hwsim --help` imports nothing but click, so it is instant. Errors that the project raises on purpose are printed without a
traceback and exit with code 2.
"""

from __future__ import annotations

import errno
import sys
from importlib import import_module

import click

from hwsim import __version__
from hwsim.errors import HwsimError, nearest_name

__all__ = ["cli", "main"]

_COMMANDS = {
    "demo": ("sweeps.cli:demo", "Train, compress, simulate, sweep and plot on real images."),
    "train": ("compress.cli:train", "Train a network of the zoo."),
    "compress": ("compress.cli:compress", "Compress a trained network into blocks by ADMM."),
    "pack": ("compress.cli:pack", "Entropy-code a compressed model anew, without loss."),
    "models": ("compress.cli_networks:models", "Networks whose real weights ship in packages."),
    "codec-bench": ("compress.cli_codec:codec_bench", "File sizes and speeds beside NNCodec."),
    "simulate": (
        "compress.cli_hardware:simulate",
        "Cycles, traffic, energy and area of a network on a machine.",
    ),
    "compare": (
        "compress.cli_compare:compare",
        "Other machines on the same network, at equal multipliers and at equal area.",
    ),
    "storage": ("compress.cli_hardware:storage", "Bytes and bits per weight for block shapes and ratios."),
    "passes": ("hwsim.commands:passes", "Counters of the passes of one array of block types."),
    "verify": (
        "hwsim.commands_verify:verify",
        "Check the cycle model against the RTL, built with Verilator.",
    ),
    "verify-network": (
        "compress.cli_verify:verify_network",
        "Run the real layers of a network through the RTL.",
    ),
    "trace": ("sweeps.cli_trace:trace", "One pass of a layer cycle by cycle, as text or as a figure."),
    "mutants": (
        "hwsim.commands_mutants:mutants",
        "Plant faults in RTL and kernels; the verification must catch them all.",
    ),
    "synth": ("hwsim.commands_synth:synth", "Area and path depth of the RTL's parts, synthesised by Yosys."),
    "machines": ("hwsim.commands:machines", "The machines and technology tables that ship with hwsim."),
    "sweep": ("sweeps.cli:sweep", "Evaluate a design space; resumes where it was stopped."),
    "search": (
        "sweeps.cli_search:search",
        "Find the Pareto front of a design space without evaluating all of it.",
    ),
    "search-proof": ("sweeps.cli_search:search_proof", "Compare searches with the enumeration of a space."),
    "codesign": (
        "sweeps.cli_codesign:codesign",
        "Machine and compression chosen together within a budget, then trained.",
    ),
    "codesign-study": (
        "sweeps.cli_codesign:codesign_study",
        "Co-design against uniform ratios at equal latency: table and figure.",
    ),
    "query": ("sweeps.cli:query", "Ask the results of a sweep in SQL."),
    "explain": ("sweeps.cli_answers:explain", "Where the cycles went, and what would help, measured."),
    "diff": ("sweeps.cli_answers:diff", "What changed between two results or machines, per layer."),
    "figures": (
        "sweeps.cli:figures",
        "Paper plots of the results of a sweep: PDF, PNG, and their data as CSV.",
    ),
    "bench": ("sweeps.bench:bench", "Measure how many points a second this machine evaluates, and why."),
    "study": ("sweeps.cli_study:study", "Training runs of a published table; resumes where it was stopped."),
    "study-report": (
        "sweeps.cli_study:study_report",
        "The page of results, from the stored runs of a study.",
    ),
    "report": ("sweeps.cli:report", "One HTML page of the results of a sweep."),
}


class _LazyGroup(click.Group):
    """Names and one-line helps are here; the command itself is imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name][0].split(":")
        return getattr(import_module(module), name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in _COMMANDS:
            ctx.fail(f"no such command {name!r} ({nearest_name(name, _COMMANDS)})")
        return super().resolve_command(ctx, args)


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: hwsim simulate resnet18 --pruned 0.5 --unified 0.5 --machine msa-16x16",
)
@click.version_option(__version__, prog_name="hwsim")
def cli() -> None:
    """If I compress this network into micro-structured blocks and build this accelerator, what do I get?"""


def main() -> None:
    """Entry point: run the command line, turn errors into messages and exit codes.

    0: done; 2: wrong input or a full disk; 130: interrupted (what was written stays, sweeps resume).
    """
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; results written so far stay, run the same command again to go on", err=True)
        sys.exit(130)
    except HwsimError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of a pipe went away: not an error worth a message
        sys.exit(0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG):
            raise
        click.echo(f"error: {error.filename or 'output'}: {error.strerror}", err=True)
        sys.exit(2)
