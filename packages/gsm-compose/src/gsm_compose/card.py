"""The dataset card: what the hub shows of a benchmark, and what its users must know."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Final

import numpy as np

from gsm_compose._version import __version__
from gsm_compose.benchmark import CANARY, SCHEMA, Benchmark

_SIZES: Final = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))


def dataset_card(benchmark: Benchmark) -> str:
    """Markdown with YAML front matter as the Hugging Face hub reads it.

    It says what an item is, how the set was built and from what, under which licence, that it must
    not be trained on (canary), and gives its statistics. The text depends on nothing but the
    benchmark and this library's version.
    """
    split = benchmark.split
    parts = [
        _front_matter(benchmark),
        f"# Compositional GSM, {len(benchmark)} items from GSM8K {split}",
        "Each item chains grade-school questions of GSM8K: the answer of one (X) takes the place "
        "of a number of the next. A model has to solve them all in one prompt. The method is that "
        "of *Not All LLM Reasoners Are Created Equal* (arXiv 2410.01748), whose data was not "
        "published; this set was built again, by rules, with the library gsm-compose "
        f"{__version__} (schema `{SCHEMA}`).",
        _warning(split),
        "## Statistics\n\n" + _table(_statistics(benchmark)),
        "## How it was built\n\n"
        "Solutions with calculator annotations are parsed into programs over exact rational "
        "numbers. A number of a question may become X only if named rules find it free: stated "
        "once, used once, not tied to another number, and every reading of the solution gives the "
        "same new answer. The new answer is a positive integer that differs from the old one. "
        "Items whose reading is in doubt are rejected, not guessed. No model took part.\n\n"
        "```json\n"
        + json.dumps(dict(benchmark.settings), indent=2, ensure_ascii=False, sort_keys=True)
        + "\n```",
        "## Columns\n\n" + _table(_COLUMNS.items()),
        "## Source, licence, citation\n\n"
        "Questions and solutions come from GSM8K (openai/grade-school-math), MIT licence, "
        "Copyright (c) 2021 OpenAI; numbers were replaced and solutions recomputed. The licence "
        "text (`LICENSE-gsm8k`) must stay with every copy. Cite Cobbe et al., *Training Verifiers "
        "to Solve Math Word Problems* (arXiv 2110.14168), and Hosseini et al., *Not All LLM "
        "Reasoners Are Created Equal* (arXiv 2410.01748).",
    ]
    return "\n\n".join(parts) + "\n"


_COLUMNS: Final = {
    "id": "hash of the item's content, 16 hexadecimal digits",
    "question": "text of the composition",
    "q1, q2": "first and last question alone, numbers filled in",
    "q2_original": "last question as published",
    "gold_x, gold_final": "answers of the first question and of the whole",
    "ignored": "the answer of a model that keeps the original number",
    "problems": "source rows, `gsm8k/<split>/<row>`",
    "hops": "everything, nested: texts, replaced spans, solutions, programs",
    "canary": "the string below",
}


def _front_matter(benchmark: Benchmark) -> str:
    size = next((name for limit, name in _SIZES if len(benchmark) < limit), "100K<n<1M")
    split = benchmark.split
    return f"""---
pretty_name: Compositional GSM ({split})
license: mit
language:
- en
task_categories:
- text-generation
annotations_creators:
- machine-generated
source_datasets:
- openai/gsm8k
size_categories:
- {size}
tags:
- math
- reasoning
- compositional
- benchmark
configs:
- config_name: default
  data_files:
  - split: {split}
    path: data/{split}.parquet
---"""


def _warning(split: str) -> str:
    advice = (
        "These items are made of **test** questions. Do not train on them."
        if split == "test"
        else "These items are made of **train** questions. Do not report them as a test result."
    )
    return (
        f"> **Note.** {advice} Evaluation files of this library carry a canary string, so that "
        f"they can be found in a training corpus:\n>\n> `{CANARY}`"
    )


def _statistics(benchmark: Benchmark) -> list[tuple[str, str]]:
    items = benchmark.items
    old = np.array([item.ignored for item in items], dtype=float)
    new = np.array([item.gold for item in items], dtype=float)
    last = Counter(item.q2.problem for item in items)
    shapes = Counter(f"{item.shape}, {len(item.hops)} questions" for item in items)
    orders = Counter(" → ".join(f"Q{hop + 1}" for hop in item.order) for item in items)
    return [
        ("items", str(len(items))),
        ("shape", _counts(shapes)),
        ("order of presentation", _counts(orders)),
        ("distinct first questions", str(len({item.q1.problem for item in items}))),
        ("distinct last questions", f"{len(last)} (each at most {max(last.values())} times)"),
        ("original answers, quartiles", _quartiles(old)),
        ("new answers, quartiles", _quartiles(new)),
        ("Kolmogorov-Smirnov distance of the two", f"{_ks_distance(old, new):.3f}"),
    ]


def _ks_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Largest distance of the two empirical distribution functions."""
    points = np.concatenate([first, second])
    below = [
        np.searchsorted(np.sort(sample), points, side="right") / len(sample)
        for sample in (first, second)
    ]
    return float(np.abs(below[0] - below[1]).max())


def _quartiles(values: np.ndarray) -> str:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{low:g}, {median:g}, {high:g}"


def _counts(counter: Counter[str]) -> str:
    return "; ".join(f"{name}: {count}" for name, count in sorted(counter.items()))


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
