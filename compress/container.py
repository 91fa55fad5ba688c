"""The container that every model file of the project uses. NumPy only.

A safetensors file whose only metadata entry is a JSON header. The header carries a SHA-256 over the whole file (the
digest itself read as zeros), so that a single changed byte anywhere is noticed. ``docs/formats.md`` has the layout.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from hwsim.errors import FormatError, InputError, Problem
from hwsim.files import write_atomically

__all__ = ["check_writable", "container_bytes", "package_versions", "read_container", "write_container"]

METADATA_KEY = "hwsim"
WRONG_FORMAT_HINTS = {
    "hwsim-dense": "a dense network; `hwsim compress` makes a compressed model of it",
    "hwsim-compressed": "a compressed model already; this wants the dense network that `hwsim train` wrote",
}
# The header is a JSON string inside the JSON of safetensors, so its quotes are escaped.
DIGEST_PATTERN = re.compile(rb'\\"sha256\\":\\"([0-9a-f]{64})\\"')
NO_DIGEST = "0" * 64


def check_writable(path: str | Path) -> None:
    """Refuse a path that cannot be written, before the work whose result goes there.

    Raises
    ------
    InputError
        The path is a folder, or its folder cannot be made or written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(str(path), f"cannot be written: {error.strerror or error}") from error
    if path.is_dir():
        raise InputError(str(path), "cannot be written: is a folder")
    if not os.access(path.parent, os.W_OK):
        raise InputError(str(path), "cannot be written: no permission to write the folder")


def container_bytes(header: Mapping[str, Any], tensors: Mapping[str, NDArray]) -> bytes:
    """The content of a container file; the same header and tensors always give the same bytes."""
    text = json.dumps({"sha256": NO_DIGEST, **header}, allow_nan=False, separators=(",", ":"))
    arrays = {name: np.asarray(values, order="C") for name, values in tensors.items()}
    content = safetensors.numpy.save(arrays, metadata={METADATA_KEY: text})
    digest, (start, stop) = _digest(content)
    return b"".join((content[:start], digest.encode(), content[stop:]))


def write_container(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, NDArray]) -> int:
    """Write a container file atomically; gives its size in bytes.

    Parameters
    ----------
    path : str or Path
    header : mapping
        JSON values, with ``format`` (str) and ``version`` (int).
    tensors : mapping of str to array

    Raises
    ------
    InputError
        The file cannot be written.
    """
    content = container_bytes(header, tensors)
    write_atomically(path, content)
    return len(content)


def read_container(
    path: str | Path, format_name: str, *versions: int
) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Header (without digest, format and version) and tensors of a container file, checked byte for byte.

    Raises
    ------
    FormatError
        Truncated, damaged, edited, not of this format, or of a version that this program does not read.
    InputError
        The file cannot be read at all.
    """
    source = str(path)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(source, f"cannot be read: {error.strerror or error}") from None
    header = _read_header(content, source)
    found = header.pop("format", None)
    if found != format_name:
        hint = WRONG_FORMAT_HINTS.get(str(found), "")
        raise FormatError(source, Problem("format", f'"{found}", must be "{format_name}"', hint))
    found = header.pop("version", None)
    if found not in versions:
        known = " and ".join(map(str, versions))
        raise FormatError(source, Problem("version", f"{found}; this program reads version {known}"))
    try:
        return header, dict(sorted(safetensors.numpy.load(content).items()))
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FormatError(source, f"not a valid safetensors file: {error}") from None


def _read_header(content: bytes, source: str) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or len(content) < 8 + length:
        raise FormatError(source, f"{len(content)} bytes: truncated, or not a safetensors file")
    try:
        outer = json.loads(content[8 : 8 + length])
        header = json.loads(outer["__metadata__"][METADATA_KEY])
        stored = header.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FormatError(
            source, "has no readable hwsim header: damaged, or written by another program"
        ) from None
    digest, _ = _digest(content)
    if stored != digest:
        raise FormatError(
            source,
            Problem(
                "sha256", f"header says {stored}, content gives {digest}: the file was damaged or edited"
            ),
        )
    return header


def _digest(content: bytes) -> tuple[str, tuple[int, int]]:
    """SHA-256 of the file with its digest read as zeros, and where that digest stands."""
    length = int.from_bytes(content[:8], "little")
    place = DIGEST_PATTERN.search(content, 8, 8 + length)
    if place is None:
        return "", (0, 0)
    start, stop = place.span(1)
    view = memoryview(content)
    digest = hashlib.sha256(view[:start])
    digest.update(NO_DIGEST.encode())
    digest.update(view[stop:])
    return digest.hexdigest(), (start, stop)


def package_versions() -> dict[str, str]:
    """Versions of what shaped a model file, for its header."""
    names = ("hwsim", "torch", "numpy", "safetensors")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}
