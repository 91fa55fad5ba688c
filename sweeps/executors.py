"""Where the tasks of a sweep run: in this process, in processes of this machine, or on a Dask cluster."""

from __future__ import annotations

import multiprocessing
import queue
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hwsim.errors import InputError, Problem
from sweeps.tasks import report_to

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Pool", "inline_pool", "open_pool"]

_CONNECT_SECONDS = 10


@dataclass(frozen=True)
class Pool:
    """An executor and what goes with it.

    Attributes
    ----------
    executor : Executor
        Takes trainings.
    light : Executor
        Takes evaluations: the same, or this process (`evaluating_here`).
    most_running : int
        Tasks to submit at a time: enough to keep every worker busy, and few enough to stay small.
    lost : tuple of exception types
        What a task that was lost with its worker, again and again, raises.
    reports : callable
        What trainings have reported since the last call.
    is_here : bool
        On this machine.
    """

    executor: Executor
    light: Executor
    most_running: int
    lost: tuple[type[Exception], ...] = (BrokenProcessPool,)
    reports: Callable[[], list[Any]] = field(default=list)
    is_here: bool = True

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Start a training."""
        return self.executor.submit(function, *arguments)

    def submit_light(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Start an evaluation."""
        return self.light.submit(function, *arguments)

    def evaluating_here(self) -> Pool:
        """The same pool, but evaluations are done in this process."""
        return replace(self, light=_Inline())


class _Inline(Executor):
    """Does the task when it is submitted."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


def inline_pool() -> Pool:
    """A pool of this process alone."""
    return Pool(_Inline(), _Inline(), 1)


@contextmanager
def open_pool(scheduler: str | None, workers: int) -> Iterator[Pool]:
    """A pool for the time of the context; what is still running at its end is stopped.

    Parameters
    ----------
    scheduler : str or None
        Address of a Dask scheduler, or ``"local"``; None for processes of this machine.
    workers : int
        Of this machine or of the ``"local"`` cluster, at most: a process starts when no other is free.

    Raises
    ------
    InputError
        `distributed` is not installed, or there is no scheduler at the address.
    """
    with _processes(workers) if scheduler is None else _dask(scheduler, workers) as pool:
        yield pool


@contextmanager
def _processes(count: int) -> Iterator[Pool]:
    context = multiprocessing.get_context("spawn")
    reports: Any = context.Queue()
    stop = context.Event()
    executor = ProcessPoolExecutor(
        count, mp_context=context, initializer=_start_worker, initargs=(reports, stop)
    )

    def received() -> list[Any]:
        found = []
        while True:
            try:
                found.append(reports.get_nowait())
            except queue.Empty:
                return found

    try:
        yield Pool(executor, executor, 2 * count, reports=received)
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)


def _start_worker(reports: Any, stop: Any) -> None:
    # Ctrl-C reaches the whole process group; the parent decides, and tells through the event.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    report_to(reports.put, stop.is_set)


@contextmanager
def _dask(scheduler: str, workers: int) -> Iterator[Pool]:
    try:
        import distributed
    except ImportError:
        problem = Problem(
            "scheduler", "the package distributed is not installed", 'pip install "hwsim[cluster]"'
        )
        raise InputError("sweep", problem) from None
    with _client(scheduler, workers) as client:
        cores = max(sum(client.ncores().values()), 1)
        executor = client.get_executor(pure=False)
        try:
            lost = (distributed.scheduler.KilledWorker,)
            yield Pool(executor, executor, 2 * cores, lost, is_here=scheduler == "local")
        finally:
            executor.shutdown(wait=False)


@contextmanager
def _client(scheduler: str, workers: int) -> Iterator[Client]:
    import distributed

    if scheduler == "local":
        with (
            distributed.LocalCluster(
                n_workers=workers, threads_per_worker=1, dashboard_address=None
            ) as cluster,
            distributed.Client(cluster, set_as_default=False) as client,
        ):
            yield client
        return
    try:
        client = distributed.Client(scheduler, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        problem = Problem(
            "scheduler",
            f"found {scheduler!r}: {error or 'no answer'}",
            'the address that `dask scheduler` prints, for example tcp://127.0.0.1:8786, or "local"',
        )
        raise InputError("sweep", problem) from None
    with client:
        yield client
