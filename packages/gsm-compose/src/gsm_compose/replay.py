"""Results of answers that were generated elsewhere, scored by `gsm_compose.evaluate` itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gsm_compose.benchmark import Benchmark
from gsm_compose.errors import EvaluationError
from gsm_compose.evaluation import Response, Results, evaluate
from gsm_compose.prompts import Condition, Prompt, PromptSpec


def results_from_texts(
    benchmark: Benchmark,
    texts: Mapping[Condition, Mapping[str, str]],
    spec: PromptSpec,
    *,
    partial: bool = False,
    label: str = "",
) -> Results:
    """Score given answers.

    Args:
        benchmark: what was asked.
        texts: for every condition the model's full answer by item id.
        spec: how it was asked.
        partial: allow answers for some of the items only; the results are then of the items that
            every condition has.
        label: name of the model.

    Raises:
        EvaluationError: no answers, answers to items that the benchmark does not have, or, unless
            `partial`, items without an answer.
    """
    if not texts:
        raise EvaluationError("texts: expected answers under at least one condition, got none.")
    known = {item.id for item in benchmark}
    for condition, answers in texts.items():
        strange = sorted(answers.keys() - known)
        if strange:
            raise EvaluationError(
                f"texts: {len(strange)} answers under {condition!r} are to items that the "
                f"benchmark does not have, such as {strange[0]}. Pass the benchmark that was asked."
            )
        missing = len(known) - len(answers)
        if missing and not partial:
            raise EvaluationError(
                f"texts: {missing} of {len(known)} items have no answer under {condition!r}. "
                "Pass partial=True for the results of the others."
            )
    common = known.intersection(*texts.values())
    if not common:
        raise EvaluationError("texts: no item has an answer under every condition.")
    answered = Benchmark(tuple(item for item in benchmark if item.id in common), benchmark.settings)
    # One item at a time: `evaluate` asks a question that several items share once, but these are
    # the answers of a program that asked it for each of them.
    responses: list[Response] = []
    for item in answered:
        model = _Replay(answers[item.id] for answers in texts.values())
        found = evaluate(Benchmark((item,)), model, tuple(texts), spec, progress=False)
        responses += found.responses
    return Results(answered, spec, tuple(responses), label)


class _Replay:
    """A model that gives answers in the order in which it is asked for them."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = iter(texts)

    def __call__(self, prompts: Sequence[Prompt]) -> list[str]:
        return [next(self.texts) for _ in prompts]
