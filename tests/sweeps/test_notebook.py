"""The example notebook runs from top to bottom, and what it makes shows itself."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook test needs nbformat, nbclient and ipykernel")
pytest.importorskip("ipykernel", reason="the notebook test needs nbformat, nbclient and ipykernel")
nbclient = pytest.importorskip("nbclient", reason="the notebook test needs nbformat, nbclient and ipykernel")

NOTEBOOK = Path(__file__).parents[2] / "docs" / "example.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The HTML that each code cell shows."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": folder}}
    ).execute()
    return [
        "".join(output.get("data", {}).get("text/html", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_it_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_every_cell_shows_what_it_made(executed: list[str]) -> None:
    report, explanation, difference, results, front = executed
    assert "lenet5 on msa-16x16" in report
    assert "where the cycles went" in explanation.lower() or "work on real weights" in explanation
    assert "machine.dram.gb_per_s" in difference
    assert "<svg" in results
    assert "18 configurations" in results
    assert "latency_ms" in front
