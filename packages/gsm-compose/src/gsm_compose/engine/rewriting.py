"""Solutions with other numbers, written out: in words with annotations, and as Python."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Final

from gsm_compose.engine.expressions import Exact, Expression, Literal, Negation, Operation
from gsm_compose.engine.program import ANNOTATION, Leaf, Program
from gsm_compose.engine.recomputation import Recomputed

# --- in words -------------------------------------------------------------------------------------


def rewrite_solution(solution: str, run: Recomputed) -> str:
    """The solution with its numbers brought up to date.

    In a line with annotations the expression before each annotation, the annotation, and the
    result after it are written anew. A line keeps its words only if every other number in it is
    one that has not changed, or stands for exactly one value that has; else, and wherever the
    words before an annotation do not spell its expression, the line becomes the bare calculation.
    Lines without annotations follow the same rule, and are left out where it fails.
    """
    changes = _changed_values(run)
    lines, step = [], 0
    for line in solution.split("\n"):
        count = len(ANNOTATION.findall(line))
        steps = range(step, step + count)
        step += count
        kept = _rewrite_line(line, steps, run, changes)
        if kept is None and count:
            kept = " ".join(_equation(run, i) for i in steps)
        if kept is not None:
            lines.append(kept)
    return "\n".join(lines)


def _changed_values(run: Recomputed) -> dict[Exact, set[Exact]]:
    """Old value → all values it has now, over literals and outputs of the program."""
    changes: dict[Exact, set[Exact]] = {}
    for i, step in enumerate(run.program.steps):
        changes.setdefault(step.output, set()).add(run.outputs[i])
        for literal in step.literals:
            changes.setdefault(literal.value, set()).add(run.new[Leaf(i, literal.index)])
    return changes


_TEXT_NUMBER: Final = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|\.\d+")
_NUMBER_WORD: Final = re.compile(
    r"\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|"
    r"fifteen|sixteen|seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|"
    r"ninety|hundred|thousand|million)\b",
    re.IGNORECASE,
)


def _rewrite_line(
    line: str, steps: range, run: Recomputed, changes: Mapping[Exact, set[Exact]]
) -> str | None:
    """The line with new numbers, or None where that cannot be done for sure."""
    if _NUMBER_WORD.search(line) and any(old not in new for old, new in changes.items()):
        return None  # a number in words may be one that changed
    written, position = [], 0
    marks = list(ANNOTATION.finditer(line))
    for mark, i in zip(marks, steps, strict=True):
        words = _rewrite_words(line[position : mark.start()], changes)
        if words is None:
            return None
        expression = show(run.program.steps[i].expression, run, i)
        result = show_number(run.outputs[i])
        written.append(f"{words}<<{expression}={result}>>")
        position = mark.end()
        shown = _TEXT_NUMBER.match(line, position)
        if shown:
            written.append(_in_the_style_of(shown[0], run.outputs[i]))
            position = shown.end()
    words = _rewrite_words(line[position:], changes)
    return None if words is None else "".join(written) + words


def _rewrite_words(words: str, changes: Mapping[Exact, set[Exact]]) -> str | None:
    written, position = [], 0
    for match in _TEXT_NUMBER.finditer(words):
        old = Fraction(match[0].replace(",", ""))
        new = changes.get(old, {old})
        if len(new) > 1:
            return None
        written += [words[position : match.start()], match[0]]
        if new != {old}:
            written[-1] = _in_the_style_of(match[0], next(iter(new)))
        position = match.end()
    return "".join(written) + words[position:]


def _in_the_style_of(text: str, value: Exact) -> str:
    """The value, with thousands commas where `text` has them."""
    return f"{value:,}" if "," in text and value.denominator == 1 else show_number(value)


def _equation(run: Recomputed, i: int) -> str:
    expression = show(run.program.steps[i].expression, run, i)
    result = show_number(run.outputs[i])
    return f"{expression} = <<{expression}={result}>>{result}"


def show_number(value: Exact) -> str:
    """A decimal where it ends, else a fraction: ``48``, ``2.5``, ``10/3``."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


_BINDS: Final = {"+": 1, "-": 1, "*": 2, "/": 2, "^": 3}


def show(expression: Expression, run: Recomputed, step: int) -> str:
    """An expression with its new numbers, in as few parentheses as keep its meaning."""

    match expression:
        case Literal(old, text, index):
            new = run.new[Leaf(step, index)]
            if new == old:
                return text
            text = show_number(new)
            return f"({text})" if "/" in text or text.startswith("-") else text
        case Negation(operand):
            inner = show(operand, run, step)
            return f"-({inner})" if isinstance(operand, Operation) else f"-{inner}"
        case Operation(operator, left, right):
            binds = _BINDS[operator]
            texts = [show(left, run, step), show(right, run, step)]
            if isinstance(left, Negation) or (
                isinstance(left, Operation) and _BINDS[left.operator] < binds + (operator == "^")
            ):
                texts[0] = f"({texts[0]})"
            if isinstance(right, Negation) or (
                isinstance(right, Operation)
                and _BINDS[right.operator] < binds + (operator in "+-*/")
            ):
                texts[1] = f"({texts[1]})"
            return operator.join(texts)


# --- as Python -----------------------------------------------------------------------------------


def python_source(program: Program, symbols: Mapping[Leaf, str], name: str) -> str:
    """Python that computes the answer exactly.

    Args:
        program: of a solution.
        symbols: for literals that are arguments of the function, the argument's name.
        name: of the function; its arguments are the symbols in alphabetical order.

    Returns:
        Source of one function. Divisions are of `Fraction`, so no result is rounded.
    """
    last = program.results[-1]
    lines = []
    for i, step in enumerate(program.steps[: last + 1]):
        names = {
            literal.index: f"step_{program.sources[Leaf(i, literal.index)][-1] + 1}"
            for literal in step.literals
            if program.sources[Leaf(i, literal.index)]
        }
        names |= {leaf.index: symbol for leaf, symbol in symbols.items() if leaf.step == i}
        lines.append(f"    step_{i + 1} = {_python(step.expression, names)}")
    lines.append(f"    return step_{last + 1}")
    needed = any("Fraction(" in line for line in lines)
    head = "from fractions import Fraction\n\n\n" if needed else ""
    arguments = ", ".join(sorted(set(symbols.values())))
    return "\n".join([f"{head}def {name}({arguments}):", *lines, ""])


def _python(expression: Expression, names: Mapping[int, str]) -> str:
    match expression:
        case Literal(value, _, index):
            if index in names:
                return names[index]
            whole = value.denominator == 1
            return str(value) if whole else f"Fraction({value.numerator}, {value.denominator})"
        case Negation(operand):
            return f"-({_python(operand, names)})"
        case Operation("/", left, right):
            return f"Fraction({_python(left, names)}, {_python(right, names)})"
        case Operation(operator, left, right):
            shown = {"^": "**"}.get(operator, operator)
            sides = []
            for side, tight in ((left, operator == "^"), (right, operator != "+")):
                text = _python(side, names)
                looser = isinstance(side, Negation) or (
                    isinstance(side, Operation)
                    and side.operator != "/"
                    and _BINDS[side.operator] < _BINDS[operator] + tight
                )
                sides.append(f"({text})" if looser else text)
            return f"{sides[0]} {shown} {sides[1]}"
