"""Command line of gsm-compose: options become dataclasses, the library does the work.

Exit codes: 0 if all went well, 1 if something failed or faults were found, 2 if what was asked for
cannot be done, 130 after Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, cast

import tyro

from gsm_compose.benchmark import Benchmark
from gsm_compose.commands.engines import Engine, Sampling, Server
from gsm_compose.commands.formats import Asking, Format, export_folder, spec_of
from gsm_compose.commands.steps import steps
from gsm_compose.errors import EvaluationError, GSMComposeError, MissingExtraError, UsageError
from gsm_compose.items import Shape
from gsm_compose.prompts import CONDITIONS, Condition, PromptSpec, Style
from gsm_compose.sandbox import Isolation
from gsm_compose.writing import write_text

if TYPE_CHECKING:
    from gsm_compose.engine.problems import Problem

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130
_PAPER: Final[tuple[Condition, ...]] = ("original", "modified", "compositional")

Split = Literal["train", "test"]
File = tyro.conf.Positional[Path]


@dataclass(frozen=True)
class Rows:
    """Where rows of GSM8K come from."""

    split: Split | None = None
    """Vendored rows; with --source, what its rows are, where the file's name does not say."""
    source: Path | None = None
    """A .jsonl or .jsonl.gz file of rows instead."""

    def load(self, split: Split = "test") -> list[Problem]:
        """The rows; those of the given split if the options say nothing."""
        from gsm_compose.engine.problems import load_gsm8k

        if self.source is None:
            return load_gsm8k(split=self.split or split)
        return load_gsm8k(self.source, self.split)


@dataclass(frozen=True)
class Build:
    """Build a benchmark."""

    rows: tyro.conf.OmitArgPrefixes[Rows] = field(default_factory=Rows)
    n: int = 1200
    """Number of items."""
    hops: int | None = None
    """Questions in an item, 2 to 4; default: 2. A fan-in has 3."""
    shape: Shape = "chain"
    """chain: each answer goes into the next question; fan_in: two answers go into one question."""
    reverse: bool = False
    """Show the dependent question first."""
    ratio: str = "3"
    """Largest factor between the new and the published answer of a question; also 5/2."""
    max_reuse: int | None = None
    """How often a question may serve after the first place; default: the least that is enough."""
    seed: int = 0
    """Same seed and rows, same file, byte for byte."""
    exclude: tuple[str, ...] = ()
    """Rows to leave out: ids such as gsm8k/test/418, or files with an id on each line."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("benchmark.jsonl")
    """The file to write."""
    card: bool = False
    """Write the dataset card beside it, under the same name with .md."""
    force: bool = False
    """Replace files that are there."""

    def run(self) -> int:
        """Exit status."""
        from gsm_compose.building import build_benchmark
        from gsm_compose.commands.listing import stats_text
        from gsm_compose.commands.run_record import sha256

        _check_free(self.out, self.force)
        card = self.out.with_suffix(".md")
        if self.card:
            if card == self.out:
                raise UsageError("out: expected another ending than .md, which is the card's.")
            _check_free(card, self.force)
        if self.shape == "fan_in" and self.hops not in (None, 3):
            raise UsageError(f"hops: a fan-in has 3, got {self.hops}.")
        ratio = _ratio(self.ratio)
        with steps() as step:
            step("reading rows")
            problems = self.rows.load()
            exclude = _row_ids(self.exclude, problems)
            step(f"building {self.n} items from {len(problems)} rows")
            benchmark = build_benchmark(
                problems,
                self.n,
                3 if self.shape == "fan_in" else self.hops or 2,
                ratio,
                self.max_reuse,
                self.seed,
                shape=self.shape,
                reverse=self.reverse,
                exclude=exclude,
            )
            step("writing")
            benchmark.to_jsonl(self.out)
            if self.card:
                write_text(card, benchmark.card())
            stats = benchmark.stats()
        print(stats_text(stats))
        print(f"\nmax_reuse {benchmark.settings['max_reuse']}, seed {self.seed}")
        print(f"{self.out}  sha256 {sha256(self.out)}")
        if self.card:
            print(card)
        return 0


@dataclass(frozen=True)
class Audit:
    """Count what the rules leave of a split; or check a benchmark against its rows.

    Exit status 1 if an item has a fault.
    """

    file: tyro.conf.Positional[Path | None] = None
    """A benchmark to check; without one, the yield of every rule on the rows."""
    rows: tyro.conf.OmitArgPrefixes[Rows] = field(default_factory=Rows)
    explain: tuple[str, ...] = ()
    """Rows, such as gsm8k/test/418: only say of each of their numbers whether it may become X."""
    execute: bool = True
    """Run the program of every item in the sandbox."""
    isolation: Isolation = "auto"
    """Of the sandbox."""
    workers: int = 2
    """Programs that run at the same time."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON."""

    def run(self) -> int:
        """Exit status."""
        if self.explain:
            if self.file is not None:
                raise UsageError("explain: rows are explained by themselves; leave out the file.")
            return self._explain()
        return self._yields() if self.file is None else self._check(self.file)

    def _explain(self) -> int:
        from gsm_compose.commands.listing import explanation, explanation_text, find_row

        found = []
        for identity in self.explain:
            split: Split = "train" if "train" in identity else "test"
            found.append(explanation(find_row(identity, self.rows.load(split))))
        print(_json(found) if self.as_json else "\n\n".join(map(explanation_text, found)))
        return 0

    def _yields(self) -> int:
        from gsm_compose.commands.listing import yields_text
        from gsm_compose.engine.yields import count_yields

        with steps() as step:
            step("reading rows")
            problems = self.rows.load()
            step("applying the rules")
            found = count_yields(problems)
        print(_json(asdict(found)) if self.as_json else yields_text(found))
        return 0

    def _check(self, file: Path) -> int:
        from gsm_compose.commands.listing import audit_text, stats_text
        from gsm_compose.verify import symbolic_audit

        with steps() as step:
            step("reading")
            benchmark = Benchmark.from_jsonl(file)
            problems = self.rows.load(benchmark.split)
            step("checking items" + (" and running their programs" if self.execute else ""))
            audit = symbolic_audit(
                benchmark,
                problems,
                execute=self.execute,
                isolation=self.isolation,
                workers=self.workers,
            )
            stats = benchmark.stats()
        if self.as_json:
            print(_json({"clean": audit.clean, **asdict(audit), "stats": stats}))
        else:
            print(stats_text(stats), audit_text(audit, benchmark), sep="\n\n")
        return 0 if audit.clean else _FAILED


@dataclass(frozen=True)
class Eval:
    """Ask a model all questions of a benchmark; may be interrupted and started again."""

    file: File
    """The benchmark."""
    engine: str
    """hf:PATH, vllm:PATH, server:URL (OpenAI-compatible), or simulated:e1=0.1,e2=0.2."""
    conditions: tuple[Condition | Literal["all"], ...] = _PAPER
    """What to ask."""
    style: Style = "cot"
    """Solutions in words, or in Python that is then run."""
    shots: int = 8
    """Worked examples before the question."""
    preamble: Literal["yes", "no", "both"] = "yes"
    """Say in advance in which form the answer is wanted; both: two runs, as in the paper."""
    chat: bool = False
    """Ask with chat messages instead of plain text."""
    samples: int = 1
    """Answers to each prompt; the majority counts."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    server: tyro.conf.OmitArgPrefixes[Server] = field(default_factory=Server)
    batch_size: int = 64
    """Prompts at a time; what has been answered is on disk after each batch."""
    limit: int | None = None
    """Only the first items."""
    isolation: Isolation = "auto"
    """For model-written code."""
    label: str | None = None
    """Name of the model in results; default: from the engine."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Answers, appended to as they come; default: <benchmark>.<label>.jsonl here."""

    def run(self) -> int:
        """Exit status."""
        from gsm_compose.commands.evaluations import Evaluation, answers_path, summary
        from gsm_compose.results import best_of

        engine = Engine.parse(self.engine)
        label = self.label or engine.label(self.server.model)
        conditions = CONDITIONS if "all" in self.conditions else tuple(self.conditions)
        evaluation = Evaluation(
            engine,
            self.sampling,
            self.server,
            label,
            cast(tuple[Condition, ...], conditions),
            self.samples,
            self.batch_size,
            self.isolation,
        )
        out = self.out or answers_path(self.file, label)
        spec = PromptSpec(self.style, self.shots, self.preamble != "no", self.chat)
        asked = [(spec, out)]
        if self.preamble == "both":
            plain = out.with_stem(f"{out.stem}-no-preamble")
            asked.append((replace(spec, preamble=False), plain))
        found = evaluation.run(self.file, self.limit, asked)
        for results, (_, path) in zip(found, asked, strict=True):
            print(summary(results), f"{path}\n", sep="\n")
        if len(found) == 2:
            print(best_of(*found).summary())
        return 0


@dataclass(frozen=True)
class Report:
    """Write a report on answers: a page, and the same as Markdown or JSON if asked for."""

    file: File
    """The benchmark."""
    answers: tyro.conf.Positional[tuple[Path, ...]]
    """Files that `gsm-compose eval` wrote, one for every model."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """HTML page; default: report.html, unless only another form is asked for."""
    markdown: Path | None = None
    """Markdown."""
    json_out: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """JSON."""
    level: float = 0.95
    """Of the intervals."""
    exclude: tuple[str, ...] = ()
    """Items or rows whose labels are in doubt, as ids or files of them; shown with and without."""
    title: str = "The reasoning gap"
    """Heading of the page."""

    def run(self) -> int:
        """Exit status."""
        from gsm_compose.commands.evaluations import collect
        from gsm_compose.commands.listing import read_ids
        from gsm_compose.report import report_json, report_markdown, write_report

        nothing = self.markdown is None and self.json_out is None
        out = Path("report.html") if self.out is None and nothing else self.out
        given = {path.resolve() for path in (self.file, *self.answers)}
        for path in (out, self.markdown, self.json_out):
            if path is not None and path.resolve() in given:
                raise UsageError(f"out: {path} is one of the files to report on.")
        results = collect(self.file, self.answers)
        exclude = read_ids(self.exclude)
        if self.markdown is not None:
            text = report_markdown(results, level=self.level, exclude=exclude, title=self.title)
            write_text(self.markdown, text)
        if self.json_out is not None:
            write_text(self.json_out, report_json(results, level=self.level, exclude=exclude))
        if out is not None:
            write_report(results, out, level=self.level, exclude=exclude, title=self.title)
        for path in (out, self.markdown, self.json_out):
            if path is not None:
                print(path)
        return 0


@dataclass(frozen=True)
class Export:
    """Write a benchmark as a folder that another tool reads."""

    file: File
    """The benchmark."""
    to: Format
    """The tool. trl, sft, verl and open-instruct are for training, the others for evaluation."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The folder to write."""
    conditions: tuple[Condition, ...] | None = None
    """What the prompts ask; default: compositions for training, the paper's three otherwise."""
    style: Style | None = None
    """Words or Python."""
    shots: int | None = None
    """Worked examples in the prompts; default: none for training, 8 otherwise."""
    preamble: bool = True
    """Say in which form the answer is wanted."""
    chat: bool = False
    """Chat messages, where the format has a choice."""
    allow_test_data: bool = False
    """Make training data of test questions, knowing what that does to test results."""
    force: bool = False
    """Write into a folder that has files."""

    def run(self) -> int:
        """Exit status."""
        spec = spec_of(self.to, self.style, self.shots, preamble=self.preamble, chat=self.chat)
        asking = Asking(spec, self.conditions, self.allow_test_data)
        benchmark = Benchmark.from_jsonl(self.file)
        for path in export_folder(benchmark, self.to, self.out, asking, force=self.force):
            print(path)
        return 0


Command = (
    Annotated[Build, tyro.conf.subcommand("build")]
    | Annotated[Audit, tyro.conf.subcommand("audit")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Export, tyro.conf.subcommand("export")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A console that lacks a sign such as Δ shows a placeholder instead of stopping the run.
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    try:
        command = tyro.cli(
            Command,
            prog="gsm-compose",
            description="Compositions of grade-school problems, and the reasoning gap.",
            args=arguments,
        )
        status: int = command.run()
        sys.stdout.flush()
        return status
    except EvaluationError as error:
        _complain(error)
        # With a cause, it is the model that failed, not what was asked for.
        return _FAILED if error.__cause__ is not None else _USAGE
    except BrokenPipeError:
        # Whoever read our output has seen enough; what is left goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        _complain(error)
        return _USAGE
    except OSError as error:
        _complain(error)
        return _FAILED
    except (GSMComposeError, MissingExtraError, ValueError) as error:
        _complain(error)
        return _USAGE
    except KeyboardInterrupt as interrupt:
        kept = " ".join(getattr(interrupt, "__notes__", ["nothing half-written is left behind"]))
        _complain(f"interrupted; {kept}")
        return _INTERRUPTED


def _complain(problem: object) -> None:
    print(f"gsm-compose: {' '.join(str(problem).split())}", file=sys.stderr)


def _json(content: object) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)


def _check_free(path: Path, force: bool) -> None:
    if path.is_dir():
        raise UsageError(f"out: expected a file, {path} is a folder.")
    if not path.parent.is_dir():
        raise UsageError(f"out: the folder {path.parent} does not exist.")
    if path.exists() and not force:
        raise UsageError(f"out: {path} exists already. Give another name, or --force.")


def _ratio(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"ratio: expected a number such as 3 or 5/2, got {text!r}.") from error


def _row_ids(given: Sequence[str], problems: Sequence[Problem]) -> list[str]:
    from gsm_compose.commands.listing import find_row, read_ids

    return [find_row(identity, problems).id for identity in read_ids(given)]


if __name__ == "__main__":
    raise SystemExit(main())
