"""The compiled parts of the model: arrays and integers in, arrays out."""

from __future__ import annotations

from pathlib import Path

__all__ = ["are_compiled"]


def are_compiled() -> bool:
    """Whether the compiled kernels are kept on this machine, younger than their sources.

    If not, the first evaluation compiles them, for most of a minute. Imports numba.
    """
    # The last that an evaluation calls, so the last that is compiled.
    from hwsim.kernels.totals import energy_of

    folder = energy_of.stats.cache_path
    kept = [] if folder is None else list(Path(folder).glob("totals.energy_of-*.nbi"))
    newest = max(source.stat().st_mtime for source in Path(__file__).parent.glob("[!_]*.py"))
    return any(index.stat().st_mtime >= newest for index in kept)
