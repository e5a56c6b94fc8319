"""What a model answered, item by item, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from gsm_compose import journal
from gsm_compose.benchmark import Benchmark
from gsm_compose.errors import EvaluationError
from gsm_compose.items import Item
from gsm_compose.prompts import SINGLE_QUESTION, Condition, PromptSpec

if TYPE_CHECKING:
    from gsm_compose.gap import GapReport, Method
    from gsm_compose.outcomes import Outcomes

_OF_THE_GAP: Final[tuple[Condition, ...]] = ("original", "modified", "compositional")


@dataclass(frozen=True)
class Response:
    """A model's answer to one item under one condition.

    Attributes:
        item: id of the item.
        condition: what was asked.
        text: what the model wrote; the first text where several were sampled.
        final: the answer read from it, by majority over samples; None if none could be read.
        q1: the answer to Q1, where the condition has one and it could be read.
        correct: whether `final` is the gold answer.
        q1_correct: whether `q1` is the gold answer; None where the condition asks one question.
        error: why code gave no answer; None in every other case.
        samples: all texts where several were sampled, otherwise empty.
    """

    item: str
    condition: Condition
    text: str
    final: Fraction | None
    q1: Fraction | None
    correct: bool
    q1_correct: bool | None
    error: str | None = None
    samples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Results:
    """All answers to a benchmark under some conditions.

    Attributes:
        benchmark: what was asked.
        spec: how it was asked.
        responses: one for every item under every condition.
        label: name of the model, if the caller gave one.

    Raises:
        EvaluationError: a condition lacks items, or has one twice or one of another benchmark.
    """

    benchmark: Benchmark
    spec: PromptSpec
    responses: tuple[Response, ...]
    label: str = ""

    def __post_init__(self) -> None:
        for condition, found in self._by_condition.items():
            answered = sum(response.condition == condition for response in self.responses)
            missing = sum(item.id not in found for item in self.benchmark)
            if missing:
                raise EvaluationError(
                    f"{condition}: expected answers to all {len(self.benchmark)} items, "
                    f"{missing} are missing. If the evaluation was cut short, run it again "
                    "with the same settings and the same file of answers."
                )
            if answered > len(self.benchmark):
                raise EvaluationError(
                    f"{condition}: expected one answer to each of {len(self.benchmark)} items, "
                    f"got {answered}. Were files joined, or is this another benchmark?"
                )

    @cached_property
    def _by_condition(self) -> Mapping[Condition, Mapping[str, Response]]:
        found: dict[Condition, dict[str, Response]] = {}
        for response in self.responses:
            found.setdefault(response.condition, {})[response.item] = response
        return found

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Conditions that were asked, in that order."""
        return tuple(self._by_condition)

    def of(self, condition: Condition) -> tuple[Response, ...]:
        """Responses under one condition, in the order of the benchmark.

        Raises:
            EvaluationError: the condition was not asked.
        """
        if condition not in self._by_condition:
            raise EvaluationError(
                f"condition: {condition!r} was not asked, only {', '.join(self.conditions)}. "
                "Evaluate with it among the conditions."
            )
        found = self._by_condition[condition]
        return tuple(found[item.id] for item in self.benchmark)

    def accuracy(self, condition: Condition) -> float:
        """Share of right answers, an unreadable one being wrong."""
        return float(self._correct(condition).mean())

    def unparsable(self, condition: Condition) -> float:
        """Share of responses from which no answer could be read, code that failed among them."""
        return float(self._array(condition, _unread).mean())

    def outcomes(self) -> Outcomes:
        """Right and wrong, item by item, in the form that `gsm_compose.gap` takes.

        Raises:
            EvaluationError: "original", "modified" or "compositional" was not asked.
        """
        from gsm_compose.outcomes import Outcomes, classify

        items = self.benchmark.items
        compositional = self.of("compositional")
        return Outcomes(
            item_ids=np.array([item.id for item in items]),
            q1_ids=np.array([item.q1.problem for item in items]),
            q2_ids=np.array([item.q2.problem for item in items]),
            q1=self._correct("original"),
            q2=self._correct("modified"),
            c1=self._array("compositional", lambda r: bool(r.q1_correct)),
            cf=self._correct("compositional"),
            category=np.array(
                [
                    classify(item, response.q1, response.final, response.error)
                    for item, response in zip(items, compositional, strict=True)
                ]
            ),
            independent=self._asked("independent-context"),
            original_q2=self._asked("original-q2"),
            code=self._asked("code"),
            parsable=~np.any([self._array(name, _unread) for name in _OF_THE_GAP], axis=0),
            unparsable={name: self.unparsable(name) for name in self.conditions},
        )

    def gap(
        self,
        level: float = 0.95,
        resamples: int = 2000,
        seed: int = 0,
        *,
        method: Method = "multiway",
        exclude: Collection[str] = (),
    ) -> GapReport:
        """The reasoning gap and its parts; the arguments are those of `gsm_compose.gap_report`.

        Raises:
            EvaluationError: see `outcomes`.
            StatisticsError: see `gsm_compose.gap_report`.
        """
        from gsm_compose.gap import gap_report

        return gap_report(self.outcomes(), level, resamples, seed, method=method, exclude=exclude)

    def to_jsonl(self, path: str | Path) -> None:
        """Write the file that `evaluate(out=path)` would have written without interruption."""
        samples = {len(response.samples) or 1 for response in self.responses}
        answers = []
        for question in journal.questions(self.benchmark, self.conditions, self.spec):
            found = self._by_condition[question.condition]
            same: dict[Response, list[str]] = {}
            for identity in question.items:
                key = replace(found[identity], item="", correct=False, q1_correct=None)
                same.setdefault(key, []).append(identity)
            answers += [
                journal.Answer(
                    key=question.key,
                    condition=question.condition,
                    items=tuple(items),
                    texts=response.samples or (response.text,),
                    final=response.final,
                    q1=response.q1,
                    error=response.error,
                )
                for response, items in same.items()
            ]
        head = journal.header(self.benchmark, self.spec, max(samples, default=1), self.label)
        journal.write(Path(path), head, answers)

    @classmethod
    def from_jsonl(cls, path: str | Path, benchmark: Benchmark) -> Results:
        """Read what `to_jsonl` or `evaluate(out=path)` wrote. Gold answers are the benchmark's.

        Raises:
            EvaluationError: no such file, of another benchmark, damaged, or not finished.
        """
        path = Path(path)
        head, answers = journal.read(path)
        try:
            spec = PromptSpec(**head["spec"])
            expected = journal.header(benchmark, spec, head["samples"], head["label"])
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"{path}, line 1: the header is not whole: {error!r}.") from error
        if head["benchmark"] != expected["benchmark"]:
            raise EvaluationError(
                f"{path}: expected answers to the benchmark {expected['benchmark']!r}, "
                f"got {head['benchmark']!r}. Give the benchmark that was evaluated."
            )
        return cls(benchmark, spec, responses(benchmark, answers), head["label"])

    def _correct(self, condition: Condition) -> NDArray[np.bool_]:
        return self._array(condition, lambda r: r.correct)

    def _asked(self, condition: Condition) -> NDArray[np.bool_] | None:
        return self._correct(condition) if condition in self.conditions else None

    def _array(self, condition: Condition, value: Callable[[Response], bool]) -> NDArray[np.bool_]:
        return np.array([value(response) for response in self.of(condition)], dtype=bool)


def _unread(response: Response) -> bool:
    return response.final is None


def responses(benchmark: Benchmark, answers: list[journal.Answer]) -> tuple[Response, ...]:
    """Every answer for every item that it serves, condition by condition, in benchmark order.

    Raises:
        EvaluationError: an answer is for an item that the benchmark does not have.
    """
    items = {item.id: item for item in benchmark}
    position = {identity: place for place, identity in enumerate(items)}
    conditions: dict[Condition, list[Response]] = {}
    for answer in answers:
        for identity in answer.items:
            if identity not in items:
                raise EvaluationError(
                    f"item {identity}: expected items of this benchmark, got another. "
                    "Give the benchmark that was evaluated."
                )
            response = _response(items[identity], answer)
            conditions.setdefault(answer.condition, []).append(response)
    return tuple(
        response
        for found in conditions.values()
        for response in sorted(found, key=lambda response: position[response.item])
    )


def _response(item: Item, answer: journal.Answer) -> Response:
    alone = answer.condition in SINGLE_QUESTION
    gold = {"original": item.x, "original-q2": item.ignored}.get(answer.condition, item.gold)
    return Response(
        item=item.id,
        condition=answer.condition,
        text=answer.texts[0],
        final=answer.final,
        q1=answer.q1,
        correct=answer.final == gold,
        q1_correct=None if alone else answer.q1 == item.x,
        error=answer.error,
        samples=answer.texts if len(answer.texts) > 1 else (),
    )


@dataclass(frozen=True)
class BestOf:
    """Two evaluations that differ in the preamble, and the better of both (Section 3).

    Taking the better of two noisy accuracies overstates the true one, the more so the closer they
    are, and by how much differs between conditions. Report the two runs; the maximum is here to
    compare with numbers that were made this way.

    Attributes:
        preamble: the results with the preamble.
        plain: those without.
    """

    preamble: Results
    plain: Results

    def accuracy(self, condition: Condition) -> tuple[float, float, float]:
        """With the preamble, without it, and the larger of both."""
        pair = self.preamble.accuracy(condition), self.plain.accuracy(condition)
        return (*pair, max(pair))

    @property
    def delta(self) -> tuple[float, float, float]:
        """Δ = S_comp − S1·S2 with the preamble, without, and of the three larger accuracies."""
        s1, s2, s_comp = (np.array(self.accuracy(condition)) for condition in _OF_THE_GAP)
        first, second, largest = (s_comp - s1 * s2).tolist()
        return first, second, largest

    def summary(self) -> str:
        """A table of all three, in percent, with the caution."""
        conditions = self.preamble.conditions
        rows: list[tuple[str, tuple[float, float, float]]] = [
            (name, self.accuracy(name)) for name in conditions
        ]
        if set(_OF_THE_GAP) <= set(conditions):
            rows.append(("Δ", self.delta))
        lines = [f"{'':20}{'preamble':>10}{'none':>10}{'larger':>10}"]
        lines += [f"{name:20}" + "".join(f"{100 * v:10.1f}" for v in row) for name, row in rows]
        lines.append("The larger of two is biased upwards; report both.")
        return "\n".join(lines)


def best_of(first: Results, second: Results) -> BestOf:
    """Put together an evaluation with and one without the preamble, in either order.

    Raises:
        EvaluationError: benchmark, conditions or anything but the preamble differs.
    """
    with_it, without = (first, second) if first.spec.preamble else (second, first)
    if not with_it.spec.preamble or without.spec != replace(with_it.spec, preamble=False):
        raise EvaluationError(
            "best_of: expected specifications that differ in the preamble alone, "
            f"got {first.spec} and {second.spec}."
        )
    if {item.id for item in first.benchmark} != {item.id for item in second.benchmark}:
        raise EvaluationError("best_of: expected two evaluations of one benchmark, got of two.")
    if set(first.conditions) != set(second.conditions):
        raise EvaluationError(
            f"best_of: expected the same conditions, got {', '.join(first.conditions)} and "
            f"{', '.join(second.conditions)}."
        )
    return BestOf(with_it, without)
