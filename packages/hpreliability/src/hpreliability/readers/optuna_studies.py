"""Optuna studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from hpreliability.errors import (
    EmptyInputError,
    MissingColumnError,
    MissingExtraError,
    SourceFormatError,
)
from hpreliability.readers.designs import Binning, Design, from_runs
from hpreliability.table import Table


def from_optuna(
    study: Any,
    *,
    params: Sequence[str],
    context: Sequence[str] = (),
    across: str | None = None,
    seed: str | None = None,
    design: Design | None = None,
    default: Mapping[str, object] | None = None,
    objective: int = 0,
    bins: int = 4,
    binning: Binning = "quantile",
    min_count: int = 3,
) -> Table:
    """A table from the trials of one study, or of one study per context.

    Args:
        study: an `optuna.Study`, or a mapping of labels to studies with `across`.
        params: the hyper-parameters to tell apart.
        context: names of the context columns: user attributes of the trials, or parameters.
        across: name of the context column whose labels are the keys of the mapping of studies.
        seed: the user attribute or parameter that is the seed; default: the trial number, so that
            each trial is a run of its own.
        design: see `from_runs`; default `"grid"` where all trials come from a `GridSampler`,
            otherwise `"sampled"`.
        default, bins, binning, min_count: see `from_runs`.
        objective: which value of a multi-objective study is the score.

    Scores of a study that minimises are negated, with a note, because ranks take more as better.
    Failed and pruned trials are failed runs (score NaN). Trials that are waiting or running, and
    trials that failed before a hyper-parameter or label was drawn, have no place in a table; they
    are left out with a note.

    Raises:
        EmptyInputError: no trial has ended.
        MissingColumnError: no trial has a parameter, context or seed of that name.
        SourceFormatError: not a study; studies that optimise in different directions.
        MissingExtraError: Optuna is not installed.
        ValueError: a mapping without `across` or the reverse; no context at all; no such objective.
        HPReliabilityError: as `from_runs`.
    """
    try:
        from optuna import Study
        from optuna.study import StudyDirection
        from optuna.trial import TrialState
    except ImportError as error:
        raise MissingExtraError("optuna", "optuna") from error
    if isinstance(study, Mapping) != (across is not None):
        raise ValueError("across names the column of a mapping of studies; give both or neither")
    studies: dict[str, Any] = (
        {str(key): one for key, one in study.items()} if isinstance(study, Mapping) else {"": study}
    )
    contexts = (context,) if isinstance(context, str) else tuple(context)
    columns = (*contexts, *([seed] if seed else []))
    if not contexts and across is None:
        raise ValueError("name a context: user attributes or parameters, or a mapping with across")
    rows, notes, directions, grid = [], [], set(), True
    unfinished = 0
    for key, one in studies.items():
        if not isinstance(one, Study):
            raise SourceFormatError(f"expected an optuna.Study, got {type(one).__name__}")
        if not 0 <= objective < len(one.directions):
            raise ValueError(f"objective {objective}: the study has {len(one.directions)}")
        directions.add(one.directions[objective])
        for trial in one.get_trials(deepcopy=False):
            if not trial.state.is_finished():
                unfinished += 1
                continue
            grid &= "grid_id" in trial.system_attrs
            known = {**trial.params, **trial.user_attrs}
            row = {name: known.get(name) for name in (*params, *columns)}
            complete = trial.state == TrialState.COMPLETE
            row["score"] = trial.values[objective] if complete else float("nan")
            row["trial"] = f"{key}#{trial.number}" if key else str(trial.number)
            rows.append(row | ({across: key} if across else {}))
    if unfinished:
        notes.append(f"{unfinished} trials that have not ended were left out")
    if len(directions) > 1:
        raise SourceFormatError("the studies optimise in different directions")
    if not rows:
        raise EmptyInputError(f"no trial has ended ({unfinished} are waiting or running)")
    # dtype=object: in a float column integers would turn into other labels.
    frame = pd.DataFrame(rows, dtype=object)
    for name in (*params, *columns):
        if frame[name].isna().all():
            raise MissingColumnError(f"no trial has a parameter or user attribute {name!r}")
    lost = frame[[*columns]].isna().any(axis=1) | frame[[*params]].isna().all(axis=1)
    if lost.any():
        notes.append(
            f"{int(lost.sum())} trials ended before their hyper-parameters, contexts and seed were "
            "known and were left out"
        )
        frame = frame[~lost]
    failed = int(frame["score"].isna().sum())
    if failed:
        notes.append(f"{failed} trials failed or were pruned and count as failed runs")
    if StudyDirection.MINIMIZE in directions:
        frame["score"] = -frame["score"].astype(float)
        notes.append("the study minimises, so scores are the negative of its values")
    table = from_runs(
        frame,
        params=params,
        design=design or ("grid" if grid else "sampled"),
        default=default,
        context=(*contexts, *([across] if across else [])),
        seed=seed or "trial",
        bins=bins,
        binning=binning,
        min_count=min_count,
    )
    return replace(table, notes=(*notes, *table.notes))
