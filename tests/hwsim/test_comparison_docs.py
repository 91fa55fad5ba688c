"""The tables of docs/comparison.md are what the program says. ``python tests/hwsim/test_comparison_docs.py`` rewrites them."""

from __future__ import annotations

import sys
from pathlib import Path

from compress.zoo_shapes import zoo_shapes
from hwsim.comparison import compare
from hwsim.layer import random_layers

PAGE = Path(__file__).parents[2] / "docs" / "comparison.md"
BEGIN, END = "<!-- generated: begin -->\n", "<!-- generated: end -->"


def tables() -> str:
    layers = random_layers(zoo_shapes("resnet18"), (4, 4), 0.5, 0.5, seed=0)
    text = str(compare("msa-16x16", layers, network="resnet18"))
    return f"```text\n{text.split('Only cost')[0].rstrip()}\n```\n"


def parts(page: str) -> tuple[str, str, str]:
    before, rest = page.split(BEGIN)
    middle, after = rest.split(END)
    return before, middle, after


def test_the_page_shows_what_the_command_prints() -> None:
    assert parts(PAGE.read_text("utf-8"))[1] == tables()


if __name__ == "__main__":
    before, middle, after = parts(PAGE.read_text("utf-8"))
    fresh = tables()
    sys.stdout.write("unchanged\n" if fresh == middle else f"was\n{middle}\nis\n{fresh}\n")
    PAGE.write_text(before + BEGIN + fresh + END + after, "utf-8")
