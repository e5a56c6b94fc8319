"""What the command line prints about rows and benchmarks, as text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

from gsm_compose.benchmark import Benchmark
from gsm_compose.engine.problems import Problem
from gsm_compose.engine.slots import Slot, explain
from gsm_compose.engine.yields import Yields
from gsm_compose.errors import UsageError
from gsm_compose.tables import TextTable
from gsm_compose.verify import Audit

_ROW: Final = re.compile(r"gsm8k/(train|test)/\d+")  # never taken for the name of a file


def find_row(identity: str, problems: Sequence[Problem]) -> Problem:
    """The row with an id.

    Raises:
        UsageError: there is none; the message names the nearest id.
    """
    rows = {problem.id: problem for problem in problems}
    if identity not in rows:
        raise UsageError(f"unknown row {identity!r}. {nearest(identity, rows)}")
    return rows[identity]


def nearest(identity: str, known: Collection[str]) -> str:
    """A sentence about the ids that there are."""
    ids = list(known)
    number = identity.rpartition("/")[2]
    same = [one for one in ids if one.rpartition("/")[2] == number]
    close = same or difflib.get_close_matches(identity, ids, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}There are {ids[0]} to {ids[-1]}."


def read_ids(given: Sequence[str]) -> list[str]:
    """Ids that are given, and those on the lines of files that are given."""
    found: list[str] = []
    for one in given:
        if not _ROW.fullmatch(one) and Path(one).is_file():
            lines = Path(one).read_text(encoding="utf-8").splitlines()
            found += [line.strip() for line in lines if line.strip()]
        else:
            found.append(one)
    return list(dict.fromkeys(found))


def explanation(problem: Problem) -> dict[str, Any]:
    """Every number of a question and what is said about it, as JSON values.

    Returns:
        id, question, final, program (why there is none, or None), and numbers: text, start, kind,
        accepted, reasons.
    """
    fault = problem.no_program
    numbers = []
    for mention in problem.mentions:
        reasons = explain(Slot(problem, mention))
        if mention.kind != "whole":
            reasons = reasons[:1]  # how it is written rules it out; what follows is of no account
        numbers.append(
            {
                "text": mention.text,
                "start": mention.start,
                "kind": mention.kind,
                "accepted": not reasons,
                "reasons": reasons,
            }
        )
    return {
        "id": problem.id,
        "question": problem.question,
        "final": str(problem.final),
        "program": fault,
        "numbers": numbers,
    }


def explanation_text(found: dict[str, Any]) -> str:
    """`explanation` for people."""
    lines = [found["id"], found["question"], f"published answer: {found['final']}"]
    if found["program"] is not None:
        lines.append(f"no program, so no number may become X: {found['program']}")
    if not found["numbers"]:
        lines.append("no number in the question")
    for number in found["numbers"]:
        verdict = "may become X" if number["accepted"] else "rejected"
        lines.append(f"  {number['text']!r} at {number['start']}: {verdict}")
        if found["program"] is None:
            lines += [f"      {reason}" for reason in number["reasons"]]
    return "\n".join(lines)


def yields_text(found: Yields) -> str:
    """How many numbers every rule leaves, as a table."""
    rows = [
        [line.rule, *map(str, (line.rejects, line.left, line.questions, line.alone))]
        for line in found.rules
    ]
    columns = ["rule", "rejects", "numbers left", "questions left", "rejects alone"]
    return (
        f"{found.problems} rows, {found.programs} with a program; "
        f"{found.exact} of {found.annotations} annotations hold exactly; "
        f"{found.numbers} numbers in digits\n\n"
    ) + TextTable("", columns, rows).to_text()


def stats_text(stats: dict[str, Any]) -> str:
    """A benchmark in numbers; see `Benchmark.stats`."""
    counts = "; ".join(f"{n} {shape}" for shape, n in stats["shapes"].items())
    lines = [
        f"{stats['items']} items from the {stats['split']} split: {counts}; shown in the order "
        f"{', '.join(stats['orders'])}",
        f"{stats['first_questions']} first and {stats['last_questions']} last questions, "
        f"a last one at most {stats['most_uses_of_a_last_question']} times",
        "",
    ]
    rows = [
        [
            name,
            *(f"{found[key]:g}" for key in ("quartile_1", "median", "quartile_3", "largest")),
            f"{found['ks_distance']:.3f}",
            f"{found['ks_p_value']:.3f}",
        ]
        for name, found in stats["magnitudes"].items()
    ]
    columns = ["answers of", "25 %", "median", "75 %", "largest", "KS distance", "p"]
    return "\n".join(lines) + TextTable("", columns, rows).to_text()


def audit_text(audit: Audit, benchmark: Benchmark) -> str:
    """What a verification found."""
    programs = f", {audit.executed} programs run" if audit.executed else ""
    lines = [f"{audit.items} items checked against their rows{programs}: "]
    lines[0] += "no fault" if audit.clean else f"{len(audit.faults)} with faults"
    for item in benchmark:
        for fault in audit.faults.get(item.id, ()):
            rows = " → ".join(hop.problem for hop in item.hops)
            lines.append(f"  {item.id} ({rows}): {fault}")
    return "\n".join(lines)
