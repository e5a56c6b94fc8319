from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gsm_compose.benchmark import CANARY, Benchmark
from gsm_compose.card import dataset_card
from gsm_compose.errors import BenchmarkFormatError, LeakError, MissingExtraError, PromptError
from gsm_compose.exports import (
    from_hf_dataset,
    from_parquet,
    require_training_split,
    to_hf_dataset,
    to_parquet,
    to_rows,
    write_dataset_folder,
)
from gsm_compose.integrations.open_instruct_data import write_open_instruct_jsonl
from gsm_compose.integrations.trl_data import grpo_dataset, sft_dataset
from gsm_compose.integrations.verl_data import write_verl_parquet
from gsm_compose.prompts import PromptSpec
from gsm_compose.solutions import gold_answers, reference_solution

if TYPE_CHECKING:
    from collections.abc import Callable

INSPECT_TASK = "gsm_compose.integrations.inspect_task"
TRAINING_EXPORTS: dict[str, Callable[..., Any]] = {
    "grpo": lambda benchmark, _, **options: grpo_dataset(benchmark, **options),
    "sft": lambda benchmark, _, **options: sft_dataset(benchmark, **options),
    "verl": write_verl_parquet,
    "open_instruct": write_open_instruct_jsonl,
}


@pytest.fixture
def training(benchmark: Benchmark) -> Benchmark:
    return Benchmark(tuple(replace(item, split="train") for item in benchmark), benchmark.settings)


@pytest.mark.parametrize("name", TRAINING_EXPORTS)
def test_training_exports_refuse_test_questions_and_leave_nothing_behind(
    name: str, benchmark: Benchmark, tmp_path: Path
) -> None:
    with pytest.raises(LeakError, match="expected a benchmark built from the train split"):
        TRAINING_EXPORTS[name](benchmark, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", TRAINING_EXPORTS)
def test_training_exports_take_train_questions_and_explicitly_allowed_test_questions(
    name: str, benchmark: Benchmark, training: Benchmark, tmp_path: Path
) -> None:
    TRAINING_EXPORTS[name](training, tmp_path / "train")
    TRAINING_EXPORTS[name](benchmark, tmp_path / "test", allow_test_data=True)


@pytest.mark.parametrize("said", ["false", "yes", 1, None])
def test_only_the_word_true_allows_test_data(said: Any, benchmark: Benchmark) -> None:
    with pytest.raises(LeakError):
        require_training_split(benchmark, "this", allow_test_data=said)


def test_rows_say_what_the_items_say(benchmark: Benchmark) -> None:
    rows = to_rows(benchmark)
    assert [row["id"] for row in rows] == [item.id for item in benchmark]
    unicorns = rows[0]
    assert (unicorns["gold_x"], unicorns["gold_final"], unicorns["ignored"]) == (6, 48, 40)
    assert unicorns["problems"] == ["gsm8k/test/136", "gsm8k/test/418"]
    assert "locker is X cubic inches" in unicorns["question"]
    assert "locker is 6 cubic inches" in unicorns["q2"]
    assert "locker is 5 cubic inches" in unicorns["q2_original"]


def test_parquet_gives_back_the_same_benchmark(benchmark: Benchmark, tmp_path: Path) -> None:
    to_parquet(benchmark, tmp_path / "b.parquet")
    assert from_parquet(tmp_path / "b.parquet") == benchmark


def test_dataset_gives_back_the_same_items(benchmark: Benchmark) -> None:
    assert from_hf_dataset(to_hf_dataset(benchmark)).items == benchmark.items


def test_schema_does_not_depend_on_the_items(benchmark: Benchmark) -> None:
    # The first item has a question without a program, the others have programs everywhere.
    first, rest = (
        to_hf_dataset(Benchmark(items)) for items in (benchmark.items[:1], benchmark.items[1:])
    )
    assert first.features == rest.features


def test_datasets_loads_the_folder_and_finds_the_split(
    benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    write_dataset_folder(benchmark, tmp_path / "gsm")
    loaded = datasets.load_dataset(str(tmp_path / "gsm"), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["test"]
    assert from_hf_dataset(loaded["test"]).items == benchmark.items
    assert "Copyright (c) 2021 OpenAI" in (tmp_path / "gsm" / "LICENSE-gsm8k").read_text()


def test_a_changed_item_is_told_from_a_good_one(benchmark: Benchmark) -> None:
    rows = to_hf_dataset(benchmark).map(lambda row: {"order": row["order"][::-1]})
    with pytest.raises(BenchmarkFormatError, match=r"row 1.*is not the hash of the content"):
        from_hf_dataset(rows)


@pytest.mark.parametrize("damage", ["truncate", "header", "text"])
def test_a_damaged_parquet_file_is_refused_with_its_name(
    damage: str, benchmark: Benchmark, tmp_path: Path
) -> None:
    path = tmp_path / "b.parquet"
    to_parquet(benchmark, path)
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("id,split\n")
    else:
        to_hf_dataset(benchmark).to_parquet(path)
    with pytest.raises(BenchmarkFormatError, match=r"b\.parquet"):
        from_parquet(path)


def test_evaluation_exports_carry_the_canary_in_every_row(benchmark: Benchmark) -> None:
    assert all(row["canary"] == CANARY for row in to_hf_dataset(benchmark))


def test_the_hub_reads_the_card(benchmark: Benchmark, training: Benchmark) -> None:
    from huggingface_hub import DatasetCard

    card = DatasetCard(dataset_card(benchmark))
    assert card.data.license == "mit"
    assert card.data.size_categories == ["n<1K"]
    assert card.data.to_dict()["configs"] == [
        {
            "config_name": "default",
            "data_files": [{"split": "test", "path": "data/test.parquet"}],
        }
    ]
    assert CANARY in card.text
    assert "Do not train on them" in card.text
    assert "Do not train on them" not in dataset_card(training)


def test_the_card_states_how_the_benchmark_was_built(benchmark: Benchmark) -> None:
    settings = {"seed": 3, "rules": {"year": 12}}
    text = dataset_card(Benchmark(benchmark.items, settings))
    (block,) = re.findall(r"```json\n(.*?)\n```", text, flags=re.DOTALL)
    assert json.loads(block) == settings
    assert "| items | 3 |" in text
    assert "chain, 2 questions: 3" in text


def test_gold_answers_are_those_of_the_questions_asked(benchmark: Benchmark) -> None:
    item = benchmark.items[0]
    assert gold_answers(item, "original") == (6, None)
    assert gold_answers(item, "modified") == (48, None)
    assert gold_answers(item, "original-q2") == (40, None)
    assert gold_answers(item, "compositional") == (48, 6)
    assert gold_answers(item, "independent-context") == (48, 6)


def test_reference_solution_in_words_has_the_markers_and_no_annotations(
    benchmark: Benchmark,
) -> None:
    assert reference_solution(benchmark.items[1], "compositional") == (
        "Ana has 3*4=12 apples. The Q1 answer is 12. Therefore X=12.\n"
        "There are 12/2=6 pieces. The final answer is 6."
    )
    assert reference_solution(benchmark.items[1], "modified") == (
        "There are 12/2=6 pieces. The final answer is 6."
    )
    assert "X=" not in reference_solution(benchmark.items[1], "independent-context")


def _run(solution: str) -> dict[str, Any]:
    """Functions of a reference solution, which this library wrote itself."""
    (source,) = re.findall(r"```python\n(.*?)\n```", solution, flags=re.DOTALL)
    scope: dict[str, Any] = {}
    exec(compile(ast.parse(source), "solution", "exec"), scope)  # noqa: S102
    return scope


def test_reference_code_computes_the_gold_answers(benchmark: Benchmark) -> None:
    for item in benchmark.items[1:]:
        composed = reference_solution(item, "code")
        assert composed == reference_solution(item, "compositional", "code")
        assert "def solution():\n    X = solve_q1()\n" in composed
        scope = _run(composed)
        assert (scope["solve_q1"](), scope["solution"]()) == (item.x, item.gold)
        assert _run(reference_solution(item, "original", "code"))["solution"]() == item.x
        assert _run(reference_solution(item, "modified", "code"))["solution"]() == item.gold


def test_a_question_without_a_program_has_no_reference_code(benchmark: Benchmark) -> None:
    with pytest.raises(PromptError, match="gsm8k/test/136 has none"):
        reference_solution(benchmark.items[0], "code")
    with pytest.raises(PromptError, match="original-q2"):
        reference_solution(benchmark.items[0], "original-q2")


@pytest.mark.parametrize(
    ("package", "extra", "call"),
    [
        ("datasets", "datasets", lambda b, _: to_hf_dataset(b)),
        ("datasets", "trl", lambda b, _: grpo_dataset(b, allow_test_data=True)),
        ("pyarrow", "datasets", to_parquet),
        ("inspect_ai", "inspect", lambda *_: importlib.import_module(INSPECT_TASK)),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    package: str,
    extra: str,
    call: Callable[..., Any],
    benchmark: Benchmark,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, INSPECT_TASK, raising=False)
    with pytest.raises(MissingExtraError, match=rf'pip install "gsm-compose\[{extra}\]"'):
        call(benchmark, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_exports_for_text_comparison_refuse_code(training: Benchmark, tmp_path: Path) -> None:
    for write in (write_verl_parquet, write_open_instruct_jsonl):
        with pytest.raises(PromptError, match="expected answers in words"):
            write(training, tmp_path / "out", PromptSpec(style="code", shots=0))
        with pytest.raises(PromptError, match="expected answers in words"):
            write(training, tmp_path / "out", condition="code")
