from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given as over
from hypothesis import strategies as st

from gsm_compose.learning.examples import (
    COMPOSITIONAL,
    EOS_ID,
    ONE_HOP,
    Style,
    composition,
    decode,
    draw_examples,
    encode,
    given,
    single,
    two_questions,
    words,
)
from gsm_compose.learning.measuring import held_out_pairs, run_program
from gsm_compose.learning.problems import (
    LARGEST,
    SLOTS,
    Problem,
    Slot,
    apply,
    draw_pair,
    draw_problem,
    facts,
    is_held_out,
    numbers,
)
from gsm_compose.learning.templates import (
    GROUPS,
    NAMES,
    OPERATIONS,
    TEMPLATES,
    THINGS,
    WORDINGS,
    Group,
)
from gsm_compose.parse import extract_answer_strict, extract_q1, run_code_solution

SEEDS = st.integers(0, 10**6)
STYLES: tuple[Style, ...] = ("cot", "code")


def _sentences(group: Group) -> set[str]:
    wording = WORDINGS[group]
    events = itertools.chain(*wording.events.values(), *wording.questions.values())
    return {*wording.openings, *events}


def test_groups_share_no_sentence_and_have_320_templates_each() -> None:
    assert not _sentences("A") & _sentences("B")
    texts = [template.text for group in GROUPS for template in TEMPLATES[group]]
    assert len(set(texts)) == len(texts) == 640
    assert {len(TEMPLATES[group]) for group in GROUPS} == {320}


def test_every_template_states_each_number_once() -> None:
    for group in GROUPS:
        for template in TEMPLATES[group]:
            fields = Counter(word for word in template.text.split() if "{" in word)
            assert fields["{a}"] == fields["{b}"] == 1
            assert set(fields) <= {"{a}", "{b}", "{name}", "{things}"}


def test_facts_are_the_sums_differences_and_products_in_range() -> None:
    every = set(itertools.product(range(1, LARGEST + 1), repeat=2))
    assert set(facts("+")) == {(a, b) for a, b in every if a + b <= 20}
    assert set(facts("-")) == {(a, b) for a, b in every if a > b}
    assert set(facts("*")) == {(a, b) for a, b in every if a * b <= 20 and 2 <= b <= 5}


def test_about_an_eighth_is_held_out_and_every_fact_is_trained_in_both_groups() -> None:
    for group in GROUPS:
        held = sum(len(numbers(template, held_out=True)) for template in TEMPLATES[group])
        kept = sum(len(numbers(template, held_out=False)) for template in TEMPLATES[group])
        assert held / (held + kept) == pytest.approx(1 / 8, abs=0.01)
        for operation in OPERATIONS:
            own = [t for t in TEMPLATES[group] if t.operation == operation]
            trained = {pair for template in own for pair in numbers(template, held_out=False)}
            assert trained == set(facts(operation))


@over(SEEDS, st.booleans())
def test_drawn_pairs_fit_and_stay_on_their_side_of_the_split(seed: int, held_out: bool) -> None:
    pair = draw_pair(random.Random(seed), ("B",), held_out=held_out)
    assert getattr(pair.q2, pair.linked) == pair.q1.answer
    for problem in (pair.q1, pair.q2):
        assert problem.template.group == "B"
        assert is_held_out(problem.template, problem.a, problem.b) == held_out
        assert 1 <= problem.answer <= LARGEST
        assert problem.answer == apply(problem.template.operation, problem.a, problem.b)


def test_test_pairs_are_held_out_and_differ() -> None:
    pairs = held_out_pairs(3, 200)
    assert len({(p.q1.key, p.q2.key, p.linked) for p in pairs}) == 200
    assert all(is_held_out(p.template, p.a, p.b) for q in pairs for p in (q.q1, q.q2))
    assert pairs == held_out_pairs(3, 200)
    assert pairs != held_out_pairs(4, 200)


@pytest.mark.parametrize("style", STYLES)
def test_one_hop_training_never_needs_an_answer_and_compositions_are_of_group_a(
    style: Style,
) -> None:
    b_only = {s.split()[-2] for s in WORDINGS["B"].openings} | {"what"}
    for mixture in (ONE_HOP, COMPOSITIONAL):
        drawn = draw_examples(random.Random(0), mixture, style, 600)
        linked = [e for e in drawn if "Q2" in e.prompt and " X " in e.prompt.split("Q2 :")[1]]
        if mixture is ONE_HOP:
            assert not linked
        else:
            assert 0.2 < len(linked) / 600 < 0.3
            assert not any(b_only & set(e.prompt.split()) for e in linked)


def test_mixtures_have_equal_shares_of_short_and_of_long_examples() -> None:
    assert sum(ONE_HOP.values()) == pytest.approx(1)
    assert sum(COMPOSITIONAL.values()) == pytest.approx(1)
    assert ONE_HOP["single"] == COMPOSITIONAL["single"]
    assert ONE_HOP["given"] == COMPOSITIONAL["given"]


def test_pair_and_composition_differ_in_the_linked_number_alone() -> None:
    pair = draw_pair(random.Random(1), held_out=False)
    whole, apart = composition(pair, "cot"), two_questions(pair.q1, pair.q2, None, "cot")
    assert whole.target == apart.target
    differing = [
        (x, y) for x, y in zip(whole.prompt.split(), apart.prompt.split(), strict=True) if x != y
    ]
    assert differing == [("X", str(pair.q1.answer))]


@over(SEEDS, st.sampled_from(STYLES))
def test_texts_survive_their_tokens(seed: int, style: Style) -> None:
    for example in draw_examples(random.Random(seed), COMPOSITIONAL, style, 8):
        assert decode(encode(example.prompt)) == example.prompt
        assert decode([*encode(example.target), EOS_ID]) == example.target


def test_every_template_can_be_encoded_and_no_example_is_longer_than_the_model() -> None:
    longest = [max(TEMPLATES[g], key=lambda t: len(t.text.split())) for g in GROUPS]
    for template in itertools.chain(*TEMPLATES.values()):
        for slot in (None, *SLOTS):
            encode(Problem(template, 1, 1, NAMES[0], THINGS[0]).question(slot))
    problem = Problem(max(longest, key=lambda t: len(t.text.split())), 1, 1, "Ana", "pens")
    prompt = encode(two_questions(problem, problem, "a", "cot").prompt)
    assert len(prompt) + 48 <= 128
    assert len(words()) == len(set(words()))


@over(SEEDS)
def test_reference_answers_are_read_as_the_gold_ones(seed: int) -> None:
    pair = draw_pair(random.Random(seed), held_out=True)
    target = composition(pair, "cot").target
    assert (extract_q1(target), extract_answer_strict(target)) == (pair.q1.answer, pair.q2.answer)
    assert extract_answer_strict(single(pair.q2, "cot").target) == pair.q2.answer
    assert run_program(composition(pair, "code").target) == (pair.q1.answer, pair.q2.answer)
    assert run_program(given(pair.q2, pair.linked, "code").target) == (None, pair.q2.answer)
    assert run_program(single(pair.q1, "code").target) == (None, pair.q1.answer)


def test_quick_reader_of_programs_agrees_with_running_them() -> None:
    rng = random.Random(5)
    problem = draw_problem(rng, held_out=False)
    slot: Slot = "b"
    texts = [
        composition(draw_pair(rng, held_out=True), "code").target,
        given(problem, slot, "code").target,
        single(problem, "code").target,
        "def solve_q1(): return 7 - 9\ndef solution(): x = solve_q1() ; return x * x",
        "def solve_q1(): return x + 2\ndef solution(): x = solve_q1() ; return x + 1",
        "def solution(): return x + 2",
        "def solution(): return 3 +",
        "",
    ]
    for text in texts:
        values = run_code_solution(text).values
        q1, final = run_program(text)
        assert (values.get("solve_q1"), values.get("solution")) == (q1, final), text
