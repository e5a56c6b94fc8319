"""What the model reads and writes, as texts and as token ids, and the mixtures it is trained on.

There are four kinds of example. The first three are one-hop: no answer is ever needed for another
question. Between them they contain everything that a composition looks like, so that a model which
fails on compositions does not fail because their format is new to it:

- ``single``: one question;
- ``given``: one question with X in the place of a number, and the statement that X is that number;
- ``pair``: the composition's text and answer, but the second question has both its numbers;
- ``composition``: the second question has X in the place of a number.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from gsm_compose.learning.problems import (
    LARGEST,
    SLOTS,
    Pair,
    Problem,
    Slot,
    draw_pair,
    draw_problem,
)
from gsm_compose.learning.templates import NAMES, TEMPLATES, THINGS

Style = Literal["cot", "code"]
Kind = Literal["single", "given", "pair", "composition"]
Mixture = Mapping[Kind, float]

# The two differ in what the second question of some two-question examples is, and in nothing else.
ONE_HOP: Final[Mixture] = {"single": 0.3, "given": 0.25, "pair": 0.45}
COMPOSITIONAL: Final[Mixture] = {"single": 0.3, "given": 0.25, "pair": 0.2, "composition": 0.25}

PAD_ID, EOS_ID = 0, 2
_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")  # in the order of decapod.lm's tokenizers
_TOKEN = re.compile(r"\n|[^ \n]+")


@dataclass(frozen=True)
class Example:
    """A prompt and the answer that the model is trained to give."""

    prompt: str
    target: str


def single(problem: Problem, style: Style) -> Example:
    """One question with its numbers."""
    target = _function(problem) if style == "code" else _step(problem) + _final(problem)
    return Example(f"Q : {problem.question()} A :", target)


def given(problem: Problem, slot: Slot, style: Style) -> Example:
    """One question with X for a number, whose value is stated before it."""
    value = getattr(problem, slot)
    prompt = f"Let X = {value} . Q : {problem.question(slot)} A :"
    if style == "code":
        return Example(prompt, _function(problem, slot, str(value)))
    return Example(prompt, _step(problem) + _final(problem))


def two_questions(q1: Problem, q2: Problem, linked: Slot | None, style: Style) -> Example:
    """A composition; with ``linked=None`` the same text with nothing replaced by X."""
    prompt = f"Let X be the answer to Q1 . Q1 : {q1.question()} Q2 : {q2.question(linked)} A :"
    if style == "code":
        first = f"def solve_q1(): return {q1.expression()}"
        return Example(prompt, f"{first}\n{_function(q2, linked, 'solve_q1()')}")
    middle = f"The Q1 answer is {q1.answer} . Therefore X = {q1.answer} . "
    return Example(prompt, _step(q1) + middle + _step(q2) + _final(q2))


def composition(pair: Pair, style: Style) -> Example:
    """The composition of a linked pair."""
    return two_questions(pair.q1, pair.q2, pair.linked, style)


def draw_examples(rng: random.Random, mixture: Mixture, style: Style, count: int) -> list[Example]:
    """Training examples; compositions are made of templates of group A alone."""
    kinds = rng.choices(list(mixture), list(mixture.values()), k=count)
    return [_draw(rng, kind, style) for kind in kinds]


def _draw(rng: random.Random, kind: Kind, style: Style) -> Example:
    match kind:
        case "single":
            return single(draw_problem(rng, held_out=False), style)
        case "given":
            return given(draw_problem(rng, held_out=False), rng.choice(SLOTS), style)
        case "pair":
            q1, q2 = (draw_problem(rng, held_out=False) for _ in range(2))
            return two_questions(q1, q2, None, style)
        case "composition":
            return composition(draw_pair(rng, ("A",), held_out=False), style)


def _step(problem: Problem) -> str:
    return f"{problem.expression()} = {problem.answer} . "


def _final(problem: Problem) -> str:
    return f"The final answer is {problem.answer} ."


def _function(problem: Problem, slot: Slot | None = None, x: str | None = None) -> str:
    statement = "" if x is None else f"x = {x} ; "
    return f"def solution(): {statement}return {problem.expression(slot)}"


@functools.cache
def words() -> tuple[str, ...]:
    """All tokens by their ids: special ones, numbers, and the words of templates and answers."""
    frames = [template.text for group in TEMPLATES.values() for template in group]
    problem = Problem(TEMPLATES["A"][0], 1, 1, NAMES[0], THINGS[0])
    shown = [
        f"{example.prompt} {example.target}"
        for style in ("cot", "code")
        for example in (given(problem, "a", style), two_questions(problem, problem, "b", style))
    ]
    found = dict.fromkeys((*_SPECIAL, *map(str, range(1, LARGEST + 1)), *NAMES, *THINGS))
    found |= dict.fromkeys(("X", "x", "+", "-", "*"))
    for text in (*frames, *shown):
        found |= dict.fromkeys(token for token in _TOKEN.findall(text) if "{" not in token)
    return tuple(found)


@functools.cache
def _ids() -> dict[str, int]:
    return {word: i for i, word in enumerate(words())}


def encode(text: str) -> list[int]:
    """Token ids of a text, one per word, mark, number and line break.

    Raises:
        KeyError: a word that no template or answer has.
    """
    ids = _ids()
    return [ids[token] for token in _TOKEN.findall(text)]


def decode(ids: Sequence[int]) -> str:
    """The text of token ids, without special tokens; the inverse of `encode`."""
    kept = (words()[i] for i in ids if i >= len(_SPECIAL))
    return " ".join(kept).replace(" \n ", "\n")
