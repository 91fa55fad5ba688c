"""The page that shows what searches find beside the enumeration: docs/search.md."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from sweeps.search.proof import GOAL, Proof
from sweeps.search.proposals import SAMPLERS
from sweeps.space import Space

__all__ = ["page"]

_HEAD = """# Searching a design space

<!-- Written by `make search-proof` (`hwsim search-proof`); do not edit. -->

`hwsim search space.toml --minimise latency_ms --minimise energy_pj --constraint "area_mm2<=12"` looks for the Pareto
front of two or three columns without evaluating every point. Points are evaluated by the runner of `hwsim sweep` and
kept in the same store; a search that was killed and is started again takes the same way, with what is stored not
computed again. Points that do not fit their machine are infeasible. `average_power_mw` is energy over latency, DRAM
included.

| `--sampler` | what proposes the points |
|---|---|
| `hybrid` (default, ours) | two generations of Optuna's NSGA-II, then the three sources below |
| `nsga2` | Optuna's NSGA-II, population of at most 50 |
| `tpe` | Optuna's multivariate TPE, in batches of 10; slowest: 13 s of processor time for 460 points, `hybrid` 2 s |
| `random` | Optuna's random sampler |

After its first generations `hybrid` asks three sources for every batch: NSGA-II for a tenth of it, and in equal parts a
model of the results so far for points that it expects on the front, and the points one step along an axis from the
knees and the front. The model is kernel ridge regression with a cubic kernel on which axis values two points share. It
only proposes, every number comes from the simulator. Resuming is exact with the same settings, versions and machine.
The number of evaluations is one of the settings: it sets the population, so that a search with more of them takes
another way (and computes nothing of the first again that it meets).
"""

_METHOD = """
## Beside the truth

Spaces small enough were enumerated; each search evaluated a part, {seeds} seeds per sampler. Hypervolume is measured
from a tenth of the front's range beyond its worst values and given as a share of the true one (goal {goal:g}). A knee is
that of each pair of objectives, and of all three; it counts as found when a point with exactly its values was. "Front
found" counts distinct objective values. "Points to goal" is the median over the seeds, – where a seed did not get there.
Block types are random, so there is no accuracy; `pruned` stands in for it: the same speed with less pruned is better.
The shares of the three sources were chosen on `search-proof`; nothing was on `search-held-out`.
"""

_ACROSS = """
All {questions} questions together: those in which every seed came to the goal, those in which a sampler did so sooner than
`{reference}` (median), and the worst of all its searches.

{table}
"""

_SPACE = """
### `{name}`: {points:,} points, {evaluations} evaluated by each search ({share:.0f} %)
"""


def page(groups: Sequence[tuple[Space, Sequence[Proof]]], seeds: int) -> str:
    """The page as Markdown, spaces with what was asked of them; figures are expected in ``images/``."""
    run = {sampler for _, proofs in groups for proof in proofs for sampler in proof.runs["sampler"]}
    parts = [_HEAD, _METHOD.format(seeds=seeds, goal=GOAL)]
    if without := [name for name in SAMPLERS if name not in run]:
        parts.append(f"\nNot run for this page: {', '.join(without)}.\n")
    parts.append(_across([proof.runs for _, proofs in groups for proof in proofs]))
    for space, proofs in groups:
        first = proofs[0]
        share = 100 * first.evaluations / first.points
        parts.append(
            _SPACE.format(name=space.name, points=first.points, evaluations=first.evaluations, share=share)
        )
        for proof in proofs:
            parts.append(
                f"\n#### {str(proof.question).capitalize()}\n\n"
                f"{proof.feasible:,} points are feasible, {proof.front} values make the true front.\n\n"
                f"{_markdown(proof.summary())}\n\n![{proof.plot.title}](images/{proof.plot.name}.png)\n\n"
                f"{proof.plot.caption.capitalize()}\n"
            )
    return "".join(parts)


def _across(questions: Sequence[pd.DataFrame]) -> str:
    """`Proof.runs` of all questions, a row per sampler; the first sampler is the one the others are compared with."""
    reached = pd.DataFrame(
        [
            runs.groupby("sampler", sort=False)["evaluations_to_goal"].agg(
                lambda points: points.median(skipna=False)
            )
            for runs in questions
        ]
    )
    least = pd.concat(questions).groupby("sampler")["hypervolume_ratio"].min()
    reference = str(reached.columns[0])
    rows = [
        {
            "sampler": sampler,
            "goal by every seed": f"{reached[sampler].notna().sum()} of {len(questions)}",
            f"sooner than {reference}": "–"
            if sampler == reference
            else f"{(reached[sampler] < reached[reference].fillna(float('inf'))).sum()}",
            "least hypervolume": f"{least[sampler]:.4f}",
        }
        for sampler in reached.columns
    ]
    return _ACROSS.format(questions=len(questions), reference=reference, table=_markdown(pd.DataFrame(rows)))


def _markdown(frame: pd.DataFrame) -> str:
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
