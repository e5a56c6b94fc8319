from __future__ import annotations

import gzip
import json
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vineppo.errors import InvalidInputError
from vineppo.tasks import GSM8K
from vineppo.tasks.gsm8k import final_number


def row(i: int) -> dict[str, str]:
    return {
        "question": f"Ada has {i} pens {{and}} buys 1000. How many has she?",
        "answer": f"She has {i}+1000 = <<{i}+1000={i + 1000}>>{i + 1000}.\n#### {i + 1000:,}",
    }


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(r) + "\n" for r in rows)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text(jsonl([row(i) for i in range(20)]), encoding="utf-8")
    return path


# --- numbers and the reward ----------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    number=st.integers(-(10**9), 10**9),
    cents=st.integers(0, 99),
    before=st.text(max_size=30),
    behind=st.sampled_from(["", ".", " dollars", "%", "\n", "\n- 5 more lines", " - so many"]),
    dollar=st.booleans(),
    commas=st.booleans(),
)
def test_a_number_is_read_by_value_however_it_is_written(
    number: int, cents: int, before: str, behind: str, dollar: bool, commas: bool
) -> None:
    value = Decimal(f"{number}.{cents:02}")
    digits = f"{abs(value):,}" if commas else str(abs(value))
    sign = "-" if value.is_signed() else ""
    text = f"{before}#### {sign}{'$' if dollar else ''}{digits}{behind}"
    assert final_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "", "18", "The answer is 18", "#### ", "#### eighteen", "### 18",
        "#### 10/3", "#### 10 / 3", "#### 2*9", "#### 9+9=18", "#### 1,2", "#### 1.2.3", "#### 1e5",
        "#### 18 then #### none",
    ],
)  # fmt: skip
def test_what_is_no_plain_number_behind_the_mark_is_none(text: str) -> None:
    assert final_number(text) is None


def test_every_solution_scores_1_and_another_number_0(file: Path) -> None:
    task = GSM8K(file)
    rows = task.examples()
    columns = {name: [r[name] for r in rows] for name in rows[0]}
    asked = {"prompts": columns["prompt"], "answer": columns["answer"]}
    assert task.reward(completions=columns["solution"], **asked) == [1.0] * len(rows)
    spoilt = [f"{text}1" for text in columns["solution"]]
    assert task.reward(completions=spoilt, **asked) == [0.0] * len(rows)
    cut = [text.rpartition("####")[0] for text in columns["solution"]]
    assert task.reward(completions=cut, **asked) == [0.0] * len(rows)


def test_the_reward_takes_messages_and_whole_solutions_as_answers(file: Path) -> None:
    task = GSM8K(file)
    said = [[{"role": "assistant", "content": "#### 1,000.0 pens"}]]
    solutions = [row(0)["answer"]]
    assert task.reward(prompts=[""], completions=said, answer=solutions, question=[""]) == [1.0]


def test_an_answer_without_a_number_is_refused_with_its_row(file: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"answer\[1\]: .*'many'"):
        GSM8K(file).reward(prompts=["", ""], completions=["", ""], answer=["5", "many"])


# --- files and their parts -----------------------------------------------------------------------


def test_rows_have_the_prompts_of_the_paper_and_answers_without_commas(file: Path) -> None:
    first = GSM8K(file, "test").examples(1)
    assert first == [
        {
            "prompt": "[MATH_TASK] Problem:\nAda has 0 pens {and} buys 1000. How many has she?\n\n"
            "Solution:",
            "answer": "1000",
            "solution": row(0)["answer"],
        }
    ]


@settings(max_examples=30, deadline=None)
@given(validation=st.integers(0, 19), seed=st.integers(0, 2**40))
def test_train_and_validation_part_the_file_and_depend_on_the_seed_alone(
    tmp_path_factory: pytest.TempPathFactory, validation: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text(jsonl([row(i) for i in range(20)]))
    whole = GSM8K(path, "test").examples()
    train, kept = (
        GSM8K(path, split, validation=validation, seed=seed).examples()
        for split in ("train", "validation")
    )
    assert len(kept) == validation
    assert sorted(map(str, [*train, *kept])) == sorted(map(str, whole))
    assert train == [r for r in whole if r not in kept], "the order is that of the file"
    assert GSM8K(path, "validation", validation=validation, seed=seed).examples() == kept


def test_without_a_split_a_file_is_read_whole(file: Path) -> None:
    assert GSM8K(file).examples() == GSM8K(file, "test").examples()
    assert len(GSM8K(file).examples()) == 20


def test_another_seed_keeps_other_questions(file: Path) -> None:
    parts = [GSM8K(file, "validation", validation=6, seed=s).examples() for s in range(4)]
    assert len({str(part) for part in parts}) > 1


def test_a_question_that_a_file_has_twice_is_in_one_part_only(tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_text(jsonl([row(i % 10) for i in range(20)]))
    train, kept = (GSM8K(path, s, validation=4).examples() for s in ("train", "validation"))
    assert {r["prompt"] for r in train}.isdisjoint(r["prompt"] for r in kept)
    assert (len(train), len(kept)) == (12, 8)


def test_rows_given_out_are_the_callers_own(file: Path) -> None:
    task = GSM8K(file)
    task.examples()[0]["prompt"] = "changed"
    assert task.examples()[0]["prompt"] != "changed"


def test_a_compressed_file_reads_like_a_plain_one(file: Path, tmp_path: Path) -> None:
    packed = tmp_path / "train.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert GSM8K(packed, "test").examples() == GSM8K(file, "test").examples()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: expected one JSON object"),
        ("[]", r"line 2: expected one JSON object, got list"),
        ('{"question": "a"}', r"line 2: expected a text 'answer', got None"),
        ('{"question": 1, "answer": "#### 1"}', r"line 2: expected a text 'question', got 1"),
        ('{"question": "a", "answer": "It is 1"}', r"line 2: expected an 'answer' .* 'It is 1'"),
    ],
)
def test_a_line_that_is_no_row_is_refused_with_its_number(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(row(0))}\n{line}\n")
    with pytest.raises(InvalidInputError, match=message):
        GSM8K(path, "test").examples()


def test_files_that_are_none_are_refused(tmp_path: Path, file: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"path: .*absent\.jsonl, which is no file"):
        GSM8K(tmp_path / "absent.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(InvalidInputError, match="path: expected at least one row"):
        GSM8K(empty).examples()
    for content in (b"not gzip", gzip.compress(file.read_bytes())[:-20], b"\x1f\x8b" + b"\0" * 40):
        broken = tmp_path / "broken.jsonl.gz"
        broken.write_bytes(content)
        with pytest.raises(InvalidInputError, match="path: expected UTF-8 text"):
            GSM8K(broken).examples()


def test_settings_out_of_range_are_refused_by_name(file: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"split: .*'dev'"):
        GSM8K(file, "dev")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="validation: "):
        GSM8K(file, validation=-1)
    with pytest.raises(InvalidInputError, match="seed: "):
        GSM8K(file, seed=-1)
    with pytest.raises(InvalidInputError, match="n: "):
        GSM8K(file).examples(0)
    with pytest.raises(InvalidInputError, match="validation: expected fewer than the 20 questions"):
        GSM8K(file, "train", validation=20).examples()


# --- the copy of gsm-compose ---------------------------------------------------------------------


def install(folder: Path, package: str) -> None:
    """A distribution named gsm-compose, which hides any other one, with a package to look into."""
    info = folder / "gsm_compose-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gsm-compose\nVersion: 9.9\n")
    (info / "entry_points.txt").write_text(
        f"[decapod.reproductions]\ngsm-compose = {package}.reproduce:REPRODUCTION\n"
    )


def test_without_a_path_the_copy_of_gsm_compose_is_read_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "found_by_a_test")
    data = tmp_path / "found_by_a_test" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise RuntimeError('imported')\n")
    for name, rows in (("train", range(8)), ("test", range(100, 103))):
        packed = gzip.compress(jsonl([row(i) for i in rows]).encode())
        (data / f"gsm8k-{name}.jsonl.gz").write_bytes(packed)
    monkeypatch.syspath_prepend(tmp_path)
    assert [r["answer"] for r in GSM8K(split="test").examples()] == ["1100", "1101", "1102"]
    parts = [GSM8K(split=s, validation=3).examples() for s in ("train", "validation")]
    assert list(map(len, parts)) == [5, 3]
    assert len(GSM8K().examples()) == 8
    assert "found_by_a_test" not in sys.modules


@pytest.mark.parametrize("package", ["absent_in_a_test", "without_data"])
def test_without_a_path_and_a_copy_the_error_says_where_the_data_are(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, package)
    (tmp_path / "without_data").mkdir()
    (tmp_path / "without_data" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidInputError, match=r"path: .*openai/grade-school-math.*gsm-compose"):
        GSM8K()
