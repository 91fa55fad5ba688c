"""A budget of bytes on disk that the written file keeps: costs from the codec's own output, and a file measured in the end.

Block types are dealt out before there are integers to encode. So a network is compressed, encoded, and its bits per type,
magnitude, sign and dense weight become the prices of the next allocation, until the file fits and little is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.artifact import Artifact, artifact_size
from compress.blocks import real_entries
from compress.budget import Budget, FileRates, LayerRates, type_entropy_bits
from compress.data import Dataset
from compress.fill import UnreachableError
from compress.one_shot import OneShotRecipe
from compress.rebuild import compress_checkpoint
from compress.rules import CompressionConfig, Recipe
from compress.train import Checkpoint
from hwsim.errors import InputError, Problem
from hwsim.layer import DENSE, UNIFIED

__all__ = ["compress_within", "file_rates", "within_file_bytes", "within_measured"]

TOLERANCE = 0.02
"""Share of the budget that may be left."""

MOST_TURNS = 6
"""Compressions before it is given up; two or three do."""

_FEW = 32
"""Symbols from which their bits are measured; with fewer the full width stands, which is an upper estimate."""


def file_rates(artifact: Artifact, preset: str = "small") -> FileRates:
    """The bits per symbol of a file, per layer; all of them together give the size of that very file.

    Parameters
    ----------
    artifact : Artifact
    preset : {"small", "fast"}
    """
    table = artifact.size_report(preset).set_index("layer")
    rates = {name: _layer_rates(artifact, name, table.loc[name]) for name in artifact.compressed}
    inside = float(table.loc[list(artifact.compressed), "total_bytes"].sum())
    return FileRates(rates, float(table["total_bytes"].sum()) - inside)


def _layer_rates(artifact: Artifact, name: str, row: Any) -> LayerRates:
    layer = artifact.compressed[name]
    _, m, k = layer.weights.dense.shape
    entries = np.broadcast_to(real_entries(m, k, layer.block).numpy(), layer.types.shape)
    symbols = {
        "type": type_entropy_bits(layer.types),
        "magnitude": int((layer.types == UNIFIED).sum()),
        "dense": int(entries[layer.types == DENSE].sum()),
        "sign": int(entries[layer.types == UNIFIED].sum()),
    }
    widths = {
        "type": 1.0,
        "magnitude": layer.weights.magnitude_bits,
        "dense": layer.weights.weight_bits,
        "sign": 1.0,
    }
    bits = {
        stream: 8 * float(row[f"{stream}_bytes"]) / count if count >= _FEW else widths[stream]
        for stream, count in symbols.items()
    }
    # What the prices of a few symbols miss goes to what is fixed, so that the sum is the file's.
    priced = sum(bits[stream] * count for stream, count in symbols.items()) / 8
    other = float(row["total_bytes"]) - priced
    return LayerRates(bits["type"], bits["magnitude"], bits["dense"], bits["sign"], other)


def within_file_bytes(
    budget: Budget,
    build: Callable[[Budget, int], Artifact],
    preset: str = "small",
    *,
    tolerance: float = TOLERANCE,
    most_turns: int = MOST_TURNS,
) -> tuple[Artifact, Budget]:
    """The artifact whose file comes nearest to a budget without exceeding it, and the budget with its rates.

    Parameters
    ----------
    budget : Budget
        Of ``file_bytes``.
    build : callable
        ``build(budget, turn)`` allocates and compresses; the same pieces each time. What cannot be dealt out it refuses with
        `compress.fill.UnreachableError`, before anything is compressed.
    preset : {"small", "fast"}
        Of the encoder.
    tolerance : float
        Share of the budget that may be left; then it ends at once.
    most_turns : int

    Raises
    ------
    InputError
        No turn met the budget: with the smallest file that was reached. Or as ``build``.

    Notes
    -----
    Prices that refuse a budget are no proof that no file keeps it: those of the first turn are an upper estimate. So the whole
    budget is tried where less of it was aimed at, and the least network is built and measured, each once.
    """
    kept: tuple[int, Artifact, Budget] | None = None
    sizes: list[int] = []
    aim, misses = budget, 0
    hint = "raise the budget"
    is_whole_tried = is_least_known = False
    for turn in range(most_turns):
        is_least = False
        try:
            built = build(aim, turn)
        except UnreachableError as error:
            hint = error.problems[0].hint
            if error.smallest <= budget.limit and not is_whole_tried:
                is_whole_tried, aim = True, replace(aim, limit=budget.limit)
            elif not is_least_known:
                is_least = is_least_known = True
                aim = replace(aim, limit=error.smallest)
            else:
                break
            built = build(aim, turn)
        artifact, size = _with_size(built, budget, preset)
        sizes.append(size)
        if size <= budget.limit and (kept is None or size > kept[0]):
            kept = size, artifact, aim
        if (1 - tolerance) * budget.limit <= size <= budget.limit and not is_least:
            break
        # Prices are exact for the file that they come from and nearly so beside it: a little is left for that.
        misses += size > budget.limit
        limit = budget.limit * (1 - tolerance * (1 + misses) / 4)
        aim = replace(budget, limit=limit, rates=file_rates(artifact, preset))
    if kept is None:
        how = "cannot be reached" if is_least_known else f"was not met in {len(sizes)} turns"
        message = f"{budget.limit:,.10g} {how}; the smallest file has {min(sizes):,} bytes"
        raise InputError("budget", Problem("file_bytes", message, hint))
    return kept[1], kept[2]


def _with_size(artifact: Artifact, budget: Budget, preset: str) -> tuple[Artifact, int]:
    """The artifact whose results name the budget that was asked for and the file's own bytes; and these."""
    size = 0
    for _ in range(8):  # the number is part of the file, and settles at once or nearly so
        reached = {"quantity": budget.quantity, "limit": budget.limit, "reached": size}
        artifact = replace(artifact, results=artifact.results | {"budget": reached})
        before, size = size, artifact_size(artifact, preset)
        if size == before:
            break
    return artifact, size


def _warned(artifact: Artifact) -> Artifact:
    """With a warning among its results where it costs more than its budget."""
    spent = artifact.results["budget"]
    if spent["reached"] <= spent["limit"]:
        return artifact
    asked = f"{spent['limit']:,.10g} {spent['quantity']}"
    message = f"the trained network does not keep the budget of {asked}: ask for a little less"
    warnings = [*artifact.results["warnings"], message]
    return replace(artifact, results=artifact.results | {"warnings": warnings})


def within_measured(budget: Budget, build: Callable[[Budget, int], Artifact]) -> Artifact:
    """The first artifact whose final types keep a budget of the machine: where blocks lie changes cycles and energy.

    Parameters
    ----------
    budget : Budget
    build : callable
        ``build(budget, turn)``; its ``results["budget"]["reached"]`` says what the final types cost.

    Raises
    ------
    InputError
        No turn met the budget.
    """
    aim, is_least = budget, False
    for turn in range(MOST_TURNS):
        try:
            artifact = build(aim, turn)
        except UnreachableError as error:
            if aim is budget:
                raise
            # It was lowered below the least that can be dealt out: that is what is left to try.
            is_least, aim = True, replace(aim, limit=error.smallest)
            artifact = build(aim, turn)
        reached = artifact.results["budget"]["reached"]
        if reached <= budget.limit:
            stated = artifact.results["budget"] | {"limit": budget.limit}
            return replace(artifact, results=artifact.results | {"budget": stated})
        if is_least:
            break
        aim = replace(aim, limit=max(aim.limit - (reached - budget.limit), np.finfo(np.float64).tiny))
    message = f"{budget.limit:,.10g} was not met in {turn + 1} turns; the last took {reached:,.10g}"
    raise InputError("budget", Problem(budget.quantity, message, "raise the budget"))


def compress_within(
    checkpoint: Checkpoint,
    data: Dataset,
    config: CompressionConfig,
    recipe: Recipe | None = None,
    *,
    budget: Budget | None = None,
    preset: str = "small",
    one_shot: OneShotRecipe | None = None,
    resume_from: str | Path | None = None,
    **options: Any,
) -> Artifact:
    """`compress.rebuild.compress_checkpoint`, with a budget that is kept by what was measured in the end.

    In one shot the network is compressed a few times, until the file, or the machine with the final types, keeps the budget.
    Training is done once: prices of ``file_bytes`` come from turns that only project, so the file may miss the budget by what
    training changes in the integers. ``results["budget"]`` has the budget as it was given and what was reached, of a file its
    own bytes; a trained network that misses it has a warning.

    Parameters
    ----------
    budget : Budget, optional
    preset : {"small", "fast"}
        With which files are encoded.
    one_shot : OneShotRecipe, optional
    resume_from : str or Path, optional
        A folder; each turn of a budget has its own in it.
    checkpoint, data, config, recipe, options
        See `compress.rebuild.compress_checkpoint`.

    Raises
    ------
    InputError
        As `within_file_bytes`, or as `compress.rebuild.compress_checkpoint`.
    """

    def run(aim: Budget | None, method: OneShotRecipe | None, folder: Path | None, **given: Any) -> Artifact:
        return compress_checkpoint(
            checkpoint, data, config, recipe, budget=aim, one_shot=method, resume_from=folder, **given
        )

    root = None if resume_from is None else Path(resume_from)

    def turn_of(aim: Budget, turn: int) -> Artifact:
        return run(aim, one_shot, None if root is None else root / f"turn-{turn}", **options)

    if budget is None:
        return run(None, one_shot, root, **options)
    is_file = budget.quantity == "file_bytes"
    if one_shot is not None:
        return within_file_bytes(budget, turn_of, preset)[0] if is_file else within_measured(budget, turn_of)
    if not is_file:
        return _warned(run(budget, None, root, **options))
    rehearsed = options | {"max_loss": 0.0, "progress": None}
    projection = OneShotRecipe(method="projection")
    _, priced = within_file_bytes(budget, lambda aim, _: run(aim, projection, None, **rehearsed), preset)
    trained, _ = _with_size(run(priced, None, root, **options), budget, preset)
    return _with_size(_warned(trained), budget, preset)[0]
