"""Why a number of a question may not become X.

Each rule is an object with a name, a sentence and a test; `DEFAULT_RULES` applies them all, in
this order. They err on one side only: where the data flow cannot be told for sure, the number is
left alone. The groups are: how the number is written, what role it plays in the program, whether
every way of resolving the program agrees, where the solution computes outside its annotations, and
questions whose solution would take another course with another number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from gsm_compose.engine import prose, wording
from gsm_compose.engine.constants import ALWAYS, implied, strongly_implied
from gsm_compose.engine.doubtful import doubtful_rows
from gsm_compose.engine.expressions import Literal, addends, divisors
from gsm_compose.engine.program import Leaf, Program
from gsm_compose.engine.slots import Slot
from gsm_compose.errors import ExpressionError, ProgramError


@dataclass(frozen=True)
class Rule:
    """One reason to reject a number.

    Attributes:
        name: short, in lower case.
        text: what it rejects, as a sentence.
        test: returns what is wrong with a slot, or None. It is only asked about slots of problems
            that have a program.
    """

    name: str
    text: str
    test: Callable[[Slot, Program], str | None]

    def reason(self, slot: Slot) -> str | None:
        """What is wrong with `slot`, or None where this rule accepts it.

        Raises:
            ProgramError: the slot's problem has no program.
        """
        return self.test(slot, slot.problem.program)


# --- how it is written ----------------------------------------------------------------------------


def _not_plain(slot: Slot, _: Program) -> str | None:
    kind = slot.mention.kind
    return None if kind == "whole" else f"{slot.text!r} is written as: {kind}."


def _not_positive(slot: Slot, _: Program) -> str | None:
    return None if slot.value > 0 else f"{slot.text!r} is not a positive number."


def _one(slot: Slot, _: Program) -> str | None:
    return "the words after 1 are in the singular." if slot.value == 1 else None


def _stated_again(slot: Slot, _: Program) -> str | None:
    for other in slot.problem.mentions:
        if other != slot.mention and slot.value in other.values:
            return f"{slot.value} may also be meant by {other.text!r}."
    return None


def _implied(slot: Slot, _: Program) -> str | None:
    if slot.value in strongly_implied(slot.problem.question):
        return f"a word of the question may imply {slot.value} as well."
    return None


_SYMBOL: Final = re.compile(r"\b[XYZW]\b")


def _has_symbol(slot: Slot, _: Program) -> str | None:
    found = _SYMBOL.search(slot.problem.question)
    return f"the question already has a {found[0]}." if found else None


# --- its role in the program ----------------------------------------------------------------------


def _unused(slot: Slot, _: Program) -> str | None:
    return None if slot.leaves else f"no calculation uses {slot.value}."


def _used_twice(slot: Slot, _: Program) -> str | None:
    n = len(slot.leaves)
    return f"{n} literals are {slot.value}: they need not all be this number." if n > 1 else None


def _intermediate(slot: Slot, program: Program) -> str | None:
    if any(step.output == slot.value for step in program.steps):
        return f"a calculation also comes out as {slot.value}."
    return None


def _identity(slot: Slot, program: Program) -> str | None:
    try:
        outputs = program.trace(dict.fromkeys(slot.leaves, slot.value), slot.constants)
    except (ProgramError, ExpressionError) as error:
        return str(error)
    answers: set[Fraction] = set().union(*(outputs[i] for i in program.results))
    if answers != {program.final}:
        return f"with the original number the program gives {sorted(answers)}."
    return None


def _generic(slot: Slot) -> tuple[Fraction, ...]:
    """Values at which two different rational functions of low degree do not agree by chance."""
    return tuple(slot.value + prime for prime in (7919, 104_729, 1_299_709))


def _no_effect(slot: Slot, program: Program) -> str | None:
    try:
        outputs = program.trace(dict.fromkeys(slot.leaves, _generic(slot)[0]), slot.constants)
    except (ProgramError, ExpressionError):
        return None  # another rule's case
    if all(outputs[i] == {program.final} for i in program.results):
        return "another number gives the same answer."
    return None


# --- whether all ways of resolving it agree -------------------------------------------------------


def _ambiguous(slot: Slot, program: Program) -> str | None:
    for value in _generic(slot):
        try:
            outputs = program.trace(dict.fromkeys(slot.leaves, value), slot.constants)
        except ExpressionError:
            continue
        except ProgramError as error:
            return str(error)
        for i, values in enumerate(outputs):
            if len(values) > 1:
                return f"step {i + 1} depends on which of several equal numbers is meant."
        if len(set().union(*(outputs[i] for i in program.results))) > 1:
            return "several steps have the answer's value and do not change alike."
    return None


# --- computed outside the annotations -------------------------------------------------------------


def _hidden_input(_: Slot, program: Program) -> str | None:
    for i, step in enumerate(program.steps):
        if isinstance(step.expression, Literal):
            return f"step {i + 1} states {step.output} without saying where it comes from."
    return None


def _unexplained(slot: Slot, program: Program) -> str | None:
    known = {v for m in slot.problem.mentions for v in m.values} | ALWAYS
    known |= implied(slot.problem.question) | implied(prose.without_annotations(slot.problem))
    for i, step in enumerate(program.steps):
        for literal in step.literals:
            if literal.value not in known and not program.sources[Leaf(i, literal.index)]:
                return f"nothing explains the {literal.text} of step {i + 1}."
    return None


def _unannotated(slot: Slot, _: Program) -> str | None:
    if slot.value in prose.unannotated_numbers(slot.problem):
        return f"the solution calculates with {slot.value} outside its annotations."
    return None


# --- questions whose solution would take another course ------------------------------------------

_MUST_BE_USED: Final = ("whole", "decimal", "percent", "fraction")


def _row_unused_number(slot: Slot, program: Program) -> str | None:
    seen = {literal.value for step in program.steps for literal in step.literals}
    seen |= {step.output for step in program.steps}
    for mention in slot.problem.mentions:
        counts = mention.kind in _MUST_BE_USED and mention.values[0] != 1
        if counts and not seen.intersection(mention.values):
            return f"no calculation uses {mention.text!r}, so the number may be tied to it."
    return None


def _dead_step(_: Slot, program: Program) -> str | None:
    for i, step in enumerate(program.steps):
        if i not in program.ancestors:
            return f"step {i + 1} leads nowhere: {step.output} may decide something."
    return None


def _case(slot: Slot, _: Program) -> str | None:
    found = wording.case_distinction(slot.problem.question)
    return f"{found!r}: with another number another case may hold." if found else None


def _conversion(slot: Slot, _: Program) -> str | None:
    question = slot.problem.question
    if wording.states_conversion(question[: slot.start], question[slot.end :]):
        return "it says how many of one unit make another."
    return None


def _remainder(slot: Slot, _: Program) -> str | None:
    if wording.states_remainder(slot.problem.question[: slot.start]):
        return "it says how many are left, which follows from other numbers."
    return None


def _counts_terms(slot: Slot, program: Program) -> str | None:
    divides = any(
        literal.value == slot.value
        for step in program.steps
        for literal in divisors(step.expression)
    )
    terms = {count for step in program.steps for count in addends(step.expression)}
    if slot.value in terms and (divides or slot.value > 2):
        return f"a sum of the solution has {slot.value} terms, which it may count."
    return None


def _doubtful(slot: Slot, _: Program) -> str | None:
    return doubtful_rows().get(slot.problem.id)


DEFAULT_RULES: Final = (
    Rule("not a plain number", "Only whole numbers in digits may become X.", _not_plain),
    Rule("not positive", "X is positive, so it replaces positive numbers only.", _not_positive),
    Rule("one", "Another number after 1 thing would need the plural.", _one),
    Rule("stated again", "The same value stands elsewhere in the question.", _stated_again),
    Rule("implied as well", "A word of the question may imply the same value.", _implied),
    Rule("symbol taken", "The question already uses the letter.", _has_symbol),
    Rule("unused", "No calculation of the solution uses the number.", _unused),
    Rule("used twice", "Several literals have its value.", _used_twice),
    Rule("equals an intermediate", "A step's result has the same value.", _intermediate),
    Rule("identity fails", "Put back, it must give the published answer.", _identity),
    Rule("no effect", "The answer does not depend on it.", _no_effect),
    Rule("ambiguous", "Equal values can be resolved in ways that disagree.", _ambiguous),
    Rule("hidden input", "An annotation states a value without a calculation.", _hidden_input),
    Rule("unexplained literal", "A literal comes from outside the annotations.", _unexplained),
    Rule("unannotated arithmetic", "It is used outside the annotations.", _unannotated),
    Rule("row with an unused number", "Another number is used nowhere.", _row_unused_number),
    Rule("dead step", "A step's result is not used.", _dead_step),
    Rule("case distinction", "The solution depends on which case holds.", _case),
    Rule("unit conversion", "The number relates two units.", _conversion),
    Rule("remainder", "The number is what other numbers leave.", _remainder),
    Rule("counts terms", "It may be how many terms a sum has.", _counts_terms),
    Rule("doubtful row", "The row's own answer is wrong or disputable.", _doubtful),
)
