"""Runs NNCodec in a Python of its own, since it needs numpy < 2. A script: ``PYTHON peer_nncodec.py JOB.json``.

Needs only numpy, torch and ``pip install --no-deps nncodec``. What else NNCodec imports (torchvision, pandas, OpenCV …)
serves its training tools, not its coder, so those packages are replaced by stand-ins here.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import io
import json
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

STAND_INS = (
    "torchvision",
    "pandas",
    "h5py",
    "cv2",
    "ptflops",
    "torchmetrics",
    "tqdm",
    "sklearn",
    "wandb",
    "flwr",
    "click",
)


class _StandIn(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> _StandIn:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def memory_kib(field: str) -> int:
    """A field of /proc/self/status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(field)


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Encode and decode at every qp of a job; gives one result each.

    The peak of memory is that of a qp alone only where the job has no other: what was freed stays with the process.
    """
    sys.meta_path.insert(0, _Finder())
    import nncodec.nn
    import numpy as np

    imports_kib = memory_kib("VmRSS")
    with np.load(job["weights"]) as stored:
        weights = {name: stored[name] for name in stored.files}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        settings = {"use_dq": False, "verbose": False, "results": folder}
        for qp in job["qp"]:
            encode_s, decode_s = [], []
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            for _ in range(job["repeats"]):
                stream, decoded = b"", {}  # not those of the turn before beside the new ones
                start = time.process_time()
                with contextlib.redirect_stdout(io.StringIO()):
                    stream = nncodec.nn.encode(dict(weights), settings | {"qp": qp})
                encode_s.append(time.process_time() - start)
                start = time.process_time()
                with contextlib.redirect_stdout(io.StringIO()):
                    decoded = nncodec.nn.decode(stream)
                decode_s.append(time.process_time() - start)
            peak_kib = memory_kib("VmHWM") - imports_kib
            np.savez(Path(job["decoded"]) / f"qp{qp}.npz", **decoded)
            results.append(
                {
                    "qp": qp,
                    "size_bytes": len(stream),
                    "encode_s": sorted(encode_s)[len(encode_s) // 2],
                    "decode_s": sorted(decode_s)[len(decode_s) // 2],
                    "peak_mb": peak_kib * 1024 / 1e6,
                }
            )
    return results


if __name__ == "__main__":
    job_file = Path(sys.argv[1])
    outcome = run(json.loads(job_file.read_text()))
    job_file.with_suffix(".result.json").write_text(json.dumps(outcome))
