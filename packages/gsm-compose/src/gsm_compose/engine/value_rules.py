"""Why a value may not stand in the place of a number that may be replaced.

The rules for numbers (`gsm_compose.engine.rules`) ask whether the arithmetic follows; these ask
whether the story does: nothing that was whole becomes a fraction, nothing that was there becomes
negative, and magnitudes stay credible.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from gsm_compose.engine import wording
from gsm_compose.engine.expressions import Exact
from gsm_compose.engine.program import Leaf
from gsm_compose.engine.recomputation import Recomputed, recompute
from gsm_compose.engine.slots import Slot
from gsm_compose.errors import ExpressionError

_OLDEST: Final = 110
_WIDEST: Final = 10  # X and the number it replaces differ by at most this factor


@dataclass(frozen=True)
class ValueRule:
    """One reason to reject a value for a number.

    Attributes:
        name: short, in lower case.
        text: what it rejects, as a sentence.
        test: given slot, value, the program run with it, and the largest ratio allowed between
            new and old answer: what is wrong, or None.
    """

    name: str
    text: str
    test: Callable[[Slot, int, Recomputed, Fraction], str | None]


def _fraction_appears(_: Slot, __: int, run: Recomputed, ___: Fraction) -> str | None:
    for i, (step, new) in enumerate(zip(run.program.steps, run.outputs, strict=True)):
        if step.output.denominator == 1 and new.denominator != 1:
            return f"step {i + 1} was the whole number {step.output} and becomes {new}."
    return None


def _sign_changes(_: Slot, __: int, run: Recomputed, ___: Fraction) -> str | None:
    for i, (step, new) in enumerate(zip(run.program.steps, run.outputs, strict=True)):
        if step.output > 0 >= new:
            return f"step {i + 1} was positive and becomes {new}."
    return None


def _bad_answer(_: Slot, __: int, run: Recomputed, ___: Fraction) -> str | None:
    if run.answer.denominator == 1 and run.answer > 0:
        return None
    return f"the answer becomes {run.answer}; it has to be a positive whole number."


def _same_answer(_: Slot, __: int, run: Recomputed, ___: Fraction) -> str | None:
    return "the answer does not change." if run.answer == run.program.final else None


def _answers_x(_: Slot, x: int, run: Recomputed, __: Fraction) -> str | None:
    return f"the answer would be {x} as well." if run.answer == x else None


def _far_answer(_: Slot, __: int, run: Recomputed, largest: Fraction) -> str | None:
    old = run.program.final
    if old <= 0:
        return f"the published answer, {old}, is not positive."
    if old <= run.answer * largest and run.answer <= old * largest:
        return None
    return f"the answer goes from {old} to {run.answer}, a ratio beyond {largest}."


_LIMITS: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), limit)
    for pattern, limit in (
        (r"\s*-?\s*(?:days?|times|nights?)\s+(?:a|per|each|every|of the|in a)\s+week", 7),
        (r"\s*-?\s*hours?\s+(?:a|per|each|every|of the|in a)\s+(?:day|night)", 24),
        (r"\s*-?\s*hours?\s+(?:daily|nightly)", 24),
        (r"\s*-?\s*(?:days?|times)\s+(?:a|per|each|every|in a)\s+month", 31),
        (r"\s*-?\s*weeks?\s+(?:a|per|each|every|in a)\s+month", 4),
        (r"\s*-?\s*months?\s+(?:a|per|each|every|of the|in a)\s+year", 12),
        (r"\s*-?\s*weeks?\s+(?:a|per|each|every|of the|in a)\s+year", 52),
        (r"\s*-?\s*(?:days?|times)\s+(?:a|per|each|every|of the|in a)\s+year", 366),
        (
            r"\s*-?\s*minutes?\s+(?:of|in|out of|during|per|every|each)\s+(?:the |an |every )?hour",
            60,
        ),
        (r"\s*-?\s*years?(?:\s+|-)old", 110),
        (r"\s*degrees?\s+(?:from|above|to)\s+the\s+(?:ground|horizon)", 89),
    )
)


def _beyond_nature(slot: Slot, x: int, run: Recomputed, _: Fraction) -> str | None:
    after = slot.problem.question[slot.end :]
    for pattern, limit in _LIMITS:
        found = pattern.match(after)
        if found and x > limit:
            return f"there cannot be {x}{found[0]}."
    if wording.about_ages(slot.problem.question):
        oldest = max(Fraction(value) for value in (x, *run.outputs))
        published = max(slot.value, *(step.output for step in run.program.steps))
        if oldest > max(Fraction(_OLDEST), published):
            return f"nobody is {oldest} years old."
    return None


def _part_grows(slot: Slot, x: int, _: Recomputed, __: Fraction) -> str | None:
    question = slot.problem.question
    if x > slot.value and wording.part_of_a_whole(question[: slot.start], question[slot.end :]):
        return f"{slot.value} is a part of what was counted before; {x} may be more than all of it."
    return None


def _part_exceeds_whole(slot: Slot, x: int, run: Recomputed, _: Fraction) -> str | None:
    was_part = run.program.final <= slot.value
    if was_part and run.answer > x and wording.same_things_asked(slot.problem.question, slot.end):
        return f"asked is a part of {slot.value}; {run.answer} would be more than all {x}."
    return None


def _coincides(slot: Slot, x: int, _: Recomputed, __: Fraction) -> str | None:
    for other in slot.problem.mentions:
        if other != slot.mention and other.values[0] == x:
            return f"the question states {other.text!r} as well."
    return None


def _singular(_: Slot, x: int, __: Recomputed, ___: Fraction) -> str | None:
    return "the words after the number are in the plural." if x == 1 else None


VALUE_RULES: Final = (
    ValueRule("singular", "X is at least 2.", _singular),
    ValueRule("coincides", "X differs from the other numbers of the question.", _coincides),
    ValueRule("beyond nature", "A week has seven days, people have an age.", _beyond_nature),
    ValueRule("part grows", "A part of something counted does not grow.", _part_grows),
    ValueRule("part exceeds whole", "A part of X is not more than X.", _part_exceeds_whole),
    ValueRule("fraction appears", "Whole intermediate results stay whole.", _fraction_appears),
    ValueRule("sign changes", "Positive intermediate results stay positive.", _sign_changes),
    ValueRule("bad answer", "The answer is a positive whole number.", _bad_answer),
    ValueRule("same answer", "The answer changes.", _same_answer),
    ValueRule("answer is X", "The answer differs from X, so that answering X shows.", _answers_x),
    ValueRule("far answer", "The answer stays within the ratio.", _far_answer),
)


def reject_values(slots: Sequence[Slot], values: Sequence[int], ratio: Fraction) -> str | None:
    """Why these values may not stand in the places of accepted slots of one problem, or None.

    Args:
        slots: accepted slots of one problem.
        values: for each slot, what is to take its place.
        ratio: largest factor between the new and the published answer, up or down.

    Returns:
        ``"rule: reason"`` for the first rule that rejects them.
    """
    outcome = attempt(slots, values, ratio)
    return outcome if isinstance(outcome, str) else None


def attempt(slots: Sequence[Slot], values: Sequence[int], ratio: Fraction) -> Recomputed | str:
    """The program run with the values, or why they are rejected; see `reject_values`."""
    for slot, value in zip(slots, values, strict=True):
        if not slot.value.numerator <= _WIDEST * value <= _WIDEST**2 * slot.value.numerator:
            return (
                f"far from the old number: {value} is more than ten times larger or smaller than "
                f"{slot.value}."
            )
    replaced: dict[Leaf, Exact] = {
        leaf: value for slot, value in zip(slots, values, strict=True) for leaf in slot.leaves
    }
    try:
        run = recompute(slots[0].problem.program, replaced)
    except ExpressionError as error:
        return f"division by zero: {error}"
    for rule in VALUE_RULES:
        for slot, value in zip(slots, values, strict=True):
            reason = rule.test(slot, value, run, ratio)
            if reason is not None:
                return f"{rule.name}: {reason}"
    return run
