"""Figures: each takes results and gives a matplotlib `Figure`, without touching pyplot.

Needs the extra `plot`. Save one with `figure.savefig("thc.pdf")`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, ParamSpec

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hpreliability.errors import EmptyInputError, MissingColumnError, MissingExtraError, ShapeError
from hpreliability.intervals import IntervalMethod, score_intervals
from hpreliability.scoring import THCTable
from hpreliability.table import Missing, Table, value_order
from hpreliability.transfer import Measure, Transfer, transfer

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

_STYLE: Final[dict[str, Any]] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "butt",
    "font.size": 10,
}
_SIGNIFICANT: Final = 0.05
_STRONG: Final = 0.62  # opacity from which text on a cell must be light
_UPRIGHT_LABELS: Final = 8  # more columns than this get tilted labels


_P = ParamSpec("_P")


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
def thc_bars(result: THCTable, *, names: Mapping[str, str] | None = None) -> Figure:
    """THC of every group beside what chance alone would give, the least consistent on top.

    One panel per label of the grouping columns other than the hyper-parameter. A dot is the score,
    the line through it the interval of the expected score, the bar behind it the 5th to 95th
    percentile of the permutation null with a tick at its mean, the small diamond the score under
    symmetric ties. Filled dots have p ≤ 0.05. Rows are sorted by calibrated score, or by plain
    score without a null.

    Args:
        result: from `thc`.
        names: printed names of hyper-parameters and other labels.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    frame, names = result.frame, dict(names or {})
    panels = _panels(frame, result.by)
    key = "calibrated" if "calibrated" in frame else "score"
    order = frame.groupby("hyperparameter")[key].mean().sort_values(kind="stable").index
    height = {name: row for row, name in enumerate(order)}
    figure, axes = _figure(
        width=1.9 + 3.1 * len(panels), height=0.95 + 0.27 * len(order), columns=len(panels)
    )
    for axis, (title, panel) in zip(axes, panels, strict=True):
        for row in panel.to_dict("records"):
            _bar(axis, height[row["hyperparameter"]], row)
        axis.set_title(names.get(title, title))
        axis.set_xlim(-0.02, 1.02)
        axis.set_ylim(-0.7, len(order) - 0.3)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
        axis.set_xlabel("THC score")
        axis.grid(visible=True, axis="x")
        axis.spines["left"].set_visible(False)
        axis.set_yticks(range(len(order)))
        axis.tick_params(axis="y", length=0)
        axis.set_yticklabels([])
    axes[0].set_yticklabels([names.get(name, name) for name in order], color=INK)
    _bar_legend(figure, frame)
    return figure


@_styled
def rank_heatmap(
    result: THCTable, group: Mapping[str, str] | None = None, *, title: str | None = None
) -> Figure:
    """Rank of every value in every context of one group: even rows mean a consistent choice.

    The stronger the colour, the better the rank. Contexts are ordered by the value that does best
    in them.

    Args:
        result: from `thc`.
        group: labels that pick one group, by column of `result.by`, e.g.
            `{"hyperparameter": "learning_rate", "agent": "DER"}`; unneeded ones may be left out.
        title: default: the labels of the group.

    Raises:
        MissingColumnError: `group` names a column that is not in `result.by`.
        EmptyInputError: `group` picks no group, or more than one.
        MissingExtraError: matplotlib is not installed.
    """
    chosen = _one_group(result, group or {})
    grid = chosen.pivot_table(index="value", columns="context", values="rank", sort=False)
    grid = grid.loc[sorted(grid.index, key=value_order(grid.index))]
    goodness = len(grid) - grid.to_numpy()
    # All values may tie everywhere at the last rank; the centre then does not matter.
    weight = np.maximum(goodness.sum(axis=0), 1e-12)
    centre = (goodness * np.arange(len(grid))[:, None]).sum(axis=0) / weight
    grid = grid.iloc[:, np.lexsort((centre, goodness.argmax(axis=0)))]
    ranks = grid.to_numpy()
    figure, (axis,) = _figure(
        width=1.6 + max(3.0, 0.3 * ranks.shape[1]), height=1.5 + 0.32 * ranks.shape[0]
    )
    _matrix(
        axis,
        opacity=(len(grid) - ranks) / max(len(grid) - 1, 1),
        texts=[[f"{rank:g}" for rank in row] for row in ranks],
        rows=list(grid.index),
        columns=list(grid.columns),
    )
    axis.set_ylabel("value")
    axis.set_title(title or ", ".join(str(chosen[column].iloc[0]) for column in result.by))
    return figure


@_styled
def intervals(
    table: Table,
    hyperparameter: str,
    *,
    over: str | Sequence[str] = "env",
    interval: IntervalMethod = "mean_std",
    missing: Missing = "raise",
    columns: int = 7,
    **conditions: str,
) -> Figure:
    """Score interval of every value in every context, one small panel per context.

    Values whose interval reaches that of the best mean are drawn strong: the panel's best group.
    Each panel has a score axis of its own.

    Args:
        table: one score per run.
        hyperparameter: which one.
        over: column or columns that form the contexts.
        interval: see `score_intervals`.
        missing: see `Table.scores`.
        columns: panels in a row.
        conditions: labels to select first, by column, e.g. `agent="DER"`.

    Raises:
        HPReliabilityError: see `Table.scores`.
        MissingExtraError: matplotlib is not installed.
    """
    cell = table.scores(hyperparameter, over=over, missing=missing, **conditions)
    lo, hi = score_intervals(cell.scores, interval)
    middle = (lo + hi) / 2
    n_values, n_contexts = lo.shape
    columns = min(columns, n_contexts)
    rows = -(-n_contexts // columns)
    figure, axes = _figure(
        width=0.9 + 1.35 * columns,
        height=0.6 + (0.55 + 0.14 * n_values) * rows,
        columns=columns,
        rows=rows,
    )
    for index, axis in enumerate(axes):
        if index >= n_contexts:
            axis.set_visible(False)
            continue
        best = int(middle[:, index].argmax())
        for row in range(n_values):
            in_best_group = hi[row, index] >= lo[best, index]
            axis.plot(
                [lo[row, index], hi[row, index]],
                [row, row],
                color=ACCENT if in_best_group else MUTED,
                alpha=1.0 if in_best_group else 0.55,
                linewidth=1.6,
                marker="|",
                markersize=3,
            )
            axis.plot(
                middle[row, index],
                row,
                marker="o",
                markersize=4,
                color=ACCENT if in_best_group else SURFACE,
                markeredgecolor=ACCENT if in_best_group else MUTED,
            )
        axis.set_title(cell.contexts[index], fontsize=8.5, pad=3)
        axis.set_ylim(n_values - 0.4, -0.6)
        axis.set_yticks(range(n_values))
        axis.tick_params(axis="x", labelsize=7)
        axis.tick_params(axis="y", length=0)
        axis.locator_params(axis="x", nbins=3)
        axis.grid(visible=True, axis="x")
        axis.spines["left"].set_visible(False)
        first_in_row = index % columns == 0
        axis.set_yticklabels(cell.values if first_in_row else [], fontsize=8, color=INK)
    where = ", ".join([hyperparameter, *conditions.values()])
    figure.suptitle(f"{where}: scores ({interval})", x=0.01, ha="left", fontsize=11)
    return figure


@_styled
def transfer_matrix(
    table: Table,
    between: str | Sequence[str],
    *,
    measure: Measure = "regret",
    names: Mapping[str, str] | None = None,
) -> Figure:
    """What it costs to choose each context's best value and use it in the others.

    Mean over hyper-parameters; rows: where the value was chosen, columns: where it is used.

    Args:
        table: one finite score per run.
        between: column or columns whose labels choices are carried between.
        measure: `"regret"` or `"correlation"`; see `transfer`.
        names: printed names of contexts.

    Raises:
        HPReliabilityError: see `transfer`.
        MissingExtraError: matplotlib is not installed.
    """
    found = transfer(table, between, measure=measure)
    labels = [(names or {}).get(context, context) for context in found.contexts]
    size = len(labels)
    figure, (axis,) = _figure(width=2.0 + max(2.6, 0.36 * size), height=1.3 + max(0.9, 0.3 * size))
    strength = np.nan_to_num(np.abs(found.matrix))
    _matrix(
        axis,
        opacity=np.clip(strength, 0, 1),
        texts=[["–" if np.isnan(x) else _short(x) for x in row] for row in found.matrix],
        rows=labels,
        columns=labels,
        colour=lambda row, column: SERIES[1] if found.matrix[row, column] < 0 else ACCENT,
    )
    axis.set_ylabel("chosen in")
    axis.set_xlabel("used in")
    what = "Regret" if measure == "regret" else "Kendall τ"
    axis.set_title(f"{what}, mean of {len(found.hyperparameters)} hyper-parameters")
    return figure


@_styled
def regret(found: Transfer, *, names: Mapping[str, str] | None = None) -> Figure:
    """Transfer of every hyper-parameter, one dot for each ordered pair of contexts.

    Args:
        found: from `transfer`, with few contexts: six pairs at most.
        names: printed names of hyper-parameters and contexts.

    Raises:
        ShapeError: more than three contexts; `transfer_matrix` shows those.
        MissingExtraError: matplotlib is not installed.
    """
    names = names or {}
    size = len(found.contexts)
    pairs = [(i, j) for i in range(size) for j in range(size) if i != j]
    if len(pairs) > len(SERIES):
        raise ShapeError(f"regret shows up to three contexts, got {size}; use transfer_matrix")
    labels = [names.get(context, context) for context in found.contexts]
    frame = pd.DataFrame(
        {f"{labels[i]} → {labels[j]}": found.each[:, i, j] for i, j in pairs},
        index=[names.get(name, name) for name in found.hyperparameters],
    )
    what = "regret, share of the range" if found.measure == "regret" else "Kendall τ"
    return dumbbells(frame, label=what)


@_styled
def dumbbells(frame: pd.DataFrame, *, label: str) -> Figure:
    """Several numbers for each of several things, sorted by their mean.

    Args:
        frame: one row per thing, named by the index; one column per series, six at most.
        label: of the axis.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    order = frame.mean(axis=1).sort_values(kind="stable").index
    ordered = frame.loc[order]
    figure, (axis,) = _figure(width=6.6, height=1.1 + 0.25 * len(frame))
    for row, (_, numbers) in enumerate(ordered.iterrows()):
        axis.plot([numbers.min(), numbers.max()], [row, row], color=GRID, linewidth=3, zorder=1)
    for index, column in enumerate(ordered):
        axis.plot(
            ordered[column],
            range(len(ordered)),
            linestyle="none",
            marker="os^Dv<"[index],
            # Smaller towards the front, so that equal numbers show all their markers.
            markersize=7.5 - 1.2 * index,
            color=SERIES[index],
            label=column,
            clip_on=False,
        )
    axis.set_yticks(range(len(ordered)), ordered.index, color=INK)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(-0.7, len(ordered) - 0.3)
    axis.set_xlabel(label)
    axis.grid(visible=True, axis="x")
    axis.spines["left"].set_visible(False)
    if ordered.to_numpy().min() < 0:
        axis.axvline(0, color=MUTED, linewidth=0.8, zorder=0.5)
    figure.legend(loc="outside lower center", ncols=min(len(ordered.columns), 3))
    return figure


@_styled
def response(
    table: Table, hyperparameter: str, *, panels: str = "env", lines: str = "budget"
) -> Figure:
    """Mean score of every value, with single runs as dots.

    Args:
        table: one finite score per run, with the contexts `panels` and `lines` and no other.
        hyperparameter: which one; its values are spaced evenly, in order.
        panels: context column with one panel per label.
        lines: context column with one line per label, six at most.

    Raises:
        ShapeError: more than six lines.
        HPReliabilityError: see `Table.scores`.
        MissingExtraError: matplotlib is not installed.
    """
    cell = table.scores(hyperparameter, over=(panels, lines))
    pairs = [context.split("/") for context in cell.contexts]
    columns = list(dict.fromkeys(panel for panel, _ in pairs))
    series = sorted({line for _, line in pairs}, key=value_order({line for _, line in pairs}))
    if len(series) > len(SERIES):
        raise ShapeError(f"response shows up to {len(SERIES)} lines, got {len(series)} of {lines}")
    figure, axes = _figure(width=1.0 + 2.7 * len(columns), height=3.0, columns=len(columns))
    for index, (panel, line) in enumerate(pairs):
        axis, style = axes[columns.index(panel)], series.index(line)
        runs = cell.scores[:, :, index].mean(axis=-1)
        x = np.arange(len(cell.values)) + 0.12 * (style - (len(series) - 1) / 2)
        axis.plot(
            x,
            np.nanmean(runs, axis=1),
            color=SERIES[style],
            marker="os^Dv<"[style],
            markersize=5,
            linewidth=1.6,
            label=f"{lines} {line}",
        )
        for run in runs.T:
            axis.plot(
                x, run, linestyle="none", marker="o", markersize=2.5, alpha=0.5, color=SERIES[style]
            )
        axis.set_title(panel)
        axis.set_xlabel(hyperparameter)
        axis.set_xticks(range(len(cell.values)), cell.values)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(visible=True, axis="y")
    axes[0].set_ylabel("score")
    handles, texts = axes[0].get_legend_handles_labels()
    order = sorted(range(len(texts)), key=lambda i: series.index(texts[i].split(" ", 1)[1]))
    figure.legend(
        handles=[handles[i] for i in order],
        labels=[texts[i] for i in order],
        loc="outside lower center",
        ncols=len(series),
    )
    return figure


def _panels(frame: pd.DataFrame, by: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """Rows by the grouping columns, other than the hyper-parameter, that have several labels."""
    split = [c for c in by if c != "hyperparameter" and frame[c].nunique() > 1]
    if not split:
        return [("", frame)]
    return [("/".join(map(str, key)), panel) for key, panel in frame.groupby(split, sort=True)]


def _bar(axis: Axes, y: float, row: Mapping[Hashable, Any]) -> None:
    if "null_low" in row:
        axis.plot(
            [row["null_low"], row["null_high"]],
            [y, y],
            color=GRID,
            linewidth=9,
            solid_capstyle="butt",
            zorder=1.5,
        )
        axis.plot([row["null_mean"]] * 2, [y - 0.3, y + 0.3], color=MUTED, linewidth=1, zorder=1.6)
    if "low" in row:
        axis.plot([row["low"], row["high"]], [y, y], color=ACCENT, linewidth=1.6, zorder=2)
    clear = row.get("p_value", 0.0) <= _SIGNIFICANT
    axis.plot(
        row["score"],
        y,
        marker="o",
        markersize=6.5,
        color=ACCENT if clear else SURFACE,
        markeredgecolor=ACCENT,
        markeredgewidth=1.4,
        zorder=4,
        clip_on=False,
    )
    if row["symmetric"] != row["score"]:
        axis.plot(
            row["symmetric"],
            y,
            marker="D",
            markersize=3.6,
            color=SURFACE,
            markeredgecolor=SERIES[1],
            markeredgewidth=1.2,
            zorder=5,
            clip_on=False,
        )


def _bar_legend(figure: Figure, frame: pd.DataFrame) -> None:
    from matplotlib.lines import Line2D

    def marker(shape: str, face: str, edge: str, size: float, text: str) -> Line2D:
        return Line2D(
            [],
            [],
            linestyle="none",
            marker=shape,
            markersize=size,
            color=face,
            markeredgecolor=edge,
            markeredgewidth=1.3,
            label=text,
        )

    if "null_low" in frame:
        handles = [
            marker("o", ACCENT, ACCENT, 6.5, f"THC, p ≤ {_SIGNIFICANT:g}"),
            marker("o", SURFACE, ACCENT, 6.5, f"THC, p > {_SIGNIFICANT:g}"),
            Line2D([], [], color=GRID, linewidth=9, label="null, 5th–95th percentile"),
            marker("|", MUTED, MUTED, 9, "null mean"),
        ]
    else:
        handles = [marker("o", ACCENT, ACCENT, 6.5, "THC")]
    if "low" in frame:
        handles.insert(-2, Line2D([], [], color=ACCENT, linewidth=1.6, label="95 % interval"))
    if (frame["symmetric"] != frame["score"]).any():
        handles.append(marker("D", SURFACE, SERIES[1], 4, "with symmetric ties, where different"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, handletextpad=0.5)


def _one_group(result: THCTable, group: Mapping[str, str]) -> pd.DataFrame:
    ranks = result.ranks
    for column, text in group.items():
        if column not in result.by:
            raise MissingColumnError(f"no group column {column!r}; there are: {result.by}")
        ranks = ranks[ranks[column] == text]
    found = ranks[list(result.by)].drop_duplicates()
    if len(found) != 1:
        raise EmptyInputError(
            f"group must pick one of the {len(result.frame)} groups, {dict(group)} picks "
            f"{len(found)}; give a label for each of {result.by}"
        )
    return ranks


def _matrix(
    axis: Axes,
    *,
    opacity: NDArray[np.float64],
    texts: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
    colour: Callable[[int, int], str] = lambda _row, _column: ACCENT,
) -> None:
    """Cells as translucent vector patches: unlike a colour map they adapt to a dark page."""
    from matplotlib.patches import Rectangle

    for row in range(len(rows)):
        for column in range(len(columns)):
            strength = float(opacity[row, column])
            axis.add_patch(
                Rectangle(
                    (column - 0.47, row - 0.46),
                    0.94,
                    0.92,
                    facecolor=colour(row, column),
                    alpha=strength,
                    linewidth=0,
                )
            )
            axis.text(
                column,
                row,
                texts[row][column],
                ha="center",
                va="center_baseline",
                fontsize=7.5,
                color=SURFACE if strength > _STRONG else INK,
            )
    axis.set_xlim(-0.5, len(columns) - 0.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_yticks(range(len(rows)), rows, color=INK)
    tilted = len(columns) > _UPRIGHT_LABELS
    axis.set_xticks(
        range(len(columns)),
        columns,
        color=INK,
        rotation=50 if tilted else 0,
        ha="right" if tilted else "center",
        rotation_mode="anchor" if tilted else "default",
    )
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _short(x: float) -> str:
    """Two decimals without the leading zero."""
    text = f"{x:.2f}"
    return text.replace("0.", ".", 1) if abs(x) < 1 else text


def _figure(
    *, width: float, height: float, columns: int = 1, rows: int = 1
) -> tuple[Figure, list[Axes]]:
    """An empty styled figure, sizes in inches, and its axes row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        # Ticks are made when drawn, after the style has been taken off again.
        axis.tick_params(colors=MUTED, labelsize=9)
    return figure, list(axes.flat)
