"""Command line of hpreliability: options become dataclasses, the library does the work."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import pandas as pd
import tyro

from hpreliability import published
from hpreliability.errors import HPReliabilityError, MissingExtraError
from hpreliability.intervals import IntervalMethod
from hpreliability.ranks import Ties
from hpreliability.readers.consistent_hparams import from_consistent_hparams
from hpreliability.readers.files import read
from hpreliability.scoring import THCTable, thc
from hpreliability.table import Missing, NonFinite, Table
from hpreliability.uncertainty import UncertaintyMethod
from hpreliability.writing import write_text

if TYPE_CHECKING:
    from hpreliability.sweep import Train

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130
_SHOWN_FAILURES = 3


class UsageError(ValueError):
    """The command line asks for something that cannot be done."""


@dataclass(frozen=True)
class Source:
    """Where the scores are, and how their columns are called."""

    results: tyro.conf.Positional[tuple[str, ...]]
    """CSV, JSON lines or Parquet files, one row per run; patterns such as 'runs/*.csv' work."""
    over: tuple[str, ...] = ("env",)
    """Columns whose labels are the contexts to compare."""
    by: tuple[str, ...] = ()
    """Columns that split the runs into groups, besides the hyper-parameter."""
    pool: tuple[str, ...] = ()
    """Columns whose labels are pooled inside each context."""
    hyperparameter: str = "hyperparameter"
    """Column with the name of the hyper-parameter that the run varies."""
    value: str = "value"
    """Column with its setting."""
    seed: str = "seed"
    """Column that tells runs of one setting apart."""
    score: str = "score"
    """Column with the score, higher is better."""
    step: str | None = None
    """Column with the step, if rows are points of learning curves."""
    reduce: Literal["final", "last", "auc", "best"] = "final"
    """How a learning curve becomes one score."""
    nonfinite: NonFinite = "raise"
    """What to do with runs whose score is NaN or infinite."""
    missing: Missing = "raise"
    """What to do when a value has no run in some context."""

    def load(self) -> Table:
        """The table that the options describe, failed runs settled."""
        if not self.results:
            raise UsageError("results: expected at least one file, got none")
        table = read(
            self.results,
            hyperparameter=self.hyperparameter,
            value=self.value,
            seed=self.seed,
            score=self.score,
            context=(*self.over, *self.by, *self.pool),
            step=self.step,
        )
        if table.has_curves:
            table = table.reduce(self.reduce)
        return table.settle(self.nonfinite)


@dataclass(frozen=True)
class Statistic:
    """How scores become a THC score, and what is set beside it."""

    interval: IntervalMethod | None = None
    """Interval of a cell; default: mean_std, or iqm where contexts are pooled."""
    ties: Ties = "paper"
    """How overlapping intervals rank."""
    uncertainty: UncertaintyMethod | Literal["none"] = "bootstrap"
    """Interval of the expected THC score."""
    replicates: int = 2000
    """Bootstrap replicates of that interval."""
    permutations: int = 1000
    """Permutations of the null; 0 for none."""
    random_seed: int = 0
    """Root of all randomness."""

    def score(self, table: Table, source: Source) -> THCTable:
        """THC of every group of the table."""
        return thc(
            table,
            over=source.over,
            by=("hyperparameter", *source.by),
            interval=self.interval,
            ties=self.ties,
            uncertainty=None if self.uncertainty == "none" else self.uncertainty,
            replicates=self.replicates,
            null=None if self.permutations == 0 else "permutation",
            permutations=self.permutations,
            missing=source.missing,
            seed=self.random_seed,
        )


@dataclass(frozen=True)
class Score:
    """Print the THC score of every hyper-parameter, least consistent first."""

    source: tyro.conf.OmitArgPrefixes[Source]
    statistic: tyro.conf.OmitArgPrefixes[Statistic] = field(default_factory=Statistic)
    out: Path | None = None
    """Also write the table here: .csv or .json."""

    def run(self) -> int:
        """Exit status."""
        _check_table_name(self.out)
        result = self.statistic.score(self.source.load(), self.source)
        key = "calibrated" if "calibrated" in result.frame else "score"
        frame = result.frame.sort_values(key, ascending=False, kind="stable", ignore_index=True)
        print(_text(frame))
        _print_notes(result.notes)
        _write_table(frame, self.out)
        return 0


@dataclass(frozen=True)
class Report:
    """Write an HTML report: scores, nulls, ranks, recommendations."""

    source: tyro.conf.OmitArgPrefixes[Source]
    statistic: tyro.conf.OmitArgPrefixes[Statistic] = field(default_factory=Statistic)
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """The file to write."""
    title: str = "How consistent are these hyper-parameters?"
    """Heading of the page."""

    def run(self) -> int:
        """Exit status."""
        from hpreliability.report import write_report

        table = self.source.load()
        result = self.statistic.score(table, self.source)
        write_report(table, self.out, result=result, missing=self.source.missing, title=self.title)
        print(self.out)
        return 0


@dataclass(frozen=True)
class SweepRun:
    """Run what is missing of a sweep; may be interrupted and started again at any time."""

    action: tyro.conf.Positional[Literal["run"]]
    """What to do with the sweep."""
    spec: tyro.conf.Positional[Path]
    """YAML file with the fields of SweepSpec."""
    train: str
    """What trains: 'sb3-dqn', or 'module:function' (see Sweep.run for its arguments)."""
    jobs: int = 1
    """Runs at the same time."""
    executor: Literal["local", "ray"] = "local"
    """Processes of this machine, or a Ray cluster."""
    shard: str | None = None
    """i/k: only part i of k, from 0; merge the parts by copying their files into one folder."""
    directory: Path | None = None
    """Folder of the results; default: sweeps/<name>."""

    def run(self) -> int:
        """Exit status."""
        from hpreliability.sweep import Sweep

        sweep = Sweep.from_yaml(self.spec, directory=self.directory)
        report = sweep.run(
            _train_function(self.train),
            executor=self.executor,
            n_jobs=self.jobs,
            shard=None if self.shard is None else _shard(self.shard),
        )
        print(
            f"{len(report.results)} runs done ({report.reused} before), {len(report.failures)} "
            f"failed, {len(report.missing)} left to other shards: {sweep.folder}"
        )
        for failure in report.failures[:_SHOWN_FAILURES]:
            print(f"{failure.label or failure.key}: {failure.error}", file=sys.stderr)
        if report.complete:
            table = sweep.folder / "results.csv"
            sweep.write_csv(table)
            print(table)
        return _FAILED if report.failures else 0


@dataclass(frozen=True)
class Reproduce:
    """Rebuild the published THC table from the authors' scores, then rank with a null.

    Exit status 1 if a published cell is not matched to 1e-9 in mean and standard deviation.
    """

    data: Path | None = None
    """Folder `data` of joaogui1/Consistent-Data-Analysis; default: the scores in the package."""
    permutations: int = 1000
    """Permutations of the null."""
    out: Path | None = None
    """Also write the cells with null and p-value here: .csv or .json."""

    def run(self) -> int:
        """Exit status."""
        _check_table_name(self.out)
        table = published.load_scores() if self.data is None else self._authors_pickles()
        cells = published.compare(published.recompute(table), published.load_published())
        print(_text(_readable(cells), decimals=6))
        matched = int(cells["match"].sum())
        print(
            f"\n{matched} of {len(cells)} cells match the published mean and standard deviation "
            f"to {published.TOLERANCE:g}\n"
        )
        result = thc(table, over="env", uncertainty="bootstrap", permutations=self.permutations)
        frame = result.frame.merge(cells[["regime", "agent", "hyperparameter", "match"]])
        frame = frame.sort_values("calibrated", ascending=False, ignore_index=True)
        shown = ["score", "low", "high", "null_low", "null_mean", "null_high", "p_value"]
        print(_text(_readable(frame)[["agent", "hyperparameter", "calibrated", *shown]]))
        _write_table(frame, self.out)
        return 0 if matched == len(cells) else _FAILED

    def _authors_pickles(self) -> Table:
        assert self.data is not None
        regimes = published.load_published()["regime"].unique().tolist()
        table = from_consistent_hparams(self.data, incomplete="leave_out").select(regime=regimes)
        _print_notes([*table.notes, f"only regime {', '.join(regimes)} is compared"])
        return table


Command = (
    Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[SweepRun, tyro.conf.subcommand("sweep")]
    | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 if something failed; 2 for bad input; 130 after Ctrl-C.
    """
    command = tyro.cli(
        Command,
        prog="hpreliability",
        description="How consistent is a hyper-parameter choice across contexts?",
        args=arguments,
    )
    try:
        return command.run()
    except (HPReliabilityError, MissingExtraError, OSError, ValueError) as error:
        print(f"hpreliability: {error}", file=sys.stderr)
        return _USAGE
    except KeyboardInterrupt:
        print("hpreliability: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _train_function(name: str) -> Train:
    if name == "sb3-dqn":
        from hpreliability.integrations.sb3_dqn import train

        return train
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise UsageError(f"train: expected 'sb3-dqn' or 'module:function', got {name!r}")
    # As with `python -m`, modules of the current folder count.
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"train: cannot load {name!r}: {error}") from error
    if not callable(function):
        raise UsageError(f"train: {name!r} is not a function but {type(function).__name__}")
    loaded: Train = function
    return loaded


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise UsageError(f"shard: expected i/k such as 0/4, got {text!r}")
    return int(index), int(count)


def _readable(cells: pd.DataFrame) -> pd.DataFrame:
    return cells.assign(
        agent=cells["agent"].replace(published.AGENT_NAMES),
        hyperparameter=cells["hyperparameter"].replace(published.DISPLAY_NAMES),
    ).drop(columns="name", errors="ignore")


def _text(frame: pd.DataFrame, decimals: int = 3) -> str:
    return frame.to_string(index=False, float_format=lambda x: f"{x:.{decimals}f}")


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _check_table_name(path: Path | None) -> None:
    if path is not None and path.suffix not in (".csv", ".json"):
        raise UsageError(f"out: expected a name that ends in .csv or .json, got {path.name!r}")


def _write_table(frame: pd.DataFrame, path: Path | None) -> None:
    if path is None:
        return
    text = (
        frame.to_csv(index=False)
        if path.suffix == ".csv"
        else json.dumps(frame.to_dict("records"), indent=2, ensure_ascii=False) + "\n"
    )
    write_text(path, text)


if __name__ == "__main__":
    raise SystemExit(main())
