"""What a worker of a sweep does, in this process, in another one, or on another machine.

Tasks are plain functions of plain values: what a task needs travels with it and what it makes travels back, so that workers
need no common disk and a task that was lost is simply run again.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hwsim.errors import FitError, FormatError, InputError
from hwsim.kept import Kept
from sweeps.batch import Grid, area_mm2, evaluate_batch
from sweeps.space import Point, RandomTypes, Space
from sweeps.tables import detail_frames
from sweeps.weights import artifact_path, dense_path, random_point_layers, train_dense, train_point

if TYPE_CHECKING:
    from compress.fit import Progress
    from hwsim.layer import Layer

__all__ = ["Stopped", "Work", "decoded", "evaluate", "report_to", "train", "weights_text"]

_KEPT_NETWORKS = 4


class Stopped(Exception):
    """Whoever started the task no longer wants its result."""


class _Reporting:
    """Where this process reports, and how it hears that it is to stop; nothing where nobody listens."""

    send: Callable[[tuple[str, str, Progress]], None] | None = None
    stopped: Callable[[], bool] = staticmethod(lambda: False)


def report_to(send: Callable[[tuple[str, str, Progress]], None], stopped: Callable[[], bool]) -> None:
    """Report the trainings of this process; they end when ``stopped`` says so."""
    _Reporting.send, _Reporting.stopped = send, staticmethod(stopped)


def weights_text(point: Point) -> str:
    """The weights of a point in a few words."""
    return f"{point.network} {point.block[0]}x{point.block[1]} p={point.pruned:g} u={point.unified:g}"


def train(job: str, point: Point, dense: bytes | None, resume_from: Path | None) -> bytes:
    """Train: the file of the uncompressed network (``job`` "dense"), or of the compressed one (from the file of the former).

    With ``resume_from``, a folder, a training that was stopped goes on from its last epoch, bit for bit.
    """
    import torch

    # Batches this small gain little from a second thread, and lose ten times that where another process wants the core.
    torch.set_num_threads(1)
    # What the method warns of is kept with the result; here it would tear the progress bar.
    logging.getLogger("compress").setLevel(logging.ERROR)
    key = point.dense_key if job == "dense" else point.training_key
    doing = f"training {point.network}" if job == "dense" else f"compressing {weights_text(point)}"

    def report(update: Progress) -> None:
        if _Reporting.stopped():
            raise Stopped
        if _Reporting.send and (update.batch % 20 == 0 or update.batch == update.batches):
            _Reporting.send((key, doing, update))

    with tempfile.TemporaryDirectory(prefix="hwsim-") as name:
        folder = Path(name)
        if job == "dense":
            train_dense(folder, point, report, resume_from)
            return dense_path(folder, point).read_bytes()
        assert dense is not None  # the runner trains it first
        path = dense_path(folder, point)
        path.parent.mkdir()
        path.write_bytes(dense)
        train_point(folder, point, report, resume_from)
        return artifact_path(folder, point).read_bytes()


class Work(threading.local):
    """What a thread keeps from one task to the next: networks, and what is known of their layers."""

    def __init__(self) -> None:
        from hwsim.evaluate import Evaluator

        self.evaluator = Evaluator()
        self.networks = Kept(_KEPT_NETWORKS)
        self.grids = Kept(_KEPT_NETWORKS)


_work: list[Work] = []


def evaluate(
    space: Space, numbers: NDArray[np.int64], artifact: bytes | None, with_details: bool
) -> dict[str, bytes]:
    """The rows of some points with the same weights, each table as an Arrow stream.

    Parameters
    ----------
    space : Space
    numbers : int64 array ``[points]``
        In the order of `sweeps.batch.Grid`.
    artifact : bytes or None
        The file of the compressed network; None where block types are random.
    with_details : bool
        Also the rows of each layer.
    """
    if not _work:
        _work.append(Work())
    work = _work[0]
    grid = work.grids.find(space.model_dump_json(), lambda: Grid(space))
    point = grid.point(int(numbers[0]))
    content = hashlib.sha256(artifact or b"").digest()
    layers, measured = work.networks.find(
        (point.training_key, point.batch, content), lambda: _layers(point, artifact)
    )
    tables = {"points": evaluate_batch(grid, numbers, layers, work.evaluator, measured)}
    if with_details:
        tables |= _details(grid, numbers, layers)
    return {name: _encoded(table) for name, table in tables.items()}


def decoded(stream: bytes) -> pa.Table:
    """The table of an Arrow stream."""
    return pa.ipc.open_stream(stream).read_all()


def _encoded(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _layers(point: Point, artifact: bytes | None) -> tuple[list[Layer], dict[str, Any]]:
    """The layers of a point, and what was measured of its weights: accuracies and bytes on disk."""
    if isinstance(point.weights, RandomTypes):
        return random_point_layers(point), {}
    from compress.artifact import load_artifact

    assert artifact is not None  # the runner trains it first
    with tempfile.TemporaryDirectory(prefix="hwsim-") as folder:
        path = artifact_path(Path(folder), point)
        path.parent.mkdir()
        path.write_bytes(artifact)
        try:
            loaded = load_artifact(path)
        except FormatError as error:
            raise FormatError(f"artifacts/{path.name}", error.problems) from None
    results = loaded.results
    measured = {
        "accuracy_dense_float": results["accuracy_dense"],
        "accuracy_float": results["accuracy_retrained"],
        "accuracy_integer": results["accuracy_integer"],
        "method_warnings": "; ".join(results["warnings"]) or None,
    }
    return loaded.layers(point.batch), measured | {"file_bytes": len(artifact)}


def _details(grid: Grid, numbers: NDArray[np.int64], layers: list[Layer]) -> dict[str, pa.Table]:
    from hwsim.simulator import simulate

    tables: dict[str, list[pa.Table]] = {"layers": [], "energy": [], "storage": []}
    for number in numbers.tolist():
        point = grid.point(number)
        try:
            report = simulate(point.machine(area_mm2), layers, network=point.network)
        except (InputError, FitError):  # the reason stands in the row of the point
            continue
        for name, frame in detail_frames(point.key, report).items():
            tables[name].append(pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata())
    return {name: pa.concat_tables(parts) for name, parts in tables.items() if parts}
