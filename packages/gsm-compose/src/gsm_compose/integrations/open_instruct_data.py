"""open-instruct: JSON lines for its training with verifiable rewards, and for its fine-tuning.

Each row has ``messages``, ``ground_truth`` and ``dataset``, the name of the verifier. The last
message is the reference solution: open-instruct takes all but an answering last message as the
prompt (some of its versions drop the last of several messages whatever its role).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from gsm_compose.benchmark import Benchmark
from gsm_compose.exports import (
    TRAINING_SPEC,
    render_messages,
    require_training_split,
    require_words,
    write_rows,
)
from gsm_compose.prompts import Condition, PromptSpec
from gsm_compose.solutions import gold_answers, reference_solution

VERIFIER: Final = "gsm8k"
"""open-instruct's verifier that compares the last number of an answer with the ground truth."""


def write_open_instruct_jsonl(
    benchmark: Benchmark,
    path: str | Path,
    spec: PromptSpec = TRAINING_SPEC,
    condition: Condition = "compositional",
    *,
    allow_test_data: bool = False,
) -> None:
    """Write one row per item.

    Args:
        benchmark: built from the train split.
        path: the file.
        spec: how to ask; prompts are messages whatever its ``chat``.
        condition: what to ask; not "original-q2", which has no reference solution.
        allow_test_data: see `gsm_compose.exports.require_training_split`.

    Raises:
        LeakError: the benchmark is made of test questions and that was not allowed.
        PromptError: the condition or the spec asks for code, which the verifier does not run.
        OSError: the folder does not exist or cannot be written; nothing is left behind.
    """
    require_training_split(benchmark, "write_open_instruct_jsonl", allow_test_data=allow_test_data)
    require_words(condition, spec, "write_open_instruct_jsonl")
    rows: list[dict[str, Any]] = []
    for item in benchmark:
        solved = {"role": "assistant", "content": reference_solution(item, condition)}
        rows.append(
            {
                "messages": [*render_messages(item, condition, spec), solved],
                "ground_truth": str(gold_answers(item, condition)[0]),
                "dataset": VERIFIER,
                "item": item.id,
                "source_split": item.split,
            }
        )
    write_rows(Path(path), rows)
