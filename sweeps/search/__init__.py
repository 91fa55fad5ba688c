"""Search of a design space for a Pareto front, by Optuna and our own steps, through the runner and its store."""

from sweeps.search.outcome import found_front, found_knees, save_search
from sweeps.search.question import Constraint, Question, ask
from sweeps.search.run import Search, SearchProgress, SearchSettings, run_search

__all__ = [
    "Constraint",
    "Question",
    "Search",
    "SearchProgress",
    "SearchSettings",
    "ask",
    "found_front",
    "found_knees",
    "run_search",
    "save_search",
]
