"""Figures and tables of the exact bench."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from decapod.claims import Cell, DataTable, Figure
from decapod.report import palette
from vineppo.experiments.drawing import Floats, figure, legend_above, name_rows, row_of_dots
from vineppo.experiments.exact import (
    CRITIC_ERROR,
    FAMILIES,
    NAMES,
    ROLLOUTS,
    STEP_TOKENS,
    Budget,
    Result,
    break_even,
    ratios,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BUDGETS: Final[dict[Budget, str]] = {
    "responses": "equal responses",
    "tokens": "equal generated tokens",
}
_LEAST: Final = 1e-17  # where a bias of exactly 0 is drawn
_NOISE: Final = 1e-9  # a relative bias below is rounding


def figures(results: Sequence[Result]) -> list[Figure]:
    """All figures; ``results`` of :func:`vineppo.experiments.exact.tree_cell`."""
    return [_biases(results), _errors(results), _cosines(results), _families(results)]


def tables(results: Sequence[Result]) -> list[DataTable]:
    """All tables; ``results`` of :func:`vineppo.experiments.exact.tree_cell`."""
    return [_summary(results), _where_vines_pay(results)]


# --- figures -------------------------------------------------------------------------------------


def _biases(results: Sequence[Result]) -> Figure:
    found = {name: _of(results, name, "bias") for name in NAMES}

    def draw(panels: Any) -> None:
        axes = panels[0][0]
        _dots(axes, {name: np.maximum(found[name], _LEAST) for name in NAMES})
        axes.set(xscale="log", xlabel="length of the bias over that of the gradient")

    exact = [NAMES[name] for name in NAMES if found[name].max() < _NOISE]
    biased = "; ".join(
        f"{NAMES[name]}: {_span(found[name])}" for name in NAMES if found[name].max() >= _NOISE
    )
    return figure(
        draw, 1,
        title="Bias of the expected gradient",
        caption="By summing over all responses and all outcomes of the rollouts; a dot is a tree, "
        "the bar their median. What lies at 1e-15 is rounding. GRPO's bias is one of length alone "
        "where rewards are 0 and 1. PPO's critic is off by "
        f"{CRITIC_ERROR:g} in the mean. A step that begins with its mark makes VinePPO biased.",
        alt=f"Without bias: {', '.join(exact)}. Relative bias, median and range: {biased}.",
    )  # fmt: skip


def _errors(results: Sequence[Result]) -> Figure:
    found: dict[Budget, dict[str, Floats]] = {
        budget: {name: np.array(ratios(results, name, "rloo", budget)) for name in NAMES}
        for budget in _BUDGETS
    }

    def draw(panels: Any) -> None:
        for axes, (budget, title) in zip(panels[0], _BUDGETS.items(), strict=True):
            axes.axvline(1, color=palette.MUTED, linewidth=0.8)
            _dots(axes, found[budget])
            axes.set(xscale="log", title=title, xlabel="squared error over that of RLOO")

    words = "; ".join(
        f"{NAMES[name]}: {np.median(found['responses'][name]):.2f} and "
        f"{np.median(found['tokens'][name]):.2f}"
        for name in NAMES
    )
    return figure(
        draw, 2,
        title="Squared error of one estimate, against RLOO",
        caption="Squared bias and variance together. Left, for one group of responses each; right, "
        "for as many groups as the same number of generated tokens pays for, rollouts included and "
        "equal states sampled once. Below 1 is better than RLOO. What a critic costs is not "
        "counted. GRPO's error is that of its length.",
        alt=f"Median ratio at equal responses and at equal tokens. {words}.",
    )  # fmt: skip


def _cosines(results: Sequence[Result]) -> Figure:
    found = {
        budget: {
            name: np.array([r["arms"][name]["cosine"][budget][0] for r in results])
            for name in NAMES
        }
        for budget in _BUDGETS
    }

    def draw(panels: Any) -> None:
        for axes, (budget, title) in zip(panels[0], _BUDGETS.items(), strict=True):
            _dots(axes, found[budget])
            axes.set(title=title, xlabel="cosine to the exact gradient")

    words = "; ".join(
        f"{NAMES[name]}: {found['responses'][name].mean():.2f} and "
        f"{found['tokens'][name].mean():.2f}"
        for name in NAMES
    )
    return figure(
        draw, 2,
        title="Cosine of one estimate to the exact gradient",
        caption=f"Means of {results[0]['batches']} sampled estimates per tree; left of one group, "
        "right of as many groups, rounded, as the same number of tokens pays for.",
        alt=f"Mean cosine at equal responses and at equal tokens. {words}.",
    )  # fmt: skip


def _families(results: Sequence[Result]) -> Figure:
    families = [f for f in FAMILIES if any(r["family"] == f for r in results)]
    kinds = {"token": "every token a step", "step": f"steps of {STEP_TOKENS} tokens"}
    found = {
        (kind, k, family): _mean_ratio(results, f"vine_{kind}_{k}", family)
        for kind in kinds
        for k in ROLLOUTS
        for family in families
    }

    def draw(panels: Any) -> None:
        for axes, (kind, title) in zip(panels[0], kinds.items(), strict=True):
            axes.axvline(1, color=palette.MUTED, linewidth=0.8)
            for k, colour in zip(ROLLOUTS, palette.SERIES, strict=False):
                x = [found[kind, k, family] for family in families]
                axes.plot(x, range(len(x)), "o", color=colour, markersize=5, label=f"K = {k}")
            axes.set(title=title, xlabel="variance over that of RLOO, equal tokens")
            axes.set_xlim(left=0)
            name_rows(axes, families)
        legend_above(panels[0][0], columns=len(ROLLOUTS))

    words = "; ".join(
        f"{family}: " + ", ".join(f"{found['step', k, family]:.2f} with K = {k}" for k in ROLLOUTS)
        for family in families
    )
    won = [f for f in families if min(found[kind, k, f] for kind in kinds for k in ROLLOUTS) < 1]
    where = f"Vines win on: {', '.join(won)}." if won else "Vines win on none of these."
    return figure(
        draw, 2,
        title="When vines do not pay",
        caption="At equal generated tokens, by kind of tree; geometric means over trees. Left of 1 "
        f"vines are the better use of tokens. {where} More responses are the better use elsewhere, "
        "unless training on them costs several times what sampling does (see the table).",
        alt=f"Variance over RLOO's with steps of {STEP_TOKENS} tokens. {words}. {where}",
        size=(7.2, 3.4),
    )  # fmt: skip


def _mean_ratio(results: Sequence[Result], arm: str, family: str) -> float:
    of = [result for result in results if result["family"] == family]
    return float(np.exp(np.mean(np.log(ratios(of, arm, "rloo", "tokens")))))


# --- tables --------------------------------------------------------------------------------------


def _summary(results: Sequence[Result]) -> DataTable:
    rows: list[list[Cell]] = []
    for name, label in NAMES.items():
        bias = _of(results, name, "bias")
        share = np.array([r["arms"][name]["tokens"] / r["tokens"] for r in results])
        rows.append(
            [
                label,
                "0" if bias.max() < _NOISE else _span(bias),
                round(float(_of(results, name, "direction").mean()), 3),
                round(float(np.median(ratios(results, name, "rloo", "responses"))), 2),
                round(float(np.median(share)), 1),
                round(float(np.median(ratios(results, name, "rloo", "tokens"))), 2),
                *(
                    round(
                        float(np.mean([r["arms"][name]["cosine"][b][0] for r in results])), 3
                    )
                    for b in _BUDGETS
                ),
            ]
        )  # fmt: skip
    widest = max(
        row["cosine"][budget][1]
        for result in results
        for row in result["arms"].values()
        for budget in _BUDGETS
    )
    return DataTable(
        "Gradient estimators",
        [
            "Estimator", "Bias", "Cosine of the mean", "Error, equal responses", "Tokens",
            "Error, equal tokens", "Cosine, equal responses", "Cosine, equal tokens",
        ],
        rows,
        f"{len(results)} trees, groups of {results[0]['group']}. Bias: relative to the gradient, "
        "median and range over trees. Error: squared bias and variance, over that of RLOO, median. "
        "Tokens: generated, rollouts included, over those of the responses, median. Cosines: of "
        f"sampled estimates; half of the 95 % interval on a tree is at most {widest:.3f}.",
    )  # fmt: skip


def _where_vines_pay(results: Sequence[Result]) -> DataTable:
    rows: list[list[Cell]] = []
    for family in FAMILIES:
        of = [result for result in results if result["family"] == family]
        for kind in ("token", "step") if of else ():
            for k in ROLLOUTS:
                arm = f"vine_{kind}_{k}"
                cost = float(np.median([break_even(result, arm) for result in of]))
                rows.append(
                    [
                        family,
                        kind,
                        k,
                        round(float(np.mean(ratios(of, arm, "rloo", "responses"))), 2),
                        round(float(np.mean(ratios(of, arm, "rloo", "tokens"))), 2),
                        round(cost, 1) if np.isfinite(cost) else "never",
                    ]
                )
    return DataTable(
        "When vines pay",
        ["Trees", "Steps", "K", "Variance, equal responses", "Variance, equal tokens", "Pays from"],
        rows,
        "Variance over that of RLOO, means over trees. Pays from: what training on a token must "
        "cost, in generated tokens, for VinePPO to have the smaller variance at equal cost; median "
        "over trees, 0 where it does in any case.",
    )


# --- drawing -------------------------------------------------------------------------------------


def _of(results: Sequence[Result], name: str, what: str) -> Floats:
    return np.array([result["arms"][name][what] for result in results], dtype=np.float64)


def _span(values: Floats) -> str:
    return f"{np.median(values):.2g} ({values.min():.2g} to {values.max():.2g})"


def _colour(name: str) -> str:
    for prefix, colour in (
        ("vine_token", palette.SERIES[0]),
        ("vine_step", palette.SERIES[2]),
        ("vine", palette.SERIES[3]),
        ("ppo", palette.SERIES[1]),
        ("exact", palette.INK),
    ):
        if name.startswith(prefix):
            return colour
    return palette.SERIES[4]


def _dots(axes: Axes, values: dict[str, Floats]) -> None:
    """A row per estimator: trees as dots, their median as a bar."""
    for row, (name, x) in enumerate(values.items()):
        row_of_dots(axes, row, x, float(np.median(x)), _colour(name))
    name_rows(axes, [NAMES[name] for name in values])
