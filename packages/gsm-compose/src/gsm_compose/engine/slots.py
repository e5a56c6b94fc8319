"""Numbers of a question that another question's answer may replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

from gsm_compose.engine.constants import ALWAYS, strongly_implied
from gsm_compose.engine.mentions import Mention
from gsm_compose.engine.problems import Problem
from gsm_compose.engine.program import Leaf, Program

if TYPE_CHECKING:
    from gsm_compose.engine.rules import Rule


@dataclass(frozen=True)
class Slot:
    """A number written in digits in a question, accepted or not.

    Attributes:
        problem: whose question it is in.
        mention: the number.
    """

    problem: Problem
    mention: Mention

    @property
    def start(self) -> int:
        """Where it begins in the question, in characters."""
        return self.mention.start

    @property
    def end(self) -> int:
        """Where it ends, exclusive."""
        return self.mention.end

    @property
    def text(self) -> str:
        """Its characters."""
        return self.mention.text

    @cached_property
    def value(self) -> Fraction:
        """The number that stands there."""
        return self.mention.values[0]

    @cached_property
    def program(self) -> Program | None:
        """The problem's program, or None where it has none."""
        return self.problem.program if self.problem.no_program is None else None

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """Literals of the program that have the number's value."""
        return tuple(self.program.leaves(self.value)) if self.program else ()

    @cached_property
    def constants(self) -> frozenset[Fraction]:
        """Values that a literal may have by itself: other numbers of the text, known constants."""
        others = (m.values for m in self.problem.mentions if m != self.mention)
        stated = frozenset(value for values in others for value in values)
        return stated | strongly_implied(self.problem.question) | ALWAYS

    def replaced_by(self, text: str) -> str:
        """The question with `text` in the number's place."""
        question = self.problem.question
        return question[: self.start] + text + question[self.end :]


def candidates(problem: Problem) -> list[Slot]:
    """Every number that the question writes in digits, in the order of the text."""
    return [Slot(problem, m) for m in problem.mentions if m.text[:1].isdigit() and m.kind != "word"]


def find_slots(problem: Problem, rules: Sequence[Rule] | None = None) -> list[Slot]:
    """Numbers that no rule rejects, in the order of the text.

    Args:
        problem: a row of GSM8K. One without a program has no slots.
        rules: None: `gsm_compose.engine.rules.DEFAULT_RULES`.
    """
    from gsm_compose.engine.rules import DEFAULT_RULES

    rules = DEFAULT_RULES if rules is None else rules
    return [
        slot
        for slot in candidates(problem)
        if slot.program and all(rule.reason(slot) is None for rule in rules)
    ]


def explain(slot: Slot, rules: Sequence[Rule] | None = None) -> list[str]:
    """Why a number may not become X: one line a rule that rejects it, ``"rule: reason"``.

    An empty list means that the number is an accepted slot.
    """
    from gsm_compose.engine.rules import DEFAULT_RULES

    if slot.problem.no_program is not None:
        return [f"no program: {slot.problem.no_program}"]
    reasons = ((rule, rule.reason(slot)) for rule in (DEFAULT_RULES if rules is None else rules))
    return [f"{rule.name}: {reason}" for rule, reason in reasons if reason is not None]
