"""Counters of the passes of an array of block types, for checking other implementations against this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwsim.errors import InputError, Problem
from hwsim.layer import check_types
from hwsim.lowering import effective_counts, effective_types, execution_order, pass_config
from hwsim.machine import Machine
from hwsim.oracle import COUNTERS
from hwsim.simulator import pass_counters

__all__ = ["count_passes", "load_types"]


def count_passes(machine: Machine, types_path: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """One pass of each row tile, in one segment, in execution order.

    Parameters
    ----------
    machine : Machine
    types_path : Path
        ``.npy`` file with ``uint8[Mb, Kb]`` block types.

    Returns
    -------
    list of dict
        Per row tile ``row_tile``, ``block_rows`` (indices) and the counters of `hwsim.oracle.COUNTERS`.
    dict
        The counters, summed.

    Raises
    ------
    InputError
        As `load_types`.
    """
    layer = load_types(types_path)[None]
    order = execution_order(effective_counts(layer, machine), machine)
    counters = pass_counters(effective_types(layer, machine), order, pass_config(machine, one_segment=True))[
        0, :, 0
    ]
    rows = machine.array.rows
    tiles = [
        {
            "row_tile": index,
            "block_rows": order[0, index * rows : (index + 1) * rows].tolist(),
            **dict(zip(COUNTERS, values.tolist(), strict=True)),
        }
        for index, values in enumerate(counters)
    ]
    return tiles, dict(zip(COUNTERS, counters.sum(axis=0).tolist(), strict=True))


def load_types(types_path: Path) -> NDArray[np.uint8]:
    """``uint8[Mb, Kb]``: the block types in a ``.npy`` file.

    Raises
    ------
    InputError
        No such file, not a NumPy file, or not an array of block types.
    """
    source = str(types_path)
    try:
        types = np.load(types_path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(source, "no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(source, Problem("", f"not a readable NumPy .npy file: {error}")) from None
    if not isinstance(types, np.ndarray):
        raise InputError(source, "an .npz archive; give one .npy array")
    check_types(types, source)
    if types.ndim != 2:
        raise InputError(
            source, Problem("types", f"{types.ndim} dimensions, must be 2: block rows × block columns")
        )
    return types
