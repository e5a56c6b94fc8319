"""How many numbers of a split each rule leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gsm_compose.engine.problems import Problem
from gsm_compose.engine.program import ANNOTATION, Program
from gsm_compose.engine.rules import DEFAULT_RULES, Rule
from gsm_compose.engine.slots import candidates
from gsm_compose.errors import ProgramError


@dataclass(frozen=True)
class RuleYield:
    """One line of the count.

    Attributes:
        rule: its name.
        text: what it rejects.
        rejects: numbers that pass all rules before and fail this one.
        left: numbers that pass this rule and all before.
        questions: questions with such numbers.
        alone: numbers that fail this rule and no other.
    """

    rule: str
    text: str
    rejects: int
    left: int
    questions: int
    alone: int


@dataclass(frozen=True)
class Yields:
    """The count for one split.

    Attributes:
        problems: rows.
        annotations: calculator annotations in all of them.
        exact: annotations that hold exactly.
        programs: rows that became programs.
        numbers: numbers written in digits in the questions of rows with a program.
        rules: one line a rule, in the order of the rules.
    """

    problems: int
    annotations: int
    exact: int
    programs: int
    numbers: int
    rules: tuple[RuleYield, ...]


def count_yields(problems: Sequence[Problem], rules: Sequence[Rule] = DEFAULT_RULES) -> Yields:
    """Apply the rules in order to every number of every row."""
    annotations = exact = programs = numbers = 0
    left = [0] * len(rules)
    rejects = [0] * len(rules)
    alone = [0] * len(rules)
    questions: list[set[str]] = [set() for _ in rules]
    for problem in problems:
        written, holding = _annotations(problem)
        annotations, exact = annotations + written, exact + holding
        if problem.no_program is not None:
            continue
        programs += 1
        for slot in candidates(problem):
            numbers += 1
            failed = [i for i, rule in enumerate(rules) if rule.reason(slot) is not None]
            first = failed[0] if failed else len(rules)
            for i in range(first):
                left[i] += 1
                questions[i].add(problem.id)
            if failed:
                rejects[first] += 1
            if len(failed) == 1:
                alone[first] += 1
    lines = tuple(
        RuleYield(rule.name, rule.text, rejects[i], left[i], len(questions[i]), alone[i])
        for i, rule in enumerate(rules)
    )
    return Yields(len(problems), annotations, exact, programs, numbers, lines)


def _annotations(problem: Problem) -> tuple[int, int]:
    """Annotations of a row, and how many of them hold exactly."""
    found = ANNOTATION.findall(problem.solution)
    exact = 0
    for text in found:
        try:
            value = Program.from_solution(f"<<{text}>>", problem.final).steps[0].output
        except ProgramError as error:
            exact += str(error).startswith("no result")
        else:
            exact += value == problem.final
    return len(found), exact
