"""Gold score against distance from the reference: frontiers, and runs compared at one distance."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.writing import whole_file

Row = Mapping[str, Any]


def pareto(rows: Sequence[Row], x: str = "kl", y: str = "gold") -> list[Row]:
    """The rows that no other beats, with at most its ``x`` and at least its ``y`` and one better.

    Args:
        rows: one per run or checkpoint, with numbers under ``x`` and ``y``.
        x: what is paid: ``"kl"`` or ``"ppl"``.
        y: what is gained.

    Returns:
        The frontier, from little ``x`` and ``y`` to much; of equal rows the first.

    Raises:
        InvalidInputError: a row without these numbers.
    """
    return [rows[i] for i in _frontier(rows, x, y)]


def write_pareto(path: Path | str, rows: Sequence[Row], x: str = "kl", y: str = "gold") -> None:
    """Write rows as csv, with a column ``on_frontier`` (0 or 1); whole or not at all.

    Args:
        path: the file.
        rows: as in :func:`pareto`, all with the same names.
        x: see :func:`pareto`.
        y: see :func:`pareto`.

    Raises:
        InvalidInputError: no row, or rows of different names.
        OSError: the file cannot be written.
    """
    if not rows or any(row.keys() != rows[0].keys() for row in rows):
        raise InvalidInputError("rows: expected at least one, all with the same names")
    kept = set(_frontier(rows, x, y))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0], "on_frontier"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "on_frontier": int(i in kept)} for i, row in enumerate(rows))
    with whole_file(Path(path)) as file:
        file.write(text.getvalue().encode())


def gold_at_matched_kl(curve: Sequence[tuple[float, float]], kl: float) -> float | None:
    """Gold score of a run at the point where its divergence first reaches a value.

    Args:
        curve: (divergence, gold) at successive checkpoints; straight lines between them.
        kl: the divergence at which runs are compared.

    Returns:
        The gold score, or None where the run never is at that divergence.

    Raises:
        InvalidInputError: no checkpoint, or numbers that are not finite.
    """
    points = [(float(x), float(y)) for x, y in curve]
    if not points or not all(math.isfinite(v) for point in (*points, (kl,)) for v in point):
        raise InvalidInputError(
            f"curve, kl: expected at least one pair of finite numbers and a finite number, got "
            f"{points} and {kl}"
        )
    if points[0][0] == kl:
        return points[0][1]
    for (before, gold_before), (after, gold_after) in pairwise(points):
        if min(before, after) <= kl <= max(before, after):
            return gold_before + (kl - before) / (after - before) * (gold_after - gold_before)
    return None


def _frontier(rows: Sequence[Row], x: str, y: str) -> list[int]:
    costs, gains = _column(rows, x), _column(rows, y)
    frontier: list[int] = []
    best = -math.inf
    for i in sorted(range(len(rows)), key=lambda i: (costs[i], -gains[i])):
        if gains[i] > best:
            best = gains[i]
            frontier.append(i)
    return frontier


def _column(rows: Sequence[Row], name: str) -> list[float]:
    found = []
    for i, row in enumerate(rows):
        value = row.get(name)
        if not isinstance(value, int | float | np.number) or not math.isfinite(value):
            raise InvalidInputError(f"rows[{i}]: expected a finite number {name!r}, got {value!r}")
        found.append(float(value))
    return found
