"""One row, written for it, that each rule rejects and that is accepted with one thing mended."""

from __future__ import annotations

from fractions import Fraction

import pytest

from gsm_compose.engine.doubtful import doubtful_rows
from gsm_compose.engine.problems import Problem, load_gsm8k
from gsm_compose.engine.program import Program
from gsm_compose.engine.rules import DEFAULT_RULES
from gsm_compose.engine.slots import Slot, candidates, explain, find_slots
from gsm_compose.engine.value_rules import reject_values
from gsm_compose.errors import ProgramError

BY_NAME = {rule.name: rule for rule in DEFAULT_RULES}


def row(question: str, solution: str, final: int) -> Problem:
    return Problem("made/up/0", "train", question, solution, Fraction(final))


def slot(problem: Problem, text: str) -> Slot:
    return next(s for s in candidates(problem) if s.text == text)


PLAIN = row(
    "Ana has 8 boxes of 5 pens and finds 3 pens. How many pens has she?",
    "The boxes hold 8*5=<<8*5=40>>40 pens.\nShe has 40+3=<<40+3=43>>43 pens.",
    43,
)

CASES = [
    (
        "not a plain number",
        row("A bag of 40 beans loses 15% of them. How many are left?",
            "It loses 40*15/100=<<40*15/100=6>>6 beans.\n40-6=<<40-6=34>>34 are left.", 34),
        "15",
    ),
    (
        "not positive",
        row("He had 0 coins and got 7 coins. How many has he?", "0+7=<<0+7=7>>7", 7),
        "0",
    ),
    (
        "one",
        row("He has 1 box of 5 pens and 3 pens more. How many pens?",
            "1*5=<<1*5=5>>5\n5+3=<<5+3=8>>8", 8),
        "1",
    ),
    (
        "stated again",
        row("Ana has 8 boxes of 5 pens and five pencils. How many pens has she?",
            "8*5=<<8*5=40>>40", 40),
        "5",
    ),
    (
        "implied as well",
        row("He runs 7 miles on each day of a week. How many miles is that?",
            "He runs 7*7=<<7*7=49>>49 miles.", 49),
        "7",
    ),
    (
        "symbol taken",
        row("Train X has 8 cars of 5 doors. How many doors?", "8*5=<<8*5=40>>40", 40),
        "8",
    ),
    (
        "unused",
        row("At age 9 Ana has 8 boxes of 5 pens. How many pens?", "8*5=<<8*5=40>>40", 40),
        "9",
    ),
    (
        "used twice",
        row("He swims 3 miles on Monday, Wednesday and Friday. How many miles?",
            "He swims 3*3=<<3*3=9>>9 miles.", 9),
        "3",
    ),
    (
        "equals an intermediate",
        row("Of 30 birds 15 are grey, half of the grey ones sing and 4 of the others. How many?",
            "30-15=<<30-15=15>>15 others.\n15-4=<<15-4=11>>11 sing not.", 11),
        "15",
    ),
    (
        "no effect",
        row("Ana has 8 boxes of 5 pens, worth $9 each. Each box is a gift. How many pens?",
            "The value is 5*9=<<5*9=45>>45.\nThe pens are 8*5=<<8*5=40>>40.", 40),
        "9",
    ),
    (
        "ambiguous",
        row("A bag of 24 chips and another of 12 chips fill 4 rows of 6. How many are over?",
            "The bags: 24+12=<<24+12=36>>36.\nThe rows: 4*6=<<4*6=24>>24.\n"
            "Over: 36-24=<<36-24=12>>12.\nAgain 12*1=<<12*1=12>>12", 12),
        "4",
    ),
    (
        "hidden input",
        row("A field gives 5000 kilos. He sells 40 kilos a trip at $3. How much a trip?",
            "He has <<5000=5000>>5000.\nA trip is 40*3=<<40*3=120>>120.", 120),
        "40",
    ),
    (
        "unexplained literal",
        row("Ana has 8 boxes of 5 pens and her friends some more. How many pens?",
            "8*5=<<8*5=40>>40\n40+17=<<40+17=57>>57", 57),
        "8",
    ),
    (
        "unannotated arithmetic",
        row("He peels 60 roots at 5 seconds each and washes them for 9 minutes. How long?",
            "It takes 5 seconds * 60 / 60 = 5 minutes to peel.\n5+9=<<5+9=14>>14 minutes.", 14),
        "5",
    ),
    (
        "row with an unused number",
        row("16 guests are told; 10 say yes and 6 want two plates of 3 rolls. How many rolls?",
            "6 guests get 6*2=<<6*2=12>>12 plates.\nThey eat 12*3=<<12*3=36>>36 rolls.", 36),
        "6",
    ),
    (
        "dead step",
        row("Shop A sells 8 pens at $3 and shop B 5 at $4. What does he pay in the dearer one?",
            "In A 8*3=<<8*3=24>>24.\nIn B 5*4=<<5*4=20>>20.", 24),
        "8",
    ),
    (
        "case distinction",
        row("He earns $9 an hour, and 3 times that for overtime of 2 hours. How much for those?",
            "9*3=<<9*3=27>>27\n27*2=<<27*2=54>>54", 54),
        "9",
    ),
    (
        "remainder",
        row("Of 9 friends 2 get 6 pens each, the other 7 get 4 pens each. How many pens, 9 lost?",
            "2*6=<<2*6=12>>12\n7*4=<<7*4=28>>28\n12+28-9=<<12+28-9=31>>31", 31),
        "7",
    ),
    (
        "counts terms",
        row("A castle has 4 levels of 2, 5, 7 and 10 feet. What is the mean level?",
            "2+5+7+10=<<2+5+7+10=24>>24\n24/4=<<24/4=6>>6", 6),
        "4",
    ),
    (
        "unit conversion",
        row("There are 16 cups in a gallon. How many cups are in 9 gallons?",
            "16*9=<<16*9=144>>144", 144),
        "16",
    ),
]  # fmt: skip


def test_every_rule_has_a_case_here() -> None:
    others = {"identity fails", "doubtful row"}
    assert {name for name, _, _ in CASES} | others == set(BY_NAME)


def test_a_program_that_does_not_give_its_own_answer_fails_the_identity() -> None:
    # No solution that was parsed can: its result is looked for among its steps.
    problem = row(PLAIN.question, PLAIN.solution, 43)
    broken = Program(problem.program.steps, Fraction(44))
    problem.__dict__["program"] = broken
    assert "identity fails" in " ".join(explain(slot(problem, "8")))


def test_a_row_whose_answer_is_in_doubt_is_not_used() -> None:
    rows = load_gsm8k("test")
    listed = doubtful_rows()
    assert set(listed) < {row.id for row in rows}
    assert all(find_slots(row) == [] for row in rows if row.id in listed)
    # Of six groups of nine, so published: 54 / 6 = 9 groups.
    assert "six groups" in listed["gsm8k/test/749"]


@pytest.mark.parametrize(
    ("question", "solution", "final", "number", "x", "rule"),
    [
        ("He works 5 hours a day for 9 weeks of 2 days. How long?",
         "5*9=<<5*9=45>>45\n45*2=<<45*2=90>>90", 90, "5", 30, "beyond nature"),
        ("Bo is 30 years old, Al is 5 times that less 90. How old is Al?",
         "30*5=<<30*5=150>>150\n150-90=<<150-90=60>>60", 60, "30", 55, "beyond nature"),
        ("Of 90 geese 30 left, and 20 of them came back. How many are here?",
         "90-30=<<90-30=60>>60\n60+20=<<60+20=80>>80", 80, "20", 29, "part grows"),
        ("He cuts 20 ropes into 5 parts. How many?", "20*5=<<20*5=100>>100", 100,
         "5", 1, "singular"),
        ("He cuts 20 feet into 5 parts. How long?", "20/5=<<20/5=4>>4", 4,
         "5", 6, "fraction appears"),
        ("Of 20 eggs 5 break. How many are whole?", "20-5=<<20-5=15>>15", 15,
         "5", 25, "sign changes"),
        ("He has 20 sets of 5 cups. How many?", "20*5=<<20*5=100>>100", 100, "5", 40, "far answer"),
        ("He has 20 sets of 5 cups. How many?", "20*5=<<20*5=100>>100", 100, "5", 90, "far from"),
        ("40 guests want 2 rolls each; there are 54 rolls. How many guests get no second one?",
         "40*2=<<40*2=80>>80\n80-54=<<80-54=26>>26", 26, "40", 64, "part exceeds whole"),
        ("He has 20 sets of 5 cups and 8 jugs. How many things?",
         "20*5=<<20*5=100>>100\n100+8=<<100+8=108>>108", 108, "5", 8, "coincides"),
        ("Of 40 eggs 10 break. How many are whole?", "40-10=<<40-10=30>>30", 30,
         "10", 20, "answer is"),
    ],
)  # fmt: skip
def test_each_rule_for_values_rejects_its_case(
    question: str, solution: str, final: int, number: str, x: int, rule: str
) -> None:
    found = slot(row(question, solution, final), number)
    reason = reject_values([found], [x], Fraction(3))
    assert reason is not None
    assert reason.startswith(rule)


def test_the_plain_row_has_all_its_numbers_accepted() -> None:
    assert [s.text for s in find_slots(PLAIN)] == ["8", "5", "3"]


@pytest.mark.parametrize(("name", "problem", "text"), CASES, ids=[case[0] for case in CASES])
def test_each_rule_rejects_its_case(name: str, problem: Problem, text: str) -> None:
    found = slot(problem, text)
    assert BY_NAME[name].reason(found) is not None
    assert any(line.startswith(f"{name}: ") for line in explain(found))
    assert found not in find_slots(problem)


@pytest.mark.parametrize("rule", DEFAULT_RULES, ids=lambda rule: rule.name)
def test_no_rule_rejects_the_plain_row(rule: object) -> None:
    assert all(r.reason(s) is None for r in [rule] for s in candidates(PLAIN))  # type: ignore[attr-defined]


def test_a_slot_of_a_row_without_a_program_is_explained() -> None:
    problem = row("Ana has 8 pens. How many?", "She has 8.", 8)
    assert find_slots(problem) == []
    assert explain(candidates(problem)[0])[0].startswith("no program: no annotation")


def test_an_ambiguous_row_is_rejected_and_not_guessed() -> None:
    # The 12 of the third step may be the first step's or the question's.
    problem = row(
        "Ana has 3 bags of 4 figs and a bag of 12 nuts worth $2 each. How much are the nuts?",
        "There are 3*4=<<3*4=12>>12 figs.\nThe nuts cost 12*2=<<12*2=24>>24.",
        24,
    )
    three = slot(problem, "3")
    assert any("ambiguous" in line for line in explain(three))
    with pytest.raises(ProgramError, match="ambiguous"):
        problem.program.evaluate({three: Fraction(5)})


def test_corrupting_any_annotation_rejects_the_row() -> None:
    for problem in load_gsm8k("test")[:150]:
        try:
            steps = problem.program.steps
        except ProgramError:
            continue
        for step in steps:
            text = problem.solution[step.start : step.end]
            wrong = text.replace("=", "=1", 1)
            broken = problem.solution[: step.start] + wrong + problem.solution[step.end :]
            with pytest.raises(ProgramError):
                assert row(problem.question, broken, int(problem.final)).program.steps


def test_stating_an_accepted_number_again_rejects_it() -> None:
    checked = 0
    for problem in load_gsm8k("test")[:300]:
        for accepted in find_slots(problem):
            longer = f"{problem.question} There are {accepted.text} of them."
            again = Problem(problem.id, "test", longer, problem.solution, problem.final)
            same = next(s for s in candidates(again) if s.start == accepted.start)
            assert any(line.startswith("stated again") for line in explain(same))
            checked += 1
    assert checked > 200


def test_original_numbers_give_the_published_answer_in_every_program() -> None:
    for problem in load_gsm8k("test"):
        for accepted in find_slots(problem):
            assert problem.program.evaluate({accepted: accepted.value}) == problem.final
