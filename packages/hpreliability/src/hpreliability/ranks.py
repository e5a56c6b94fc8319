"""Ranks of values whose scores are known only up to an interval."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpreliability.errors import NonFiniteScoreError, ShapeError

Ties = Literal["paper", "symmetric"]


def interval_ranks(lo: ArrayLike, hi: ArrayLike, ties: Ties = "paper") -> NDArray[np.float64]:
    """Rank intervals, 1 for the best; intervals that overlap or touch share ranks.

    Each interval has an overlap set of its own: overlap is not transitive, so ranks need not
    sum to V(V+1)/2.

    Args:
        lo: lower bounds, shape (..., V); leading axes are independent rankings.
        hi: upper bounds, same shape, `lo <= hi` everywhere.
        ties: `"paper"` is the scan of the paper's own code: values are sorted by `hi`,
            descending; a value's best position is the first at or before its own whose interval
            reaches up to it, its worst the last whose upper bound reaches its `lo`.
            `"symmetric"` counts only the intervals strictly above and strictly below. They differ
            when a wide interval on top hides others: its own scan stops at the first overlap. Only
            the symmetric convention survives negating all scores.

    Returns:
        Ranks, shape (..., V): the middle of the best and the worst position a value can hold.

    Raises:
        ShapeError: shapes differ, or there is no axis of values.
        NonFiniteScoreError: a bound is NaN. Infinite bounds are ordered like any number.
        ValueError: some `lo > hi`, or `ties` is unknown.

    Source: `interval_to_ranking` of the public analysis code for arXiv 2406.17523. That code closes
    its scan with an interval at -100 and so misplaces scores below it; this one needs no sentinel.
    """
    lo, hi = np.asarray(lo, dtype=np.float64), np.asarray(hi, dtype=np.float64)
    if lo.shape != hi.shape or lo.ndim == 0 or lo.shape[-1] == 0:
        raise ShapeError(
            f"lo and hi must share a shape (..., V), V >= 1; got {lo.shape} and {hi.shape}"
        )
    if np.isnan(lo).any() or np.isnan(hi).any():
        raise NonFiniteScoreError("interval bounds must not be NaN")
    if (lo > hi).any():
        raise ValueError("every lower bound must be at most its upper bound")
    if ties not in get_args(Ties):
        raise ValueError(f"ties must be one of {get_args(Ties)}, got {ties!r}")
    rule = _paper_positions if ties == "paper" else _symmetric_positions
    ranks = np.empty(lo.shape)
    # With values in front and rankings behind, every comparison runs over contiguous memory; blocks
    # keep the (V, block) temporaries inside the processor's cache.
    lo, hi, flat = (x.reshape(-1, lo.shape[-1]) for x in (lo, hi, ranks))
    for start in range(0, len(flat), _BLOCK):
        block = slice(start, start + _BLOCK)
        first, last = rule(np.ascontiguousarray(lo[block].T), np.ascontiguousarray(hi[block].T))
        flat[block] = ((first + last) / 2).T
    return ranks


_BLOCK = 8192
_Positions = tuple[NDArray[np.int16], NDArray[np.int16]]


def _paper_positions(lo: NDArray[np.float64], hi: NDArray[np.float64]) -> _Positions:
    """First and last 1-based positions (V, N) in the order of descending `hi`, ties stable."""
    n_values = len(lo)
    place = np.empty(lo.shape, dtype=np.int16)
    for v in range(n_values):
        ahead = (hi > hi[v]).sum(axis=0, dtype=np.int16)
        place[v] = 1 + ahead + (hi[:v] == hi[v]).sum(axis=0, dtype=np.int16)
    first, last = np.empty_like(place), np.empty_like(place)
    for v in range(n_values):
        # A value overlaps itself, so the first hit is never behind it and needs no mask.
        first[v] = np.where(lo <= hi[v], place, np.int16(n_values)).min(axis=0)
        last[v] = (hi >= lo[v]).sum(axis=0, dtype=np.int16)
    return first, last


def _symmetric_positions(lo: NDArray[np.float64], hi: NDArray[np.float64]) -> _Positions:
    first, last = np.empty(lo.shape, dtype=np.int16), np.empty(lo.shape, dtype=np.int16)
    for v in range(len(lo)):
        first[v] = 1 + (lo > hi[v]).sum(axis=0, dtype=np.int16)
        last[v] = (hi >= lo[v]).sum(axis=0, dtype=np.int16)
    return first, last
