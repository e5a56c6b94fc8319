from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from gsm_compose.balancing import quantile_edges, rebalance
from gsm_compose.matching import draw, maximum_matching, shuffled

graphs = st.lists(st.lists(st.integers(0, 4), max_size=5, unique=True), max_size=6)


def largest(edges: list[list[int]], capacity: list[int]) -> int:
    """Size of a maximum matching by trying everything."""
    best = 0
    for choice in itertools.product(*[[None, *partners] for partners in edges]):
        used = [c for c in choice if c is not None]
        if all(used.count(right) <= capacity[right] for right in used):
            best = max(best, len(used))
    return best


@given(graphs, st.lists(st.integers(0, 2), min_size=5, max_size=5))
def test_size_is_the_maximum_by_brute_force(edges: list[list[int]], capacity: list[int]) -> None:
    partner = maximum_matching(edges, capacity)
    used = [p for p in partner if p is not None]
    assert all(p is None or p in edges[i] for i, p in enumerate(partner))
    assert all(used.count(right) <= capacity[right] for right in range(5))
    assert len(used) == largest(edges, capacity)


@given(st.integers(0, 10_000), st.floats(0.02, 0.3))
def test_size_is_scipys_on_larger_graphs(seed: int, density: float) -> None:
    matrix = np.random.default_rng(seed).random((40, 30)) < density
    edges = [list(map(int, np.flatnonzero(line))) for line in matrix]
    theirs = maximum_bipartite_matching(csr_matrix(matrix), perm_type="column")
    ours = maximum_matching(edges, [1] * 30)
    assert sum(p is not None for p in ours) == int((theirs >= 0).sum())


def test_an_order_depends_on_names_and_seed_and_not_on_positions() -> None:
    names = [f"row {i}" for i in range(50)]
    order = [names[i] for i in shuffled(names, 3, "test")]
    again = [names[::-1][i] for i in shuffled(names[::-1], 3, "test")]
    assert order == again != names
    assert order != [names[i] for i in shuffled(names, 4, "test")]
    assert draw(0, "a", "b", 1000) == 670
    assert {draw(s, "a", "b", 3) for s in range(40)} == {0, 1, 2}


@given(st.integers(0, 1000))
def test_balancing_keeps_capacities_and_does_not_worsen_the_histogram(seed: int) -> None:
    rng = np.random.default_rng(seed)
    originals = [int(v) for v in rng.integers(1, 200, 80)]
    partners = [[int(v) for v in rng.integers(0, 12, 4)] for _ in range(15)]
    answers = [[int(v) for v in rng.integers(1, 300, 4)] for _ in range(15)]
    chosen = [0] * 15
    used = [sum(p[0] == right for p in partners) for right in range(12)]
    spare = [int(v) for v in rng.integers(0, 3, 12)]
    better = rebalance(answers, partners, chosen, spare, originals)
    after = [
        sum(p[k] == right for p, k in zip(partners, better, strict=True)) for right in range(12)
    ]
    assert all(a <= u + s for a, u, s in zip(after, used, spare, strict=True))

    def distance(options: list[int]) -> float:
        edges = quantile_edges(originals)
        now = np.bincount(
            np.searchsorted(edges, [a[k] for a, k in zip(answers, options, strict=True)], "right"),
            minlength=len(edges) + 1,
        )
        want = np.bincount(np.searchsorted(edges, originals, "right"), minlength=len(edges) + 1)
        return float(((now - want * 15 / 80) ** 2).sum())

    assert distance(better) <= distance(chosen) + 1e-9
