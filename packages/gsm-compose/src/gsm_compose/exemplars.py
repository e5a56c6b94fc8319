"""Worked examples that a prompt shows before the question.

Eight two-hop compositions of sixteen different GSM8K *training* questions. The questions are the
published ones (MIT, see ``data/LICENSE-gsm8k``); the choice, the pairing, the worked solutions and
the code are this library's own. No test question and none of the chain-of-thought examples that
are in common use are among them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from gsm_compose.items import Hop, Item, Link


@dataclass(frozen=True)
class Exemplar:
    """One worked composition.

    Attributes:
        item: the composition, a chain of two hops in the order Q1, Q2. The hops' `solution` is the
            worked one, in words and with every calculation written as ``a + b = c``.
        code: bodies of Python functions, unindented lines, for Q1 and for Q2. The second uses
            ``X`` for the answer to Q1.
    """

    item: Item
    code: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def code_with_number(self) -> tuple[str, ...]:
        """Body for Q2 when it is asked with the value of X written in its text."""
        return tuple(re.sub(r"\bX\b", str(self.item.x), line) for line in self.code[1])


@cache
def exemplars() -> tuple[Exemplar, ...]:
    """All eight, in the order in which prompts show them."""
    text = files("gsm_compose").joinpath("data", "exemplars.json").read_text(encoding="utf-8")
    return tuple(_exemplar(record) for record in json.loads(text))


def exemplar_problems() -> frozenset[str]:
    """Source rows of the exemplars, such as ``"gsm8k/train/7106"``.

    A benchmark built from the training split should leave them out: their solutions are in the
    prompt.
    """
    return frozenset(hop.problem for exemplar in exemplars() for hop in exemplar.item.hops)


def _exemplar(record: dict[str, Any]) -> Exemplar:
    first, second = record["first"], record["second"]
    q1 = Hop(
        problem=first["problem"],
        original=first["question"],
        question=first["question"],
        template=first["question"],
        links=(),
        answer=first["answer"],
        old_answer=first["answer"],
        solution=first["solution"],
        program=None,
    )
    text, number = second["question"], second["number"]
    start = text.index(number)
    link = Link(0, start, start + len(number), number, int(number))
    q2 = Hop(
        problem=second["problem"],
        original=text,
        question=text[:start] + str(q1.answer) + text[link.end :],
        template=text[:start] + link.symbol + text[link.end :],
        links=(link,),
        answer=second["answer"],
        old_answer=second["old_answer"],
        solution=second["solution"],
        program=None,
    )
    code = (tuple(first["code"]), tuple(second["code"]))
    return Exemplar(Item("train", "chain", (q1, q2), (0, 1)), code)
