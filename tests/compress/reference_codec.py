"""A second decoder of the entropy-coded form, written from docs/formats.md alone: plain Python, one symbol after the other."""

from __future__ import annotations

import math
import struct
import zlib
from typing import Any

WEIGHTS = [0] + [(128 if i % 2 == 0 else 181) << (i // 2) for i in range(47)]
STEP_WEIGHTS = [max(1, 4096 >> (i // 2)) for i in range(95)]


class Bytes:
    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def raw(self, count: int) -> bytes:
        self.at += count
        return self.content[self.at - count : self.at]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.raw(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def text(self) -> str:
        return self.raw(self.varint()).decode()

    def checksum(self, start: int = 0) -> None:
        expected = zlib.crc32(self.content[start : self.at])
        assert struct.unpack("<I", self.raw(4))[0] == expected


class Ans:
    """A 64-bit state over a stack of 32-bit words; probabilities have 24 bits."""

    def __init__(self, content: bytes) -> None:
        self.words = list(struct.unpack(f"<{len(content) // 4}I", content))
        self.state = 0
        while self.words and self.state < 1 << 32:
            self.state = self.state << 32 | self.words.pop()

    def take(self, weights: list[int]) -> int:
        scale = (2**24 - len(weights)) / float(sum(weights))
        lefts, total = [], 0
        for index, weight in enumerate(weights):
            lefts.append(int(float(total) * scale) + index)
            total += weight
        lefts.append(2**24)
        quantile = self.state % 2**24
        symbol = max(index for index in range(len(weights)) if lefts[index] <= quantile)
        self.state = (self.state >> 24) * (lefts[symbol + 1] - lefts[symbol]) + quantile - lefts[symbol]
        if self.state < 1 << 32 and self.words:
            self.state = self.state << 32 | self.words.pop()
        return symbol


def unzigzag(value: int) -> int:
    return value // 2 if value % 2 == 0 else -(value // 2) - 1


def read_tables(ans: Ans, classes: int, symbols: int) -> list[list[int]]:
    code, tables = 0, []
    for index in range(classes):
        codes = []
        for _ in range(symbols):
            code += unzigzag(ans.take(STEP_WEIGHTS))
            codes.append(WEIGHTS[code])
        tables.append(codes[::-1] if index % 2 else codes)
    return tables


class Kind:
    """Alphabet, levels and tables of one kind of symbol."""

    def __init__(self, source: Bytes) -> None:
        count = source.varint()
        self.values, self.flat, self.levels = [], True, (1, 1)
        self.row_weights: list[int] = []
        if not count:
            return
        self.values = [unzigzag(source.varint())]
        step = source.varint() if count > 1 else 0
        for _ in range(count - 1):
            self.values.append(self.values[-1] + (step or source.varint()))
        if count > 1:
            self.flat = bool(source.varint())
            if not self.flat:
                self.levels = (source.varint(), source.varint())

    def read_tables(self, ans: Ans, columns: int) -> None:
        self.columns = [0] * columns
        self.tables = [[128] * len(self.values)]
        if self.flat:
            return
        rows, cols = self.levels
        self.tables = read_tables(ans, rows + cols - 1, len(self.values))
        if rows > 1:
            self.row_weights = read_tables(ans, 1, rows)[0]
        if cols > 1:
            weights = read_tables(ans, 1, cols)[0]
            self.columns = [ans.take(weights) for _ in range(columns)]

    def take(self, ans: Ans, cells: list[tuple[int, int]], rows: int) -> dict[tuple[int, int], int]:
        """The values of some cells ``(row, column)``, which are in order."""
        if not cells:
            return {}
        if len(self.values) == 1:
            return dict.fromkeys(cells, self.values[0])
        levels = [ans.take(self.row_weights) if self.row_weights else 0 for _ in range(rows)]
        found = {}
        for index, table in enumerate(self.tables):
            for row, column in cells:
                if levels[row] + self.columns[column] == index:
                    found[row, column] = self.values[ans.take(table)]
        return found


def decode(content: bytes) -> dict[str, Any]:
    """Per layer ``types``, ``dense``, ``signs``, ``magnitudes`` as flat dicts, and what the header says."""
    source = Bytes(content)
    assert source.raw(4) == b"HWSC"
    assert source.varint() == 1
    heads = []
    for _ in range(source.varint()):
        head: dict[str, Any] = {"name": source.text()}
        head["shape"] = [source.varint() for _ in range(source.varint())]
        head["groups"] = source.varint()
        head["block"] = (source.varint(), source.varint())
        head["order"], head["weight_bits"], head["magnitude_bits"], head["relu"] = (
            source.varint() for _ in range(4)
        )
        head["step"] = struct.unpack("<d", source.raw(8))[0]
        head["size"] = source.varint()
        heads.append(head)
    for _ in range(source.varint()):  # other parameters: tested elsewhere
        source.text()
        source.varint()
        for _ in range(source.varint() + 2):
            source.varint()
    source.checksum()
    return {head["name"]: head | layer(Bytes(source.raw(head["size"])), head) for head in heads}


def layer(source: Bytes, head: dict[str, Any]) -> dict[str, Any]:
    groups, (g_o, g_k) = head["groups"], head["block"]
    m, k = head["shape"][0] // groups, math.prod(head["shape"][1:])
    m_blocks, k_blocks = -(-m // g_o), -(-k // g_k)
    kinds = [Kind(source) for _ in range(3)]
    zero_signs = source.varint()
    words = source.varint()
    total_rows = groups * m_blocks
    step = max(1, 2**17 // (g_o * k))
    starts = range(0, total_rows, step)
    sizes = [(source.varint(), source.varint()) for _ in starts]
    ans = Ans(source.raw(4 * words))
    requantizer = b""
    if head["relu"]:
        requantizer = zlib.decompress(source.raw(source.varint()))
    source.checksum()
    for kind, columns in zip(kinds, (k_blocks, k_blocks, k), strict=True):
        kind.read_tables(ans, columns)
    out: dict[str, Any] = {
        "types": {},
        "magnitudes": {},
        "dense": {},
        "signs": {},
        "requantizer": requantizer,
    }
    for start, (group_words, sign_bytes) in zip(starts, sizes, strict=True):
        at = source.at
        ans = Ans(source.raw(4 * group_words))
        signs = source.raw(sign_bytes)
        source.checksum(at)
        block_rows = range(start, min(start + step, total_rows))
        # Real matrix rows of the group, each with its block row.
        rows = [
            (index // m_blocks * m + index % m_blocks * g_o + inner, index - start)
            for index in block_rows
            for inner in range(min(g_o, m - index % m_blocks * g_o))
        ]
        grid = [(row, column) for row in range(len(block_rows)) for column in range(k_blocks)]
        types = kinds[0].take(ans, grid, len(block_rows))
        unified = [cell for cell in grid if types[cell] == 1]
        magnitudes = kinds[1].take(ans, unified, len(block_rows))
        type_of = {
            (row, column): types[block_row, column // g_k]
            for row, (_, block_row) in enumerate(rows)
            for column in range(k)
        }
        dense = kinds[2].take(ans, [cell for cell in type_of if type_of[cell] == 2], len(rows))
        assert not ans.words
        assert ans.state == 0
        signed = [
            (row, column)
            for row, column in type_of
            if type_of[row, column] == 1 and (zero_signs or magnitudes[rows[row][1], column // g_k])
        ]
        assert len(signs) == -(-len(signed) // 8)
        for index, (row, column) in enumerate(signed):
            out["signs"][rows[row][0], column] = signs[index // 8] >> index % 8 & 1
        out["types"] |= {(row + start, column): value for (row, column), value in types.items()}
        out["magnitudes"] |= {(row + start, column): value for (row, column), value in magnitudes.items()}
        out["dense"] |= {(rows[row][0], column): value for (row, column), value in dense.items()}
    assert source.at == len(source.content)
    return out
