"""The machine that follows a block shape: what a sweep over block shapes holds fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from hwsim.errors import InputError, Problem, nearest_name
from hwsim.machine import Machine

__all__ = ["LARGEST_BLOCK", "Hold", "machine_for_block", "row_problems"]

Hold = Literal["lanes", "area"]
"""What stays fixed when the machine follows the block shape; see `machine_for_block`."""

LARGEST_BLOCK = 256
_MOST_COLUMNS = 4096


def machine_for_block(
    base: Machine, block: tuple[int, int], hold: Hold, area_mm2: Callable[[Machine], float]
) -> Machine:
    """The machine that a block shape is evaluated on.

    The native block becomes ``block`` and the rows follow, so that accumulators per column (``rows × g_o``)
    stay constant.

    Parameters
    ----------
    base : Machine
    block : tuple of int
        ``(g_o, g_k)``.
    hold : {"lanes", "area"}
        ``"lanes"``: lanes per PE, ports per row and columns stay as they are. ``"area"``: the columns are the
        largest number whose machine is within the area of ``base``; with the block of ``base`` that is ``base``.
    area_mm2 : callable
        Area of a machine; it must not fall as columns are added. Not called for ``"lanes"``.

    Raises
    ------
    InputError
        The accumulators do not divide by g_o, not even one column fits the area, or the result is not a valid
        machine.
    """
    source = f"machine {base.name} at block {block[0]}x{block[1]}"
    if hold not in get_args(Hold):
        raise InputError(source, Problem("hold", f"found {hold!r}", nearest_name(str(hold), get_args(Hold))))
    accumulators = base.array.rows * base.array.block[0]
    if problems := row_problems(accumulators, block[0], "array.block"):
        raise InputError(source, problems)
    changes = {"array.block": list(block), "array.rows": accumulators // block[0]}
    if hold == "lanes" or block == base.array.block:
        return base.with_fields(changes)
    budget = area_mm2(base)

    def with_columns(columns: int) -> Machine:
        return base.with_fields(changes | {"array.columns": columns})

    def fit(columns: int) -> bool:
        try:
            return area_mm2(with_columns(columns)) <= budget
        except InputError:  # a word of so many columns no longer fits the operand store
            return False

    smallest = area_mm2(with_columns(1))
    if smallest > budget:
        problem = Problem(
            "array.columns",
            f"one column alone has {smallest:.4g} mm², {smallest - budget:.3g} mm² more than the "
            f"{budget:.4g} mm² of the base machine",
            'hold = "lanes", fewer lanes per PE, or a block with more output channels',
        )
        raise InputError(source, problem)
    fits, too_many = 1, _MOST_COLUMNS + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if fit(middle):
            fits = middle
        else:
            too_many = middle
    return with_columns(fits)


def row_problems(accumulators: int, g_o: int, field: str) -> list[Problem]:
    """Nothing where blocks of ``g_o`` rows divide the accumulators of a column, else the problem of ``field``."""
    if accumulators % g_o == 0:
        return []
    divisors = [size for size in range(1, LARGEST_BLOCK + 1) if accumulators % size == 0]
    message = f"{accumulators} accumulators per column (rows × block rows) do not divide by {g_o} block rows"
    return [Problem(field, message, "block rows that divide: " + ", ".join(str(size) for size in divisors))]
