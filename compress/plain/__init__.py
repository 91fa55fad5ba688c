"""Rewriting a network into plain modules, so that everything else needs to know Linear and Conv1d/2d/3d only.

`to_plain` works on a copy and keeps the function to float tolerance; docs/networks.md says what becomes of what, and why.
"""

from __future__ import annotations

from compress.plain.lowering import Change, PlainNetwork, to_plain

__all__ = ["Change", "PlainNetwork", "to_plain"]
