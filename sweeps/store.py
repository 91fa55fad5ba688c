"""The result store: an append-only folder of Parquet parts that may be cut off at any moment.

A store holds four tables, a folder each, all keyed by the point (`TABLES`). Finished points are
buffered and written as one *batch*: a part per table, ``points`` last. A point exists once its
``points`` part does, so a batch that was cut off between its parts does not exist, and the next writer
clears its leftovers. Each part is written under another name, synced and renamed; its name carries the
digest of its content, so a damaged part is recognised and never read as a result. Writers take turns by
a file lock that the kernel drops when its holder dies; in its turn a writer looks at what others have
written, so the same point is never stored twice.

Many small parts become few large ones (`ResultStore.compact`): the merged part names those that it stands for, and from the
moment at which it is there they no longer count; whoever writes next removes what a crash left of them.

Every folder is also plain Parquet: ``pandas.read_parquet("results/points")`` reads it without this module.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from hwsim.errors import FormatError, HwsimError, InputError, Problem, nearest_name
from hwsim.files import disk_errors, write_atomically
from sweeps.parts import (
    PART,
    SCHEMA_VERSION,
    encode_part,
    part_digest,
    read_part,
    replaced_by,
    version_problem,
    versions,
    wait_for_turn,
)
from sweeps.tables import DETAILS, EMPTY, TABLES, checked_table, concat, fit_together, table_of_rows, without

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SCHEMA_VERSION", "TABLES", "PointReader", "ResultStore"]

_ORDER = ("network", "block_rows", "block_columns", "pruned", "unified", "hold", "machine", "seed", "key")
_PARTS_TO_MERGE = 64
_LARGE_BYTES = 64 * 2**20
_WORTH_MERGING_BYTES = 4 * 2**20
"""Smaller parts are merged, into parts of at most the former; to write larger ones again costs more than they cost a reader."""
_TRIES = 5
Result = TypeVar("Result")


class ResultStore:
    """Results of a sweep on disk. Use it as a context manager: leaving it writes what is buffered.

    Parameters
    ----------
    path : path
        The folder; made by the first write.
    flush_points : int
        A batch is written once so many points are buffered …
    flush_seconds : float
        … or so many seconds after the last one (looked at when a point comes in).

    Notes
    -----
    One object belongs to one process and thread; any number of processes may open the same folder.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with ResultStore(folder) as store:
    ...         _ = store.append([{"key": "a1", "network": "lenet-5", "latency_cycles": 7}])
    ...     store.to_frame(columns=["key", "latency_cycles"]).values.tolist()
    [['a1', 7]]
    """

    def __init__(self, path: str | Path, *, flush_points: int = 1000, flush_seconds: float = 10.0) -> None:
        self.path = Path(path)
        self.flush_points = flush_points
        self.flush_seconds = flush_seconds
        self._batches = [EMPTY]
        self._schemas = {name: table.schema for name, table in EMPTY.items()}
        self._buffered: set[str] = set()
        self._stored: set[str] = set()
        self._seen: set[str] = set()
        self._replaced: set[str] = set()
        self._written = 0
        self._flushed = time.monotonic()
        if self.path.exists() and not self.path.is_dir():
            raise InputError(
                str(path), Problem("", "is a file, a result store is a folder", "give another path")
            )

    def __enter__(self) -> ResultStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(
        self,
        points: Sequence[Mapping[str, Any]],
        *,
        layers: Sequence[Mapping[str, Any]] = (),
        energy: Sequence[Mapping[str, Any]] = (),
        storage: Sequence[Mapping[str, Any]] = (),
    ) -> int:
        """Add finished points with all their rows; they are on disk after the next flush.

        Parameters
        ----------
        points : sequence of mappings
            One row per point, with its ``key``. A key that this object knows to be stored or buffered
            is passed over.
        layers, energy, storage : sequences of mappings
            The detail rows of these points, with the same keys.

        Returns
        -------
        int
            How many points were new.

        Raises
        ------
        InputError
            A key is missing or there twice, a detail row belongs to none of the points, or a value is
            NaN, infinite or of a type that its column cannot hold. Nothing of the call was added.
        HwsimError
            The flush that fell due could not be written; the points stay buffered.
        """
        rows = {"points": points, "layers": layers, "energy": energy, "storage": storage}
        problems: list[Problem] = []
        batch = {name: table_of_rows(name, rows[name], problems) for name in TABLES}
        return self._append(batch, problems)

    def append_tables(self, tables: Mapping[str, pa.Table]) -> int:
        """The same for rows that are Arrow tables already: ``points``, and any of the detail tables.

        Raises
        ------
        InputError, HwsimError
            As `append`.
        """
        problems: list[Problem] = []
        batch = {name: checked_table(name, tables.get(name, EMPTY[name]), problems) for name in TABLES}
        return self._append(batch, problems)

    def _append(self, batch: dict[str, pa.Table], problems: list[Problem]) -> int:
        schemas = fit_together(batch, self._schemas, problems)
        if problems:
            raise InputError(str(self.path), problems)
        keys = batch["points"]["key"].to_pylist()
        known = {key for key in keys if key in self._stored or key in self._buffered}
        self._batches.append({name: without(table, known) for name, table in batch.items()})
        self._schemas = schemas
        self._buffered.update(keys)
        if len(self._buffered) >= self.flush_points or time.monotonic() - self._flushed >= self.flush_seconds:
            self.flush()
        return len(keys) - len(known)

    def flush(self) -> None:
        """Write what is buffered as one batch, less the points that another writer has stored meanwhile.

        Raises
        ------
        HwsimError
            The disk is full, or the folder cannot be written or locked. The store is whole and the
            points stay buffered.
        """
        if self._buffered:
            with self._turn():
                # Damage is reported by whoever reads; here the results in memory come first.
                self._look_at_new_parts(skip_damaged=True)
                known = self._buffered & self._stored
                whole = {name: concat([batch[name] for batch in self._batches]) for name in TABLES}
                whole = {name: without(table, known) for name, table in whole.items()}
                if whole["points"].num_rows:
                    self._write(whole)
                    self._written += 1
                    if self._written % _PARTS_TO_MERGE == 0:
                        self._merge_parts()
            self._stored |= self._buffered
            self._buffered = set()
            self._batches = [EMPTY]
        self._flushed = time.monotonic()

    def compact(self) -> None:
        """Merge small parts into large ones. A crash at any moment loses nothing, and leaves nothing there twice.

        Raises
        ------
        HwsimError
            The folder cannot be written or locked; the store is as it was.
        """
        if self._folder("points").is_dir():
            with self._turn():
                self._merge_parts()

    def close(self) -> None:
        """Write what is buffered. The object can still be used."""
        self.flush()

    def keys(self) -> set[str]:
        """The keys of all stored points, those that failed included.

        Raises
        ------
        FormatError
            A part is damaged or of another version.
        """
        self._undisturbed(lambda: self._look_at_new_parts(skip_damaged=False))
        return set(self._stored)

    def parts(self, table: str = "points") -> list[Path]:
        """The Parquet files that hold a table now, for tools that read them on their own.

        Raises
        ------
        FormatError
            A part is damaged or of another version.
        """
        self.keys()
        return list(self._parts(table).values())

    def to_frame(self, table: str = "points", columns: Sequence[str] | None = None) -> pd.DataFrame:
        """A table as a DataFrame, every point once, in an order that depends on the content only.

        Parameters
        ----------
        table : {"points", "layers", "energy", "storage"}
        columns : sequence of str, optional
            Only these.

        Returns
        -------
        DataFrame
            Known columns first, then the others by name. ``points`` is sorted by configuration, the
            detail tables by key. Should a point be there twice (folders copied together), the batch
            written first counts, in all tables.

        Raises
        ------
        InputError
            There is no store at the path, no such table or no such column.
        FormatError
            A part is damaged or of another version.
        """
        whole = self.to_arrow(table, columns)
        allowed = [*TABLES[table], *sorted(set(whole.column_names) - set(TABLES[table]))]
        order = _ORDER if table == "points" else _ORDER[-1:]
        whole = whole.sort_by([(name, "ascending") for name in order])  # a stable sort
        return whole.select(allowed if columns is None else list(columns)).to_pandas()

    def to_arrow(self, table: str = "points", columns: Sequence[str] | None = None) -> pa.Table:
        """The same as an Arrow table, unsorted; with ``columns`` it has those that `to_frame` sorts by too.

        Raises
        ------
        InputError, FormatError
            As `to_frame`.
        """
        if table not in TABLES:
            raise InputError(
                str(self.path), Problem("table", f'no table "{table}"', nearest_name(table, TABLES))
            )
        if not self._folder("points").is_dir():
            hint = "`hwsim sweep` writes one; check the path"
            raise InputError(str(self.path), Problem("", "there is no result store here", hint))
        wanted = None if columns is None else dict.fromkeys([*columns, *_ORDER])
        whole = self._undisturbed(lambda: self._whole(table, wanted))
        allowed = [*TABLES[table], *sorted(set(whole.column_names) - set(TABLES[table]))]
        if unknown := [name for name in columns or () if name not in allowed]:
            problems = [
                Problem("columns", f'no column "{name}"', nearest_name(name, allowed)) for name in unknown
            ]
            raise InputError(f"{self.path}: table {table}", problems)
        return whole

    def record_run(self, configuration: Mapping[str, Any]) -> None:
        """Note in ``manifest.json`` with which resolved configuration and versions results are written.

        A run that is noted already is not noted again.
        """
        run = {
            "configuration": json.loads(json.dumps(configuration, allow_nan=False)),
            "versions": versions(),
        }
        with self._turn():
            manifest = self.manifest()
            if any({**noted, "started": None} == {**run, "started": None} for noted in manifest["runs"]):
                return
            started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            manifest["runs"].append({"started": started, **run})
            self._write_manifest(manifest)

    def manifest(self) -> dict[str, Any]:
        """What ``manifest.json`` holds: the store's version and the runs that wrote to it.

        Raises
        ------
        FormatError
            The file is damaged, or is not the manifest of a store that this program reads.
        """
        path = self.path / "manifest.json"
        try:
            manifest = json.loads(path.read_text("utf-8"))
            version = manifest["store_schema"]
            runs = manifest["runs"]
        except FileNotFoundError:
            return {"store_schema": SCHEMA_VERSION, "runs": []}
        except (OSError, ValueError, KeyError, TypeError) as error:
            hint = "delete it (the results stay; only the record of the runs is lost), or give another folder"
            problem = Problem("", f"not a readable manifest of a result store: {error!r}", hint)
            raise FormatError(str(path), problem) from None
        if version != SCHEMA_VERSION or not isinstance(runs, list):
            raise FormatError(str(path), version_problem(version))
        return manifest

    def _repr_html_(self) -> str:
        from sweeps.notebook import results_html

        return results_html(self)

    def _folder(self, table: str) -> Path:
        return self.path / table

    def _parts(self, table: str) -> dict[str, Path]:
        """Parts of a table by the name of their batch, in the order of the names, less those known to be merged into others."""
        return {batch: path for batch, path in self._files(table).items() if batch not in self._replaced}

    def _files(self, table: str) -> dict[str, Path]:
        folder = self._folder(table)
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        return {match["batch"]: folder / name for name in names if (match := PART.fullmatch(name))}

    def _undisturbed(self, read: Callable[[], Result]) -> Result:
        """What ``read`` returns; once more if another process merged parts while it read them."""
        for _ in range(_TRIES):
            try:
                return read()
            except FileNotFoundError:
                continue
        raise HwsimError(
            f"{self.path}: its parts change while they are read; try again when the sweep is done"
        )

    def _look_at_new_parts(self, *, skip_damaged: bool) -> None:
        for batch, path in self._files("points").items():
            if batch in self._seen:
                continue
            try:
                part = read_part(path, ["key"])
            except FormatError:
                if not skip_damaged:
                    raise
            else:
                self._stored.update(part["key"].to_pylist())
                self._replaced.update(replaced_by(path))
                self._seen.add(batch)

    def _whole(self, table: str, wanted: Collection[str] | None) -> pa.Table:
        """All rows of a table, every point once."""
        self._look_at_new_parts(skip_damaged=False)
        repeated = self._repeated_keys()
        parts = [EMPTY[table]]
        for batch, path in self._parts(table).items():
            if batch in repeated:
                parts.append(without(read_part(path, wanted), repeated[batch]))
        return concat(parts)

    def _repeated_keys(self, *, skip_damaged: bool = False) -> dict[str, list[str]]:
        """For each batch the keys that an earlier batch has already."""
        seen: set[str] = set()
        repeated = {}
        for batch, path in self._parts("points").items():
            if skip_damaged and batch not in self._seen:
                continue
            keys = read_part(path, ["key"])["key"].to_pylist()
            repeated[batch] = [key for key in keys if key in seen]
            seen.update(keys)
        return repeated

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """This writer's turn: folders and manifest are there, leftovers are not, and nobody else writes."""
        lock = None
        try:
            with disk_errors(self.path):
                for table in TABLES:
                    self._folder(table).mkdir(parents=True, exist_ok=True)
                lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
                wait_for_turn(lock, self.path)
                self._clear_leftovers()
            if not (self.path / "manifest.json").exists():
                self._write_manifest(self.manifest())
            yield
        finally:
            if lock is not None:
                os.close(lock)

    def _clear_leftovers(self) -> None:
        """Remove half-written files and detail parts whose batch was cut off; only in this writer's turn."""
        for path in self.path.glob(".manifest.json.*.tmp"):
            path.unlink(missing_ok=True)
        self._look_at_new_parts(skip_damaged=True)
        stored = self._parts("points").keys()
        for table in ("points", *DETAILS):  # points first: details without them do not count
            cut_off = [path for batch, path in self._files(table).items() if batch not in stored]
            for path in (*self._folder(table).glob(".*.tmp"), *cut_off):
                path.unlink(missing_ok=True)

    def _merge_parts(self) -> None:
        """Only in this writer's turn."""
        self._look_at_new_parts(skip_damaged=True)
        groups: list[list[str]] = [[]]
        group_bytes = 0
        files = {name: self._parts(name) for name in TABLES}
        for batch in sorted(self._seen & files["points"].keys()):
            size_bytes = sum(paths[batch].stat().st_size for paths in files.values() if batch in paths)
            if size_bytes >= _WORTH_MERGING_BYTES:
                continue
            if group_bytes + size_bytes > _LARGE_BYTES:
                groups.append([])
                group_bytes = 0
            groups[-1].append(batch)
            group_bytes += size_bytes
        repeated = self._repeated_keys(skip_damaged=True) if any(len(group) > 1 for group in groups) else {}
        for group in groups:
            if len(group) > 1:
                whole = {}
                for name in TABLES:
                    read = [(batch, files[name][batch]) for batch in group if batch in files[name]]
                    tables = [without(read_part(path), repeated[batch]) for batch, path in read]
                    whole[name] = concat([EMPTY[name], *tables])
                self._write(whole, replaces=group)
                self._replaced.update(group)
        self._clear_leftovers()

    def _write(self, batch: dict[str, pa.Table], replaces: Sequence[str] = ()) -> None:
        name = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
        try:
            for table in (*DETAILS, "points"):  # points last: with it the batch exists
                if batch[table].num_rows:
                    data = encode_part(batch[table], replaces)
                    write_atomically(self._folder(table) / f"{name}.{part_digest(data)}.parquet", data)
        except HwsimError as error:
            with disk_errors(self.path):
                self._clear_leftovers()
            if replaces:
                raise
            count = batch["points"].num_rows
            raise HwsimError(
                f"{error}\n{count} finished points could not be written; those written before are whole. "
                "Run the same command again afterwards: what is stored is not computed again."
            ) from None
        self._seen.add(name)

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=1).encode())


class PointReader:
    """Some columns of the points of a store, read as they come: a part that was read once is not read again.

    Parameters
    ----------
    store : ResultStore
    columns : sequence of str
        Beside ``key``.
    """

    def __init__(self, store: ResultStore, columns: Sequence[str]) -> None:
        self._store = store
        self._columns = list(dict.fromkeys(["key", *columns]))
        self._parts: dict[Path, pa.Table] = {}

    def rows(self, keys: Sequence[str]) -> pa.Table:
        """The points with these keys that are on disk now, in any order; a column that no part has is null.

        Raises
        ------
        FormatError
            A part is damaged or of another version.
        """
        self._store._undisturbed(self._read_new_parts)
        wanted = pa.array(keys, pa.string())
        found = [table.filter(pc.is_in(table["key"], wanted)) for table in self._parts.values()]
        rows = concat([EMPTY["points"].select(["key"]), *found])
        for name in self._columns:
            if name not in rows.column_names:
                rows = rows.append_column(name, pa.nulls(len(rows), pa.float64()))
        return rows.select(self._columns)

    def _read_new_parts(self) -> None:
        paths = self._store.parts()
        new = {path: read_part(path, self._columns) for path in paths if path not in self._parts}
        self._parts = {path: self._parts[path] if path in self._parts else new[path] for path in paths}
