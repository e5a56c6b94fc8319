"""inspect-ai (0.3.100 or later): the benchmark as a task, and results from its log.

    inspect eval gsm_compose/compositional_gsm --model hf/… -M do_sample=false -T path=test.jsonl

inspect-ai finds the task through this package's entry point and needs its decorators at import, so
this module, unlike the rest of the library, imports its optional package at the top.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import cast

try:
    from inspect_ai import Task, task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.log import EvalLog, read_eval_log
    from inspect_ai.model import (
        ChatMessage,
        ChatMessageAssistant,
        ChatMessageUser,
        GenerateConfig,
    )
    from inspect_ai.scorer import (
        Metric,
        SampleScore,
        Score,
        Scorer,
        Target,
        accuracy,
        metric,
        scorer,
        stderr,
    )
    from inspect_ai.solver import TaskState, generate
except ImportError as error:
    from gsm_compose.errors import MissingExtraError

    raise MissingExtraError("inspect-ai", "inspect") from error

from gsm_compose.benchmark import CANARY, Benchmark
from gsm_compose.errors import EvaluationError
from gsm_compose.evaluation import PAPER, Results
from gsm_compose.exports import require_words
from gsm_compose.items import Item
from gsm_compose.parse import extract_answer, extract_q1
from gsm_compose.prompts import Condition, Prompt, PromptSpec, render, stop_sequences
from gsm_compose.replay import results_from_texts
from gsm_compose.solutions import gold_answers


@task
def compositional_gsm(
    path: str,
    condition: str | list[str] = "all",
    shots: int = 8,
    preamble: bool = True,
    chat: bool = True,
    max_tokens: int = 1024,
) -> Task:
    """Compositions, and by default also their questions alone, so that the gap can be told.

    Args:
        path: a benchmark file (``gsm-compose build``).
        condition: a condition of `gsm_compose.prompts`, several, or "all" for the three of the
            paper. Code is not run here: use ``gsm-compose eval`` for it.
        shots: number of worked exemplars, 0 to 8.
        preamble: say in which form the answer is wanted.
        chat: exemplars as turns of the conversation; otherwise all in one user message.
        max_tokens: how long an answer may be.

    Raises:
        BenchmarkFormatError: the file is not a benchmark.
        PromptError: no such condition, or one that asks for code.
    """
    spec = PromptSpec(shots=shots, preamble=preamble, chat=chat)
    conditions = _conditions(condition, spec)
    benchmark = Benchmark.from_jsonl(path)
    stops = sorted({stop for one in conditions for stop in stop_sequences(one, spec)})
    return Task(
        dataset=MemoryDataset(
            [_sample(item, one, spec) for one in conditions for item in benchmark],
            name="compositional_gsm",
        ),
        solver=generate(),
        scorer=composition_scorer(stops),
        config=GenerateConfig(temperature=0.0, max_tokens=max_tokens, stop_seqs=stops or None),
        metadata={"canary": CANARY, "split": benchmark.split},
        version=1,
    )


@metric
def reasoning_gap() -> Metric:
    """Δ (eq. 1 of arXiv 2410.01748) and paired Δ, where all three conditions were asked.

    Values are fractions, not points: ``delta`` = S_comp − S1·S2 and ``delta_paired`` =
    S_comp − mean(q1·q2) over items of two hops. None where a condition is missing. For intervals
    and the decomposition use `results_from_log`.
    """

    def compute(scores: list[SampleScore]) -> dict[str, float | None]:
        right: dict[str, dict[str, float]] = {one: {} for one in PAPER}
        for score in scores:
            asked = score.sample_metadata or {}
            if asked.get("condition") in right and asked["n_hops"] == 2:
                value = cast(dict[str, float], score.score.value)["final"]
                right[asked["condition"]][asked["item"]] = value
        q1, q2, both = (right[one] for one in PAPER)
        items = q1.keys() & q2.keys() & both.keys()
        if not items:
            return {"delta": None, "delta_paired": None}
        means = [sum(found[i] for i in items) / len(items) for found in (q1, q2, both)]
        expected = sum(q1[i] * q2[i] for i in items) / len(items)
        return {"delta": means[2] - means[0] * means[1], "delta_paired": means[2] - expected}

    return cast(Metric, compute)


@scorer(metrics=[{"final": [accuracy(), stderr()], "q1": [accuracy(), stderr()]}, reasoning_gap()])
def composition_scorer(stops: list[str]) -> Scorer:
    """Final answer and, where two questions were asked, the answer to the first, by their numbers.

    The value is ``{"final": 0 or 1, "q1": 0 or 1, or NaN where one question was asked}``; inspect
    leaves NaN out of its metrics. The score's metadata tells an unreadable answer (``unparsable``)
    and one that ignores X (``ignored_x``).

    Args:
        stops: where an answer ends, for models that do not stop there.
    """

    async def score(state: TaskState, target: Target) -> Score:
        text = state.output.completion
        for stop in stops:
            text = text.partition(stop)[0]
        final, q1 = extract_answer(text), extract_q1(text)
        x, ignored = state.metadata["x"], state.metadata["ignored_answer"]
        composed = state.metadata["condition"] == "compositional"
        return Score(
            value={
                "final": float(final is not None and final == int(target.text)),
                "q1": math.nan if x is None else float(q1 is not None and q1 == x),
            },
            answer=None if final is None else str(final),
            explanation=text,
            metadata={
                "q1_answer": None if q1 is None else str(q1),
                "unparsable": final is None,
                "ignored_x": composed and final is not None and final == ignored,
            },
        )

    return score


def results_from_log(
    log: EvalLog | str | Path, benchmark: Benchmark, *, partial: bool = False
) -> Results:
    """Score the answers of a log, as `gsm_compose.evaluate` would.

    Args:
        log: what ``inspect eval`` wrote or returned, with one epoch.
        benchmark: what was asked.
        partial: allow answers for some of the items only (a run with ``--limit``).

    Raises:
        EvaluationError: no samples, several epochs, or as for `results_from_texts`.
    """
    found = log if isinstance(log, EvalLog) else read_eval_log(str(log))
    texts: dict[Condition, dict[str, str]] = {}
    for sample in found.samples or []:
        if sample.epoch != 1:
            raise EvaluationError(f"log: expected one epoch, got number {sample.epoch}.")
        if "item" not in sample.metadata:
            raise EvaluationError(f"log: sample {sample.id} is not one of compositional_gsm.")
        answers = texts.setdefault(sample.metadata["condition"], {})
        answers[sample.metadata["item"]] = sample.output.completion
    given = found.eval.task_args
    spec = PromptSpec(
        shots=given.get("shots", 8),
        preamble=given.get("preamble", True),
        chat=given.get("chat", True),
    )
    return results_from_texts(benchmark, texts, spec, partial=partial, label=found.eval.model)


def _conditions(condition: str | list[str], spec: PromptSpec) -> tuple[Condition, ...]:
    names = [condition] if isinstance(condition, str) else condition
    chosen = PAPER if names == ["all"] else tuple(cast(list[Condition], names))
    for one in chosen:
        require_words(one, spec, "condition")
    return chosen


def _sample(item: Item, condition: Condition, spec: PromptSpec) -> Sample:
    final, x = gold_answers(item, condition)
    return Sample(
        id=f"{item.id}-{condition}",
        input=_input(render(item, condition, spec)),
        target=str(final),
        metadata={
            "item": item.id,
            "condition": condition,
            "x": x,
            "ignored_answer": item.ignored,
            "n_hops": len(item.hops),
            "problems": [hop.problem for hop in item.hops],
            "canary": CANARY,
        },
    )


def _input(prompt: Prompt) -> str | list[ChatMessage]:
    if isinstance(prompt, str):
        return prompt
    roles: dict[str, Callable[..., ChatMessage]] = {
        "user": ChatMessageUser,
        "assistant": ChatMessageAssistant,
    }
    return [roles[message["role"]](content=message["content"]) for message in prompt]
