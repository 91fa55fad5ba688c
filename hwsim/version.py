"""The version of the model: part of the key of every stored result."""

from __future__ import annotations

__all__ = ["MODEL_VERSION"]

MODEL_VERSION = "4"
"""Raised whenever a number that the simulator reports changes: results of an older model are not reused."""
