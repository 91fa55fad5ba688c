"""Symbols on a grid, coded with one frequency table per class of cells. The coder is constriction's ANS.

The class of a cell is the level of its row plus the level of its column. Levels say how rare or how large the symbols of a
row or column are, as the encoder saw them; they are coded first, so that the decoder knows every class before the first symbol
and a whole class is one call of the coder. (Contexts of decoded neighbours would need a call per symbol: measured
130 ns and more, against 18 ns in a batch.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from hwsim.errors import FormatError, Problem

__all__ = [
    "MAX_LEVELS",
    "MAX_SYMBOLS",
    "AnsReader",
    "AnsWriter",
    "Grid",
    "Tables",
    "choose_levels",
    "class_counts",
    "entropy_bits",
]

MAX_SYMBOLS = 1 << 16
"""Size of an alphabet: integers of 16 bits."""

MAX_LEVELS = 32
"""Levels of rows, and of columns; so at most 63 classes."""

MAX_WEIGHT_CODE = 47
"""A frequency is one of 0 and ``128 · 2**(i/2)`` rounded, i = 0 … 46: a table costs a few bits per symbol, and a frequency
that is off by 19 % at most costs 0.3 % of the rate.
"""

_WEIGHTS = np.array(
    [0, *((128 if i % 2 == 0 else 181) << (i // 2) for i in range(MAX_WEIGHT_CODE))], np.float64
)

_STEP_WEIGHTS = np.array([max(1, 4096 >> (i // 2)) for i in range(2 * MAX_WEIGHT_CODE + 1)], np.float64)
"""Frequencies of the zigzag difference between the codes of neighbouring symbols."""

MAX_SHARED_SYMBOLS = 1 << 10
"""Largest alphabet whose models are kept for the next group."""

_STRIP_CELLS = 1 << 16
"""Cells of a grid whose symbols are counted together."""

Levels = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Of the rows and of the columns of a grid."""

_stream = constriction.stream


@lru_cache(maxsize=256)
def _shared_model(weights: bytes) -> Any:
    return _stream.model.Categorical(np.frombuffer(weights, np.float64), perfect=False)


def _model_of(weights: NDArray[np.float64]) -> Any:
    """constriction's model of a frequency table; equal small tables share one, large ones are not worth keeping."""
    if weights.size > MAX_SHARED_SYMBOLS:
        return _stream.model.Categorical(weights, perfect=False)
    return _shared_model(weights.tobytes())


class AnsWriter:
    """Collects calls in the order in which they will be decoded."""

    def __init__(self) -> None:
        self._calls: list[tuple[NDArray[np.int32], Any]] = []

    def put(self, symbols: NDArray[np.integer], weights: NDArray[np.float64]) -> None:
        """Symbols ``[n]``, indices into ``weights``."""
        if symbols.size:
            self._calls.append((np.ascontiguousarray(symbols, np.int32), _model_of(weights)))

    def words(self) -> NDArray[np.uint32]:
        """The compressed words. ANS is a stack: the last call is pushed first."""
        coder = _stream.stack.AnsCoder()
        for symbols, model in reversed(self._calls):
            coder.encode_reverse(symbols, model)
        return coder.get_compressed()


class AnsReader:
    """Takes symbols from compressed words.

    Raises
    ------
    FormatError
        Words that no encoder writes.
    """

    def __init__(self, words: NDArray[np.uint32], source: str) -> None:
        self.source = source
        try:
            self._coder = _stream.stack.AnsCoder(words)
        except ValueError as error:
            raise FormatError(source, f"entropy-coded words: {error}") from None

    def take(self, count: int, weights: NDArray[np.float64]) -> NDArray[np.int32]:
        """So many symbols."""
        if not count:
            return np.zeros(0, np.int32)
        return self._coder.decode(_model_of(weights), count)

    def end(self) -> None:
        """All words must be used up: the last guard against a table that is not the encoder's."""
        if not self._coder.is_empty():
            raise FormatError(self.source, "entropy-coded words are left over: damaged")


# --- frequency tables


@dataclass(frozen=True)
class Tables:
    """Frequencies of the symbols of each class.

    Attributes
    ----------
    codes : uint8 array ``[classes, symbols]``
        0: never occurs; else the frequency ``_WEIGHTS[code]``. Some code of a class is above 0.
    """

    codes: NDArray[np.uint8]

    @classmethod
    def of_counts(cls, counts: NDArray[np.int64]) -> Tables:
        """The nearest tables to counts ``[classes, symbols]``; a class without a symbol gets 1 for the first."""
        most = np.maximum(counts.max(axis=1, keepdims=True), 1)
        # The largest count of a class gets the top of a range that its own size warrants: rare symbols keep their ratio.
        top = np.minimum(np.ceil(2 * np.log2(most)) + 1, MAX_WEIGHT_CODE)
        codes = np.rint(top + 2 * np.log2(np.maximum(counts, 1e-300) / most))
        codes = np.where(counts > 0, np.maximum(codes, 1), 0).astype(np.uint8)
        codes[~counts.any(axis=1), 0] = 1
        return cls(codes)

    def weights(self, index: int) -> NDArray[np.float64]:
        """The frequencies of one class."""
        return _WEIGHTS[self.codes[index]]

    def bits(self) -> NDArray[np.float64]:
        """What each symbol costs in each class: ``[classes, symbols]``; what never occurs costs 24 bits."""
        weights = _WEIGHTS[self.codes]
        shares = weights / weights.sum(axis=1, keepdims=True)
        return -np.log2(np.maximum(shares, 2.0**-24))

    def write(self, ans: AnsWriter) -> None:
        """Differences of neighbouring codes, class by class, the first against the first of the class before."""
        ans.put(_zigzag(np.diff(self._chain(self.codes))), _STEP_WEIGHTS)

    @classmethod
    def read(cls, ans: AnsReader, classes: int, symbols: int) -> Tables:
        """The inverse of `write`."""
        steps = ans.take(classes * symbols, _STEP_WEIGHTS)
        chain = np.cumsum(np.where(steps % 2 == 0, steps >> 1, -(steps >> 1) - 1), dtype=np.int64)
        codes = np.zeros((classes, symbols), np.int64)
        flat = chain.reshape(classes, symbols)
        codes[0::2], codes[1::2] = flat[0::2], flat[1::2, ::-1]
        if codes.min(initial=0) < 0 or codes.max(initial=0) > MAX_WEIGHT_CODE or not codes.any(axis=1).all():
            raise FormatError(ans.source, Problem("tables", "a frequency that does not exist: damaged"))
        return cls(codes.astype(np.uint8))

    @staticmethod
    def _chain(codes: NDArray[np.uint8]) -> NDArray[np.int64]:
        """All codes in a snake, every second class backwards, so that neighbours are alike; 0 in front."""
        snake = codes.astype(np.int64)
        snake[1::2] = snake[1::2, ::-1].copy()
        return np.concatenate(([0], snake.ravel()))


def _zigzag(values: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.where(values >= 0, 2 * values, -2 * values - 1)


def entropy_bits(counts: NDArray[np.int64]) -> float:
    """Bits of symbols with these counts ``[classes, symbols]`` in ideal code, with an estimate for the tables."""
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    return float(-(counts * np.log2(np.where(counts > 0, shares, 1))).sum() + 3.0 * counts.size)


# --- symbols on a grid


@dataclass(frozen=True, eq=False)
class Grid:
    """How the symbols of one kind are coded, all over a layer.

    Attributes
    ----------
    row_levels : uint8 array ``[rows]``
    column_levels : uint8 array ``[columns]``
    tables : Tables
        Classes are sums of a row's and a column's level.
    """

    row_levels: NDArray[np.uint8]
    column_levels: NDArray[np.uint8]
    tables: Tables

    def classes(self, rows: slice, mask: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
        """The class of every cell of some rows that carries a symbol, in the order of the cells."""
        sums = self.row_levels[rows, None] + self.column_levels[None, :]
        return sums.ravel() if mask is None else sums[mask]

    def put(
        self,
        ans: AnsWriter,
        symbols: NDArray[np.integer],
        rows: slice,
        mask: NDArray[np.bool_] | None,
    ) -> None:
        """Code the symbols of some rows, class after class."""
        if len(self.tables.codes) == 1:
            ans.put(symbols, self.tables.weights(0))
            return
        for index, chosen in _by_class(self.classes(rows, mask), len(self.tables.codes)):
            ans.put(symbols[chosen], self.tables.weights(index))

    def take(
        self, ans: AnsReader, rows: slice, mask: NDArray[np.bool_] | None, count: int
    ) -> NDArray[np.int32]:
        """The inverse of `put`: ``count`` symbols, one for each cell that the mask shows."""
        if len(self.tables.codes) == 1:
            return ans.take(count, self.tables.weights(0))
        symbols = np.empty(count, np.int32)
        for index, chosen in _by_class(self.classes(rows, mask), len(self.tables.codes)):
            symbols[chosen] = ans.take(len(chosen), self.tables.weights(index))
        return symbols


def _by_class(classes: NDArray[np.uint8], count: int) -> list[tuple[int, NDArray[np.intp]]]:
    """The places of each class, ascending."""
    order = np.argsort(classes, kind="stable")
    ends = np.cumsum(np.bincount(classes, minlength=count))
    return [
        (index, order[start:stop])
        for index, (start, stop) in enumerate(zip((0, *ends[:-1]), ends, strict=True))
    ]


def choose_levels(
    symbols: NDArray[np.integer],
    size_of: NDArray[np.float64],
    mask: NDArray[np.bool_],
    scale: Callable[[NDArray[np.float64], float], NDArray[np.float64]],
    steps: tuple[float, ...],
) -> Levels:
    """Row and column levels that make the symbols cheapest, or none (all 0) where none pay.

    Parameters
    ----------
    symbols : integer array ``[n]``
        One for each cell that the mask shows.
    size_of : float64 array ``[alphabet]``
        Of each symbol: what a level stands for the mean of.
    mask : bool array ``[rows, columns]``
    scale : callable
        Maps means to the scale on which levels are even steps; its second argument is the mean of all.
    steps : tuple of float
        Distances of neighbouring levels to try; with more than one, also levels of only the rows or only the columns. Empty: no
        levels.

    Returns
    -------
    row_levels, column_levels : uint8 arrays
    """
    rows, columns = mask.shape
    none = (np.zeros(rows, np.uint8), np.zeros(columns, np.uint8))
    if symbols.size < 64 or not steps:
        return none
    means = _scaled_means(symbols, size_of, mask, scale)

    def cost(levels: Levels) -> float:
        sides = sum(entropy_bits(np.bincount(part)[None]) for part in levels if part.any())
        return entropy_bits(class_counts(symbols, levels, mask, len(size_of))) + sides

    tried = [(_levels(means[0], step), _levels(means[1], step)) for step in steps]
    best = min(tried, key=cost)
    others = [none] if len(steps) == 1 else [none, (best[0], none[1]), (none[0], best[1])]
    return min([best, *others], key=cost)


def class_counts(
    symbols: NDArray[np.integer], levels: Levels, mask: NDArray[np.bool_], alphabet: int
) -> NDArray[np.int64]:
    """How often each symbol occurs in each class: ``int64[classes, alphabet]``."""
    top = sum(int(part.max(initial=0)) for part in levels) + 1
    if top == 1:
        return np.bincount(symbols, minlength=alphabet)[None]
    counts = np.zeros(top * alphabet, np.int64)
    for rows, shown, part in _strips(symbols, mask, counts.size):
        classes = (levels[0][rows, None] + levels[1])[shown]
        counts += np.bincount(classes * np.int64(alphabet) + part, minlength=counts.size)
    return counts.reshape(top, alphabet)


def _strips(
    symbols: NDArray[np.integer], mask: NDArray[np.bool_], least: int = 0
) -> Iterator[tuple[slice, NDArray[np.bool_], NDArray[np.integer]]]:
    """Some rows after others, with their part of the mask and their symbols: index arrays are of 64 bits."""
    step = -(-max(_STRIP_CELLS, least) // max(1, mask.shape[1]))
    at = 0
    for first in range(0, len(mask), step):
        shown = mask[first : first + step]
        count = int(np.count_nonzero(shown))
        yield slice(first, first + len(shown)), shown, symbols[at : at + count]
        at += count


def _scaled_means(
    symbols: NDArray[np.integer],
    size_of: NDArray[np.float64],
    mask: NDArray[np.bool_],
    scale: Callable[[NDArray[np.float64], float], NDArray[np.float64]],
) -> list[NDArray[np.float64]]:
    """The mean of each row and of each column, drawn a little to the mean of all, on a scale."""
    totals, numbers = ([np.zeros(count) for count in mask.shape] for _ in range(2))
    for rows, shown, part in _strips(symbols, mask):
        sizes = size_of[part]
        here = rows, slice(None)
        for axis, index in enumerate(np.nonzero(shown)):
            totals[axis][here[axis]] += np.bincount(index, sizes, shown.shape[axis])
            numbers[axis][here[axis]] += np.bincount(index, minlength=shown.shape[axis])
    mean = float(totals[0].sum()) / symbols.size
    means = [(total + 2 * mean) / (number + 2) for total, number in zip(totals, numbers, strict=True)]
    return [scale(values, mean) for values in means]


def _levels(values: NDArray[np.float64], step: float) -> NDArray[np.uint8]:
    levels = np.rint((values - values.min()) / step)
    return np.minimum(levels, MAX_LEVELS - 1).astype(np.uint8)
