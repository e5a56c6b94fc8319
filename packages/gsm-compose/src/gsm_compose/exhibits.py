"""The figures and tables that stand beside the verdicts in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from decapod.claims import DataTable, Figure
from decapod.report import palette, svg_from_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

Recovered = Mapping[str, Mapping[str, Mapping[str, Any]]]


def figures(built: Mapping[str, Any], recovered: Recovered) -> list[Figure]:
    """Yields of the rules, magnitudes, recovery of known gaps."""
    rules = built["yields"]["rules"]
    return [
        _figure(
            _draw_yields(built["yields"]["numbers"], rules),
            title="How many numbers of GSM8K test each rule leaves",
            caption="Numbers written in digits in questions whose solution is a program; the rules "
            "are applied from top to bottom.",
            alt=f"Of {built['yields']['numbers']} numbers {rules[-1]['left']} in "
            f"{rules[-1]['questions']} questions may become X.",
        ),
        _figure(
            _draw_magnitudes(built),
            title="Answers of compositions and of original questions",
            caption="Share of answers up to a size. Original: all test rows with a positive "
            "answer. Compositional: the 1200 items.",
            alt="Two cumulative curves on a logarithmic axis; medians "
            f"{np.median(built['original']):g} and {np.median(built['composed']):g}.",
        ),
        _figure(
            _draw_recovery(recovered),
            title="Estimates of known gaps",
            caption="Grey bars: the middle 95 % of the estimates of Δ with 1200 items. Dots: "
            "their mean. Lines: the analytic value.",
            alt="; ".join(
                f"{name}: analytic {found['delta']['truth']:.3f}, mean estimate "
                f"{found['delta']['estimates'].mean():.3f}"
                for name, found in recovered.items()
            )
            + ".",
        ),
    ]


def tables(built: Mapping[str, Any], recovered: Recovered) -> list[DataTable]:
    """Yields, magnitudes, recovery, and the first items."""
    return [
        DataTable(
            "Rules and what they leave of GSM8K test",
            ["Rule", "Rejects", "Left", "Questions", "Fail this rule only"],
            [
                [rule["rule"], rule["rejects"], rule["left"], rule["questions"], rule["alone"]]
                for rule in built["yields"]["rules"]
            ],
            caption=f"{built['yields']['programs']} of {built['yields']['problems']} rows are "
            f"programs; they state {built['yields']['numbers']} numbers in digits.",
        ),
        DataTable(
            "Magnitudes of answers",
            ["Answers of", "Quartile 1", "Median", "Quartile 3", "KS distance", "p"],
            [
                [
                    name,
                    row["quartile_1"],
                    row["median"],
                    row["quartile_3"],
                    round(row["ks_distance"], 3),
                    round(row["ks_p_value"], 3),
                ]
                for name, row in built["stats"]["magnitudes"].items()
            ],
            caption="Kolmogorov-Smirnov distance from the first questions' answers.",
        ),
        DataTable(
            "Recovery of known parameters",
            ["Reasoner", "Quantity", "Analytic", "Mean estimate", "Bias", "Coverage"],
            [
                [
                    reasoner,
                    quantity.replace("_", " "),
                    round(found["truth"], 4),
                    round(float(found["estimates"].mean()), 4),
                    round(float(found["estimates"].mean() - found["truth"]), 4),
                    round(coverage(found), 3),
                ]
                for reasoner, quantities in recovered.items()
                for quantity, found in quantities.items()
            ],
            caption="Coverage of 95 % intervals. A part of the gap that is 0 by construction is "
            "covered always.",
        ),
        DataTable(
            "The first five items of the benchmark",
            ["Q1", "Q2 with X", "Answers"],
            built["examples"],
        ),
    ]


def coverage(found: Mapping[str, Any]) -> float:
    """Share of intervals that hold the analytic value; rounding is forgiven."""
    low, high, truth = found["low"], found["high"], found["truth"]
    return float(np.mean((low - 1e-12 <= truth) & (truth <= high + 1e-12)))


def _figure(drawing: Drawing, *, title: str, caption: str, alt: str) -> Figure:
    return Figure(title=title, svg=svg_from_matplotlib(drawing), caption=caption, alt=alt)


def _axes(height: float) -> tuple[Drawing, Axes]:
    import matplotlib as mpl
    from matplotlib.figure import Figure as Drawing

    with mpl.rc_context(palette.RCPARAMS):
        drawing = Drawing(figsize=(6.4, height), layout="constrained")
        axis = drawing.add_subplot()
    axis.spines[["top", "right"]].set_visible(False)
    return drawing, axis


def _draw_yields(numbers: int, rules: Sequence[Mapping[str, Any]]) -> Drawing:
    drawing, axis = _axes(0.24 * len(rules) + 0.8)
    names = ["all numbers", *(rule["rule"] for rule in rules)]
    left = [numbers, *(rule["left"] for rule in rules)]
    places = range(len(names))
    axis.barh(places, left, height=0.62, color=palette.SERIES[0])
    for place, count in zip(places, left, strict=True):
        axis.text(count + numbers * 0.01, place, f"{count:,}", va="center", color=palette.MUTED)
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.set_xlim(0, numbers * 1.1)
    axis.set_xticks([])
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(left=False)
    return drawing


def _draw_magnitudes(built: Mapping[str, Any]) -> Drawing:
    drawing, axis = _axes(3.0)
    for name, key, colour in (
        ("original", "original", palette.SERIES[0]),
        ("compositional", "composed", palette.SERIES[1]),
    ):
        answers = np.sort(built[key])
        shares = np.arange(1, len(answers) + 1) / len(answers)
        axis.step(answers, shares, where="post", color=colour, label=name, linewidth=1.4)
    axis.set_xscale("log")
    axis.set_xlabel("answer")
    axis.set_ylabel("share up to it")
    axis.legend(loc="lower right", frameon=False)
    return drawing


def _draw_recovery(recovered: Recovered) -> Drawing:
    drawing, axis = _axes(0.5 * len(recovered) + 0.9)
    for place, found in enumerate(recovered.values()):
        column = found["delta"]
        low, high = np.quantile(column["estimates"], [0.025, 0.975])
        axis.barh(place, high - low, left=low, height=0.5, color=palette.GRID)
        axis.plot([column["truth"]] * 2, [place - 0.36, place + 0.36], color=palette.SERIES[1])
        axis.plot(column["estimates"].mean(), place, "o", color=palette.SERIES[0], markersize=5)
    axis.set_yticks(np.arange(len(recovered)), list(recovered))
    axis.invert_yaxis()
    axis.axvline(0, color=palette.MUTED, linewidth=0.8)
    axis.set_xlabel("Δ")
    return drawing
