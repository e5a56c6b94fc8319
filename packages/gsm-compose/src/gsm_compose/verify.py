"""Holding a benchmark against what it was made from, along a way of its own.

Building computes with one way of resolving each program. Verification reads the finished items,
goes back to the rows, resolves the programs in every way, parses the written solutions again, and
runs the emitted Python in a sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from gsm_compose.benchmark import Benchmark
from gsm_compose.engine.problems import Problem
from gsm_compose.engine.program import Program
from gsm_compose.engine.slots import Slot, candidates, explain
from gsm_compose.errors import GSMComposeError, ProgramError
from gsm_compose.items import Hop, Item
from gsm_compose.sandbox import Isolation, Limits, run_code, run_many


@dataclass(frozen=True)
class Audit:
    """What a verification found.

    Attributes:
        items: how many were looked at.
        executed: how many programs were run.
        faults: item id → what is wrong with it; empty where all is well.
    """

    items: int
    executed: int
    faults: Mapping[str, tuple[str, ...]]

    @property
    def clean(self) -> bool:
        """Whether no fault was found."""
        return not self.faults


def symbolic_audit(
    benchmark: Benchmark,
    problems: Sequence[Problem],
    *,
    execute: bool = True,
    isolation: Isolation = "auto",
    workers: int = 2,
) -> Audit:
    """Check every item of a benchmark against the rows that it was made from.

    For each item: its questions are different rows of one split, word for word; every replaced
    number is an accepted slot; template and question put back together give the original text; the
    answer follows from the row's program under every resolution; the solution reads back as steps
    that end in the answer; the answer of "X ignored" is not the right one. With `execute` the
    program of `composition_program` runs in the sandbox and must give both answers.

    Args:
        benchmark: what to check.
        problems: rows of its split, all those it uses.
        execute: run the programs too.
        isolation: of the sandbox; see `gsm_compose.sandbox`.
        workers: programs that run at the same time.

    Raises:
        GSMComposeError: an item uses a row that is not among `problems`.
    """
    rows = {problem.id: problem for problem in problems}
    missing = sorted({h.problem for item in benchmark for h in item.hops} - set(rows))
    if missing:
        raise GSMComposeError(
            f"problems: expected all rows of the benchmark, {missing[0]!r} is not there. "
            f"Pass the rows of the {benchmark.split} split."
        )
    faults = {item.id: _faults(item, rows) for item in benchmark}
    if execute:
        sources = [composition_program(item) for item in benchmark]
        runs = run_many(sources, ("solve_q1", "solution"), isolation=isolation, workers=workers)
        for item, run in zip(benchmark, runs, strict=True):
            x, gold = run.values.get("solve_q1"), run.values.get("solution")
            if run.error is not None or x != item.x or gold != item.gold:
                faults[item.id] += (f"the program gives {x}, {gold} ({run.error}: {run.detail}).",)
    found = {identity: tuple(texts) for identity, texts in faults.items() if texts}
    return Audit(len(benchmark), len(benchmark) if execute else 0, found)


def _faults(item: Item, rows: Mapping[str, Problem]) -> tuple[str, ...]:
    faults: list[str] = []
    if len({hop.problem for hop in item.hops}) < len(item.hops):
        faults.append("a question occurs twice.")
    if item.ignored == item.gold:
        faults.append("ignoring X gives the right answer.")
    for position, hop in enumerate(item.hops):
        problem = rows[hop.problem]
        if problem.question != hop.original or problem.split != item.split:
            faults.append(f"hop {position} is not the question {hop.problem}.")
        elif hop.old_answer != problem.final:
            faults.append(f"hop {position} has another published answer.")
        elif not hop.links and not hop.answer == hop.old_answer == problem.final:
            faults.append(f"hop {position} does not have its published answer.")
        elif hop.links:
            faults += [f"hop {position}: {fault}" for fault in _linked_faults(item, hop, problem)]
    return tuple(faults)


def _linked_faults(item: Item, hop: Hop, problem: Problem) -> list[str]:
    faults: list[str] = []
    by_start = {slot.start: slot for slot in candidates(problem)}
    values: dict[Slot, int] = {}
    for link in hop.links:
        slot = by_start.get(link.start)
        if slot is None or slot.end != link.end or slot.text != link.old:
            return [f"there is no number {link.old!r} at {link.start}."]
        faults += [f"{link.old!r} is rejected: {reason}" for reason in explain(slot)]
        values[slot] = item.hops[link.source].answer
    if faults:
        return faults
    if problem.program.evaluate(values) != hop.answer:
        faults.append("the answer does not follow from the program.")
    if _restored(hop.template, hop) != hop.original:
        faults.append("putting the numbers back does not restore the question.")
    if not _same_but_for_links(item, hop):
        faults.append("the question is not the original with the new numbers.")
    try:
        again = Program.from_solution(hop.solution, Fraction(hop.answer))
    except ProgramError as error:
        return [*faults, f"the solution does not read back: {error}"]
    if len(again.steps) != len(problem.program.steps):
        faults.append("the solution has another number of steps.")
    return faults


def _restored(template: str, hop: Hop) -> str | None:
    """The template with the numbers put back in place of the symbols; None if one is not there."""
    for link in hop.links:  # in the order of the text, so each begins where it does originally
        start, end = link.start, link.start + len(link.symbol)
        if template[start:end] != link.symbol:
            return None
        template = template[:start] + link.old + template[end:]
    return template


def _same_but_for_links(item: Item, hop: Hop) -> bool:
    """Whether `question` is the original with each link's number replaced by its new value."""
    pattern, position = [], 0
    for link in hop.links:
        answer = item.hops[link.source].answer
        pattern += [re.escape(hop.original[position : link.start]), f"(?:{answer}|{answer:,})"]
        position = link.end
    pattern.append(re.escape(hop.original[position:]))
    return re.fullmatch("".join(pattern), hop.question) is not None


def composition_program(item: Item) -> str:
    """Python with a function `solve_q1` … for every hop but the last, and `solution` for the last.

    Each calls the functions of the hops whose answers it needs. A first question whose published
    solution has no usable annotations becomes a function that returns its published answer, and
    says so.
    """
    parts: list[str] = []
    last = len(item.hops) - 1
    for position, hop in enumerate(item.hops):
        name = "solution" if position == last else f"solve_q{position + 1}"
        source = hop.program
        if source is None:
            source = (
                "def solution():\n"
                "    # The published solution has no annotations to compute from.\n"
                f"    return {hop.answer}\n"
            )
        source = source.removeprefix("from fractions import Fraction\n\n\n")
        calls = "".join(
            f"    {link.symbol.lower()} = solve_q{link.source + 1}()\n" for link in hop.links
        )
        head, _, body = source.partition("\n")
        parts.append(f"def {name}():\n{calls}{body}" if head else source)
    text = "\n\n".join(parts)
    return f"from fractions import Fraction\n\n\n{text}" if "Fraction(" in text else text


def execute_program(source: str, timeout: float = 5.0, isolation: Isolation = "auto") -> Fraction:
    """Run a program in the sandbox and return what its `solution` returns.

    Args:
        source: Python with a function `solution` of no arguments.
        timeout: wall-clock limit in seconds.
        isolation: see `gsm_compose.sandbox`.

    Raises:
        ProgramError: it does not return a number in time; the message says why.
    """
    result = run_code(source, ("solution",), Limits(wall_seconds=timeout), isolation)
    value = result.values.get("solution")
    if result.error is not None or value is None:
        raise ProgramError(f"{result.error or 'no value'}: {result.detail}")
    return value


def agreement_filter(
    benchmark: Benchmark,
    generate: Callable[[Sequence[Any]], Sequence[str]],
    k: int = 4,
    n: int = 16,
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """The paper's check with a model: sample the modified question, count agreements.

    The paper samples two models and has people read every question on which fewer than 4 of 16
    samples agree with the computed answer (Section 2 of arXiv 2410.01748). Here the items that
    fail are returned for reading; none is dropped by itself.

    Args:
        benchmark: items to check.
        generate: prompts → texts; it has to sample, since each prompt is asked `n` times.
        k: how many samples have to agree.
        n: samples a question.

    Returns:
        Items that pass and items that do not, in the benchmark's order.

    Raises:
        GSMComposeError: `k` is not between 1 and `n`, or `generate` returned too few texts.
    """
    from gsm_compose.parse import extract_answer
    from gsm_compose.prompts import render

    if not 1 <= k <= n:
        raise GSMComposeError(f"k: expected 1 to n={n}, got {k}.")
    prompts = [render(item, "modified") for item in benchmark for _ in range(n)]
    texts = generate(prompts)
    if len(texts) != len(prompts):
        raise GSMComposeError(f"generate: expected {len(prompts)} texts, got {len(texts)}.")
    agreed = [
        sum(extract_answer(text) == item.gold for text in texts[i * n : (i + 1) * n]) >= k
        for i, item in enumerate(benchmark)
    ]
    pairs = list(zip(benchmark, agreed, strict=True))
    return tuple(i for i, ok in pairs if ok), tuple(i for i, ok in pairs if not ok)
