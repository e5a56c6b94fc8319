"""What a simulated reasoner writes: given numbers, right or wrong, in the paper's answer format."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Final

from gsm_compose.prompts import Style

NO_ANSWER: Final = ("", "I do not see how to solve this, so I give no number.")


def reply(q1: int | None, final: int, style: Style, *, linked: bool) -> str:
    """A solution that ends with a number.

    Args:
        q1: answer to the first question; None where one question was asked.
        final: answer to the last.
        style: in words, or in Python.
        linked: the last question uses the first one's answer.
    """
    if style == "code":
        first = "" if q1 is None else f"def solve_q1():\n    return {q1}\n\n\n"
        begin = "    X = solve_q1()\n" if linked else ""
        return f"```python\n{first}def solution():\n{begin}    return {final}\n```"
    stated = "" if q1 is None else f"The Q1 answer is {q1}. "
    therefore = f"Therefore X={q1}. " if linked else ""
    return f"I work it out step by step. {stated}{therefore}The final answer is {final}."


def no_reply(key: str) -> str:
    """A text without a number: nothing at all, or words."""
    return NO_ANSWER[_digest(key) % len(NO_ANSWER)]


def wrong_number(right: int, apart_from: Collection[int], key: str) -> int:
    """A positive number that a slip of arithmetic could give, and that is none of some others."""
    slips: tuple[int, ...] = (
        right + 1,
        right - 1,
        right + 10,
        right - 10,
        2 * right,
        right // 2,
        10 * right,
    )
    turn = _digest(key) % len(slips)
    # What is past the slips is only reached if all of them are taken.
    candidates: tuple[int, ...] = (
        *slips[turn:],
        *slips[:turn],
        *range(right + 2, right + 4 + len(apart_from)),
    )
    taken = {right, *apart_from}
    return next(number for number in candidates if number > 0 and number not in taken)


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
