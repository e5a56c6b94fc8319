from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gsm_compose.benchmark import CANARY, Benchmark
from gsm_compose.errors import EvaluationError, PromptError
from gsm_compose.evaluation import PAPER
from gsm_compose.prompts import PromptSpec, render

pytest.importorskip("inspect_ai")

if TYPE_CHECKING:
    from collections.abc import Iterator

    from inspect_ai.log import EvalLog

# inspect-ai calls tenacity by a parameter that newer versions have renamed, and leaves the streams
# between its tasks open.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <function MemoryObject"),
]


@pytest.fixture(autouse=True)
def _collect_open_streams() -> Iterator[None]:
    yield
    gc.collect()  # here, where the filter above applies, rather than in another test


@pytest.fixture
def path(benchmark: Benchmark, tmp_path: Path) -> str:
    benchmark.to_jsonl(tmp_path / "benchmark.jsonl")
    return str(tmp_path / "benchmark.jsonl")


def _run(path: str, tmp_path: Path, model: Any, **arguments: Any) -> EvalLog:
    from inspect_ai import eval as run

    from gsm_compose.integrations.inspect_task import compositional_gsm

    options = {key: arguments.pop(key) for key in ("limit", "epochs") if key in arguments}
    (log,) = run(
        compositional_gsm(path=path, **arguments),
        model=model,
        log_dir=str(tmp_path / "logs"),
        display="none",
        score_display=False,
        **options,
    )
    assert log.status == "success", log.error
    return log


def _answering(right: dict[str, str]) -> Any:
    """inspect's own mock model, which answers by what it is asked last."""
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    def answer(messages: list[Any], *_: Any) -> ModelOutput:
        output = ModelOutput.from_content("mockllm/model", right[messages[-1].text])
        output.usage = ModelUsage()  # else inspect downloads a tokenizer to count with
        return output

    return get_model("mockllm/model", custom_outputs=answer)


def _texts(benchmark: Benchmark, spec: PromptSpec, answers: dict[Any, list[str]]) -> dict[str, str]:
    found = {}
    for condition, texts in answers.items():
        for item, text in zip(benchmark, texts, strict=True):
            prompt = render(item, condition, spec)
            found[prompt if isinstance(prompt, str) else prompt[-1]["content"]] = text
    return found


ANSWERS = {
    "original": ["The final answer is 6.", "The final answer is 12.", "The final answer is 9."],
    # Without chat the model may go on with a problem of its own, which is not its answer.
    "modified": [
        "The final answer is 48.\n\nProblem:\nThe final answer is 1.",
        "The final answer is 6.",
        "The final answer is 31.",
    ],
    "compositional": [
        "The Q1 answer is 6. Therefore X=6.\nThe final answer is 48.",
        "The Q1 answer is 12. Therefore X=12.\nThe final answer is 10.",
        "I cannot say.",
    ],
}


def _metrics(log: EvalLog) -> dict[str, dict[str, float]]:
    assert log.results is not None
    return {s.name: {k: m.value for k, m in s.metrics.items()} for s in log.results.scores}


@pytest.mark.parametrize("chat", [True, False])
def test_task_gives_accuracies_of_both_answers_and_the_gap(
    chat: bool, path: str, benchmark: Benchmark, tmp_path: Path
) -> None:
    spec = PromptSpec(shots=1, chat=chat)
    texts = _texts(benchmark, spec, ANSWERS)
    if chat:
        texts = {asked: text.partition("\n\nProblem:")[0] for asked, text in texts.items()}
    model = _answering(texts)
    log = _run(path, tmp_path, model, shots=1, chat=chat)
    metrics = _metrics(log)
    assert metrics["final"]["accuracy"] == pytest.approx(6 / 9)
    # Only compositions have a first answer: two of three are right.
    assert metrics["q1"]["accuracy"] == pytest.approx(2 / 3)
    assert metrics["composition_scorer"]["delta"] == pytest.approx(1 / 3 - 2 / 3)
    assert metrics["composition_scorer"]["delta_paired"] == pytest.approx(1 / 3 - 2 / 3)
    assert log.samples is not None
    scores = {sample.id: (sample.scores or {})["composition_scorer"] for sample in log.samples}
    first, ignoring, silent = (scores[f"{item.id}-compositional"] for item in benchmark)
    assert first.value == {"final": 1.0, "q1": 1.0}
    assert (first.metadata or {})["ignored_x"] is False
    assert (ignoring.metadata or {})["ignored_x"] is True
    assert (silent.metadata or {})["unparsable"] is True
    alone: Any = scores[f"{benchmark.items[0].id}-original"].value
    assert math.isnan(alone["q1"])


def test_samples_carry_the_gold_values_and_the_canary(
    path: str, benchmark: Benchmark, tmp_path: Path
) -> None:
    spec = PromptSpec(shots=0, chat=True)
    model = _answering(_texts(benchmark, spec, ANSWERS))
    log = _run(path, tmp_path, model, shots=0, condition="compositional")
    assert log.samples is not None
    assert log.eval.metadata is not None
    assert log.eval.metadata["canary"] == CANARY
    items = {item.id: item for item in benchmark}
    assert {sample.metadata["item"] for sample in log.samples} == items.keys()
    for sample in log.samples:
        item = items[sample.metadata["item"]]
        assert (sample.target, sample.metadata["x"]) == (str(item.gold), item.x)
        assert sample.metadata["ignored_answer"] == item.ignored
        assert sample.metadata["canary"] == CANARY
    assert "delta" not in _metrics(log)["composition_scorer"]


def test_results_from_log_have_the_gap_with_intervals(
    path: str, benchmark: Benchmark, tmp_path: Path
) -> None:
    from gsm_compose.integrations.inspect_task import results_from_log

    spec = PromptSpec(shots=1, chat=False)
    log = _run(path, tmp_path, _answering(_texts(benchmark, spec, ANSWERS)), shots=1, chat=False)
    for source in (log, log.location):
        results = results_from_log(source, benchmark)
        assert results.spec == spec
        assert results.label == "mockllm/model"
        assert [results.accuracy(c) for c in PAPER] == pytest.approx([2 / 3, 1, 1 / 3])
        assert results.gap(resamples=50).delta.value == pytest.approx(1 / 3 - 2 / 3)
    with pytest.raises(EvaluationError, match="does not have"):
        results_from_log(log, Benchmark(benchmark.items[:1]))


def test_an_evaluation_with_several_epochs_is_refused_but_a_limited_one_can_be_read(
    path: str, benchmark: Benchmark, tmp_path: Path
) -> None:
    from gsm_compose.integrations.inspect_task import results_from_log

    spec = PromptSpec(shots=0, chat=False)
    model = _answering(_texts(benchmark, spec, ANSWERS))
    twice = _run(path, tmp_path, model, shots=0, chat=False, epochs=2)
    with pytest.raises(EvaluationError, match="one epoch"):
        results_from_log(twice, benchmark)
    assert _metrics(twice)["composition_scorer"]["delta"] == pytest.approx(1 / 3 - 2 / 3)
    limited = _run(path, tmp_path, model, shots=0, chat=False, condition="original", limit=2)
    assert len(results_from_log(limited, benchmark, partial=True).responses) == 2
    with pytest.raises(EvaluationError, match="1 of 3 items have no answer"):
        results_from_log(limited, benchmark)


def test_code_and_unknown_conditions_are_refused(path: str) -> None:
    from gsm_compose.integrations.inspect_task import compositional_gsm

    for condition in ("code", "nothing", ["original", "code"]):
        with pytest.raises(PromptError):
            compositional_gsm(path=path, condition=condition)


@pytest.mark.slow
def test_command_line_finds_the_task_by_name_and_a_transformers_model_answers(
    path: str, benchmark: Benchmark, tmp_path: Path
) -> None:
    pytest.importorskip("decapod.lm")
    from decapod.lm.tiny import build_model, build_tokenizer
    from gsm_compose.integrations.inspect_task import results_from_log

    tokenizer = build_tokenizer([item.q2.question for item in benchmark], "bpe", chat=True)
    tokenizer.save_pretrained(tmp_path / "tiny")
    model = build_model(len(tokenizer), hidden_size=32, layers=1, max_positions=2048)
    model.save_pretrained(tmp_path / "tiny")
    command = [str(Path(sys.executable).with_name("inspect")), "eval"]
    command += ["gsm_compose/compositional_gsm", "-T", f"path={path}", "-T", "shots=1"]
    command += ["-T", "max_tokens=8", "--model", f"hf/{tmp_path / 'tiny'}"]
    command += ["-M", "device=cpu", "-M", "do_sample=false"]
    command += ["--log-dir", str(tmp_path / "logs"), "--display", "none"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (log,) = (tmp_path / "logs").glob("*.eval")
    results = results_from_log(log, benchmark)
    assert len(results.responses) == 9
    assert all(response.text for response in results.responses)
    assert results.spec == PromptSpec(shots=1, chat=True)
