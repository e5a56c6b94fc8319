"""Figures of the gap: each takes reports and gives a matplotlib `Figure`, without touching pyplot.

Needs the extra `plot`. Save one with `figure.savefig("gap.pdf")`. Everything that a figure shows is
also written in it, on the left, so that it can be read on a narrow screen and in print.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, ParamSpec

import numpy as np

from gsm_compose.errors import MissingExtraError, StatisticsError
from gsm_compose.gap import GapReport
from gsm_compose.outcomes import CATEGORIES
from gsm_compose.stats import Interval
from gsm_compose.tables import percent, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of decapod's reports, whose page swaps these very colours for its dark theme.
INK: Final = "#1d1c1a"
MUTED: Final = "#5e5a52"
GRID: Final = "#dfdad0"
SURFACE: Final = "#fffefb"
ACCENT: Final = "#0e5a6b"
SERIES: Final = ("#1f62a6", "#b14a16", "#2a6f4c", "#7b4397", "#8a6100", "#a8325e")

_GAIN, _LOSS = SERIES[0], SERIES[1]  # blue and orange: told apart by all common colour vision
_STYLE: Final[dict[str, Any]] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "butt",
    "font.size": 10,
}
_WIDTH: Final = 3.5  # inches: a phone's screen, at the size of its text
_LONGEST_NAME: Final = 38
_LINE: Final = 0.075  # height of a line and width of a letter,
_LETTER: Final = 0.0235  # as shares of a square figure's axis

_P = ParamSpec("_P")
Reports = Mapping[str, GapReport]


def _styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Run `draw` under the style above, leaving the caller's matplotlib settings alone."""

    @wraps(draw)
    def styled(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        try:
            import matplotlib as mpl
        except ImportError as error:
            raise MissingExtraError("matplotlib", "plot") from error
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def plot_gap(reports: Reports) -> Figure:
    """Δ = S_comp − S1·S2 of every model as a bar with its interval, and the paired Δ as a diamond.

    Args:
        reports: by name of the model, drawn from top to bottom.

    Raises:
        StatisticsError: no report.
        MissingExtraError: matplotlib is not installed.
    """
    _check(reports)
    figure, axis = _figure(height=0.8 + 0.82 * len(reports))
    for row, (name, report) in enumerate(reports.items()):
        delta, paired = report.delta, report.delta_paired
        _write(axis, row - 0.3, _shortened(name))
        _write(axis, row - 0.06, f"Δ {points(delta)}   paired {points(paired)}", quiet=True)
        axis.barh(row + 0.22, 100 * delta.value, 0.2, color=ACCENT, alpha=0.3, linewidth=0)
        _whisker(axis, delta, row + 0.22, ACCENT, "o")
        _whisker(axis, paired, row + 0.42, _LOSS, "D")
    bounds = [
        b for r in reports.values() for i in (r.delta, r.delta_paired) for b in (i.low, i.high)
    ]
    _rows(axis, len(reports), 100 * np.array([*bounds, 0.0]), "percentage points")
    axis.axvline(0, color=MUTED, linewidth=0.9)
    _legend(figure, [("o", ACCENT, "Δ = S_comp − S1·S2"), ("D", _LOSS, "paired by item")])
    return figure


@_styled
def plot_decomposition(report: GapReport) -> Figure:
    """From the accuracy expected of a composition, S1·S2, step by step to the one measured.

    Distraction and second hop are the paper's words; see `gsm_compose.gap` for the identity.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure, axis = _figure(height=3.6)
    expected = report.s1.value * report.s2.value
    terms = {
        "distraction, Q1 lost": report.distraction_term,
        "second hop, Q2 lost": report.second_hop_term,
        "lucky": report.lucky,
    }
    at, reached = expected, [expected]
    _write(axis, -0.18, "expected, S1·S2", f"{100 * expected:.1f} %")
    axis.plot(100 * at, 0.18, "o", color=INK, markersize=7, clip_on=False)
    for row, (name, term) in enumerate(terms.items(), start=1):
        colour = _LOSS if term.value < 0 else _GAIN
        _write(axis, row - 0.18, name, points(term))
        axis.barh(row + 0.18, 100 * term.value, 0.3, left=100 * at, color=colour, linewidth=0)
        axis.plot([100 * at] * 2, [row - 0.82, row + 0.33], color=MUTED, linewidth=0.8)
        at += term.value
        reached.append(at)
    last = len(terms) + 1
    axis.plot([100 * at] * 2, [last - 0.82, last + 0.18], color=MUTED, linewidth=0.8)
    _write(axis, last - 0.18, "measured, S_comp", f"{percent(report.s_comp)} %")
    _whisker(axis, report.s_comp, last + 0.18, INK, "o")
    spread = 100 * np.array([*reached, report.s_comp.low, report.s_comp.high])
    _rows(axis, last + 1, spread, "accuracy, %")
    return figure


@_styled
def plot_expected(reports: Reports) -> Figure:
    """S_comp of every model against S1·S2, what it would be if composing cost nothing.

    Args:
        reports: by name of the model.

    Raises:
        StatisticsError: no report.
        MissingExtraError: matplotlib is not installed.
    """
    _check(reports)
    exact = [r.s1.value * r.s2.value for r in reports.values()]
    return _against_diagonal(
        reports,
        [Interval(value, value, value) for value in exact],
        [report.s_comp for report in reports.values()],
        ("expected, S1·S2, %", "compositions solved, S_comp, %", "no gap"),
    )


@_styled
def plot_leakage(reports: Reports) -> Figure:
    """Last questions as published against the same with new numbers; above the line: memorised?

    Args:
        reports: by name of the model; those without the condition "original-q2" are left out.

    Raises:
        StatisticsError: no report has that condition.
        MissingExtraError: matplotlib is not installed.
    """
    asked = {name: report for name, report in reports.items() if report.leakage is not None}
    if not asked:
        raise StatisticsError(
            "reports: expected one with original last questions, got none. "
            'Evaluate with the condition "original-q2" too.'
        )
    return _against_diagonal(
        asked,
        [report.s2 for report in asked.values()],
        [report.leakage.original for report in asked.values() if report.leakage],
        ("new numbers, S2, %", "numbers as published, %", "no difference"),
    )


@_styled
def plot_taxonomy(reports: Reports) -> Figure:
    """What the answers to the compositions that are not correct are, as shares of all answers.

    Args:
        reports: by name of the model, six at most.

    Raises:
        StatisticsError: no report, or more than six.
        MissingExtraError: matplotlib is not installed.
    """
    _check(reports, most=len(SERIES))
    shown = [
        category
        for category in CATEGORIES
        if category != "correct" and any(r.taxonomy.get(category) for r in reports.values())
    ]
    several = len(reports) > 1
    step = 0.17 if several else 0.26
    height = 0.42 + step * len(reports)  # of a category, in inches and so in the axis' units
    total = max(height * len(shown), height)
    figure, axis = _figure(height=total + (0.75 if several else 0.45))
    largest = max(
        (100 * r.taxonomy.get(c, 0.0) for r in reports.values() for c in shown), default=1
    )
    for place, category in enumerate(shown):
        top = place * height
        _write(axis, top + 0.2, category)
        for row, (name, report) in enumerate(reports.items()):
            share = 100 * report.taxonomy.get(category, 0.0)
            y = top + 0.36 + step * (row + 0.5)
            axis.barh(
                y,
                share,
                0.8 * step,
                color=SERIES[row] if several else ACCENT,
                linewidth=0,
                label=_shortened(name) if place == 0 else None,
            )
            text = f"{share:.1f} %"
            axis.annotate(
                text, (share, y), (4, 0), textcoords="offset points", va="center", fontsize=8.5
            )
    if not shown:
        _write(axis, height / 2, "every answer is correct")
    axis.set_ylim(total, 0)
    axis.set_xlim(0, 1.16 * largest)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("% of all answers to compositions")
    if several:
        figure.legend(loc="outside lower left", ncols=1 if len(max(reports, key=len)) > 18 else 3)
    return figure


def _against_diagonal(
    reports: Reports,
    across: Sequence[Interval],
    up: Sequence[Interval],
    labels: tuple[str, str, str],
) -> Figure:
    """One dot per model; the line of equality is what it is to be compared with."""
    figure, axis = _figure(height=_WIDTH)
    bounds = 100 * np.array([bound for i in (*across, *up) for bound in (i.low, i.value, i.high)])
    spread = max(float(np.ptp(bounds)), 5.0)
    middle = (bounds.min() + bounds.max()) / 2
    low, high = max(-1.0, middle - 0.62 * spread), min(101.0, middle + 0.62 * spread)
    axis.plot([low, high], [low, high], color=MUTED, linewidth=0.9, zorder=1)
    inside = low + 0.03 * (high - low)
    axis.text(
        inside,
        inside,
        labels[2],
        color=MUTED,
        fontsize=9,
        rotation=45,
        rotation_mode="anchor",
        va="bottom",
    )
    for x, y in zip(across, up, strict=True):
        at = 100 * x.value, 100 * y.value
        axis.plot([at[0]] * 2, [at[0], at[1]], color=GRID, linewidth=3, zorder=1.5)
        axis.plot([100 * x.low, 100 * x.high], [at[1]] * 2, color=ACCENT, linewidth=1.4)
        axis.plot([at[0]] * 2, [100 * y.low, 100 * y.high], color=ACCENT, linewidth=1.4)
        axis.plot(*at, "o", color=ACCENT, markersize=6.5, zorder=3)
    _name_dots(axis, list(reports), across, up, (low, high))
    axis.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.grid(visible=True)
    return figure


def _name_dots(
    axis: Axes,
    names: Sequence[str],
    across: Sequence[Interval],
    up: Sequence[Interval],
    limits: tuple[float, float],
) -> None:
    """Names beside the dots, away from the diagonal where there is room, and apart."""
    low, high = limits
    width = high - low
    order = sorted(range(len(names)), key=lambda i: up[i].value)
    wanted, placed = [], []
    for place in order:
        name = _shortened(names[place], 20)
        x, y = 100 * across[place].value, 100 * up[place].value
        left, right = 100 * across[place].low, 100 * across[place].high
        need, aside = width * _LETTER * len(name), 0.035 * width
        fits = {"right": right + aside + need < high, "left": left - aside - need > low}
        first, second = ("right", "left") if y <= x else ("left", "right")
        side = first if fits[first] or not fits[second] else second
        ends = {"right": min(right + aside, high - need), "left": max(left - aside, low + need)}
        # Where the name does not fit beside its whisker, it stands above.
        wanted.append(y if fits[side] else y + 0.06 * width)
        placed.append((name, (x, y), side, ends[side]))
    heights = _spread(wanted, low, high, _LINE * width)
    for (name, dot, side, end), at in zip(placed, heights, strict=True):
        axis.annotate(
            name,
            dot,
            (end, at),
            fontsize=9,
            ha="left" if side == "right" else "right",
            va="center",
            bbox=_BEHIND,
            zorder=2,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6},
        )


def _spread(wanted: Sequence[float], low: float, high: float, gap: float) -> list[float]:
    """Heights near those wanted, `gap` apart and between the limits if there is room."""
    found: list[float] = []
    for height in sorted(wanted):
        found.append(max(height, found[-1] + gap if found else low + gap / 2))
    ceiling = high - gap / 2
    for place in reversed(range(len(found))):
        found[place] = min(found[place], ceiling)
        ceiling = found[place] - gap
    ranks = sorted(range(len(wanted)), key=wanted.__getitem__)
    return [height for _, height in sorted(zip(ranks, found, strict=True))]


def _check(reports: Reports, most: int | None = None) -> None:
    if not reports:
        raise StatisticsError("reports: expected at least one, got none.")
    if most is not None and len(reports) > most:
        raise StatisticsError(
            f"reports: at most {most} models can be told apart in this figure, got {len(reports)}. "
            "Draw it for some of them at a time."
        )


def _rows(axis: Axes, count: int, values: np.ndarray, label: str) -> None:
    """Rows 0 to count - 1 from top to bottom, and an x axis that holds all values with a margin."""
    margin = max(0.08 * float(np.ptp(values)), 0.5)
    axis.set_xlim(values.min() - margin, values.max() + margin)
    axis.set_ylim(count - 0.42, -0.55)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.grid(visible=True, axis="x")
    axis.set_xlabel(label)


def _write(axis: Axes, y: float, text: str, numbers: str = "", *, quiet: bool = False) -> None:
    """A line of text at the left edge, with its numbers in a softer colour."""
    place = axis.get_yaxis_transform()
    shown = axis.text(
        0,
        y,
        text,
        transform=place,
        fontsize=8.5 if quiet else 9.5,
        color=MUTED if quiet else INK,
        va="center",
        bbox=_BEHIND,
        zorder=4,
    )
    if numbers:
        axis.annotate(
            numbers,
            (1, 0.5),
            (7, 0),
            xycoords=shown,
            textcoords="offset points",
            fontsize=9,
            color=MUTED,
            va="center",
            bbox=_BEHIND,
            zorder=3.9,  # its background must not cut the line of text
        )


_BEHIND: Final = {"boxstyle": "square,pad=0.12", "facecolor": SURFACE, "linewidth": 0}


def _whisker(axis: Axes, interval: Interval, y: float, colour: str, marker: str) -> None:
    axis.plot([100 * interval.low, 100 * interval.high], [y, y], color=colour, linewidth=1.7)
    size = 6.5 if marker == "o" else 5
    axis.plot(100 * interval.value, y, marker, color=colour, markersize=size, zorder=3)


def _legend(figure: Figure, entries: Sequence[tuple[str, str, str]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker=marker, color=colour, markersize=6, linewidth=1.7, label=text)
        for marker, colour, text in entries
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))


def _shortened(name: str, longest: int = _LONGEST_NAME) -> str:
    """The name, its middle left out where it is too long; never read as mathematics."""
    if len(name) > longest:
        half = (longest - 1) // 2
        name = f"{name[:half]}…{name[-half:]}"
    return name.replace("$", r"\$")


def _figure(height: float) -> tuple[Figure, Axes]:
    """An empty styled figure, its height in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axis = figure.subplots()
    # Ticks are made when drawn, after the style has been taken off again.
    axis.tick_params(colors=MUTED, labelsize=9)
    axis.tick_params(axis="y", length=0)
    return figure, axis
