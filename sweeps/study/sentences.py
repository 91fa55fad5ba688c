"""Sentences of our own, by topic: what a sentence transformer is calibrated and measured on.

Nearest neighbours are looked for among the sentences of the test topics; most lie in the same topic, where ten sentences are
near to each other, so it is seen when distances are kept badly.
"""

from __future__ import annotations

from importlib import resources

__all__ = ["calibration_sentences", "measured_sentences"]


def _topics() -> list[list[str]]:
    text = resources.files("sweeps.study").joinpath("sentences.txt").read_text("utf-8")
    return [part.strip().splitlines() for part in text.split("\n\n") if part.strip()]


def calibration_sentences() -> list[str]:
    """Of every third topic."""
    return [sentence for topic in _topics()[::3] for sentence in topic]


def measured_sentences() -> list[str]:
    """Of all other topics."""
    return [sentence for number, topic in enumerate(_topics()) if number % 3 for sentence in topic]
