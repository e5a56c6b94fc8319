"""The nodes of a finite token tree, numbered, and the ways through it.

First come the internal nodes, by depth, with the root as 0; then the leaves, by depth. "Over
nodes" is an array in this order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from vineppo.errors import InvalidInputError, at_least

Ints = npt.NDArray[np.int64]

NOTHING: Final = -1
"""Where a path has ended: no token, no node."""

_MOST_LEAVES: Final = 1 << 20


@dataclass(frozen=True, eq=False)
class TreeShape:
    """The nodes of a tree, whatever its policy and rewards.

    Attributes:
        vocabulary: tokens 0 .. vocabulary - 1 can follow wherever a response has not ended.
        horizon: tokens after which every response has ended.
        end_token: ends a response wherever it comes; None: all responses are ``horizon`` long.

    Raises:
        InvalidInputError: fewer than 2 tokens or 1 step, an end token that is no token, or a tree
            of more than a million leaves.
    """

    vocabulary: int
    horizon: int
    end_token: int | None = None

    def __post_init__(self) -> None:
        at_least("vocabulary", self.vocabulary, 2)
        at_least("horizon", self.horizon, 1)
        if self.end_token is not None and not 0 <= self.end_token < self.vocabulary:
            raise InvalidInputError(
                f"end_token: expected None or a token from 0 to {self.vocabulary - 1}, "
                f"got {self.end_token}"
            )
        branches = self.vocabulary - (self.end_token is not None)
        if self.horizon * math.log(branches) + math.log(self.vocabulary) > math.log(_MOST_LEAVES):
            raise InvalidInputError(
                f"horizon: expected a tree of at most {_MOST_LEAVES} leaves, got {self.horizon} "
                f"with {self.vocabulary} tokens; all of them are enumerated"
            )

    @cached_property
    def levels(self) -> list[slice]:
        """The internal nodes of each depth, which lie side by side."""
        branches = self.vocabulary - (self.end_token is not None)
        borders = np.cumsum([0, *(branches**depth for depth in range(self.horizon))]).tolist()
        return [slice(low, high) for low, high in pairwise(borders)]

    @property
    def internal(self) -> int:
        """How many nodes are internal."""
        return int(self.levels[-1].stop)

    @cached_property
    def children(self) -> Ints:
        """[internal, vocabulary]: the node that each token leads to."""
        found = np.empty((self.internal, self.vocabulary), dtype=np.int64)
        leaf = self.internal
        for depth, level in enumerate(self.levels):
            ends = np.full(found[level].shape, depth + 1 == self.horizon)
            if self.end_token is not None:
                ends[:, self.end_token] = True
            found[level][~ends] = level.stop + np.arange((~ends).sum())
            found[level][ends] = leaf + np.arange(ends.sum())
            leaf += int(ends.sum())
        return found

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return 1 + self.children.size

    @property
    def leaves(self) -> int:
        """How many of them are leaves."""
        return self.nodes - self.internal

    @cached_property
    def parents(self) -> Ints:
        """[nodes]: the node before; that of the root is ``NOTHING``."""
        found = np.full(self.nodes, NOTHING)
        found[self.children] = np.arange(self.internal)[:, None]
        return found

    @cached_property
    def last_tokens(self) -> Ints:
        """[nodes]: the token that leads to each; to the root none does (``NOTHING``)."""
        found = np.full(self.nodes, NOTHING)
        found[self.children] = np.arange(self.vocabulary)
        return found

    @cached_property
    def depths(self) -> Ints:
        """[nodes]: tokens from the root."""
        found = np.zeros(self.nodes, dtype=np.int64)
        for depth, level in enumerate(self.levels):
            found[self.children[level]] = depth + 1
        return found

    @cached_property
    def paths(self) -> Ints:
        """[leaves, horizon + 1]: the nodes on the way to each leaf, then ``NOTHING``."""
        found = np.full((self.leaves, self.horizon + 1), NOTHING)
        node = np.arange(self.internal, self.nodes)
        depth = self.depths[node]
        rows = np.arange(self.leaves)
        while len(rows):
            found[rows, depth] = node
            node, depth = self.parents[node], depth - 1
            rows, node, depth = (x[depth >= 0] for x in (rows, node, depth))
        return found

    @cached_property
    def tokens(self) -> Ints:
        """[leaves, horizon]: the response that ends in each leaf, then ``NOTHING``."""
        after = self.paths[:, 1:]
        return np.where(after == NOTHING, NOTHING, self.last_tokens[after])
