"""Append-only JSON lines that survive a crash.

A record exists once its newline is on disk. Whatever stands after the last newline is the torn
rest of a write that did not finish: readers pass over it and the next writer cuts it away. An
unreadable line anywhere else is damage, and is reported with its line number, never skipped.

JSON has no NaN and no infinities, yet a loss may be either. They are written as
``{"__float__": "nan"}``, ``{"__float__": "inf"}`` and ``{"__float__": "-inf"}`` and read back as
floats, so every line is strict JSON that any other program can parse.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from filelock import FileLock, Timeout

JSON = None | bool | int | float | str | list[Any] | dict[str, Any]

FLOAT_TAG = "__float__"
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class FileInUseError(RuntimeError):
    """Another process (or another writer in this one) has the file open for appending."""


class CorruptLineError(ValueError):
    """A finished line is not valid JSON, or not the record that was expected there."""


def to_json(value: object, name: str = "value") -> JSON:
    """A deep copy of ``value`` made of plain JSON types only.

    Tuples become lists and numpy scalars become the Python number they hold; everything that
    JSON cannot carry without a decision (arrays, sets, dates, objects) is refused.

    Args:
        value: anything; non-finite floats are allowed.
        name: what to call the value in an error, for example ``arguments``.

    Raises:
        TypeError: some part is not a JSON value; the message has its path.
        ValueError: a mapping uses the reserved key ``__float__``, or contains itself.
    """
    return _to_json(value, name, ())


def _to_json(value: object, path: str, parents: tuple[int, ...]) -> JSON:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    # int(), float() and str() reduce subclasses (IntEnum, np.float64, StrEnum) to what is stored.
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping | list | tuple) and id(value) in parents:
        raise ValueError(f"{path}: expected a finite structure, got one that contains itself")
    parents = (*parents, id(value))
    if isinstance(value, Mapping):
        copy: dict[str, Any] = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(
                    f"{path}: expected text keys, got {key!r} of type {type(key).__name__}; "
                    "turn the keys into text"
                )
            if key == FLOAT_TAG:
                raise ValueError(
                    f"{path}: the key {FLOAT_TAG!r} is reserved for non-finite numbers; rename it"
                )
            copy[str.__str__(key)] = _to_json(item, f"{path}[{key!r}]", parents)
        return copy
    if isinstance(value, list | tuple):
        return [_to_json(item, f"{path}[{i}]", parents) for i, item in enumerate(value)]
    remedy = (
        "call .tolist() on it" if hasattr(value, "tolist") else "pass numbers, text, lists or dicts"
    )
    raise TypeError(
        f"{path}: expected a JSON value, got {type(value).__module__}."
        f"{type(value).__qualname__}; {remedy}"
    )


def dumps(value: object, *, sort_keys: bool = False, name: str = "value") -> str:
    """``value`` as one line of strict JSON, without the newline.

    Args:
        value: what :func:`to_json` accepts.
        sort_keys: canonical order of keys, for hashing.
        name: what to call the value in an error.

    Raises:
        TypeError, ValueError: as :func:`to_json`.
    """
    return json.dumps(
        _tag_floats(to_json(value, name)),
        sort_keys=sort_keys,
        allow_nan=False,
        separators=(",", ":") if sort_keys else None,
    )


def loads(line: str | bytes) -> JSON:
    """The value that :func:`dumps` wrote.

    Raises:
        ValueError: the text is not strict JSON, or names an unknown non-finite number.
    """
    value: JSON = json.loads(line, object_hook=_untag_float, parse_constant=_refuse_constant)
    return value


def _tag_floats(value: JSON) -> JSON:
    if isinstance(value, float) and not math.isfinite(value):
        return {FLOAT_TAG: repr(value)}
    if isinstance(value, list):
        return [_tag_floats(item) for item in value]
    if isinstance(value, dict):
        return {key: _tag_floats(item) for key, item in value.items()}
    return value


def _untag_float(mapping: dict[str, Any]) -> Any:
    if mapping.keys() != {FLOAT_TAG}:
        return mapping
    try:
        return _NON_FINITE[mapping[FLOAT_TAG]]
    except (KeyError, TypeError):
        raise ValueError(
            f"{FLOAT_TAG}: expected one of {sorted(_NON_FINITE)}, got {mapping[FLOAT_TAG]!r}"
        ) from None


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON; write it as {{{FLOAT_TAG!r}: ...}}")


def read(path: Path | str) -> list[JSON]:
    """All finished records of a file, oldest first.

    Safe while another process appends. A torn last line is passed over; an absent file has no
    records.

    Raises:
        CorruptLineError: a finished line is not valid JSON; the message has file and line.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    records: list[JSON] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(loads(line))
        except ValueError as error:
            raise CorruptLineError(
                f"{path}, line {number}: expected one JSON value, got {line[:60]!r} ({error}); "
                "the file was changed by something else: restore it, or delete this line to give "
                "up the record"
            ) from error
    return records


class Appender:
    """The one writer of a JSON-lines file.

    Opening takes an exclusive lock (``<file>.lock`` beside it, released by the system if the
    process dies) and cuts away a torn last line. :meth:`append` returns when the record is on
    disk.

    Raises:
        FileInUseError: the file already has a writer.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # is_singleton would let a second writer in this process share the lock.
        self._lock = FileLock(f"{self.path}.lock", timeout=0, is_singleton=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise FileInUseError(
                f"{self.path}: expected to be its only writer, but another process is appending "
                "to it; wait for that run to end, or write to another file"
            ) from None
        try:
            self._descriptor = os.open(
                self.path,
                os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0),
                0o666,
            )
            self._closed = False
            self._cut_torn_line()
            _sync_directory(self.path.parent)
        except BaseException:
            self._lock.release()
            raise

    def append(self, record: object) -> None:
        """Writes one record and waits until it is on disk.

        Args:
            record: what :func:`to_json` accepts.

        Raises:
            TypeError, ValueError: the record is not JSON; nothing was written.
            OSError: the disk refused (full, for instance); the file is as it was before.
        """
        if self._closed:
            raise ValueError(f"{self.path}: this writer is closed; open a new one")
        line = (dumps(record, name="record") + "\n").encode("ascii")
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            if written != len(line):
                raise OSError(f"{self.path}: only {written} of {len(line)} bytes could be written")
            os.fsync(self._descriptor)
        except OSError:
            # A half line followed by a later whole one would be damage in the middle.
            os.ftruncate(self._descriptor, size)
            raise

    def close(self) -> None:
        """Gives the file free for another writer. Closing twice is harmless."""
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _cut_torn_line(self) -> None:
        end = os.fstat(self._descriptor).st_size
        keep = end
        block = 1 << 16
        while keep > 0:
            start = max(0, keep - block)
            os.lseek(self._descriptor, start, os.SEEK_SET)
            newline = os.read(self._descriptor, keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < end:
            os.ftruncate(self._descriptor, keep)
            os.fsync(self._descriptor)


def _sync_directory(directory: Path) -> None:
    # A new file survives power loss only once its folder entry is on disk too. Windows has no
    # such call and needs none.
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
