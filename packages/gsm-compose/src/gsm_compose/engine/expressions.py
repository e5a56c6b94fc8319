"""Arithmetic expressions over exact rationals.

The language of GSM8K's calculator annotations: decimal literals, perhaps with thousands commas,
dollar or percent signs, ``+ - * / ^``, signs in front, and parentheses. ``//``, which rounds,
is not in it: two rows of the train split that use it are left out. Nothing is ever passed
to Python's own evaluator and no value is ever a float.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from gsm_compose.errors import ExpressionError

# Characters that people type for the same operator.
_SAME: Final = str.maketrans({"−": "-", "–": "-", "×": "*", "÷": "/", "\u00a0": " ", "·": "*"})
_TOKEN: Final = re.compile(
    r"\s*(?:[$€£]\s*)?(?:(?P<number>\d+(?:,\d{3})*(?:\.\d*)?%?|\.\d+%?)|(?P<operator>[-+*/^()]))"
)
_LARGEST_EXPONENT: Final = 64
_LONGEST: Final = 2000
_DEEPEST: Final = 100


@dataclass(frozen=True)
class Literal:
    """A number as it is written.

    Attributes:
        value: exact value; a percent literal is a hundredth of its digits.
        text: the characters, without currency signs.
        index: position among the literals of its expression, from 0.
    """

    value: Fraction
    text: str
    index: int


@dataclass(frozen=True)
class Negation:
    """Minus in front of an expression."""

    operand: Expression


@dataclass(frozen=True)
class Operation:
    """Two expressions joined by one of ``+ - * / ^``."""

    operator: str
    left: Expression
    right: Expression


Expression = Literal | Negation | Operation
Exact = Fraction | int  # whole numbers as int are several times faster


def parse(text: str) -> Expression:
    """The expression that `text` writes, by the usual precedence (``^`` binds to the right).

    Raises:
        ExpressionError: `text` is not an expression; the message has the text.
    """
    if len(text) > _LONGEST:
        raise ExpressionError(f"expected at most {_LONGEST} characters, got {len(text)}.")
    parser = _Parser(text)
    expression = parser.sum(0)
    parser.finish()
    return expression


def literals(expression: Expression) -> Iterator[Literal]:
    """All literals from left to right."""
    match expression:
        case Literal():
            yield expression
        case Negation(operand):
            yield from literals(operand)
        case Operation(_, left, right):
            yield from literals(left)
            yield from literals(right)


def addends(expression: Expression) -> Iterator[int]:
    """How many terms each sum within an expression adds up: ``(a+b+c)/2+d`` gives 2 and 3."""
    terms = 1
    rest = expression
    while isinstance(rest, Operation) and rest.operator == "+":
        yield from addends(rest.right)
        terms, rest = terms + 1, rest.left
    match rest:
        case Negation(operand):
            yield from addends(operand)
        case Operation(_, left, right):
            yield from addends(left)
            yield from addends(right)
    if terms > 1:
        yield terms


def divisors(expression: Expression) -> Iterator[Literal]:
    """Literals that stand right after a division sign."""
    match expression:
        case Negation(operand):
            yield from divisors(operand)
        case Operation(operator, left, right):
            yield from divisors(left)
            if operator == "/" and isinstance(right, Literal):
                yield right
            else:
                yield from divisors(right)


def evaluate(expression: Expression, values: Sequence[Exact] | None = None) -> Exact:
    """Exact value.

    Args:
        expression: what to evaluate.
        values: what the literals stand for, by `Literal.index`; None: what they say.

    Returns:
        An int or a Fraction; a Fraction may be whole.

    Raises:
        ExpressionError: division by zero, or a power that is not a small whole number.
    """
    match expression:
        case Literal():
            return expression.value if values is None else values[expression.index]
        case Negation(operand):
            return -evaluate(operand, values)
        case Operation(operator, left, right):
            return _apply(operator, evaluate(left, values), evaluate(right, values))


def _apply(operator: str, left: Exact, right: Exact) -> Exact:
    match operator:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "/":
            if right == 0:
                raise ExpressionError(f"division of {left} by zero.")
            return Fraction(left, right)
        case _:
            if right.denominator != 1 or not 0 <= right <= _LARGEST_EXPONENT:
                raise ExpressionError(
                    f"expected an exponent from 0 to {_LARGEST_EXPONENT}, got {right}."
                )
            # The right operand is whole, so the power of a fraction is a fraction.
            power: Exact = 1
            for _ in range(int(right)):
                power *= left
            return power


class _Parser:
    """Recursive descent with one token of look-ahead."""

    def __init__(self, text: str) -> None:
        self.source = text
        self.tokens = list(_tokens(text))
        self.position = 0
        self.literals = 0

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.position += 1
        return token

    def finish(self) -> None:
        if self.peek():
            raise ExpressionError(f"{self.source!r}: {self.peek()!r} was not expected.")

    def sum(self, depth: int) -> Expression:
        left = self.product(depth)
        while self.peek() in ("+", "-"):
            left = Operation(self.take(), left, self.product(depth))
        return left

    def product(self, depth: int) -> Expression:
        left = self.signed(depth)
        while self.peek() in ("*", "/"):
            left = Operation(self.take(), left, self.signed(depth))
        return left

    def signed(self, depth: int) -> Expression:
        if depth > _DEEPEST:
            raise ExpressionError(f"{self.source[:60]!r}…: nested more than {_DEEPEST} deep.")
        if self.peek() == "-":
            self.take()
            return Negation(self.signed(depth + 1))
        if self.peek() == "+":
            self.take()
            return self.signed(depth + 1)
        return self.power(depth)

    def power(self, depth: int) -> Expression:
        base = self.atom(depth)
        if self.peek() == "^":
            return Operation(self.take(), base, self.signed(depth + 1))
        return base

    def atom(self, depth: int) -> Expression:
        token = self.take()
        if token == "(":
            inside = self.sum(depth + 1)
            if self.take() != ")":
                raise ExpressionError(f"{self.source!r}: a parenthesis is not closed.")
            return inside
        if not token[:1].isdigit() and token[:1] != ".":
            raise ExpressionError(
                f"{self.source!r}: expected a number, got {token or 'the end'!r}."
            )
        self.literals += 1
        return Literal(number(token), token, self.literals - 1)


def _tokens(text: str) -> Iterator[str]:
    text = text.translate(_SAME).rstrip()
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ExpressionError(f"{text!r}: cannot read {text[position:].strip()[:20]!r}.")
        yield match["number"] or match["operator"]
        position = match.end()


def number(text: str) -> Fraction:
    """Value of one literal: ``1,200`` is 1200, ``2.50`` is 5/2, ``20%`` is 1/5."""
    digits = text.replace(",", "").rstrip("%")
    value = Fraction(digits.rstrip(".") if digits != "." else "0")
    return value / 100 if text.endswith("%") else value
