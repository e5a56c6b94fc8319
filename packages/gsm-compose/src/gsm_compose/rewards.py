"""Rewards for training on compositions, in the form in which TRL calls them.

TRL calls ``f(prompts=..., completions=..., **columns) -> list[float | None]``, one number per
completion; the columns are those of `gsm_compose.integrations.trl_data.grpo_dataset`. A completion
is a text, or the list of chat messages that answer a conversational prompt.

Rewards read the *markers* only ("The Q1 answer is 6.", "The final answer is 48."). Evaluation also
accepts the last number of a text, but a policy that is trained on that rule learns to end with
numbers. Of several markers the last counts.

Where a gold value is None the reward is None, which TRL takes as "this reward does not apply here",
so that compositions can be mixed with other tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from gsm_compose.errors import RewardError
from gsm_compose.parse import extract_answer_strict, extract_q1, run_code_solutions
from gsm_compose.sandbox import Isolation

Completion = str | Sequence[Mapping[str, Any]]
Gold = int | str | None
"""A gold answer: an integer, or its digits, as trainers keep it in a text column."""


@dataclass(frozen=True)
class Judgement:
    """What a completion is worth, before any weighting.

    Attributes:
        final: the marked final answer is the gold one.
        q1: the marked answer to the first question is the gold one; False also where it is absent.
        marked: both answers are marked, right or wrong, so that they can be read at all.
    """

    final: bool
    q1: bool
    marked: bool

    def credit(self, q1_credit: float) -> float:
        """1 for a right final answer, `q1_credit` for a right first answer alone, else 0."""
        return 1.0 if self.final else q1_credit * self.q1


def judge_text(text: str, gold_final: Gold, gold_x: Gold) -> Judgement:
    """Hold the marked answers of a completion against the gold ones.

    Args:
        text: what the model wrote.
        gold_final: gold answer of the composition; None matches nothing.
        gold_x: gold answer of its first question; None matches nothing.

    Raises:
        RewardError: a gold value is not a number.
    """
    final, q1 = extract_answer_strict(text), extract_q1(text)
    return Judgement(
        final=final is not None and final == gold_number("gold_final", gold_final),
        q1=q1 is not None and q1 == gold_number("gold_x", gold_x),
        marked=final is not None and q1 is not None,
    )


def composition_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    gold_final: Sequence[Gold],
    **columns: Any,
) -> list[float | None]:
    """1 where the marked final answer is right, else 0.

    Args:
        prompts: not used; TRL passes them.
        completions: texts or lists of chat messages, one per prompt.
        gold_final: the column of gold answers.
        columns: further columns, and what else TRL passes; not used.

    Raises:
        RewardError: a column is not as long as `completions`, or a gold value is not a number.
    """
    del prompts, columns
    return [
        None if gold is None else float(judge_text(text, gold, None).final)
        for text, gold in _rows(completions, gold_final=gold_final)
    ]


def q1_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    gold_x: Sequence[Gold],
    **columns: Any,
) -> list[float | None]:
    """1 where the marked answer to the first question is right, else 0.

    Added to `composition_reward` with a small ``reward_weights`` entry it is partial credit that
    does not depend on the final answer. Arguments and errors as there.
    """
    del prompts, columns
    return [
        None if gold is None else float(judge_text(text, None, gold).q1)
        for text, gold in _rows(completions, gold_x=gold_x)
    ]


def stepwise_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    gold_final: Sequence[Gold],
    gold_x: Sequence[Gold],
    q1_credit: float = 0.3,
    **columns: Any,
) -> list[float | None]:
    """1 for a right final answer, `q1_credit` where only the first question is right, else 0.

    Args:
        prompts: not used; TRL passes them.
        completions: texts or lists of chat messages, one per prompt.
        gold_final: the column of gold answers.
        gold_x: the column of gold answers to the first question; None gives no partial credit.
        q1_credit: partial credit in [0, 1]; set it with ``functools.partial``.
        columns: further columns, and what else TRL passes; not used.

    Raises:
        RewardError: as for `composition_reward`, or `q1_credit` is not in [0, 1].
    """
    del prompts, columns
    check_credit(q1_credit)
    return [
        None if final is None else judge_text(text, final, x).credit(q1_credit)
        for text, final, x in _rows(completions, gold_final=gold_final, gold_x=gold_x)
    ]


def format_reward(
    prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any
) -> list[float | None]:
    """1 where both answers are marked, right or wrong, else 0. Arguments as above."""
    del prompts, columns
    return [float(judge_text(text, None, None).marked) for (text,) in _rows(completions)]


def code_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    gold_final: Sequence[Gold],
    isolation: Isolation = "auto",
    **columns: Any,
) -> list[float | None]:
    """1 where running the completion's ``solution()`` gives the gold answer, else 0.

    Code that fails, in whatever way, earns 0.

    Args:
        prompts: not used; TRL passes them.
        completions: texts or lists of chat messages, one per prompt.
        gold_final: the column of gold answers.
        isolation: how the code, which nobody has read, is kept from doing harm; see
            `gsm_compose.sandbox`. Set it with ``functools.partial``.
        columns: further columns, and what else TRL passes; not used.

    Raises:
        RewardError: as for `composition_reward`.
        IsolationError: the isolation does not work here.
    """
    del prompts, columns
    rows = _rows(completions, gold_final=gold_final)
    golds = [gold_number("gold_final", gold) for _, gold in rows]
    asked = [text for (text, _), gold in zip(rows, golds, strict=True) if gold is not None]
    results = iter(run_code_solutions(asked, ("solution",), isolation=isolation))
    return [
        None if gold is None else float(next(results).values.get("solution") == gold)
        for gold in golds
    ]


def completion_text(completion: Completion) -> str:
    """The text of a completion; of chat messages, what the assistant said, message by message.

    Raises:
        RewardError: it is neither a text nor a list of messages.
    """
    if isinstance(completion, str):
        return completion
    try:
        return "\n".join(
            _content(message["content"]) for message in completion if message["role"] == "assistant"
        )
    except (KeyError, TypeError) as error:
        raise RewardError(
            "completions: expected texts or lists of messages with 'role' and 'content', "
            f"got {completion!r}."
        ) from error


def gold_number(name: str, gold: Gold) -> Fraction | None:
    """The gold value as a number; None stays None.

    Raises:
        RewardError: it is not a number; the message has `name`.
    """
    if gold is None:
        return None
    try:
        return Fraction(gold)
    except (TypeError, ValueError) as error:
        raise RewardError(f"{name}: expected an integer or its digits, got {gold!r}.") from error


def check_credit(q1_credit: float) -> None:
    """Raise RewardError unless the partial credit is in [0, 1]."""
    if not 0.0 <= q1_credit <= 1.0:
        raise RewardError(
            f"q1_credit: expected a number in [0, 1], got {q1_credit}. "
            "A right final answer is worth 1."
        )


def _content(content: Any) -> str:
    # Templates for several modalities keep a message's text in parts.
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _rows(completions: Sequence[Completion], **columns: Sequence[Gold]) -> list[tuple[Any, ...]]:
    """Texts with the gold values beside them."""
    for name, column in columns.items():
        if isinstance(column, str) or len(column) != len(completions):
            raise RewardError(
                f"{name}: expected one value for each of the {len(completions)} completions, "
                f"got {column!r}."
            )
    return list(zip(map(completion_text, completions), *columns.values(), strict=True))
