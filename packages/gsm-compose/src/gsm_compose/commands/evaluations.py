"""Evaluations as files: begun, gone on with, and collected; the command line's ``eval``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from gsm_compose import journal
from gsm_compose.benchmark import Benchmark
from gsm_compose.commands.engines import Engine, Sampling, Server, load
from gsm_compose.commands.run_record import check_record, write_record
from gsm_compose.errors import UsageError
from gsm_compose.evaluation import PAPER, evaluate
from gsm_compose.prompts import Condition, PromptSpec
from gsm_compose.results import Results
from gsm_compose.sandbox import Isolation

_NOT_IN_NAMES: Final = re.compile(r"[^\w.=,-]+")


@dataclass(frozen=True)
class Evaluation:
    """What to ask whom; the fields are those of `gsm_compose.evaluate` and of its engine.

    Attributes:
        engine: what answers.
        sampling: how it draws.
        server: for an engine of that kind.
        label: name of the model in results.
        conditions: what is asked.
        samples: answers to each prompt.
        batch_size: prompts at a time.
        isolation: for model-written code.
    """

    engine: Engine
    sampling: Sampling
    server: Server
    label: str
    conditions: tuple[Condition, ...]
    samples: int
    batch_size: int
    isolation: Isolation

    def __post_init__(self) -> None:
        drawn_alike = self.sampling.temperature == 0 and self.engine.kind != "simulated"
        if self.samples > 1 and drawn_alike:
            raise UsageError("samples: at temperature 0 all are the same. Give --temperature.")

    def run(
        self, file: Path, limit: int | None, asked: Sequence[tuple[PromptSpec, Path]]
    ) -> list[Results]:
        """Ask everything that has no answer yet, one specification after the other.

        Args:
            file: the benchmark.
            limit: only so many of its first items; None for all.
            asked: specifications, and the files that their answers go to.

        Raises:
            UsageError: the model cannot be loaded, or a file has answers drawn in another way.
            MissingExtraError, EvaluationError, OSError: see `load` and `gsm_compose.evaluate`.
        """
        benchmark = first_items(Benchmark.from_jsonl(file), limit)
        for _, out in asked:
            if out.exists() and out.samefile(file):
                raise UsageError("out: expected another file than the benchmark.")
            check_record(out, self.sampling)
        specs = [spec for spec, _ in asked]
        generates = load(self.engine, self.sampling, benchmark, specs, self.server, self.batch_size)
        settings = {"label": self.label, "samples": self.samples, "limit": limit}
        for _, out in asked:
            write_record(out, self.engine, self.sampling, file, settings)
        return [
            evaluate(
                benchmark,
                generate,
                self.conditions,
                spec,
                batch_size=self.batch_size,
                samples=self.samples,
                out=out,
                label=self.label,
                isolation=self.isolation,
            )
            for (spec, out), generate in zip(asked, generates, strict=True)
        ]


def answers_path(file: Path, label: str) -> Path:
    """Where answers go by default: in the current folder, named by benchmark and model."""
    return Path(f"{file.stem}.{_NOT_IN_NAMES.sub('-', label)}.jsonl")


def first_items(benchmark: Benchmark, limit: int | None) -> Benchmark:
    """The first items of a benchmark; all for None.

    Raises:
        UsageError: `limit` is not positive.
    """
    if limit is None:
        return benchmark
    if limit < 1:
        raise UsageError(f"limit: expected at least 1, got {limit}.")
    return replace(benchmark, items=benchmark.items[:limit])


def collect(file: Path, answers: Sequence[Path]) -> dict[str, Results]:
    """Results by name of the model, those of equal names told apart by preamble and file.

    Args:
        file: the benchmark.
        answers: files that `gsm_compose.evaluate` wrote, also of the benchmark's first items only.

    Raises:
        UsageError: no file, or one of them twice.
        BenchmarkFormatError, EvaluationError, OSError: a file cannot be read, or does not belong to
            the benchmark.
    """
    if not answers:
        raise UsageError(
            "answers: expected at least one file of answers after that of the benchmark, got none: "
            "gsm-compose report BENCHMARK ANSWERS"
        )
    if len({path.resolve() for path in (file, *answers)}) <= len(answers):
        raise UsageError("answers: expected every file once, got one of them twice.")
    benchmark = Benchmark.from_jsonl(file)
    found: dict[str, Results] = {}
    for path in answers:
        asked = journal.read(path)[0].get("items")
        # A run with a limit has the benchmark's first items; anything else is another benchmark.
        part = first_items(benchmark, asked if isinstance(asked, int) and asked > 0 else None)
        results = Results.from_jsonl(path, part)
        name = results.label or path.stem
        if not results.spec.preamble:
            name += ", no preamble"
        found[f"{name} ({path})" if name in found else name] = results
    return found


def summary(results: Results) -> str:
    """The gap as text; accuracies alone where its conditions were not all asked."""
    asked = "with" if results.spec.preamble else "without"
    title = f"{results.label}, {asked} preamble"
    if set(PAPER) <= set(results.conditions):
        return f"{title}\n{results.gap().summary()}"
    rows = [
        f"{name:33}{results.accuracy(name):8.3f}  ({results.unparsable(name):.1%} without a number)"
        for name in results.conditions
    ]
    return "\n".join([f"{title}, {len(results.benchmark)} items", *rows])
