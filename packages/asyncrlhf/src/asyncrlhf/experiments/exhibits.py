"""The figures that stand beside the verdicts in the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from asyncrlhf.experiments.findings import (
    FRESH,
    NAMES,
    STALE,
    Cells,
    Floats,
    Run,
    last,
    losses_of,
    round_seconds,
)
from asyncrlhf.experiments.robustness import RATES
from asyncrlhf.experiments.speed import ARMS, BALANCES
from decapod.claims import Figure
from decapod.report import palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS: Final = dict(zip(NAMES, (*palette.SERIES, palette.MUTED, palette.INK), strict=True))
_PANEL: Final = (3.6, 3.0)  # inches


def figures(
    cells: Cells,
    races: Sequence[Run],
    epochs: Sequence[Run],
    samples: Sequence[Run],
    proxies: Sequence[Run],
) -> list[Figure]:
    """All figures; arguments: runs of R1 by cell, of R2, of both knobs of R3, and with a proxy."""
    return [
        _gold_by_staleness(cells),
        _frontiers(cells),
        _rounds(races),
        _knobs(epochs, samples),
        _overoptimization(proxies),
    ]


# --- R1 -------------------------------------------------------------------------------------------


def _gold_by_staleness(cells: Cells) -> Figure:
    losses = losses_of(cells)
    numbers = sorted({n for _, _, n in cells})

    def draw(panels: Any) -> None:
        for axes, rate in zip(panels[0], RATES, strict=True):
            for loss in losses:
                gold = np.array([last(cells[loss, rate, n]) for n in numbers]).T
                _band(axes, numbers, gold, _COLOURS[loss], NAMES[loss])
            axes.set_xscale("log", base=2)
            axes.set_xticks(numbers, [str(n) for n in numbers])
            axes.minorticks_off()
            axes.set(title=f"learning rate {rate:g}", xlabel="minibatches per round, N")
        panels[0][0].set_ylabel("gold score at the end")
        _shared_legend(panels[0][0], ncols=3)

    words = "; ".join(
        f"{NAMES[loss]} at {rate:g}: "
        + ", ".join(f"{last(cells[loss, rate, n]).mean():.3f} with N = {n}" for n in numbers)
        for rate in RATES
        for loss in losses
    )
    return _figure(
        draw, 1, 2,
        title="Gold against staleness, at two learning rates",
        caption="Mean gold score after equal numbers of updates, by how many minibatches are "
        "generated with the same weights: the last of N is N − 1 updates stale. Lines are means, "
        "dots single seeds, bands 95 % intervals over seeds where there are several.",
        alt=f"Mean gold score. {words}.",
        sharey=True,
    )  # fmt: skip


def _frontiers(cells: Cells) -> Figure:
    shown = ("online_dpo", "proximal_rloo")
    numbers = sorted({n for _, _, n in cells})

    def draw(panels: Any) -> None:
        for row, rate in zip(panels, RATES, strict=True):
            for axes, loss in zip(row, shown, strict=True):
                for colour, n in zip(palette.SERIES, numbers, strict=False):
                    kl, gold = (_curves(cells[loss, rate, n], name) for name in ("kl", "gold"))
                    axes.plot(
                        kl.mean(axis=0), gold.mean(axis=0), "-", color=colour, linewidth=1.2,
                        marker=".", markersize=3, label=f"N = {n}",
                    )  # fmt: skip
                    axes.plot(kl[:, -1], gold[:, -1], "o", color=colour, markersize=4)
                axes.set_title(f"{NAMES[loss]}, rate {rate:g}")
        for axes in panels[-1]:
            axes.set_xlabel("divergence from the start, nats")
        for row in panels:
            row[0].set_ylabel("gold score")
        _shared_legend(panels[0][0], ncols=len(numbers))

    words = "; ".join(
        f"{NAMES[loss]} at {rate:g}, N = {n}: gold {last(cells[loss, rate, n]).mean():.3f} at "
        f"{last(cells[loss, rate, n], 'kl').mean():.2f} nats"
        for rate in RATES
        for loss in shown
        for n in (FRESH, STALE)
    )
    return _figure(
        draw, 2, 2,
        title="Gold against divergence",
        caption="The way of a policy from the fine-tuned model on: means over seeds at the "
        "evaluations along the way, larger dots where each seed ended. Where staleness only slows "
        "a loss down, all N lie on one line; where they do not, stale samples cost more.",
        alt=f"At the end. {words}.",
        sharex="row",
        sharey="row",
    )  # fmt: skip


def _curves(runs: Sequence[Run], name: str) -> Floats:
    """[seeds, evaluations]."""
    return np.array([[row[name] for row in run["curve"]] for run in runs])


# --- R2 -------------------------------------------------------------------------------------------


def _rounds(races: Sequence[Run]) -> Figure:
    balances = [name for name in BALANCES if any(race["balance"] == name for race in races)]
    of = {name: [race for race in races if race["balance"] == name] for name in balances}
    measured = {
        (name, arm): np.array([1000 * round_seconds(race, arm) for race in of[name]])
        for name in balances
        for arm in ARMS
    }
    predicted = {
        (name, arm): float(np.mean([1000 * race["arms"][arm]["predicted"] for race in of[name]]))
        for name in balances
        for arm in ARMS
    }

    def draw(panels: Any) -> None:
        axes = panels[0][0]
        width = 0.8 / len(ARMS)
        for i, arm in enumerate(ARMS):
            at = np.arange(len(balances)) + (i - (len(ARMS) - 1) / 2) * width
            found = [measured[name, arm] for name in balances]
            axes.bar(at, [x.mean() for x in found], 0.9 * width, color=palette.SERIES[i], label=arm)
            for x, values in zip(at, found, strict=True):
                axes.plot([x] * len(values), values, ".", color=palette.INK, markersize=4)
            axes.hlines(
                [predicted[name, arm] for name in balances], at - 0.5 * width, at + 0.5 * width,
                color=palette.INK, linewidth=1.6, label="predicted" if i == 0 else None,
            )  # fmt: skip
        axes.set_xticks(range(len(balances)), balances)
        axes.set_ylabel("milliseconds a round")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)

    words = "; ".join(
        f"{name}, {arm}: {measured[name, arm].mean():.0f} ms measured, "
        f"{predicted[name, arm]:.0f} predicted"
        for name in balances
        for arm in ARMS
    )
    return _figure(
        draw, 1, 1,
        title="A round, measured and predicted",
        caption="Median round of each run; bars are means over seeds, dots single seeds. Lines are "
        "what the timing model gives for the stages of the synchronous run on two cores.",
        alt=f"{words}.",
        size=(6.4, 3.2),
    )  # fmt: skip


# --- R3 and the proxy -----------------------------------------------------------------------------


def _knobs(epochs: Sequence[Run], samples: Sequence[Run]) -> Figure:
    columns = (
        ("generation-bound", "T", "epochs", epochs),
        ("training-bound", "K", "samples", samples),
    )

    def draw(panels: Any) -> None:
        for column, (title, sign, knob, runs) in enumerate(columns):
            top, bottom = panels[0][column], panels[1][column]
            for colour, (position, of) in zip(
                palette.SERIES, _by(runs, knob).items(), strict=False
            ):
                for axes, name in ((top, "gold"), (bottom, "kl")):
                    clock = _curves(of, "clock").mean(axis=0)
                    _band(axes, clock, _curves(of, name), colour, f"{sign} = {position}")
            top.set_title(title)
            top.legend(loc="lower right")
            bottom.set_xlabel("seconds, predicted")
        panels[0][0].set_ylabel("gold score")
        panels[1][0].set_ylabel("divergence, nats")

    words = "; ".join(
        f"{title}, {sign} = {position}: gold {last(of).mean():.3f} and divergence "
        f"{last(of, 'kl').mean():.2f} after {last(of, 'clock').mean():.1f} s"
        for title, sign, knob, runs in columns
        for position, of in _by(runs, knob).items()
    )
    return _figure(
        draw, 2, 2,
        title="Two knobs, against the clock",
        caption="Online DPO, asynchronous. Left, generation takes longer: each round is trained on "
        "T times. Right, training does: K completions per prompt, the best against the worst. "
        "Seconds are those that the timing model gives for the measured stages. Lines are means, "
        "dots single seeds, bands 95 % intervals over seeds where there are several.",
        alt=f"{words}.",
        sharex="col",
    )  # fmt: skip


def _by(runs: Sequence[Run], knob: str) -> dict[int, list[Run]]:
    positions = sorted({int(run[knob]) for run in runs})
    return {position: [run for run in runs if run[knob] == position] for position in positions}


def _overoptimization(proxies: Sequence[Run]) -> Figure:
    losses = [loss for loss in NAMES if any(run["loss"] == loss for run in proxies)]
    of = {loss: [run for run in proxies if run["loss"] == loss] for loss in losses}
    titles = {"proxy": "what is optimised", "gold": "what is meant"}

    def draw(panels: Any) -> None:
        for axes, (name, title) in zip(panels[0], titles.items(), strict=True):
            for loss in losses:
                kl, score = (_curves(of[loss], of_row) for of_row in ("kl", name))
                # Single seeds are paths of their own; a mean over them would be on none.
                for i in range(len(kl)):
                    axes.plot(
                        kl[i], score[i], "-", color=_COLOURS[loss], marker=".", markersize=3,
                        linewidth=0.9, label=NAMES[loss] if i == 0 else None,
                    )  # fmt: skip
            axes.set(title=title, xlabel="divergence from the start, nats", ylabel=f"{name} score")
        _shared_legend(panels[0][0], ncols=len(losses))

    words = "; ".join(
        f"{NAMES[loss]}: gold rises from {_curves(of[loss], 'gold')[:, 0].mean():.2f} to "
        f"{_curves(of[loss], 'gold').max(axis=1).mean():.2f} and ends at "
        f"{last(of[loss]).mean():.2f}, proxy from {_curves(of[loss], 'proxy')[:, 0].mean():.2f} to "
        f"{last(of[loss], 'proxy').mean():.2f}"
        for loss in losses
    )
    accuracy = float(np.mean([run["accuracy"] for run in proxies]))
    return _figure(
        draw, 1, 2,
        title="Over-optimisation of a proxy",
        caption="Policies that are trained on the score of a small reward model, which is right "
        f"about {accuracy:.0%} of fresh pairs: beyond some divergence its score rises while the "
        "gold score falls. N = 1; lines are single seeds.",
        alt=f"{words}.",
    )  # fmt: skip


# --- drawing --------------------------------------------------------------------------------------


def _band(axes: Axes, x: Any, curves: Floats, colour: str, label: str) -> None:
    """Means of ``[seeds, points]``, with single seeds and intervals."""
    from decapod.stats import aggregate

    axes.plot(x, curves.mean(axis=0), color=colour, label=label)
    axes.plot(x, curves.T, ".", color=colour, markersize=3)
    if len(curves) > 1:
        bounds = [aggregate(column, "mean") for column in curves.T]
        axes.fill_between(
            x, [b.low for b in bounds], [b.high for b in bounds],
            color=colour, alpha=0.1, linewidth=0,
        )  # fmt: skip


def _shared_legend(axes: Axes, ncols: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, loc="outside upper center", ncols=ncols)


def _figure(
    draw: Callable[[Any], None],
    rows: int,
    columns: int,
    *,
    title: str,
    caption: str,
    alt: str,
    size: tuple[float, float] | None = None,
    **sharing: Any,
) -> Figure:
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    from decapod.report import svg_from_matplotlib

    width, height = size or (columns * _PANEL[0], rows * _PANEL[1])
    with mpl.rc_context(palette.RCPARAMS):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        draw(canvas.subplots(rows, columns, squeeze=False, **sharing))
        svg = svg_from_matplotlib(canvas)
    return Figure(title=title, svg=svg, caption=caption, alt=alt)
