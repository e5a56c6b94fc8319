"""The report: one self-contained HTML file, plus Markdown and JSON, from the outcomes of a run.

Libraries draw with :mod:`decapod.report.palette` and :func:`svg_from_matplotlib`, and may make a
page of their own in the same look with :func:`render_page`.
"""

from decapod.report import palette
from decapod.report.build import ReportError, build
from decapod.report.figures import svg_from_matplotlib
from decapod.report.page import Section, render_page

__all__ = ["ReportError", "Section", "build", "palette", "render_page", "svg_from_matplotlib"]
