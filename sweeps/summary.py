"""What a sweep found, in plain words: for the terminal and for the first lines of the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hwsim.errors import InputError, Problem, nearest_name
from hwsim.tables import time_text
from sweeps.pareto import knee_point

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CLOSE_POINTS", "configuration_means", "identity_columns", "summarise"]

CLOSE_POINTS = 1.0
"""A configuration is called close to the dense network when it loses at most so many points of accuracy."""

_IDENTITY = ["network", "machine", "block", "block_rows", "block_columns", "pruned", "unified", "hold"]
_RESULTS = [
    "latency_ms",
    "speedup_compute_only",
    "speedup_with_memory",
    "speedup_equal_area",
    "energy_pj",
    "dense_energy_pj",
    "image_bytes",
    "fp32_bytes",
    "int8_bytes",
]
_ACCURACIES = ["accuracy_integer", "accuracy_dense_float"]


_SETTINGS = ["batch", "training_settings", "model_version", "clock_mhz"]


def identity_columns(points: pd.DataFrame) -> list[str]:
    """The columns that tell configurations apart, the varied machine fields (dotted names) included, less the seed."""
    others = [str(name) for name in points.columns if name in _SETTINGS or "." in str(name)]
    return [*_IDENTITY, *others]


def configuration_means(points: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """A row per configuration: what identifies it, and the means of ``columns`` over its seeds.

    Fronts and choices are made on means, so that the luck of one seed does not win.

    Raises
    ------
    InputError
        Two points share configuration and seed.
    """
    by = identity_columns(points)
    repeated = int(points.duplicated([*by, "seed"]).sum())
    if repeated:
        found = f"{repeated} points share configuration and seed with another"
        raise InputError("points", Problem("", found, "every point once"))
    return points.groupby(by, as_index=False, dropna=False, sort=False)[list(columns)].mean()


def summarise(points: pd.DataFrame) -> list[str]:
    """Sentences on the ``points`` table: what was evaluated, and the configurations worth a look.

    Figures are means over the seeds of a configuration. A configuration is judged by its 8-bit integer accuracy; where
    nothing was trained, by latency and size alone.

    Raises
    ------
    InputError
        A column is missing.
    """
    needed = [*_IDENTITY, "seed", *_RESULTS]
    missing = [name for name in needed if name not in points]
    if missing:
        names = [str(name) for name in points.columns]
        raise InputError(
            "points", [Problem(name, "no such column", nearest_name(name, names)) for name in missing]
        )
    failed = int(points["error"].notna().sum()) if "error" in points else 0
    done = points[points["error"].isna()] if failed else points
    sentences = []
    for network, group in done.groupby("network", sort=False):
        sentences += _of_network(str(network), group)
    if failed:
        sentences.append(f"{failed} of {len(points)} points have no result: they do not fit their machine.")
    return sentences or ["No point has a result yet."]


def _of_network(network: str, points: pd.DataFrame) -> list[str]:
    accuracies = [name for name in _ACCURACIES if name in points and points[name].notna().all()]
    means = configuration_means(points, [*_RESULTS, *accuracies])
    varied = [name for name in identity_columns(means) if name not in _IDENTITY and means[name].nunique() > 1]

    def described(row: pd.Series) -> str:
        return _described(row, varied)

    seeds = points["seed"].nunique()
    of_seeds = f", means of {seeds} seeds" if seeds > 1 else ""
    ratios = len(means[["pruned", "unified"]].drop_duplicates())
    sentences = [
        f"{network}: {len(means)} configurations ({means['block'].nunique()} block shapes, {ratios} ratios) on "
        f"{', '.join(means['machine'].unique())}{of_seeds}."
    ]
    if len(accuracies) < len(_ACCURACIES):
        sentences.append("Block types are random, nothing was trained: there are no accuracies.")
        return sentences + _extremes(means, "", described)
    dense = means["accuracy_dense_float"].mean()
    sentences.append(f"The uncompressed network reaches {100 * dense:.2f} % in float.")
    close = means[means["accuracy_integer"] >= means["accuracy_dense_float"] - CLOSE_POINTS / 100]
    if close.empty:
        best = _first_by(means.assign(loss=-means["accuracy_integer"]), "loss", "latency_ms")
        sentences.append(
            f"No configuration comes within {CLOSE_POINTS:g} point of it. Closest: {described(best)}"
        )
    else:
        sentences += _extremes(close, f" of the {len(close)} within {CLOSE_POINTS:g} point of it", described)
    knee = knee_point(means, minimise=["latency_ms"], maximise=["accuracy_integer"])
    return [*sentences, f"Knee of accuracy against latency: {described(knee)}"]


def _extremes(means: pd.DataFrame, among: str, described: Callable[[pd.Series], str]) -> list[str]:
    fastest = _first_by(means, "latency_ms", "image_bytes")
    smallest = _first_by(means, "image_bytes", "latency_ms")
    if fastest.name == smallest.name:
        return [f"Fastest and smallest{among}: {described(fastest)}"]
    return [f"Fastest{among}: {described(fastest)}", f"Smallest{among}: {described(smallest)}"]


def _first_by(configurations: pd.DataFrame, *columns: str) -> pd.Series:
    return configurations.sort_values(list(columns), kind="stable").iloc[0]


def _described(row: pd.Series, varied: Sequence[str]) -> str:
    """One configuration in a sentence, with the further columns in which configurations differ."""
    others = "".join(f", {name} {row[name]}" for name in varied)
    accuracy = (
        f"{100 * row['accuracy_integer']:.2f} % (8-bit integer), " if "accuracy_integer" in row.index else ""
    )
    speedups = [
        f"{_times(row[f'speedup_{name}'])} ({name.replace('_', ' ')})"
        for name in ("compute_only", "with_memory", "equal_area")
    ]
    return (
        f"blocks {row['block'].replace('x', '×')}, p {row['pruned']:g}, u {row['unified']:g}, {row['hold']} fixed"
        f"{others}: {accuracy}{time_text(row['latency_ms'])}; faster than dense by {', '.join(speedups)}; "
        f"{row['image_bytes'] / 1024:.1f} KiB, {_times(row['fp32_bytes'] / row['image_bytes'])} smaller than fp32 and "
        f"{_times(row['int8_bytes'] / row['image_bytes'])} than int8; {row['energy_pj'] / 1e6:.3g} µJ, "
        f"{_times(row['dense_energy_pj'] / row['energy_pj'])} less than dense."
    )


def _times(ratio: float) -> str:
    """``2.50×``; where the dense network does not fit its machine, there is nothing to compare with."""
    return "–" if ratio != ratio else f"{ratio:.2f}×"
