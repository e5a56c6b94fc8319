from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsm_compose.benchmark import Benchmark
from gsm_compose.errors import EvaluationError, StatisticsError
from gsm_compose.evaluation import evaluate
from gsm_compose.gap import gap_report
from gsm_compose.items import Hop, Item, Link
from gsm_compose.outcomes import classify
from gsm_compose.parse import extract_answer, extract_q1
from gsm_compose.prompts import CONDITIONS, PromptSpec, render
from gsm_compose.replies import NO_ANSWER, wrong_number
from gsm_compose.simulate import Pairing, SimulatedReasoner

REASONER = SimulatedReasoner(
    e1=0.15, e2=0.25, distraction=0.08, second_hop=0.12, ignore_x=0.04, lucky=0.08, context=0.05,
    code=0.2, unparsable=0.03, difficulty=0.8,
)  # fmt: skip
PROBABILITIES = [f.name for f in fields(SimulatedReasoner) if f.name != "seed"]
REASONERS = st.builds(
    SimulatedReasoner, **{name: st.floats(0, 1) for name in PROBABILITIES}, seed=st.just(0)
)
TERMS = ("delta", "delta_paired", "distraction_term", "second_hop_term", "lucky")


def values(report) -> dict[str, float]:
    """Estimates by the names of `SimulatedReasoner.expected`."""
    names = REASONER.expected().keys() - {"leakage"}
    found = {name: getattr(report, name).value for name in names}
    return found | {"leakage": report.leakage.difference.value}


def many_items(n: int) -> Benchmark:
    """Items from one pattern, every row used once."""
    items = []
    for k in range(n):
        x, per = 5 + k, 3 + k % 7
        first = f"Box {k} holds {x + 2} pens. Two are taken out. How many are left?"
        last = f"In hall {k} there are 4 rows of {per} chairs. How many chairs are there?"
        start = last.index("4 rows")
        items.append(
            Item(
                "test",
                "chain",
                (
                    Hop(f"made/first/{k}", first, first, first, (), x, x, f"It is {x}.", None),
                    Hop(
                        f"made/last/{k}",
                        last,
                        last[:start] + str(x) + last[start + 1 :],
                        last[:start] + "X" + last[start + 1 :],
                        (Link(0, start, start + 1, "4", 4),),
                        x * per,
                        4 * per,
                        f"It is {x * per}.",
                        f"def solution(x):\n    return x * {per}\n",
                    ),
                ),
                (0, 1),
            )
        )
    return Benchmark(tuple(items))


# The truth


@given(REASONERS)
def test_expected_terms_add_up(reasoner):
    truth = reasoner.expected()
    terms = truth["distraction_term"] + truth["second_hop_term"] + truth["lucky"]
    assert terms == pytest.approx(truth["delta"], abs=1e-12)
    assert sum(reasoner.expected_taxonomy().values()) == pytest.approx(1, abs=1e-12)
    assert min(reasoner.expected_taxonomy().values()) > -1e-12


@pytest.mark.parametrize(
    "reasoner",
    [
        REASONER,
        replace(REASONER, coupling=0.7, difficulty=1.0),
        SimulatedReasoner(e1=0.6, e2=0.5, second_hop=0.5, ignore_x=0.3, lucky=0.5),
        SimulatedReasoner(e1=0.3, e2=0.3, difficulty=0.5, coupling=1.0, unparsable=0.3),
    ],
)
def test_frequencies_approach_what_is_expected(reasoner):
    n = 20_000
    outcomes = reasoner.outcomes(n)
    report = gap_report(outcomes)
    truth = reasoner.expected()
    for name, value in values(report).items():
        # Five standard errors of the widest quantity, a ratio of three rates.
        assert value == pytest.approx(truth[name], abs=5 * 2 / np.sqrt(n)), name
    for name, share in reasoner.expected_taxonomy().items():
        assert report.taxonomy[name] == pytest.approx(share, abs=5 * 0.5 / np.sqrt(n)), name
    for share in outcomes.unparsable.values():
        assert share == pytest.approx(reasoner.unparsable, abs=5 * 0.5 / np.sqrt(n))


def test_a_perfect_reasoner_has_no_gap():
    truth = SimulatedReasoner(e1=0, e2=0).expected()
    assert truth["s_comp"] == 1
    assert truth["delta"] == truth["delta_paired"] == truth["relative"] == 0


@given(st.floats(0, 1))
def test_questions_of_one_difficulty_give_a_gap_that_is_none(e):
    reasoner = SimulatedReasoner(e1=e, e2=e, difficulty=1, coupling=1)
    p = 1 - e
    assert reasoner.expected()["delta"] == pytest.approx(p - p**2, abs=1e-12)
    assert reasoner.expected()["delta_paired"] == pytest.approx(0, abs=1e-12)
    outcomes = reasoner.outcomes(50)
    assert (outcomes.q1 == outcomes.q2).all()
    assert (outcomes.q1 == outcomes.cf).all()


def test_nothing_is_expected_where_nothing_is_defined():
    truth = SimulatedReasoner(e1=1).expected()
    assert truth["c1"] == 0
    assert not truth.keys() & {"relative", "cf_given_c1", "second_hop"}


# Estimators against the truth; bench/coverage.py has many more designs.


@pytest.mark.parametrize(
    ("reasoner", "pairing", "draws"),
    [
        (REASONER, Pairing.reused(1200, rows=1319), 200),
        (replace(REASONER, coupling=0.7), Pairing.reused(1200), 200),
        (replace(REASONER, difficulty=0.0), Pairing.distinct(100), 600),
    ],
    ids=["paper", "correlated", "small"],
)
def test_intervals_cover_the_truth_and_estimates_center_on_it(reasoner, pairing, draws):
    truth = reasoner.expected()
    hits = dict.fromkeys(TERMS, 0)
    sums = dict.fromkeys(TERMS, 0.0)
    for draw in range(draws):
        asked = replace(
            reasoner.outcomes(pairing, draw),
            independent=None, original_q2=None, code=None, parsable=None,
        )  # fmt: skip
        report = gap_report(asked)
        for name in TERMS:
            interval = getattr(report, name)
            hits[name] += interval.low <= truth[name] <= interval.high
            sums[name] += interval.value
    for name in TERMS:
        assert sums[name] / draws == pytest.approx(truth[name], abs=0.005), name
        assert 0.92 <= hits[name] / draws <= 0.98, name


# Determinism


def test_outcomes_do_not_depend_on_what_else_is_asked():
    pairing = Pairing.reused(80, rows=100)
    whole = REASONER.outcomes(pairing)
    order = np.random.default_rng(0).permutation(80)[:30]
    part = REASONER.outcomes(
        Pairing(pairing.item_ids[order], pairing.q1_ids[order], pairing.q2_ids[order])
    )
    for name in ("q1", "q2", "c1", "cf", "category", "independent", "original_q2", "code"):
        assert (getattr(whole, name)[order] == getattr(part, name)).all()


def test_seeds_and_draws_differ():
    first = REASONER.outcomes(200)
    assert (first.cf != REASONER.outcomes(200, draw=1).cf).any()
    assert (first.cf != replace(REASONER, seed=1).outcomes(200).cf).any()
    assert (first.cf == REASONER.outcomes(200).cf).all()


def test_outcomes_are_the_same_in_processes_with_other_hash_seeds():
    program = (
        "from gsm_compose.simulate import SimulatedReasoner as S;"
        "print(S(e1=.4, difficulty=.5).outcomes(64).q1.astype(int).tolist())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    here = SimulatedReasoner(e1=0.4, difficulty=0.5).outcomes(64).q1.astype(int).tolist()
    assert found == {f"{here}\n"}


def test_a_row_has_one_result_wherever_it_serves():
    outcomes = REASONER.outcomes(Pairing.reused(300, rows=330))
    alone = dict(zip(outcomes.q1_ids.tolist(), outcomes.q1.tolist(), strict=True))
    again = {}
    for row, old, new in zip(
        outcomes.q2_ids.tolist(), outcomes.original_q2, outcomes.q2, strict=True
    ):
        assert alone.get(row, old) == old
        assert again.setdefault(row, new) == new


# Who is paired with whom


@pytest.mark.parametrize("rows", [None, 61, 90])
def test_first_questions_serve_once_and_last_ones_as_often_as_asked(rows):
    pairing = Pairing.reused(60, uses=3, rows=rows, seed=5)
    assert len(set(pairing.q1_ids.tolist())) == len(set(pairing.item_ids.tolist())) == 60
    assert np.unique(pairing.q2_ids, return_counts=True)[1].tolist() == [3] * 20
    assert (pairing.q1_ids != pairing.q2_ids).all()
    common = set(pairing.q1_ids.tolist()) & set(pairing.q2_ids.tolist())
    assert bool(common) == (rows is not None)


def test_too_few_rows_are_refused():
    with pytest.raises(StatisticsError, match="more than n = 60"):
        Pairing.reused(60, rows=60)


def test_pairs_of_a_benchmark_are_its_rows(benchmark):
    pairing = Pairing.of(benchmark)
    assert pairing.q1_ids.tolist() == ["gsm8k/test/136", "gsm8k/test/9001", "gsm8k/test/9003"]
    assert pairing.q2_ids.tolist() == ["gsm8k/test/418", "gsm8k/test/9002", "gsm8k/test/9004"]


@pytest.mark.parametrize("name", PROBABILITIES)
def test_parameters_are_probabilities(name):
    with pytest.raises(StatisticsError, match=f"{name}: expected a probability, got 1.5"):
        SimulatedReasoner(**{name: 1.5})


def test_partners_are_coupled_only_where_each_has_one():
    coupled = replace(REASONER, coupling=0.5)
    with pytest.raises(StatisticsError, match="coupling"):
        coupled.outcomes(Pairing.reused(60, rows=70))
    pairing = Pairing.distinct(4)
    with pytest.raises(StatisticsError, match="coupling"):
        coupled.outcomes(replace(pairing, q1_ids=pairing.q1_ids[[0, 0, 1, 2]]))


# Real prompts, real texts


@pytest.mark.parametrize("spec", [PromptSpec(), PromptSpec(shots=0, preamble=False, chat=True)])
def test_an_evaluation_reads_back_what_was_simulated(spec):
    benchmark = many_items(150)
    reasoner = replace(REASONER, ignore_x=0.15, lucky=0.3, unparsable=0.1)
    conditions = [name for name in CONDITIONS if name != "code"]
    found = evaluate(
        benchmark, reasoner.generate_for(benchmark, spec), conditions, spec, progress=False
    ).outcomes()
    expected = reasoner.outcomes(benchmark)
    for name in ("item_ids", "q1", "q2", "c1", "cf", "category", "independent", "original_q2"):
        assert (getattr(found, name) == getattr(expected, name)).all(), name
    assert {name: found.unparsable[name] for name in conditions} == {
        name: expected.unparsable[name] for name in conditions
    }
    assert set(found.category.tolist()) == set(reasoner.expected_taxonomy())


def test_code_is_run_and_reads_back_what_was_simulated():
    benchmark = many_items(12)
    reasoner = SimulatedReasoner(e1=0.2, e2=0.3, code=0.3, unparsable=0.2, seed=2)
    found = evaluate(benchmark, reasoner.generate_for(benchmark), "code", progress=False)
    expected = reasoner.outcomes(benchmark)
    assert [r.correct for r in found.of("code")] == expected.code.tolist()
    assert 0 < found.unparsable("code") == pytest.approx(expected.unparsable["code"])


def test_an_evaluation_recovers_the_parameters():
    benchmark = many_items(400)
    reasoner = replace(REASONER, e1=0.2, e2=0.3, unparsable=0.0)
    report = evaluate(benchmark, reasoner.generate_for(benchmark), progress=False).gap()
    truth = reasoner.expected()
    for name in (*TERMS, "s1", "s2", "s_comp", "distraction", "second_hop"):
        interval = getattr(report, name)
        width = interval.high - interval.low
        assert interval.low - width / 2 < truth[name] < interval.high + width / 2, name


def test_texts_do_not_depend_on_batch_or_order(benchmark):
    prompts = [render(item, condition) for item in benchmark for condition in CONDITIONS]
    whole = REASONER.generate_for(benchmark)(prompts)
    apart = REASONER.generate_for(benchmark)
    assert [apart([prompt])[0] for prompt in reversed(prompts)] == whole[::-1]
    fewer = Benchmark(benchmark.items[:1])
    assert REASONER.generate_for(fewer)(prompts[: len(CONDITIONS)]) == whole[: len(CONDITIONS)]


def test_prompts_of_another_spec_are_not_known(benchmark):
    generate = REASONER.generate_for(benchmark)
    with pytest.raises(EvaluationError, match="same benchmark and spec"):
        generate([render(benchmark.items[0], "original", PromptSpec(shots=0))])


def test_ignoring_x_gives_exactly_the_answer_with_the_original_number(benchmark):
    generate = SimulatedReasoner(e1=0, e2=0, ignore_x=1).generate_for(benchmark)
    for item in benchmark:
        (text,) = generate([render(item, "compositional")])
        assert extract_answer(text) == item.ignored
        assert classify(item, extract_q1(text), extract_answer(text)) == "X ignored"


def test_texts_without_a_number_have_none():
    assert {extract_answer(text) for text in NO_ANSWER} == {None}


@given(st.integers(1, 500), st.sets(st.integers(1, 1200), max_size=8), st.text(max_size=5))
def test_wrong_numbers_are_positive_and_none_of_those_that_mean_something(right, apart, key):
    found = wrong_number(right, apart, key)
    assert found > 0
    assert found not in apart | {right}
    assert found == wrong_number(right, apart, key)
    assert Fraction(found).denominator == 1
