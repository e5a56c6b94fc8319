"""From scores to advice: which value to use, what a wrong one costs, what to tune first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hpreliability.comparators import best_group, chs
from hpreliability.consistency import Method
from hpreliability.errors import ShapeError
from hpreliability.intervals import Floats
from hpreliability.table import Missing, NonFinite, Table, label


@dataclass(frozen=True)
class Recommendation:
    """Advice on one hyper-parameter.

    Attributes:
        values: V labels.
        contexts: C labels.
        best: the value to use in all contexts: the largest mean score once scores are replaced,
            within each context, by the share of runs that score no more (`chs`), so no context
            dominates by its scale.
        best_per_context: the value with the largest mean in each context.
        safe: values that are not separated from a context's best one in at least `share` of the
            contexts, in the order of `values`. Can be empty.
        safe_share: shape (V,): share of contexts in which a value is not separated from the best.
        regret: shape (V, C): best mean score of the context minus the value's, in score units.
        relative_regret: shape (V, C): the same divided by the context's range of mean scores, 0 to
            1; 0 where all means are equal.
        default: label of the default, or None if none was named.
        default_regret: shape (C,), or None: regret of the default, in score units.
        share: the share that `safe` used.
        notes: everything that a rule dropped or replaced on the way, in words.
    """

    values: tuple[str, ...]
    contexts: tuple[str, ...]
    best: str
    best_per_context: tuple[str, ...]
    safe: tuple[str, ...]
    safe_share: Floats
    regret: Floats
    relative_regret: Floats
    default: str | None
    default_regret: Floats | None
    share: float
    notes: tuple[str, ...] = ()


def recommend(
    table: Table,
    *,
    hyperparameter: str,
    over: str | Sequence[str] = "env",
    default: object = None,
    share: float = 0.8,
    method: Method | None = None,
    nonfinite: NonFinite = "raise",
    missing: Missing = "raise",
    **conditions: str | Sequence[str],
) -> Recommendation:
    """Best overall value, safe set and regret of one hyper-parameter of a table.

    Args:
        table: one score per run, larger is better; reduce learning curves first.
        hyperparameter: which one.
        over: the context column, or columns whose product, forms the contexts. Other context
            columns are pooled inside a context unless a condition settles them.
        default: one of the values, whose regret is reported.
        share: a value is safe if it belongs to the best group in at least this share of contexts.
        method: how scores become intervals; `Method()` if None.
        nonfinite: rule for failed runs; see `Table.settle`.
        missing: rule for values without a run in some context; see `Table.scores`.
        conditions: labels to select first, by column, such as `agent="DER"`.

    Raises:
        HPReliabilityError: a subclass names what is wrong and where; nothing is dropped silently.
        ValueError: an unknown default, or `share` not in (0, 1].
    """
    # Rules see the selected rows alone: a failed run elsewhere is no concern of this advice.
    selected = table.select(hyperparameter=hyperparameter, **conditions).settle(nonfinite)
    cell = selected.scores(hyperparameter, over=over, missing=missing)
    advice = recommend_values(
        cell.scores,
        cell.values,
        cell.contexts,
        method=method,
        default=None if default is None else label(default),
        share=share,
    )
    return replace(advice, notes=(*selected.notes, *cell.notes))


def recommend_values(
    scores: Floats,
    values: Sequence[str],
    contexts: Sequence[str],
    *,
    method: Method | None = None,
    default: str | None = None,
    share: float = 0.8,
) -> Recommendation:
    """Best overall value, safe set and regret of one hyper-parameter.

    Args:
        scores: shape (V, R, C, T), larger is better; NaN marks a run that does not exist. The T
            tasks of a context are averaged for means and regret.
        values: V distinct labels.
        contexts: C labels.
        method: how scores become intervals; `Method()` if None.
        default: one of `values`, whose regret is reported.
        share: a value is safe if it belongs to the best group in at least this share of contexts.

    Raises:
        ShapeError: scores are not (V, R, C, T) for these labels.
        ValueError: repeated labels, an unknown default, or `share` not in (0, 1].
    """
    scores = np.asarray(scores, dtype=np.float64)
    expected = (len(values), len(contexts))
    if scores.ndim != 4 or (scores.shape[0], scores.shape[2]) != expected:
        raise ShapeError(
            f"scores must have shape (V, R, C, T) with V, C = {expected} labels, got {scores.shape}"
        )
    if len(set(values)) != len(values):
        raise ValueError(f"values must be distinct, got {list(values)}")
    if default is not None and default not in values:
        raise ValueError(f"default must be one of {list(values)}, got {default!r}")
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    lo, hi = (method or Method()).intervals(scores)
    runs = scores.mean(axis=-1)
    means = np.nanmean(runs, axis=1)
    regret = means.max(axis=0) - means
    spread = np.ptp(means, axis=0)
    safe_share = best_group(lo, hi).mean(axis=1)
    return Recommendation(
        values=tuple(values),
        contexts=tuple(contexts),
        best=values[chs(runs).best],
        best_per_context=tuple(values[v] for v in means.argmax(axis=0)),
        # A share such as 0.8 of 5 contexts must not fail by rounding.
        safe=tuple(v for v, s in zip(values, safe_share, strict=True) if s >= share - 1e-9),
        safe_share=safe_share,
        regret=regret,
        relative_regret=regret / np.where(spread > 0, spread, 1.0),
        default=default,
        default_regret=None if default is None else regret[list(values).index(default)],
        share=share,
    )


def effect_size(scores: Floats) -> float:
    """How much of the spread of scores within a context is due to the value.

    Args:
        scores: shape (V, R, C, T); NaN marks a run that does not exist. Tasks are averaged.

    Returns:
        Mean over contexts of ω², the bias-corrected share of variance between values; 0 to 1, and
        about 0 when no value matters. Contexts in which all runs score the same count as 0.

    Raises:
        ShapeError: not four axes, or so few runs that no variance within a value is left.
    """
    if scores.ndim != 4:
        raise ShapeError(f"scores must have shape (V, R, C, T), got {scores.shape}")
    runs = scores.mean(axis=-1)
    exists = ~np.isnan(runs)
    count = exists.sum(axis=1)  # (V, C)
    total_count = count.sum(axis=0)
    freedom = total_count - len(runs)
    if (count == 0).any() or (freedom < 1).any():
        raise ShapeError("effect_size needs a run in every cell and some cell with two")
    means = np.nanmean(runs, axis=1)
    grand = np.nansum(runs, axis=(0, 1)) / total_count
    between = (count * (means - grand) ** 2).sum(axis=0)
    within = np.nansum((runs - means[:, None]) ** 2, axis=(0, 1)) / freedom
    whole = between + within * (freedom + 1)
    omega = (between - (len(runs) - 1) * within) / np.where(whole > 0, whole, 1.0)
    return float(np.clip(omega, 0, 1).mean())


def tune_first(
    calibrated: Mapping[str, float], effects: Mapping[str, float]
) -> tuple[tuple[str, float], ...]:
    """Order hyper-parameters by how much tuning them per context should matter.

    Args:
        calibrated: calibrated THC of each hyper-parameter (`permutation_null`).
        effects: effect size of each (`effect_size`).

    Returns:
        (name, priority) in descending order of priority = max(calibrated THC, 0) × effect size:
        large for values that matter and whose ranking changes from context to context.

    Raises:
        ValueError: the two name different hyper-parameters.
    """
    if set(calibrated) != set(effects):
        odd = sorted(set(calibrated) ^ set(effects))
        raise ValueError(f"both arguments must name the same hyper-parameters; odd ones: {odd}")
    priority = {name: max(calibrated[name], 0.0) * effects[name] for name in calibrated}
    return tuple(sorted(priority.items(), key=lambda item: (-item[1], item[0])))
