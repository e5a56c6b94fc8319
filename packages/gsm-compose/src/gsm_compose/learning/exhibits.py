"""Figure and tables of the learning experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from decapod.claims import DataTable, Figure
from gsm_compose.learning.runs import Result, learning_curves
from gsm_compose.learning.templates import GROUPS, TEMPLATES

_TITLES: Final = {
    "one-hop": "one-hop problems only",
    "compositional": "then also compositions of other templates",
    "code": "one-hop problems only, answers in code",
}
_LINES: Final = {"s1": "S1", "s2": "S2", "s_comp": "S_comp"}
_SHOWN: Final = {
    "s1": "S1",
    "s2": "S2",
    "s_comp": "S_comp",
    "delta": "Δ",
    "distraction": "Distraction",
    "second_hop": "Second hop",
    "lucky": "Lucky",
    "independent": "Q2 after an unrelated Q1",
    "given": "Q2 with X stated",
    "answered_x": "Answered X",
    "unparsable": "Unparsable",
}


def figures(results: Sequence[Result]) -> list[Figure]:
    """Accuracies along training, a panel per arm; arguments as for `findings.evidence`."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    from decapod.report import palette, svg_from_matplotlib

    curves = learning_curves(results)
    with mpl.rc_context(palette.RCPARAMS):
        canvas = Canvas(figsize=(3.0 * len(curves), 3.1), layout="constrained")
        panels = np.atleast_1d(canvas.subplots(1, len(curves), sharey=True))
        for axes, (arm, curve) in zip(panels, curves.items(), strict=True):
            steps = np.asarray(curve["step"])
            values = {name: np.asarray(curve[name]) for name in _LINES}  # (checkpoints, seeds)
            lines = {_LINES[name]: value for name, value in values.items()}
            lines["S1·S2"] = values["s1"] * values["s2"]
            for colour, (label, value) in zip(palette.SERIES, lines.items(), strict=False):
                dashes = "--" if label == "S1·S2" else "-"
                axes.plot(steps, value.mean(axis=1), dashes, color=colour, label=label)
                axes.plot(steps, value, ".", color=colour, markersize=3)
            axes.axvline(curve["half"], color=palette.MUTED, linewidth=0.8, linestyle=":")
            axes.set(title=_TITLES[arm], xlabel="optimizer steps", ylim=(-0.02, 1.02))
            axes.title.set_fontsize("small")
        panels[0].set_ylabel("accuracy")
        panels[0].legend(fontsize="small")
        svg = svg_from_matplotlib(canvas)
    return [
        Figure(
            title="One-hop accuracy rises, and compositions do not follow",
            svg=svg,
            caption="Greedy accuracy on held-out problems along training: first questions (S1) and "
            "second ones (S2) alone, and their compositions (S_comp), with S1·S2, what solving "
            "both independently would give. Lines are means, dots single seeds. At the dotted "
            "line the arms part.",
            alt="; ".join(_in_words(arm, curve) for arm, curve in curves.items()) + ".",
        )
    ]


def _in_words(arm: str, curve: Mapping[str, Any]) -> str:
    ends = {name: float(np.mean(curve[name][-1])) for name in _LINES}
    return f"{_TITLES[arm]}: " + ", ".join(
        f"{_LINES[name]} ends at {value:.2f}" for name, value in ends.items()
    )


def tables(results: Sequence[Result]) -> list[DataTable]:
    """Means over seeds at the half and the end; arguments as for `findings.evidence`."""
    rows: list[list[str | float | int]] = []
    seeds = 0
    for arm, curve in learning_curves(results).items():
        seeds = len(curve["s1"][0])
        for step in (curve["half"], curve["step"][-1]):
            at = curve["step"].index(step)
            means = [round(float(np.mean(curve[name][at])), 3) for name in _SHOWN]
            rows.append([arm, step, *means])
    templates = " and ".join(str(len(TEMPLATES[group])) for group in GROUPS)
    return [
        DataTable(
            "Learning experiment: accuracies and the parts of Δ",
            ["Arm", "Steps", *_SHOWN.values()],
            rows,
            f"Means over {seeds} seed{'s' if seeds > 1 else ''}. Groups of {templates} templates; "
            "tested on group B, compositions for training from group A. Distraction, second hop "
            "and lucky add up to Δ.",
        )
    ]
