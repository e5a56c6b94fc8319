"""THC scores of arrays and tables, with everything that must be read beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from hpreliability.consistency import Method, rank_spread
from hpreliability.errors import MissingColumnError, NonFiniteScoreError, ShapeError
from hpreliability.intervals import IntervalMethod
from hpreliability.null import Null, permutation_null
from hpreliability.ranks import Ties
from hpreliability.table import Missing, NonFinite, ScoreArray, Table
from hpreliability.uncertainty import Uncertainty, UncertaintyMethod, thc_interval

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class THCResult:
    """One THC score with what is needed to judge it.

    Attributes:
        score: the THC score, in [0, 1].
        std: sample standard deviation of `spread` over values: how unevenly values travel, not an
            uncertainty of the score.
        symmetric: the score under symmetric ties, whatever `method.ties` is.
        spread: per-value share of the ranking travelled over the contexts, shape (V,).
        ranks: shape (V, C), 1 = best.
        lo, hi: interval bounds, shape (V, C).
        method: how scores became ranks.
        uncertainty: interval of the expected score, if asked for.
        null: what the score would be if the values did not differ, if asked for.
    """

    score: float
    std: float
    symmetric: float
    spread: Floats
    ranks: Floats
    lo: Floats
    hi: Floats
    method: Method
    uncertainty: Uncertainty | None
    null: Null | None


def thc_score(
    scores: ArrayLike,
    *,
    padded: bool = False,
    interval: IntervalMethod = "mean_std",
    ties: Ties = "paper",
    level: float = 0.95,
    resamples: int = 5000,
    uncertainty: UncertaintyMethod | None = None,
    replicates: int = 2000,
    null: str | None = None,
    permutations: int = 1000,
    seed: int = 0,
) -> THCResult:
    """Tuning Hyper-parameter Consistency of one hyper-parameter.

    Args:
        scores: shape (V, R, C): values, runs, contexts; or (V, R, C, T) with T tasks pooled inside
            each context.
        padded: NaN pads cells that have fewer runs than others. Otherwise NaN is an error: a run
            that failed is not a run that does not exist.
        interval: how runs become an interval; see `score_intervals`.
        ties: how overlapping intervals rank; see `interval_ranks`.
        level: coverage of `interval` where that is not mean ± spread, and of `uncertainty`.
        resamples: replicates of bootstrap intervals.
        uncertainty: method for an interval of the expected score; see `thc_interval`. None: none.
        replicates: replicates of bootstrap uncertainties.
        null: `"permutation"` for the null distribution; None: none.
        permutations: number of permutations.
        seed: root of all randomness.

    Raises:
        ShapeError: not three or four axes, or rows of unequal length.
        TooFewValuesError: V < 2.
        TooFewRunsError: a cell without runs.
        NonFiniteScoreError: an infinite score, or NaN without `padded`; with its index.

    Source: arXiv 2406.17523 and its public analysis code for the score; null, calibration,
    uncertainty and symmetric ties are this library's.
    """
    array = _as_scores(scores, padded=padded)
    method = Method(interval=interval, ties=ties, level=level, resamples=resamples, seed=seed)
    lo, hi = method.intervals(array)
    ranks = method.ranks(lo, hi)
    spread = rank_spread(ranks)
    symmetric = rank_spread(replace(method, ties="symmetric").ranks(lo, hi))
    if null not in (None, "permutation"):
        raise ValueError(f'null must be "permutation" or None, got {null!r}')
    return THCResult(
        score=float(spread.mean()),
        std=float(spread.std(ddof=1)),
        symmetric=float(symmetric.mean()),
        spread=spread,
        ranks=ranks,
        lo=lo,
        hi=hi,
        method=method,
        uncertainty=None
        if uncertainty is None
        else thc_interval(
            array, method, how=uncertainty, level=level, replicates=replicates, seed=seed
        ),
        null=None
        if null is None
        else permutation_null(array, method, permutations=permutations, seed=seed),
    )


@dataclass(frozen=True)
class THCTable:
    """THC scores of every group of a table.

    Attributes:
        frame: one row per group: the `by` columns, `score`, `std`, `symmetric`, `n_values`,
            `n_contexts`, `n_runs`; with an uncertainty `low`, `high`, `uncertainty` (its method);
            with a null `null_mean`, `null_low`, `null_high`, `p_value`, `calibrated`.
        ranks: one row per value and context of every group: the `by` columns, `value`, `context`,
            `lo`, `hi`, `rank`.
        over: the columns that form the contexts.
        by: the columns that form the groups.
        results: the full result of each group, in the order of `frame`.
        notes: everything that a rule dropped or replaced, in words.
    """

    frame: pd.DataFrame
    ranks: pd.DataFrame
    over: tuple[str, ...]
    by: tuple[str, ...]
    results: tuple[THCResult, ...]
    notes: tuple[str, ...]


def thc(
    table: Table,
    *,
    over: str | Sequence[str] = "env",
    by: Sequence[str] | None = None,
    interval: IntervalMethod | None = None,
    ties: Ties = "paper",
    level: float = 0.95,
    resamples: int = 5000,
    uncertainty: UncertaintyMethod | None = "bootstrap",
    replicates: int = 2000,
    null: str | None = "permutation",
    permutations: int = 1000,
    nonfinite: NonFinite = "raise",
    missing: Missing = "raise",
    seed: int = 0,
) -> THCTable:
    """THC score of every group of runs in a table.

    Args:
        table: one score per run; reduce learning curves first.
        over: the context column whose labels are the contexts, or several columns whose product is.
        by: columns that form groups, `"hyperparameter"` among them; default: the hyper-parameter
            and every context column that is not in `over`. A context column in neither is pooled:
            its labels become tasks inside each context.
        interval: default `"mean_std"`, or `"iqm"` where tasks are pooled, as in the paper's code.
        nonfinite: rule for failed runs; see `Table.settle`.
        missing: rule for values without a run in some context; see `Table.scores`.
        ties, level, resamples, uncertainty, replicates, null, permutations, seed: see `thc_score`.

    Raises:
        HPReliabilityError: a subclass names what is wrong and where; nothing is dropped silently.
    """
    axes = (over,) if isinstance(over, str) else tuple(over)
    groups = (
        ("hyperparameter", *(c for c in table.contexts if c not in axes))
        if by is None
        else tuple(by)
    )
    _check_axes(table, axes, groups)
    pooled = [c for c in table.contexts if c not in axes and c not in groups]
    settled = table.settle(nonfinite)
    rows, ranks, results, notes = [], [], [], list(settled.notes)
    keys = settled.frame[list(groups)].drop_duplicates().sort_values(list(groups))
    for key in keys.to_dict("records"):
        group = {str(column): str(label) for column, label in key.items()}
        conditions = {c: g for c, g in group.items() if c != "hyperparameter"}
        cell = settled.scores(group["hyperparameter"], over=axes, missing=missing, **conditions)
        result = thc_score(
            cell.scores,
            padded=True,  # the table has refused or settled failed runs
            interval=interval or ("iqm" if pooled else "mean_std"),
            ties=ties,
            level=level,
            resamples=resamples,
            uncertainty=uncertainty,
            replicates=replicates,
            null=null,
            permutations=permutations,
            seed=seed,
        )
        notes += [f"{'/'.join(group.values())}: {note}" for note in cell.notes]
        rows.append(group | _row(result, cell))
        ranks.append(_rank_rows(group, result, cell))
        results.append(result)
    return THCTable(
        frame=pd.DataFrame(rows),
        ranks=pd.concat(ranks, ignore_index=True),
        over=axes,
        by=groups,
        results=tuple(results),
        notes=tuple(notes),
    )


def _as_scores(scores: ArrayLike, *, padded: bool) -> Floats:
    try:
        array = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ShapeError(
            "scores must be a rectangular array of numbers (V, R, C); pad rows of unequal length "
            "with NaN and say padded=True"
        ) from error
    if array.ndim not in (3, 4):
        raise ShapeError(f"scores must have shape (V, R, C) or (V, R, C, T), got {array.shape}")
    if 0 in array.shape:
        raise ShapeError(f"scores must have no empty axis, got {array.shape}")
    bad = np.isinf(array) if padded else ~np.isfinite(array)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise NonFiniteScoreError(
            f"{int(bad.sum())} scores are not finite, first {array[first]} at index {first}; give "
            "a failed run the score it deserves, or say padded=True where NaN stands for runs "
            "that do not exist"
        )
    return array if array.ndim == 4 else array[..., None]


def _check_axes(table: Table, axes: tuple[str, ...], groups: tuple[str, ...]) -> None:
    known = ("hyperparameter", *table.contexts)
    for column in (*axes, *groups):
        if column not in known:
            raise MissingColumnError(f"no context {column!r}; there are: {', '.join(known[1:])}")
    if "hyperparameter" not in groups:
        raise ValueError(f'by must contain "hyperparameter", got {groups}')
    if not axes or "hyperparameter" in axes or set(axes) & set(groups):
        raise ValueError(
            f"over must name contexts that are not in by, got over={axes}, by={groups}"
        )


def _row(result: THCResult, cell: ScoreArray) -> dict[str, object]:
    runs = (~np.isnan(cell.scores[..., 0])).sum(axis=1)
    row: dict[str, object] = {
        "score": result.score,
        "std": result.std,
        "symmetric": result.symmetric,
        "n_values": len(cell.values),
        "n_contexts": len(cell.contexts),
        "n_runs": int(runs.sum()),
    }
    if result.uncertainty is not None:
        row |= {
            "low": result.uncertainty.low,
            "high": result.uncertainty.high,
            "uncertainty": result.uncertainty.method,
        }
    if result.null is not None:
        row |= {
            "null_mean": result.null.mean,
            "null_low": result.null.low,
            "null_high": result.null.high,
            "p_value": result.null.p_value,
            "calibrated": result.null.calibrated,
        }
    return row


def _rank_rows(group: dict[str, str], result: THCResult, cell: ScoreArray) -> pd.DataFrame:
    index = pd.MultiIndex.from_product([cell.values, cell.contexts], names=["value", "context"])
    frame = index.to_frame(index=False).assign(
        lo=result.lo.ravel(), hi=result.hi.ravel(), rank=result.ranks.ravel()
    )
    for position, (column, text) in enumerate(group.items()):
        frame.insert(position, column, text)
    return frame
