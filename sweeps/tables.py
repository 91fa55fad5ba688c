"""The tables of a result store: their columns, and rows checked against them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from hwsim.errors import Problem

if TYPE_CHECKING:
    import pandas as pd

    from hwsim.report import Report

__all__ = [
    "DETAILS",
    "EMPTY",
    "TABLES",
    "checked_table",
    "concat",
    "detail_frames",
    "fit_together",
    "table_of_rows",
    "without",
]

_STR, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()
TABLES: dict[str, dict[str, pa.DataType]] = {
    "points": {
        "key": _STR,
        "network": _STR,
        "block": _STR,
        "block_rows": _INT,
        "block_columns": _INT,
        "pruned": _FLOAT,
        "unified": _FLOAT,
        "hold": _STR,
        "machine": _STR,
        "seed": _INT,
        "batch": _INT,
        "accuracy_dense_float": _FLOAT,
        "accuracy_float": _FLOAT,
        "accuracy_integer": _FLOAT,
        "latency_cycles": _INT,
        "latency_ms": _FLOAT,
        "compute_cycles": _INT,
        "speedup_compute_only": _FLOAT,
        "speedup_with_memory": _FLOAT,
        "speedup_equal_area": _FLOAT,
        "energy_pj": _FLOAT,
        "dense_energy_pj": _FLOAT,
        "dram_bytes": _INT,
        "average_bandwidth_gb_per_s": _FLOAT,
        "peak_bandwidth_gb_per_s": _FLOAT,
        "peak_demand_gb_per_s": _FLOAT,
        "area_mm2": _FLOAT,
        "image_bytes": _INT,
        "file_bytes": _INT,
        "fp32_bytes": _INT,
        "int8_bytes": _INT,
        "bits_per_weight": _FLOAT,
        "compression_vs_fp32": _FLOAT,
        "weight_count": _INT,
        "macs": _INT,
        "training_key": _STR,
        "training_settings": _STR,
        "model_version": _STR,
        "error": _STR,
    },
    "layers": {
        "key": _STR,
        "layer": _STR,
        "macs": _INT,
        "weight_count": _INT,
        "latency_cycles": _INT,
        "compute_cycles": _INT,
        "dram_bytes": _INT,
        "bound": _STR,
        "bits_per_weight": _FLOAT,
        "utilization": _FLOAT,
    },
    "energy": {"key": _STR, "layer": _STR, "component": _STR, "energy_pj": _FLOAT, "dense_energy_pj": _FLOAT},
    "storage": {"key": _STR, "layer": _STR, "stream": _STR, "size_bits": _INT},
}
"""Columns that every part has, with their types; a column that a row leaves out is null. Rows may bring
more columns.

``error`` is null, or says why a point has no result (it does not fit its machine): such a point is not
tried again.
"""

EMPTY = {name: pa.schema(columns).empty_table() for name, columns in TABLES.items()}
DETAILS = ("layers", "energy", "storage")


def fit_together(
    batch: dict[str, pa.Table], schemas: dict[str, pa.Schema], problems: list[Problem]
) -> dict[str, pa.Schema]:
    """The schemas with the columns of one call; what of the call does not fit together is noted."""
    keys = batch["points"]["key"].to_pylist()
    if len(set(keys)) < len(keys):
        problems.append(Problem("points.key", "a key is there twice in one call"))
    for name in DETAILS:
        strangers = sorted(set(batch[name]["key"].to_pylist()) - set(keys) - {None})
        problems += [
            Problem(f"{name}.key", f"{key!r} is none of the points of this call") for key in strangers
        ]
    unified = {}
    for name, table in batch.items():
        try:
            unified[name] = pa.unify_schemas([schemas[name], table.schema], promote_options="permissive")
        except pa.ArrowTypeError as error:
            problems.append(Problem(name, f"a column changed its type: {error}"))
    return unified


def checked_table(name: str, table: pa.Table, problems: list[Problem]) -> pa.Table:
    """An Arrow table with the columns and types of the store."""
    columns = {}
    for column in (*TABLES[name], *sorted(set(table.column_names) - TABLES[name].keys())):
        wanted = TABLES[name].get(column)
        if column not in table.column_names:
            columns[column] = pa.nulls(table.num_rows, wanted)
            continue
        try:
            columns[column] = _typed(table[column], wanted)
        except (pa.ArrowException, ValueError) as error:
            problems.append(Problem(f"{name}.{column}", str(error)))
            columns[column] = pa.nulls(table.num_rows, wanted)
    if columns["key"].null_count:
        problems.append(Problem(f"{name}.key", "missing in a row"))
    return pa.table({column: array for column, array in columns.items() if not pa.types.is_null(array.type)})


def table_of_rows(name: str, rows: Sequence[Mapping[str, Any]], problems: list[Problem]) -> pa.Table:
    """Rows with the columns and types of the store; what a column cannot hold is noted."""
    others = sorted({column for row in rows for column in row} - TABLES[name].keys())
    columns = {}
    for column in (*TABLES[name], *others):
        try:
            array = _array([row.get(column) for row in rows], TABLES[name].get(column))
        except (pa.ArrowException, OverflowError, ValueError) as error:
            problems.append(Problem(f"{name}.{column}", str(error)))
            array = pa.nulls(len(rows), TABLES[name].get(column))
        if not pa.types.is_null(array.type):
            columns[column] = array
    if columns["key"].null_count:
        problems.append(Problem(f"{name}.key", "missing in a row"))
    return pa.table(columns)


def _array(values: list[Any], wanted: pa.DataType | None) -> pa.Array:
    """One column. What its type cannot hold exactly is refused, never rounded or converted."""
    return _typed(
        pa.array(values), wanted
    )  # its own type first: with a type given, pyarrow cuts 1.5 to the integer 1


def _typed(array: pa.Array, wanted: pa.DataType | None) -> pa.Array:
    found = _kind(array.type)
    wanted = wanted or found
    numbers = (_INT, _FLOAT)
    if found not in (wanted, pa.null()) and not (found in numbers and wanted in numbers):
        raise ValueError(f"values of type {found}, the column holds {wanted}")
    array = array.cast(wanted)
    if wanted == _FLOAT and not pc.all(pc.is_finite(array), min_count=0).as_py():
        raise ValueError("NaN or infinite; leave a value out (None) where there is none")
    return array


def _kind(found: pa.DataType) -> pa.DataType:
    if pa.types.is_integer(found):
        return _INT
    if pa.types.is_floating(found):
        return _FLOAT
    if pa.types.is_large_string(found):
        return _STR
    if found not in (_STR, pa.bool_(), pa.null()):
        raise ValueError(f"values of type {found}; a column holds text, numbers or truth values")
    return found


def concat(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables one below the other; a column that one of them lacks is null there."""
    return pa.concat_tables(tables, promote_options="permissive")


def without(table: pa.Table, keys: Collection[str]) -> pa.Table:
    """The rows of a table whose key is not among ``keys``."""
    if not keys:
        return table
    return table.filter(pc.invert(pc.is_in(table["key"], pa.array(keys, _STR))))


def detail_frames(key: str, report: Report) -> dict[str, pd.DataFrame]:
    """The rows of a point in the detail tables."""
    layers = report.layers.assign(utilization=report.layers["pe_utilization"])
    frames = {"layers": layers, "energy": report.energy, "storage": report.storage}
    return {name: frame.assign(key=key)[list(TABLES[name])] for name, frame in frames.items()}
