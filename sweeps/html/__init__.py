"""The report page of a sweep: one self-contained HTML file."""

from sweeps.html.page import MOST_DETAILS, PAGE_ROWS, render_report, shown_points, write_report

__all__ = ["MOST_DETAILS", "PAGE_ROWS", "render_report", "shown_points", "write_report"]
