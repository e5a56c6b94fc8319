"""Which prompts are computed together, and which need no computation of their own."""

from __future__ import annotations

from collections.abc import Sequence


def share_prefixes(
    contexts: Sequence[tuple[int, ...]],
) -> list[tuple[tuple[int, ...], list[int]]]:
    """The contexts that are prefixes of no other, each with the indices of its prefixes.

    Args:
        contexts: token ids, possibly equal, possibly empty.

    Returns:
        Pairs of a root and the indices of all contexts computed with it; each index once.
    """
    order = sorted(range(len(contexts)), key=lambda i: contexts[i])
    found: list[tuple[tuple[int, ...], list[int]]] = []
    # In lexicographic order, whatever begins with a context comes directly after it.
    for index in reversed(order):
        context = contexts[index]
        if found and found[-1][0][: len(context)] == context:
            found[-1][1].append(index)
        else:
            found.append((context, [index]))
    return found


def batches(lengths: Sequence[int], max_rows: int, max_tokens: int) -> list[list[int]]:
    """Cut a sequence into runs of at most so many rows and rows x longest; at least one row each.

    Args:
        lengths: of the rows, in the order in which they are to run.
        max_rows: most rows of a run.
        max_tokens: most rows x longest row of a run of several rows.

    Returns:
        Indices of each run.
    """
    runs: list[list[int]] = []
    longest = 0
    for index, length in enumerate(lengths):
        rows = len(runs[-1]) + 1 if runs else 0
        longest = max(longest, length)
        if runs and rows <= max_rows and rows * longest <= max_tokens:
            runs[-1].append(index)
        else:
            runs.append([index])
            longest = length
    return runs
