"""GSM8K, grade school mathematics, with the prompts of the paper and exact match as the reward.

The data are the reader's own file, in the format of the public repository
openai/grade-school-math, or the copy that the package gsm-compose has with it where that is
installed. Nothing is downloaded.

The paper trains on 7100 of the 7473 training questions and validates on the other 373; which ones,
only its own list of files says. Here a seed decides, so that the sizes are the paper's and the
questions are not.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, get_args

import numpy as np

from vineppo.errors import InvalidInputError, at_least, one_of

Split = Literal["train", "validation", "test"]

PROMPT: Final = "[MATH_TASK] Problem:\n{question}\n\nSolution:"
MARK: Final = "####"
# A number that no digit, decimal, fraction or operation goes on behind: "10/3" has none.
_NUMBER: Final = re.compile(
    r"\s*(?P<sign>[-+]?)\s*\$?\s*(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
    r"(?![.,]?\d|[eE]\d)(?![ \t]*[-+*/^=×÷][ \t]*[\d(.$])",
    re.ASCII,
)
_SHIPPED_BY: Final = "gsm-compose"


def final_number(text: str) -> Decimal | None:
    """The number behind the last ``####``, by value: ``"#### $1,200.00."`` gives 1200.

    Commas between thousands, a dollar sign and whatever text follows (a unit, a full stop) do not
    matter.

    Args:
        text: of an answer.

    Returns:
        The number; None without ``####``, or without a number directly behind the last one.
    """
    _, mark, behind = text.rpartition(MARK)
    found = _NUMBER.match(behind) if mark else None
    if found is None:
        return None
    return Decimal(found["sign"] + found["digits"].replace(",", ""))


@dataclass(frozen=True)
class GSM8K:
    """A part of GSM8K.

    Attributes:
        path: a ``.jsonl`` or ``.jsonl.gz`` file with ``question`` and ``answer`` on each line.
            None: the copy of gsm-compose, its test file for ``"test"`` and its training file for
            the others.
        split: ``"train"`` and ``"validation"`` are parts of the file; ``"test"`` and None are all
            of it.
        validation: questions of the file that are kept for validation.
        seed: which ones.

    Raises:
        InvalidInputError: a value out of its range, no such file, or no copy.
    """

    path: Path | str | None = None
    split: Split | None = None
    validation: int = 373
    seed: int = 0

    stop: ClassVar[tuple[str, ...]] = ("\n\n\nProblem:",)
    """Texts that end an answer in the paper's code, beside the end-of-sequence token."""

    def __post_init__(self) -> None:
        one_of("split", self.split, (*get_args(Split), None))
        at_least("validation", self.validation, 0)
        at_least("seed", self.seed, 0)
        if not self.file.is_file():
            raise InvalidInputError(
                f"path: expected a jsonl file of GSM8K, got {self.file}, which is no file; the "
                "data are in the repository openai/grade-school-math"
            )

    @property
    def file(self) -> Path:
        """What the rows are read from."""
        if self.path is None:
            return _shipped("test" if self.split == "test" else "train")
        return Path(self.path)

    def examples(self, n: int | None = None) -> list[dict[str, str]]:
        """The first ``n`` rows, in the order of the file.

        Args:
            n: how many at most; None: all.

        Returns:
            Rows with ``prompt`` (:data:`PROMPT` with the question), ``answer`` (the number, without
            commas) and ``solution`` (as it stands in the file, ending with ``#### answer``).

        Raises:
            InvalidInputError: ``n`` below 1, or a file that cannot be read as GSM8K; the message
                has the number of the line.
        """
        if n is not None:
            at_least("n", n, 1)
        return [dict(row) for row in self._examples[:n]]

    def reward(
        self,
        prompts: Sequence[Any],  # noqa: ARG002 (TRL gives it)
        completions: Sequence[Any],
        answer: Sequence[str],
        **_: Any,
    ) -> list[float]:
        """1 where the number behind the last ``####`` is the right one, 0 elsewhere.

        A reward function of TRL. Numbers are compared by value; see :func:`final_number`.

        Args:
            prompts: not used.
            completions: texts without special tokens, or messages, of which the last counts.
            answer: the column of the examples, or whole solutions.

        Raises:
            InvalidInputError: an answer without a number.
        """
        scores = []
        for row, (completion, wanted) in enumerate(zip(completions, answer, strict=True)):
            text = str(wanted)
            right = final_number(text if MARK in text else MARK + text)
            if right is None:
                raise InvalidInputError(
                    f"answer[{row}]: expected a number, perhaps behind {MARK}, got {wanted!r}"
                )
            given = completion if isinstance(completion, str) else completion[-1]["content"]
            scores.append(float(final_number(given) == right))
        return scores

    @cached_property
    def _examples(self) -> list[dict[str, str]]:
        rows = _read(self.file)
        if self.split not in ("train", "validation"):
            return rows
        # By question, so that one which the file has twice is not in both parts.
        prompts = list(dict.fromkeys(row["prompt"] for row in rows))
        if self.validation >= len(prompts):
            raise InvalidInputError(
                f"validation: expected fewer than the {len(prompts)} questions of {self.file}, got "
                f"{self.validation}"
            )
        order = np.random.default_rng(self.seed).permutation(len(prompts))
        kept = {prompts[i] for i in order[: self.validation]}
        return [row for row in rows if (row["prompt"] in kept) == (self.split == "validation")]


def _shipped(name: Literal["train", "test"]) -> Path:
    """The file that gsm-compose has with it; the package is found and not imported."""
    registered = importlib.metadata.entry_points(group="decapod.reproductions", name=_SHIPPED_BY)
    for entry in registered:
        spec = importlib.util.find_spec(entry.module.partition(".")[0])
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            file = Path(folder) / "data" / f"gsm8k-{name}.jsonl.gz"
            if file.is_file():
                return file
    raise InvalidInputError(
        f"path: expected a jsonl file of GSM8K, got None, which means the copy of {_SHIPPED_BY}, "
        f"and none is installed; give the path of {name}.jsonl from the repository "
        f"openai/grade-school-math, or install {_SHIPPED_BY}"
    )


def _read(file: Path) -> list[dict[str, str]]:
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            f"path: expected UTF-8 text, compressed if it ends in .gz, got {file}: {error}"
        ) from error
    # Not splitlines(): JSON may hold line separators of Unicode as they are.
    lines = enumerate(text.split("\n"), start=1)
    rows = [_row(line, f"path: {file}, line {number}") for number, line in lines if line.strip()]
    if not rows:
        raise InvalidInputError(f"path: expected at least one row, got none in {file}")
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
    number = final_number(row["answer"])
    if number is None:
        raise InvalidInputError(
            f"{where}: expected an 'answer' that ends with '{MARK} number', got "
            f"{row['answer'][-40:]!r}"
        )
    return {
        "prompt": PROMPT.format(question=row["question"]),
        "answer": f"{number:f}",
        "solution": row["answer"],
    }
