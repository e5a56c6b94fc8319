from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from gsm_compose.benchmark import Benchmark
from gsm_compose.building import build_benchmark, compose
from gsm_compose.engine.problems import Problem, load_gsm8k
from gsm_compose.engine.rewriting import show_number
from gsm_compose.engine.slots import candidates, find_slots
from gsm_compose.errors import GSMComposeError, RejectedCompositionError, TooFewPairsError
from gsm_compose.items import Item
from gsm_compose.sandbox import works
from gsm_compose.verify import composition_program, execute_program, symbolic_audit


@pytest.fixture(scope="module")
def rows() -> list[Problem]:
    return load_gsm8k("test")[:240]


@pytest.fixture(scope="module")
def pairs(rows: list[Problem]) -> Benchmark:
    return build_benchmark(rows, n=80, seed=1)


def test_a_benchmark_passes_the_audit_with_all_its_programs_run(
    rows: list[Problem], pairs: Benchmark
) -> None:
    audit = symbolic_audit(pairs, rows)
    assert (audit.items, audit.executed, dict(audit.faults)) == (80, 80, {})
    assert audit.clean


def test_first_questions_are_used_once_and_never_with_themselves(pairs: Benchmark) -> None:
    firsts = [item.q1.problem for item in pairs]
    assert len(set(firsts)) == len(firsts)
    assert all(item.q1.problem != item.q2.problem for item in pairs)
    most = max(Counter(item.q2.problem for item in pairs).values())
    assert most <= pairs.settings["max_reuse"]


def test_answers_stay_within_the_ratio_and_change(pairs: Benchmark) -> None:
    for item in pairs:
        assert item.gold != item.ignored
        assert item.gold != item.x
        assert Fraction(1, 3) <= Fraction(item.gold, item.ignored) <= 3
        (link,) = item.q2.links
        assert Fraction(1, 10) <= Fraction(item.x, link.old_value) <= 10


@pytest.mark.parametrize(
    "options",
    [
        {"hops": 3, "n": 20},
        {"hops": 4, "n": 5},
        {"shape": "fan_in", "n": 6},
        {"reverse": True, "n": 20},
    ],
    ids=str,
)
def test_other_shapes_pass_the_audit_too(rows: list[Problem], options: dict[str, object]) -> None:
    benchmark = build_benchmark(rows, **options)  # type: ignore[arg-type]
    assert symbolic_audit(benchmark, rows, execute=works("restricted")).clean
    item = benchmark.items[0]
    if options.get("hops"):
        assert [k.source for hop in item.hops for k in hop.links] == list(range(len(item.hops) - 1))
    if options.get("shape"):
        assert [k.source for k in item.q2.links] in ([0, 1], [1, 0])
        assert "X" in item.q2.template
        assert "Y" in item.q2.template
    if options.get("reverse"):
        assert item.order == (1, 0)


def test_the_same_seed_gives_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    code = (
        "import sys; from gsm_compose.building import build_benchmark\n"
        "from gsm_compose.engine.problems import load_gsm8k\n"
        "build_benchmark(load_gsm8k('test')[:100], n=20, seed=5).to_jsonl(sys.argv[1])"
    )
    contents = []
    for hash_seed in ("0", "1", "4242"):
        path = tmp_path / f"{hash_seed}.jsonl"
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=environment)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_another_seed_gives_other_items(rows: list[Problem]) -> None:
    one, other = (build_benchmark(rows, n=30, seed=seed) for seed in (0, 1))
    assert {item.id for item in one} != {item.id for item in other}


def test_an_excluded_row_is_not_used(rows: list[Problem], pairs: Benchmark) -> None:
    banned = {hop.problem for item in pairs.items[:20] for hop in item.hops}
    left = build_benchmark(rows, n=60, seed=1, exclude=banned)
    assert not banned & {hop.problem for item in left for hop in item.hops}


def test_asking_for_too_many_says_how_many_there_are(rows: list[Problem]) -> None:
    with pytest.raises(
        TooFewPairsError, match=r"asked for 500 items with 2 hops, at most \d+ with"
    ):
        build_benchmark(rows, n=500)
    with pytest.raises(TooFewPairsError, match="max_reuse=1"):
        build_benchmark(rows, n=230, max_reuse=1)
    with pytest.raises(TooFewPairsError, match=r"3 hops, found [1-9]\d* with max_reuse=1"):
        build_benchmark(rows, n=230, hops=3, max_reuse=1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n": 0}, "n:"),
        ({"hops": 1}, "hops:"),
        ({"hops": 5}, "hops:"),
        ({"ratio": Fraction(1, 2)}, "ratio:"),
        ({"max_reuse": 0}, "max_reuse:"),
        ({"shape": "ring"}, "shape:"),
        ({"exclude": ["gsm8k/test/99999"]}, "exclude:"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(
    rows: list[Problem], options: dict[str, object], named: str
) -> None:
    with pytest.raises(GSMComposeError, match=named):
        build_benchmark(rows[:50], **{"n": 2, **options})  # type: ignore[arg-type]


def test_train_and_test_rows_do_not_mix(rows: list[Problem]) -> None:
    train = load_gsm8k("train")[:50]
    with pytest.raises(GSMComposeError, match="one split"):
        build_benchmark([*rows[:50], *train], n=2)
    second = next(row for row in train if find_slots(row))
    with pytest.raises(RejectedCompositionError, match="different splits"):
        compose(rows[0], second, find_slots(second)[0])


def test_rejected_slots_do_not_compose(rows: list[Problem]) -> None:
    second = next(r for r in rows if set(candidates(r)) - set(find_slots(r)) and r.id[-1] != "0")
    rejected = next(s for s in candidates(second) if s not in find_slots(second))
    with pytest.raises(RejectedCompositionError):
        compose(rows[0], second, rejected)


def test_an_item_id_does_not_depend_on_its_neighbours(
    rows: list[Problem], pairs: Benchmark
) -> None:
    item = pairs.items[7]
    slot = next(
        s
        for s in find_slots(next(r for r in rows if r.id == item.q2.problem))
        if s.start == item.q2.links[0].start
    )
    alone = compose(next(r for r in rows if r.id == item.q1.problem), slot.problem, slot)
    assert alone == item
    assert alone.id == item.id


def tampered(item: Item) -> list[Item]:
    first, last = item.hops
    (link,) = last.links
    return [
        replace(item, hops=(first, replace(last, answer=last.answer + 1))),
        replace(item, hops=(first, replace(last, question=last.question + " 7"))),
        replace(item, hops=(first, replace(last, template=last.original))),
        replace(item, hops=(first, replace(last, solution="1+1=<<1+1=2>>2"))),
        replace(item, hops=(first, replace(last, old_answer=last.answer))),
        replace(item, hops=(first, replace(last, links=(replace(link, old="1"),)))),
        replace(item, hops=(replace(first, answer=first.answer + 1), last)),
        replace(item, hops=(last, last)),
        replace(item, hops=(first, replace(last, program="def solution(x):\n    return 1\n"))),
    ]


def test_the_audit_finds_every_kind_of_damage(rows: list[Problem], pairs: Benchmark) -> None:
    for item in pairs.items[:3]:
        *damaged, other_program = tampered(item)
        for one in damaged:
            assert not symbolic_audit(Benchmark((one,)), rows, execute=False).clean
        audit = symbolic_audit(Benchmark((other_program,)), rows)
        assert "the program gives" in audit.faults[other_program.id][0]


def test_emitted_programs_call_one_another(rows: list[Problem]) -> None:
    item = build_benchmark(rows, n=5, hops=3).items[0]
    source = composition_program(item)
    assert source.count("def ") == 3
    assert "x = solve_q1()" in source
    assert "y = solve_q2()" in source
    assert execute_program(source) == item.gold


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Fraction(48), "48"),
        (Fraction(5, 2), "2.5"),
        (Fraction(1, 8), "0.125"),
        (Fraction(-1, 20), "-0.05"),
        (Fraction(10, 3), "10/3"),
        (1200, "1200"),
    ],
)
def test_numbers_are_shown_exactly(value: Fraction | int, text: str) -> None:
    assert show_number(value) == text


def test_an_empty_or_doubled_input_is_refused(rows: list[Problem]) -> None:
    with pytest.raises(GSMComposeError, match="at least one"):
        build_benchmark([], n=1)
    with pytest.raises(GSMComposeError, match="twice"):
        build_benchmark([*rows[:20], rows[0]], n=1)
