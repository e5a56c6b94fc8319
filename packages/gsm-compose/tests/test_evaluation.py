"""Evaluations that are interrupted in every way, against one that is not."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsm_compose.benchmark import Benchmark
from gsm_compose.errors import EvaluationError, IsolationError, PromptError
from gsm_compose.evaluation import Results, best_of, evaluate
from gsm_compose.items import Item
from gsm_compose.journal import questions
from gsm_compose.progress import progress
from gsm_compose.prompts import (
    CONDITIONS,
    Condition,
    Prompt,
    PromptSpec,
    render,
    stop_sequences,
)

TESTS = Path(__file__).parent
ZERO_SHOT = PromptSpec(shots=0)


def parrot(prompts: Sequence[Prompt]) -> list[str]:
    """An answer that depends on nothing but the prompt, and is sometimes empty."""
    numbers = [zlib.crc32(json.dumps(prompt).encode()) % 50 for prompt in prompts]
    return [
        "" if n % 7 == 0 else f"The Q1 answer is {n}. Therefore X={n}.\nThe final answer is {n}."
        for n in numbers
    ]


class Counting:
    """A model that keeps the prompts it was asked, and can be told to die."""

    def __init__(self, calls_before_death: int | None = None, death: BaseException | None = None):
        self.calls: list[list[Prompt]] = []
        self._left, self._death = calls_before_death, death

    def __call__(self, prompts: Sequence[Prompt]) -> list[str]:
        if self._left is not None and len(self.calls) >= self._left:
            assert self._death is not None
            raise self._death
        self.calls.append(list(prompts))
        return parrot(prompts)

    @property
    def prompts(self) -> list[str]:
        return [json.dumps(prompt) for call in self.calls for prompt in call]


class Teacher:
    """A model that solves everything, and says so in the words asked for."""

    def __init__(self, benchmark: Benchmark, spec: PromptSpec) -> None:
        self._book: dict[str, str] = {}
        for item in benchmark:
            for condition in CONDITIONS:
                key = json.dumps(render(item, condition, spec))
                self._book[key] = self._text(item, condition, spec)

    @staticmethod
    def _text(item: Item, condition: Condition, spec: PromptSpec) -> str:
        if condition == "code" or spec.style == "code":
            if condition in ("compositional", "code"):
                ratio = Fraction(item.gold, item.x)
                body = f"X = solve_q1()\n    return X * {ratio.numerator} / {ratio.denominator}"
            else:
                only = {"original": item.x, "original-q2": item.ignored}.get(condition, item.gold)
                body = f"return {only}"
            first = f"def solve_q1():\n    return {item.x}\n\n\n"
            alone = condition in ("original", "modified", "original-q2")
            return f"```python\n{'' if alone else first}def solution():\n    {body}\n```"
        match condition:
            case "original":
                return f"The final answer is {item.x}."
            case "original-q2":
                return f"The final answer is {item.ignored}."
            case "modified":
                return f"The final answer is {item.gold}."
            case "independent-context":
                return f"The Q1 answer is {item.x}.\nThe final answer is {item.gold}."
        said = f"The Q1 answer is {item.x}. Therefore X={item.x}."
        return f"{said}\nThe final answer is {item.gold}."

    def __call__(self, prompts: Sequence[Prompt]) -> list[str]:
        return [self._book[json.dumps(prompt)] for prompt in prompts]


@pytest.fixture
def reused(items: tuple[Item, ...]) -> Benchmark:
    """Two items that share their second question, and a third."""
    other = dataclasses.replace(
        items[1].q1, problem="gsm8k/test/9005", answer=items[0].x, old_answer=items[0].x
    )
    again = dataclasses.replace(items[0], hops=(other, items[0].q2))
    return Benchmark((items[0], items[2], again))


@pytest.mark.parametrize("style", ["cot", "code"])
@pytest.mark.parametrize("chat", [False, True])
def test_who_solves_everything_is_right_everywhere(
    style: str, chat: bool, benchmark: Benchmark
) -> None:
    spec = PromptSpec(style="code" if style == "code" else "cot", shots=1, chat=chat)
    results = evaluate(benchmark, Teacher(benchmark, spec), "all", spec, progress=False)
    assert results.conditions == CONDITIONS
    assert len(results.responses) == len(CONDITIONS) * len(benchmark)
    for condition in CONDITIONS:
        assert results.accuracy(condition) == 1
        assert results.unparsable(condition) == 0
        for item, response in zip(benchmark, results.of(condition), strict=True):
            alone = condition in ("original", "modified", "original-q2")
            assert response.item == item.id
            assert response.error is None
            assert (response.q1, response.q1_correct) == ((None, None) if alone else (item.x, True))


def test_answers_go_to_the_item_and_condition_that_they_answer(benchmark: Benchmark) -> None:
    """Gold differs by condition: the answer to the original Q2 is wrong for the modified one."""
    teacher = Teacher(benchmark, ZERO_SHOT)
    swap = {
        json.dumps(render(item, "modified", ZERO_SHOT)): render(item, "original-q2", ZERO_SHOT)
        for item in benchmark
    }

    def forgetful(prompts: Sequence[Prompt]) -> list[str]:
        return teacher([swap.get(json.dumps(prompt), prompt) for prompt in prompts])

    conditions: tuple[Condition, ...] = ("modified", "original-q2")
    results = evaluate(benchmark, forgetful, conditions, ZERO_SHOT, progress=False)
    assert results.accuracy("modified") == 0
    assert results.accuracy("original-q2") == 1
    assert [r.final for r in results.of("modified")] == [item.ignored for item in benchmark]


def test_every_distinct_prompt_is_asked_once(reused: Benchmark) -> None:
    model = Counting()
    results = evaluate(reused, model, "all", ZERO_SHOT, batch_size=4, progress=False)
    assert max(Counter(model.prompts).values()) == 1
    # Nine in all would be asked three times; the shared Q2 saves one in two of the conditions.
    assert len(model.prompts) == 6 * 3 - 2
    assert all(len(call) <= 4 for call in model.calls)
    # The parrot names a Q1 answer everywhere, but only where there are two questions is it one.
    for condition in CONDITIONS:
        looked_for = any(response.q1 is not None for response in results.of(condition))
        assert looked_for == (condition in ("compositional", "independent-context"))
    shared, _, again = results.of("modified")
    assert (shared.text, shared.final) == (again.text, again.final)
    assert shared.item != again.item


def test_the_order_of_the_items_changes_no_response(reused: Benchmark) -> None:
    turned = Benchmark(reused.items[::-1])
    one = evaluate(reused, parrot, spec=ZERO_SHOT, batch_size=2, progress=False)
    other = evaluate(turned, parrot, spec=ZERO_SHOT, batch_size=5, progress=False)
    assert set(one.responses) == set(other.responses)
    assert [r.item for r in other.of("original")] == [item.id for item in turned]


def test_an_empty_text_is_an_answer_that_cannot_be_read(benchmark: Benchmark) -> None:
    conditions: tuple[Condition, ...] = ("original", "compositional", "code")
    results = evaluate(benchmark, lambda p: [""] * len(p), conditions, ZERO_SHOT, progress=False)
    for condition in conditions:
        assert results.accuracy(condition) == 0
        assert results.unparsable(condition) == 1
    assert all(r.q1_correct is False for r in results.of("compositional"))
    assert all(r.error is None for r in results.of("compositional"))
    assert all(r.error is not None for r in results.of("code"))


def test_problems_that_the_model_goes_on_to_make_up_are_not_its_answer(
    benchmark: Benchmark,
) -> None:
    teacher = Teacher(benchmark, ZERO_SHOT)

    def babbling(prompts: Sequence[Prompt]) -> list[str]:
        return [
            f"{text}\n\nProblem:\nWhat is 1 + 1?\n\nSolution:\nThe final answer is 2."
            for text in teacher(prompts)
        ]

    conditions: tuple[Condition, ...] = ("original", "compositional", "code")
    results = evaluate(benchmark, babbling, conditions, ZERO_SHOT, progress=False)
    assert [results.accuracy(condition) for condition in conditions] == [1, 1, 1]
    assert "What is 1 + 1?" in results.responses[0].text


# Interruptions.


def test_a_model_that_dies_in_the_middle_loses_nothing(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    expected = evaluate(benchmark, parrot, spec=ZERO_SHOT, batch_size=2, out=whole, progress=False)
    for calls, answered in enumerate((0, 2, 3, 5, 6, 8)):  # batches are of one condition
        model = Counting(calls, ConnectionError("endpoint went away"))
        out.unlink(missing_ok=True)
        with pytest.raises(
            EvaluationError,
            match=rf"ConnectionError: endpoint went away\. {answered} of 9 .*out\.jsonl; the same",
        ) as caught:
            evaluate(benchmark, model, spec=ZERO_SHOT, batch_size=2, out=out, progress=False)
        assert isinstance(caught.value.__cause__, ConnectionError)
        rest = Counting()
        results = evaluate(benchmark, rest, spec=ZERO_SHOT, batch_size=2, out=out, progress=False)
        assert sorted(model.prompts + rest.prompts) == sorted(
            json.dumps(q.prompt) for q in questions(benchmark, expected.conditions, ZERO_SHOT)
        )
        assert results.responses == expected.responses
        assert out.read_bytes() == whole.read_bytes()


class HalfwayError(RuntimeError):
    """What `decapod.lm.ServerError` tells: which prompts of the call were answered."""

    def __init__(self, finished: dict[int, object]) -> None:
        super().__init__("status 503")
        self.finished = finished


def test_what_was_answered_within_the_failed_call_is_kept(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    settings = {"spec": ZERO_SHOT, "samples": 2, "progress": False}
    evaluate(benchmark, parrot, "code", out=whole, **settings)

    def halfway(prompts: Sequence[Prompt]) -> list[str]:
        # Both samples of the first and the last question, one of the middle one.
        texts = parrot(prompts)
        raise HalfwayError(
            {0: texts[0], 1: texts[1], 2: texts[2], 3: None, 4: texts[4], 5: texts[5]}
        )

    with pytest.raises(EvaluationError, match=r"status 503\. 2 of 3 prompts were answered"):
        evaluate(benchmark, halfway, "code", out=out, **settings)
    rest = Counting()
    evaluate(benchmark, rest, "code", out=out, **settings)
    assert rest.prompts == [json.dumps(render(benchmark.items[1], "code", ZERO_SHOT))] * 2
    assert sorted(out.read_bytes().split(b"\n")) == sorted(whole.read_bytes().split(b"\n"))
    assert Results.from_jsonl(out, benchmark) == Results.from_jsonl(whole, benchmark)


def test_the_user_who_interrupts_is_told_how_to_go_on(benchmark: Benchmark, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    model = Counting(2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt) as caught:
        evaluate(benchmark, model, spec=ZERO_SHOT, batch_size=3, out=out, progress=False)
    assert caught.value.__notes__ == [
        f"6 of 9 prompts were answered and are in {out}; "
        "the same call or command again asks only the rest."
    ]
    with pytest.raises(KeyboardInterrupt) as caught:
        evaluate(
            benchmark,
            Counting(1, KeyboardInterrupt()),
            spec=ZERO_SHOT,
            batch_size=3,
            progress=False,
        )
    assert "3 of 9 prompts were answered and are lost" in caught.value.__notes__[0]
    rest = Counting()
    evaluate(benchmark, rest, spec=ZERO_SHOT, batch_size=3, out=out, progress=False)
    assert len(rest.prompts) == 3


_CHILD = """
import importlib.util, sys, time
from pathlib import Path

def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(sys.argv[1]) / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

from gsm_compose.evaluation import evaluate
from gsm_compose.prompts import PromptSpec

parrot = load("test_evaluation").parrot
out, asked, hang_at = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
calls = 0

def generate(prompts):
    global calls
    calls += 1
    if calls == hang_at:
        asked.with_suffix(".hanging").touch()
        time.sleep(600)
    with asked.open("a") as file:
        file.writelines(f"{prompt!r}\\n" for prompt in prompts)
    return parrot(prompts)

evaluate(load("hand_made").BENCHMARK, generate, spec=PromptSpec(shots=0), batch_size=2, out=out)
"""


def test_a_killed_process_loses_nothing_and_the_next_asks_only_the_rest(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    whole, out, asked = (tmp_path / name for name in ("whole.jsonl", "out.jsonl", "asked.txt"))
    hanging = asked.with_suffix(".hanging")
    evaluate(benchmark, parrot, spec=ZERO_SHOT, batch_size=2, out=whole, progress=False)

    def child(hang_at: int) -> subprocess.Popen[bytes]:
        arguments = [str(TESTS), str(out), str(asked), str(hang_at)]
        return subprocess.Popen([sys.executable, "-c", _CHILD, *arguments])

    first = child(3)
    deadline = time.monotonic() + 120
    while not hanging.exists():
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert len(asked.read_text().splitlines()) == 3
    assert child(0).wait(timeout=120) == 0
    lines = asked.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 9
    assert out.read_bytes() == whole.read_bytes()


@given(cut=st.integers(0, 4000))
def test_a_file_cut_anywhere_is_continued_to_the_same_file(
    cut: int, benchmark: Benchmark, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    out = folder / "out.jsonl"
    evaluate(benchmark, parrot, spec=ZERO_SHOT, out=out, progress=False)
    whole = out.read_bytes()
    out.write_bytes(whole[: cut % (len(whole) + 1)])
    finished = max(0, out.read_bytes().count(b"\n") - 1)
    model = Counting()
    evaluate(benchmark, model, spec=ZERO_SHOT, out=out, batch_size=2, progress=False)
    assert len(model.prompts) == 9 - finished
    assert out.read_bytes() == whole


def test_more_conditions_can_be_asked_later(benchmark: Benchmark, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    evaluate(benchmark, parrot, "original", ZERO_SHOT, out=out, progress=False)
    model = Counting()
    results = evaluate(
        benchmark, model, ("modified", "original"), ZERO_SHOT, out=out, progress=False
    )
    assert len(model.prompts) == 3
    assert results.conditions == ("modified", "original")
    assert set(Results.from_jsonl(out, benchmark).responses) == set(results.responses)


def test_two_evaluations_cannot_write_to_one_file(benchmark: Benchmark, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    def meddling(prompts: Sequence[Prompt]) -> list[str]:
        with pytest.raises(EvaluationError, match=r"another process is writing to .*out\.jsonl"):
            evaluate(benchmark, parrot, spec=ZERO_SHOT, out=out, progress=False)
        return parrot(prompts)

    results = evaluate(benchmark, meddling, spec=ZERO_SHOT, out=out, progress=False)
    assert Results.from_jsonl(out, benchmark) == results


# What is refused.


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (lambda p: ["1"] * (len(p) - 1), "expected 3 texts for as many prompts, got 2"),
        (lambda p: ["1"] * (len(p) + 1), "expected 3 texts for as many prompts, got 4"),
        (lambda _: ["1", None, "2"], r"got None for prompt 1 of 3.*Give \"\""),
        (lambda p: [b"1"] * len(p), "got b'1' for prompt 0 of 3"),
        (lambda _: "1234", "expected a list of 3 texts, got str"),
        (lambda _: None, "expected a list of 3 texts, got NoneType"),
        (lambda p: ("1" for _ in p), "expected a list of 3 texts, got generator"),
    ],
)
def test_anything_but_one_text_a_prompt_is_refused_before_it_is_written(
    texts: object, message: str, benchmark: Benchmark, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    assert callable(texts)
    with pytest.raises(EvaluationError, match=message):
        evaluate(benchmark, texts, spec=ZERO_SHOT, batch_size=4, out=out, progress=False)
    assert out.read_bytes().count(b"\n") == 1


def test_a_file_of_another_run_is_refused_and_left_alone(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    evaluate(benchmark, parrot, "original", ZERO_SHOT, out=out, label="a", progress=False)
    before = out.read_bytes()
    fewer = Benchmark(benchmark.items[:2])
    for changed, arguments, settings in (
        ("benchmark", (fewer, parrot, "original", ZERO_SHOT), {"label": "a"}),
        ("label", (benchmark, parrot, "original", ZERO_SHOT), {"label": "b"}),
        ("spec", (benchmark, parrot, "original", PromptSpec(shots=1)), {"label": "a"}),
        ("samples", (benchmark, parrot, "original", ZERO_SHOT), {"label": "a", "samples": 2}),
    ):
        with pytest.raises(
            EvaluationError, match=rf"another run: expected {changed} .*another file"
        ):
            evaluate(*arguments, out=out, progress=False, **settings)
        assert out.read_bytes() == before


def test_foreign_and_damaged_files_are_refused_and_left_alone(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    evaluate(benchmark, parrot, spec=ZERO_SHOT, out=out, progress=False)
    head, first, *rest = out.read_bytes().splitlines(keepends=True)
    record = json.loads(first)
    for content, message in (
        (b"My thesis", "line 1: expected a header"),
        (b"My thesis\n", "line 1: expected a header"),
        (b"[1]\n", "line 1: expected a header"),
        (b"\xff\xfe\n", "line 1: expected a header"),
        (head.replace(b"answers/1", b"answers/2"), "expected schema 'gsm-compose-answers/1'"),
        (head + first[:40] + b"\n" + b"".join(rest), "line 2: expected an answer"),
        (head + first + b"null\n" + b"".join(rest), "line 3: expected an answer"),
        (head + json.dumps(record | {"texts": []}).encode() + b"\n", "line 2: expected an answer"),
        (head + json.dumps(record | {"final": "x"}).encode() + b"\n", "line 2: expected an answer"),
        (head + json.dumps(record | {"condition": "?"}).encode() + b"\n", "no such condition"),
    ):
        out.write_bytes(content)
        with pytest.raises(EvaluationError, match=message):
            evaluate(benchmark, parrot, spec=ZERO_SHOT, out=out, progress=False)
        assert out.read_bytes() == content
        with pytest.raises(EvaluationError, match=message):
            Results.from_jsonl(out, benchmark)


def test_bad_settings_are_refused_before_the_model_is_asked(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    model = Counting()
    out = tmp_path / "out.jsonl"
    for bad in ({"batch_size": 0}, {"samples": 0}, {"samples": 1.5}, {"conditions": ()}):
        with pytest.raises(EvaluationError, match="at least"):
            evaluate(benchmark, model, spec=ZERO_SHOT, out=out, progress=False, **bad)
    with pytest.raises(EvaluationError, match="each once, got original, original"):
        evaluate(benchmark, model, ("original", "original"), out=out, progress=False)
    with pytest.raises(PromptError, match="expected one of original"):
        evaluate(benchmark, model, "modfied", out=out, progress=False)
    with pytest.raises(ValueError, match="isolation is one of"):
        evaluate(benchmark, model, "code", out=out, isolation="wishful", progress=False)
    with pytest.raises(FileNotFoundError):
        evaluate(benchmark, model, out=tmp_path / "no" / "folder.jsonl", progress=False)
    assert model.calls == []
    assert list(tmp_path.iterdir()) == []


# Files.


def test_results_written_and_read_are_the_same(reused: Benchmark, tmp_path: Path) -> None:
    out, copy = tmp_path / "out.jsonl", tmp_path / "copy.jsonl"
    odd = "half a pair \ud800, a line\u2028separator, ½ and \x00. The final answer is 1/3."

    def model(prompts: Sequence[Prompt]) -> list[str]:
        return [odd if i == 1 else text for i, text in enumerate(parrot(prompts))]

    results = evaluate(reused, model, "all", ZERO_SHOT, out=out, label="µ", progress=False)
    results.to_jsonl(copy)
    assert copy.read_bytes() == out.read_bytes()
    assert Results.from_jsonl(copy, reused) == Results.from_jsonl(out, reused) == results
    assert results.responses[1].text == odd
    assert results.responses[1].final == Fraction(1, 3)


def test_the_file_can_be_read_by_people(benchmark: Benchmark, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    teacher = Teacher(benchmark, ZERO_SHOT)
    evaluate(benchmark, teacher, "compositional", ZERO_SHOT, out=out, progress=False)
    _, line, *_ = out.read_text(encoding="utf-8").split("\n")
    record = json.loads(line)
    assert record.pop("key")
    assert record == {
        "condition": "compositional",
        "items": [benchmark.items[0].id],
        "final": "48",
        "q1": "6",
        "error": None,
        "texts": ["The Q1 answer is 6. Therefore X=6.\nThe final answer is 48."],
    }


def test_unfinished_and_foreign_files_make_no_results(benchmark: Benchmark, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    evaluate(benchmark, parrot, "original", ZERO_SHOT, out=out, progress=False)
    with pytest.raises(EvaluationError, match="Give the benchmark that was evaluated"):
        Results.from_jsonl(out, Benchmark(benchmark.items[:2]))
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(EvaluationError, match=r"1 are missing.*run it again"):
        Results.from_jsonl(out, benchmark)
    out.write_bytes(b"".join([*lines, lines[-1]]))
    with pytest.raises(EvaluationError, match="expected one answer to each of 3 items, got 4"):
        Results.from_jsonl(out, benchmark)


# Samples.


def test_the_majority_of_the_readable_samples_decides(benchmark: Benchmark, tmp_path: Path) -> None:
    item = benchmark.items[0]
    out = tmp_path / "out.jsonl"
    texts = [
        "nothing",
        "The Q1 answer is 5. The final answer is 7.",
        "The Q1 answer is 6. The final answer is 48.",
        "The Q1 answer is 6. The final answer is 48.",
        "The Q1 answer is 5. The final answer is 7.",
    ]
    calls = []

    def model(prompts: Sequence[Prompt]) -> list[str]:
        calls.append(list(prompts))
        return texts * (len(prompts) // 5)

    one = Benchmark((item,))
    results = evaluate(
        one, model, "compositional", ZERO_SHOT, samples=5, batch_size=2, out=out, progress=False
    )
    (response,) = results.responses
    # Two against two: the earlier one wins, for the answer and for Q1.
    assert (response.final, response.q1, response.correct) == (7, 5, False)
    assert response.samples == tuple(texts)
    assert calls == [[render(item, "compositional", ZERO_SHOT)] * 5]
    assert Results.from_jsonl(out, one) == results
    texts[0] = texts[2]
    again = evaluate(one, model, "compositional", ZERO_SHOT, samples=5, progress=False)
    assert (again.responses[0].final, again.responses[0].q1_correct) == (48, True)


# Code, with the real sandbox.


def test_code_is_run_and_its_failures_are_named(benchmark: Benchmark) -> None:
    answers = iter(
        (
            "```python\ndef solve_q1():\n    return 6\n\n"
            "def solution():\n    return 8 * solve_q1()\n```",
            "```python\ndef solve_q1():\n    return 12\n\n"
            "def solution():\n    return solve_q1() / 0\n```",
            "I would rather not.",
        )
    )
    results = evaluate(
        benchmark,
        lambda prompts: [next(answers) for _ in prompts],
        "code",
        ZERO_SHOT,
        progress=False,
    )
    right, crashed, absent = results.of("code")
    assert (right.final, right.q1, right.correct, right.error) == (48, 6, True, None)
    assert (crashed.final, crashed.q1, crashed.error) == (None, 12, "exception")
    assert (absent.final, absent.correct) == (None, False)
    assert absent.error == "no function"
    assert results.unparsable("code") == pytest.approx(2 / 3)


def test_where_code_cannot_be_run_the_model_is_not_asked_for_any(
    benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsm_compose.evaluation.works", lambda _: False)
    model = Counting()
    for conditions, spec in (("code", ZERO_SHOT), ("original", PromptSpec(style="code"))):
        with pytest.raises(IsolationError, match="'restricted', which does not"):
            evaluate(
                benchmark,
                model,
                conditions,
                spec,
                isolation="restricted",
                progress=False,
            )
    assert model.calls == []
    evaluate(benchmark, model, "original", ZERO_SHOT, isolation="restricted", progress=False)
    assert len(model.prompts) == 3


# What follows from the answers.


def test_the_gap_is_that_of_the_responses(benchmark: Benchmark) -> None:
    teacher = Teacher(benchmark, ZERO_SHOT)
    first = benchmark.items[0]
    wrong = json.dumps(render(first, "compositional", ZERO_SHOT))

    def model(prompts: Sequence[Prompt]) -> list[str]:
        return [
            f"The Q1 answer is 6. Therefore X=6. The final answer is {first.ignored}."
            if json.dumps(prompt) == wrong
            else text
            for prompt, text in zip(prompts, teacher(prompts), strict=True)
        ]

    results = evaluate(benchmark, model, "all", ZERO_SHOT, progress=False)
    outcomes = results.outcomes()
    assert outcomes.q1.tolist() == outcomes.q2.tolist() == outcomes.c1.tolist() == [True] * 3
    assert outcomes.cf.tolist() == [False, True, True]
    assert outcomes.category.tolist() == ["X ignored", "correct", "correct"]
    assert outcomes.q2_ids.tolist() == [item.q2.problem for item in benchmark]
    assert outcomes.parsable is not None
    assert outcomes.parsable.tolist() == [True] * 3
    assert set(outcomes.unparsable) == set(CONDITIONS)
    report = results.gap(resamples=50)
    assert report.s1.value == report.s2.value == 1
    assert report.delta.value == pytest.approx(-1 / 3)
    assert report.second_hop.value == pytest.approx(-1 / 3)


def test_the_gap_needs_its_three_conditions(benchmark: Benchmark) -> None:
    results = evaluate(benchmark, parrot, "compositional", ZERO_SHOT, progress=False)
    with pytest.raises(EvaluationError, match="'original' was not asked, only compositional"):
        results.gap()


def test_the_better_of_two_preambles_keeps_both(benchmark: Benchmark) -> None:
    plain_spec = dataclasses.replace(ZERO_SHOT, preamble=False)
    with_it = evaluate(benchmark, Teacher(benchmark, ZERO_SHOT), spec=ZERO_SHOT, progress=False)
    without = evaluate(benchmark, lambda p: [""] * len(p), spec=plain_spec, progress=False)
    for both in (best_of(with_it, without), best_of(without, with_it)):
        assert both.preamble is with_it
        assert both.accuracy("modified") == (1, 0, 1)
        assert both.delta == (0, 0, 0)
        assert "biased upwards; report both" in both.summary()
        assert both.summary().count("\n") == 5
    with pytest.raises(EvaluationError, match="differ in the preamble alone"):
        best_of(with_it, with_it)
    shot = PromptSpec(shots=1, preamble=False)
    other = evaluate(benchmark, parrot, spec=shot, progress=False)
    with pytest.raises(EvaluationError, match="differ in the preamble alone"):
        best_of(with_it, other)
    fewer = evaluate(Benchmark(benchmark.items[:1]), parrot, spec=plain_spec, progress=False)
    with pytest.raises(EvaluationError, match="of one benchmark"):
        best_of(with_it, fewer)
    narrow = evaluate(benchmark, parrot, "original", plain_spec, progress=False)
    with pytest.raises(EvaluationError, match="the same conditions"):
        best_of(with_it, narrow)


# Progress.


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_lines_elsewhere_and_silent_on_request() -> None:
    for stream in (_Terminal(), io.StringIO()):
        with progress("evaluate", 4, stream=stream) as advance:
            advance(3)
            advance(1)
        assert "4/4" in stream.getvalue()
        assert "elapsed" in stream.getvalue()
        assert ("\x1b[" in stream.getvalue()) == stream.isatty()
    for total, shown in ((4, False), (0, True)):
        stream = _Terminal()
        with progress("evaluate", total, shown=shown, stream=stream) as advance:
            advance(total)
        assert stream.getvalue() == ""


def test_lines_tell_how_far_an_interrupted_evaluation_came() -> None:
    stream = io.StringIO()

    def interrupted() -> None:
        with progress("evaluate", 8, stream=stream) as advance:
            advance(2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stream.getvalue().startswith("evaluate: 2/8, 0:00:0")
    assert stream.getvalue().endswith(" left\n")


def test_evaluation_tells_its_progress_on_standard_error(
    benchmark: Benchmark, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(benchmark, parrot, "original", ZERO_SHOT)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("evaluate: 3/3, ")


def test_importing_the_evaluation_imports_nothing_heavy() -> None:
    code = textwrap.dedent(
        """
        import sys, gsm_compose.evaluation
        heavy = {"torch", "transformers", "scipy", "rich", "matplotlib", "decapod", "datasets"}
        print(sorted(heavy & set(sys.modules)))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"


# A real model.


@pytest.mark.parametrize("chat", [False, True])
def test_a_transformer_with_random_weights_is_evaluated_and_resumed(
    chat: bool, benchmark: Benchmark, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    lm = pytest.importorskip("decapod.lm")
    spec = PromptSpec(shots=1, chat=chat)
    conditions: tuple[Condition, ...] = ("original", "modified", "compositional", "code")
    prompts = [q.prompt for q in questions(benchmark, conditions, spec)]
    tokenizer = lm.build_tokenizer([str(prompt) for prompt in prompts], chat=True)
    model = lm.build_model(
        len(tokenizer), hidden_size=16, layers=1, heads=2, max_positions=8192, seed=1
    )
    params = lm.SamplingParams(
        max_new_tokens=12, temperature=1.0, stop=stop_sequences("original", spec)
    )
    generate = lm.TextGenerator(lm.TransformersEngine(model, tokenizer), tokenizer, params, seed=3)

    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    settings = {"spec": spec, "samples": 2, "progress": False}
    expected = evaluate(benchmark, generate, conditions, out=whole, batch_size=64, **settings)
    calls = 0

    def dying(prompts: Sequence[Prompt]) -> list[str]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ConnectionError
        texts: list[str] = generate(prompts)
        return texts

    with pytest.raises(EvaluationError, match="of 12 prompts were answered"):
        evaluate(benchmark, dying, conditions, out=out, batch_size=4, **settings)
    results = evaluate(benchmark, generate, conditions, out=out, batch_size=6, **settings)
    assert results == expected
    assert out.read_bytes() == whole.read_bytes()
    assert len({text for response in results.responses for text in response.samples}) > 12
    assert results.gap(resamples=20).s_comp.value == results.accuracy("compositional")
