"""The paper's figures, each from the tidy tables of a result store, each with the data that it shows.

Every function returns a `Plot`; `save_plot` writes it as PNG, PDF and CSV.
"""

from sweeps.figures.bars import energy_plot, storage_plot
from sweeps.figures.base import Plot, save_plot, to_image, to_svg
from sweeps.figures.dots import accuracy_plot, bandwidth_plot, ratio_plot, speedup_plot
from sweeps.figures.fronts import pareto_plot, roofline_plot
from sweeps.figures.paper import drawn_points, paper_figures

__all__ = [
    "Plot",
    "accuracy_plot",
    "bandwidth_plot",
    "drawn_points",
    "energy_plot",
    "paper_figures",
    "pareto_plot",
    "ratio_plot",
    "roofline_plot",
    "save_plot",
    "speedup_plot",
    "storage_plot",
    "to_image",
    "to_svg",
]
