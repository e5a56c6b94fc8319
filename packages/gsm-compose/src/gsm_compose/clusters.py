"""Items that have questions in common: who belongs together, and what it does to a variance.

Labels of clusters are given as one array per role (first question, second question); the same label
in two roles is the same row of GSM8K.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gsm_compose.errors import StatisticsError

Codes = list[NDArray[np.intp]]


def label_codes(clusters: Sequence[ArrayLike], n: int) -> Codes:
    """Labels as numbers (n,) per role, equal where labels are, across roles too.

    Raises:
        StatisticsError: no array, or one that is not of shape (n,).
    """
    arrays = [np.asarray(labels) for labels in clusters]
    if not arrays or any(labels.shape != (n,) for labels in arrays):
        raise StatisticsError(
            f"clusters: expected arrays of n = {n} labels, got shapes "
            f"{[labels.shape for labels in arrays]}."
        )
    codes = np.unique(np.concatenate(arrays), return_inverse=True)[1]
    return list(codes.reshape(len(arrays), n))


def fewest_labels(roles: Codes) -> int:
    """Number of different labels in the role that has fewest."""
    return min(len(np.unique(role)) for role in roles)


def joined_groups(roles: Codes) -> NDArray[np.intp]:
    """Group (n,) of each item, numbered from 0.

    Items with a common label in the same role are in one group, directly or through others: the
    connected components of the graph of items and labels.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(roles[0])
    span = 1 + max(int(role.max()) for role in roles)
    nodes = np.concatenate([n + number * span + role for number, role in enumerate(roles)])
    items = np.tile(np.arange(n), len(roles))
    size = n + span * len(roles)
    graph = coo_array((np.ones(len(nodes)), (items, nodes)), shape=(size, size))
    labels = connected_components(graph, directed=False)[1][:n]
    groups: NDArray[np.intp] = np.unique(labels, return_inverse=True)[1]
    return groups


def shared_variances(influences: NDArray[np.float64], roles: Codes) -> NDArray[np.float64]:
    """Variances (k,) of k means whose items have influences ψ (k, n): Σ ψ_i ψ_j / n².

    The sum is over related pairs (i, j): those with a label in common in any of the one or two
    roles, and i = j. It may be too small by chance, or negative: the same sum over pairs that have
    one in *one* role, and over i = j alone, are taken instead where they are larger. All are
    multiplied by K / (K − 1) for K labels in the role with fewest.

    Raises:
        StatisticsError: there are neither one nor two roles.
    """
    if len(roles) not in (1, 2):
        raise StatisticsError(f"clusters: expected one or two arrays, got {len(roles)}.")

    def squared_sums(*codes: NDArray[np.intp]) -> list[float]:
        size = 1 + max(int(code.max()) for code in codes)
        sums = [
            sum(np.bincount(code, weights=psi, minlength=size) for code in codes)
            for psi in influences
        ]
        return [float(np.dot(s, s)) for s in sums]

    items = np.arange(influences.shape[1])
    candidates = np.array([squared_sums(code) for code in (items, *roles)])
    if len(roles) == 2:
        low, high = np.minimum(*roles), np.maximum(*roles)
        both = np.unique(low * (high.max() + 1) + high, return_inverse=True)[1]
        # A pair that shares one row is counted once; one that shares both (as i = j does), twice.
        shared = np.array(squared_sums(*roles)) - squared_sums(both)
        candidates = np.vstack([candidates, shared])
    labels = fewest_labels(roles)
    correction = labels / (labels - 1) if labels > 1 else 1.0
    variances: NDArray[np.float64] = candidates.max(axis=0) / len(items) ** 2 * correction
    return variances
