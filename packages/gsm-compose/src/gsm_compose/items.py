"""One benchmark item: some questions, some of whose numbers are the answers of others.

An item is a small directed graph. A *hop* is one question. Its *links* are the places where the
answer of an earlier hop stands in for a number of the text. Two shapes are built:

- a *chain*, hop 0 → hop 1 → …: every hop but the first has one link, to the hop before it;
- a *fan-in*: the last hop has two links, to two hops that have none.

The two-hop chain is the composition of arXiv 2410.01748: hop 0 is the paper's Q1, hop 1 its Q2.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

Shape = Literal["chain", "fan_in"]
SYMBOLS = ("X", "Y", "Z", "W")  # by the position of the hop whose answer they stand for


@dataclass(frozen=True)
class Link:
    """A number of a question that an earlier hop's answer replaces.

    Attributes:
        source: position of the hop whose answer replaces the number.
        start: where the number begins in the *original* question text, in characters.
        end: where it ends there, exclusive.
        old: the number as it stands there, for example ``"1,200"``.
        old_value: its value.
    """

    source: int
    start: int
    end: int
    old: str
    old_value: int

    @property
    def symbol(self) -> str:
        """The letter that stands for the source's answer in the composition's text."""
        return SYMBOLS[self.source]


@dataclass(frozen=True)
class Hop:
    """One question of an item.

    Attributes:
        problem: id of the source row, for example ``"gsm8k/test/418"``.
        original: the question's text as published.
        question: the text with every linked number replaced by its new value; equal to `original`
            where there are no links.
        template: the text with every linked number replaced by its symbol.
        links: replaced numbers in the order of the text.
        answer: gold answer of `question`, a positive integer.
        old_answer: answer of `original`, as published.
        solution: reference solution of `question` with calculator annotations, without the
            ``####`` line. The published one where there are no links.
        program: Python source that defines one function of no arguments, ``solution()``, returning
            `answer`; with links the function takes the symbols in lower case (``solution(x)``).
            None where the published solution has no usable annotations (only possible without
            links).
    """

    problem: str
    original: str
    question: str
    template: str
    links: tuple[Link, ...]
    answer: int
    old_answer: int
    solution: str
    program: str | None


@dataclass(frozen=True)
class Item:
    """One composition.

    Attributes:
        split: split of GSM8K that all its questions come from.
        shape: see the module.
        hops: questions in an order in which every link points back; the last one's answer counts.
        order: positions of `hops` in the order in which the text presents them. ``(0, 1)`` is the
            paper's; ``(1, 0)`` shows the dependent question first.
    """

    split: Literal["train", "test"]
    shape: Shape
    hops: tuple[Hop, ...]
    order: tuple[int, ...]

    @cached_property
    def id(self) -> str:
        """Content hash (16 hexadecimal digits): same questions, numbers and order, same id."""
        content = [
            self.shape,
            list(self.order),
            [
                [
                    h.problem,
                    h.original,
                    [[k.source, k.start, k.end, k.old] for k in h.links],
                    h.answer,
                ]
                for h in self.hops
            ],
        ]
        canonical = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def q1(self) -> Hop:
        """The first question."""
        return self.hops[0]

    @property
    def q2(self) -> Hop:
        """The question whose answer counts: the last hop."""
        return self.hops[-1]

    @property
    def x(self) -> int:
        """Gold answer of the first question."""
        return self.hops[0].answer

    @property
    def gold(self) -> int:
        """Gold answer of the whole."""
        return self.hops[-1].answer

    @property
    def ignored(self) -> int:
        """What comes out if the last question keeps its original numbers ("X ignored")."""
        return self.hops[-1].old_answer

    def to_record(self) -> dict[str, Any]:
        """The item as JSON values; `from_record` is its inverse."""
        return {"id": self.id} | dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Item:
        """The item of a record made by `to_record`.

        Raises:
            KeyError, TypeError, ValueError: the record is not such a thing, or its id is not the
                hash of its content.
        """
        values = dict(record)
        identity = values.pop("id")
        values["order"] = tuple(values["order"])
        values["hops"] = tuple(
            Hop(**{**hop, "links": tuple(Link(**link) for link in hop["links"])})
            for hop in values["hops"]
        )
        item = cls(**values)
        if item.id != identity:
            raise ValueError(f"id {identity!r} is not the hash of the content, {item.id!r}")
        return item
