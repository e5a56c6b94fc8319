"""GSM8K, grade school mathematics: exact match of the final number as the reward.

The data are the reader's own: a jsonl file of rows with ``question`` and ``answer``, as in the
public repository openai/grade-school-math. Nothing is downloaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final, Literal, get_args

from asyncrlhf.errors import InvalidInputError

Fallback = Literal["none", "last_number"]

MARK: Final = "####"
# A sign behind a digit or a bracket is an operation.
_NUMBER: Final = re.compile(r"(?:(?<![\d)\]])[-+])?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def final_number(text: str, fallback: Fallback = "none") -> Decimal | None:
    """The number directly behind the last ``####``, as a value: ``"#### $1,200.00."`` is 1200.

    Commas, a dollar sign, and whatever follows the number (a unit, a full stop) do not matter.

    Args:
        text: of an answer.
        fallback: what counts where there is no ``####``: nothing, or the last number of the text.

    Returns:
        The number, or None where there is none.
    """
    _, mark, behind = text.rpartition(MARK)
    if mark:
        found = _NUMBER.match(behind.lstrip())
        return None if found is None else _value(found.group())
    if fallback == "none":
        return None
    numbers = _NUMBER.findall(text)
    return _value(numbers[-1]) if numbers else None


@dataclass(frozen=True)
class GSM8KReward:
    """1 for the right final number, 0 for another or none; with TRL's signature.

    Attributes:
        fallback: see :func:`final_number`; for completions only.

    Raises:
        InvalidInputError: an unknown fallback.
    """

    fallback: Fallback = "none"

    def __post_init__(self) -> None:
        if self.fallback not in get_args(Fallback):
            raise InvalidInputError(
                f"fallback: expected one of {', '.join(get_args(Fallback))}, got {self.fallback!r}"
            )

    def __call__(self, completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
        """The reward of each completion.

        Args:
            completions: texts, or messages, of which the last counts.
            answer: the column of the data set: a solution with ``####``, or the number alone.

        Raises:
            InvalidInputError: an answer without a number.
        """
        scores = []
        for row, (completion, solution) in enumerate(zip(completions, answer, strict=True)):
            wanted = final_number(str(solution), "last_number")
            if wanted is None:
                raise InvalidInputError(
                    f"answer[{row}]: expected a number, perhaps behind {MARK}, got {solution!r}"
                )
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            scores.append(float(final_number(text, self.fallback) == wanted))
        return scores


def load_gsm8k(path: Path | str, limit: int | None = None) -> list[dict[str, str]]:
    """Rows of a GSM8K file.

    Args:
        path: a jsonl file with ``question`` and ``answer``.
        limit: most rows; None: all.

    Returns:
        Rows with ``prompt`` (the question) and ``answer`` (the solution, with ``####``).

    Raises:
        InvalidInputError: no such file, no row, or a line that is none; with its number.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise InvalidInputError(f"limit: expected at least 1, got {limit}")
    if not path.is_file():
        raise InvalidInputError(
            f"path: expected a jsonl file of GSM8K, got {path}, which is no file; the data are in "
            "the repository openai/grade-school-math"
        )
    rows: list[dict[str, str]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if len(rows) == limit:
                break
            if line.strip():
                rows.append(_row(line, f"path: {path}, line {number}"))
    if not rows:
        raise InvalidInputError(f"path: expected at least one row, got none in {path}")
    return rows


def _row(line: str, where: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"{where}: expected one JSON object, got {error}") from error
    if not isinstance(row, dict):
        raise InvalidInputError(f"{where}: expected one JSON object, got {type(row).__name__}")
    for name in ("question", "answer"):
        if not isinstance(row.get(name), str):
            raise InvalidInputError(f"{where}: expected a text {name!r}, got {row.get(name)!r}")
    if MARK not in row["answer"] or final_number(row["answer"]) is None:
        raise InvalidInputError(f"{where}: expected a number behind {MARK} in 'answer'")
    return {"prompt": row["question"], "answer": row["answer"]}


def _value(number: str) -> Decimal | None:
    try:
        return Decimal(number.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
