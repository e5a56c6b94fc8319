"""Asking a model all questions of a benchmark, so that no answer is ever lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Final, Literal

from gsm_compose.benchmark import Benchmark
from gsm_compose.errors import EvaluationError, IsolationError
from gsm_compose.journal import Answer, Journal, Question, header, questions
from gsm_compose.parse import extract_answer, extract_q1, run_code_solutions
from gsm_compose.progress import progress as _progress
from gsm_compose.prompts import (
    CONDITIONS,
    DEFAULT_SPEC,
    SINGLE_QUESTION,
    Condition,
    Prompt,
    PromptSpec,
    stop_sequences,
    style_of,
)
from gsm_compose.results import BestOf, Response, Results, best_of, responses
from gsm_compose.sandbox import Isolation, Limits, strongest, works

__all__ = ["BestOf", "Generate", "Response", "Results", "best_of", "evaluate"]

Generate = Callable[[Sequence[Prompt]], Sequence[str]]
"""A model: prompts to as many texts, in their order.

An exception that it raises may have an attribute ``finished``, a mapping from places in the list of
prompts to texts that were there before it failed, as `decapod.lm.ServerError` does; they are kept.
"""

PAPER: Final[tuple[Condition, ...]] = ("original", "modified", "compositional")

# Final answer, answer to Q1, why code failed.
_Reading = tuple[Fraction | None, Fraction | None, str | None]


def evaluate(
    benchmark: Benchmark,
    generate: Generate,
    conditions: Sequence[Condition] | Condition | Literal["all"] = PAPER,
    spec: PromptSpec = DEFAULT_SPEC,
    *,
    batch_size: int = 64,
    samples: int = 1,
    out: str | Path | None = None,
    label: str = "",
    isolation: Isolation = "auto",
    limits: Limits | None = None,
    progress: bool = True,
) -> Results:
    """Ask every distinct prompt of every condition once, and read the answers.

    With `out` every answered batch is on disk before the next is asked. Called again after an
    interruption of any kind, with the same benchmark, spec, samples and label, it asks only what is
    missing; other settings may change, and conditions be added.

    Args:
        benchmark: items to ask.
        generate: takes prompts (texts, or messages for ``spec.chat``), at most `batch_size` and of
            one condition, and gives as many texts. An empty text is an answer, one that cannot be
            read.
        conditions: what to ask; a single name, or "all", will do.
        spec: how to ask.
        batch_size: prompts in one call of `generate`; more only where `samples` is larger.
        samples: how often to ask every prompt, next to each other in one call; for a model that
            samples. Answers to the question and to Q1 are then each decided by majority over those
            that could be read, the earliest of equally frequent ones winning (maj@k).
        out: JSON lines, appended to; continued if it exists.
        label: name of the model; written to `out` and checked against it.
        isolation: what to run model-written code under; see `gsm_compose.sandbox`.
        limits: what that code may use; `Limits()` if None.
        progress: show a bar on standard error.

    Returns:
        A response for every item under every condition.

    Raises:
        EvaluationError: `out` belongs to another run; `generate` failed, or gave something other
            than as many texts as prompts. The message says how to go on.
        PromptError: a condition does not exist, or an item cannot be asked.
        IsolationError: code is asked for and cannot be run here; nothing was asked.
        OSError: `out` cannot be written.
    """
    chosen = _conditions(conditions, spec)
    for name, value in (("batch_size", batch_size), ("samples", samples)):
        if type(value) is not int or value < 1:
            raise EvaluationError(f"{name}: expected a whole number of at least 1, got {value!r}.")
    if any(style_of(condition, spec) == "code" for condition in chosen):
        _check_that_code_can_be_run(isolation)
    asked = questions(benchmark, chosen, spec)
    with ExitStack() as stack:
        journal = None
        if out is not None:
            head = header(benchmark, spec, samples, label)
            journal = stack.enter_context(Journal(Path(out), head))
        found = {answer.key: answer for answer in journal.answers} if journal else {}
        missing = [question for question in asked if question.key not in found]
        advance = stack.enter_context(_progress("evaluate", len(missing) * samples, shown=progress))

        def keep(answered: Mapping[Question, tuple[str, ...]]) -> None:
            answers = _read(answered, spec, isolation, limits)
            if journal and answers:
                journal.append(answers)
            found.update((answer.key, answer) for answer in answers)
            advance(len(answers) * samples)

        try:
            for batch in _batches(missing, max(1, batch_size // samples)):
                prompts = [question.prompt for question in batch for _ in range(samples)]
                try:
                    texts = generate(prompts)
                except Exception as error:
                    keep(_finished(error, batch, samples))
                    reason = f"generate failed: {type(error).__name__}: {error}."
                    raise EvaluationError(reason) from error
                keep(_matched(texts, batch, samples))
        except EvaluationError as error:
            raise EvaluationError(f"{error} {_kept(asked, found, out)}") from error.__cause__
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(_kept(asked, found, out))
            raise
    complete = [found[question.key] for question in asked]
    return Results(benchmark, spec, responses(benchmark, complete), label)


def _conditions(
    conditions: Sequence[Condition] | Condition | Literal["all"], spec: PromptSpec
) -> tuple[Condition, ...]:
    names: tuple[Condition, ...]
    if isinstance(conditions, str):
        names = CONDITIONS if conditions == "all" else (conditions,)
    else:
        names = tuple(conditions)
    for name in names:
        style_of(name, spec)
    if not names or len(set(names)) < len(names):
        raise EvaluationError(
            f"conditions: expected at least one, and each once, got {', '.join(names) or 'none'}."
        )
    return names


def _check_that_code_can_be_run(isolation: Isolation) -> None:
    """Find out before the model is asked for any; what was found is remembered."""
    if isolation == "auto":
        strongest()
    elif not works(isolation):
        raise IsolationError(
            f"isolation: expected one that works here, got {isolation!r}, which does not. "
            "Use 'auto' for the strongest that does."
        )


def _batches(missing: Sequence[Question], size: int) -> Iterator[list[Question]]:
    # Two conditions may ask the same prompt. Apart, they cannot meet in one call, where a model
    # that samples would take the second for another sample of the first.
    for _, group in groupby(missing, key=lambda question: question.condition):
        together = list(group)
        for start in range(0, len(together), size):
            yield together[start : start + size]


def _matched(
    texts: object, batch: Sequence[Question], samples: int
) -> dict[Question, tuple[str, ...]]:
    """The texts of every question.

    Raises:
        EvaluationError: they are not as many texts as were asked for.
    """
    count = len(batch) * samples
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise EvaluationError(
            f"generate: expected a list of {count} texts, got {type(texts).__name__}."
        )
    if len(texts) != count:
        raise EvaluationError(
            f"generate: expected {count} texts for as many prompts, got {len(texts)}."
        )
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise EvaluationError(
                f"generate: expected texts, got {text!r} for prompt {place} of {count}. "
                'Give "" where the model wrote nothing.'
            )
    return _finished_questions(dict(enumerate(texts)), batch, samples)


def _finished(
    error: Exception, batch: Sequence[Question], samples: int
) -> dict[Question, tuple[str, ...]]:
    """Questions that were answered before the model failed, if it says so."""
    texts = getattr(error, "finished", None)
    return _finished_questions(texts, batch, samples) if isinstance(texts, Mapping) else {}


def _finished_questions(
    texts: Mapping[int, object], batch: Sequence[Question], samples: int
) -> dict[Question, tuple[str, ...]]:
    answered = {}
    for number, question in enumerate(batch):
        found = [texts.get(number * samples + sample) for sample in range(samples)]
        whole = tuple(text for text in found if isinstance(text, str))
        if len(whole) == samples:
            answered[question] = whole
    return answered


def _read(
    answered: Mapping[Question, tuple[str, ...]],
    spec: PromptSpec,
    isolation: Isolation,
    limits: Limits | None,
) -> list[Answer]:
    """The answers that stand in the texts, each by majority over a question's samples."""
    if not answered:
        return []
    condition = next(iter(answered)).condition
    stops = stop_sequences(condition, spec)
    flat = [_cut(text, stops) for texts in answered.values() for text in texts]
    if style_of(condition, spec) == "code":
        readings = iter(_run(flat, condition, isolation, limits))
    else:
        alone = condition in SINGLE_QUESTION
        readings = iter((extract_answer(t), None if alone else extract_q1(t), None) for t in flat)
    answers = []
    for question, texts in answered.items():
        finals, firsts, errors = zip(*(next(readings) for _ in texts), strict=True)
        final = _majority(finals)
        answers.append(
            Answer(
                key=question.key,
                condition=condition,
                items=question.items,
                texts=texts,
                final=final,
                q1=_majority(firsts),
                error=next(filter(None, errors), None) if final is None else None,
            )
        )
    return answers


def _run(
    texts: Sequence[str], condition: Condition, isolation: Isolation, limits: Limits | None
) -> list[_Reading]:
    alone = condition in SINGLE_QUESTION
    call = ("solution",) if alone else ("solve_q1", "solution")
    return [
        (result.values["solution"], result.values.get("solve_q1"), result.error)
        for result in run_code_solutions(texts, call, limits, isolation)
    ]


def _cut(text: str, stops: Sequence[str]) -> str:
    # An engine that knows no stop sequences lets the model go on with problems of its own, whose
    # answers must not be taken for the one asked for.
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def _majority(values: Sequence[Fraction | None]) -> Fraction | None:
    """The most frequent value; `most_common` keeps the order of first occurrence among equals."""
    counts = Counter(value for value in values if value is not None)
    return counts.most_common(1)[0][0] if counts else None


def _kept(asked: Sequence[Question], found: Mapping[str, Answer], out: str | Path | None) -> str:
    done = sum(question.key in found for question in asked)
    state = f"{done} of {len(asked)} prompts were answered"
    if out is None:
        return f"{state} and are lost; with out=<file> the next call would go on from there."
    return f"{state} and are in {out}; the same call or command again asks only the rest."
