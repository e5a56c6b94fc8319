"""From numbers of runs to evidence and figures, alike for all compositions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from decapod.claims import Evidence, Figure, Paper
from decapod.report import palette
from decapod.stats import aggregate


def composition(title: str) -> Paper:
    """What stands in place of a paper."""
    return Paper(title, "The Decapod authors", "Composition of libraries", 2026, "")


def over(
    values: npt.ArrayLike, unit: str, detail: str, arms: Mapping[str, float] | None = None
) -> Evidence:
    """The mean of one number per unit, with its 95 % interval; infinite where there is one only."""
    x = np.asarray(values, dtype=np.float64)
    found = aggregate(x, "mean")
    return Evidence(found.value, found.low, found.high, len(x), unit, dict(arms or {}), detail)


def lines(
    title: str,
    x: Sequence[float],
    curves: Mapping[str, npt.ArrayLike],
    *,
    caption: str,
    labels: tuple[str, str],
    then: Callable[[Any], None] | None = None,
) -> Figure:
    """A line per arm with a dot per seed; curves are [seeds, points], ``then`` may do more."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    from decapod.report import svg_from_matplotlib

    with mpl.rc_context(palette.RCPARAMS):
        canvas = Canvas(figsize=(5.6, 3.4), layout="constrained")
        axes = canvas.subplots()
        for colour, (name, values) in zip(palette.SERIES, curves.items(), strict=False):
            y = np.asarray(values, dtype=np.float64)
            axes.plot(x, y.mean(axis=0), color=colour, label=name)
            axes.plot(x, y.T, ".", color=colour, markersize=3)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.legend()
        if then is not None:
            then(axes)
        svg = svg_from_matplotlib(canvas)
    told = "; ".join(
        f"{name}: " + ", ".join(f"{m:.3g} at {at:g}" for m, at in zip(means, x, strict=True))
        for name, means in ((n, np.mean(np.asarray(v), axis=0)) for n, v in curves.items())
    )
    return Figure(title, svg, caption, f"Means by {labels[0]}. {told}.")
