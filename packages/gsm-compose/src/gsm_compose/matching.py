"""Maximum matching of questions to questions, the same on every machine.

A matching from a library depends on its version, and a benchmark must not: the file that a seed
gives has to be the same in ten years. Hence these few lines, which the tests hold against SciPy's
size and against brute force.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence


def maximum_matching(edges: Sequence[Sequence[int]], capacity: Sequence[int]) -> list[int | None]:
    """Match as many left vertices as possible.

    Args:
        edges: for each left vertex its right neighbours, in the order of preference.
        capacity: for each right vertex how many left vertices it may take.

    Returns:
        For each left vertex its partner, or None. Left vertices are tried in order, each once: by
        Berge's theorem a vertex that no augmenting path reaches now is reached by none later.
    """
    partner: list[int | None] = [None] * len(edges)
    taken: list[list[int]] = [[] for _ in capacity]
    for root in range(len(edges)):
        _augment(root, edges, capacity, partner, taken)
    return partner


def _augment(
    root: int,
    edges: Sequence[Sequence[int]],
    capacity: Sequence[int],
    partner: list[int | None],
    taken: list[list[int]],
) -> None:
    """Breadth-first search for a shortest augmenting path from `root`, and its application."""
    came_from: dict[int, int] = {}  # right vertex → left vertex that reached it
    queue = deque([root])
    while queue:
        left = queue.popleft()
        for right in edges[left]:
            if right in came_from:
                continue
            came_from[right] = left
            if len(taken[right]) < capacity[right]:
                _apply(root, right, came_from, partner, taken)
                return
            queue.extend(taken[right])


def _apply(
    root: int,
    free: int,
    came_from: dict[int, int],
    partner: list[int | None],
    taken: list[list[int]],
) -> None:
    right: int | None = free
    while right is not None:
        left = came_from[right]
        before = partner[left]
        if before is not None:
            taken[before].remove(left)
        partner[left] = right
        taken[right].append(left)
        right = before if left != root else None


def shuffled(names: Sequence[str], seed: int, purpose: str) -> list[int]:
    """Positions of `names` in an order that depends on the seed and the names only."""
    keys = [hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest() for name in names]
    return sorted(range(len(names)), key=lambda i: keys[i])


def draw(seed: int, purpose: str, name: str, below: int) -> int:
    """A whole number from 0 to `below` − 1 that depends on the arguments only."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % below
