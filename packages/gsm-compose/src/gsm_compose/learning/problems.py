"""Problems with exact answers and linked pairs of them; an eighth of all problems is held out."""

from __future__ import annotations

import functools
import hashlib
import operator
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, get_args

from gsm_compose.learning.templates import (
    GROUPS,
    NAMES,
    TEMPLATES,
    THINGS,
    Group,
    Operation,
    Template,
)

Slot = Literal["a", "b"]
SLOTS: Final[tuple[Slot, ...]] = get_args(Slot)
LARGEST: Final = 20  # numbers of questions and answers are whole, from 1 to this
_FACTORS: Final = range(2, 6)  # "5 times as many"
_HELD_OUT: Final = 8  # one template-and-numbers in so many
_APPLY: Final[dict[Operation, Callable[[int, int], int]]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}


def apply(operation: Operation, a: int, b: int) -> int:
    """``a operation b``."""
    return _APPLY[operation](a, b)


@functools.cache
def facts(operation: Operation) -> tuple[tuple[int, int], ...]:
    """All pairs (a, b) that problems of an operation may have."""
    return tuple(
        (a, b)
        for a in range(1, LARGEST + 1)
        for b in (_FACTORS if operation == "*" else range(1, LARGEST + 1))
        if 1 <= apply(operation, a, b) <= LARGEST
    )


def is_held_out(template: Template, a: int, b: int) -> bool:
    """Whether a template with these numbers is for testing only; a hash decides, no seed."""
    digest = hashlib.sha256(f"{template.text}|{a}|{b}".encode()).digest()
    return digest[0] % _HELD_OUT == 0


@functools.cache
def numbers(template: Template, held_out: bool) -> tuple[tuple[int, int], ...]:
    """The pairs (a, b) of a template that are held out, or the others; possibly none."""
    pairs = facts(template.operation)
    return tuple(pair for pair in pairs if is_held_out(template, *pair) == held_out)


@functools.cache
def _numbers_with(
    template: Template, held_out: bool, slot: Slot, value: int
) -> tuple[tuple[int, int], ...]:
    place = SLOTS.index(slot)
    return tuple(pair for pair in numbers(template, held_out) if pair[place] == value)


@dataclass(frozen=True)
class Problem:
    """A template with its fields filled in."""

    template: Template
    a: int
    b: int
    name: str
    things: str

    @property
    def answer(self) -> int:
        """The exact answer, from 1 to `LARGEST`."""
        return apply(self.template.operation, self.a, self.b)

    @property
    def key(self) -> str:
        """Template and numbers: what makes two problems the same up to names."""
        return f"{self.template.text}|{self.a}|{self.b}"

    def question(self, linked: Slot | None = None) -> str:
        """The text, with the letter X for the number in the slot `linked`."""
        return self.template.text.format(
            name=self.name,
            things=self.things,
            a="X" if linked == "a" else self.a,
            b="X" if linked == "b" else self.b,
        )

    def expression(self, linked: Slot | None = None, symbol: str = "x") -> str:
        """What is to be computed, with a symbol for the number in the slot `linked`."""
        a, b = (symbol if slot == linked else getattr(self, slot) for slot in SLOTS)
        return f"{a} {self.template.operation} {b}"


@dataclass(frozen=True)
class Pair:
    """Two problems, of which the second's number in the slot `linked` is the first's answer."""

    q1: Problem
    q2: Problem
    linked: Slot


def draw_problem(
    rng: random.Random, groups: tuple[Group, ...] = GROUPS, *, held_out: bool
) -> Problem:
    """A problem of a template drawn uniformly, with numbers drawn uniformly from its pairs."""
    while True:
        template = rng.choice(TEMPLATES[rng.choice(groups)])
        if pairs := numbers(template, held_out):
            return _filled(rng, template, rng.choice(pairs))


def draw_pair(rng: random.Random, groups: tuple[Group, ...] = GROUPS, *, held_out: bool) -> Pair:
    """Two problems that fit together; both are held out, or both are not."""
    while True:
        q1 = draw_problem(rng, groups, held_out=held_out)
        for _ in range(20):  # few problems take a large number; then try another first one
            slot = rng.choice(SLOTS)
            template = rng.choice(TEMPLATES[rng.choice(groups)])
            if pairs := _numbers_with(template, held_out, slot, q1.answer):
                return Pair(q1, _filled(rng, template, rng.choice(pairs)), slot)


def _filled(rng: random.Random, template: Template, pair: tuple[int, int]) -> Problem:
    return Problem(template, *pair, rng.choice(NAMES), rng.choice(THINGS))
