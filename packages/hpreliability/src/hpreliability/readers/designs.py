"""From runs with a full config each to rows per hyper-parameter, by the design of the study."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from hpreliability.errors import (
    DuplicateKeyError,
    EmptyInputError,
    MissingColumnError,
    ShapeError,
    SourceFormatError,
)
from hpreliability.table import Table, from_frame, label

Design = Literal["one_at_a_time", "conditioned", "grid", "sampled"]
Binning = Literal["quantile", "log"]


class SparseCellWarning(UserWarning):
    """Some bins of a sampled hyper-parameter hold too few runs and were left out."""


def from_runs(
    frame: pd.DataFrame,
    *,
    params: Sequence[str],
    design: Design = "one_at_a_time",
    default: Mapping[str, object] | None = None,
    context: Sequence[str] = ("env",),
    seed: str = "seed",
    score: str = "score",
    step: str | None = None,
    bins: int = 4,
    binning: Binning = "quantile",
    min_count: int = 3,
) -> Table:
    """A table from runs that each carry a value for every hyper-parameter.

    Args:
        frame: one row per run, or per point of a run with `step`; one column per hyper-parameter.
        params: the columns that are hyper-parameters: all that vary.
        design: which runs speak for which hyper-parameter:

            * `"one_at_a_time"`: a run differs from the default in at most one hyper-parameter and
              counts for that one; a run with the default config counts for all of them.
            * `"conditioned"`: the same rows out of a larger design; runs that differ in more are
              left out, with a note.
            * `"grid"`: every run counts for every hyper-parameter. Runs that then share a key are
              averaged over the other hyper-parameters, which needs a complete grid. Where `seed` is
              unique to each run nothing is averaged, and the others add to the spread of a cell.
            * `"sampled"`: as `"grid"` for random or adaptive search: numeric hyper-parameters with
              more than `bins` values are binned, with the same edges in all contexts.
        default: the default value of every hyper-parameter, for the first two designs. Numbers are
            compared as numbers, so `1e-4` is `"0.0001"`.
        context, seed, score, step: names of the other columns; see `from_frame`.
        bins, binning: number of bins, with equally many runs (`"quantile"`) or equally wide in the
            logarithm (`"log"`). A bin is labelled with the median of its values; a note has edges.
        min_count: cells (bin and contexts) of a sampled design with fewer runs are left out, with a
            note and a `SparseCellWarning`.

    Raises:
        EmptyInputError: no rows, or none that a design can use.
        MissingColumnError: a named column is absent.
        DuplicateKeyError: two rows have the same config, contexts, seed and step.
        SourceFormatError: a run off the axes of `"one_at_a_time"`; `"log"` bins of numbers ≤ 0.
        ShapeError: an incomplete `"grid"`.
        ValueError: unknown design or binning, no default, `bins` < 2, or `min_count` < 1.
    """
    _check_options(design, default, params, bins, binning, min_count)
    contexts = (context,) if isinstance(context, str) else tuple(context)
    keys = [*contexts, seed, *([step] if step else [])]
    for column in (*params, *keys, score):
        if column not in frame.columns:
            known = ", ".join(map(repr, frame.columns))
            raise MissingColumnError(f"no column {column!r}; there are: {known}")
    if frame.empty:
        raise EmptyInputError("the table of runs has no rows")
    # One spelling per number: 1 and 1.0 are the same learning rate.
    mixed = [p for p in params if pd.api.types.infer_dtype(frame[p]) == "mixed-integer-float"]
    frame = frame.astype(dict.fromkeys(mixed, float)).reset_index(drop=True)
    configs = frame[[*params, *keys]].map(label)
    twice = configs.duplicated(keep=False)
    if twice.any():
        raise DuplicateKeyError(
            f"{int(twice.sum())} rows share config, contexts and seed with another, first: "
            f"{configs[twice].iloc[0].to_dict()}; name every hyper-parameter that varies in "
            "params, and the seed"
        )
    notes: list[str] = []
    if design in ("one_at_a_time", "conditioned"):
        chosen = _on_axes(frame, params, default or {}, notes, strict=design == "one_at_a_time")
    else:
        chosen = {param: frame.index[frame[param].notna()] for param in params}
        notes += [
            f"{param}: {len(frame) - len(rows)} rows without a value were left out"
            for param, rows in chosen.items()
            if len(rows) < len(frame)
        ]
    parts = []
    for param, rows in chosen.items():
        part = frame.loc[rows, [*keys, score]].copy()
        part.insert(0, "hyperparameter", param)
        values = frame.loc[rows, param]
        if design == "sampled":
            part.insert(1, "value", _binned(values, bins, binning, notes))
            part = _without_sparse(part, contexts, seed, min_count, notes)
        else:
            part.insert(1, "value", values.map(label))
        if design == "grid":
            others = configs.loc[rows, [p for p in params if p != param]].agg("/".join, axis=1)
            part = _averaged(part, others, keys, score, notes)
        parts.append(part)
    table = from_frame(
        pd.concat(parts, ignore_index=True), context=contexts, seed=seed, score=score, step=step
    )
    return replace(table, notes=(*table.notes, *notes))


def flattened(tree: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Nested mappings as one, with keys joined."""
    flat: dict[str, Any] = {}
    for key, item in tree.items():
        if isinstance(item, Mapping) and item:
            for below, leaf in flattened(item, separator).items():
                flat[f"{key}{separator}{below}"] = leaf
        else:
            flat[str(key)] = item
    return flat


def entries(config: Mapping[str, Any], names: Iterable[str], owner: str) -> dict[str, Any]:
    """The named entries of one run's configuration.

    Raises:
        MissingColumnError: one is not there; the message names `owner` and what there is.
    """
    names = list(names)
    lacking = [name for name in names if name not in config]
    if lacking:
        known = ", ".join(map(repr, config))
        raise MissingColumnError(f"the config of {owner} lacks {lacking}; it has: {known}")
    return {name: config[name] for name in names}


def _check_options(
    design: Design,
    default: Mapping[str, object] | None,
    params: Sequence[str],
    bins: int,
    binning: Binning,
    min_count: int,
) -> None:
    if design not in get_args(Design):
        raise ValueError(f"design must be one of {get_args(Design)}, got {design!r}")
    if binning not in get_args(Binning):
        raise ValueError(f"binning must be one of {get_args(Binning)}, got {binning!r}")
    if isinstance(params, str) or not params:
        raise ValueError(f"params must be a list of hyper-parameters, got {params!r}")
    if bins < 2 or min_count < 1:
        raise ValueError(f"need bins >= 2 and min_count >= 1, got {bins} and {min_count}")
    lacking = [p for p in params if p not in (default or {})]
    if design in ("one_at_a_time", "conditioned") and lacking:
        raise ValueError(f"design={design!r} needs a default for {lacking}")


def _on_axes(
    frame: pd.DataFrame,
    params: Sequence[str],
    default: Mapping[str, object],
    notes: list[str],
    *,
    strict: bool,
) -> dict[str, pd.Index[Any]]:
    """Rows per hyper-parameter in which all others have their default."""
    differs = pd.DataFrame(
        {param: ~frame[param].map(lambda x, d=default[param]: _same(x, d)) for param in params}
    )
    off = differs.sum(axis=1) > 1
    if off.any():
        first = frame.loc[off, list(params)].iloc[0].to_dict()
        if strict:
            raise SourceFormatError(
                f"{int(off.sum())} rows differ from the default in more than one hyper-parameter, "
                f'first {first}; use design="conditioned" to leave them out, or "grid"'
            )
        notes.append(
            f"{int(off.sum())} of {len(frame)} rows differ from the default in more than one "
            "hyper-parameter and were left out"
        )
        if off.all():
            raise EmptyInputError(f"no run is within one change of the default {dict(default)}")
    kept = differs[~off]
    return {p: kept.index[~kept.drop(columns=p).any(axis=1)] for p in params}


def _same(value: object, default: object) -> bool:
    """Whether two labels are spelt alike or read as the same number."""
    if label(value) == label(default):
        return True
    try:
        return float(label(value)) == float(label(default))
    except ValueError:
        return False


def _binned(
    column: pd.Series[Any], bins: int, binning: Binning, notes: list[str]
) -> pd.Series[Any]:
    """Labels of a column: its values, or the median of each value's bin."""
    if column.map(lambda x: isinstance(x, (bool, np.bool_))).any():
        return column.map(label)
    numbers = pd.to_numeric(column, errors="coerce").astype(float)
    if numbers.isna().any() or numbers.nunique() <= bins:
        return column.map(label)
    if binning == "log":
        if (numbers <= 0).any():
            raise SourceFormatError(
                f"log bins need positive numbers, but {column.name} goes down to {numbers.min()}; "
                'use binning="quantile"'
            )
        edges = np.geomspace(numbers.min(), numbers.max(), bins + 1)
    else:
        edges = np.unique(np.quantile(numbers, np.linspace(0, 1, bins + 1)))
    place = np.searchsorted(edges[1:-1], numbers, side="right")
    labels = [label(float(f"{numbers[place == b].median():.3g}")) for b in np.unique(place)]
    if len(set(labels)) < len(labels):
        labels = [label(float(numbers[place == b].median())) for b in np.unique(place)]
    of_bin = dict(zip(np.unique(place), labels, strict=True))
    spans = (f"{of_bin[b]} from {edges[b]:.3g} to {edges[b + 1]:.3g}" for b in of_bin)
    notes.append(f"{column.name}: {len(numbers)} values in {binning} bins: {', '.join(spans)}")
    return pd.Series([of_bin[b] for b in place], index=column.index)


def _without_sparse(
    part: pd.DataFrame,
    contexts: tuple[str, ...],
    seed: str,
    min_count: int,
    notes: list[str],
) -> pd.DataFrame:
    """Rows of cells that have at least `min_count` runs."""
    runs = part.groupby(["value", *contexts], sort=False)[seed].transform("nunique")
    if (runs >= min_count).all():
        return part
    cells = part.loc[runs < min_count, ["value", *contexts]].drop_duplicates()
    note = (
        f"{part['hyperparameter'].iloc[0]}: {len(cells)} cells with fewer than {min_count} runs "
        f"were left out, first {cells.iloc[0].to_dict()}"
    )
    warnings.warn(note, SparseCellWarning, stacklevel=4)
    notes.append(note)
    return part[runs >= min_count]


def _averaged(
    part: pd.DataFrame,
    others: pd.Series[Any],
    keys: list[str],
    score: str,
    notes: list[str],
) -> pd.DataFrame:
    """One row per key, the mean over the configs `others` of the other hyper-parameters."""
    cell = ["hyperparameter", "value", *keys]
    together = part[cell].assign(others=others).groupby(cell, sort=True)["others"]
    size = together.size()
    if size.max() == 1:
        return part
    if together.agg(lambda configs: "\n".join(sorted(configs))).nunique() > 1:
        where = size.reset_index(name="size").sort_values("size", kind="stable").iloc[0].to_dict()
        count = where.pop("size")
        raise ShapeError(
            "the grid is not complete, so averages would mix hyper-parameters: "
            f"{where} has {count} of {size.max()} configs of the others; add the runs or use "
            'design="conditioned"'
        )
    name = part["hyperparameter"].iloc[0]
    notes.append(f"{name}: scores are means over {size.max()} configs of the others")
    # A failed run must not vanish in a mean.
    mean = part.groupby(cell, sort=False)[score].agg(lambda s: s.astype(float).mean(skipna=False))
    return mean.reset_index()
