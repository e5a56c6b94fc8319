from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from gsm_compose.benchmark import CANARY, Benchmark
from gsm_compose.errors import EvaluationError, PromptError
from gsm_compose.evaluation import evaluate
from gsm_compose.integrations.lm_harness import results_from_samples, write_task_folder
from gsm_compose.parse import extract_answer_strict
from gsm_compose.prompts import PromptSpec

pytest.importorskip("lm_eval")
pytest.importorskip("decapod.lm")
SPEC = PromptSpec(shots=1)
TASKS = ("gsm_compose_original", "gsm_compose_modified", "gsm_compose_compositional")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, benchmark: Benchmark) -> Path:
    """A model with random weights and a tokenizer that knows digits and the markers."""
    from decapod.lm.tiny import build_model, build_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = build_tokenizer([item.q2.question for item in benchmark], "bpe")
    tokenizer.save_pretrained(folder)
    model = build_model(len(tokenizer), hidden_size=32, layers=1, max_positions=2048)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, benchmark: Benchmark) -> Path:
    written = tmp_path_factory.mktemp("written") / "tasks"
    write_task_folder(benchmark, written, SPEC, max_tokens=12)
    # The folder must not depend on where it was written.
    return written.rename(tmp_path_factory.mktemp("moved") / "tasks")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, tiny: Path, tasks: Path) -> Path:
    """What the harness's own command line logs, run where this library cannot be imported."""
    out = tmp_path_factory.mktemp("out")
    hide = tmp_path_factory.mktemp("hide")
    (hide / "gsm_compose.py").write_text("raise ImportError('not installed here')\n")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tiny},dtype=float32", "--batch_size", "3"]
    command += ["--include_path", str(tasks), "--tasks", "gsm_compose"]
    command += ["--log_samples", "--output_path", str(out)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(hide)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def _logged(samples: Path) -> list[dict[str, Any]]:
    paths = sorted(samples.rglob("samples_*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().split("\n") if line]


@pytest.mark.slow
def test_harness_asks_every_item_under_every_condition_with_both_filters(
    samples: Path, benchmark: Benchmark
) -> None:
    logged = _logged(samples)
    asked = {(s["doc"]["condition"], s["doc"]["id"], s["filter"]) for s in logged}
    assert len(asked) == len(logged) == 3 * len(benchmark) * 2
    assert {found for _, _, found in asked} == {"strict", "flexible"}
    assert all(s["doc"]["canary"] == CANARY for s in logged)
    (results,) = samples.rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    for task in TASKS:
        assert {"exact_match,strict", "exact_match,flexible"} <= scores[task].keys()


@pytest.mark.slow
def test_harness_sends_the_rendered_prompt_and_decodes_greedily(
    samples: Path, benchmark: Benchmark
) -> None:
    from gsm_compose.prompts import render

    items = {item.id: item for item in benchmark}
    for sample in _logged(samples):
        doc = sample["doc"]
        sent, options = (sample["arguments"]["gen_args_0"][key] for key in ("arg_0", "arg_1"))
        assert sent == render(items[doc["id"]], doc["condition"], SPEC)
        assert options["do_sample"] is False
        assert options["until"] == ["\nProblem:"]


@pytest.mark.slow
def test_results_from_samples_equal_an_evaluation_of_the_same_texts(
    samples: Path, benchmark: Benchmark
) -> None:
    sent = {s["arguments"]["gen_args_0"]["arg_0"]: s["resps"][0][0] for s in _logged(samples)}
    direct = evaluate(benchmark, lambda prompts: [sent[p] for p in prompts], spec=SPEC)
    found = results_from_samples(samples, benchmark)
    assert found.spec == SPEC
    assert set(found.responses) == set(direct.responses)
    assert found.gap(resamples=50).to_dict() == direct.gap(resamples=50).to_dict()


def _fake(
    folder: Path, benchmark: Benchmark, tasks: Path, answer: dict[str, Any], limit: int = 3
) -> Path:
    """Samples files as the harness writes them, with answers of our choice."""
    for condition, texts in answer.items():
        docs = (tasks / "data" / f"{condition}.jsonl").read_text().splitlines()[:limit]
        lines = []
        for position, line in enumerate(docs):
            sample = {"doc": json.loads(line), "resps": [[texts[position]]], "filter": "strict"}
            lines.append(json.dumps(sample))
        (folder / f"samples_gsm_compose_{condition}_now.jsonl").write_text("\n".join(lines) + "\n")
    return folder


ANSWERS = {
    "original": ["The final answer is 6.", "The final answer is 12.", "The final answer is 9."],
    "modified": ["The final answer is 48.", "The final answer is 6.", "The final answer is 31."],
    "compositional": [
        "The Q1 answer is 6. Therefore X=6.\nThe final answer is 48.",
        "The Q1 answer is 12. Therefore X=12.\nThe final answer is 10.",
        "The Q1 answer is 9. Therefore X=9.\nThe final answer is 28.",
    ],
}


def test_gap_of_chosen_answers_is_the_one_computed_by_hand(
    tmp_path: Path, benchmark: Benchmark, tasks: Path
) -> None:
    report = results_from_samples(_fake(tmp_path, benchmark, tasks, ANSWERS), benchmark).gap(
        resamples=50
    )
    # S1 = 2/3, S2 = 1, S_comp = 1/3; the second composition keeps the original number.
    assert report.delta.value == pytest.approx(1 / 3 - 2 / 3)
    assert report.taxonomy["X ignored"] == pytest.approx(1 / 3)


def test_a_limited_run_is_refused_unless_partial_results_are_wanted(
    tmp_path: Path, benchmark: Benchmark, tasks: Path
) -> None:
    folder = _fake(tmp_path, benchmark, tasks, ANSWERS, limit=2)
    with pytest.raises(EvaluationError, match="1 of 3 items have no answer"):
        results_from_samples(folder, benchmark)
    found = results_from_samples(folder, benchmark, partial=True)
    assert [item.id for item in found.benchmark] == [item.id for item in benchmark.items[:2]]


def test_samples_of_two_runs_of_another_benchmark_or_damaged_are_refused(
    tmp_path: Path, benchmark: Benchmark, tasks: Path
) -> None:
    with pytest.raises(EvaluationError, match="--log_samples"):
        results_from_samples(tmp_path, benchmark)
    folder = _fake(tmp_path, benchmark, tasks, ANSWERS)
    with pytest.raises(EvaluationError, match="items that the benchmark does not have"):
        results_from_samples(folder, Benchmark(benchmark.items[:1]))
    path = folder / "samples_gsm_compose_original_now.jsonl"
    content = path.read_text()
    (folder / "samples_gsm_compose_original_then.jsonl").write_text(content)
    with pytest.raises(EvaluationError, match="a second one for 'original'"):
        results_from_samples(folder, benchmark)
    path.write_text(content[:-40])
    with pytest.raises(EvaluationError, match="line 3: not a sample"):
        results_from_samples(path, benchmark)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The Q1 answer is 6. Therefore X=6. The final answer is 48.", 48),
        ("The final answer is 7. No: the final answer is $1,234.00.", 1234),
        ("The final answer is: **18**", 18),
        ("#### 18", 18),
        (r"so \boxed{18}", 18),
        ("Answer: -5", -5),
        ("The final answer is 3/4.", Fraction(3, 4)),
        ("There are 12 of them.", None),
        ("", None),
    ],
)
def test_strict_filter_of_the_folder_agrees_with_this_library(
    text: str, number: int | Fraction | None, tasks: Path, benchmark: Benchmark
) -> None:
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_path=str(tasks), include_defaults=False).load(TASKS[0])
    task = loaded["tasks"][TASKS[0]]
    (strict,) = (chain for chain in task._filters if chain.name == "strict")
    (found,) = strict.filters[0]().apply([[text]], [{}])
    scored = task.process_results({"target": str(number)}, found) if number is not None else None
    assert extract_answer_strict(text) == number
    assert scored == (None if number is None else {"exact_match": 1.0})
    if number is None:
        assert task.process_results({"target": "12"}, found) == {"exact_match": 0.0}


def test_folders_that_the_harness_could_not_score_are_refused(
    tmp_path: Path, benchmark: Benchmark
) -> None:
    refused: list[dict[str, Any]] = [
        {"spec": PromptSpec(chat=True)},
        {"spec": PromptSpec(style="code")},
        {"conditions": ("code",)},
        {"conditions": ()},
        {"conditions": ("original", "original")},
        {"name": "gsm compose"},
        {"max_tokens": 0},
    ]
    for options in refused:
        with pytest.raises(PromptError):
            write_task_folder(benchmark, tmp_path / "tasks", **options)
    assert list(tmp_path.iterdir()) == []
