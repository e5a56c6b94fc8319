"""How much is lost by choosing a value in one context and using it in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import scipy
from numpy.typing import NDArray

from hpreliability.errors import MissingContextError
from hpreliability.table import Missing, Table

Measure = Literal["regret", "correlation"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Transfer:
    """Transfer between every ordered pair of contexts.

    Attributes:
        contexts: C labels.
        measure: what the entries are; see `transfer`.
        matrix: shape (C, C), mean over hyper-parameters; row: where the value was chosen, column:
            where it is used.
        hyperparameters: the H names that entered.
        each: shape (H, C, C); NaN where a ranking is constant and has no correlation.
        notes: what was left out, in words.
    """

    contexts: tuple[str, ...]
    measure: Measure
    matrix: Floats
    hyperparameters: tuple[str, ...]
    each: Floats
    notes: tuple[str, ...] = ()


def transfer(
    table: Table,
    between: str | Sequence[str],
    *,
    measure: Measure = "regret",
    missing: Missing = "drop_value",
) -> Transfer:
    """Transfer of the best value between the contexts of one axis, averaged over hyper-parameters.

    A value's score in a context is the inter-quartile mean of its runs there, over all contexts
    that are not in `between`.

    Args:
        table: one finite score per run.
        between: the context column, or columns whose product, that choices are carried between.
        measure: `"regret"`: (best − score of the value that is best elsewhere) / (best − worst), so
            0 loses nothing and 1 picks the worst value; 0 where all values score the same.
            `"correlation"`: Kendall's τ_b of the values' scores.
        missing: rule for values that some context lacks; see `Table.scores`. The default compares
            contexts on the values they share.

    Raises:
        MissingContextError: no hyper-parameter was run in two contexts.
        HPReliabilityError: see `Table.scores`.
        ValueError: unknown `measure`.
    """
    if measure not in get_args(Measure):
        raise ValueError(f"measure must be one of {get_args(Measure)}, got {measure!r}")
    axes = (between,) if isinstance(between, str) else tuple(between)
    whole = {name: table.scores(name, over=axes, missing=missing) for name in table.hyperparameters}
    contexts = max((cell.contexts for cell in whole.values()), key=len)
    notes = [f"{name}: {note}" for name, cell in whole.items() for note in cell.notes]
    each, names = [], []
    for name, cell in whole.items():
        if cell.contexts != contexts or len(contexts) < 2:
            notes.append(f"{name} was left out: it was run in {', '.join(cell.contexts)} only")
            continue
        pooled = np.moveaxis(cell.scores, 2, 1).reshape(len(cell.values), len(contexts), -1)
        centre = np.array([[_iqm(x[~np.isnan(x)]) for x in row] for row in pooled])
        each.append(_regret(centre) if measure == "regret" else _correlation(centre))
        names.append(name)
    if not each:
        raise MissingContextError(
            f"transfer needs two contexts with runs in common along {axes}, got {contexts}"
        )
    stacked = np.stack(each)
    return Transfer(
        contexts=contexts,
        measure=measure,
        matrix=_mean_of_known(stacked),
        hyperparameters=tuple(names),
        each=stacked,
        notes=tuple(notes),
    )


def _iqm(x: Floats) -> float:
    return float(scipy.stats.trim_mean(x, 0.25))


def _regret(centre: Floats) -> Floats:
    """Shape (C, C) from scores (V, C): lost in column j by the value that is best in row i."""
    best, worst = centre.max(axis=0), centre.min(axis=0)
    width = np.where(best > worst, best - worst, 1.0)
    chosen = centre[centre.argmax(axis=0)]
    return np.asarray((best - chosen) / width)


def _correlation(centre: Floats) -> Floats:
    columns = centre.T
    return np.array([[_tau(a, b) for b in columns] for a in columns])


def _tau(a: Floats, b: Floats) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return np.nan
    return float(scipy.stats.kendalltau(a, b).statistic)


def _mean_of_known(stacked: Floats) -> Floats:
    known = ~np.isnan(stacked)
    count = known.sum(axis=0)
    total = np.where(known, stacked, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
