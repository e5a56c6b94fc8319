"""verl: a Parquet file for its ``RLHFDataset``, and the score it calls.

    data.train_files=train.parquet
    reward.custom_reward_function.path=pkg://gsm_compose.integrations.verl_data
    reward.custom_reward_function.name=compute_score

These are the names of verl 0.9; older versions leave out the leading ``reward.``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gsm_compose.benchmark import Benchmark
from gsm_compose.exports import (
    TRAINING_SPEC,
    render_messages,
    require_pyarrow,
    require_training_split,
    require_words,
    write_table,
)
from gsm_compose.prompts import Condition, PromptSpec
from gsm_compose.rewards import check_credit, judge_text
from gsm_compose.solutions import gold_answers

if TYPE_CHECKING:
    import pyarrow

DATA_SOURCE: Final = "gsm-compose"


def write_verl_parquet(
    benchmark: Benchmark,
    path: str | Path,
    spec: PromptSpec = TRAINING_SPEC,
    condition: Condition = "compositional",
    *,
    allow_test_data: bool = False,
) -> None:
    """Write the columns that verl reads.

    ``data_source``, ``prompt`` (always messages: verl applies the chat template), ``ability``,
    ``reward_model`` (style "rule" and the final answer as text) and ``extra_info`` (split, index,
    item, gold_x, ignored; gold_x is null where one question is asked alone).

    Args:
        benchmark: built from the train split.
        path: the file.
        spec: how to ask; prompts are messages whatever its ``chat``.
        condition: what to ask, in words.
        allow_test_data: see `gsm_compose.exports.require_training_split`. Also for a file that is
            only meant for ``data.val_files``.

    Raises:
        LeakError: the benchmark is made of test questions and that was not allowed.
        PromptError: the condition or the spec asks for code, which the score does not run.
        MissingExtraError: the extra ``datasets`` is not installed.
        OSError: the folder does not exist or cannot be written; nothing is left behind.
    """
    require_training_split(benchmark, "write_verl_parquet", allow_test_data=allow_test_data)
    require_words(condition, spec, "write_verl_parquet")
    rows = []
    for index, item in enumerate(benchmark):
        final, x = gold_answers(item, condition)
        rows.append(
            {
                "data_source": f"{DATA_SOURCE}/{condition}",
                "prompt": render_messages(item, condition, spec),
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": str(final)},
                "extra_info": {
                    "split": item.split,
                    "index": index,
                    "item": item.id,
                    "gold_x": x,
                    "ignored": item.ignored,
                },
            }
        )
    write_table(require_pyarrow().Table.from_pylist(rows, schema=_schema()), Path(path))


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    *,
    q1_credit: float = 0.0,
    **context: Any,
) -> dict[str, float]:
    """The score of one answer, by its markers as in `gsm_compose.rewards`.

    Args:
        data_source: not used; verl passes it.
        solution_str: what the model wrote.
        ground_truth: gold final answer.
        extra_info: that of the row; ``gold_x`` is read.
        q1_credit: partial credit in [0, 1] where only the first question is right, set with
            ``reward.custom_reward_function.reward_kwargs.q1_credit=0.3``.
        context: what else verl passes.

    Returns:
        ``score`` for training, and for the logs ``acc`` (the final answer), ``q1`` and ``marked``.

    Raises:
        RewardError: a gold value is not a number, or `q1_credit` is not in [0, 1].
    """
    del data_source, context
    check_credit(q1_credit)
    gold_x = (extra_info or {}).get("gold_x")
    found = judge_text(solution_str, ground_truth, gold_x)
    return {
        "score": found.credit(q1_credit),
        "acc": float(found.final),
        "q1": float(found.q1),
        "marked": float(found.marked),
    }


def _schema() -> pyarrow.Schema:
    """Fixed, so that files of several conditions can be joined."""
    arrow = require_pyarrow()
    text, number = arrow.string(), arrow.int64()
    extra = {"split": text, "index": number, "item": text, "gold_x": number, "ignored": number}
    return arrow.schema(
        [
            ("data_source", text),
            ("prompt", arrow.list_(arrow.struct([("role", text), ("content", text)]))),
            ("ability", text),
            ("reward_model", arrow.struct([("style", text), ("ground_truth", text)])),
            ("extra_info", arrow.struct(list(extra.items()))),
        ]
    )
