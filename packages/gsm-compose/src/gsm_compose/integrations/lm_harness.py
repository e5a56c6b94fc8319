"""lm-evaluation-harness (0.4.9 or later): a folder of tasks, and the gap from its logged samples.

    write_task_folder(benchmark, "tasks")
    # lm_eval run --model hf --model_args pretrained=… --include_path tasks --tasks gsm_compose \\
    #     --log_samples --output_path out
    results_from_samples("out", benchmark).gap().summary()

The folder is complete: prompts are rendered into its data files and the Python file in it imports
only what the harness brings, so it runs where this library is not installed and may be moved. The
harness itself aggregates over tasks by a mean and nothing else, so the gap, which needs three
tasks, and everything that is read inside an answer, come from the logged samples.

Each task has two filters. ``strict`` takes the last "final answer is N" and the like, ``flexible``
the last number. `results_from_samples` reads the full answers with `gsm_compose.parse`, the same
as `gsm_compose.evaluate`, whatever the filters found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from gsm_compose.benchmark import CANARY, Benchmark
from gsm_compose.errors import EvaluationError, PromptError
from gsm_compose.evaluation import PAPER, Results
from gsm_compose.exports import require_words, write_license, write_rows
from gsm_compose.prompts import DEFAULT_SPEC, Condition, PromptSpec, render, stop_sequences
from gsm_compose.replay import results_from_texts
from gsm_compose.solutions import gold_answers
from gsm_compose.writing import write_text

_NAME: Final = re.compile(r"[A-Za-z]\w*", re.ASCII)
_VERSION: Final = 1  # of the tasks: raised when a change makes scores not comparable
_NUMBER: Final = r"[-−]?\d[\d,]*(?:\.\d+)?(?:/\d+)?"
_BEFORE: Final = r"[\s:=*$€£\\({]*"  # what may stand between a marker and its number
STRICT: Final = rf"(?i)(?:final answer is|\banswer:|####|\\boxed\{{){_BEFORE}({_NUMBER})"
FLEXIBLE: Final = rf"({_NUMBER})"

_UTILS: Final = '''"""Data and scoring of the tasks here; needs no more than the harness."""

import json
from fractions import Fraction
from pathlib import Path

import datasets


def load(condition, **_):
    """The rows of one condition; the harness passes its metadata as well."""
    path = Path(__file__).parent / "data" / f"{condition}.jsonl"
    with path.open(encoding="utf-8") as file:
        return {"test": datasets.Dataset.from_list([json.loads(line) for line in file])}


def process_results(doc, results):
    """Equality of numbers, however they are written: 1048, 1,048 and 1048.0 are the same."""
    return {"exact_match": float(_number(results[0]) == Fraction(doc["target"]))}


def _number(text):
    try:
        return Fraction(text.replace(",", "").replace("\\u2212", "-"))
    except (ValueError, ZeroDivisionError):
        return None
'''


def write_task_folder(
    benchmark: Benchmark,
    folder: str | Path,
    spec: PromptSpec = DEFAULT_SPEC,
    conditions: Sequence[Condition] = PAPER,
    *,
    name: str = "gsm_compose",
    max_tokens: int = 1024,
) -> None:
    """Write a folder for ``--include_path``: one task per condition and a group of them all.

    Args:
        benchmark: what to ask.
        folder: created if missing; files of the same names are replaced.
        spec: how to ask. Plain text in words; with ``--apply_chat_template`` the harness makes one
            user message of a prompt.
        conditions: one task each, named ``<name>_<condition>`` with underscores.
        name: of the group; letters, digits and underscores.
        max_tokens: how long an answer may be.

    Raises:
        PromptError: `spec` or a condition asks for messages or for code, which the harness would
            not run; or `name` will not do.
        OSError: the folder cannot be written.
    """
    _check(spec, conditions, name, max_tokens)
    folder = Path(folder)
    data = {condition: _docs(benchmark, condition, spec) for condition in conditions}
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for condition, docs in data.items():
        write_rows(folder / "data" / f"{condition}.jsonl", docs)
        text = _task_yaml(name, condition, spec, max_tokens)
        write_text(folder / f"{task_name(name, condition)}.yaml", text)
    write_text(folder / "utils.py", _UTILS)
    write_license(folder)
    # Last, so that the group never names a task that is not there.
    tasks = "".join(f"  - {task_name(name, condition)}\n" for condition in conditions)
    write_text(
        folder / f"{name}.yaml",
        f"group: {name}\ntask:\n{tasks}metadata:\n  version: {_VERSION}\n",
    )


def task_name(name: str, condition: Condition) -> str:
    """Name of the task of one condition."""
    return f"{name}_{condition.replace('-', '_')}"


def results_from_samples(
    samples: str | Path | Sequence[str | Path], benchmark: Benchmark, *, partial: bool = False
) -> Results:
    """Score the answers that ``--log_samples`` wrote, as `gsm_compose.evaluate` would.

    Args:
        samples: ``samples_*.jsonl`` files of one run, or a folder that holds those of one run.
        benchmark: the benchmark of the task folder.
        partial: allow answers for some of the items only (a run with ``--limit``); the results are
            then of the items that every condition has.

    Returns:
        Results, whose ``gap()`` is the report.

    Raises:
        EvaluationError: no samples, several runs, a line that is no sample, samples of another
            benchmark, or answers missing while `partial` is False.
    """
    texts: dict[Condition, dict[str, str]] = {}
    specs = set()
    for path in _files(samples):
        condition, answers, spec = _read(path)
        if condition in texts:
            raise EvaluationError(
                f"samples: expected one run, {path} is a second one for {condition!r}. "
                "Pass the files of one run."
            )
        texts[condition] = answers
        specs.add(spec)
    if len(specs) != 1:
        raise EvaluationError(
            f"samples: expected one prompt specification in all files, got {specs}."
        )
    return results_from_texts(benchmark, texts, specs.pop(), partial=partial)


def _check(spec: PromptSpec, conditions: Sequence[Condition], name: str, max_tokens: int) -> None:
    if spec.chat:
        raise PromptError(
            "spec: expected chat=False, the harness makes messages itself (--apply_chat_template)."
        )
    if not conditions or len(set(conditions)) < len(conditions):
        raise PromptError(f"conditions: expected some, each once, got {list(conditions)}.")
    for condition in conditions:
        require_words(condition, spec, "conditions")
    if not _NAME.fullmatch(name):
        raise PromptError(f"name: expected letters, digits and underscores, got {name!r}.")
    if max_tokens < 1:
        raise PromptError(f"max_tokens: expected at least 1, got {max_tokens}.")


def _docs(benchmark: Benchmark, condition: Condition, spec: PromptSpec) -> list[dict[str, Any]]:
    docs = []
    for item in benchmark:
        final, x = gold_answers(item, condition)
        docs.append(
            {
                "id": item.id,
                "condition": condition,
                "prompt": render(item, condition, spec),
                "target": str(final),
                "gold_x": x,
                "ignored": item.ignored,
                "style": spec.style,
                "shots": spec.shots,
                "preamble": spec.preamble,
                "canary": CANARY,
            }
        )
    return docs


def _task_yaml(name: str, condition: Condition, spec: PromptSpec, max_tokens: int) -> str:
    # JSON strings and lists are YAML.
    until = json.dumps(list(stop_sequences(condition, spec)))
    return f"""task: {task_name(name, condition)}
# {CANARY}
custom_dataset: !function utils.load
dataset_kwargs:
  condition: {condition}
test_split: test
num_fewshot: 0  # worked examples are part of the prompts
output_type: generate_until
doc_to_text: prompt
doc_to_target: target
process_results: !function utils.process_results
generation_kwargs:
  do_sample: false
  until: {until}
  max_gen_toks: {max_tokens}
filter_list:
  - name: strict
    filter:
      - function: regex
        regex_pattern: {json.dumps(STRICT, ensure_ascii=False)}
        group_select: -1
      - function: take_first
  - name: flexible
    filter:
      - function: regex
        regex_pattern: {json.dumps(FLEXIBLE, ensure_ascii=False)}
        group_select: -1
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: {_VERSION}
"""


def _files(samples: str | Path | Sequence[str | Path]) -> list[Path]:
    given = [samples] if isinstance(samples, str | Path) else samples
    found: list[Path] = []
    for path in map(Path, given):
        found += sorted(path.rglob("samples_*.jsonl")) if path.is_dir() else [path]
    if not found:
        raise EvaluationError(
            f"samples: no samples_*.jsonl under {samples!r}. "
            "Was the harness run with --log_samples and --output_path?"
        )
    return found


def _read(path: Path) -> tuple[Condition, dict[str, str], PromptSpec]:
    """Condition, answers by item, and specification of one file.

    The harness writes every answer once per filter, with the same full text.
    """
    answers: dict[str, str] = {}
    seen: set[tuple[Condition, PromptSpec]] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            sample = json.loads(line)
            doc = sample["doc"]
            answers[doc["id"]] = sample["resps"][0][0]
            spec = PromptSpec(style=doc["style"], shots=doc["shots"], preamble=doc["preamble"])
            seen.add((doc["condition"], spec))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise EvaluationError(
                f"{path}, line {number}: not a sample of a task of this library: {error!r}. "
                "It was truncated, or is of another task."
            ) from error
    if len(seen) != 1:
        raise EvaluationError(
            f"{path}: expected answers under one condition, got {len(seen)} of them."
        )
    condition, spec = seen.pop()
    return condition, answers, spec
