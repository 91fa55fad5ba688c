"""The files of a result store: Parquet parts that say if they are whole, and the lock by which writers take turns."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import io
import platform
import re
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hwsim.errors import FormatError, HwsimError, Problem
from hwsim.files import disk_errors
from hwsim.version import MODEL_VERSION

__all__ = [
    "PART",
    "SCHEMA_VERSION",
    "encode_part",
    "part_digest",
    "read_part",
    "replaced_by",
    "version_problem",
    "versions",
    "wait_for_turn",
]

SCHEMA_VERSION = "1"
"""Of the folder and its tables; written into every part and into the manifest."""

PART = re.compile(r"(?P<batch>\d{20}-[0-9a-f]{8})\.[0-9a-f]{16}\.parquet")
_METADATA_KEY = b"hwsim.store_schema"
_REPLACES_KEY = b"hwsim.replaces"
_LOCK_SECONDS = 60.0
_PACKAGES = ("hwsim", "numpy", "numba", "torch", "pandas", "pyarrow")


def wait_for_turn(lock: int, path: Path) -> None:
    """Take the lock of a store, an open file; the kernel drops it when its holder dies.

    Raises
    ------
    HwsimError
        Another process does not give it up.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise HwsimError(
                    f"{path}: another process has held the store for {_LOCK_SECONDS:.0f} s "
                    "(is a sweep stopped or hanging? continue or end it, then try again)"
                ) from None
            time.sleep(0.01)


def encode_part(table: pa.Table, replaces: Sequence[str] = ()) -> bytes:
    """A table as a Parquet file that names its version, and the batches that it stands for."""
    sink = io.BytesIO()
    stamp = {_METADATA_KEY: SCHEMA_VERSION.encode()}
    if replaces:
        stamp[_REPLACES_KEY] = " ".join(replaces).encode()
    stamped = table.replace_schema_metadata(stamp)
    pq.write_table(stamped, sink, compression="zstd")
    return sink.getvalue()


def replaced_by(path: Path) -> list[str]:
    """The batches that a part stands for."""
    metadata = pq.read_schema(path).metadata or {}
    return metadata.get(_REPLACES_KEY, b"").decode().split()


def read_part(path: Path, columns: Collection[str] | None = None) -> pa.Table:
    """A part, or those of the columns that it has, after its digest and version were checked.

    A part that is not there raises FileNotFoundError: it may have been merged into another one meanwhile.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError:
        with disk_errors(path):
            raise
    if part_digest(data) != path.name.split(".")[1]:
        hint = "restore it, or delete it and run the sweep again: only its points are computed anew"
        raise FormatError(
            str(path), Problem("", "damaged: its content does not match the digest in its name", hint)
        )
    file = pq.ParquetFile(pa.BufferReader(data))
    version = (file.schema_arrow.metadata or {}).get(_METADATA_KEY, b"none").decode()
    if version != SCHEMA_VERSION:
        raise FormatError(str(path), version_problem(version))
    names = [name for name in file.schema_arrow.names if columns is None or name in columns]
    return file.read(columns=names).replace_schema_metadata()


def part_digest(data: bytes) -> str:
    """The digest of its content that a part carries in its name."""
    return hashlib.sha256(data).hexdigest()[:16]


def version_problem(version: object) -> Problem:
    """A file of a store was written with another version."""
    message = f"written with store version {version!r}, this program reads {SCHEMA_VERSION!r}"
    return Problem("", message, "give another folder, or use the version of hwsim that wrote it")


def versions() -> dict[str, str]:
    """With what results are made: this program, its model, Python and the packages that matter."""
    versions = {"model": MODEL_VERSION, "python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            versions[name] = "not installed"
    return versions
