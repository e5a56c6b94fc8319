"""Win-rates of paired answers, with honest intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from asyncrlhf.errors import InvalidInputError, MissingExtraError

if TYPE_CHECKING:
    from decapod.stats import Estimate


@dataclass(frozen=True)
class WinRate:
    """How often a policy's answer beats the reference's answer to the same prompt.

    Attributes:
        rate: wins and half of the ties, as a share of the prompts, with its interval.
        wins: prompts where the policy scores higher.
        ties: prompts where both score the same.
        losses: prompts where it scores lower.
    """

    rate: Estimate
    wins: int
    ties: int
    losses: int


def compare_scores(
    policy: npt.ArrayLike, reference: npt.ArrayLike, *, level: float = 0.95
) -> WinRate:
    """Win-rate from the scores of paired answers.

    The interval is Wilson's score interval with a tie as half a win. The variance of such a mean is
    at most that of wins alone, so that ties make the interval too wide, never too narrow; and it
    keeps a width where every answer wins.

    Args:
        policy: ``[n]`` scores.
        reference: ``[n]`` scores of the answers to the same prompts.
        level: confidence level of the interval, in (0, 1).

    Raises:
        InvalidInputError: shapes that differ, no score, or one that is not finite.
    """
    try:
        import scipy.stats

        from decapod.stats import Estimate
    except ModuleNotFoundError as error:
        raise MissingExtraError("decapod", "train") from error
    ours, theirs = finite_scores("policy", policy), finite_scores("reference", reference)
    if ours.shape != theirs.shape:
        raise InvalidInputError(
            f"policy, reference: expected as many scores of each, got {len(ours)} and {len(theirs)}"
        )
    if not 0 < level < 1:
        raise InvalidInputError(f"level: expected a number in (0, 1), got {level}")
    wins, ties = int((ours > theirs).sum()), int((ours == theirs).sum())
    n = len(ours)
    p = (wins + ties / 2) / n
    z2 = float(scipy.stats.norm.isf((1 - level) / 2)) ** 2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    rate = Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n, level)
    return WinRate(rate, wins, ties, n - wins - ties)


def finite_scores(name: str, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Scores as ``[n]`` float64.

    Raises:
        InvalidInputError: no score, another shape, or one that is not finite.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or found.size == 0:
        raise InvalidInputError(
            f"{name}: expected scores of shape (n,), at least one, got shape {found.shape}"
        )
    bad = np.flatnonzero(~np.isfinite(found))
    if bad.size:
        raise InvalidInputError(
            f"{name}: expected finite scores, got {found[bad[0]]} at {bad[0]} ({bad.size} in all); "
            "decide what a failed answer scores, or leave it out on both sides"
        )
    return found
