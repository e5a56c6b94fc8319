"""TRL (1.0 or later): datasets for its trainers. The rewards are in `gsm_compose.rewards`.

GRPOTrainer(
    model, train_dataset=grpo_dataset(benchmark),
    reward_funcs=[composition_reward, q1_reward], args=GRPOConfig(reward_weights=[1.0, 0.2]),
)
SFTTrainer(model, train_dataset=sft_dataset(benchmark))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gsm_compose.benchmark import Benchmark
from gsm_compose.exports import TRAINING_SPEC, require_datasets, require_training_split
from gsm_compose.prompts import Condition, PromptSpec, render, style_of
from gsm_compose.solutions import gold_answers, reference_solution

if TYPE_CHECKING:
    import datasets


def grpo_dataset(
    benchmark: Benchmark,
    spec: PromptSpec = TRAINING_SPEC,
    condition: Condition = "compositional",
    *,
    allow_test_data: bool = False,
) -> datasets.Dataset:
    """Prompts and gold answers for GRPO, RLOO and other trainers that call reward functions.

    Args:
        benchmark: built from the train split.
        spec: how to ask; with ``chat`` the prompts are conversational.
        condition: what to ask.
        allow_test_data: see `gsm_compose.exports.require_training_split`.

    Returns:
        Columns ``prompt``, ``gold_final``, ``gold_x`` (None where one question is asked alone),
        ``ignored`` (the answer if X is ignored), ``item`` and ``source_split``. TRL hands all but
        the prompt to the reward functions as keyword arguments.

    Raises:
        LeakError: the benchmark is made of test questions and that was not allowed.
        MissingExtraError: the extra ``trl`` is not installed.
    """
    require_training_split(benchmark, "grpo_dataset", allow_test_data=allow_test_data)
    rows = []
    for item in benchmark:
        final, x = gold_answers(item, condition)
        rows.append(
            {
                "prompt": render(item, condition, spec),
                "gold_final": final,
                "gold_x": x,
                "ignored": item.ignored,
                "item": item.id,
                "source_split": item.split,
            }
        )
    return _dataset(rows)


def sft_dataset(
    benchmark: Benchmark,
    spec: PromptSpec = TRAINING_SPEC,
    condition: Condition = "compositional",
    *,
    allow_test_data: bool = False,
) -> datasets.Dataset:
    """Prompts and reference solutions in TRL's prompt-completion form.

    Args:
        benchmark: built from the train split.
        spec: how to ask; ``style`` also decides whether the solution is words or code.
        condition: what to ask; not "original-q2", which has no reference solution.
        allow_test_data: see `gsm_compose.exports.require_training_split`.

    Returns:
        Columns ``prompt`` and ``completion`` (texts, or lists of messages with ``chat``), ``item``
        and ``source_split``.

    Raises:
        LeakError: the benchmark is made of test questions and that was not allowed.
        PromptError: code is wanted and a question has no program.
        MissingExtraError: the extra ``trl`` is not installed.
    """
    require_training_split(benchmark, "sft_dataset", allow_test_data=allow_test_data)
    style = style_of(condition, spec)
    rows = []
    for item in benchmark:
        solution = reference_solution(item, condition, style)
        completion: Any = [{"role": "assistant", "content": solution}]
        rows.append(
            {
                "prompt": render(item, condition, spec),
                # A text prompt ends with the word before the line on which the solution begins.
                "completion": completion if spec.chat else f"\n{solution}",
                "item": item.id,
                "source_split": item.split,
            }
        )
    return _dataset(rows)


def _dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    return require_datasets("trl").Dataset.from_list(rows)
