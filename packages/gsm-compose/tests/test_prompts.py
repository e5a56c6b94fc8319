"""Prompts against golden files, and the exemplars against the training set and Python itself.

`python test_prompts.py` writes the golden files anew; read the difference before committing it.
"""

from __future__ import annotations

import ast
import dataclasses
import gzip
import importlib.util
import json
import re
import subprocess
import sys
from fractions import Fraction
from importlib.resources import files
from pathlib import Path

import pytest

from gsm_compose.engine.problems import load_gsm8k
from gsm_compose.engine.slots import find_slots
from gsm_compose.engine.substitution import linked_hop
from gsm_compose.errors import PromptError
from gsm_compose.exemplars import Exemplar, exemplar_problems, exemplars
from gsm_compose.items import Hop, Item, Link
from gsm_compose.prompts import (
    CONDITIONS,
    MAX_SHOTS,
    SINGLE_QUESTION,
    Condition,
    PromptSpec,
    render,
    stop_sequences,
    style_of,
)

GOLDEN = Path(__file__).parent / "golden"
SPECS = {
    "one-shot": PromptSpec(shots=1),
    "one-shot-code": PromptSpec(style="code", shots=1),
}
NUMBER = re.compile(r"\d+")


def _hand_made() -> tuple[Item, ...]:
    path = Path(__file__).with_name("hand_made.py")
    spec = importlib.util.spec_from_file_location("gsm_compose_hand_made_golden", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    items: tuple[Item, ...] = module.ITEMS
    return items


def _longer(items: tuple[Item, ...], shape: str) -> Item:
    """Three hops out of the questions written by hand."""
    apples, ropes = items[1].hops
    birds, cards = items[2].hops
    text = cards.original
    boxes = Link(1, text.index("8"), text.index("8") + 1, "8", 8)
    if shape == "chain":
        last = _with_links(cards, (boxes,), 6, 19)
        return Item("test", "chain", (apples, ropes, last), (2, 0, 1))
    price = Link(0, text.index("3"), text.index("3") + 1, "3", 3)
    last = _with_links(cards, (boxes, price), 10, 121)
    return Item("test", "fan_in", (apples, birds, last), (0, 1, 2))


def _with_links(hop: Hop, links: tuple[Link, ...], number: int, answer: int) -> Hop:
    template = question = hop.original
    for link in sorted(links, key=lambda link: -link.start):
        template = template[: link.start] + link.symbol + template[link.end :]
        value = str(number if link.source else 12)
        question = question[: link.start] + value + question[link.end :]
    return dataclasses.replace(
        hop, links=links, template=template, question=question, answer=answer
    )


def _golden_texts() -> dict[str, str]:
    """Every condition in every style once with one exemplar; then everything that differs."""
    items = _hand_made()
    texts = {
        f"{condition}.{name}.txt": render(items[0], condition, spec)
        for name, spec in SPECS.items()
        for condition in CONDITIONS
        if (condition, name) != ("code", "one-shot-code")
    }
    texts |= {
        "compositional.eight-shot.txt": render(items[0], "compositional"),
        "compositional.no-preamble.txt": render(
            items[0], "compositional", PromptSpec(shots=0, preamble=False)
        ),
        "compositional.reversed.txt": render(items[2], "compositional", PromptSpec(shots=1)),
        "compositional.chain-of-three.txt": render(
            _longer(items, "chain"), "compositional", PromptSpec(shots=0)
        ),
        "compositional.fan-in.txt": render(
            _longer(items, "fan_in"), "compositional", PromptSpec(shots=0)
        ),
        "code.chain-of-three.txt": render(_longer(items, "chain"), "code", PromptSpec(shots=0)),
        "code.fan-in.txt": render(_longer(items, "fan_in"), "code", PromptSpec(shots=0)),
        "compositional.chat.json": json.dumps(
            render(items[0], "compositional", PromptSpec(shots=1, chat=True)),
            ensure_ascii=False,
            indent=2,
        ),
    }
    return {name: f"{text}\n" for name, text in texts.items()}


@pytest.mark.parametrize("name", sorted(_golden_texts()))
def test_the_prompt_is_the_golden_one(name: str) -> None:
    assert _golden_texts()[name] == (GOLDEN / name).read_text(encoding="utf-8")


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(_golden_texts())


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("style", ["cot", "code"])
@pytest.mark.parametrize("shots", range(MAX_SHOTS + 1))
def test_chat_and_text_say_the_same(
    condition: Condition, style: str, shots: int, items: tuple[Item, ...]
) -> None:
    for item in items:
        spec = PromptSpec(style="code" if style == "code" else "cot", shots=shots)
        text = render(item, condition, spec)
        chat = render(item, condition, dataclasses.replace(spec, chat=True))
        assert isinstance(text, str)
        assert isinstance(chat, list)
        assert [message["role"] for message in chat] == ["user", "assistant"] * shots + ["user"]
        words = [word for message in chat for word in message["content"].split()]
        assert words == [w for w in text.split() if w not in ("Problem:", "Solution:")]
        assert text.count("Problem:\n") == text.count("Solution:") == shots + 1


def test_the_preamble_is_all_that_the_preamble_setting_changes(items: tuple[Item, ...]) -> None:
    for condition in CONDITIONS:
        with_it, without = (
            render(items[0], condition, PromptSpec(preamble=preamble)) for preamble in (True, False)
        )
        assert isinstance(with_it, str)
        assert isinstance(without, str)
        assert with_it.endswith(without)
        assert with_it.removesuffix(without).count("\n") == 2


def test_prompts_of_single_questions_differ_only_in_the_question(items: tuple[Item, ...]) -> None:
    item = items[1]
    asked = {
        "original": item.q1.question,
        "modified": item.q2.question,
        "original-q2": item.q2.original,
    }
    frames = set()
    for condition in SINGLE_QUESTION:
        prompt = render(item, condition)
        assert isinstance(prompt, str)
        assert prompt.count(asked[condition]) == 1
        frames.add(prompt.replace(asked[condition], "…"))
    assert len(frames) == 1


def test_no_gold_answer_is_given_away(items: tuple[Item, ...]) -> None:
    """Without exemplars, the only numbers in the prompt are those of the questions and labels."""
    for item in items:
        spec = PromptSpec(shots=0)
        prompt = render(item, "compositional", spec)
        assert isinstance(prompt, str)
        allowed = {"1", "2"} | set(NUMBER.findall(item.q1.template + item.q2.template))
        assert set(NUMBER.findall(prompt)) <= allowed


def test_questions_come_in_the_order_of_the_item(items: tuple[Item, ...]) -> None:
    for item in (*items, _longer(items, "chain"), _longer(items, "fan_in")):
        prompt = render(item, "compositional", PromptSpec(shots=0))
        assert isinstance(prompt, str)
        positions = [prompt.index(f"\nQ{i + 1}: {item.hops[i].template}") for i in item.order]
        assert positions == sorted(positions)


def test_rendering_again_gives_the_same_and_shares_nothing(items: tuple[Item, ...]) -> None:
    spec = PromptSpec(chat=True)
    first = render(items[0], "compositional", spec)
    assert isinstance(first, list)
    first[0]["content"] = "changed by the caller"
    second = render(items[0], "compositional", spec)
    assert second == render(items[0], "compositional", spec)
    assert second != first


def test_stopping_cuts_no_exemplar(items: tuple[Item, ...]) -> None:
    for condition in CONDITIONS:
        for style in ("cot", "code"):
            spec = PromptSpec(style="code" if style == "code" else "cot")
            (stop,) = stop_sequences(condition, spec)
            prompt = render(items[0], condition, spec)
            chat = render(items[0], condition, dataclasses.replace(spec, chat=True))
            assert isinstance(prompt, str)
            assert isinstance(chat, list)
            # A model that goes on as the prompt does meets the stop once per exemplar, and
            # nothing that an exemplar answers contains it.
            assert prompt.count(stop) == MAX_SHOTS + 1
            assert not any(stop in message["content"] for message in chat)
            assert stop_sequences(condition, dataclasses.replace(spec, chat=True)) == ()


def test_code_is_asked_in_code_and_the_rest_as_the_specification_says() -> None:
    for condition in CONDITIONS:
        assert style_of(condition, PromptSpec(style="code")) == "code"
        assert style_of(condition) == ("code" if condition == "code" else "cot")


@pytest.mark.parametrize("shots", [-1, 9, 2.0, True, "8", None])
def test_an_impossible_number_of_shots_is_refused(shots: object) -> None:
    with pytest.raises(PromptError, match="shots: expected a whole number from 0 to 8"):
        PromptSpec(shots=shots)


def test_unknown_styles_and_conditions_are_refused(items: tuple[Item, ...]) -> None:
    with pytest.raises(PromptError, match="style: expected 'cot' or 'code'"):
        PromptSpec(style="prose")
    wrong: Condition = "compositonal"
    with pytest.raises(PromptError, match="expected one of original, modified"):
        render(items[0], wrong)


def test_an_item_of_exemplar_questions_is_refused_only_while_they_are_shown() -> None:
    item = exemplars()[3].item
    with pytest.raises(PromptError, match=r"gsm8k/train/6453.*exemplar_problems"):
        render(item, "compositional")
    assert item.q1.question in str(render(item, "compositional", PromptSpec(shots=3)))


# The exemplars themselves.


def test_exemplars_are_sixteen_different_training_rows_word_for_word() -> None:
    packed = files("gsm_compose").joinpath("data", "gsm8k-train.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(packed).decode().split("\n") if line]
    hops = [hop for exemplar in exemplars() for hop in exemplar.item.hops]
    assert len(exemplars()) == MAX_SHOTS
    assert len(exemplar_problems()) == len(hops) == 16
    for hop in hops:
        corpus, split, index = hop.problem.split("/")
        row = rows[int(index)]
        assert (corpus, split) == ("gsm8k", "train")
        assert hop.original == row["question"]
        assert hop.old_answer == int(row["answer"].rpartition("####")[2].replace(",", ""))
        # Our own words: no sentence of the published solution.
        published = re.sub(r"<<[^>]*>>", "", row["answer"])
        assert not any(
            sentence.strip() in published
            for sentence in hop.solution.split(". ")
            if len(sentence.split()) > 5
        )


@pytest.mark.parametrize("exemplar", exemplars(), ids=lambda e: e.item.q1.problem)
def test_the_replaced_number_is_the_only_one_of_its_value(exemplar: Exemplar) -> None:
    q2 = exemplar.item.q2
    (link,) = q2.links
    assert re.findall(r"\d+", q2.original).count(link.old) == 1
    assert q2.original[link.start : link.end] == link.old
    assert q2.template.replace("X", link.old) == q2.original
    assert q2.template.replace("X", str(exemplar.item.x)) == q2.question
    assert q2.answer != q2.old_answer
    assert 1 / 3 <= q2.answer / q2.old_answer <= 3


def test_the_engine_accepts_every_exemplar_and_gives_the_same_hop() -> None:
    rows = {problem.id: problem for problem in load_gsm8k("train")}
    for exemplar in exemplars():
        q2 = exemplar.item.q2
        (slot,) = (s for s in find_slots(rows[q2.problem]) if s.start == q2.links[0].start)
        made = linked_hop([slot], [0], [exemplar.item.x])
        assert dataclasses.replace(made, solution=q2.solution, program=None) == q2


@pytest.mark.parametrize("exemplar", exemplars(), ids=lambda e: e.item.q1.problem)
def test_every_calculation_in_words_is_exact_and_ends_in_the_answer(exemplar: Exemplar) -> None:
    for hop in exemplar.item.hops:
        equations = re.findall(r"([\d][\d +*/-]*) = (\d+)", hop.solution)
        assert len(equations) == hop.solution.count("=") > 0
        for left, right in equations:
            assert _exact(left) == int(right), left
        assert int(equations[-1][1]) == hop.answer


@pytest.mark.parametrize("exemplar", exemplars(), ids=lambda e: e.item.q1.problem)
def test_exemplar_code_in_every_condition_runs_to_the_answers(exemplar: Exemplar) -> None:
    item, number = exemplar.item, exemplars().index(exemplar)
    blank = _hand_made()[1]
    for condition, names in (
        ("original", {"solution": item.x}),
        ("code", {"solve_q1": item.x, "solution": item.gold}),
        ("independent-context", {"solve_q1": item.x, "solution": item.gold}),
    ):
        spec = PromptSpec(style="code", chat=True)
        chat = render(blank, condition, spec)
        assert isinstance(chat, list)
        asked, answered = chat[2 * number]["content"], chat[2 * number + 1]["content"]
        assert item.q1.question in asked
        assert answered.count("def ") == len(names)
        assert ("X" in answered) == (condition == "code")
        code = answered.removeprefix("```python\n").removesuffix("\n```")
        code += f"\nprint({', '.join(f'{name}()' for name in names)})"
        done = subprocess.run(
            [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60
        )
        assert done.stdout.split() == [str(value) for value in names.values()], done.stderr
        # What the arithmetic starts from stands in the question or is a well-known constant.
        told = {int(n) for n in NUMBER.findall(asked)} | {item.x, 2, 3, 8, 16}
        assert {int(n) for n in re.findall(r"\b\d+\b", code)} <= told


@pytest.mark.parametrize("exemplar", exemplars(), ids=lambda e: e.item.q1.problem)
def test_worked_solutions_answer_the_question_above_them(exemplar: Exemplar) -> None:
    item, number = exemplar.item, exemplars().index(exemplar)
    blank = _hand_made()[1]
    for condition in CONDITIONS:
        if condition == "code":
            continue
        chat = render(blank, condition, PromptSpec(chat=True))
        assert isinstance(chat, list)
        asked, answered = chat[2 * number]["content"], chat[2 * number + 1]["content"]
        assert item.q1.question in asked
        if condition in SINGLE_QUESTION:
            assert answered == f"{item.q1.solution} The final answer is {item.x}."
            continue
        middle = f" The Q1 answer is {item.x}."
        if condition == "compositional":
            assert item.q2.template in asked
            middle += f" Therefore X={item.x}."
        else:
            assert item.q2.question in asked
        end = f"The final answer is {item.gold}."
        assert answered == f"{item.q1.solution}{middle}\n{item.q2.solution} {end}"


def _exact(expression: str) -> Fraction:
    """Value of sums and products of whole numbers, without floats."""

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return Fraction(node.value)
        assert isinstance(node, ast.BinOp)
        left, right = value(node.left), value(node.right)
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div():
                return left / right
        raise AssertionError(node.op)

    return value(ast.parse(expression.strip(), mode="eval").body)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, text in _golden_texts().items():
        (GOLDEN / name).write_text(text, encoding="utf-8")
