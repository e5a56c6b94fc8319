"""How the benches draw: one canvas in the report's look, rows of dots, a legend above."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from decapod.claims import Figure
from decapod.report import palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = npt.NDArray[np.float64]


def figure(
    draw: Callable[[Any], None],
    columns: int,
    *,
    title: str,
    caption: str,
    alt: str,
    size: tuple[float, float] | None = None,
    sharey: bool = True,
) -> Figure:
    """Panels side by side, drawn by ``draw(panels)`` with ``panels[0][column]``.

    Args:
        draw: what fills the panels.
        columns: number of panels.
        title: of the figure.
        caption: what is drawn.
        alt: the numbers, for who cannot see it.
        size: width and height in inches.
        sharey: all panels have the vertical axis of the first.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    from decapod.report import svg_from_matplotlib

    with mpl.rc_context(palette.RCPARAMS):
        canvas = Canvas(figsize=size or (3.0 + 2.6 * columns, 4.2), layout="constrained")
        draw(canvas.subplots(1, columns, squeeze=False, sharey=sharey))
        svg = svg_from_matplotlib(canvas)
    return Figure(title=title, svg=svg, caption=caption, alt=alt)


def standalone(figure: Figure) -> str:
    """The figure as an SVG file of its own, light or dark as its reader is.

    In the report the page says what the colours are; a file has to bring them.
    """

    def colours(theme: dict[str, str]) -> str:
        return "".join(f"--{name}:{value};" for name, value in theme.items())

    style = (
        f"<style>svg:root{{--sans:system-ui,sans-serif;{colours(palette.LIGHT)}}}"
        f"@media (prefers-color-scheme:dark){{svg:root{{{colours(palette.DARK)}}}}}</style>"
    )
    head, closing, rest = figure.svg.partition(">")
    return f"{head}{closing}{style}{rest}\n"


def row_of_dots(axes: Axes, row: int, x: Floats, middle: float, colour: str) -> None:
    """Single values as dots, their middle as a bar."""
    axes.plot(x, np.full(len(x), row), ".", color=colour, markersize=4, alpha=0.6)
    axes.plot([middle], [row], "|", color=colour, markersize=12, markeredgewidth=2)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names of the rows, the first on top."""
    axes.set_yticks(range(len(names)), names)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()


def legend_above(axes: Axes, columns: int) -> None:
    """One legend for all panels, of what is drawn in ``axes``."""
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, loc="outside upper center", ncols=columns)
