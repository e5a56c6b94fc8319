from __future__ import annotations

import contextlib
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsm_compose.engine.expressions import (
    Expression,
    Literal,
    Negation,
    Operation,
    addends,
    divisors,
    evaluate,
    literals,
    parse,
)
from gsm_compose.errors import ExpressionError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16-3-4", 9),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("-3+5", 2),
        ("+8", 8),
        ("2^3^2", 512),
        ("-2^2", -4),
        ("7/2", Fraction(7, 2)),
        ("20%*50", 10),
        (".2*50", 10),
        ("$1,200.50+0.5", 1201),
        ("5.*2", 10),
        ("3−1", 2),
        ("6÷4", Fraction(3, 2)),
        ("2×3", 6),
        ("0.1+0.2", Fraction(3, 10)),
        ("1/3+1/3+1/3", 1),
    ],
)
def test_values_are_exact(text: str, value: Fraction | int) -> None:
    assert evaluate(parse(text)) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2+",
        "*2",
        "(2+3",
        "2)",
        "2 3",
        "x+1",
        "2**3",
        "10//3",
        "1e3",
        "__import__('os')",
        "1,00",
    ],
)
def test_what_is_not_an_expression_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        parse(text)


@pytest.mark.parametrize("text", ["1/0", "1/(2-2)", "2^0.5", "2^(0-1)", "10^65"])
def test_what_has_no_exact_small_value_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        evaluate(parse(text))


def test_deep_nesting_and_long_texts_are_refused_and_not_followed() -> None:
    for text in ("(" * 500 + "1" + ")" * 500, "-" * 500 + "1", "1+" * 2000 + "1"):
        with pytest.raises(ExpressionError):
            parse(text)


def written(expression: Expression) -> str:
    match expression:
        case Literal(_, text, _):
            return text
        case Negation(operand):
            return f"(-{written(operand)})"
        case Operation(operator, left, right):
            return f"({written(left)}{operator}{written(right)})"


expressions = st.recursive(
    st.integers(0, 999).map(lambda n: Literal(Fraction(n), str(n), 0)),
    lambda inner: st.one_of(
        inner.map(Negation),
        st.tuples(st.sampled_from("+-*/"), inner, inner).map(lambda t: Operation(*t)),
    ),
    max_leaves=12,
)


@given(expressions)
def test_parsing_what_was_written_gives_the_same_value(expression: Expression) -> None:
    # Literals built above all have index 0, so the oracle evaluates by their own values.
    text = written(expression)
    try:
        value = evaluate(expression)
    except ExpressionError:
        with pytest.raises(ExpressionError):
            evaluate(parse(text))
        return
    parsed = parse(text)
    assert evaluate(parsed) == value
    assert [leaf.index for leaf in literals(parsed)] == list(range(len(list(literals(parsed)))))


@given(st.text(alphabet="0123456789+-*/^().,%$ x", max_size=30))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with contextlib.suppress(ExpressionError):
        assert isinstance(evaluate(parse(text)), int | Fraction)


@pytest.mark.parametrize(
    ("text", "sums", "divided_by"),
    [
        ("1+2+3", [3], []),
        ("(1+2+3)/2+4", [2, 3], ["2"]),
        ("1+(2+3)", [2, 2], []),
        ("1-2", [], []),
        ("-(1+2)*6/3", [2], ["3"]),
        ("8/(2+2)", [2], []),
    ],
)
def test_sums_and_divisors_are_found(text: str, sums: list[int], divided_by: list[str]) -> None:
    assert sorted(addends(parse(text))) == sums
    assert [literal.text for literal in divisors(parse(text))] == divided_by
