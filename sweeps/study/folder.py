"""The folder of a study: one JSON file per finished run, what runs share, and claims so that processes do not collide.

::

    results/KEY.json          one finished run each
    files/KEY.safetensors     what it made; KEY.trained.safetensors: before its integers were made coarser
    peers/KEY.json            what another coder makes of it
    dense/KEY.safetensors     start networks
    running/KEY/              state of a run that was stopped, to go on from
    running/KEY.lock          held by the process that works on a run

Any number of processes of one machine may work on a folder: a run is claimed by a lock that the system frees when its process
ends, however it ends.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hwsim.errors import FormatError, InputError, Problem
from hwsim.files import write_atomically
from sweeps.study.runs import Run, run_from_json

__all__ = ["RESULT_FORMAT", "Result", "StudyFolder", "read_results", "result_from_json"]

RESULT_FORMAT, RESULT_VERSION = "hwsim-study-result", 1

_DAMAGED_HINT = "take the file out of the folder; hwsim study does the run again"


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes
    ----------
    run : Run
    quality : dict of str to float
        By the name of the measure, such as ``accuracy`` (a share) on the test examples.
    file_bytes : int
        Of the file as written; of a network in fp32, 4 bytes a parameter.
    image_bytes : int or None
        Of the memory images of all layers; None where no machine runs the layers (no blocks).
    fp32_bytes : int
        4 bytes for each parameter of the dense network of the task.
    coders : dict of str to int
        Bytes of other lossless coders on the same integers.
    seconds : float
        Of this run; of processor time, since the machine may be busy with other work.
    wall_seconds : float
    epochs : int
        That this run trained.
    details : dict
        Resolved configuration, warnings, further figures; JSON values.
    packages : dict of str to str
    code : str
        Digest of the sources that decide the result.
    """

    run: Run
    quality: dict[str, float]
    file_bytes: int
    image_bytes: int | None
    fp32_bytes: int
    coders: dict[str, int]
    seconds: float
    wall_seconds: float
    epochs: int
    details: dict[str, Any]
    packages: dict[str, str]
    code: str

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        header = {"format": RESULT_FORMAT, "version": RESULT_VERSION, "key": self.run.key}
        return header | {**vars(self), "run": self.run.to_json()}


def result_from_json(data: Any, source: str) -> Result:
    """The inverse of `Result.to_json`.

    Raises
    ------
    FormatError
        Not such a document, or damaged.
    InputError
        The run in it is no run.
    """
    if not isinstance(data, dict) or data.get("format") != RESULT_FORMAT:
        raise FormatError(source, f"is no {RESULT_FORMAT} document")
    if data.get("version") != RESULT_VERSION:
        raise FormatError(
            source, f"version {data.get('version')}; this program reads version {RESULT_VERSION}"
        )
    values = {name: value for name, value in data.items() if name not in ("format", "version", "key")}
    try:
        result = Result(**{**values, "run": run_from_json(values["run"], source)})
        intact = all(isinstance(value, int | float) for value in (*result.quality.values(), result.seconds))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise FormatError(source, f"damaged: {error}") from None
    if not intact or not isinstance(result.file_bytes, int):
        raise FormatError(source, "damaged: figures that are no numbers")
    return result


@dataclass(frozen=True)
class StudyFolder:
    """Paths and claims.

    Attributes
    ----------
    path : Path
    """

    path: Path

    def result_path(self, run: Run) -> Path:
        """Where the result of a run is kept."""
        return self.path / "results" / f"{run.key}.json"

    def file_path(self, run: Run) -> Path:
        """Where the compressed network of a run is kept."""
        return self.path / "files" / f"{run.key}.safetensors"

    def trained_path(self, run: Run) -> Path:
        """Where its integers of 8 bits are kept, as training left them."""
        return self.path / "files" / f"{run.key}.trained.safetensors"

    def peer_path(self, run: Run) -> Path:
        """Where the figures of NNCodec are kept."""
        return self.path / "peers" / f"{run.key}.json"

    def dense_path(self, name: str) -> Path:
        """Where a start network is kept."""
        return self.path / "dense" / f"{name}.safetensors"

    def state_folder(self, key: str) -> Path:
        """Where the state of an unfinished training is kept."""
        return self.path / "running" / key

    def is_done(self, run: Run) -> bool:
        """Whether the result is there."""
        return self.result_path(run).exists()

    def write(self, result: Result) -> None:
        """Keep a result, and forget the state of its training."""
        content = json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n"
        write_atomically(self.result_path(result.run), content.encode())
        self.forget(result.run.key)

    def forget(self, key: str) -> None:
        """Remove the state of a training that has ended."""
        shutil.rmtree(self.state_folder(key), ignore_errors=True)

    @contextmanager
    def claim(self, key: str, wait: bool = False) -> Iterator[bool]:
        """Whether the work under this key is ours; others are kept out until the block is left.

        Parameters
        ----------
        key : str
        wait : bool
            Until whoever has it now is done.
        """
        path = self.path / "running" / f"{key}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        except OSError as error:
            raise InputError(str(path), f"cannot be written: {error.strerror or error}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    def results(self) -> list[Result]:
        """Every result that is there, in the order of their names; what a peer made of it is under ``details``.

        Raises
        ------
        FormatError
            Damaged files: every one is named.
        """
        found = []
        problems: list[Problem] = []
        for path in sorted((self.path / "results").glob("*.json")):
            try:
                result = result_from_json(_json(path), str(path))
                peer = self.peer_path(result.run)
                if peer.exists():
                    result = replace(result, details=result.details | {"nncodec": _json(peer)})
            except InputError as error:
                problems += [
                    Problem(Path(error.source).relative_to(self.path).as_posix(), str(item), _DAMAGED_HINT)
                    for item in error.problems
                ]
            else:
                found.append(result)
        if problems:
            raise FormatError(str(self.path), problems)
        return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(str(path), f"cannot be read: {error}") from None


def read_results(path: str | Path) -> list[Result]:
    """The results of a study: of its folder, or of the one JSON file that `write_results_page` keeps.

    Raises
    ------
    InputError
        Neither is there, or the folder holds no result.
    FormatError
        A file is damaged.
    """
    path = Path(path)
    if path.is_dir():
        results = StudyFolder(path).results()
        if not results:
            hint = "give the --folder of hwsim study, or a results.json"
            raise InputError(str(path), Problem("results", "holds no result of a run", hint))
        return results
    try:
        data = json.loads(path.read_text("utf-8"))
        documents = list(data["results"])
    except OSError as error:
        raise InputError(str(path), f"cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(str(path), f"is no list of results: {error}") from None
    return [result_from_json(document, str(path)) for document in documents]
