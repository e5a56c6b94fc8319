from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gsm_compose.comparison import compare, compare_all
from gsm_compose.errors import StatisticsError
from gsm_compose.gap import gap_report
from gsm_compose.items import Item
from gsm_compose.outcomes import CATEGORIES, Outcomes, classify
from gsm_compose.simulate import Pairing, SimulatedReasoner
from gsm_compose.stats import Interval, mcnemar

REASONER = SimulatedReasoner(
    e1=0.2, e2=0.3, distraction=0.1, second_hop=0.1, ignore_x=0.05, lucky=0.1, context=0.1,
    code=0.3, unparsable=0.05, difficulty=0.7,
)  # fmt: skip
INTERVALS = (
    "s1", "s2", "s_comp", "delta", "delta_paired", "relative", "c1", "cf_given_c1", "distraction",
    "second_hop", "distraction_term", "second_hop_term", "lucky",
)  # fmt: skip


def made(q1, q2, c1, cf, **others) -> Outcomes:
    """Outcomes of items that share nothing."""
    c1, cf = np.asarray(c1, bool), np.asarray(cf, bool)
    n = len(c1)
    category = np.select([cf & c1, cf, c1], ["correct", "lucky", "wrong Q2"], "wrong X")
    ids = np.array([f"i{k}" for k in range(n)])
    q1_ids, q2_ids = np.char.add("a", ids), np.char.add("b", ids)
    solo = np.asarray(q1, bool), np.asarray(q2, bool)
    return Outcomes(ids, q1_ids, q2_ids, *solo, c1, cf, category, **others)


# The taxonomy. UNICORNS → LOCKERS has x = 6, gold = 48, ignored = 40.


@pytest.mark.parametrize(
    ("q1", "final", "error", "expected"),
    [
        (6, 48, None, "correct"),
        (6, 48, "exception", "correct"),
        (9, 48, None, "lucky"),
        (None, 48, None, "lucky"),
        (6, 50, None, "wrong Q2"),
        (9, 72, None, "wrong X"),
        (None, 72, None, "wrong X"),
        (6, 40, None, "X ignored"),
        (9, 40, None, "X ignored"),
        (None, 40, None, "X ignored"),
        (6, 6, None, "answered X"),
        (9, 6, None, "answered X"),
        (48, 6, None, "swapped"),
        (48, 40, None, "X ignored"),
        (6, None, None, "unparsable"),
        (None, None, None, "unparsable"),
        (6, None, "timeout", "execution error"),
        (None, None, "no function", "execution error"),
    ],
)
def test_an_answer_has_the_first_category_that_applies(items, q1, final, error, expected):
    as_fraction = [None if value is None else Fraction(value) for value in (q1, final)]
    assert classify(items[0], *as_fraction, error) == expected


def test_answers_need_not_be_whole_numbers(items):
    assert classify(items[0], Fraction(6), Fraction(81, 2)) == "wrong Q2"
    assert classify(items[0], Fraction(13, 2), Fraction(52)) == "wrong X"


def test_ignoring_x_comes_before_answering_x_where_both_have_one_number(items):
    # 10 birds stay; let the cards' original answer be 10 as well.
    birds, cards = items[2].hops
    item = Item("test", "chain", (birds, replace(cards, old_answer=10)), (0, 1))
    assert item.x == item.ignored == 10
    assert classify(item, Fraction(10), Fraction(10)) == "X ignored"
    assert classify(item, Fraction(item.gold), Fraction(10)) == "swapped"


def test_x_of_a_longer_chain_is_the_first_hops_answer(items):
    longer = Item("test", "chain", (items[0].hops[0], *items[1].hops), (0, 1, 2))
    assert (longer.x, longer.gold, longer.ignored) == (6, 6, 10)
    assert classify(longer, Fraction(6), Fraction(12)) == "wrong Q2"
    assert classify(longer, Fraction(5), Fraction(12)) == "wrong X"
    assert classify(longer, Fraction(6), Fraction(10)) == "X ignored"


@given(
    st.one_of(st.none(), st.integers(0, 60)),
    st.one_of(st.none(), st.integers(0, 60)),
    st.sampled_from([None, "timeout"]),
)
def test_categories_agree_with_the_terms_of_the_gap(benchmark, q1, final, error):
    for item in benchmark:
        found = classify(item, q1, final, error)
        assert found in CATEGORIES
        assert (found == "correct") == (final == item.gold and q1 == item.x)
        assert (found == "lucky") == (final == item.gold and q1 != item.x)


# Identities


@given(hnp.arrays(bool, st.tuples(st.integers(1, 60), st.just(4))))
def test_the_three_terms_add_up_to_the_gap(table):
    report = gap_report(made(*table.T))
    terms = (report.distraction_term, report.second_hop_term, report.lucky)
    assert abs(sum(term.value for term in terms) - report.delta.value) < 1e-12
    q1, q2, c1, cf = table.T.astype(float)
    assert report.delta.value == pytest.approx(cf.mean() - q1.mean() * q2.mean(), abs=1e-12)
    assert report.delta_paired.value == pytest.approx((cf - q1 * q2).mean(), abs=1e-12)
    if c1.any():
        b = cf[c1 == 1].mean()
        expected = c1.mean() * (b - q2.mean())
        assert report.second_hop_term.value == pytest.approx(expected, abs=1e-12)
        assert report.second_hop.value == pytest.approx(b - q2.mean(), abs=1e-12)


@given(hnp.arrays(bool, st.tuples(st.integers(2, 60), st.just(4))))
def test_every_interval_holds_its_estimate_and_has_a_width(table):
    report = gap_report(made(*table.T))
    for name in INTERVALS:
        interval = getattr(report, name)
        if interval is not None:
            assert interval.low <= interval.value <= interval.high
            assert interval.low < interval.high


def test_no_gap_where_composing_costs_nothing():
    # a = S1 = 1/2, b = S2 = 1/2, l = 0.
    report = gap_report(made([1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]))
    assert report.delta.value == report.distraction.value == report.lucky.value == 0
    assert report.second_hop is not None
    assert report.second_hop.value == 0


@given(st.integers(1, 40), st.integers(0, 40))
def test_questions_solved_together_give_a_gap_that_is_none(right, wrong):
    solved = np.arange(right + wrong) < right
    report = gap_report(made(solved, solved, solved, solved))
    p = right / (right + wrong)
    assert report.delta.value == pytest.approx(p - p**2, abs=1e-12)
    assert report.delta_paired.value == 0


def test_all_right_leaves_no_gap_but_some_doubt():
    ones = np.ones(100)
    report = gap_report(made(ones, ones, ones, ones))
    assert report.delta == Interval(0.0, -report.delta.high, report.delta.high)
    assert 0.02 < report.delta.high < 0.04
    assert report.s_comp.high == 1
    assert 0.95 < report.s_comp.low < 1
    assert report.taxonomy["correct"] == 1


def test_all_wrong_says_what_cannot_be_known():
    zeros = np.zeros(100)
    report = gap_report(made(zeros, zeros, zeros, zeros, code=np.zeros(100, bool)))
    assert report.delta.value == report.second_hop_term.value == 0
    assert report.relative is report.second_hop is report.cf_given_c1 is None
    assert report.code_relative is None
    assert [note.split(":")[0] for note in report.notes] == [
        "S1·S2 is zero",
        "no first answer is right within a composition",
        "S_comp is zero",
    ]
    assert all(note in report.summary() for note in report.notes)


# What the report has


def test_conditions_that_were_not_asked_are_none():
    report = gap_report(made([1, 0, 1], [1, 1, 0], [1, 0, 1], [1, 0, 0]))
    assert report.leakage is report.independent_context is report.code is None
    assert report.code_gain is report.code_relative is report.delta_parsable is None
    assert report.n_parsable is report.without_excluded is None
    assert report.unparsable == {}
    assert report.notes == ()


def test_other_conditions_are_compared_with_the_right_ones():
    outcomes = REASONER.outcomes(400)
    report = gap_report(outcomes)
    assert report.independent_context.value == pytest.approx(
        outcomes.independent.mean() - outcomes.q2.mean()
    )
    assert report.code.value == pytest.approx(outcomes.code.mean())
    assert report.code_gain.value == pytest.approx(outcomes.code.mean() - outcomes.cf.mean())
    assert report.code_relative.value == pytest.approx(
        outcomes.code.mean() / outcomes.cf.mean() - 1
    )
    assert report.leakage.original.value == pytest.approx(outcomes.original_q2.mean())
    assert report.leakage.difference.value == pytest.approx(
        outcomes.original_q2.mean() - outcomes.q2.mean()
    )
    assert report.leakage.test == mcnemar(outcomes.original_q2, outcomes.q2)


def test_leakage_counts_a_row_that_is_used_again_once():
    outcomes = REASONER.outcomes(Pairing.reused(200))
    test = gap_report(outcomes).leakage.test
    assert test == mcnemar(outcomes.original_q2, outcomes.q2, outcomes.q2_ids)
    assert test.p_exact > mcnemar(outcomes.original_q2, outcomes.q2).p_exact


def test_answers_without_a_number_are_told_apart():
    outcomes = REASONER.outcomes(500)
    report = gap_report(outcomes)
    readable = outcomes.take(outcomes.parsable)
    assert report.n_parsable == len(readable) < 500
    assert report.delta_parsable == gap_report(readable).delta
    assert report.unparsable == outcomes.unparsable
    assert report.taxonomy["unparsable"] == outcomes.unparsable["compositional"] > 0
    assert sum(report.taxonomy.values()) == pytest.approx(1)


def test_no_readable_answer_at_all_is_said():
    zeros = np.zeros(30, bool)
    report = gap_report(made(zeros, zeros, zeros, zeros, parsable=zeros))
    assert report.n_parsable == 0
    assert report.delta_parsable is None
    assert "no item has answers that could be read under all three conditions" in report.notes


@pytest.mark.parametrize("method", ["multiway", "bootstrap"])
def test_excluded_items_and_rows_are_left_out_of_a_second_report(method):
    outcomes = REASONER.outcomes(Pairing.reused(120))
    item, row = outcomes.item_ids[3], outcomes.q2_ids[50]
    report = gap_report(outcomes, exclude=[item, row, "no such row"], method=method)
    left = (outcomes.item_ids != item) & (outcomes.q2_ids != row)
    assert report.excluded == (~left).sum() == 3
    assert report.without_excluded == gap_report(outcomes.take(left), method=method)
    assert replace(report, without_excluded=None, excluded=0) == gap_report(outcomes, method=method)
    assert "without 3 excluded items" in report.summary()


def test_excluding_everything_is_refused():
    outcomes = REASONER.outcomes(5)
    with pytest.raises(StatisticsError, match="all are excluded"):
        gap_report(outcomes, exclude=outcomes.item_ids.tolist())


def test_the_order_of_items_is_of_no_account():
    outcomes = REASONER.outcomes(Pairing.reused(90, rows=100))
    turned = outcomes.take(np.random.default_rng(0).permutation(90))
    first, second = gap_report(outcomes), gap_report(turned)
    for name in INTERVALS:
        a, b = getattr(first, name), getattr(second, name)
        assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high))


def test_both_methods_estimate_the_same_and_nearly_agree_on_the_interval():
    outcomes = REASONER.outcomes(Pairing.reused(1200))
    linear, drawn = gap_report(outcomes), gap_report(outcomes, method="bootstrap", seed=3)
    assert drawn == gap_report(outcomes, method="bootstrap", seed=3)
    for name in (*INTERVALS, "code", "code_gain", "independent_context"):
        a, b = getattr(linear, name), getattr(drawn, name)
        assert a.value == pytest.approx(b.value)
        assert (a.low, a.high) == pytest.approx((b.low, b.high), abs=0.004)


def test_settings_that_mean_nothing_are_refused():
    outcomes = REASONER.outcomes(30)
    with pytest.raises(StatisticsError, match=r"method: expected .* got 'percentile'"):
        gap_report(outcomes, method="percentile")
    with pytest.raises(StatisticsError, match=r"level: expected .* got 95"):
        gap_report(outcomes, level=95)
    with pytest.raises(StatisticsError, match="resamples: expected at least 1, got 0"):
        gap_report(outcomes, resamples=0, method="bootstrap")


def test_a_higher_level_is_wider():
    outcomes = REASONER.outcomes(200)
    narrow, wide = gap_report(outcomes, level=0.8), gap_report(outcomes, level=0.99)
    for name in INTERVALS:
        assert getattr(wide, name).low < getattr(narrow, name).low
        assert getattr(wide, name).high > getattr(narrow, name).high


def test_the_report_survives_json():
    report = gap_report(REASONER.outcomes(60), exclude=["item-000001"])
    values = report.to_dict()
    assert json.loads(json.dumps(values)) == json.loads(json.dumps(values, allow_nan=False))
    assert values["delta"] == {
        "value": report.delta.value,
        "low": report.delta.low,
        "high": report.delta.high,
    }
    assert values["without_excluded"]["n"] == 59


def test_the_summary_has_every_estimate_that_was_made():
    report = gap_report(REASONER.outcomes(60))
    lines = report.summary().splitlines()
    assert lines[0] == "60 items, 95% intervals (multiway)"
    line = next(line for line in lines if line.startswith("Δ = S_comp"))
    assert f"{report.delta.value:.3f}" in line
    assert f"[{report.delta.low:6.3f}, {report.delta.high:6.3f}]" in line
    for words in ("leakage", "code", "unrelated", "lucky", "X ignored", "original-q2"):
        assert words in report.summary()
    bare = gap_report(made([1, 0], [1, 1], [1, 0], [1, 0])).summary()
    assert "leakage" not in bare
    assert "code" not in bare


# Outcomes


def test_outcomes_that_contradict_themselves_are_refused():
    good = REASONER.outcomes(5)
    with pytest.raises(StatisticsError, match=r"q2: expected one value .* got shape \(4,\)"):
        replace(good, q2=good.q2[:4])
    with pytest.raises(StatisticsError, match="cf: expected booleans, got float64"):
        replace(good, cf=good.cf.astype(float))
    with pytest.raises(StatisticsError, match="some occur twice"):
        replace(good, item_ids=np.array(["a", "a", "b", "c", "d"]))
    with pytest.raises(StatisticsError, match="'correct' where c1 and cf"):
        replace(good, cf=~good.cf)
    with pytest.raises(StatisticsError, match="nonsense"):
        replace(good, category=np.where(good.cf, good.category, "nonsense"))
    with pytest.raises(StatisticsError, match="at least one"):
        good.take(np.zeros(5, bool))


# Two models


def test_a_model_does_not_differ_from_itself():
    outcomes = REASONER.outcomes(100)
    found = compare(outcomes, outcomes)
    assert found.delta.value == found.delta_paired.value == found.s_comp.value == 0
    assert found.p == found.p_holm == 1


def test_comparing_uses_the_items_by_name_and_turns_round():
    pairing = Pairing.reused(150)
    first = REASONER.outcomes(pairing)
    second = replace(REASONER, second_hop=0.4, seed=1).outcomes(pairing)
    there = compare(first, second, names=("a", "b"))
    turned = second.take(np.random.default_rng(1).permutation(150))
    assert compare(first, turned, names=("a", "b")) == there
    back = compare(second, first)
    assert back.p == pytest.approx(there.p)
    assert (back.delta.low, back.delta.high) == pytest.approx((-there.delta.high, -there.delta.low))
    expected = gap_report(first).delta.value - gap_report(second).delta.value
    assert there.delta.value == pytest.approx(expected)


def test_comparing_by_item_is_sharper_than_two_intervals():
    pairing = Pairing.distinct(1000)
    first = REASONER.outcomes(pairing)
    mended = first.cf | (np.arange(1000) % 50 == 0)
    category = np.where(mended & ~first.cf, np.where(first.c1, "correct", "lucky"), first.category)
    second = replace(first, cf=mended, category=category)
    found = compare(second, first)
    assert found.delta.value == pytest.approx((second.cf & ~first.cf).mean())
    assert found.p < 0.001
    apart = gap_report(first).delta
    assert found.delta.high - found.delta.low < 0.3 * (apart.high - apart.low)


def test_many_comparisons_are_adjusted_together():
    pairing = Pairing.distinct(300)
    models = {f"m{k}": replace(REASONER, seed=k).outcomes(pairing) for k in range(3)}
    models["gap"] = replace(REASONER, second_hop=0.6, seed=9).outcomes(pairing)
    found = compare_all(models)
    assert [c.names for c in found][:3] == [("m0", "m1"), ("m0", "m2"), ("m0", "gap")]
    assert len(found) == 6
    smallest = min(found, key=lambda c: c.p)
    assert "gap" in smallest.names
    assert smallest.p_holm == pytest.approx(6 * smallest.p)
    assert all(c.p_holm >= c.p for c in found)
    with pytest.raises(StatisticsError, match="at least two models, got 1"):
        compare_all({"m0": models["m0"]})


def test_models_with_other_items_are_not_compared():
    first = REASONER.outcomes(20)
    with pytest.raises(StatisticsError, match="got other items"):
        compare(first, REASONER.outcomes(21))
    with pytest.raises(StatisticsError, match="same rows"):
        compare(first, replace(first, q2_ids=first.q1_ids))
