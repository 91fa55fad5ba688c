"""Writing files so that a crash, a full disk or Ctrl-C never leaves half of one."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hwsim.errors import InputError, Problem

__all__ = ["disk_errors", "write_atomically"]


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that under its name there is the old content or all of the new, after a crash at any moment too.

    Missing folders are made.

    Raises
    ------
    InputError
        The disk is full, or the folder cannot be written; nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with disk_errors(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name itself
        finally:
            os.close(folder)


@contextmanager
def disk_errors(path: Path, size_bytes: int = 0) -> Iterator[None]:
    """Turn what the system says of a file into an `InputError` that says what to do."""
    try:
        yield
    except OSError as error:
        raise InputError(str(path), _problem(path, error, size_bytes)) from error


def _problem(path: Path, error: OSError, size_bytes: int) -> Problem:
    reason = error.strerror or str(error)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Problem("", f"cannot be written: {reason}", "check the folder and its rights")
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    needed = f"{size_bytes} bytes are needed, " if size_bytes else ""
    free_bytes = shutil.disk_usage(existing).free
    hint = f"{needed}{free_bytes} are free; free some space, or give a folder on another disk"
    return Problem("", f"cannot be written, the disk is full: {reason}", hint)
