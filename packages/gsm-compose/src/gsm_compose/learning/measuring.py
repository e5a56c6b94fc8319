"""S1, S2, S_comp and their controls of a model, on held-out pairs of templates of group B."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from gsm_compose.learning.examples import (
    Example,
    Style,
    composition,
    decode,
    encode,
    given,
    single,
    two_questions,
)
from gsm_compose.learning.problems import Pair, draw_pair
from gsm_compose.parse import extract_answer_strict, extract_q1

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_TERM = r"(\d+|x) ([-+*]) (\d+|x)"
_PROGRAM = re.compile(
    rf"(?:def solve_q1\(\): return {_TERM}\n)?"
    rf"def solution\(\): (?:x = (\d+|solve_q1\(\)) ; )?return {_TERM}"
)
_LONGEST_ANSWER = 48
Read = tuple[Fraction | None, Fraction | None]


@dataclass(frozen=True)
class Measured:
    """Correctness on n pairs; the lists have an entry, 0 or 1, for each of them.

    Attributes:
        q1: first question right, asked alone.
        q2: second question right, asked alone with its numbers.
        c1: first question right within the composition.
        cf: final answer of the composition right.
        independent: second question right with both its numbers, after the first one.
        given: second question right, asked alone with X and the statement of what X is.
        answered_x: the composition's final answer is X, and wrong.
        unparsable: the composition has no final answer.
    """

    q1: list[int]
    q2: list[int]
    c1: list[int]
    cf: list[int]
    independent: list[int]
    given: list[int]
    answered_x: list[int]
    unparsable: list[int]


def held_out_pairs(seed: int, count: int) -> list[Pair]:
    """Held-out pairs of group B, all different up to names."""
    rng = random.Random(f"held-out pairs of {seed}")
    found: dict[tuple[str, str, str], Pair] = {}
    while len(found) < count:
        pair = draw_pair(rng, ("B",), held_out=True)
        found.setdefault((pair.q1.key, pair.q2.key, pair.linked), pair)
    return list(found.values())


def measure(model: LlamaForCausalLM, pairs: Sequence[Pair], style: Style) -> Measured:
    """Ask everything, greedily."""
    conditions = {
        "q1": [single(pair.q1, style) for pair in pairs],
        "q2": [single(pair.q2, style) for pair in pairs],
        "composition": [composition(pair, style) for pair in pairs],
        "independent": [two_questions(pair.q1, pair.q2, None, style) for pair in pairs],
        "given": [given(pair.q2, pair.linked, style) for pair in pairs],
    }
    asked = [example for examples in conditions.values() for example in examples]
    replies = iter(answers(model, asked))
    read: Mapping[str, list[Read]] = {
        name: [_read(next(replies), style) for _ in examples]
        for name, examples in conditions.items()
    }

    def final(condition: str, of: Sequence[int]) -> list[int]:
        return [int(answer == x) for (_, answer), x in zip(read[condition], of, strict=True)]

    x, gold = [pair.q1.answer for pair in pairs], [pair.q2.answer for pair in pairs]
    composed = read["composition"]
    return Measured(
        q1=final("q1", x),
        q2=final("q2", gold),
        c1=[int(first == a) for (first, _), a in zip(composed, x, strict=True)],
        cf=final("composition", gold),
        independent=final("independent", gold),
        given=final("given", gold),
        answered_x=[int(last == a != b) for (_, last), a, b in zip(composed, x, gold, strict=True)],
        unparsable=[int(last is None) for _, last in composed],
    )


def answers(model: LlamaForCausalLM, examples: Sequence[Example]) -> list[str]:
    """The model's greedy answers to the examples' prompts."""
    from decapod.lm import Request, SamplingParams, TransformersEngine

    params = SamplingParams(max_new_tokens=_LONGEST_ANSWER, temperature=0.0)
    engine = TransformersEngine(model, max_batch_size=128)
    requests = [Request(tuple(encode(example.prompt)), params) for example in examples]
    return [decode(completion.token_ids) for completion in engine.generate(requests)]


def _read(text: str, style: Style) -> Read:
    if style == "code":
        return run_program(text)
    return extract_q1(text), extract_answer_strict(text)


def run_program(text: str) -> Read:
    """What ``solve_q1()`` and ``solution()`` of a program return; None for what fails.

    The programs of the training examples are read here, which takes microseconds; everything else
    counts as a failure. `gsm_compose.parse.run_code_solution`, which runs any program in a sandbox,
    agrees on what is read.
    """
    found = _PROGRAM.fullmatch(text)
    if not found:
        return None, None
    q1, x = None, None
    if found[1]:
        q1 = _term(found[1], found[2], found[3], None)
    if found[4]:
        x = q1 if found[4] == "solve_q1()" else Fraction(found[4])
    return q1, _term(found[5], found[6], found[7], x)


def _term(a: str, operation: str, b: str, x: Fraction | None) -> Fraction | None:
    left, right = (x if word == "x" else Fraction(word) for word in (a, b))
    if left is None or right is None:
        return None
    match operation:
        case "+":
            return left + right
        case "-":
            return left - right
        case _:
            return left * right
