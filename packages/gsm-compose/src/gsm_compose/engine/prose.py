"""What a solution says outside its calculator annotations."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Final

from gsm_compose.engine.expressions import number
from gsm_compose.engine.problems import Problem
from gsm_compose.engine.program import ANNOTATION

NUMBER: Final = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|\.\d+")
_MARK: Final = "\x00"  # stands for an annotation among tokens
_TOKEN: Final = re.compile(
    rf"(?P<number>{NUMBER.pattern})|(?P<mark>{_MARK})|(?P<operator>[-−–+*/×÷·^=]|(?<![^\W\d])x(?![^\W\d]))"
    r"|(?P<end>[\n;!?]|[.,:](?=\s|$))|(?P<word>[^\W\d_]+)|(?P<bracket>[()])"
)
_MOST_WORDS: Final = 4  # between a number and its operator, as in "5 red apples * 2"


def without_annotations(problem: Problem) -> str:
    """The solution as a reader sees it, annotations removed."""
    return ANNOTATION.sub("", problem.solution)


@lru_cache(maxsize=16384)
def unannotated_numbers(problem: Problem) -> frozenset[Fraction]:
    """Numbers in arithmetic that the solution writes out without an annotation.

    Arithmetic is a run of numbers with an operator or an equals sign between each and the next,
    units and the like allowed. Numbers that stand in a run because its annotations repeat them
    are excused, one for each literal and result.
    """
    found: set[Fraction] = set()
    annotations = [match[1] for match in ANNOTATION.finditer(problem.solution)]
    for numbers, marks in _runs(ANNOTATION.sub(_MARK, problem.solution)):
        if len(numbers) < 2:
            continue
        left_over = list(numbers)
        for mark in marks:
            for match in NUMBER.finditer(annotations[mark]):
                value = number(match[0])
                if value in left_over:
                    left_over.remove(value)
        found.update(left_over)
    return frozenset(found)


def _runs(text: str) -> list[tuple[list[Fraction], list[int]]]:
    """Numbers and annotations (by position) of every run of arithmetic in `text`."""
    runs: list[tuple[list[Fraction], list[int]]] = []
    numbers: list[Fraction] = []
    marks: list[int] = []
    joined, words, seen = False, 0, 0
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup
        if kind == "number":
            if numbers and not joined:
                runs.append((numbers, marks))
                numbers, marks = [], []
            numbers.append(number(match[0]))
            joined, words = False, 0
        elif kind == "operator":
            joined, words = True, 0
        elif kind == "bracket":
            # "27(1/3)": a bracket after a number multiplies.
            joined = joined or match[0] == "("
        elif kind == "mark":
            marks.append(seen)
            seen += 1
            joined = True
        elif kind == "word":
            words += 1
        if kind == "end" or words > _MOST_WORDS:
            runs.append((numbers, marks))
            numbers, marks, joined, words = [], [], False, 0
    runs.append((numbers, marks))
    return runs
