"""Questions as hops of an item: as published, or with X in the place of a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from gsm_compose.engine.expressions import Exact
from gsm_compose.engine.problems import Problem
from gsm_compose.engine.program import Leaf, Program
from gsm_compose.engine.recomputation import recompute
from gsm_compose.engine.rewriting import python_source, rewrite_solution
from gsm_compose.engine.slots import Slot
from gsm_compose.errors import ProgramError, RejectedCompositionError
from gsm_compose.items import Hop, Link


def plain_hop(problem: Problem) -> Hop:
    """A question as published, to stand first in an item.

    Raises:
        RejectedCompositionError: its answer is not a positive whole number.
    """
    if problem.final.denominator != 1 or problem.final <= 0:
        raise RejectedCompositionError(
            f"{problem.id}: its answer {problem.final} cannot be X, which is a positive whole "
            "number."
        )
    answer = int(problem.final)
    text = problem.question
    try:
        source: str | None = python_source(problem.program, {}, "solution")
    except ProgramError:
        source = None
    return Hop(problem.id, text, text, text, (), answer, answer, problem.solution, source)


def linked_hop(slots: Sequence[Slot], sources: Sequence[int], values: Sequence[int]) -> Hop:
    """A question some of whose numbers are answers of earlier hops.

    Args:
        slots: accepted slots of one problem.
        sources: for each slot, the position of the hop whose answer replaces it.
        values: for each slot, that answer.

    Raises:
        RejectedCompositionError: the program does not give one answer with these values whatever
            way it is resolved, or what is written does not read back as the same program.
    """
    problem, program = slots[0].problem, slots[0].problem.program
    order = sorted(range(len(slots)), key=lambda i: slots[i].start)
    links = tuple(
        Link(sources[i], slots[i].start, slots[i].end, slots[i].text, int(slots[i].value))
        for i in order
    )
    new_numbers = {links[k]: values[i] for k, i in enumerate(order)}
    replaced: dict[Leaf, Exact] = {
        leaf: value for slot, value in zip(slots, values, strict=True) for leaf in slot.leaves
    }
    run = recompute(program, replaced)
    if run.answer.denominator != 1 or run.answer <= 0:
        raise RejectedCompositionError(f"{problem.id}: bad answer: {run.answer}.")
    constants = frozenset[Fraction]().union(*(slot.constants for slot in slots))
    if any(len(ways) > 1 for ways in program.trace(replaced, constants)):
        raise RejectedCompositionError(f"{problem.id}: ambiguous with {list(values)}.")
    solution = rewrite_solution(problem.solution, run)
    again = Program.from_solution(solution, Fraction(run.answer))
    if tuple(step.output for step in again.steps) != run.outputs:
        raise RejectedCompositionError(f"{problem.id}: the new solution reads back differently.")
    symbols = {
        leaf: links[k].symbol.lower() for k, i in enumerate(order) for leaf in slots[i].leaves
    }
    return Hop(
        problem.id,
        problem.question,
        _replace(problem.question, {link: f"{n:,}" if "," in link.old else str(n)
                                    for link, n in new_numbers.items()}),
        _replace(problem.question, {link: link.symbol for link in links}),
        links,
        int(run.answer),
        int(problem.final),
        solution,
        python_source(program, symbols, "solution"),
    )  # fmt: skip


def _replace(question: str, texts: Mapping[Link, str]) -> str:
    for link in sorted(texts, key=lambda k: -k.start):
        question = question[: link.start] + texts[link] + question[link.end :]
    return question
