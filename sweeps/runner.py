"""Run a design space: train what is missing, simulate every point, keep results as they come.

Points that differ in the machine only share one training. Whatever is already in the store or on disk is not computed again, so
an interrupted sweep goes on where it was.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwsim.errors import FitError, HwsimError, InputError
from hwsim.machine import Machine
from sweeps.space import Point, RandomTypes, Space, Training
from sweeps.store import ResultStore
from sweeps.weights import artifact_path, dense_path, train_dense, train_point

if TYPE_CHECKING:
    from compress.fit import Progress
    from hwsim.layer import Layer
    from hwsim.report import Report

__all__ = ["SweepProgress", "SweepResult", "evaluate_point", "run_sweep"]

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class SweepProgress:
    """Where a sweep stands, in passes over images: training is what takes time.

    Attributes
    ----------
    done, total : float
        Epochs of training, each point that is simulated counted as a hundredth of one.
    points_done, points_total : int
    doing : str
    """

    done: float
    total: float
    points_done: int
    points_total: int
    doing: str


@dataclass(frozen=True)
class SweepResult:
    """What a sweep did.

    Attributes
    ----------
    store : ResultStore
    computed, reused : int
        Points that were evaluated now, and that were there already.
    """

    store: ResultStore
    computed: int
    reused: int


def run_sweep(
    space: Space,
    folder: str | Path,
    *,
    workers: int | None = None,
    progress: Callable[[SweepProgress], None] | None = None,
) -> SweepResult:
    """Evaluate every point of a space that the folder does not hold yet.

    Parameters
    ----------
    space : Space
    folder : path
        Gets the result store, ``dense/`` and ``artifacts/``.
    workers : int or None
        Processes that train at the same time; by default one per processor.
    progress : callable, optional
        Called with a `SweepProgress` every now and then.

    Raises
    ------
    InputError
        A network or data set that does not exist.
    HwsimError
        The store cannot be written; what was computed before stays.
    """
    folder = Path(folder)
    store = ResultStore(folder)
    known = store.keys()
    points = list(space.points())
    pending = [point for point in points if point.key not in known]
    if pending:
        store.record_run(space.resolved())
    groups = _by_weights(pending)
    tally = _Tally(folder, groups, len(points), len(points) - len(pending), progress)
    with store:
        for group in _trained(folder, groups, workers or os.cpu_count() or 1, tally):
            tally.say(f"simulating {_weights_text(group[0])}")
            for point in group:
                store.append(**evaluate_point(point, folder))
                tally.simulated()
            store.flush()
    return SweepResult(store, len(pending), len(points) - len(pending))


def evaluate_point(point: Point, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of one point, as `ResultStore.append` takes them; its weights are on disk, or random.

    A point that does not fit its machine gives a row that says so.
    """
    from hwsim.simulator import simulate

    row = point.columns()
    layers, measured = _layers(point, folder)
    try:
        machine = point.machine(_area_mm2)
    except InputError as error:
        return {"points": [row | {"error": str(error)}]}
    try:
        report = simulate(machine, layers, network=point.network)
    except FitError as error:
        return {"points": [row | {"error": str(error)}]}
    row |= measured | _summary_columns(report, machine)
    return {"points": [row], **_detail_rows(point.key, report)}


def _area_mm2(machine: Machine) -> float:
    from hwsim.area import machine_area
    from hwsim.technology import load_technology

    return sum(machine_area(machine, load_technology(machine.technology.table)).values())


def _layers(point: Point, folder: Path) -> tuple[list[Layer], dict[str, Any]]:
    """The layers of a point, and what was measured of its weights: accuracies and bytes on disk."""
    if isinstance(point.weights, RandomTypes):
        from compress.zoo_shapes import zoo_shapes
        from hwsim.layer import random_layers

        exempt = point.weights.exempt == "first_and_last"
        shapes = zoo_shapes(point.network, point.batch)
        return random_layers(
            shapes, point.block, point.pruned, point.unified, point.seed, exempt_first_last=exempt
        ), {}
    from compress.artifact import load_artifact

    path = artifact_path(folder, point)
    artifact = load_artifact(path)
    results = artifact.results
    measured = {
        "accuracy_dense_float": results["accuracy_dense"],
        "accuracy_float": results["accuracy_retrained"],
        "accuracy_integer": results["accuracy_integer"],
        "method_warnings": "; ".join(results["warnings"]) or None,
    }
    return artifact.layers(point.batch), measured | {"file_bytes": path.stat().st_size}


def _summary_columns(report: Report, machine: Machine) -> dict[str, Any]:
    summary = report.summary
    names = (
        "latency_cycles",
        "latency_ms",
        "compute_cycles",
        "speedup_compute_only",
        "speedup_with_memory",
        "speedup_equal_area",
        "energy_pj",
        "dense_energy_pj",
        "dram_bytes",
        "average_bandwidth_gb_per_s",
        "peak_bandwidth_gb_per_s",
        "peak_demand_gb_per_s",
        "area_mm2",
        "image_bytes",
        "fp32_bytes",
        "int8_bytes",
        "bits_per_weight",
        "weight_count",
        "macs",
        "peak_gmac_per_s",
    )
    columns = {name: _known(summary[name]) for name in names}
    columns["compression_vs_fp32"] = summary["fp32_bytes"] / summary["image_bytes"]
    columns["machine_rows"], columns["machine_columns"] = machine.array.rows, machine.array.columns
    columns["clock_mhz"], columns["dram_gb_per_s"] = machine.clock_mhz, machine.dram.gb_per_s
    columns["warnings"] = "; ".join(report.warnings) or None
    return columns


def _known(value: Any) -> Any:
    """None for not-a-number: a baseline that does not fit has no speed-up."""
    return None if value != value else value


def _detail_rows(key: str, report: Report) -> dict[str, list[dict[str, Any]]]:
    layer_columns = [
        "layer",
        "macs",
        "weight_count",
        "latency_cycles",
        "compute_cycles",
        "dram_bytes",
        "bound",
        "bits_per_weight",
    ]
    layers = report.layers.assign(utilization=report.layers["pe_utilization"])
    tables = {
        "layers": layers[[*layer_columns, "utilization"]],
        "energy": report.energy,
        "storage": report.storage,
    }
    return {
        name: [{"key": key} | {str(k): _known(v) for k, v in row.items()} for row in frame.to_dict("records")]
        for name, frame in tables.items()
    }


def _by_weights(points: Iterable[Point]) -> list[list[Point]]:
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.training_key, []).append(point)
    return list(groups.values())


def _weights_text(point: Point) -> str:
    return f"{point.network} {point.block[0]}x{point.block[1]} p={point.pruned:g} u={point.unified:g}"


class _Tally:
    """Counts epochs and points for the progress display."""

    def __init__(
        self,
        folder: Path,
        groups: list[list[Point]],
        points_total: int,
        points_done: int,
        progress: Callable[[SweepProgress], None] | None,
    ) -> None:
        self.progress = progress
        self.points_total, self.points_done = points_total, points_done
        self.epochs: dict[str, float] = {}
        self.done: dict[str, float] = {}
        self.points = sum(len(group) for group in groups)
        self.simulated_points = 0
        self.doing = "starting"
        for group in groups:
            point = group[0]
            if not isinstance(point.weights, Training):
                continue
            if not artifact_path(folder, point).exists():
                self.epochs[point.training_key] = point.weights.admm_epochs + point.weights.retrain_epochs
                if not dense_path(folder, point).exists():
                    self.epochs[point.dense_key] = point.weights.dense_epochs

    def trained(self, key: str, doing: str, update: Progress | None) -> None:
        """A training has come on; None where it is done."""
        self.doing = doing
        if update is None:
            self.done[key] = self.epochs.get(key, 0)
        else:
            before = self.epochs.get(key, 0) - update.epochs if update.phase == "retrain" else 0
            self.done[key] = before + update.epoch - 1 + update.batch / update.batches
        self._tell()

    def say(self, doing: str) -> None:
        self.doing = doing
        self._tell()

    def simulated(self) -> None:
        self.points_done += 1
        self.simulated_points += 1
        self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            done = sum(self.done.values()) + self.simulated_points / 100
            total = sum(self.epochs.values()) + self.points / 100
            self.progress(SweepProgress(done, total, self.points_done, self.points_total, self.doing))


def _trained(folder: Path, groups: list[list[Point]], workers: int, tally: _Tally) -> Iterator[list[Point]]:
    """Groups of points as soon as their weights are on disk; trainings run in processes of their own."""
    to_train = []
    for group in groups:
        if isinstance(group[0].weights, Training) and not artifact_path(folder, group[0]).exists():
            to_train.append(group)
        else:
            yield group
    if not to_train:
        return
    dense: dict[str, Point] = {}
    for group in to_train:
        dense.setdefault(group[0].dense_key, group[0])
    missing = [point for point in dense.values() if not dense_path(folder, point).exists()]
    with _Pool(min(workers, max(len(to_train), 1)), tally) as pool:
        if missing:
            for _ in pool.run(folder, "dense", [[point] for point in missing]):
                pass
        yield from pool.run(folder, "compress", to_train)


class _Pool:
    """Worker processes, a queue on which they report, and an event that stops them."""

    def __init__(self, workers: int, tally: _Tally) -> None:
        context = multiprocessing.get_context("spawn")
        self.reports: Any = context.Queue()
        self.stop = context.Event()
        self.tally = tally
        self.executor = ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start_worker, initargs=(self.reports, self.stop)
        )

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.executor.shutdown(cancel_futures=True)

    def run(self, folder: Path, job: str, groups: list[list[Point]]) -> Iterator[list[Point]]:
        """Groups in the order in which their trainings end; the first error is raised."""
        futures: dict[Future[None], list[Point]] = {
            self.executor.submit(_work, folder, job, group[0]): group for group in groups
        }
        while futures:
            ended, _ = wait(futures, _POLL_SECONDS, return_when="FIRST_COMPLETED")
            self._drain()
            for future in ended:
                group = futures.pop(future)
                try:
                    future.result()
                except BrokenProcessPool:
                    raise HwsimError(
                        f"the process for {_weights_text(group[0])} was killed, perhaps for want of memory; what was computed "
                        "stays, run the sweep again to go on (with fewer --workers if memory is short)"
                    ) from None
                key = group[0].dense_key if job == "dense" else group[0].training_key
                self.tally.trained(key, _weights_text(group[0]), None)
                yield group

    def _drain(self) -> None:
        latest: dict[str, tuple[str, Progress]] = {}
        while True:
            try:
                key, doing, update = self.reports.get_nowait()
            except queue.Empty:
                break
            latest[key] = (doing, update)
        for key, (doing, update) in latest.items():
            self.tally.trained(key, doing, update)


_worker: dict[str, Any] = {}
"""What `_start_worker` gives the jobs of this process."""


class _Stopped(Exception):
    """The parent has asked the worker to stop."""


def _start_worker(reports: Any, stop: Any) -> None:
    # Ctrl-C reaches the whole process group; the parent decides, and tells through the event.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What the method warns of is kept with the result; here it would tear the progress bar.
    logging.getLogger("compress").setLevel(logging.ERROR)
    _worker.update(reports=reports, stop=stop)


def _work(folder: Path, job: str, point: Point) -> None:
    import torch

    # Batches this small gain little from a second thread, and lose ten times that where another process wants the core.
    torch.set_num_threads(1)
    key = point.dense_key if job == "dense" else point.training_key
    doing = f"training {point.network}" if job == "dense" else f"compressing {_weights_text(point)}"

    def report(update: Progress) -> None:
        if _worker["stop"].is_set():
            raise _Stopped
        if update.batch % 20 == 0 or update.batch == update.batches:
            _worker["reports"].put((key, doing, update))

    (train_dense if job == "dense" else train_point)(folder, point, report)
