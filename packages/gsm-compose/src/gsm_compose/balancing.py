"""Answers of the same magnitudes as the original benchmark's.

Putting X in the place of smaller numbers makes answers larger on the whole, and a gap between
original and compositional accuracy could then be one of magnitude. The paper shows that its two
histograms match (Figure A.1 of arXiv 2410.01748); here items exchange the numbers that X replaces
until the answers fill the quantiles of the original answers as evenly as they can.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

_BINS: Final = 25
_PASSES: Final = 40


def quantile_edges(answers: Sequence[int]) -> list[int]:
    """Inner edges of the bins: distinct quantiles of the original answers."""
    ordered = sorted(answers)
    return sorted({ordered[len(ordered) * k // _BINS] for k in range(1, _BINS)})


def rebalance(
    answers: Sequence[Sequence[int]],
    partners: Sequence[Sequence[int]],
    chosen: Sequence[int],
    spare: Sequence[int],
    originals: Sequence[int],
) -> list[int]:
    """Choose among each item's options so that answers fill the originals' quantiles evenly.

    Args:
        answers: for each item, the answer that each of its options leads to.
        partners: for each item, the question that each of its options uses.
        chosen: for each item, the position of the option it has now.
        spare: for each question, how many more items may use it.
        originals: answers whose distribution is wanted.

    Returns:
        For each item the position of its option. No question is used more often than allowed, and
        the squared distance between the histograms has not grown; it is a local minimum under
        moves of one item.
    """
    edges = quantile_edges(originals)
    wanted = [0.0] * (len(edges) + 1)
    for answer in originals:
        wanted[bisect_right(edges, answer)] += len(chosen) / len(originals)
    bins = [[bisect_right(edges, answer) for answer in options] for options in answers]
    chosen, spare = list(chosen), list(spare)
    excess = [-w for w in wanted]
    for item, option in enumerate(chosen):
        excess[bins[item][option]] += 1
    for _ in range(_PASSES):
        moved = False
        for item, option in enumerate(chosen):
            here, partner = bins[item][option], partners[item][option]
            best, lowest = option, excess[here] - 1
            for other, there in enumerate(bins[item]):
                free = partners[item][other] == partner or spare[partners[item][other]] > 0
                if free and excess[there] < lowest:
                    best, lowest = other, excess[there]
            if best != option:
                excess[here] -= 1
                excess[bins[item][best]] += 1
                spare[partner] += 1
                spare[partners[item][best]] -= 1
                chosen[item] = best
                moved = True
        if not moved:
            break
    return chosen
