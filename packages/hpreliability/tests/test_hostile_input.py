"""Hostile input through the public door: a typed error that says what and where, or a stated rule.

One test per way in which data goes wrong. Nothing may vanish without a word.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import hpreliability as hpr
from hpreliability.errors import (
    DuplicateKeyError,
    EmptyInputError,
    MissingContextError,
    NonFiniteScoreError,
    ShapeError,
    SourceFormatError,
    TooFewRunsError,
    TooFewValuesError,
    UnsafePickleError,
)

FAST: dict[str, Any] = {"uncertainty": None, "null": None}


@pytest.fixture
def frame() -> pd.DataFrame:
    cells = pd.MultiIndex.from_product(
        [["lr"], ["0.1", "0.2", "0.3"], ["A", "B", "C", "D"], range(3)],
        names=["hyperparameter", "value", "env", "seed"],
    ).to_frame(index=False)
    return cells.assign(score=np.random.default_rng(0).normal(size=len(cells)))


def read(frame: pd.DataFrame, folder: Path) -> hpr.Table:
    frame.to_csv(folder / "results.csv", index=False)
    return hpr.read(folder / "results.csv")


def test_a_nan_run_is_refused_with_its_key_until_a_rule_is_chosen(
    frame: pd.DataFrame, tmp_path: Path
) -> None:
    frame.loc[(frame["value"] == "0.2") & (frame["env"] == "C") & (frame["seed"] == 1), "score"] = (
        np.nan
    )
    table = read(frame, tmp_path)
    with pytest.raises(NonFiniteScoreError, match="1 of 36 scores") as caught:
        hpr.thc(table, **FAST)
    for part in ("'value': '0.2'", "'env': 'C'", "'seed': '1'", 'nonfinite="worst"'):
        assert part in str(caught.value)
    for rule, runs in (("worst", 36), ("drop", 35)):
        result = hpr.thc(table, nonfinite=rule, **FAST)
        assert "1 of 36 scores were not finite" in result.notes[0]
        assert result.frame["n_runs"].tolist() == [runs]


def test_nan_in_an_array_is_refused_with_its_place_unless_it_is_declared_padding() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 4, 5))
    padded = np.concatenate([scores, np.full((3, 1, 5), np.nan)], axis=1)
    with pytest.raises(NonFiniteScoreError, match=r"15 scores .* \(0, 4, 0\).* padded=True"):
        hpr.thc_score(padded)
    assert hpr.thc_score(padded, padded=True).score == hpr.thc_score(scores).score
    scores[2, 1, 3] = -np.inf
    with pytest.raises(NonFiniteScoreError, match=r"\(2, 1, 3\)"):
        hpr.thc_score(scores, padded=True)
    scores[2, :, 3] = np.nan
    with pytest.raises(TooFewRunsError):
        hpr.thc_score(scores, padded=True)


def test_a_missing_context_is_refused_with_value_and_context_until_a_rule_is_chosen(
    frame: pd.DataFrame, tmp_path: Path
) -> None:
    table = read(frame[~((frame["value"] == "0.2") & (frame["env"] == "C"))], tmp_path)
    with pytest.raises(MissingContextError, match=r"\{'env': 'C'\} lacks value 0.2"):
        hpr.thc(table, **FAST)
    fewer = hpr.thc(table, missing="drop_context", **FAST)
    assert fewer.frame["n_contexts"].tolist() == [3]
    assert fewer.notes == ("lr: contexts in which a value has no run were dropped: ['C']",)
    less = hpr.thc(table, missing="drop_value", **FAST)
    assert less.frame["n_values"].tolist() == [2]
    assert less.notes == ("lr: values without a run in every context were dropped: ['0.2']",)


def test_dropping_failed_runs_never_hides_a_value_or_a_context(
    frame: pd.DataFrame, tmp_path: Path
) -> None:
    frame.loc[frame["value"] == "0.3", "score"] = np.nan
    frame.loc[frame["env"] == "D", "score"] = np.nan
    result = hpr.thc(read(frame, tmp_path), nonfinite="drop", **FAST)
    assert result.frame[["n_values", "n_contexts"]].to_numpy().tolist() == [[2, 3]]
    assert "no run is left of hyperparameter/value ['lr=0.3']" in result.notes[0]
    assert "no run is left of env ['D']" in result.notes[0]


def test_a_duplicate_key_is_refused_with_the_key_and_both_scores(
    frame: pd.DataFrame, tmp_path: Path
) -> None:
    again = frame.iloc[[5]].assign(score=123.5)
    with pytest.raises(DuplicateKeyError, match="2 rows share") as caught:
        read(pd.concat([frame, again]), tmp_path)
    for part in ("results.csv", "'value': '0.1'", "'env': 'B'", "'seed': '2'", "123.5"):
        assert part in str(caught.value)


@pytest.mark.parametrize("shift", [-99.0, -100.0, -101.0, -1e6])
@pytest.mark.parametrize("ties", ["paper", "symmetric"])
def test_scores_below_minus_100_rank_like_any_others(shift: float, ties: Any) -> None:
    # The authors' code closes its scan with an interval at -100, which these would meet.
    scores = np.random.default_rng(0).integers(-8, 8, size=(5, 4, 6)) / 8
    there = hpr.thc_score(scores + shift, ties=ties)
    here = hpr.thc_score(scores, ties=ties)
    np.testing.assert_array_equal(there.ranks, here.ranks)
    assert there.score == here.score


@pytest.mark.parametrize(
    "scores",
    [
        [[[1.0, 2.0], [3.0]], [[1.0, 2.0], [3.0, 4.0]]],
        [[[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]]],
        np.zeros((3, 4)),
        np.zeros((2, 3, 4, 5, 6)),
        np.zeros((2, 0, 4)),
        [[["high"]], [["low"]]],
    ],
    ids=["runs", "values", "two axes", "five axes", "no runs", "text"],
)
def test_ragged_or_misshapen_arrays_are_refused(scores: Any) -> None:
    with pytest.raises(ShapeError, match="scores must"):
        hpr.thc_score(scores)


def test_a_ragged_file_is_refused_with_file_and_line(tmp_path: Path) -> None:
    text = "hyperparameter,value,env,seed,score\nlr,0.1,A,0,1.0\nlr,0.1,A\n"
    (tmp_path / "ragged.csv").write_text(text)
    with pytest.raises(SourceFormatError, match=r"ragged\.csv, line 3"):
        hpr.read(tmp_path / "ragged.csv")


class Shell:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_malicious_pickle_is_refused_by_name_and_does_not_run(tmp_path: Path) -> None:
    file = tmp_path / "100k_experiments/final_perf/widths.pickle"
    file.parent.mkdir(parents=True)
    file.write_bytes(pickle.dumps({"DER_widths": Shell(f"touch {tmp_path / 'pwned'}")}))
    with pytest.raises(UnsafePickleError, match=r"widths\.pickle asks for \w+\.system"):
        hpr.from_consistent_hparams(tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["r.csv", "r.csv.gz", "r.jsonl", "r.parquet"])
def test_an_empty_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(EmptyInputError, match=f"{name} is empty"):
        hpr.read(tmp_path / name)


def test_a_hyperparameter_with_one_value_is_refused_by_name(
    frame: pd.DataFrame, tmp_path: Path
) -> None:
    lonely = frame[frame["value"] == "0.1"].assign(hyperparameter="gamma")
    with pytest.raises(TooFewValuesError, match=r"gamma.*single value \(0.1\)"):
        hpr.thc(read(pd.concat([frame, lonely]), tmp_path), **FAST)
    with pytest.raises(TooFewValuesError, match="at least two values"):
        hpr.thc_score(np.zeros((1, 5, 26)))
