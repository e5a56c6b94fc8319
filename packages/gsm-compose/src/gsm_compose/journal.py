"""The file of a model's answers: one line for every distinct prompt, appended as answers come.

The first line says which benchmark was asked, how, and of whom, so that a file is never continued
by another run. A line exists once its newline is on disk: whatever stands after the last newline is
the torn rest of a write that was cut short, and the next run overwrites it. No line depends on
when it was written or on how often the run was interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, get_args

from gsm_compose.benchmark import Benchmark
from gsm_compose.errors import EvaluationError
from gsm_compose.prompts import Condition, Prompt, PromptSpec, render
from gsm_compose.writing import write_text

SCHEMA: Final = "gsm-compose-answers/1"


@dataclass(frozen=True, eq=False)
class Question:
    """A distinct prompt, and the items that it is asked for.

    Attributes:
        key: hash of prompt, specification and condition (16 hexadecimal digits).
        condition: what is asked.
        prompt: text or chat messages.
        items: ids of the items, more than one where a question is reused.
    """

    key: str
    condition: Condition
    prompt: Prompt
    items: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What came back for one `Question`: a line of the file.

    Attributes:
        key: that of the question.
        condition: that of the question.
        items: those of the question.
        texts: what the model wrote, one for every sample.
        final: the answer read from them, by majority; None if none could be read.
        q1: the answer to Q1 read from them, by majority; None if none could be read or looked for.
        error: why code gave no answer; None in every other case.
    """

    key: str
    condition: Condition
    items: tuple[str, ...]
    texts: tuple[str, ...]
    final: Fraction | None
    q1: Fraction | None
    error: str | None

    def to_line(self) -> bytes:
        """One line of JSON with its newline; numbers are exact, such as ``"3/4"``."""
        record = {
            "condition": self.condition,
            "items": self.items,
            "final": None if self.final is None else str(self.final),
            "q1": None if self.q1 is None else str(self.q1),
            "error": self.error,
            "texts": self.texts,
            "key": self.key,
        }
        return _line(record)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Answer:
        """The answer of a line that `to_line` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is not such a line.
        """
        if record["condition"] not in get_args(Condition):
            raise ValueError(f"no such condition: {record['condition']!r}")
        texts = tuple(record["texts"])
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("texts: expected a list of texts")
        return cls(
            key=record["key"],
            condition=record["condition"],
            items=tuple(record["items"]),
            texts=texts,
            final=None if record["final"] is None else Fraction(record["final"]),
            q1=None if record["q1"] is None else Fraction(record["q1"]),
            error=record["error"],
        )


def questions(
    benchmark: Benchmark, conditions: Iterable[Condition], spec: PromptSpec
) -> list[Question]:
    """All distinct prompts, condition by condition, in the order of the items.

    Raises:
        PromptError: see `gsm_compose.prompts.render`.
    """
    found: dict[str, Question] = {}
    for condition in conditions:
        for item in benchmark:
            prompt = render(item, condition, spec)
            key = _hash([prompt, dataclasses.asdict(spec), condition])
            known = found.get(key)
            if known is None:
                found[key] = Question(key, condition, prompt, (item.id,))
            else:
                found[key] = dataclasses.replace(known, items=(*known.items, item.id))
    return list(found.values())


def header(benchmark: Benchmark, spec: PromptSpec, samples: int, label: str) -> dict[str, Any]:
    """First line of the file. The benchmark's hash does not depend on the order of its items."""
    return {
        "schema": SCHEMA,
        "benchmark": _hash(sorted(item.id for item in benchmark)),
        "items": len(benchmark),
        "split": benchmark.split,
        "label": label,
        "samples": samples,
        "spec": dataclasses.asdict(spec),
    }


def read(path: Path) -> tuple[dict[str, Any], list[Answer]]:
    """Header and answers of a file; a torn last line is passed over.

    Raises:
        EvaluationError: there is no header, it is of another version, or a finished line is not an
            answer; the message has the line's number.
        OSError: the file cannot be read.
    """
    first, *rest = path.read_bytes().split(b"\n")
    if not rest:
        raise EvaluationError(
            f"{path}, line 1: expected a header, got {first[:60]!r}. "
            "Is this a file that `evaluate` or `Results.to_jsonl` wrote?"
        )
    return _header(path, first), [
        _answer(path, number, line) for number, line in enumerate(rest[:-1], start=2)
    ]


def write(path: Path, head: Mapping[str, Any], answers: Iterable[Answer]) -> None:
    """The whole file at once, under its name only when complete."""
    content = _line(head) + b"".join(answer.to_line() for answer in answers)
    write_text(path, content.decode())


class Journal:
    """The one writer of a file of answers.

    Attributes:
        answers: what the file had when it was opened, oldest first.

    Raises:
        EvaluationError: the file is no such file, is damaged, belongs to another run, or another
            process is writing to it. The file is left as it was.
        OSError: its folder does not exist, or it cannot be written.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._file = os.open(path, flags, 0o666)
        try:
            self._lock()
            self.answers = self._open(head)
        except BaseException:
            os.close(self._file)
            raise

    def _lock(self) -> None:
        if sys.platform == "win32":
            return
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EvaluationError(
                f"out: another process is writing to {self.path}. "
                "Wait for it to end, or give another file."
            ) from None

    def _open(self, head: Mapping[str, Any]) -> list[Answer]:
        content = self.path.read_bytes()
        line = _line(head)
        if b"\n" not in content and line.startswith(content):
            # New, or cut short while the header was being written.
            os.ftruncate(self._file, 0)
            self._append(line)
            return []
        found, answers = read(self.path)
        different = [name for name in head if found.get(name) != head[name]]
        if different:
            name = different[0]
            raise EvaluationError(
                f"out: {self.path} holds answers of another run: expected {name} "
                f"{head[name]!r}, got {found.get(name)!r}. Give another file, or the "
                "settings of that run."
            )
        os.ftruncate(self._file, content.rindex(b"\n") + 1)
        return answers

    def append(self, answers: Sequence[Answer]) -> None:
        """Write answers and wait until they are on disk.

        Raises:
            OSError: the disk refused; the file is as it was before.
        """
        self._append(b"".join(answer.to_line() for answer in answers))

    def _append(self, data: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError:
            # Half a line, with whole ones after it, would be damage in the middle.
            os.ftruncate(self._file, size)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)


def _header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict) or "schema" not in found:
        raise EvaluationError(
            f"{path}, line 1: expected a header with the schema's version, got {line[:60]!r}. "
            "Is this a file that `evaluate` or `Results.to_jsonl` wrote?"
        )
    if found["schema"] != SCHEMA:
        raise EvaluationError(
            f"{path}: expected schema {SCHEMA!r}, got {found['schema']!r}. "
            "Use the version of gsm-compose that wrote it, or evaluate into another file."
        )
    return found


def _answer(path: Path, number: int, line: bytes) -> Answer:
    try:
        return Answer.from_record(json.loads(line))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EvaluationError(
            f"{path}, line {number}: expected an answer, got {line[:60]!r} ({error!r}). The file "
            "was changed by something else: delete this line to have the question asked again."
        ) from error


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        return f"{json.dumps(record, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:
        # A model can emit half of a surrogate pair, which has no place in UTF-8.
        return f"{json.dumps(record)}\n".encode()


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
