"""Figures of value functions: reports in, a matplotlib ``Figure`` out, and pyplot is not touched.

Needs the extra ``experiments``. Save one with ``figure.savefig("calibration.pdf")``; in a report of
``decapod`` its colours follow the page's theme.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, ParamSpec

import numpy as np

from vineppo.diagnostics.curves import TrainTestCurve
from vineppo.diagnostics.intervals import Interval
from vineppo.diagnostics.value_report import ValueReport
from vineppo.errors import InvalidInputError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_P = ParamSpec("_P")
_PANELS: Final = 3  # in a row
_MARKERS: Final = "osD^vP"


def _styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Draw in the look of decapod's reports, leaving the caller's matplotlib settings alone."""

    @wraps(draw)
    def styled(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        try:
            import matplotlib as mpl
        except ImportError as error:
            raise MissingExtraError("matplotlib", "experiments") from error
        with mpl.rc_context(_palette().RCPARAMS):
            return draw(*args, **kwargs)

    return styled


def _palette() -> ModuleType:
    try:
        from decapod.report import palette
    except ImportError as error:
        raise MissingExtraError("decapod", "experiments") from error
    return palette


@_styled
def scatter(reports: Mapping[str, ValueReport]) -> Figure:
    """Prediction against truth, one panel for each value function.

    Args:
        reports: by printed name.

    Raises:
        InvalidInputError: no report.
        MissingExtraError: matplotlib or decapod is not installed.
    """
    palette, names = _palette(), _checked(reports)
    columns = min(_PANELS, len(names))
    rows = -(-len(names) // columns)
    figure, axes = _figure(2.9 * columns + 0.4, 2.9 * rows + 0.3, rows, columns)
    for axis, name in zip(axes, names, strict=False):
        points = reports[name].points
        axis.axline((0, 0), slope=1, color=palette.MUTED, linewidth=0.8)
        axis.plot(
            points.truth, points.predictions, "o", markersize=2.5, alpha=0.35, color=palette.ACCENT
        )
        axis.set_title(f"{name}\nerror {reports[name].mae.value:.3f}")
        axis.set_xlabel("true value")
        axis.set_ylabel("prediction")
        axis.grid(visible=True)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    return figure


@_styled
def error_by_position(reports: Mapping[str, ValueReport]) -> Figure:
    """Mean absolute error along the trajectory, with intervals.

    Args:
        reports: by printed name; made with positions.

    Raises:
        InvalidInputError: no report, or one without positions.
        MissingExtraError: matplotlib or decapod is not installed.
    """
    names = _checked(reports)
    for name in names:
        if not reports[name].by_position:
            raise InvalidInputError(
                f"reports[{name!r}]: expected errors by position, got none; evaluate with positions"
            )
    figure, (axis,) = _figure(5.4, 3.4)
    for index, name in enumerate(names):
        found = reports[name].by_position
        middles = [(b.low + b.high) / 2 + _shift(index, len(names)) for b in found]
        _line(axis, middles, [b.error for b in found], name, index)
    axis.set_xlim(0, 1)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("position of the step in its answer")
    axis.set_ylabel("mean absolute error")
    return _finished(figure, axis)


@_styled
def calibration_curve(reports: Mapping[str, ValueReport]) -> Figure:
    """Mean truth of the states with similar predictions, with intervals.

    Args:
        reports: by printed name.

    Raises:
        InvalidInputError: no report.
        MissingExtraError: matplotlib or decapod is not installed.
    """
    palette, names = _palette(), _checked(reports)
    figure, (axis,) = _figure(4.4, 4.0)
    axis.axline((0, 0), slope=1, color=palette.MUTED, linewidth=0.8)
    for index, name in enumerate(names):
        found = reports[name].calibration.bins
        _line(axis, [b.predicted for b in found], [b.truth for b in found], name, index)
    axis.set_xlabel("mean prediction")
    axis.set_ylabel("mean true value")
    return _finished(figure, axis)


@_styled
def ranking_bars(reports: Mapping[str, ValueReport]) -> Figure:
    """How often the best step is named, and pairs are put in order, with intervals.

    The vertical lines are what a random guess gives.

    Args:
        reports: by printed name; made with candidates.

    Raises:
        InvalidInputError: no report, or one without candidates.
        MissingExtraError: matplotlib or decapod is not installed.
    """
    palette, names = _palette(), _checked(reports)
    panels: list[tuple[str, list[Interval], float]] = [
        ("best of the candidates named", [], 0.0),
        ("pairs in order", [], 0.5),
    ]
    for name in names:
        report = reports[name]
        if report.top1 is None or report.pairwise is None or report.chance is None:
            raise InvalidInputError(
                f"reports[{name!r}]: expected scores of order, got none; evaluate with candidates"
            )
        panels[0][1].append(report.top1)
        panels[1][1].append(report.pairwise)
        panels[0] = (*panels[0][:2], report.chance)
    places = np.arange(len(names))[::-1]
    figure, axes = _figure(7.2, 1.1 + 0.36 * len(names), 1, 2)
    for axis, (title, intervals, chance) in zip(axes, panels, strict=True):
        values = np.array([interval.value for interval in intervals])
        axis.barh(places, values, height=0.6, color=palette.ACCENT, alpha=0.45)
        axis.errorbar(
            values, places, xerr=_reach(intervals), fmt="none", ecolor=palette.INK, elinewidth=1.2
        )
        axis.axvline(chance, color=palette.MUTED, linewidth=0.9, linestyle="--")
        axis.set_title(title)
        axis.set_xlim(0, 1)
        axis.set_yticks(places, names, color=palette.INK)
        axis.grid(visible=True, axis="x")
    axes[1].set_yticklabels([])
    return figure


@_styled
def train_against_test(curves: Mapping[str, TrainTestCurve]) -> Figure:
    """Test accuracy against training accuracy, with the line through the checkpoints.

    Args:
        curves: by printed name.

    Raises:
        InvalidInputError: no curve.
        MissingExtraError: matplotlib or decapod is not installed.
    """
    palette, names = _palette(), _checked(curves, "curves")
    figure, (axis,) = _figure(4.8, 3.8)
    for index, name in enumerate(names):
        curve, colour = curves[name], palette.SERIES[index % len(palette.SERIES)]
        ends = np.array([min(curve.train), max(curve.train)])
        axis.plot(
            curve.train,
            curve.test,
            _MARKERS[index % len(_MARKERS)],
            markersize=4,
            alpha=0.6,
            color=colour,
            label=f"{name}, slope {curve.slope.value:.2f}",
        )
        axis.plot(ends, curve.intercept + curve.slope.value * ends, color=colour)
    axis.set_xlabel("training accuracy")
    axis.set_ylabel("test accuracy")
    return _finished(figure, axis)


def _checked(found: Mapping[str, object], argument: str = "reports") -> list[str]:
    if not found:
        raise InvalidInputError(f"{argument}: expected at least one, got none")
    return list(found)


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _line(axis: Axes, x: Sequence[float], y: Sequence[Interval], name: str, index: int) -> None:
    palette = _palette()
    axis.errorbar(
        x,
        [interval.value for interval in y],
        yerr=_reach(y),
        marker=_MARKERS[index % len(_MARKERS)],
        markersize=4,
        elinewidth=1.0,
        color=palette.SERIES[index % len(palette.SERIES)],
        label=name,
    )


def _reach(intervals: Sequence[Interval]) -> Any:
    """(2, n) lengths of the error bars; none where nothing bounds the value."""
    ends = np.array([(x.value - x.low, x.high - x.value) for x in intervals]).T
    return np.where(np.isfinite(ends), np.maximum(ends, 0), 0)


def _shift(index: int, count: int) -> float:
    """Series side by side, so that their error bars do not hide each other."""
    return 0.012 * (index - (count - 1) / 2)


def _finished(figure: Figure, axis: Axes) -> Figure:
    axis.grid(visible=True)
    axis.legend()
    return figure
