"""Tables of the command line: they fit the terminal, and nothing of a name or a number is lost on the way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwsim.tables import format_table

KNEES = [
    {"block": "4x4", "ratios": "0.75 0.25", "queue_depth": 8, "latency_ms": 0.25, "peak bandwidth": 1.5e9},
    {"block": "16x16", "ratios": "0.5 0.5", "queue_depth": 16, "latency_ms": 12.5, "peak bandwidth": 12.8},
]


def names_of(table: str, rows: int) -> list[list[str]]:
    """The words of the lines above the rows."""
    return [line.split() for line in table.splitlines()[:-rows]]


def test_a_table_that_fits_stands_as_it_is() -> None:
    table = format_table(KNEES, 100)
    assert names_of(table, 2) == [["block", "ratios", "queue_depth", "latency_ms", "peak", "bandwidth"]]
    width = max(map(len, table.splitlines()))
    assert format_table(KNEES, width) == table
    folded = format_table(KNEES, width - 1)
    assert max(map(len, folded.splitlines())) < width
    assert len(folded.splitlines()) == 4


def test_names_are_folded_before_texts_are_cut() -> None:
    table = format_table(KNEES, 48)
    assert max(map(len, table.splitlines())) <= 48
    assert "…" not in table
    words = [word for line in names_of(table, 2) for word in line]
    assert sorted(words) == sorted(
        ["block", "ratios", "queue_", "depth", "latency_", "ms", "peak", "bandwidth"]
    )
    for number in ("0.25", "12.50", "1.5G", "12.80"):
        assert number in table


def test_the_widest_text_is_cut_first() -> None:
    rows = [{"machine": "m" * 30, "reason": "r" * 20, "count": 3}]
    assert format_table(rows, 50).splitlines()[1].split() == ["…" + "m" * 20, "r" * 20, "3"]
    both = format_table(rows, 30).splitlines()[1].split()
    assert max(map(len, format_table(rows, 30).splitlines())) <= 30
    assert both[0][0] == both[1][0] == "…"
    assert both[2] == "3"


@given(
    st.lists(
        st.from_regex(r"[a-z]{1,9}([_. ][a-z]{1,9}){0,3}", fullmatch=True),
        min_size=1,
        max_size=8,
        unique=True,
    ),
    st.integers(10, 120),
)
def test_no_letter_of_a_name_is_lost(names: list[str], width: int) -> None:
    lines = format_table([dict.fromkeys(names, 7)], width).splitlines()
    letters = sorted("".join(lines[:-1]).replace(" ", ""))
    assert letters == sorted("".join(names).replace(" ", ""))
    assert lines[-1].split() == ["7"] * len(names)


@pytest.mark.parametrize("width", [1, 20])
def test_where_nothing_helps_the_table_is_wider_and_whole(width: int) -> None:
    assert format_table([{"latencycycles": 123456, "text": "abcdef"}], width).splitlines()[-1].split() == [
        "123k",
        "abcdef",
    ]
