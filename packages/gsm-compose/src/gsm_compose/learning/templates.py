"""Word-problem templates, made by a grammar from two groups of sentences.

A problem is an opening that states a number, an event that changes or scales it, and a question.
Every opening of a group goes with every event, and every event with the questions of its operation:
320 templates per group. The groups share no opening, no event and no question, so compositions of
templates of one group are made of sentences that no composition of the other contains.

Words are separated by spaces, marks count as words, and so do numbers: that a number is one token
keeps arithmetic out of the way of what is measured.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final, Literal, get_args

Operation = Literal["+", "-", "*"]
Group = Literal["A", "B"]
OPERATIONS: Final[tuple[Operation, ...]] = get_args(Operation)
GROUPS: Final[tuple[Group, ...]] = get_args(Group)

NAMES: Final = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida")
THINGS: Final = ("apples", "books", "cards", "coins", "pens", "shells", "stamps", "toys")


@dataclass(frozen=True)
class Template:
    """A question with places for a name, a thing and two numbers.

    Attributes:
        group: which sentences it is made of.
        operation: what joins its numbers: the answer is ``a operation b``.
        text: with the fields ``{name}``, ``{things}``, ``{a}`` and ``{b}``.
    """

    group: Group
    operation: Operation
    text: str


@dataclass(frozen=True)
class Wording:
    """The sentences of a group: openings, and events and questions by operation."""

    openings: tuple[str, ...]
    events: dict[Operation, tuple[str, ...]]
    questions: dict[Operation, tuple[str, ...]]

    def templates(self, group: Group) -> tuple[Template, ...]:
        """All of them, in a fixed order."""
        return tuple(
            Template(group, operation, " ".join(sentences))
            for operation in OPERATIONS
            for sentences in itertools.product(
                self.openings, self.events[operation], self.questions[operation]
            )
        )


WORDINGS: Final[dict[Group, Wording]] = {
    "A": Wording(
        openings=(
            "{name} has {a} {things} .",
            "{a} {things} are in the box of {name} .",
            "{name} keeps {a} {things} .",
            "a bag holds {a} {things} .",
            "{name} carries {a} {things} .",
            "the room of {name} has space for {a} {things} .",
            "{name} starts with {a} {things} .",
            "on Monday {name} counts {a} {things} .",
            "{name} paints {a} {things} .",
            "in May there were {a} {things} .",
        ),
        events={
            "+": (
                "{name} buys {b} more .",
                "a friend brings {b} more .",
                "{b} others come in .",
                "then {name} gets another {b} .",
                "an uncle adds {b} .",
                "{name} wins {b} at a fair .",
            ),
            "-": (
                "{name} loses {b} of them .",
                "{b} of them are sold .",
                "a dog takes {b} .",
                "{name} throws {b} away .",
                "{b} fall into the river .",
                "{name} lends out {b} .",
            ),
            "*": (
                "a shop has {b} times as many .",
                "{name} wants {b} times that .",
                "a rival has {b} times this amount .",
                "next year it will be {b} times as many .",
            ),
        },
        questions={
            "+": ("how many {things} are there now ?", "how many is that in all ?"),
            "-": ("how many {things} are left ?", "how many does {name} still have ?"),
            "*": ("how many {things} is that ?", "how many would that be ?"),
        },
    ),
    "B": Wording(
        openings=(
            "{name} owns {a} {things} .",
            "on the table of {name} lie {a} {things} .",
            "{a} {things} belong to {name} .",
            "{name} sees {a} {things} .",
            "the shelf of {name} fits {a} {things} .",
            "at noon {name} brought {a} {things} .",
            "{name} made {a} {things} .",
            "today {a} {things} stand here .",
            "a truck delivered {a} {things} to {name} .",
            "{name} drew {a} {things} .",
        ),
        events={
            "+": (
                "{name} finds {b} extra .",
                "{b} new ones arrive .",
                "later {name} receives {b} .",
                "the mother puts in {b} .",
                "{name} picks up {b} .",
                "Tom offers {b} as well .",
            ),
            "-": (
                "{name} gives {b} to a sister .",
                "soon {b} break .",
                "rain ruins {b} .",
                "a thief steals {b} .",
                "{name} donates {b} .",
                "{b} vanish at night .",
            ),
            "*": (
                "the school needs {b} times this number .",
                "a city stores {b} times this many .",
                "it grows to {b} times its size .",
                "{name} dreams of {b} times its count .",
            ),
        },
        questions={
            "+": ("what is the number of {things} now ?", "what is the sum ?"),
            "-": ("what number of {things} remains ?", "what is the rest ?"),
            "*": ("what number of {things} would it be ?", "what is the product ?"),
        },
    ),
}
TEMPLATES: Final[dict[Group, tuple[Template, ...]]] = {
    group: wording.templates(group) for group, wording in WORDINGS.items()
}
