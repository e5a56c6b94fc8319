"""The command line: ``decapod list | reproduce | report``.

Exit codes: 0 if everything ran (whatever the verdicts), 1 if a library failed or could not be
loaded while the others ran, 2 if the request itself was wrong, 130 after Ctrl-C.
"""

from __future__ import annotations

import difflib
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from decapod import runs
from decapod.claims import Profile, Reproduction
from decapod.jobs import make_executor, shard
from decapod.report import ReportError, build
from decapod.report.build import effect_text
from decapod.reproductions import Outcome, discover, reproduce

DEFAULT_OUT = Path("decapod-report")
_SIGNS = {"shown": "✓", "not shown": "○", "reversed": "↺", "failed": "✕"}


class UsageError(Exception):
    """The request cannot be carried out as it was made."""


@dataclass(frozen=True)
class ListCommand:
    """List the reproductions that installed libraries offer, with their claims."""


@dataclass(frozen=True)
class ReproduceCommand:
    """Test the claims of papers and write a report."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Which reproductions; all that are installed if none is named."""
    profile: Profile = "quick"
    """quick: minutes, small; standard: what the docs quote; full: GPU or many machines."""
    jobs: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Jobs at the same time; by default one per core."""
    executor: Literal["local", "ray"] = "local"
    """Where jobs run: processes of this machine, or a Ray cluster."""
    shard: Annotated[str | None, tyro.conf.arg(metavar="I/K")] = None
    """i/k: run only the i-th of k parts of the jobs (0/k to (k-1)/k) and conclude nothing."""
    out: Path = DEFAULT_OUT
    """The report's folder. Finished jobs in it are reused."""


@dataclass(frozen=True)
class ReportCommand:
    """Make report.html, report.md and report.json again from the outcomes in a folder."""

    directory: Annotated[Path, tyro.conf.Positional] = DEFAULT_OUT
    """A folder that `decapod reproduce` wrote."""


Command = (
    Annotated[ListCommand, tyro.conf.subcommand("list")]
    | Annotated[ReproduceCommand, tyro.conf.subcommand("reproduce")]
    | Annotated[ReportCommand, tyro.conf.subcommand("report")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A console that lacks a sign such as ✓ shows a placeholder instead of stopping the run.
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    command: ListCommand | ReproduceCommand | ReportCommand = tyro.cli(
        Command,
        prog="decapod",
        description="Test the claims of papers and report what is shown.",
        args=argv,
    )
    try:
        match command:
            case ListCommand():
                return _list()
            case ReproduceCommand():
                return _reproduce(command)
            case ReportCommand():
                return _report(command.directory)
    except UsageError as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        _complain("interrupted; finished jobs are kept. The same command again runs the rest.")
        return 130


def _list() -> int:
    found, broken = discover()
    for name, reproduction in found.items():
        paper = reproduction.paper
        print(f"{name}: {paper.title} ({paper.venue} {paper.year})")
        for claim in reproduction.claims:
            print(f"  {claim.id}: {claim.statement}")
    _complain_of_broken(broken)
    if not found and not broken:
        print("No installed library offers a reproduction. Install one, such as hpreliability.")
    return 1 if broken else 0


def _reproduce(command: ReproduceCommand) -> int:
    found, broken = discover()
    chosen, unloadable = _chosen(command.names, found, broken)
    n_jobs = command.jobs if command.jobs is not None else runs.environment()["cpu_count"] or 1
    part = None if command.shard is None else _shard(command.shard)
    try:
        make_executor(command.executor, n_jobs)
    except (ImportError, ValueError) as error:
        raise UsageError(str(error)) from error
    _check_writable(command.out)
    _complain_of_broken(unloadable)

    outcomes = []
    for reproduction in chosen:
        outcome = reproduce(
            reproduction, command.profile, command.out, command.executor, n_jobs, part
        )
        outcomes.append(outcome)
        _print_outcome(outcome, command.out)
    if part is None and outcomes:
        build(command.out)
        print(f"Report: {(command.out / 'report.html').resolve()}")
    failed = any(outcome.status == "failed" for outcome in outcomes)
    return 1 if failed or unloadable else 0


def _report(directory: Path) -> int:
    try:
        build(directory)
    except (ReportError, OSError) as error:
        raise UsageError(str(error)) from error
    print(f"Report: {(directory / 'report.html').resolve()}")
    return 0


def _chosen(
    names: Sequence[str], found: Mapping[str, Reproduction], broken: Mapping[str, str]
) -> tuple[list[Reproduction], Mapping[str, str]]:
    """The reproductions to run, and those of the named ones that cannot be."""
    known = [*found, *broken]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise UsageError(f"unknown reproduction {name!r}.{hint} Known: {_listing(known)}.")
    if not known:
        raise UsageError(
            "no installed library offers a reproduction. Install one, such as hpreliability."
        )
    wanted = list(dict.fromkeys(names)) or known
    return (
        [found[name] for name in wanted if name in found],
        {name: broken[name] for name in wanted if name in broken},
    )


def _listing(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none is installed"


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise UsageError(f"--shard: expected i/k such as 0/4, got {text!r}.")
    index, count = int(match[1]), int(match[2])
    try:
        shard([], index, count)
    except ValueError as error:
        raise UsageError(f"--shard: {error}") from error
    return index, count


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UsageError(
            f"--out: cannot write to {out} ({error.strerror or error}). Name another folder."
        ) from error


def _print_outcome(outcome: Outcome, out: Path) -> None:
    print(f"\n{outcome.name} ({outcome.profile}, {outcome.seconds:.1f} s)")
    if outcome.status == "failed":
        reason = (outcome.error.strip().splitlines() or ["no reason given"])[-1]
        where = "" if outcome.jobs_missing else f" Details: {out / outcome.name / 'outcome.json'}"
        _complain(f"{outcome.name} failed: {reason}.{where}")
        return
    if outcome.status == "partial":
        total = outcome.jobs_done + outcome.jobs_missing
        folder = out / outcome.name / "jobs"
        print(
            f"  {outcome.jobs_done} of {total} jobs are done in {folder}. When all parts are, copy "
            "their folders together and run the same command without --shard to conclude."
        )
        return
    for claim in outcome.claims:
        verdict = claim.verdict or "failed"
        text = effect_text(claim)
        n = f"n = {claim.evidence.n} {claim.evidence.unit}" if claim.evidence else ""
        print(f"  {_SIGNS[verdict]} {verdict:<9}  {claim.statement.rstrip('.')}: {text} ({n})")
        if claim.changed:
            _complain(f"{outcome.name}, {claim.id}: the rule is not as recorded before the run.")


def _complain_of_broken(broken: Mapping[str, str]) -> None:
    for name, reason in broken.items():
        last = (reason.strip().splitlines() or ["no reason given"])[-1]
        _complain(f"{name} cannot be loaded: {last}")


def _complain(line: str) -> None:
    print(f"decapod: {line}", file=sys.stderr)
