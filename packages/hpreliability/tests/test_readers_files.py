"""CSV, JSON lines and Parquet, as pandas and pyarrow write them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hpreliability.errors import (
    DuplicateKeyError,
    EmptyInputError,
    MissingColumnError,
    SourceFormatError,
)
from hpreliability.readers import read
from hpreliability.table import Table, from_frame

COLUMNS = {
    "hyperparameter": "hp",
    "value": "setting",
    "seed": "run",
    "score": "return",
    "context": ["env", "agent"],
}


@pytest.fixture
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    cells = pd.MultiIndex.from_product(
        [["lr", "eps"], ["0.0001", "0.10"], ["A", "B"], ["x", "y"], ["0", "1", "2"]],
        names=["hp", "setting", "env", "agent", "run"],
    ).to_frame(index=False)
    return cells.assign(**{"return": rng.normal(size=len(cells))}).sample(frac=1, random_state=1)


def same(one: Table, other: Table) -> None:
    pd.testing.assert_frame_equal(one.frame, other.frame, check_dtype=False)
    assert one.contexts == other.contexts


@pytest.mark.parametrize("name", ["r.csv", "r.csv.gz", "r.jsonl", "r.jsonl.gz", "r.parquet"])
def test_every_format_round_trips_to_the_table_of_the_frame(
    frame: pd.DataFrame, tmp_path: Path, name: str
) -> None:
    file = tmp_path / name
    if ".csv" in name:
        frame.to_csv(file, index=False)
    elif ".jsonl" in name:
        # The default of ten digits would round the scores.
        frame.to_json(file, orient="records", lines=True, double_precision=15)
    else:
        frame.to_parquet(file)
    table = read(file, **COLUMNS)
    expected = from_frame(frame, **COLUMNS)
    pd.testing.assert_frame_equal(
        table.frame, expected.frame, check_dtype=False, atol=0, rtol=1e-14
    )


def test_rows_of_several_files_are_joined_whatever_their_order(
    frame: pd.DataFrame, tmp_path: Path
) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    frame.iloc[:20].to_csv(tmp_path / "deep/er/b.csv", index=False)
    frame.iloc[20:].to_csv(tmp_path / "deep/a.csv", index=False)
    expected = from_frame(frame, **COLUMNS)
    same(read(str(tmp_path / "**/*.csv"), **COLUMNS), expected)
    same(read([tmp_path / "deep/er/b.csv", tmp_path / "deep/a.csv"], **COLUMNS), expected)


def test_a_run_that_two_files_claim_is_refused(frame: pd.DataFrame, tmp_path: Path) -> None:
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.iloc[:1].to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(DuplicateKeyError, match="2 rows"):
        read(tmp_path / "*.csv", **COLUMNS)


def test_csv_labels_keep_their_spelling(frame: pd.DataFrame, tmp_path: Path) -> None:
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert read(tmp_path / "a.csv", **COLUMNS).values("lr") == ("0.0001", "0.10")


def test_float32_values_in_parquet_keep_their_short_spelling(
    frame: pd.DataFrame, tmp_path: Path
) -> None:
    frame.assign(setting=frame["setting"].astype(np.float32)).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", **COLUMNS).values("lr") == ("0.0001", "0.1")


def test_learning_curves_are_read_with_their_step(frame: pd.DataFrame, tmp_path: Path) -> None:
    curves = pd.concat([frame.assign(t=t) for t in (200, 100)])
    curves.to_csv(tmp_path / "a.csv", index=False)
    table = read(tmp_path / "a.csv", step="t", **COLUMNS)
    assert table.has_curves
    assert sorted(table.frame["step"].unique()) == [100.0, 200.0]


@pytest.mark.parametrize("name", ["r.csv", "r.jsonl", "r.parquet", "r.csv.gz"])
def test_an_empty_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(EmptyInputError, match=name):
        read(tmp_path / name)


def test_a_header_without_rows_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("hyperparameter,value,env,seed,score\n")
    with pytest.raises(EmptyInputError, match=r"r\.csv has no rows"):
        read(tmp_path / "r.csv")


def test_a_pattern_without_matches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmptyInputError, match="no file matches"):
        read(tmp_path / "*.csv")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.csv"):
        read(tmp_path / "gone.csv")


def test_an_unknown_format_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "r.xlsx").write_text("x")
    with pytest.raises(SourceFormatError, match=r"\.csv, \.jsonl"):
        read(tmp_path / "r.xlsx")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("hyperparameter,value,env,seed,score\nlr,1,A,0,1.5\nlr,1,A\n", "line 3: 3 cells under 5"),
        ("hyperparameter,value,env,seed,score\nlr,1,A,0,1.5,9\n", "line 2: 6 cells under 5"),
        ('hyperparameter,value,env,seed,score\nlr,"1,A,0,1.5\n', "line 2"),
        ("hyperparameter,value,env,seed,score,score\nlr,1,A,0,1.5,1\n", "named twice"),
        ("hyperparameter,value,env,seed,score\nlr,,A,0,1.5\n", "'value' has no label in row 0"),
        ("hyperparameter,value,env,seed,score\nlr,1,A,0,high\n", "not a number in row 0: 'high'"),
    ],
)
def test_a_malformed_csv_is_refused_with_file_and_place(
    tmp_path: Path, text: str, where: str
) -> None:
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(SourceFormatError, match=where) as caught:
        read(tmp_path / "r.csv")
    assert "r.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("last", "where"),
    [('{"hyperparameter": "lr", "va', "line 2"), ("[1]", "line 2"), ('{"value": 1}', "object 2")],
)
def test_a_malformed_json_line_is_refused_with_file_and_place(
    tmp_path: Path, last: str, where: str
) -> None:
    row = '{"hyperparameter": "lr", "value": 1, "env": "A", "seed": 0, "score": 2.0}\n'
    (tmp_path / "r.jsonl").write_text(row + last)
    with pytest.raises(SourceFormatError, match=where):
        read(tmp_path / "r.jsonl")


def test_a_cut_gzip_file_is_refused(frame: pd.DataFrame, tmp_path: Path) -> None:
    whole = gzip.compress(frame.to_csv(index=False).encode())
    (tmp_path / "r.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceFormatError, match="gzip"):
        read(tmp_path / "r.csv.gz", **COLUMNS)


def test_a_damaged_parquet_file_is_refused(frame: pd.DataFrame, tmp_path: Path) -> None:
    frame.to_parquet(tmp_path / "r.parquet")
    whole = (tmp_path / "r.parquet").read_bytes()
    (tmp_path / "r.parquet").write_bytes(whole[:-20])
    with pytest.raises(SourceFormatError, match=r"r\.parquet"):
        read(tmp_path / "r.parquet", **COLUMNS)


def test_a_missing_column_is_refused_with_file_and_known_columns(
    frame: pd.DataFrame, tmp_path: Path
) -> None:
    frame.to_csv(tmp_path / "r.csv", index=False)
    with pytest.raises(MissingColumnError, match=r"r\.csv.*'hyperparameter'.*'setting'"):
        read(tmp_path / "r.csv")
