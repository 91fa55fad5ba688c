"""The one exception family of the project.

Every message says where (file and field), what was found, what is allowed, and what to try. The command line prints
the message without a traceback and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["FitError", "FormatError", "HwsimError", "InputError", "Problem", "nearest_name"]


class HwsimError(Exception):
    """Base of every error that the project raises on purpose."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an input.

    Attributes
    ----------
    field : str
        The field, dotted from the top of the file (``array.rows``), or the name of the argument.
    message : str
        What was found and what is allowed.
    hint : str
        What to try; empty when the message already says it.
    """

    field: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.field}: {self.message}" if self.field else self.message
        return f"{text} ({self.hint})" if self.hint else text


class InputError(HwsimError, ValueError):
    """An input is wrong. ``problems`` holds every problem found, not only the first."""

    def __init__(self, source: str, problems: Sequence[Problem] | Problem | str) -> None:
        if isinstance(problems, str):
            problems = [Problem("", problems)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.source = source
        self.problems = tuple(problems)
        super().__init__(self._text())

    def __reduce__(self) -> tuple[type[InputError], tuple[str, tuple[Problem, ...]]]:
        # The default would rebuild from the text alone, and fail; errors cross process borders in sweeps.
        return type(self), (self.source, self.problems)

    def _text(self) -> str:
        if len(self.problems) == 1:
            return f"{self.source}: {self.problems[0]}"
        lines = [f"{self.source}: {len(self.problems)} problems"]
        lines += [f"  - {problem}" for problem in self.problems]
        return "\n".join(lines)


class FormatError(InputError):
    """A file is damaged, truncated, of a wrong kind or of a version that this program does not read."""


class FitError(HwsimError):
    """A layer does not fit a machine: the text gives the demand, the capacity, the gap and what would close it."""


def nearest_name(name: str, allowed: Iterable[str]) -> str:
    """The allowed name nearest to ``name`` as a hint, or the list of the allowed names.

    >>> nearest_name("colums", ["rows", "columns"])
    'did you mean "columns"?'
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f'did you mean "{close[0]}"?'
    return "allowed: " + ", ".join(names)
