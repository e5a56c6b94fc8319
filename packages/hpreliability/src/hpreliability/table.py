"""The canonical tidy table: one row per run, or per step of a run, checked once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import scipy
from numpy.typing import NDArray

from hpreliability.errors import (
    DuplicateKeyError,
    EmptyInputError,
    MissingColumnError,
    MissingContextError,
    NonFiniteScoreError,
    ShapeError,
    SourceFormatError,
    TooFewValuesError,
)

NonFinite = Literal["raise", "worst", "drop"]
Missing = Literal["raise", "drop_context", "drop_value"]

_SHOWN = 3  # offending rows that an error quotes


@dataclass(frozen=True)
class Table:
    """Scores of many runs in canonical columns.

    Build one with `from_frame`, `read` or another reader rather than directly.

    Attributes:
        frame: columns `hyperparameter`, `value` (labels, as text), one text column per context,
            `seed` (text), `score` (float; NaN or infinite for a run that failed), and `step` when
            rows are points of learning curves. Sorted, so the order of the source's rows is
            irrelevant.
        contexts: names of the context columns.
        notes: what a rule changed on the way here, in words; never empty when something was.
    """

    frame: pd.DataFrame
    contexts: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def has_curves(self) -> bool:
        """Whether rows are points of learning curves."""
        return "step" in self.frame.columns

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """Names of the hyper-parameters, sorted."""
        return tuple(sorted(self.frame["hyperparameter"].unique()))

    def values(self, hyperparameter: str) -> tuple[str, ...]:
        """Labels of one hyper-parameter's values: by number where all are numbers, else by text."""
        labels = self.select(hyperparameter=hyperparameter).frame["value"].unique()
        return tuple(sorted(labels, key=value_order(labels)))

    def select(self, **conditions: str | Sequence[str]) -> Table:
        """Rows whose columns hold the given label, or one of the given labels.

        Raises:
            MissingColumnError: a name is not a column.
            EmptyInputError: nothing is left; the message lists the labels there are.
        """
        frame = self.frame
        for column, wanted in conditions.items():
            if column not in frame.columns:
                raise MissingColumnError(_no_column(column, frame.columns))
            labels = [wanted] if isinstance(wanted, str) else [str(label) for label in wanted]
            chosen = frame[frame[column].isin(labels)]
            if chosen.empty:
                known = ", ".join(map(repr, sorted(frame[column].unique())[:12]))
                raise EmptyInputError(f"no row has {column} in {labels}; there are: {known}")
            frame = chosen
        return replace(self, frame=frame.reset_index(drop=True))

    def reduce(
        self, how: Literal["final", "last", "auc", "best"] = "final", *, last: int = 10
    ) -> Table:
        """One score per run from its learning curve.

        Args:
            how: `"final"` point, mean of the `last` points, `"auc"` by the trapezoid rule with unit
                spacing (as the paper's code does), or `"best"` point.
            last: number of points that `"last"` averages.

        Raises:
            MissingColumnError: the table has no `step`.
            ShapeError: a run has fewer than two points for `"auc"`, or fewer than `last`.
            ValueError: unknown `how`, or `last < 1`.
        """
        if not self.has_curves:
            raise MissingColumnError("reduce needs learning curves: a table with a step column")
        if last < 1:
            raise ValueError(f"last must be at least 1, got {last}")
        needed = {"final": 1, "last": last, "auc": 2, "best": 1}
        if how not in needed:
            raise ValueError(f"how must be one of {tuple(needed)}, got {how!r}")
        keys = ["hyperparameter", "value", *self.contexts, "seed"]
        ordered = self.frame.sort_values([*keys, "step"], kind="stable")
        groups = ordered.groupby(keys, sort=False)["score"]
        short = groups.size()[lambda size: size < needed[how]]
        if len(short):
            where = dict(zip(keys, _as_tuple(short.index[0]), strict=True))
            raise ShapeError(
                f"{how!r} needs at least {needed[how]} points per run; "
                f"{len(short)} runs have fewer, first {where} with {short.iloc[0]}"
            )
        # skipna=False: a curve with a failed point is a failed run, to be ruled on later.
        reductions = {
            "final": lambda curve: curve.iloc[-1],
            "last": lambda curve: curve.iloc[-last:].mean(skipna=False),
            "auc": lambda curve: float(scipy.integrate.trapezoid(curve)),
            "best": lambda curve: curve.max(skipna=False),
        }
        reduced = groups.agg(reductions[how]).reset_index()
        return replace(self, frame=_sorted(reduced, self.contexts))

    def normalize(
        self,
        how: Literal["minmax", "cdf", "reference"],
        *,
        over: str = "env",
        references: Mapping[str, tuple[float, float]] | None = None,
    ) -> Table:
        """Scores on a common scale in every label of one context.

        Args:
            how: `"minmax"` to [0, 1]; `"cdf"`, the share of that context's runs that score no more
                (Patterson et al. 2024); `"reference"`, (score − low)/(high − low), which is the
                human-normalised score when the references are a random agent and a human.
            over: the context column within which scores share a scale.
            references: (low, high) per label of `over`, for `"reference"` alone.

        Raises:
            MissingColumnError: `over` is not a context.
            NonFiniteScoreError: a score is NaN or infinite (`"minmax"` and `"cdf"`); rule on
                failed runs first, with `settle`.
            ValueError: unknown `how`; references missing for a label, given needlessly, or equal;
                a context in which all scores are equal (`"minmax"`).
        """
        if over not in self.contexts:
            raise MissingColumnError(_no_column(over, self.contexts))
        if (how == "reference") != (references is not None):
            raise ValueError('references are needed for how="reference" and for nothing else')
        frame = self.frame.copy()
        if how != "reference":
            _require_finite(frame, self.contexts)
        grouped = frame.groupby(over, sort=False)["score"]
        if how == "minmax":
            low, high = grouped.transform("min"), grouped.transform("max")
            if (low == high).any():
                flat = frame.loc[low == high, over].iloc[0]
                raise ValueError(f"all scores are equal in {over}={flat!r}: no scale to map to")
            frame["score"] = (frame["score"] - low) / (high - low)
        elif how == "cdf":
            frame["score"] = grouped.rank(method="max", pct=True)
        elif references is not None:
            unknown = sorted(set(frame[over]) - set(references))
            if unknown:
                raise ValueError(f"references lack {len(unknown)} of {over}: {unknown[:_SHOWN]}")
            if any(low == high for low, high in references.values()):
                raise ValueError("a reference needs two different scores (low, high)")
            low = frame[over].map({k: v[0] for k, v in references.items()})
            high = frame[over].map({k: v[1] for k, v in references.items()})
            frame["score"] = (frame["score"] - low) / (high - low)
        else:
            raise ValueError(f'how must be "minmax", "cdf" or "reference", got {how!r}')
        return replace(self, frame=frame)

    def settle(self, nonfinite: NonFinite = "raise") -> Table:
        """Apply a rule to runs whose score is NaN or infinite.

        Args:
            nonfinite: `"raise"`; `"worst"`, the lowest finite score of the same hyper-parameter in
                the same context, so that crashing is never rewarded; `"drop"`, without the run.
                The last two leave a note that counts the runs.

        Raises:
            NonFiniteScoreError: under `"raise"`, with the count and the first rows; under
                `"worst"`, a context without any finite score.
        """
        if nonfinite not in get_args(NonFinite):
            raise ValueError(f"nonfinite must be one of {get_args(NonFinite)}, got {nonfinite!r}")
        bad = ~np.isfinite(self.frame["score"].to_numpy(dtype=np.float64))
        if not bad.any():
            return self
        if nonfinite == "raise":
            _require_finite(self.frame, self.contexts)
        if nonfinite == "drop":
            return self._without(bad)
        frame = self.frame.copy()
        frame["score"] = frame["score"].where(~bad)
        worst = frame.groupby(["hyperparameter", *self.contexts], sort=False)["score"]
        frame["score"] = frame["score"].fillna(worst.transform("min"))
        if frame["score"].isna().any():
            raise NonFiniteScoreError(
                "no finite score to stand in for failed runs: "
                + _quote(frame[frame["score"].isna()], self.contexts)
            )
        note = (
            f"{bad.sum()} of {len(bad)} scores were not finite and count as the worst finite "
            "score of their hyper-parameter and context"
        )
        return replace(self, frame=frame, notes=(*self.notes, note))

    def _without(self, bad: NDArray[np.bool_]) -> Table:
        """Without the runs that have a bad row; a curve must not outlive its failed point."""
        frame = self.frame
        runs = pd.MultiIndex.from_frame(frame[["hyperparameter", "value", *self.contexts, "seed"]])
        kept = frame[~runs.isin(runs[bad])].reset_index(drop=True)
        if kept.empty:
            raise NonFiniteScoreError("no run has a finite score")
        note = f"{bad.sum()} of {len(bad)} scores were not finite and their runs were dropped"
        for columns in (["hyperparameter", "value"], *([context] for context in self.contexts)):
            before = set(map(tuple, frame[columns].drop_duplicates().to_numpy().tolist()))
            after = set(map(tuple, kept[columns].drop_duplicates().to_numpy().tolist()))
            if before != after:
                gone = ["=".join(labels) for labels in sorted(before - after)]
                note += f"; no run is left of {'/'.join(columns)} {gone}"
        return replace(self, frame=kept, notes=(*self.notes, note))

    def scores(
        self,
        hyperparameter: str,
        *,
        over: str | Sequence[str],
        missing: Missing = "raise",
        **conditions: str | Sequence[str],
    ) -> ScoreArray:
        """Scores of one hyper-parameter as an array, ready for ranking.

        Args:
            hyperparameter: which one.
            over: the context column, or columns whose product, forms the contexts to compare.
                Context columns named neither here nor in `conditions` with a single label are
                pooled as tasks of a context.
            missing: what to do when a value has no run in a context that others have: `"raise"`,
                `"drop_context"` (for all values) or `"drop_value"`. Drops are noted in the result.
            conditions: labels to select first, by column.

        Raises:
            MissingColumnError: `over` or a condition names no column.
            EmptyInputError: no row is selected.
            TooFewValuesError: the hyper-parameter has a single value.
            MissingContextError: a cell has no run and `missing` is `"raise"`, or dropping leaves
                too little.
            NonFiniteScoreError: a score is NaN or infinite; see `settle`.
            ShapeError: the table holds curves, or a run lacks some of the pooled tasks.
        """
        if missing not in get_args(Missing):
            raise ValueError(f"missing must be one of {get_args(Missing)}, got {missing!r}")
        if self.has_curves:
            raise ShapeError("the table holds learning curves; reduce them first: table.reduce()")
        axes = (over,) if isinstance(over, str) else tuple(over)
        for axis in axes:
            if axis not in self.contexts:
                raise MissingColumnError(_no_column(axis, self.contexts))
        table = self.select(hyperparameter=hyperparameter, **conditions)
        _require_finite(table.frame, self.contexts)
        pooled = tuple(c for c in self.contexts if c not in axes)
        frame = table.frame
        where = {"hyperparameter": hyperparameter, **conditions}
        values = table.values(hyperparameter)
        if len(values) < 2:
            raise TooFewValuesError(
                f"{where} has a single value ({values[0]}): THC ranks values against each other; "
                "add values or leave this hyper-parameter out"
            )
        counts = frame.groupby(["value", *axes, *pooled], sort=False).size()
        grid = counts.unstack("value", fill_value=0)[list(values)]
        notes: list[str] = []
        gaps = grid == 0
        if gaps.to_numpy().any():
            if missing == "raise":
                raise MissingContextError(f"{where}: {_quote_gaps(gaps)}")
            if missing == "drop_value":
                gone = [v for v in values if gaps[v].any()]
                values = tuple(v for v in values if v not in gone)
                notes.append(f"values without a run in every context were dropped: {gone}")
            else:
                lost = {_as_tuple(key)[: len(axes)] for key in gaps.index[gaps.any(axis=1)]}
                names = ["/".join(key) for key in sorted(lost)]
                notes.append(f"contexts in which a value has no run were dropped: {names}")
                frame = frame[~pd.MultiIndex.from_frame(frame[[*axes]]).isin(_keys(lost, axes))]
            frame = frame[frame["value"].isin(values)]
            if len(values) < 2 or frame.empty:
                raise MissingContextError(
                    f"{where}: missing={missing!r} leaves {len(values)} values and {len(frame)} "
                    "rows, too little to rank; use the other rule or add the runs"
                )
        contexts = sorted(map(tuple, frame[list(axes)].drop_duplicates().to_numpy().tolist()))
        tasks = sorted(set(map(tuple, frame[list(pooled)].drop_duplicates().to_numpy().tolist())))
        return ScoreArray(
            hyperparameter=hyperparameter,
            values=values,
            axes=axes,
            contexts=tuple("/".join(c) for c in contexts),
            scores=_fill(frame, values, axes, contexts, pooled, tasks or [()]),
            notes=tuple(notes),
        )


@dataclass(frozen=True)
class ScoreArray:
    """Labelled scores of one hyper-parameter.

    Attributes:
        hyperparameter: its name.
        values: V labels.
        axes: the context columns that were crossed.
        contexts: C labels, joined by "/" where several columns were crossed.
        scores: shape (V, R, C, T); T pooled tasks; NaN pads cells with fewer than R runs.
        notes: what a rule dropped.
    """

    hyperparameter: str
    values: tuple[str, ...]
    axes: tuple[str, ...]
    contexts: tuple[str, ...]
    scores: NDArray[np.float64]
    notes: tuple[str, ...] = ()


def from_frame(
    frame: Any,
    *,
    hyperparameter: str = "hyperparameter",
    value: str = "value",
    seed: str = "seed",
    score: str = "score",
    context: Sequence[str] = ("env",),
    step: str | None = None,
) -> Table:
    """A checked table from a pandas data frame, or any with `to_pandas` (polars, pyarrow).

    Args:
        frame: the data, one row per run, or per point of a run when `step` is given. Columns that
            are not named are ignored.
        hyperparameter, value, seed, score, step: names of the columns in `frame`.
        context: names of the context columns; they keep their names.

    Raises:
        EmptyInputError: no rows.
        MissingColumnError: a named column is absent; the message lists those there are.
        DuplicateKeyError: two rows have the same hyper-parameter, value, contexts, seed and step.
        SourceFormatError: a score is not a number, a step is not a finite one, a label is missing,
            a column is there twice, or one number is spelt in two ways among a hyper-parameter's
            values (`0.1` and `1e-1` would be ranked as different values).
        ValueError: a context bears the name of a canonical column, or is named twice.

    NaN and infinite scores are kept here: they are failed runs, and scoring makes you choose a
    rule for them.
    """
    if not isinstance(frame, pd.DataFrame):
        if not hasattr(frame, "to_pandas"):
            raise SourceFormatError(f"expected a data frame, got {type(frame).__name__}")
        frame = frame.to_pandas()
    contexts = (context,) if isinstance(context, str) else tuple(context)
    reserved = {"hyperparameter", "value", "seed", "score", "step"}
    clashes = sorted(reserved & set(contexts))
    if clashes or len(set(contexts)) != len(contexts):
        raise ValueError(f"context columns must be distinct and not {clashes or list(contexts)}")
    if frame.empty:
        raise EmptyInputError("the table has no rows")
    named = {hyperparameter: "hyperparameter", value: "value", seed: "seed", score: "score"}
    if step is not None:
        named[step] = "step"
    for column in (*named, *contexts):
        if column not in frame.columns:
            raise MissingColumnError(_no_column(column, frame.columns))
        if (frame.columns == column).sum() > 1:
            raise SourceFormatError(f"two columns are called {column!r}")
    labels = {"hyperparameter": hyperparameter, "value": value, "seed": seed}
    tidy = pd.DataFrame(
        {name: _labels(frame[column]) for name, column in labels.items()}
        | {name: _labels(frame[name]) for name in contexts}
    )
    tidy["score"] = _numbers(frame[score])
    if step is not None:
        tidy["step"] = _numbers(frame[step])
        if not np.isfinite(tidy["step"]).all():
            row = int(np.flatnonzero(~np.isfinite(tidy["step"]))[0])
            raise SourceFormatError(f"column {step!r} is not a finite number in row {row}")
    _refuse_respelt_numbers(tidy)
    keys = [c for c in tidy.columns if c != "score"]
    twice = tidy.duplicated(keys, keep=False)
    if twice.any():
        first = tidy[twice].sort_values(keys).head(2)
        raise DuplicateKeyError(
            f"{int(twice.sum())} rows share their key with another, first: "
            f"{first[keys].iloc[0].to_dict()} with scores {first['score'].tolist()}; "
            "one run must have one score"
        )
    return Table(frame=_sorted(tidy, contexts), contexts=contexts)


def label(item: object) -> str:
    """The text under which a value, context or seed is known.

    Booleans, integers and text keep their spelling; floats take the shortest that reads back.
    """
    if isinstance(item, (bool, np.bool_)):
        return str(bool(item))
    if isinstance(item, np.floating):
        return repr(float(str(item)))  # by way of text: float32 0.1 is 0.1, not 0.10000000149…
    return str(item)


def value_order(labels: Iterable[str]) -> Any:
    """A sort key for value labels: numeric where every label reads as a finite number."""
    try:
        numbers = {text: float(text) for text in labels}
    except ValueError:
        return str
    if not all(map(math.isfinite, numbers.values())):
        return str
    return lambda text: (numbers[text], text)


def _labels(column: pd.Series) -> list[str]:
    if column.isna().any():
        row = int(np.flatnonzero(column.isna().to_numpy())[0])
        raise SourceFormatError(f"column {column.name!r} has no label in row {row}")
    items = column.to_numpy()  # not the Series: it would widen float32 and change the spelling
    if pd.api.types.infer_dtype(items, skipna=False).startswith("mixed"):
        return [label(item) for item in items]
    codes, distinct = pd.factorize(items)  # fast; in a mixed column it would equate True and 1
    labels = np.array([label(item) for item in distinct], dtype=object)
    return list(labels[codes])


def _refuse_respelt_numbers(tidy: pd.DataFrame) -> None:
    for name, labels in tidy.groupby("hyperparameter", sort=True)["value"]:
        spelling: dict[float, str] = {}
        for text in labels.unique():
            try:
                number = float(text)
            except ValueError:
                continue
            if spelling.setdefault(number, text) != text:
                raise SourceFormatError(
                    f"{name} has one value under two labels, {spelling[number]!r} and {text!r}; "
                    "spell it in one way"
                )


def _numbers(column: pd.Series) -> NDArray[np.float64]:
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    for row in np.flatnonzero(np.isnan(numbers) & ~column.isna().to_numpy()):
        if str(column.iloc[row]).strip().lower() not in ("nan", ""):
            raise SourceFormatError(
                f"column {column.name!r} is not a number in row {row}: {column.iloc[row]!r}"
            )
    return numbers


def _sorted(frame: pd.DataFrame, contexts: Sequence[str]) -> pd.DataFrame:
    columns = ["hyperparameter", "value", *contexts, "seed"]
    columns += ["step"] if "step" in frame.columns else []
    return frame.sort_values(columns, kind="stable").reset_index(drop=True)[[*columns, "score"]]


def _fill(
    frame: pd.DataFrame,
    values: tuple[str, ...],
    axes: tuple[str, ...],
    contexts: list[tuple[str, ...]],
    pooled: tuple[str, ...],
    tasks: list[tuple[str, ...]],
) -> NDArray[np.float64]:
    """Array (V, R, C, T); runs are numbered by seed label within each value and context."""
    v = _positions(frame, ("value",), [(label,) for label in values])
    c = _positions(frame, axes, contexts)
    t = _positions(frame, pooled, tasks)
    cell_and_seed = pd.DataFrame({"v": v, "c": c, "seed": frame["seed"].to_numpy()})
    run = cell_and_seed.groupby(["v", "c"])["seed"].rank(method="dense").to_numpy()
    r = run.astype(np.int_) - 1
    array = np.full((len(values), int(r.max()) + 1, len(contexts), len(tasks)), np.nan)
    array[v, r, c, t] = frame["score"].to_numpy()
    present = ~np.isnan(array)
    torn = present.any(axis=-1) != present.all(axis=-1)
    if torn.any():
        i, k, j = (int(x[0]) for x in np.nonzero(torn))
        gone = ["/".join(tasks[x]) for x in np.flatnonzero(~present[i, k, j])]
        raise ShapeError(
            f"value {values[i]} in {'/'.join(contexts[j])}: run {k} lacks {'/'.join(pooled)} "
            f"{gone[:_SHOWN]}; pooled tasks need the same seeds for each"
        )
    return array


def _positions(
    frame: pd.DataFrame, columns: tuple[str, ...], keys: list[tuple[str, ...]]
) -> NDArray[np.int_]:
    """Index into `keys` of each row's labels in `columns`."""
    place = {key: index for index, key in enumerate(keys)}
    if not columns:
        return np.zeros(len(frame), dtype=np.int_)
    rows = zip(*(frame[column] for column in columns), strict=True)
    return np.array([place[key] for key in rows])


def _quote_gaps(gaps: pd.DataFrame) -> str:
    """Name the first empty cells of a (contexts × values) frame of booleans."""
    cells = [
        (dict(zip(gaps.index.names, _as_tuple(key), strict=True)), value)
        for key in gaps.index
        for value in gaps.columns
        if gaps.loc[key, value]
    ]
    first = "; ".join(f"{context} lacks value {value}" for context, value in cells[:_SHOWN])
    return (
        f"{len(cells)} cells without any run: {first}; "
        'choose missing="drop_context" or "drop_value", or add the runs'
    )


def _keys(keys: Iterable[tuple[str, ...]], names: tuple[str, ...]) -> pd.MultiIndex:
    return pd.MultiIndex.from_tuples(sorted(keys), names=names)


def _require_finite(frame: pd.DataFrame, contexts: Sequence[str]) -> None:
    bad = ~np.isfinite(frame["score"].to_numpy(dtype=np.float64))
    if bad.any():
        raise NonFiniteScoreError(
            f"{int(bad.sum())} of {len(bad)} scores are not finite: "
            f'{_quote(frame[bad], contexts)}; choose nonfinite="worst" or "drop", or mend the runs'
        )


def _quote(rows: pd.DataFrame, contexts: Sequence[str]) -> str:
    columns = ["hyperparameter", "value", *contexts, "seed", "score"]
    shown = "; ".join(str(row) for row in rows[columns].head(_SHOWN).to_dict("records"))
    return shown + (" …" if len(rows) > _SHOWN else "")


def _no_column(column: str, known: Iterable[str]) -> str:
    return f"no column {column!r}; there are: {', '.join(map(repr, known))}"


def _as_tuple(key: Any) -> tuple[str, ...]:
    return key if isinstance(key, tuple) else (key,)
