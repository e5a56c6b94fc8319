"""Results on disk: a folder of append-only files, one per writer.

Machines that share nothing each write their own file; copying the files into one folder merges
them, because reading takes the union of all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from decapod.jobs.job import STATUSES, JobResult, Status
from decapod.jsonl import Appender, CorruptLineError, read

_FIELDS = ("key", "label", "arguments", "status", "value", "error", "seconds")


class Store:
    """The results of a list of jobs.

    Args:
        directory: made if absent, at the first write.
        writer: names the one file this process appends to, ``jobs-<writer>.jsonl``. Writers that
            run at the same time need different names.

    Raises:
        ValueError: ``writer`` is not a plain name.
    """

    def __init__(self, directory: Path | str, writer: str = "0of1") -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", writer):
            raise ValueError(
                f"writer: expected letters, digits, '.', '_' and '-', got {writer!r}; it becomes "
                "part of a file name"
            )
        self.directory = Path(directory)
        self.writer = writer
        self._appender: Appender | None = None

    @property
    def path(self) -> Path:
        """The file that :meth:`append` writes."""
        return self.directory / f"jobs-{self.writer}.jsonl"

    def append(self, result: JobResult) -> None:
        """Adds a result; returns when it is on disk.

        Raises:
            decapod.jsonl.FileInUseError: another process writes this file.
        """
        if self._appender is None:
            self._appender = Appender(self.path)
        self._appender.append(asdict(result))

    def done(self) -> dict[str, JobResult]:
        """The finished jobs of all writers by key.

        A job that was finished twice counts with its first record, in the order of file names and
        lines.

        Raises:
            decapod.jsonl.CorruptLineError: a finished line is not a job result.
        """
        finished: dict[str, JobResult] = {}
        for result in self._records():
            if result.done:
                finished.setdefault(result.key, result)
        return finished

    def failures(self) -> dict[str, JobResult]:
        """The last failure of every job that failed or was killed and is not done.

        Raises:
            decapod.jsonl.CorruptLineError: a finished line is not a job result.
        """
        records = list(self._records())
        finished = {result.key for result in records if result.done}
        return {result.key: result for result in records if result.key not in finished}

    def _records(self) -> Iterator[JobResult]:
        for path in sorted(self.directory.glob("jobs-*.jsonl")):
            for number, record in enumerate(read(path), start=1):
                yield _parse(record, path, number)

    def __enter__(self) -> Self:
        """Claims the file for writing now rather than at the first result."""
        if self._appender is None:
            self._appender = Appender(self.path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the file free for another writer; reading stays possible."""
        if self._appender is not None:
            self._appender.close()
            self._appender = None


def _parse(record: Any, path: Path, number: int) -> JobResult:
    if (
        not isinstance(record, dict)
        or record.keys() != set(_FIELDS)
        or not isinstance(record["key"], str)
        or record["status"] not in STATUSES
    ):
        raise CorruptLineError(
            f"{path}, line {number}: expected a job result with {', '.join(_FIELDS)}, got "
            f"{str(record)[:80]}; this folder holds something else, or was written by another "
            "version of decapod"
        )
    return JobResult(
        key=record["key"],
        label=record["label"],
        arguments=record["arguments"],
        status=cast(Status, record["status"]),
        value=record["value"],
        error=record["error"],
        seconds=record["seconds"],
    )
