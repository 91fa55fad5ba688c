"""Types, magnitudes and dense weights as symbols: alphabets, and how each kind is coded all over a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.codec.entropy import (
    MAX_LEVELS,
    MAX_SYMBOLS,
    AnsReader,
    AnsWriter,
    Grid,
    Tables,
    choose_levels,
    class_counts,
    entropy_bits,
)
from compress.codec.fields import Reader, Writer, unzigzag, zigzag

__all__ = ["Coding", "ReadCoding", "Sizes", "coding_of", "read_coding", "read_sizes", "write_coding"]

_PART = 1 << 16
"""Values that are looked up together: index arrays are of 64 bits."""

MAX_CLASS_SYMBOLS = 1 << 14
"""Largest alphabet where a layer has more than one class; entries of all tables together stay under a million."""


@dataclass(frozen=True, eq=False)
class _Alphabet:
    """The integers that the symbols 0, 1, 2 … stand for, ascending."""

    values: NDArray[np.int64]

    def write(self, out: Writer) -> None:
        out.varint(len(self.values))
        if not len(self.values):
            return
        out.varint(zigzag(int(self.values[0])))
        steps = np.diff(self.values)
        even = len(steps) > 0 and (steps == steps[0]).all()
        if len(steps):
            out.varint(int(steps[0]) if even else 0)
        if not even:
            for step in steps:
                out.varint(int(step))

    @classmethod
    def read(cls, source: Reader, field: str, low: int, high: int) -> _Alphabet:
        count = source.varint(field, min(high - low + 1, MAX_SYMBOLS))
        if not count:
            return cls(np.zeros(0, np.int64))
        first = unzigzag(source.varint(field, 2 * MAX_SYMBOLS))
        even = source.varint(field, MAX_SYMBOLS) if count > 1 else 0
        steps = [even or source.varint(field, MAX_SYMBOLS, 1) for _ in range(count - 1)]
        values = first + np.concatenate(([0], np.cumsum(steps, dtype=np.int64))).astype(np.int64)
        if values[0] < low or values[-1] > high:
            raise source.refuse(field, f"{values[0]} to {values[-1]}, must lie in {low} to {high}")
        return cls(values)


def _alphabet_of(values: NDArray[np.integer], *, even: bool) -> tuple[_Alphabet, NDArray[np.int32]]:
    """The alphabet of some values, and the values as symbols.

    With ``even`` the alphabet has every multiple of the greatest common divisor between the extremes, used or not.
    """
    if not values.size:
        return _Alphabet(np.zeros(0, np.int64)), np.zeros(0, np.int32)
    low, high = int(values.min()), int(values.max())
    offsets = values.astype(np.int32)
    offsets -= low
    is_present = np.zeros(high - low + 1, np.bool_)
    parts = [offsets[start : start + _PART] for start in range(0, offsets.size, _PART)]
    for part in parts:
        is_present[part] = True
    present = np.flatnonzero(is_present)
    if not even:
        symbol_of = np.zeros(high - low + 1, np.int32)
        symbol_of[present] = np.arange(len(present))
        for part in parts:
            part[...] = symbol_of[part]
        return _Alphabet(present + low), offsets
    stride = max(1, int(np.gcd.reduce(present)))
    offsets //= stride
    return _Alphabet(np.arange(low, high + 1, stride)), offsets


@dataclass(frozen=True, eq=False)
class Coding:
    """Alphabet and grid of one kind of symbol."""

    alphabet: _Alphabet
    grid: Grid

    @property
    def is_coded(self) -> bool:
        """False where all symbols are alike, or where there are none."""
        return len(self.alphabet.values) > 1


def _plain(rows: int, columns: int) -> Grid:
    return Grid(np.zeros(rows, np.uint8), np.zeros(columns, np.uint8), Tables(np.ones((1, 1), np.uint8)))


def coding_of(
    values: NDArray[np.integer], mask: NDArray[np.bool_], *, kind: str, steps: tuple[float, ...]
) -> tuple[Coding, NDArray[np.int32]]:
    """How the values under a mask are coded best, and they as symbols."""
    alphabet, symbols = _alphabet_of(values, even=kind == "dense")
    count = len(alphabet.values)
    if count < 2:
        return Coding(alphabet, _plain(*mask.shape)), symbols
    rows, columns = np.zeros(mask.shape[0], np.uint8), np.zeros(mask.shape[1], np.uint8)
    if count <= MAX_CLASS_SYMBOLS:
        if kind == "type":
            is_kept = (alphabet.values > 0).astype(np.float64)
            rows, columns = choose_levels(symbols, is_kept, mask, _logit, steps)
        else:
            sizes = np.abs(alphabet.values).astype(np.float64)
            rows, columns = choose_levels(symbols, sizes, mask, _log, steps)
    counts = class_counts(symbols, (rows, columns), mask, count)
    flat = symbols.size * math.log2(count)
    tables = (
        Tables.of_counts(counts) if entropy_bits(counts) < flat else Tables(np.ones((1, count), np.uint8))
    )
    if len(tables.codes) == 1:
        rows, columns = np.zeros_like(rows), np.zeros_like(columns)
    return Coding(alphabet, Grid(rows, columns, tables)), symbols


def _log(means: NDArray[np.float64], mean: float) -> NDArray[np.float64]:
    return np.log(means + mean / 8 + 1e-9)


def _logit(shares: NDArray[np.float64], _: float) -> NDArray[np.float64]:
    inside = np.clip(shares, 1e-3, 1 - 1e-3)
    return np.log(inside / (1 - inside))


def write_coding(out: Writer, ans: AnsWriter, coding: Coding) -> None:
    """Alphabet, number of levels, then (in the words of the header) tables and the levels of the columns."""
    coding.alphabet.write(out)
    if not coding.is_coded:
        return
    grid = coding.grid
    is_flat = bool((grid.tables.codes == 1).all()) and len(grid.tables.codes) == 1
    out.varint(int(is_flat))
    if is_flat:
        return
    row_levels, column_levels = (
        int(part.max(initial=0)) + 1 for part in (grid.row_levels, grid.column_levels)
    )
    out.varint(row_levels)
    out.varint(column_levels)
    grid.tables.write(ans)
    for levels, count in ((grid.row_levels, row_levels), (grid.column_levels, column_levels)):
        if count > 1:
            Tables.of_counts(np.bincount(levels, minlength=count)[None]).write(ans)
    if column_levels > 1:
        counts = np.bincount(grid.column_levels, minlength=column_levels)[None]
        ans.put(grid.column_levels, Tables.of_counts(counts).weights(0))


@dataclass(frozen=True)
class Sizes:
    """What is known of a coding before the words of the header are read."""

    alphabet: _Alphabet
    is_flat: bool
    row_levels: int
    column_levels: int


def read_sizes(source: Reader, field: str, low: int, high: int) -> Sizes:
    alphabet = _Alphabet.read(source, field, low, high)
    if len(alphabet.values) < 2 or source.varint(field, 1):
        return Sizes(alphabet, True, 1, 1)
    row_levels = source.varint(f"{field}.row_levels", MAX_LEVELS, 1)
    column_levels = source.varint(f"{field}.column_levels", MAX_LEVELS, 1)
    if row_levels + column_levels > 2 and len(alphabet.values) > MAX_CLASS_SYMBOLS:
        raise source.refuse(field, f"{len(alphabet.values)} symbols in several classes")
    return Sizes(alphabet, False, row_levels, column_levels)


@dataclass(frozen=True, eq=False)
class ReadCoding:
    coding: Coding
    row_tables: Tables | None


def read_coding(ans: AnsReader, sizes: Sizes, rows: int, columns: int) -> ReadCoding:
    plain, count = _plain(rows, columns), len(sizes.alphabet.values)
    if sizes.is_flat:
        flat = Tables(np.ones((1, max(count, 1)), np.uint8))
        return ReadCoding(Coding(sizes.alphabet, Grid(plain.row_levels, plain.column_levels, flat)), None)
    tables = Tables.read(ans, sizes.row_levels + sizes.column_levels - 1, count)
    of_rows = Tables.read(ans, 1, sizes.row_levels) if sizes.row_levels > 1 else None
    of_columns = Tables.read(ans, 1, sizes.column_levels) if sizes.column_levels > 1 else None
    column_levels = plain.column_levels
    if of_columns is not None:
        column_levels = ans.take(columns, of_columns.weights(0)).astype(np.uint8)
    return ReadCoding(Coding(sizes.alphabet, Grid(plain.row_levels, column_levels, tables)), of_rows)
