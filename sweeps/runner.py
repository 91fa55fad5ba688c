"""Run a design space: train what is missing, simulate every point, keep results as they come.

Points that differ in the machine only share one training. Whatever is already in the store or on disk is not computed again, so
an interrupted sweep goes on where it was. Work is cut into tasks (`sweeps.tasks`) for an executor: this process, processes of
this machine, or the workers of a Dask scheduler. Results come back here, and only this process writes.

Who asks for points batch by batch, as a search does, keeps a `SweepRunner` open: its processes start once.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from hwsim.errors import HwsimError
from hwsim.files import write_atomically
from hwsim.kernels import are_compiled
from sweeps import tasks
from sweeps.batch import Grid
from sweeps.executors import Pool, inline_pool, open_pool
from sweeps.space import Point, Space, Training
from sweeps.store import ResultStore
from sweeps.weights import artifact_path, dense_path, state_path

if TYPE_CHECKING:
    from compress.fit import Progress

__all__ = ["Details", "SweepProgress", "SweepResult", "SweepRunner", "run_sweep"]

Details = Literal["auto", "all", "none"]

_POLL_SECONDS = 0.2
_DETAIL_POINTS = 2000
_TASK_POINTS = 65536
_TASK_MACHINES, _TASK_PASSES = 256, 32
_TASK_DETAILS = 8
"""A task is the largest number of points that stays below these (fewer machines where they change the pass counts); with
details each point is simulated by itself."""
_WORTH_PROCESSES = 512
_WORTH_POINTS = 500_000
"""Machines (clock and DRAM aside) or points from which on it pays to start processes that evaluate."""


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
    scheduler: str | None = None,
    details: Details = "auto",
    numbers: NDArray[np.int64] | None = None,
    progress: Callable[[SweepProgress], None] | None = None,
) -> SweepResult:
    """Evaluate every point of a space, or some of them, that the folder does not hold yet.

    Parameters
    ----------
    space : Space
    folder : path
        Gets the result store, ``dense/`` and ``artifacts/``.
    workers : int or None
        Processes; by default one per processor.
    scheduler : str, optional
        The address of a Dask scheduler (``tcp://host:8786``), whose workers then do the work; or ``"local"`` for a Dask cluster
        of ``workers`` processes on this machine.
    details : {"auto", "all", "none"}
        Whether to keep the rows of each layer: layers, energy and storage. ``"auto"``: in spaces of up to 2,000 points.
    numbers : int64 array, optional
        Only these points, as `sweeps.batch.Grid` numbers them.
    progress : callable, optional
        Called with a `SweepProgress` every now and then.

    Raises
    ------
    InputError
        A network or data set that does not exist, or no scheduler at the address.
    HwsimError
        The store cannot be written, or a worker was killed again and again; what was computed before stays.
    """
    with SweepRunner(space, folder, workers=workers, scheduler=scheduler, details=details) as runner:
        return runner.evaluate(numbers, progress)


class SweepRunner:
    """Evaluates points of a space in batches; processes, cluster and store stay the same from the first to the last.

    Use it as a context manager, and leave that after an error. Nothing is started before a batch needs it.

    Parameters
    ----------
    space, folder, workers, scheduler, details
        As of `run_sweep`.
    """

    def __init__(
        self,
        space: Space,
        folder: str | Path,
        *,
        workers: int | None = None,
        scheduler: str | None = None,
        details: Details = "auto",
    ) -> None:
        self.folder = Path(folder)
        self.grid = Grid(space)
        self.store = ResultStore(self.folder, flush_points=_TASK_POINTS)
        self._workers = workers or os.cpu_count() or 1
        self._scheduler = scheduler
        self._with_details = details == "all" or (details == "auto" and len(self.grid) <= _DETAIL_POINTS)
        self._pool: Pool | None = None
        self._open = ExitStack()
        self._wrote = False

    def __enter__(self) -> SweepRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)
        if self._wrote and error is None:
            self.store.compact()

    def evaluate(
        self,
        numbers: NDArray[np.int64] | None = None,
        progress: Callable[[SweepProgress], None] | None = None,
    ) -> SweepResult:
        """Evaluate every point, or some of them, that the store does not hold yet; on return all are on disk.

        Parameters
        ----------
        numbers : int64 array, optional
        progress : callable, optional
            As of `run_sweep`.

        Raises
        ------
        InputError, HwsimError
            As `run_sweep`.
        """
        wanted = len(self.grid) if numbers is None else len(numbers)
        pending = list(_pending(self.grid, self.store.keys(), numbers))
        computed = sum(len(numbers) for numbers in pending)
        if pending:
            if not self._wrote:
                self.store.record_run(self.grid.space.resolved())
            self._wrote = True
            tally = _Tally(self.grid, self.folder, pending, wanted, progress)
            pool = self._pool_for(pending)
            with self.store:
                _Sweep(self.grid, self.folder, self.store, pool, tally, self._with_details).run(pending)
        return SweepResult(self.store, computed, wanted - computed)

    def _pool_for(self, pending: list[NDArray[np.int64]]) -> Pool:
        """Processes or cluster where they are worth it; processes that are there for trainings leave evaluations here."""
        evaluates = self._scheduler is not None or (self._workers > 1 and _is_large(self.grid, pending))
        trains = any(_to_train(self.grid.point(int(numbers[0])), self.folder) for numbers in pending)
        if not evaluates and not trains:
            return inline_pool()
        if self._pool is None:
            self._pool = self._open.enter_context(open_pool(self._scheduler, self._workers))
        return self._pool if evaluates else self._pool.evaluating_here()


def _pending(grid: Grid, known: set[str], chosen: NDArray[np.int64] | None) -> Iterator[NDArray[np.int64]]:
    """The numbers of the points that are not stored, by their weights."""
    for numbers in _groups(grid, chosen):
        if known:
            parts = np.split(numbers, range(_TASK_POINTS, len(numbers), _TASK_POINTS))
            missing = [[key not in known for key in grid.keys(grid.codes(part))] for part in parts]
            numbers = numbers[np.concatenate(missing)]
        if len(numbers):
            yield numbers


def _groups(grid: Grid, chosen: NDArray[np.int64] | None) -> Iterator[NDArray[np.int64]]:
    """The numbers of all points or of the chosen ones, those with the same weights together."""
    if chosen is None:
        for start in range(0, len(grid), grid.group_size):
            yield np.arange(start, start + grid.group_size)
    else:
        numbers = np.unique(chosen)
        cuts = np.flatnonzero(np.diff(numbers // grid.group_size)) + 1
        yield from np.split(numbers, cuts)


def _is_large(grid: Grid, pending: list[NDArray[np.int64]]) -> bool:
    """Whether processes that evaluate are worth starting."""
    points = sum(len(numbers) for numbers in pending)
    return points / grid.machine_size >= _WORTH_PROCESSES or points >= _WORTH_POINTS


def _to_train(point: Point, folder: Path) -> bool:
    return isinstance(point.weights, Training) and not artifact_path(folder, point).exists()


@dataclass(frozen=True)
class _Task:
    """What a future is for."""

    job: Literal["dense", "compress", "evaluate"]
    point: Point
    numbers: NDArray[np.int64]


class _Sweep:
    """The tasks of a sweep: what can be done next, what is being done, and what follows from what is done."""

    def __init__(
        self, grid: Grid, folder: Path, store: ResultStore, pool: Pool, tally: _Tally, with_details: bool
    ) -> None:
        self.grid, self.folder, self.store, self.pool, self.tally = grid, folder, store, pool, tally
        self.with_details = with_details
        self.compiles: bool | None = None
        self.ready: deque[_Task] = deque()
        self.waiting: dict[str, list[_Task]] = {}
        self.running: dict[Future[Any], _Task] = {}

    def run(self, pending: list[NDArray[np.int64]]) -> None:
        """Do everything; the first error is raised, and what was finished before it is kept."""
        for numbers in pending:
            self._plan(numbers)
        while self.ready or self.running:
            while self.ready and len(self.running) < self.pool.most_running:
                task = self.ready.popleft()
                self.running[self._submit(task)] = task
            ended, _ = wait(self.running, _POLL_SECONDS, return_when="FIRST_COMPLETED")
            self._listen()
            for future in ended:
                task = self.running.pop(future)
                self._finish(task, self._result(future, task))

    def _plan(self, numbers: NDArray[np.int64]) -> None:
        point = self.grid.point(int(numbers[0]))
        task = _Task("compress", point, numbers)
        if not _to_train(point, self.folder):
            self._evaluate(task)
        elif dense_path(self.folder, point).exists():
            self.ready.append(task)
        else:
            first = point.dense_key not in self.waiting
            self.waiting.setdefault(point.dense_key, []).append(task)
            if first:
                self.ready.append(_Task("dense", point, numbers))

    def _evaluate(self, task: _Task) -> None:
        """Evaluation goes before training: it is short, and its results are what is kept."""
        machines = _TASK_PASSES if self.grid.varies_passes else _TASK_MACHINES
        size = min(machines * self.grid.machine_size, _TASK_POINTS)
        if self.with_details:
            size = _TASK_DETAILS
        parts = [task.numbers[at : at + size] for at in range(0, len(task.numbers), size)]
        self.ready.extendleft(_Task("evaluate", task.point, part) for part in reversed(parts))

    def _submit(self, task: _Task) -> Future[Any]:
        trained = isinstance(task.point.weights, Training)
        if task.job == "evaluate":
            artifact = artifact_path(self.folder, task.point).read_bytes() if trained else None
            compiling = ", compiling kernels, once" if self._compiles_now() else ""
            self.tally.say(f"simulating {tasks.weights_text(task.point)}{compiling}")
            return self.pool.submit_light(
                tasks.evaluate, self.grid.space, task.numbers, artifact, self.with_details
            )
        dense = dense_path(self.folder, task.point).read_bytes() if task.job == "compress" else None
        return self.pool.submit(tasks.train, task.job, task.point, dense, self._state_of(task))

    def _state_of(self, task: _Task) -> Path | None:
        """Where an unfinished training is kept; None where it runs on machines that may not see the folder."""
        key = task.point.dense_key if task.job == "dense" else task.point.training_key
        return state_path(self.folder, key).absolute() if self.pool.is_here else None

    def _compiles_now(self) -> bool:
        """Whether the first result waits for the compiler, for most of a minute; of other machines nothing is known."""
        if self.compiles is None:
            self.compiles = self.pool.is_here and not are_compiled()
        return self.compiles and not self.tally.simulated_points

    def _result(self, future: Future[Any], task: _Task) -> Any:
        try:
            return future.result()
        except self.pool.lost as error:
            raise HwsimError(
                f"the process for {tasks.weights_text(task.point)} was killed, perhaps for want of memory; what was "
                "computed stays, run the sweep again to go on (with fewer --workers if memory is short)"
            ) from error

    def _finish(self, task: _Task, result: Any) -> None:
        if task.job == "evaluate":
            self.store.append_tables({name: tasks.decoded(stream) for name, stream in result.items()})
            self.tally.simulated(len(task.numbers), f"simulating {tasks.weights_text(task.point)}")
            return
        text = tasks.weights_text(task.point)
        if task.job == "dense":
            self._keep(task, dense_path(self.folder, task.point), result)
            self.tally.trained(task.point.dense_key, text, None)
            self.ready.extend(self.waiting.pop(task.point.dense_key))
        else:
            self._keep(task, artifact_path(self.folder, task.point), result)
            self.tally.trained(task.point.training_key, text, None)
            self._evaluate(task)

    def _keep(self, task: _Task, path: Path, result: bytes) -> None:
        write_atomically(path, result)
        if state := self._state_of(task):
            shutil.rmtree(state, ignore_errors=True)

    def _listen(self) -> None:
        latest: dict[str, tuple[str, Progress]] = {}
        for key, doing, update in self.pool.reports():
            latest[key] = (doing, update)
        for key, (doing, update) in latest.items():
            self.tally.trained(key, doing, update)


class _Tally:
    """Counts epochs and points for the progress display."""

    def __init__(
        self,
        grid: Grid,
        folder: Path,
        pending: list[NDArray[np.int64]],
        wanted: int,
        progress: Callable[[SweepProgress], None] | None,
    ) -> None:
        self.progress = progress
        self.points = sum(len(numbers) for numbers in pending)
        self.points_total, self.points_done = wanted, wanted - self.points
        self.epochs: dict[str, float] = {}
        self.done: dict[str, float] = {}
        self.simulated_points = 0
        self.doing = "starting"
        for numbers in pending:
            point = grid.point(int(numbers[0]))
            if isinstance(point.weights, Training) and _to_train(point, folder):
                self.epochs[point.training_key] = point.weights.admm_epochs + point.weights.retrain_epochs
                if not dense_path(folder, point).exists():
                    self.epochs[point.dense_key] = point.weights.dense_epochs

    def trained(self, key: str, doing: str, update: Progress | None) -> None:
        """A training has come on; None where it is done."""
        if key not in self.epochs:
            return  # a last word about a training of the batch before
        self.doing = doing
        if update is None:
            self.done[key] = self.epochs[key]
        else:
            before = self.epochs[key] - update.epochs if update.phase == "retrain" else 0
            self.done[key] = before + update.epoch - 1 + update.batch / update.batches
        self._tell()

    def say(self, doing: str) -> None:
        self.doing = doing
        self._tell()

    def simulated(self, points: int, doing: str) -> None:
        self.doing = doing
        self.points_done += points
        self.simulated_points += points
        self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            done = sum(self.done.values()) + self.simulated_points / 100
            total = sum(self.epochs.values()) + self.points / 100
            self.progress(SweepProgress(done, total, self.points_done, self.points_total, self.doing))
