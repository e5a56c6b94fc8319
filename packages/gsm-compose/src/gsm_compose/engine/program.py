"""The data flow of one solution.

A GSM8K solution carries calculator annotations ``<<expression=value>>``. Each is a *step*. A
literal of a step may be the output of an earlier step, a number of the question, or a constant that
everybody knows; only its value is written down, so where several sources have that value the data
flow is ambiguous. A `Program` keeps all of them. `trace` computes every step under every way of
resolving the literals at once, as a set of values, so a step whose set has more than one member
depends on a guess.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Final

from gsm_compose.engine.expressions import Exact, Expression, Literal, evaluate, literals, parse
from gsm_compose.errors import ExpressionError, ProgramError

if TYPE_CHECKING:
    from gsm_compose.engine.slots import Slot

ANNOTATION: Final = re.compile(r"<<([^<>]*)>>")
_MOST_COMBINATIONS: Final = 4096


@dataclass(frozen=True)
class Step:
    """One calculator annotation.

    Attributes:
        expression: what stands before the equals sign.
        output: the value after it, which the expression has exactly.
        start: where the annotation begins in the solution's text.
        end: where it ends, exclusive.
    """

    expression: Expression
    output: Fraction
    start: int
    end: int

    @cached_property
    def literals(self) -> tuple[Literal, ...]:
        """Literals of the expression from left to right."""
        return tuple(literals(self.expression))


@dataclass(frozen=True)
class Leaf:
    """A literal's place in a program: step and position in it."""

    step: int
    index: int


@dataclass(frozen=True)
class Program:
    """Steps in the order of the solution, and the answer they lead to.

    Attributes:
        steps: at least one.
        final: the published answer, equal to the output of at least one step.
    """

    steps: tuple[Step, ...]
    final: Fraction

    @classmethod
    def from_solution(cls, solution: str, final: Fraction) -> Program:
        """Parse the annotations of a solution.

        Raises:
            ProgramError: no annotation; one that cannot be read or is not exact; or a final answer
                that no annotation has as its value.
        """
        steps = tuple(
            _step(match[1], match.start(), match.end()) for match in ANNOTATION.finditer(solution)
        )
        if not steps:
            raise ProgramError("no annotation: the solution shows no <<expression=value>>.")
        program = cls(steps, final)
        if not program.results:
            raise ProgramError(f"no result: no annotation has the final answer {final}.")
        return program

    @cached_property
    def results(self) -> tuple[int, ...]:
        """Steps whose output is the final answer; usually the last one."""
        return tuple(i for i, step in enumerate(self.steps) if step.output == self.final)

    def leaves(self, value: Fraction) -> list[Leaf]:
        """Every place where a literal has `value`."""
        return [
            Leaf(i, literal.index)
            for i, step in enumerate(self.steps)
            for literal in step.literals
            if literal.value == value
        ]

    @cached_property
    def sources(self) -> Mapping[Leaf, tuple[int, ...]]:
        """For each literal, the earlier steps whose output has its value."""
        return {
            Leaf(i, literal.index): tuple(
                j for j in range(i) if self.steps[j].output == literal.value
            )
            for i, step in enumerate(self.steps)
            for literal in step.literals
        }

    def trace(
        self, replaced: Mapping[Leaf, Exact], constants: Collection[Fraction] = ()
    ) -> list[frozenset[Fraction]]:
        """Values that each step may have when some literals stand for other numbers.

        Args:
            replaced: new values of literals that are numbers of the question.
            constants: values that a literal may have by itself even though an earlier step has the
                same output: numbers of the question and implied constants.

        Returns:
            One set a step: its value under every way of resolving its literals, where literals are
            taken to be resolved independently.

        Raises:
            ProgramError: more ways than can be tried.
            ExpressionError: a division by zero.
        """
        outputs: list[frozenset[Fraction]] = []
        for i, step in enumerate(self.steps):
            options = [
                self._options(Leaf(i, literal.index), literal.value, outputs, replaced, constants)
                for literal in step.literals
            ]
            if math.prod(map(len, options)) > _MOST_COMBINATIONS:
                raise ProgramError(f"step {i}: more than {_MOST_COMBINATIONS} ways to resolve it.")
            outputs.append(
                frozenset(
                    Fraction(evaluate(step.expression, values))
                    for values in itertools.product(*options)
                )
            )
        return outputs

    def _options(
        self,
        leaf: Leaf,
        value: Fraction,
        outputs: Sequence[frozenset[Fraction]],
        replaced: Mapping[Leaf, Exact],
        constants: Collection[Fraction],
    ) -> list[Fraction]:
        if leaf in replaced:
            return [Fraction(replaced[leaf])]
        found: set[Fraction] = set().union(*(outputs[j] for j in self.sources[leaf]))
        if not found or value in constants:
            found.add(value)
        return sorted(found)

    def evaluate(self, values: Mapping[Slot, Fraction | int]) -> Fraction:
        """The answer when numbers of the question are replaced.

        Args:
            values: new value of each slot; slots left out keep their numbers.

        Raises:
            ProgramError: a slot is of another program or appears in it nowhere, or the answer
                depends on how the literals are resolved.
            ExpressionError: a division by zero.
        """
        replaced: dict[Leaf, Exact] = {}
        constants: set[Fraction] = set()
        for slot, value in values.items():
            if slot.problem.program != self:
                raise ProgramError(f"slot {slot.text!r} of {slot.problem.id}: another program's.")
            if not slot.leaves:
                raise ProgramError(f"slot {slot.text!r} of {slot.problem.id}: not used.")
            replaced |= dict.fromkeys(slot.leaves, Fraction(value))
            constants |= slot.constants
        outputs = self.trace(replaced, constants)
        answers = set().union(*(outputs[i] for i in self.results))
        if len(answers) > 1:
            raise ProgramError(f"ambiguous: the answer may be any of {sorted(answers)}.")
        return next(iter(answers))

    @cached_property
    def ancestors(self) -> frozenset[int]:
        """Steps that the answer may draw on, the results themselves included."""
        found: set[int] = set()
        open_steps = list(self.results)
        while open_steps:
            step = open_steps.pop()
            if step not in found:
                found.add(step)
                for literal in self.steps[step].literals:
                    open_steps.extend(self.sources[Leaf(step, literal.index)])
        return frozenset(found)


def _step(text: str, start: int, end: int) -> Step:
    left, equals, right = text.partition("=")
    if not equals:
        raise ProgramError(f"<<{text}>>: expected one equals sign.")
    try:
        expression, output = parse(left), evaluate(parse(right))
        value = evaluate(expression)
    except ExpressionError as error:
        raise ProgramError(f"<<{text}>>: {error}") from error
    if value != output:
        raise ProgramError(f"inexact: <<{text}>>, but {left} is {value}.")
    return Step(expression, Fraction(output), start, end)
