"""Messages: one family, every problem at once, the nearest name, and a message that survives a process border."""

from __future__ import annotations

import concurrent.futures
import multiprocessing

import pytest

from hwsim.errors import FitError, FormatError, HwsimError, InputError, Problem, nearest_name


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem("array.rows", "0, must be at least 1"), "array.rows: 0, must be at least 1"),
        (Problem("", "no such file"), "no such file"),
        (Problem("a", "unknown", "try b"), "a: unknown (try b)"),
        (Problem("", "unknown", "try b"), "unknown (try b)"),
    ],
)
def test_a_problem_reads_as_field_message_hint(problem: Problem, text: str) -> None:
    assert str(problem) == text


def test_one_problem_is_one_line() -> None:
    error = InputError("m.toml", Problem("array.rows", "0"))
    assert str(error) == "m.toml: array.rows: 0"
    assert str(InputError("m.toml", "not TOML")) == "m.toml: not TOML"
    assert str(InputError("m.toml", [Problem("", "not TOML")])) == "m.toml: not TOML"


def test_several_problems_are_a_list() -> None:
    error = InputError("m.toml", [Problem("a", "1"), Problem("b", "2", "c")])
    assert str(error) == "m.toml: 2 problems\n  - a: 1\n  - b: 2 (c)"
    assert error.source == "m.toml"
    assert [problem.field for problem in error.problems] == ["a", "b"]


def test_one_family() -> None:
    for error in (InputError("s", "x"), FormatError("s", "x"), FitError("x")):
        assert isinstance(error, HwsimError)
    assert isinstance(FormatError("s", "x"), InputError)
    assert isinstance(InputError("s", "x"), ValueError)
    assert not isinstance(FitError("x"), ValueError)


@pytest.mark.parametrize(
    ("name", "allowed", "hint"),
    [
        ("colums", ["rows", "columns"], 'did you mean "columns"?'),
        ("Rows", ["rows", "columns"], 'did you mean "rows"?'),
        ("rows", ["rows", "columns"], 'did you mean "rows"?'),
        ("zzz", ["rows", "columns"], "allowed: columns, rows"),
        ("", ["b", "a"], "allowed: a, b"),
    ],
)
def test_nearest_name(name: str, allowed: list[str], hint: str) -> None:
    assert nearest_name(name, allowed) == hint


def raise_input_error() -> None:
    raise FormatError("file", [Problem("a", "1"), Problem("b", "2", "c")])


def test_an_error_keeps_its_problems_across_processes() -> None:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        error = pool.submit(raise_input_error).exception()
    assert isinstance(error, FormatError)
    assert error.problems == (Problem("a", "1"), Problem("b", "2", "c"))
    assert str(error) == "file: 2 problems\n  - a: 1\n  - b: 2 (c)"
