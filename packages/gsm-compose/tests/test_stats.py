from __future__ import annotations

import itertools
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from gsm_compose.clusters import joined_groups, label_codes, shared_variances
from gsm_compose.errors import StatisticsError
from gsm_compose.stats import (
    Interval,
    clustered_bootstrap,
    clustered_rate,
    holm,
    mcnemar,
    multiway_estimates,
    paired_bootstrap,
    wilson,
)

LABELS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=14)


def mean(m):
    return {"mean": m["x"]}


# Wilson


@given(st.integers(1, 300), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_ends_are_where_the_score_test_just_rejects(n, share, level):
    k = round(share * n)
    z = NormalDist().inv_cdf((1 + level) / 2)
    interval = wilson(k, n, level)
    for end in (interval.low, interval.high):
        distance = abs(k / n - end)
        assert distance == pytest.approx(z * np.sqrt(end * (1 - end) / n), abs=1e-9)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1


def test_wilson_of_none_and_all_is_not_a_point():
    assert wilson(0, 100) == Interval(0.0, 0.0, pytest.approx(0.0370, abs=1e-4))
    assert wilson(100, 100) == Interval(1.0, pytest.approx(0.9630, abs=1e-4), 1.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((5, 4), "5 of 4"), ((-1, 4), "-1 of 4"), ((0, 0), "0 of 0"), ((1, 2, 1.0), "level")],
)
def test_wilson_refuses_impossible_counts(arguments, words):
    with pytest.raises(StatisticsError, match=words):
        wilson(*arguments)


# McNemar


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_mcnemar_of_independent_items_is_the_sign_test_of_discordant_pairs(pairs):
    first, second = np.array(pairs).T
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (b, c)
    if b + c == 0:
        assert found.p_exact == found.p_mid == 1
        return
    expected = scipy_stats.binomtest(b, b + c, 0.5).pvalue
    assert found.p_exact == pytest.approx(expected)
    if b != c:
        at = scipy_stats.binom.pmf(min(b, c), b + c, 0.5)
        assert found.p_mid == pytest.approx(expected - at)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), min_size=1, max_size=12)
)
def test_mcnemar_of_clusters_counts_all_changes_of_sign(rows):
    labels, first, second = (np.array(column) for column in zip(*rows, strict=True))
    difference = first.astype(int) - second.astype(int)
    sums = [difference[labels == label].sum() for label in np.unique(labels)]
    seen = abs(sum(sums))
    signs = list(itertools.product((-1, 1), repeat=len(sums)))
    totals = [abs(sum(s * d for s, d in zip(sign, sums, strict=True))) for sign in signs]
    found = mcnemar(first, second, labels)
    assert found.p_exact == pytest.approx(sum(t >= seen for t in totals) / len(totals))


def test_mcnemar_takes_an_item_that_is_repeated_as_one():
    first, second = np.array([1, 1, 1, 0, 0], bool), np.array([0, 0, 0, 1, 0], bool)
    labels = np.arange(5)
    once = mcnemar(first, second, labels)
    twice = mcnemar(np.tile(first, 2), np.tile(second, 2), np.tile(labels, 2))
    assert twice.p_exact == once.p_exact > mcnemar(np.tile(first, 2), np.tile(second, 2)).p_exact


def test_mcnemar_stays_exact_for_thousands_of_pairs():
    first = np.arange(3000) < 1600
    expected = scipy_stats.binomtest(1600, 3000, 0.5).pvalue
    assert mcnemar(first, ~first).p_exact == pytest.approx(expected)


def test_mcnemar_refuses_arrays_of_different_lengths():
    with pytest.raises(StatisticsError, match=r"\(3,\) and \(2,\)"):
        mcnemar(np.ones(3), np.ones(2))


# Holm


def test_holm_of_a_worked_example():
    # Ordered: 4·0.005, 3·0.01, 2·0.03, and 1·0.04 which may not be below its forerunner.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.999))
def test_holm_rejects_as_the_step_down_procedure_does(p, alpha):
    rejected = set()
    for step, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if (len(p) - step) * p[index] > alpha:
            break
        rejected.add(index)
    adjusted = holm(p)
    # Equal p-values are rejected together or not at all, whatever their order.
    assert {p[i] for i in np.flatnonzero(adjusted <= alpha)} == {p[i] for i in rejected}
    assert (adjusted >= np.array(p)).all()


def test_holm_refuses_what_is_not_a_probability():
    with pytest.raises(StatisticsError, match="p_values"):
        holm([0.1, float("nan")])


# Clusters


@given(LABELS, st.randoms(use_true_random=False))
def test_shared_variance_is_the_sum_over_all_pairs_with_a_common_row(labels, random):
    labels = [(a, b) for a, b in labels if a != b] or [(0, 1)]
    psi = np.array([random.uniform(-1, 1) for _ in labels])
    n, columns = len(labels), list(zip(*labels, strict=True))

    def summed(related):
        return sum(
            psi[i] * psi[j] for i in range(n) for j in range(n) if related(labels[i], labels[j])
        )

    candidates = [
        float(psi @ psi),
        summed(lambda a, b: a[0] == b[0]),
        summed(lambda a, b: a[1] == b[1]),
        summed(lambda a, b: bool(set(a) & set(b))),
    ]
    fewest = min(len(set(column)) for column in columns)
    factor = fewest / (fewest - 1) if fewest > 1 else 1
    found = shared_variances(psi[None], label_codes([np.array(c) for c in columns], n))
    assert found.tolist() == pytest.approx([max(candidates) / n**2 * factor])


@given(LABELS)
def test_groups_are_joined_by_questions_in_the_same_role_only(labels):
    first, second = (np.array(column) for column in zip(*labels, strict=True))
    groups = joined_groups(label_codes([first, second], len(labels)))
    reached = {frozenset([i]) for i in range(len(labels))}
    for i, j in itertools.combinations(range(len(labels)), 2):
        if first[i] == first[j] or second[i] == second[j]:
            a = next(s for s in reached if i in s)
            b = next(s for s in reached if j in s)
            reached = (reached - {a, b}) | {a | b}
    found = {frozenset(np.flatnonzero(groups == g).tolist()) for g in np.unique(groups)}
    assert found == reached


def test_labels_must_be_one_per_item():
    with pytest.raises(StatisticsError, match=r"n = 3 labels, got shapes \[\(2,\)\]"):
        clustered_rate(np.ones(3, bool), [np.arange(2)])


# Multiway intervals


def test_multiway_interval_of_a_mean_of_independent_items_is_students():
    x = np.random.default_rng(0).normal(size=50)
    found = multiway_estimates({"x": x}, mean, [np.arange(50)])["mean"].interval(0.9)
    expected = scipy_stats.ttest_1samp(x, 0).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_multiway_p_value_of_independent_items_is_students():
    x = np.random.default_rng(1).normal(0.2, size=40)
    found = multiway_estimates({"x": x}, mean, [np.arange(40)])["mean"].p_value()
    assert found == pytest.approx(scipy_stats.ttest_1samp(x, 0).pvalue)


def test_multiway_slopes_are_those_of_the_delta_method():
    rng = np.random.default_rng(2)
    x, y, z = (rng.random(60) < p for p in (0.8, 0.6, 0.5))
    columns = {"x": x, "y": y, "z": z}
    found = multiway_estimates(
        columns,
        lambda m: {"gap": m["z"] - m["x"] * m["y"], "ratio": m["z"] / m["x"]},
        [np.arange(60)],
    )
    psi = (z - z.mean()) - y.mean() * (x - x.mean()) - x.mean() * (y - y.mean())
    assert found["gap"].se == pytest.approx(psi.std(ddof=1) / np.sqrt(60))
    psi = (z - z.mean()) / x.mean() - z.mean() / x.mean() ** 2 * (x - x.mean())
    assert found["ratio"].se == pytest.approx(psi.std(ddof=1) / np.sqrt(60))


def test_repeating_every_item_in_its_cluster_tells_nothing_new():
    rng = np.random.default_rng(3)
    x, labels = rng.normal(size=40), np.arange(40)
    once = multiway_estimates({"x": x}, mean, [labels])["mean"]
    twice = multiway_estimates({"x": np.tile(x, 2)}, mean, [np.tile(labels, 2)])["mean"]
    assert twice.interval().low == pytest.approx(once.interval().low)
    once = clustered_bootstrap({"x": x}, mean, [labels], resamples=300, seed=4)["mean"]
    twice = clustered_bootstrap(
        {"x": np.tile(x, 2)}, mean, [np.tile(labels, 2)], resamples=300, seed=4
    )["mean"]
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))


def test_a_row_in_both_roles_ties_its_items_together():
    # Every row is the second question of one item and the first of the next, and items that follow
    # each other agree.
    n = 60
    rows = np.arange(n + 1)
    x = np.repeat(np.random.default_rng(5).normal(size=n // 2), 2)
    tied = multiway_estimates({"x": x}, mean, [rows[:-1], rows[1:]])["mean"]
    apart = multiway_estimates({"x": x}, mean, [rows[:-1], rows[1:] + 1000])["mean"]
    assert tied.se > 1.2 * apart.se


def test_items_that_all_agree_still_leave_doubt():
    ones = np.ones(100)
    found = multiway_estimates(
        {"x": ones, "y": ones}, lambda m: {"d": m["x"] - m["y"]}, [np.arange(100)]
    )["d"].interval()
    assert found.value == 0
    assert found.high == -found.low == pytest.approx(0.028, abs=0.001)


def test_what_is_undefined_at_the_means_has_no_estimate():
    columns = {"x": np.ones(30), "y": np.zeros(30)}
    ratio = {"columns": columns, "statistic": lambda m: {"r": m["x"] / m["y"]}}
    assert multiway_estimates(**ratio, clusters=[np.arange(30)]) == {"r": None}
    assert clustered_bootstrap(**ratio, clusters=[np.arange(30)]) == {"r": None}


def test_more_than_two_roles_are_refused():
    with pytest.raises(StatisticsError, match="one or two arrays, got 3"):
        multiway_estimates({"x": np.ones(4)}, mean, [np.arange(4)] * 3)


def test_rate_of_independent_items_is_wilsons():
    x = np.arange(80) < 23
    # The correction K / (K − 1) makes 79 items of 80.
    assert clustered_rate(x, [np.arange(80)]).value == pytest.approx(23 / 80)
    found, expected = clustered_rate(x, [np.arange(80)]), wilson(23 / 80 * 79, 79)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_rate_of_items_that_agree_in_clusters_counts_the_clusters():
    x = np.repeat(np.arange(40) < 10, 5)
    found = clustered_rate(x, [np.repeat(np.arange(40), 5)])
    expected = wilson(10 / 40 * 39, 39)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    nothing = clustered_rate(np.zeros(200, bool), [np.repeat(np.arange(40), 5)])
    assert nothing == wilson(0, 40)


# Bootstrap


def test_bootstrap_of_a_mean_agrees_with_students_interval():
    x = np.random.default_rng(6).normal(size=400)
    found = clustered_bootstrap({"x": x}, mean, [np.arange(400)], resamples=4000)["mean"]
    expected = scipy_stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_paired_bootstrap_uses_the_pairing():
    rng = np.random.default_rng(7)
    common = rng.normal(size=200)
    first, second = common + 0.1 * rng.normal(size=200), common + 0.1 * rng.normal(size=200)
    paired = paired_bootstrap(first, second)
    broken = paired_bootstrap(first, rng.permutation(second))
    assert paired.high - paired.low < 0.3 * (broken.high - broken.low)
    assert paired.value == pytest.approx(first.mean() - second.mean())


def test_paired_bootstrap_turns_round_with_its_arguments():
    rng = np.random.default_rng(8)
    first, second = rng.random(60) < 0.6, rng.random(60) < 0.5
    there, back = paired_bootstrap(first, second, seed=1), paired_bootstrap(second, first, seed=1)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there == paired_bootstrap(first, second, seed=1)
    assert there != paired_bootstrap(first, second, seed=2)


def test_paired_bootstrap_of_clusters_is_wider_where_they_agree():
    rng = np.random.default_rng(9)
    first, labels = np.repeat(rng.normal(size=50), 4), np.repeat(np.arange(50), 4)
    alone = paired_bootstrap(first, np.zeros(200))
    joined = paired_bootstrap(first, np.zeros(200), [labels])
    assert joined.high - joined.low > 1.6 * (alone.high - alone.low)


def test_few_groups_are_not_resampled():
    with pytest.raises(StatisticsError, match=r"at least 20 groups .* got 10"):
        paired_bootstrap(np.ones(100), np.zeros(100), [np.repeat(np.arange(10), 10)])


def test_bootstrap_refuses_bad_arrays_and_levels():
    with pytest.raises(StatisticsError, match="one length"):
        clustered_bootstrap({"x": np.ones(3), "y": np.ones(4)}, mean, [np.arange(3)])
    with pytest.raises(StatisticsError, match="at least one item"):
        multiway_estimates({"x": np.ones(0)}, mean, [np.arange(0)])
    with pytest.raises(StatisticsError, match=r"level: expected .* got 95"):
        paired_bootstrap(np.ones(30), np.zeros(30), level=95)
    with pytest.raises(StatisticsError, match="finite"):
        paired_bootstrap(np.full(30, np.nan), np.zeros(30))
