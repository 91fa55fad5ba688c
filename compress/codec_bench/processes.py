"""Jobs in processes of their own, one thread each: NNCodec needs another Python, and memory is measured process by process."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.codec_bench import peer_nncodec
from hwsim.errors import InputError

__all__ = ["in_process", "run_nncodec"]


def run_nncodec(
    python: Path,
    weights: Mapping[str, NDArray],
    qp: tuple[int, ...],
    folder: Path,
    repeats: int = 1,
) -> list[dict[str, Any]]:
    """NNCodec at every qp: a result each, and the decoded weights in the folder, ``qp-38.npz``.

    Parameters
    ----------
    python : Path
        A Python that has NNCodec.
    weights : mapping of str to float32 array
    qp : tuple of int
    folder : Path
    repeats : int
        Times that each is encoded and decoded; the medians of the seconds are given.

    Raises
    ------
    InputError
        NNCodec fails.
    """
    with (folder / "weights.npz").open("wb") as file:
        np.savez(file, allow_pickle=False, **dict(weights))
    job = {
        "weights": str(folder / "weights.npz"),
        "qp": list(qp),
        "repeats": repeats,
        "decoded": str(folder),
    }
    results: list[dict[str, Any]] = in_process([str(python), str(peer_nncodec.__file__)], job, folder)
    return results


def in_process(command: list[str], job: dict[str, Any], folder: Path) -> Any:
    """What a command writes beside the file of its job.

    Raises
    ------
    InputError
        It ends with an error; the last line of its output is told.
    """
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, env=environment, check=False)
    result = path.with_suffix(".result.json")
    if done.returncode or not result.exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(" ".join(command[:2]), f"failed with exit code {done.returncode}: {last}")
    outcome = json.loads(result.read_text())
    result.unlink()
    return outcome
