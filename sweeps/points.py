"""Single points of a result store: choose one, and build its machine and its layers anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from hwsim.errors import FormatError, HwsimError, InputError, Problem
from sweeps.pareto import knee_point
from sweeps.summary import CLOSE_POINTS

if TYPE_CHECKING:
    from compress.subjects import Subject
    from hwsim.layer import Layer
    from sweeps.space import Point
    from sweeps.store import ResultStore

__all__ = ["CHOICES", "add_details", "choose_point", "is_results", "point_subject", "split_choice"]

CHOICES = ("best", "fastest", "smallest", "knee")
"""Words for a point; ``best`` is the fastest within a point of the dense accuracy, else the fastest."""


def split_choice(text: str) -> tuple[Path, str]:
    """``"results/demo@knee"`` as path and choice; without ``@`` the choice is "best"."""
    path, at, choice = text.rpartition("@")
    if at and not Path(text).exists():
        return Path(path), choice
    return Path(text), "best"


def is_results(path: Path) -> bool:
    """Whether a folder holds the results of a sweep."""
    return (path / "points").is_dir()


def choose_point(points: pd.DataFrame, choice: str) -> pd.Series:
    """A row of the ``points`` table.

    Parameters
    ----------
    points : DataFrame
    choice : str
        One of `CHOICES`, or the beginning of a key.

    Raises
    ------
    InputError
        No point, or several, begin with that; or nothing has a result.
    """
    done = points[points["error"].isna()] if "error" in points else points
    if done.empty:
        raise InputError("points", Problem("", "no point with a result"))
    if choice == "best":
        loss = 100 * (done["accuracy_dense_float"] - done["accuracy_integer"])
        close = done[loss <= CLOSE_POINTS]
        done = close if len(close) else done
        return done.iloc[int(done["latency_ms"].argmin())]
    if choice == "fastest":
        return done.iloc[int(done["latency_ms"].argmin())]
    if choice == "smallest":
        return done.iloc[int(done["image_bytes"].argmin())]
    if choice == "knee":
        trained = done[done["accuracy_integer"].notna()]
        if trained.empty:
            hint = "fastest, smallest, or the beginning of a key"
            raise InputError("points", Problem("@knee", "nothing was trained, there is no knee", hint))
        return knee_point(trained, minimise=["latency_ms"], maximise=["accuracy_integer"])
    found = points[points["key"].str.startswith(choice)] if choice else points.iloc[:0]
    if len(found) == 1:
        return found.iloc[0]
    hint = f"one of {', '.join(CHOICES)}, or the beginning of a key, as in {str(done['key'].iloc[0])[:12]}"
    keys = ", ".join(str(key)[:12] for key in found["key"].head(4))
    message = f"{len(found)} points begin with it ({keys} …)" if len(found) else "no such point"
    raise InputError("points", Problem(f"@{choice}", message, hint))


def point_subject(store: ResultStore, row: pd.Series) -> Subject:
    """The machine and the layers of a point, from the runs that the manifest records and the weights on disk.

    Raises
    ------
    InputError
        The point has no result, the trained weights are gone, or the point is of another version of the model, so that
        simulating it again would give other numbers.
    """
    from compress.subjects import Subject
    from sweeps.batch import area_mm2

    source = f"{store.path}@{str(row['key'])[:12]}"
    error = row.get("error")
    if isinstance(error, str):
        raise InputError(source, f"the point has no result: {error}")
    point = _point(store, row, source)
    layers = _layers(point, store.path, source)
    names = ("block", "pruned", "unified", "hold", "seed", "batch")
    accuracies = {
        name: float(row[name]) for name in row.index if name.startswith("accuracy_") and pd.notna(row[name])
    }
    origin = {
        "kind": "point",
        "results": str(store.path),
        "key": point.key,
        **{name: point.columns()[name] for name in names},
        **accuracies,
    }
    return Subject(point.network, point.machine(area_mm2), layers, origin)


def add_details(
    store: ResultStore,
    tables: Mapping[str, pd.DataFrame],
    rows: pd.DataFrame,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, pd.DataFrame]:
    """The tables, with the layers, energy and storage of some points that the store has only the totals of.

    They are simulated again; a point for which that is not possible (its weights are gone) stays without.

    Parameters
    ----------
    store : ResultStore
    tables : mapping
        ``points``, ``layers``, ``energy`` and ``storage``.
    rows : DataFrame
        Rows of ``points``.
    progress : callable, optional
        Called with the points that are done and with how many there are.
    """
    from sweeps.tables import detail_frames

    without = rows[~rows["key"].isin(tables["layers"]["key"].unique())].drop_duplicates("key")
    parts: dict[str, list[pd.DataFrame]] = {name: [tables[name]] for name in ("layers", "energy", "storage")}
    for done, (_, row) in enumerate(without.iterrows(), 1):
        try:
            report = point_subject(store, row).simulate()
        except HwsimError:
            continue
        for name, frame in detail_frames(str(row["key"]), report).items():
            parts[name].append(frame)
        if progress is not None:
            progress(done, len(without))
    filled = {
        name: pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)
        for name, frames in parts.items()
    }
    return {**tables, **filled}


def _point(store: ResultStore, row: pd.Series, source: str) -> Point:
    """The point that has the key of the row, built from the first run that it belongs to."""
    from sweeps.space import Point, Space

    block = (int(row["block_rows"]), int(row["block_columns"]))
    for run in store.manifest()["runs"]:
        try:
            space = Space(**run["configuration"])
        except InputError as error:
            raise FormatError(f"{store.path}/manifest.json", error.problems) from None
        fields = []
        for name, values in space.machine.axes.items():
            fields += [(name, value) for value in values if name in row.index and value == row[name]][:1]
        point = Point(
            network=str(row["network"]),
            block=block,
            pruned=float(row["pruned"]),
            unified=float(row["unified"]),
            hold=row["hold"],
            seed=int(row["seed"]),
            base=space.machine.base,
            fields=tuple(fields),
            weights=space.weights,
            batch=int(row["batch"]),
        )
        if point.key == row["key"]:
            return point
    message = "no run of the manifest leads to it: another version of the model, or a table that has changed"
    raise InputError(source, Problem("key", message, "run the sweep again"))


def _layers(point: Point, folder: Path, source: str) -> list[Layer]:
    from sweeps.space import RandomTypes
    from sweeps.weights import artifact_path, random_point_layers

    if isinstance(point.weights, RandomTypes):
        return random_point_layers(point)
    from compress.artifact import load_artifact

    path = artifact_path(folder, point)
    if not path.exists():
        raise InputError(source, Problem("", f"its weights are gone ({path})", "run the sweep again"))
    return load_artifact(path).layers(point.batch)
