"""Tables from CSV, JSON lines and Parquet files that are tidy already."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd

from hpreliability.errors import (
    EmptyInputError,
    HPReliabilityError,
    MissingExtraError,
    SourceFormatError,
)
from hpreliability.table import Table, from_frame

Source = str | PathLike[str]


def read(
    path: Source | Iterable[Source],
    *,
    hyperparameter: str = "hyperparameter",
    value: str = "value",
    seed: str = "seed",
    score: str = "score",
    context: Sequence[str] = ("env",),
    step: str | None = None,
) -> Table:
    """A table from one or several files, one row per run, or per point of a run with `step`.

    Args:
        path: a file, a pattern with wildcards (`"results/**/*.csv"`), or several of these; rows of
            all files are joined. The format follows from the name: `.csv`, `.jsonl`, `.ndjson`
            (each also with `.gz`) or `.parquet`.
        hyperparameter, value, seed, score, context, step: names of columns; see `from_frame`.

    Labels in CSV keep their spelling: `0.10` stays `0.10`. An empty cell has no label, which is an
    error, or no score, which is a failed run.

    Raises:
        FileNotFoundError: a path without wildcards does not exist.
        EmptyInputError: a file has no rows, or a pattern matches no file.
        SourceFormatError: unknown format, or a line that cannot be read; the message names both.
        MissingExtraError: Parquet without pyarrow.
        HPReliabilityError: as `from_frame`, with the name of the file.
    """
    files = find_files(path)
    columns: dict[str, Any] = {
        "hyperparameter": hyperparameter,
        "value": value,
        "seed": seed,
        "score": score,
        "context": context,
        "step": step,
    }
    parts = []
    for file in files:
        part = read_frame(file)
        try:
            table = from_frame(part, **columns)
        except HPReliabilityError as error:
            raise type(error)(f"{file}: {error}") from error
        parts.append(part)
    # The second pass over all rows finds a run that two files claim.
    return table if len(parts) == 1 else from_frame(pd.concat(parts, ignore_index=True), **columns)


def find_files(path: Source | Iterable[Source]) -> list[Path]:
    """Existing files that a path, a pattern, or several of these name; sorted per pattern."""
    sources = [path] if isinstance(path, (str, PathLike)) else list(path)
    found: list[Path] = []
    for source in sources:
        file = Path(source)
        if file.exists():
            found.append(file)
        elif is_pattern(source):
            found += [match for match in matching(source) if match.is_file()]
        else:
            raise FileNotFoundError(f"no such file: {source}")
    if not found:
        raise EmptyInputError(f"no file matches {', '.join(map(str, sources)) or 'an empty list'}")
    return list(dict.fromkeys(found))


def is_pattern(path: Source) -> bool:
    """Whether a path has wildcards."""
    return any(mark in str(path) for mark in "*?[")


def matching(pattern: Source) -> list[Path]:
    """Paths that a pattern with wildcards matches, sorted; `**` matches folders at any depth."""
    parts = Path(pattern).parts
    fixed = next(index for index, part in enumerate(parts) if is_pattern(part))
    return sorted(Path(*parts[:fixed]).glob(str(Path(*parts[fixed:]))))


def read_frame(file: Path) -> pd.DataFrame:
    """The rows of one file; see `read` for formats and errors."""
    if file.is_dir():
        raise SourceFormatError(f"{file} is a folder; name its files, for example {file}/*.csv")
    if file.stat().st_size == 0:
        raise EmptyInputError(f"{file} is empty")
    name = file.name.lower().removesuffix(".gz")
    if name.endswith(".csv"):
        frame = _read_csv(file)
    elif name.endswith((".jsonl", ".ndjson")):
        frame = pd.DataFrame(_alike(read_json_lines(file), file))
    elif file.suffix.lower() == ".parquet":
        frame = _read_parquet(file)
    else:
        raise SourceFormatError(
            f"{file}: unknown format; expected .csv, .jsonl or .ndjson (each also .gz), or .parquet"
        )
    if frame.empty:
        raise EmptyInputError(f"{file} has no rows")
    return frame


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """One object per line; blank lines are skipped.

    Raises:
        SourceFormatError: a line is not a JSON object.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SourceFormatError(f"{file}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise SourceFormatError(f"{file}, line {number}: expected an object, got {line[:60]!r}")
        rows.append(row)
    return rows


def parse_csv(text: str, file: Path, *, first_line: int = 1) -> pd.DataFrame:
    """Cells as text, empty ones as None; every row must have as many as the header.

    `first_line` is the number of the header's line in the file, for messages.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    rows: list[list[str | None]] = []
    try:
        for cells in reader:
            if not cells:
                continue
            line = reader.line_num + first_line - 1
            if header is None:
                header = cells
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise SourceFormatError(f"{file}, line {line}: columns named twice: {twice}")
            elif len(cells) != len(header):
                raise SourceFormatError(
                    f"{file}, line {line}: {len(cells)} cells under {len(header)} columns; "
                    "the line is torn or the file is ragged"
                )
            else:
                rows.append([cell or None for cell in cells])
    except csv.Error as error:
        line = reader.line_num + first_line - 1
        raise SourceFormatError(f"{file}, line {line}: not CSV ({error})") from error
    # dtype=object: the spelling of labels must survive.
    return pd.DataFrame(rows, columns=header or [], dtype=object)


def _alike(rows: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """The same rows, all of which have the keys of the first."""
    for number, row in enumerate(rows, start=1):
        lacking = sorted(set(rows[0]) - set(row))
        if lacking:
            # Filling the gap with NaN would turn a malformed row into a failed run.
            raise SourceFormatError(f"{file}, object {number}: no {', '.join(map(repr, lacking))}")
    return rows


def _read_csv(file: Path) -> pd.DataFrame:
    return parse_csv(_text(file), file)


def _read_parquet(file: Path) -> pd.DataFrame:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet") from error
    try:
        frame: pd.DataFrame = pyarrow.parquet.read_table(file).to_pandas()
    except pyarrow.ArrowException as error:
        raise SourceFormatError(f"{file} is not a readable Parquet file: {error}") from error
    return frame


def _text(file: Path) -> str:
    try:
        if file.suffix.lower() == ".gz":
            with gzip.open(file, "rt", encoding="utf-8-sig", newline="") as stream:
                return stream.read()
        with file.open(encoding="utf-8-sig", newline="") as stream:
            return stream.read()
    except UnicodeDecodeError as error:
        raise SourceFormatError(f"{file} is not UTF-8 text: {error}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SourceFormatError(f"{file} is not a complete gzip file: {error}") from error
