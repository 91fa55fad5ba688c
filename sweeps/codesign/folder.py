"""The folder of a co-design: what was asked, what was found so far; every file is there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hwsim.errors import FormatError, InputError, Problem
from hwsim.files import write_atomically
from hwsim.machine import Machine

__all__ = ["check_claim", "claim", "machine_toml", "read_json", "write_json"]

FORMAT, FORMAT_VERSION = "hwsim-codesign", 1


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file of this format atomically."""
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **data}
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote, or None where nothing is.

    Raises
    ------
    FormatError
        Damaged, of another kind, or of another version.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(str(path), f"cannot be read: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FormatError(str(path), Problem("format", f'is not "{FORMAT}"', "give another folder"))
    if data.get("format_version") != FORMAT_VERSION:
        found = data.get("format_version")
        raise FormatError(str(path), Problem("format_version", f"{found}, must be {FORMAT_VERSION}"))
    return data


def claim(path: Path, asked: Mapping[str, Any], versions: Mapping[str, Any]) -> None:
    """Note in a file what a folder is for, or see that it is for the same.

    Raises
    ------
    InputError
        The folder holds another run: every difference is named.
    FormatError
        The file is damaged.
    """
    plain = json.loads(json.dumps(asked))
    found = read_json(path)
    if found is None:
        write_json(path, {"asked": plain, "versions": dict(versions)})
        return
    problems = list(_differences(found.get("asked"), plain, ""))
    if problems:
        raise InputError(str(path), problems)


def check_claim(path: Path, asked: Mapping[str, Any]) -> None:
    """See that a folder is for nothing else, as far as is known before the network is trained; nothing is written.

    Raises
    ------
    InputError, FormatError
        As `claim`.
    """
    found = read_json(path)
    if found is not None:
        stored = found.get("asked")
        known = {name: stored.get(name) for name in asked} if isinstance(stored, dict) else stored
        problems = list(_differences(known, json.loads(json.dumps(asked)), ""))
        if problems:
            raise InputError(str(path), problems)


def _differences(stored: Any, wanted: Any, field: str) -> list[Problem]:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        return [
            problem
            for name in sorted(set(stored) | set(wanted))
            for problem in _differences(
                stored.get(name), wanted.get(name), f"{field}.{name}" if field else name
            )
        ]
    if stored == wanted:
        return []
    hint = "ask for the same to go on, or give another folder"
    return [Problem(field, f"the folder is for {_short(stored)}, asked is {_short(wanted)}", hint)]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def machine_toml(machine: Machine) -> str:
    """A machine as the text of a machine file.

    Examples
    --------
    >>> from hwsim.machine import load_machine
    >>> print(machine_toml(load_machine("msa-8x8"))[:20])
    name = "msa-8x8"
    clo
    """
    data = machine.model_dump(mode="json")
    plain = {name: value for name, value in data.items() if not isinstance(value, dict)}
    lines = [f"{name} = {_toml(value)}" for name, value in plain.items()]
    for name, part in data.items():
        if isinstance(part, dict):
            lines += ["", f"[{name}]", *(f"{field} = {_toml(value)}" for field, value in part.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    # Strings, numbers, switches and lists of numbers look the same in JSON and in TOML.
    return json.dumps(value)
