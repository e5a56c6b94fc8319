"""What a model is asked: one item under one condition, as text or as chat messages.

The format is that of Sections 2 and 3 and Appendices B and D–F of arXiv 2410.01748 in our own
words: a line that says what X is, Q1, the request to solve it and to use X, and Q2 with X in place
of its number. A worked solution of a composition first states "The Q1 answer is A. Therefore X=A."
and every solution in words ends with "The final answer is N."

Questions are numbered by dependency (the position of the hop), also where an item presents them in
another order. Exemplars have two hops whatever the item has; whether they present the dependent
question first follows the item.

Every condition with a single question shows the same exemplars (the first questions of the eight
compositions), so that the prompts for original and modified questions differ in nothing but the
question. Requests end with the same words in all of them, for the same reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

from gsm_compose.errors import PromptError
from gsm_compose.exemplars import Exemplar, exemplars
from gsm_compose.items import SYMBOLS, Hop, Item, Link

Condition = Literal[
    "original", "modified", "compositional", "independent-context", "code", "original-q2"
]
CONDITIONS: Final[tuple[Condition, ...]] = get_args(Condition)
SINGLE_QUESTION: Final[frozenset[Condition]] = frozenset(("original", "modified", "original-q2"))
MAX_SHOTS: Final = 8
Style = Literal["cot", "code"]
Message = dict[str, str]
Prompt = str | list[Message]

_EXPLAIN: Final = "Explain your reasoning step by step."
_ANSWERS: Final = ("A", "B", "C", "D")  # what stands for the answers to Q1, Q2, … in a preamble
_PROBLEM: Final = "Problem:"
_SOLUTION: Final = "Solution:"


@dataclass(frozen=True)
class PromptSpec:
    """How questions are put; what is asked is the condition.

    Attributes:
        style: "cot" asks for a solution in words, "code" for Python functions that are then run.
        shots: number of worked exemplars before the question, 0 to 8.
        preamble: say in advance in which form the answer is wanted.
        chat: give messages instead of text. Exemplars become turns of user and assistant, and the
            preamble opens the first user turn: there is no system message, because the templates of
            several models refuse one.
    """

    style: Style = "cot"
    shots: int = MAX_SHOTS
    preamble: bool = True
    chat: bool = False

    def __post_init__(self) -> None:
        if self.style not in get_args(Style):
            raise PromptError(f"style: expected 'cot' or 'code', got {self.style!r}.")
        if type(self.shots) is not int or not 0 <= self.shots <= MAX_SHOTS:
            raise PromptError(
                f"shots: expected a whole number from 0 to {MAX_SHOTS}, got {self.shots!r}."
            )


DEFAULT_SPEC: Final = PromptSpec()


def style_of(condition: Condition, spec: PromptSpec = DEFAULT_SPEC) -> Style:
    """The style in which a condition is asked: that of the spec, but "code" always in code.

    Raises:
        PromptError: no such condition.
    """
    if condition not in CONDITIONS:
        raise PromptError(f"condition: expected one of {', '.join(CONDITIONS)}, got {condition!r}.")
    return "code" if condition == "code" else spec.style


def stop_sequences(condition: Condition, spec: PromptSpec = DEFAULT_SPEC) -> tuple[str, ...]:
    """Where a model has begun a problem of its own, so that generation may stop.

    Nothing of them belongs to the answer. None are needed for chat, where a turn ends by itself.

    Raises:
        PromptError: no such condition.
    """
    style_of(condition, spec)
    return () if spec.chat else (f"\n{_PROBLEM}",)


def render(item: Item, condition: Condition, spec: PromptSpec = DEFAULT_SPEC) -> Prompt:
    """The prompt of one item under one condition.

    - "original": the first question alone.
    - "modified": the last question alone, linked numbers replaced by their values.
    - "original-q2": the last question alone, as published.
    - "compositional": all questions, linked numbers replaced by their symbols.
    - "code": as "compositional", asked for Python code.
    - "independent-context": the first question and then the modified last one, both to be solved.

    Args:
        item: what to ask.
        condition: see above.
        spec: how to ask it.

    Returns:
        Text that ends with ``Solution:``; for ``spec.chat`` a list of messages with the keys
        ``role`` and ``content``, the last of which is the user's.

    Raises:
        PromptError: no such condition, or the item uses a question of the exemplars shown.
    """
    style = style_of(condition, spec)
    shots = exemplars()[: spec.shots]
    _check_apart(item, shots)
    last = len(item.hops) - 1
    order = (1, 0) if item.order.index(last) < item.order.index(0) else (0, 1)
    shown: Condition = "original" if condition in SINGLE_QUESTION else condition
    examples = [
        (_question(replace(shot.item, order=order), shown, style), _solution(shot, shown, style))
        for shot in shots
    ]
    question = _question(item, condition, style)
    opening = _preamble(item, condition, style) if spec.preamble else ""
    if spec.chat:
        return _messages(opening, examples, question)
    return _text(opening, examples, question)


def _check_apart(item: Item, shots: Sequence[Exemplar]) -> None:
    shown = {hop.problem for shot in shots for hop in shot.item.hops}
    asked = [hop.problem for hop in item.hops if hop.problem in shown]
    if asked:
        raise PromptError(
            f"item {item.id}: expected questions that are not among the exemplars, got {asked[0]}. "
            "Build the benchmark without gsm_compose.exemplars.exemplar_problems(), or use shots=0."
        )


def _text(opening: str, examples: Sequence[tuple[str, str]], question: str) -> str:
    parts = [opening] if opening else []
    parts += [f"{_PROBLEM}\n{asked}\n\n{_SOLUTION}\n{solved}" for asked, solved in examples]
    # No space or newline at the end: how a tokenizer splits them depends on what follows.
    parts.append(f"{_PROBLEM}\n{question}\n\n{_SOLUTION}")
    return "\n\n".join(parts)


def _messages(opening: str, examples: Sequence[tuple[str, str]], question: str) -> list[Message]:
    messages: list[Message] = []
    for asked, solved in examples:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": solved})
    messages.append({"role": "user", "content": question})
    if opening:
        messages[0]["content"] = f"{opening}\n\n{messages[0]['content']}"
    return messages


def _question(item: Item, condition: Condition, style: Style) -> str:
    """What is asked, with the request for a solution but without the preamble."""
    if condition in SINGLE_QUESTION:
        request = _EXPLAIN if style == "cot" else _functions(item.hops[:1], linked=False)
        return f"{_single(item, condition)}\n\n{request}"
    if condition == "independent-context":
        hops = (item.q1, item.q2)
        request = _EXPLAIN if style == "cot" else _functions(hops, linked=False)
        return "\n\n".join(
            (
                "Q1 and Q2 are two separate questions.",
                f"Q1: {item.q1.question}",
                f"Solve Q1, then solve Q2. {request}",
                f"Q2: {item.q2.question}",
            )
        )
    request = _EXPLAIN if style == "cot" else _functions(item.hops, linked=True)
    sources = sorted({link.source for hop in item.hops for link in hop.links})
    opening = _listed([f"{SYMBOLS[i]} is the answer to Q{i + 1}" for i in sources]) + "."
    if item.order != tuple(range(len(item.hops))):
        opening += f" The questions come in the order {', '.join(_labels(item.order))}."
    questions = [f"Q{i + 1}: {item.hops[i].template}" for i in item.order]
    task = f"{_task(item)} {request}"
    return "\n\n".join((opening, questions[0], task, *questions[1:]))


def _single(item: Item, condition: Condition) -> str:
    if condition == "original":
        return item.q1.question
    return item.q2.question if condition == "modified" else item.q2.original


def _task(item: Item) -> str:
    """For two hops, "Solve Q1, then use the value of X to solve Q2."."""
    free = [i for i, hop in enumerate(item.hops) if not hop.links]
    steps = ["Solve " + _listed(_labels(free))]
    for position, hop in enumerate(item.hops):
        symbols = _symbols(hop)
        if symbols:
            values = "value" if len(symbols) == 1 else "values"
            steps.append(f"use the {values} of {_listed(symbols)} to solve Q{position + 1}")
    return ", then ".join(steps) + "."


def _functions(hops: Sequence[Hop], *, linked: bool) -> str:
    """The request for code: which function returns what."""
    clauses = []
    for position, hop in enumerate(hops):
        name = "solution" if position == len(hops) - 1 else f"solve_q{position + 1}"
        of = f" to Q{position + 1}" if len(hops) > 1 else ""
        begin = ""
        if linked and hop.links:
            calls = [f"{link.symbol} = solve_q{link.source + 1}()" for link in _by_source(hop)]
            begin = f"begins with {_listed(calls)} and "
        clauses.append(f"{name}() {begin}returns the answer{of}")
    return f"Write Python code: {'; '.join(clauses)}."


def _preamble(item: Item, condition: Condition, style: Style) -> str:
    if style == "code":
        return (
            "Answer with one block of Python code that starts with ```python and ends with ```. "
            "Functions take no arguments, print nothing and return one number."
        )
    stated = ""
    if condition == "independent-context":
        stated = 'After solving Q1 write "The Q1 answer is A." '
    elif condition == "compositional":
        stated = "".join(
            f'After solving Q{i + 1} write "The Q{i + 1} answer is {answer}. '
            f'Therefore {SYMBOLS[i]}={answer}." '
            for i, answer in enumerate(_ANSWERS[: len(item.hops) - 1])
        )
    asked = {"compositional": len(item.hops), "independent-context": 2}.get(condition)
    of = "the number asked for" if asked is None else f"the answer to Q{asked}"
    return f'Solve the problem. {stated}End with "The final answer is N.", where N is {of}.'


def _solution(shot: Exemplar, condition: Condition, style: Style) -> str:
    q1, q2 = shot.item.hops
    if style == "code":
        if condition == "original":
            return _code_block(_function("solution", shot.code[0]))
        apart = condition == "independent-context"
        body = shot.code_with_number if apart else ("X = solve_q1()", *shot.code[1])
        return _code_block(_function("solve_q1", shot.code[0]), _function("solution", body))
    if condition == "original":
        return f"{q1.solution} The final answer is {q1.answer}."
    stated = f"The Q1 answer is {q1.answer}."
    if condition == "compositional":
        stated += f" Therefore X={q1.answer}."
    return f"{q1.solution} {stated}\n{q2.solution} The final answer is {q2.answer}."


def _function(name: str, body: Sequence[str]) -> str:
    return "\n".join((f"def {name}():", *(f"    {line}" for line in body)))


def _code_block(*functions: str) -> str:
    return "```python\n" + "\n\n\n".join(functions) + "\n```"


def _by_source(hop: Hop) -> list[Link]:
    """One link for every hop that this one depends on, in the order of the hops."""
    links = {link.source: link for link in hop.links}
    return [links[source] for source in sorted(links)]


def _symbols(hop: Hop) -> list[str]:
    return [link.symbol for link in _by_source(hop)]


def _labels(positions: Sequence[int]) -> list[str]:
    return [f"Q{i + 1}" for i in positions]


def _listed(parts: Sequence[str]) -> str:
    """For three parts, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}"
