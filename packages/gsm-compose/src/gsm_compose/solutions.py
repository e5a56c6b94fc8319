"""Reference solutions in the form in which models are asked to answer, for supervised training.

The form is that of the exemplars of `gsm_compose.prompts`: a composition first states "The Q1
answer is A. Therefore X=A.", every solution in words ends with "The final answer is N.", and code
defines ``solve_q1()`` and a ``solution()`` that begins with ``X = solve_q1()`` (Appendices B and
D-F of arXiv 2410.01748). Words are those of GSM8K with the calculator annotations taken out.
"""

from __future__ import annotations

import ast
import re

from gsm_compose.errors import PromptError
from gsm_compose.items import SYMBOLS, Hop, Item
from gsm_compose.prompts import SINGLE_QUESTION, Condition, Style

_ANNOTATION = re.compile(r"<<[^<>]*>>")


def gold_answers(item: Item, condition: Condition) -> tuple[int, int | None]:
    """Gold final answer under a condition, and that of the first question if it is asked as well.

    Returns:
        ``(final, x)``; x is None where one question is asked alone.
    """
    if condition == "original":
        return item.x, None
    if condition == "original-q2":
        return item.ignored, None
    return item.gold, None if condition in SINGLE_QUESTION else item.x


def reference_solution(item: Item, condition: Condition, style: Style = "cot") -> str:
    """What a right answer looks like under a condition.

    Args:
        item: what was asked.
        condition: under which condition. "original-q2" has none, because items keep only the
            solution with the new number; "code" is the composition in code whatever the style.
        style: "cot" for words, "code" for a block of Python.

    Raises:
        PromptError: the condition has no reference solution, or a question of the item has no
            program (its published solution has no usable annotations) and code is wanted.
    """
    if condition == "original-q2":
        raise PromptError(
            "condition: 'original-q2' has no reference solution, items keep that of the new "
            "number. Use 'modified'."
        )
    if condition in SINGLE_QUESTION:
        hops: tuple[Hop, ...] = (item.q1,) if condition == "original" else (item.q2,)
    else:
        hops = (item.q1, item.q2) if condition == "independent-context" else item.hops
    linked = condition in ("compositional", "code")
    if condition == "code" or style == "code":
        return _code(item, hops, linked=linked)
    return _words(hops, linked=linked)


def _words(hops: tuple[Hop, ...], *, linked: bool) -> str:
    paragraphs = []
    for position, hop in enumerate(hops[:-1]):
        stated = f"The Q{position + 1} answer is {hop.answer}."
        if linked:
            stated += f" Therefore {SYMBOLS[position]}={hop.answer}."
        paragraphs.append(f"{_plain(hop.solution)} {stated}")
    last = hops[-1]
    paragraphs.append(f"{_plain(last.solution)} The final answer is {last.answer}.")
    return "\n".join(paragraphs)


def _plain(solution: str) -> str:
    """A solution without annotations, ending like a sentence."""
    text = _ANNOTATION.sub("", solution).rstrip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _code(item: Item, hops: tuple[Hop, ...], *, linked: bool) -> str:
    """Every hop's program as a function of no arguments, in one block of Python."""
    imports: dict[str, None] = {}  # in order, once each
    functions = []
    for position, hop in enumerate(hops):
        if hop.program is None:
            raise PromptError(
                f"item {item.id}: expected a program for every question, {hop.problem} has none "
                "(no usable annotations). Use style 'cot', or leave such items out: "
                "all(hop.program for hop in item.hops)."
            )
        name = "solution" if position == len(hops) - 1 else f"solve_q{position + 1}"
        for statement in ast.parse(hop.program).body:
            if isinstance(statement, ast.FunctionDef):
                functions.append(_function(statement, name, item, hop, linked=linked))
            else:
                imports[ast.unparse(statement)] = None
    blocks = (["\n".join(imports)] if imports else []) + functions
    return "```python\n" + "\n\n\n".join(blocks) + "\n```"


def _function(function: ast.FunctionDef, name: str, item: Item, hop: Hop, *, linked: bool) -> str:
    links = {link.symbol.lower(): link for link in hop.links}
    given: dict[str, ast.expr] = {}
    first: list[str] = []
    for argument in function.args.args:
        link = links[argument.arg]
        if linked:
            given[argument.arg] = ast.Name(link.symbol)
            first.append(f"{link.symbol} = solve_q{link.source + 1}()")
        else:
            given[argument.arg] = ast.Constant(item.hops[link.source].answer)
    body = [ast.unparse(_Replace(given).visit(statement)) for statement in function.body]
    lines = [line for part in (*first, *body) for line in part.split("\n")]
    return "\n".join((f"def {name}():", *(f"    {line}" for line in lines)))


class _Replace(ast.NodeTransformer):
    """Puts other expressions in the place of names."""

    def __init__(self, given: dict[str, ast.expr]) -> None:
        self.given = given

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.given.get(node.id, node)
