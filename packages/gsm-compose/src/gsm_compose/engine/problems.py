"""Rows of GSM8K."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from gsm_compose.engine.expressions import number
from gsm_compose.errors import ProgramError, SourceFormatError

if TYPE_CHECKING:
    from gsm_compose.engine.mentions import Mention
    from gsm_compose.engine.program import Program

Split = Literal["train", "test"]
_FINAL: Final = re.compile(r"####\s*\$?\s*([-−]?\d[\d,]*(?:\.\d+)?)\s*$")


@dataclass(frozen=True)
class Problem:
    """One question with its published solution.

    Attributes:
        id: for example ``"gsm8k/test/418"``; the number is the row's, from 0.
        split: which file it is from.
        question: text as published.
        solution: text as published, calculator annotations included, without the ``####`` line.
        final: the answer after ``####``.
    """

    id: str
    split: Split
    question: str
    solution: str
    final: Fraction

    @cached_property
    def program(self) -> Program:
        """The solution's annotations as a program.

        Raises:
            ProgramError: the solution has no usable annotations; the message says why.
        """
        from gsm_compose.engine.program import Program

        return Program.from_solution(self.solution, self.final)

    @cached_property
    def no_program(self) -> str | None:
        """Why there is no program, or None where there is one."""
        try:
            _ = self.program
        except ProgramError as error:
            return str(error)
        return None

    @cached_property
    def mentions(self) -> tuple[Mention, ...]:
        """Every number that the question states, in digits or words, in the order of the text."""
        from gsm_compose.engine.mentions import find_mentions

        return tuple(find_mentions(self.question))


def load_gsm8k(path: str | Path | None = None, split: Split | None = None) -> list[Problem]:
    """Read rows of GSM8K.

    Args:
        path: a ``.jsonl`` or ``.jsonl.gz`` file with ``question`` and ``answer`` on each line, or
            the word ``"test"`` or ``"train"`` for the vendored file. None: the vendored file of
            `split`, or of the test split.
        split: what the rows are. None: read off the name of the file, which must then contain
            ``train`` or ``test``. It decides what may be made of them: nothing built from test
            rows is exported for training without an explicit flag.

    Returns:
        One problem a line, in the file's order.

    Raises:
        SourceFormatError: a line is not JSON, lacks a field, or its answer does not end in
            ``#### number``; or the split can be told from neither argument. The message has file
            and line.
    """
    if path is None or str(path) in ("test", "train"):
        if path is not None and split not in (None, str(path)):
            raise SourceFormatError(f"split: the vendored file is {path!r}, got split={split!r}.")
        name: Split = "train" if "train" in (str(path), split) else "test"
        packed = files("gsm_compose").joinpath("data", f"gsm8k-{name}.jsonl.gz").read_bytes()
        return _rows(gzip.decompress(packed).decode(), f"gsm8k-{name}.jsonl.gz", name)
    path = Path(path)
    if split is None:
        split = _split_of(path)
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise SourceFormatError(f"{path}: not a whole gzip file ({error}).") from error
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise SourceFormatError(f"{path}: not UTF-8 ({error}).") from error
    return _rows(text, str(path), split)


def _split_of(path: Path) -> Split:
    named = {name for name in ("train", "test") if name in path.name.lower()}
    if len(named) != 1:
        raise SourceFormatError(
            f"split: cannot tell from the file name {path.name!r} whether these are train or test "
            "rows. Pass split='train' or split='test'."
        )
    return "train" if named == {"train"} else "test"


def _rows(text: str, source: str, split: Split) -> list[Problem]:
    # Not splitlines: a question holds U+2028, which that would take for the end of a line.
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise SourceFormatError(f"{source}: expected one row of GSM8K a line, the file is empty.")
    return [_row(line, f"{source}, line {i + 1}", i, split) for i, line in enumerate(lines)]


def _row(line: str, where: str, index: int, split: Split) -> Problem:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SourceFormatError(
            f"{where}: not JSON ({error.msg} at character {error.pos}). Was the file truncated?"
        ) from error
    if not isinstance(row, dict) or not all(
        isinstance(row.get(key), str) for key in ("question", "answer")
    ):
        raise SourceFormatError(f"{where}: expected the texts 'question' and 'answer'.")
    final = _FINAL.search(row["answer"])
    if final is None:
        raise SourceFormatError(
            f"{where}: expected the answer to end in '#### number', got {row['answer'][-40:]!r}."
        )
    text = final[1].replace("−", "-")
    value = -number(text[1:]) if text.startswith("-") else number(text)
    solution = row["answer"][: final.start()].rstrip()
    return Problem(f"gsm8k/{split}/{index}", split, row["question"], solution, value)
