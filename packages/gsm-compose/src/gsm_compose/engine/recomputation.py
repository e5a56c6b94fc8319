"""A solution's program run with other numbers, along one way of resolving it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gsm_compose.engine.expressions import Exact, evaluate
from gsm_compose.engine.program import Leaf, Program


@dataclass(frozen=True)
class Recomputed:
    """A program with other numbers.

    Attributes:
        program: as published.
        new: new value of every literal, in the order of the steps.
        outputs: new value of every step.
        answer: new value of the result.
    """

    program: Program
    new: Mapping[Leaf, Exact]
    outputs: tuple[Exact, ...]
    answer: Exact


def recompute(program: Program, replaced: Mapping[Leaf, Exact]) -> Recomputed:
    """Run a program with some of its literals replaced.

    A literal that has the value of earlier steps follows the latest of them. The rules for slots
    have made sure that this choice does not matter.

    Raises:
        ExpressionError: a division by zero.
    """
    new: dict[Leaf, Exact] = {}
    outputs: list[Exact] = []
    for i, step in enumerate(program.steps):
        values: list[Exact] = []
        for literal in step.literals:
            leaf = Leaf(i, literal.index)
            sources = program.sources[leaf]
            if leaf in replaced:
                value = replaced[leaf]
            else:
                value = outputs[sources[-1]] if sources else _thin(literal.value)
            new[leaf] = value
            values.append(value)
        outputs.append(_thin(evaluate(step.expression, values)))
    return Recomputed(program, new, tuple(outputs), outputs[program.results[-1]])


def _thin(value: Exact) -> Exact:
    """The same number, as an int where it is whole."""
    return value.numerator if value.denominator == 1 else value
