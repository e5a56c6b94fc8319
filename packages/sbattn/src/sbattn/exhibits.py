"""The figures and tables that stand beside the verdicts in the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from decapod.claims import DataTable, Figure
from decapod.report import palette
from sbattn.certificates import LOGITS
from sbattn.evaluation import between
from sbattn.findings import FAR_LENGTH, NAMES, Floats, Runs, accuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BUCKETS: Final = ((0, 128), (128, 256), (256, 512), (512, 1024), (1024, 2048))


def figures(recall: Mapping[str, Runs], text: Mapping[str, Runs]) -> list[Figure]:
    """Accuracy by length, loss by position, live tiles by head; arguments: `findings.by_arm`."""
    return [_recall_figure(recall), _text_figure(text), _live_figure(text["stickbreaking"])]


def _recall_figure(recall: Mapping[str, Runs]) -> Figure:
    lengths = [row["length"] for row in recall["stickbreaking"][0]["recall"]]
    curves = {
        arm: np.array([[accuracy(run, n) for n in lengths] for run in runs])
        for arm, runs in recall.items()
    }

    def draw(axes: Axes) -> None:
        _lines(axes, lengths, curves)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.minorticks_off()
        axes.set(xlabel="length of the sequence", ylabel="accuracy", ylim=(-0.02, 1.03))
        axes.axvline(lengths[0], color=palette.MUTED, linewidth=0.8, linestyle=":")

    ends = (lengths[0], FAR_LENGTH, lengths[-1])
    words = "; ".join(
        f"{NAMES[arm]}: "
        + ", ".join(f"{curve[:, lengths.index(n)].mean():.3f} at {n}" for n in ends)
        for arm, curve in curves.items()
    )
    return _figure(
        draw,
        title="Recall beyond the training length",
        caption="Share of right answers in sequences longer than those of training (dotted: 64 "
        "tokens). Lines are means, dots single seeds, bands 95 % intervals over seeds where there "
        "are several.",
        alt=f"Mean accuracy. {words}.",
    )


def _text_figure(text: Mapping[str, Runs]) -> Figure:
    block = text["stickbreaking"][0]["block"]
    curves = {arm: np.array([run["by_position"] for run in runs]) for arm, runs in text.items()}
    blocks = next(iter(curves.values())).shape[1]
    middles = [block * (i + 0.5) for i in range(blocks)]

    def draw(axes: Axes) -> None:
        _lines(axes, middles, curves)
        axes.set(xlabel="position in the context, bytes", ylabel="loss, nats per byte")
        axes.axvline(256, color=palette.MUTED, linewidth=0.8, linestyle=":")

    words = "; ".join(
        f"{NAMES[arm]}: {_bucket(text[arm], _BUCKETS[1]):.2f} at positions 128–255, "
        f"{_bucket(text[arm], _BUCKETS[-1]):.2f} at 1024–2047"
        for arm in text
    )
    return _figure(
        draw,
        title="The same bytes from longer contexts",
        caption="Mean loss of the same held-out bytes, by where in the context they stand. Models "
        "were trained on contexts of 256 bytes (dotted). Lines are means, dots single seeds, bands "
        "95 % intervals over seeds where there are several.",
        alt=f"Mean loss in nats per byte. {words}.",
    )


def _live_figure(runs: Runs) -> Figure:
    before, after = (
        np.array([r["live"]["64"][when] for r in runs]) for when in ("before", "after")
    )
    layers, heads = before.shape[1:]
    labels = [f"layer {i + 1}, head {h + 1}" for i in range(layers) for h in range(heads)]

    def draw(axes: Axes) -> None:
        rows = np.arange(len(labels))
        start, end = (x.mean(axis=0).ravel() for x in (before, after))
        axes.hlines(rows, start, end, color=palette.MUTED, linewidth=1.0)
        for single in after.reshape(len(runs), -1):
            axes.plot(single, rows, ".", color=palette.SERIES[0], markersize=3)
        axes.plot(start, rows, "o", color=palette.MUTED, markerfacecolor="none", label="untrained")
        axes.plot(end, rows, "o", color=palette.SERIES[0], label="trained")
        axes.set_yticks(rows, labels)
        axes.invert_yaxis()
        axes.set(xlabel="share of causal tiles visited", xlim=(0, 1.03))
        axes.legend(loc="lower right")

    by_layer = after.mean(axis=(0, 2))
    return _figure(
        draw,
        title="What trained heads read",
        caption="Share of the 64 × 64 tiles below the diagonal that are visited at length 2048 "
        "before less than 2^−24 of every stick is left. Large dots are means over seeds, small "
        "ones single seeds.",
        alt=f"Untrained, every head visits {before.min():.2f} to {before.max():.2f}; trained, "
        f"{after.mean(axis=0).min():.2f} to {after.mean(axis=0).max():.2f}, by layer "
        + ", ".join(f"{x:.2f}" for x in by_layer)
        + ".",
        height=0.8 + 0.22 * len(labels),
    )


def _figure(
    draw: Callable[[Axes], None], *, title: str, caption: str, alt: str, height: float = 3.4
) -> Figure:
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    from decapod.report import svg_from_matplotlib

    with mpl.rc_context(palette.RCPARAMS):
        canvas = Canvas(figsize=(5.6, height), layout="constrained")
        draw(canvas.subplots())
        svg = svg_from_matplotlib(canvas)
    return Figure(title=title, svg=svg, caption=caption, alt=alt)


def _lines(axes: Axes, x: Sequence[float], curves: Mapping[str, Floats]) -> None:
    """A line per arm: `[seeds, points]` each."""
    from decapod.stats import aggregate

    for colour, name in zip(palette.SERIES, NAMES, strict=True):
        if name not in curves:
            continue
        curve = curves[name]
        axes.plot(x, curve.mean(axis=0), color=colour, label=NAMES[name])
        axes.plot(x, curve.T, ".", color=colour, markersize=3)
        if len(curve) > 1:
            bounds = [aggregate(column, "mean") for column in curve.T]
            low, high = [b.low for b in bounds], [b.high for b in bounds]
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)  # above the curves


def tables(
    gradients: Mapping[str, Sequence[float]],
    recall: Mapping[str, Runs],
    tuned: Mapping[str, Runs],
    text: Mapping[str, Runs],
) -> list[DataTable]:
    """The numbers behind the figures, the tuning, and the saturated gradients."""
    found = [_recall_table(recall), _text_table(text), _gradient_table(gradients)]
    if tuned:
        found.insert(1, _tuning_table(tuned))
    return found


def _recall_table(recall: Mapping[str, Runs]) -> DataTable:
    lengths = [row["length"] for row in recall["stickbreaking"][0]["recall"]]
    rows: list[list[str | float | int]] = []
    for arm, runs in recall.items():
        reached = [[accuracy(run, n) for run in runs] for n in lengths]
        rows.append(
            [
                NAMES[arm],
                len(runs),
                runs[0]["rate"],
                *(round(float(np.mean(r)), 4) for r in reached),
            ]
        )
        rows[-1].append(round(min(reached[lengths.index(FAR_LENGTH)]), 4))
    return DataTable(
        "Recall: accuracy by length",
        ["Arm", "Seeds", "Learning rate", *(f"L = {n}" for n in lengths), f"Worst at {FAR_LENGTH}"],
        rows,
        f"Means over seeds. {recall['stickbreaking'][0]['data']}; trained at {lengths[0]}.",
    )


def _tuning_table(tuned: Mapping[str, Runs]) -> DataTable:
    return DataTable(
        "Recall: learning rates on the tuning seeds",
        ["Arm", "Seed", "Learning rate", "Loss at the training length", "Accuracy there"],
        [
            [
                NAMES[arm],
                run["seed"],
                run["rate"],
                f"{run['recall'][0]['loss']:.1e}",
                round(run["recall"][0]["accuracy"], 4),
            ]
            for arm, runs in tuned.items()
            for run in runs
        ],
        "All arms have the same grid, steps and seeds, which no reported run has.",
    )


def _text_table(text: Mapping[str, Runs]) -> DataTable:
    return DataTable(
        "Language models: nats per byte by position in the context",
        ["Arm", "Seeds", "Parameters", *(f"{low}–{high - 1}" for low, high in _BUCKETS)],
        [
            [
                NAMES[arm],
                len(runs),
                runs[0]["parameters"],
                *(round(_bucket(runs, bounds), 4) for bounds in _BUCKETS),
            ]
            for arm, runs in text.items()
        ],
        "The same held-out bytes in every column; means over seeds.",
    )


def _bucket(runs: Runs, bounds: tuple[int, int]) -> float:
    return float(np.mean([between(run["by_position"], run["block"], *bounds) for run in runs]))


def _gradient_table(errors: Mapping[str, Sequence[float]]) -> DataTable:
    return DataTable(
        "Relative error of a saturated gradient in float32",
        ["Logit", "Exclusive sum (ours)", "Inclusive sum"],
        [
            [z, f"{errors['exclusive'][i]:.1e}", f"{errors['inclusive'][i]:.1e}"]
            for i, z in enumerate(LOGITS)
            if z in (1, 5, 8, 10, 15, 20, 25, 30)
        ],
        "One visible key. The inclusive sum is a − β·a, which cancels as β comes near 1.",
    )
