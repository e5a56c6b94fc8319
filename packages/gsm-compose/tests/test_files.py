"""Files of rows and of benchmarks, whole and damaged."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from gsm_compose.benchmark import CANARY, Benchmark
from gsm_compose.engine.problems import load_gsm8k
from gsm_compose.errors import BenchmarkFormatError, ProgramError, SourceFormatError

ROW = {
    "question": "Ana has 2 hens and 3 ducks. How many birds?",
    "answer": "2+3=<<2+3=5>>5\n#### 5",
}


def test_a_benchmark_survives_its_file(benchmark: Benchmark, tmp_path: Path) -> None:
    benchmark.to_jsonl(tmp_path / "b.jsonl")
    assert Benchmark.from_jsonl(tmp_path / "b.jsonl") == benchmark
    assert CANARY in (tmp_path / "b.jsonl").read_text(encoding="utf-8").split("\n")[0]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_file_cut_between_lines_is_refused(
    benchmark: Benchmark, tmp_path: Path, keep: int
) -> None:
    path = tmp_path / "b.jsonl"
    benchmark.to_jsonl(path)
    lines = path.read_text(encoding="utf-8").split("\n")[:keep]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(BenchmarkFormatError, match=rf"promises 3 items, the file has {keep - 1}"):
        Benchmark.from_jsonl(path)


def test_a_file_cut_anywhere_is_refused(benchmark: Benchmark, tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    benchmark.to_jsonl(path)
    whole = path.read_bytes()
    for size in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:size])
        with pytest.raises(BenchmarkFormatError):
            Benchmark.from_jsonl(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gsm-compose/1", "gsm-compose/2", "expected schema 'gsm-compose/1', got 'gsm-compose/2'"),
        ('"answer": 48', '"answer": 49', "line 2: not an item"),
        ('"order": [0, 1]', '"order": [1, 0]', "not the hash of the content"),
        ('"shape"', '"form"', "not an item"),
        ('"items": 3', '"items": "3"', "lacks 'items'"),
    ],
)
def test_an_edited_file_is_refused_with_the_line(
    benchmark: Benchmark, tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = tmp_path / "b.jsonl"
    benchmark.to_jsonl(path)
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(BenchmarkFormatError, match=message):
        Benchmark.from_jsonl(path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW), encoding="utf-8")
    with pytest.raises(BenchmarkFormatError, match="expected a header"):
        Benchmark.from_jsonl(path)


def test_a_benchmark_has_items_of_one_split_each_once(benchmark: Benchmark) -> None:
    with pytest.raises(BenchmarkFormatError, match="at least one"):
        Benchmark(())
    with pytest.raises(BenchmarkFormatError, match="every item once"):
        Benchmark(benchmark.items + benchmark.items[:1])


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_rows_of_a_file_of_ones_own_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "my-train.jsonl", json.dumps(ROW), json.dumps(ROW))
    (one, two) = load_gsm8k(path)
    assert (one.id, two.id, one.split) == ("gsm8k/train/0", "gsm8k/train/1", "train")
    packed = tmp_path / "test.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert load_gsm8k(packed)[0].split == "test"
    assert load_gsm8k(path, split="test")[0].split == "test"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a", "answer"', "line 2: not JSON"),
        ('{"question": "a"}', "line 2: expected the texts"),
        ('["a"]', "line 2: expected the texts"),
        ('{"question": "a", "answer": "b"}', "line 2: expected the answer to end"),
        ('{"question": "a", "answer": "b #### ten"}', "line 2: expected the answer to end"),
        ("", "line 2: not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "test.jsonl", json.dumps(ROW), line)
    with pytest.raises(SourceFormatError, match=message):
        load_gsm8k(path)


def test_other_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceFormatError, match="is empty"):
        load_gsm8k(_empty(tmp_path))
    with pytest.raises(SourceFormatError, match="Pass split="):
        load_gsm8k(write(tmp_path / "rows.jsonl", json.dumps(ROW)))
    broken = tmp_path / "train.jsonl.gz"
    broken.write_bytes(gzip.compress(json.dumps(ROW).encode())[:-9])
    with pytest.raises(SourceFormatError, match="gzip"):
        load_gsm8k(broken)
    latin = tmp_path / "train.jsonl"
    latin.write_bytes('{"question": "é"}'.encode("latin-1"))
    with pytest.raises(SourceFormatError, match="UTF-8"):
        load_gsm8k(latin)
    with pytest.raises(SourceFormatError, match="vendored"):
        load_gsm8k("test", split="train")


def _empty(folder: Path) -> Path:
    path = folder / "empty-test.jsonl"
    path.write_text("", encoding="utf-8")
    return path


def test_a_unicode_minus_is_a_minus(tmp_path: Path) -> None:
    row = {"question": "3 minus 5?", "answer": "3−5=<<3−5=−2>>\n#### −2"}
    (problem,) = load_gsm8k(write(tmp_path / "test.jsonl", json.dumps(row, ensure_ascii=False)))
    assert problem.final == -2
    assert problem.program.steps[0].output == -2


def test_a_row_without_annotations_has_no_program_and_says_so(tmp_path: Path) -> None:
    row = {"question": "2 and 3?", "answer": "It is 5.\n#### 5"}
    (problem,) = load_gsm8k(write(tmp_path / "test.jsonl", json.dumps(row)))
    with pytest.raises(ProgramError, match="no annotation"):
        assert problem.program.steps


def test_a_line_separator_in_a_question_is_not_the_end_of_a_line(tmp_path: Path) -> None:
    row = {**ROW, "question": "Ana has 2 hens.\u2028How many?"}
    path = write(tmp_path / "test.jsonl", json.dumps(row, ensure_ascii=False))
    assert len(load_gsm8k(path)) == 1
