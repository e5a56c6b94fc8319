"""A sweep: every hyper-parameter value in every context with every seed, run and kept.

The sweep decides which runs there are and with which seed; `decapod.jobs` runs them, on this
machine or many, keeps every result and, after an interruption, runs only what is missing.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hpreliability.errors import (
    EmptyInputError,
    IncompleteSweepError,
    MissingExtraError,
    SweepConfigError,
)
from hpreliability.sweep.calls import Train, as_job, require_signature
from hpreliability.sweep.spec import SweepSpec, canonical, load_yaml, spec_from
from hpreliability.sweep.tabulation import frame_of, notes_of, points_of
from hpreliability.sweep.trials import Others, Trial, arguments_of, slices_of, trials_of
from hpreliability.table import Table, from_frame
from hpreliability.writing import write_text

if TYPE_CHECKING:
    from decapod.jobs import Executor, Job, JobReport, JobResult, Store

_RECORD = "sweep.json"
# loky, joblib's engine, gives up all running jobs when one of its workers is killed; the name is
# understood, and decapod's own processes do the work.
_EXECUTOR_ALIASES = {"joblib": "local"}


@dataclass(frozen=True)
class Sweep:
    """A sweep and where its results are kept.

    Attributes:
        spec: what to run.
        directory: folder of the results; None for `sweeps/<name>` in the current folder.
        part: (index, count), 0-based, where this is a shard; see `shard`.
    """

    spec: SweepSpec
    directory: Path | str | None = None
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.part is not None:
            index, count = self.part
            if not 0 <= index < count:
                raise SweepConfigError(
                    f"shard: expected index/count with 0 <= index < count, got {index}/{count}; "
                    "the first of four is 0/4"
                )

    @classmethod
    def from_yaml(cls, path: Path | str, *, directory: Path | str | None = None) -> Self:
        """The sweep that a YAML file describes: the fields of `SweepSpec` as keys.

        Numbers such as `1e-3` are numbers here, as in YAML 1.2 (plain YAML 1.1 reads text).

        Raises:
            SweepConfigError: not YAML, or a key is unknown, missing, given twice, or wrong; the
                message begins with the file and the key.
            FileNotFoundError: no such file.
            MissingExtraError: without the extra `[experiments]`.
        """
        path = Path(path)
        try:
            return cls(spec_from(load_yaml(path)), directory)
        except SweepConfigError as error:
            raise SweepConfigError(f"{path}: {error}") from error

    @property
    def folder(self) -> Path:
        """Where the results are kept."""
        return Path("sweeps", self.spec.name) if self.directory is None else Path(self.directory)

    def shard(self, index: int, count: int) -> Self:
        """The part `index` (0-based) of this sweep in `count` disjoint parts.

        Raises:
            SweepConfigError: index or count out of range, or this is a part already.
        """
        if self.part is not None:
            raise SweepConfigError(f"shard: this is part {self.part[0]}/{self.part[1]} already")
        return replace(self, part=(index, count))

    def trials(self) -> tuple[Trial, ...]:
        """All runs of this sweep, or of this part, in an order that does not change.

        Raises:
            MissingExtraError: without the extra `[experiments]`.
        """
        _require_decapod()
        every = tuple(trials_of(self.spec))
        if self.part is None:
            return every
        index, count = self.part
        return every[index::count]

    def jobs(self, train: Train) -> list[Job]:
        """The runs as jobs of `decapod.jobs`, for other ways to run them.

        A result is kept under the name of `train`, what a `functools.partial` binds, the spec's
        `version`, and the run's configuration, contexts, seed and budget. The code of `train`, and
        what a closure captures, are not looked at.

        Raises:
            TypeError: `train` does not take these keywords, or binds something that is not JSON.
            MissingExtraError: without the extra `[experiments]`.
        """
        _require_decapod()
        from decapod.jobs import Job

        function = as_job(train)
        require_signature(train, next(trials_of(self.spec)))
        return [
            Job(function, arguments_of(self.spec, trial), label=trial.label)
            for trial in self.trials()
        ]

    def run(
        self,
        train: Train,
        *,
        executor: str | Executor = "local",
        n_jobs: int = 1,
        directory: Path | str | None = None,
        shard: tuple[int, int] | None = None,
        progress: bool = True,
    ) -> JobReport:
        """Runs what has no result yet.

        May be killed at any moment: the same call again runs what is missing, and repeats what
        failed. Shards that ran in different folders are merged by copying their files together.

        Args:
            train: called in a worker process; gives a score, a mapping of metrics, or the points
                (step, score) of a learning curve. Closures, lambdas, partials and functions of the
                main script will do.
            executor: `"local"` (processes of this machine), `"ray"`, or an executor of
                `decapod.jobs`. `"joblib"` is another name of `"local"`: joblib's own processes stop
                all jobs when one of them is killed.
            n_jobs: how many runs at the same time, where `executor` is a name.
            directory: another folder than `folder`.
            shard: the same as calling `shard` first.
            progress: tell on standard error how far it is.

        Returns:
            Results and failures; failed runs do not raise. See `results` and `failures`.

        Raises:
            SweepConfigError: the folder holds results of another function.
            TypeError, MissingExtraError: as `jobs`.
            KeyboardInterrupt: after Ctrl-C, once the workers are stopped.
        """
        if shard is not None:
            return self.shard(*shard).run(
                train, executor=executor, n_jobs=n_jobs, directory=directory, progress=progress
            )
        if isinstance(executor, str):
            executor = _EXECUTOR_ALIASES.get(executor, executor)
        whole = replace(self, part=None)
        jobs = whole.jobs(train)
        from decapod.jobs import function_name, run_jobs

        folder = self.folder if directory is None else Path(directory)
        self._record(folder, function_name(jobs[0].function))
        return run_jobs(
            jobs,
            folder,
            executor=executor,
            n_jobs=n_jobs,
            shard=self.part,
            progress=progress,
            title=self.spec.name,
        )

    def results(
        self,
        *,
        directory: Path | str | None = None,
        others: Others = "mean",
        partial: bool = False,
    ) -> Table:
        """The scores as a table, ready for scoring.

        The column `seed` has the index of the repetition, not the seed that was drawn for it. A run
        that failed or was killed has the score NaN, so that scoring makes you choose a rule for it;
        the table's notes count them. Where `train` gave learning curves, the table has `step`, and
        a failed run is NaN at all steps that other runs of its context have.

        Args:
            directory: another folder than `folder`.
            others: for the design `"grid"`: average over the values of the other hyper-parameters
                (`"mean"`), or take the runs in which they are at their base values (`"base"`).
            partial: leave out runs without a result instead of raising.

        Raises:
            IncompleteSweepError: runs have no result yet; the message counts them.
            EmptyInputError: there is no result at all.
            SweepResultError: a result lacks the metric, or a point at a budget.
            SweepConfigError: `others="base"`, but a base value is not in the grid.
            MissingExtraError: without the extra `[experiments]`.
        """
        store = self._store(directory)
        found = (*store.done().values(), *store.failures().values())
        return self._tabulate(found, others, partial=partial, source=str(store.directory))

    def tabulate(
        self, results: Iterable[JobResult], *, others: Others = "mean", partial: bool = False
    ) -> Table:
        """The table of `results`, from results of `jobs` that were run by other means.

        Args:
            results: in any order; those of other jobs are left aside.
            others, partial: see `results`.

        Raises:
            HPReliabilityError, MissingExtraError: as `results`.
        """
        return self._tabulate(results, others, partial=partial, source="results")

    def _tabulate(
        self, results: Iterable[JobResult], others: Others, *, partial: bool, source: str
    ) -> Table:
        slices = list(slices_of(self.spec, others))
        known = {canonical(result.arguments): result for result in results}
        trials = self.trials()
        found = [known.get(canonical(arguments_of(self.spec, trial))) for trial in trials]
        failures = [result for result in found if result is not None and not result.done]
        absent = found.count(None)
        if absent == len(trials):
            raise EmptyInputError(f"{source}: no results of this sweep; run it first")
        if absent and not partial:
            raise IncompleteSweepError(
                f"{source}: {absent} of {len(trials)} runs have no result yet "
                f"({len(trials) - absent - len(failures)} done, {len(failures)} failed); run the "
                "sweep again to finish it, or take what there is with partial=True"
            )
        points = {
            trial: points_of(result.value, trial, self.spec) if result.done else None
            for trial, result in zip(trials, found, strict=True)
            if result is not None
        }
        frame = frame_of(self.spec, points, slices)
        curves = "step" in frame.columns
        contexts = [*self.spec.contexts, *(["budget"] if len(self.spec.all_budgets) > 1 else [])]
        table = from_frame(frame, context=contexts, step="step" if curves else None)
        return replace(table, notes=tuple(notes_of(failures, absent, len(trials))))

    def failures(self, *, directory: Path | str | None = None) -> tuple[JobResult, ...]:
        """The runs that failed or were killed and have no result, each with its traceback.

        Raises:
            MissingExtraError: without the extra `[experiments]`.
        """
        lost = self._store(directory).failures().values()
        mine = {canonical(arguments_of(self.spec, trial)) for trial in self.trials()}
        return tuple(result for result in lost if canonical(result.arguments) in mine)

    def write_csv(
        self,
        path: Path | str,
        *,
        directory: Path | str | None = None,
        others: Others = "mean",
        partial: bool = False,
    ) -> None:
        """Writes `results` as CSV; equal results give equal bytes, however they came about.

        Raises:
            HPReliabilityError: as `results`.
        """
        frame = self.results(directory=directory, others=others, partial=partial).frame
        text = frame.to_csv(index=False, na_rep="nan", lineterminator="\n")
        write_text(Path(path), text)

    def _store(self, directory: Path | str | None) -> Store:
        _require_decapod()
        from decapod.jobs import Store

        return Store(self.folder if directory is None else Path(directory))

    def _record(self, folder: Path, function: str) -> None:
        """Say beside the results what they are results of; refuse those of another function."""
        from decapod.runs import environment

        path = folder / _RECORD
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))["train"]
            if known != function:
                raise SweepConfigError(
                    f"directory: {folder} holds results of {known}, not of {function}; choose "
                    "another folder"
                )
        record = {
            "train": function,
            "spec": asdict(self.spec),
            "environment": environment(("hpreliability", "torch", "stable-baselines3")),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record, indent=2) + "\n")


def _require_decapod() -> None:
    if importlib.util.find_spec("decapod") is None:
        raise MissingExtraError("decapod", "experiments")
