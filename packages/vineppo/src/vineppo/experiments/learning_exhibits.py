"""Figures and tables of the learning bench and of the value bench on its last policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from decapod.claims import Figure
from decapod.report import palette
from vineppo.experiments.drawing import Floats, figure, legend_above, name_rows, row_of_dots
from vineppo.experiments.learning_findings import (
    BASELINES,
    Groups,
    Judged,
    Report,
    Run,
    by_method,
    curves,
    ends,
    errors_by_position,
    judged_values,
    level,
    mean,
    said,
    scores,
    starts,
    train_and_test,
    truth_rollouts,
)
from vineppo.experiments.learning_tables import tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["figures", "tables"]

_BLUE: Final = palette.SERIES[0]
_STYLES: Final[dict[str, dict[str, Any]]] = {
    "PPO": {"color": palette.SERIES[1], "marker": "s"},
    "RLOO": {"color": palette.SERIES[2], "marker": "D"},
    "GRPO": {"color": palette.SERIES[3], "marker": "v"},
    "RestEM": {"color": palette.SERIES[4], "marker": "^"},
    "DPO+": {"color": palette.SERIES[5], "marker": "X"},
    # One hue; the fuller the line and its marker, the more rollouts.
    "VinePPO K=1": {"color": _BLUE, "marker": "o", "linestyle": ":", "fillstyle": "none"},
    "VinePPO K=3": {
        "color": _BLUE, "marker": "o", "linestyle": "--", "fillstyle": "bottom",
        "markerfacecoloralt": palette.SURFACE,
    },
    "VinePPO K=9": {"color": _BLUE, "marker": "o"},
}  # fmt: skip
_PREDICTORS: Final = dict(zip(BASELINES, palette.SERIES[1:3], strict=True))
"""In the colours of the methods that use them; all others are rollouts, as of VinePPO."""
_COSTS: Final = {
    "steps": "gradient steps",
    "tokens": "generated tokens",
    "seconds": "processor seconds",
}
_LINEAR: Final = "steps"
_OVER_SEEDS: Final = "dots single seeds, bands 95 % intervals over seeds where there are several"
_POSITION_OF: Final = ("PPO", ("critic", "rollouts, K=9"))


def figures(runs: Sequence[Run]) -> list[Figure]:
    """All figures that the runs have something for.

    Args:
        runs: of :func:`vineppo.experiments.learning.learn`; of one method all have one learning
            rate, different seeds, and measurements after the same iterations.

    Raises:
        InvalidInputError: no runs, an unknown method, or runs of a method that do not fit together.
    """
    of = by_method(runs)
    judged = judged_values(of)
    policy, predictors = _POSITION_OF
    drawn = [_accuracies(of), _prices(of)]
    if judged:
        drawn.append(_values(judged))
    if set(predictors) <= set(judged.get(policy, ())):
        drawn.append(_positions({name: judged[policy][name] for name in predictors}))
    return drawn


# --- figures: learning ---------------------------------------------------------------------------


def _accuracies(of: Groups) -> Figure:
    start = mean(starts(of))

    def draw(panels: Any) -> None:
        for axes, (name, label) in zip(panels[0], _COSTS.items(), strict=True):
            for method, runs in of.items():
                cost, accuracy = curves(runs, name), curves(runs, "accuracy")
                # A logarithmic axis has no place for the start, which costs nothing.
                shown = slice(None) if name == _LINEAR else (cost > 0).all(axis=0)
                _line(axes, cost[:, shown], accuracy[:, shown], method)
            axes.axhline(start, color=palette.MUTED, linewidth=1, linestyle=":", label="start")
            axes.set(xlabel=label)
            if name != _LINEAR:
                _logarithmic(axes)
        every = np.concatenate([curves(runs, "accuracy").ravel() for runs in of.values()])
        _share_limits(panels[0][0], every)
        panels[0][0].set_ylabel("test accuracy, greedy")
        legend_above(panels[0][0], columns=5)

    words = "; ".join(
        f"{method}: {curves(runs, 'accuracy')[:, -1].mean():.3f} after "
        + ", ".join(
            f"{curves(runs, name)[:, -1].mean():,.0f} {label}" for name, label in _COSTS.items()
        )
        for method, runs in of.items()
    )
    return figure(
        draw, 3,
        title="Accuracy against gradient steps, generated tokens and seconds",
        caption="Accuracy on test prompts along training. Tokens are all that were generated, "
        "rollouts from intermediate states included; seconds are those of the trainer's processor, "
        f"measuring left out. Lines are means over seeds, {_OVER_SEEDS}. The dotted level is the "
        "fine-tuned model that all start from, which costs nothing and so is on no logarithmic "
        "axis.",
        alt=f"Mean accuracy: {start:.3f} at the start. At the end, {words}.",
        size=(10.6, 4.2),
    )  # fmt: skip


def _prices(of: Groups) -> Figure:
    pairs = {method: train_and_test(runs) for method, runs in of.items()}
    pairs = {method: found for method, found in pairs.items() if found[0].size}

    def draw(panels: Any) -> None:
        left, right = panels[0]
        for method, runs in of.items():
            style = {**_STYLES[method], "linestyle": ""}
            divergence, accuracy = ends(runs, "divergence"), ends(runs, "greedy")
            left.plot(divergence, accuracy, markersize=4, alpha=0.45, **style)
            left.plot([divergence.mean()], [accuracy.mean()], markersize=8, label=method, **style)
        left.set(
            xlabel="divergence from the start, nats per answer", ylabel="test accuracy, greedy"
        )
        for method, (train, test) in pairs.items():
            style = _STYLES[method]
            right.plot(train, test, ".", color=style["color"], markersize=3, alpha=0.3)
            right.plot(train.mean(axis=0), test.mean(axis=0), linewidth=1.2, markersize=4, **style)
        if pairs:  # equality, through a point that is near the others
            most = max(float(train.max()) for train, _ in pairs.values())
            right.axline((most, most), slope=1, color=palette.MUTED, linewidth=1, linestyle=":")
        right.set(xlabel="training accuracy, sampled", ylabel="test accuracy, greedy")
        legend_above(left, columns=4)

    words = "; ".join(
        f"{method}: accuracy {ends(runs, 'greedy').mean():.3f} at "
        f"{ends(runs, 'divergence').mean():.2f} nats"
        + (
            f", test {pairs[method][1][:, -1].mean():.3f} at training "
            f"{pairs[method][0][:, -1].mean():.3f}"
            if method in pairs
            else ""
        )
        for method, runs in of.items()
    )
    without = [method for method in of if method not in pairs]
    return figure(
        draw, 2,
        title="Accuracy against divergence and against training accuracy",
        caption="Left, where training ended: large marks are means over seeds, small ones single "
        "seeds. Right, along training: lines are means over seeds, dots single seeds, and the "
        "dotted line is equality. Training accuracy is that of the answers trained on, which are "
        "sampled, and of few prompts: noisy, and another measure than that of greedy answers; "
        "methods compare by how high they are at one training accuracy."
        + (f" {' and '.join(without)} sampled from the start only." if without else ""),
        alt=f"At the end. {words}.",
        size=(8.2, 4.4),
        sharey=False,
    )  # fmt: skip


# --- figures: values -----------------------------------------------------------------------------


def _values(judged: Judged) -> Figure:
    panel_of = {
        "mae": "mean absolute error",
        "top1": "top-1 of up to five",
        "pairwise": "pairs in order",
    }
    names: list[str] = []
    rows: dict[tuple[str, str], int] = {}
    for policy, by in judged.items():
        names.append(f"{policy}'s policy")
        for predictor in by:
            rows[policy, predictor] = len(names)
            names.append(predictor)

    def draw(panels: Any) -> None:
        for axes, (score, label) in zip(panels[0], panel_of.items(), strict=True):
            for (policy, predictor), row in rows.items():
                x = scores(judged[policy][predictor], score)
                colour = _PREDICTORS.get(predictor, _BLUE)
                if len(x):
                    row_of_dots(axes, row, x, mean(x), colour)
            for policy, by in judged.items():
                of = [rows[policy, predictor] for predictor in by]
                axes.vlines(
                    level(by, score), of[0] - 0.5, of[-1] + 0.5, color=palette.MUTED, linewidth=1,
                    linestyle=":",
                )  # fmt: skip
            axes.set(xlabel=label)
            if score == "mae":
                axes.set_xlim(left=0)
            else:
                axes.set_xlim(-0.02, 1.02)
                axes.set_xticks([0, 0.5, 1])
        name_rows(panels[0][0], names)
        for name, text in zip(names, panels[0][0].get_yticklabels(), strict=True):
            if name.endswith("'s policy"):
                text.set(color=palette.INK, weight="bold")

    words_of = {"mae": "error", "top1": "top-1", "pairwise": "pairs"}
    words = "; ".join(
        f"{policy}'s policy, {predictor}: "
        + ", ".join(f"{word} {said(mean(scores(reports, x)))}" for x, word in words_of.items())
        for policy, by in judged.items()
        for predictor, reports in by.items()
    )
    chances = ", ".join(
        f"{said(level(by, 'top1'))} on {policy}'s policy" for policy, by in judged.items()
    )
    return figure(
        draw, 3,
        title="What critics, group means and rollouts know",
        caption="On states of the last policy of a method, against the mean of "
        f"{truth_rollouts(judged)} fresh rollouts each. Top-1: how often the next step that is "
        "predicted best, of up to five, is a best one. Pairs: of next steps, share predicted in "
        "order; equal predictions count one half. Bars are means over seeds, dots single seeds. "
        "Dotted: what exact values would have by the noise of the truth alone, and chance.",
        alt=f"Chance of top-1: {chances}. {words}.",
        size=(9.6, 1.1 + 0.27 * len(names)),
    )  # fmt: skip


def _positions(by: Mapping[str, Sequence[Report]]) -> Figure:
    found = {name: errors_by_position(reports) for name, reports in by.items()}

    def draw(panels: Any) -> None:
        axes = panels[0][0]
        for name, bins in found.items():
            colour = _PREDICTORS.get(name, _BLUE)
            _band(axes, list(bins), list(bins.values()), colour)
            for middle, x in bins.items():
                axes.plot([middle] * len(x), x, ".", color=colour, markersize=4, alpha=0.45)
            axes.plot(
                list(bins), [x.mean() for x in bins.values()], "-", color=colour, marker="o",
                markersize=4, label=name,
            )  # fmt: skip
        axes.set(xlabel="step position, as a share of all steps", ylabel="mean absolute error")
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        legend_above(axes, columns=len(found))

    words = "; ".join(
        f"{name}: " + ", ".join(f"{x.mean():.3f} at {middle:.0%}" for middle, x in bins.items())
        for name, bins in found.items()
    )
    return figure(
        draw, 1,
        title="Error of values by step position",
        caption=f"On {_POSITION_OF[0]}'s last policy: step i of S is at i/S, so 0 is the prompt; "
        f"means of the states in each bin. Lines are means over seeds, {_OVER_SEEDS}.",
        alt=f"Mean absolute error. {words}.",
        size=(5.6, 3.6),
    )  # fmt: skip


# --- drawing -------------------------------------------------------------------------------------


def _line(axes: Axes, x: Floats, y: Floats, method: str) -> None:
    """The mean over seeds with single seeds and their interval; [seeds, measurements] each."""
    style = _STYLES[method]
    _band(axes, x.mean(axis=0), y.T, style["color"])
    axes.plot(x, y, ".", color=style["color"], markersize=3, alpha=0.3)
    axes.plot(x.mean(axis=0), y.mean(axis=0), markersize=4.5, label=method, **style)


def _band(axes: Axes, x: Any, columns: Sequence[Floats] | Floats, colour: str) -> None:
    """95 % intervals over the seeds of each column, where there are at least two."""
    from decapod.stats import aggregate

    found = [aggregate(column, "mean") if len(column) > 1 else None for column in columns]
    if all(b is None for b in found):
        return
    axes.fill_between(
        x, [np.nan if b is None else b.low for b in found],
        [np.nan if b is None else b.high for b in found],
        color=colour, alpha=0.1, linewidth=0,
    )  # fmt: skip


def _logarithmic(axes: Axes) -> None:
    """A logarithmic horizontal axis with few, short names: 30, 100, 300, 1k, ..."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _share_limits(axes: Axes, shares: Floats) -> None:
    """Of an axis of shares: around what was found; intervals of few seeds may reach further."""
    low, high = float(shares.min()), float(shares.max())
    margin = 0.05 + 0.1 * (high - low)
    axes.set_ylim(max(0.0, low - margin), min(1.0, high + margin))
