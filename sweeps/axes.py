"""Axes over the fields of a machine: their values as the machine stores them, and every problem of a bad one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hwsim.errors import InputError, Problem, nearest_name
from hwsim.machine import Machine, validation_problems

__all__ = ["stored_axes", "technology_digest", "twice"]


def stored_axes(
    base: Machine | None, axes: Mapping[str, tuple[Any, ...]], problems: list[Problem]
) -> dict[str, tuple[Any, ...]]:
    """The axes with values as the machine stores them; without a base machine each value is checked by itself."""
    stored = {name: _axis_values(base, name, values, problems) for name, values in axes.items()}
    own = () if base is None else (base.technology.table,)
    for table in stored.get("technology.table", own):
        try:
            technology_digest(str(table))
        except InputError as error:
            problems += [
                Problem("machine.technology.table", f"{error.source}: {item.message}", item.hint)
                for item in error.problems
            ]
    return stored


def _axis_values(
    base: Machine | None, name: str, values: tuple[Any, ...], problems: list[Problem]
) -> tuple[Any, ...]:
    """The values as the machine stores them (a rate of ``6`` becomes ``6.0``), for equal keys."""
    field = f"machine.axes.{name}"
    if name in ("array.block", "name"):
        problems.append(Problem(field, "cannot be an axis", "list block shapes under `blocks`"))
        return values
    if name not in Machine.field_names():
        problems.append(Problem(field, "no such machine field", nearest_name(name, Machine.field_names())))
        return values
    if not values:
        problems.append(Problem(field, "empty, at least one value is needed"))
    stored = []
    for value in values:
        try:
            stored.append(_stored_value(base, name, value))
        except InputError as error:
            problems += [Problem(f"{field}: {value!r}", item.message, item.hint) for item in error.problems]
    problems += twice(field, stored)
    return tuple(stored)


def _stored_value(base: Machine | None, name: str, value: Any) -> Any:
    """What a machine makes of the value of a field.

    Raises
    ------
    InputError
        The value is not one of the field, or the base machine with it is not valid.
    """
    part, _, leaf = name.rpartition(".")
    if base is not None:
        changed: Any = base.with_fields({name: value})
        return changed.model_dump(mode="json")[part][leaf] if part else getattr(changed, leaf)
    model: Any = Machine.model_fields[part].annotation if part else Machine
    try:
        model.model_validate({leaf: value})
    except ValidationError as error:
        found = validation_problems(error, model)  # of all fields, those that are not given among them
        if problems := [item for item in found if item.field.partition(".")[0] == leaf]:
            raise InputError("machine", problems) from None
    return value


def twice(field: str, values: Iterable[Any]) -> list[Problem]:
    """A problem for every value that stands in a list again."""
    listed = list(values)
    repeated = [value for i, value in enumerate(listed) if value in listed[:i]]
    return [Problem(field, f"{value!r} is listed twice", "every value once") for value in repeated]


def technology_digest(table: str) -> str:
    """Digest of the resolved technology table: a file may change under the same name."""
    path = Path(table)
    status = path.stat() if path.is_file() else None
    return _resolved_technology_digest(table, status and (status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=64)
def _resolved_technology_digest(table: str, stamp: tuple[int, int] | None) -> str:
    """The same, kept for as long as the file keeps its ``stamp`` of time and size."""
    from hwsim.technology import load_technology

    return hashlib.sha256(load_technology(table).to_json().encode()).hexdigest()
