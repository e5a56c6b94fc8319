"""A sweep: every hyper-parameter value in every context with every seed, run and kept.

The sweep decides which runs there are and with which seed; `decapod.jobs` runs them, on this
machine or many, keeps every result and, after an interruption, runs only what is missing.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
import pandas as pd

from hpreliability.errors import EmptyInputError, HPReliabilityError, MissingExtraError
from hpreliability.table import Table, from_frame, label

if TYPE_CHECKING:
    from decapod.jobs import Executor, Job, JobReport, JobResult, Store

Design = Literal["one-at-a-time", "grid"]
Others = Literal["mean", "base"]
Train = Callable[..., "float | Mapping[str, float] | Iterable[tuple[float, float]]"]
"""Called as `train(config=..., env=..., seed=..., budget=...)`, with one keyword per context."""

_CANONICAL = ("hyperparameter", "value", "seed", "score", "step")
_KEYWORDS = ("config", "budget")
_RECORD = "sweep.json"
# loky, joblib's engine, gives up all running jobs when one of its workers is killed; the name is
# understood, and decapod's own processes do the work.
_EXECUTOR_ALIASES = {"joblib": "local"}


class SweepConfigError(HPReliabilityError):
    """A sweep's description is wrong; the message begins with the offending key."""


class SweepResultError(HPReliabilityError):
    """What `train` returned does not have what the sweep asks for."""


class IncompleteSweepError(HPReliabilityError):
    """Some runs of a sweep have no result yet."""


@dataclass(frozen=True)
class SweepSpec:
    """What to run.

    Attributes:
        name: letters, digits, `-`, `_`, `.`; titles the sweep and names its default folder.
        base: the full configuration around which values vary, handed to `train`. JSON values.
        hyperparameters: values to try, by key of `base`.
        contexts: labels by column; `train` gets one label of each, under the column's name. All
            combinations are run.
        budgets: how long to train, in whatever unit `train` takes. Several budgets become a context
            column `budget`.
        seeds: number of runs per cell, or their indices.
        checkpoints: one run of the largest budget serves all budgets. `train` must then give a
            curve with a point at each budget, and nothing in it may depend on the run's length.
            Otherwise each budget has runs of its own.
        design: `"one-at-a-time"` changes one hyper-parameter of `base` and leaves the others, as
            the paper does; `base` itself is run once and counts for all hyper-parameters.
            `"grid"` runs all combinations.
        common_random_numbers: give runs with equal context, budget and seed index the same seed
            for all configurations. Differences between values get less noisy, but the values'
            scores are then not independent.
        root_seed: from which all seeds of runs are derived.
        metric: which entry of a mapping that `train` returns is the score.
        version: raise it when `train` changes, so that old results are not taken for new ones.

    Raises:
        SweepConfigError: a field is wrong; the message begins with its name.
    """

    name: str
    base: Mapping[str, Any]
    hyperparameters: Mapping[str, Sequence[Any]]
    contexts: Mapping[str, Sequence[str]]
    budgets: int | Sequence[int]
    seeds: int | Sequence[int] = 3
    checkpoints: bool = False
    design: Design = "one-at-a-time"
    common_random_numbers: bool = False
    root_seed: int = 0
    metric: str = "score"
    version: str = ""

    def __post_init__(self) -> None:
        named = isinstance(self.name, str)
        if not named or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise SweepConfigError(
                f"name: expected letters, digits, '.', '_' and '-', got {self.name!r}; it names a "
                "folder"
            )
        for key in ("checkpoints", "common_random_numbers"):
            if not isinstance(getattr(self, key), bool):
                raise SweepConfigError(f"{key}: expected true or false, got {getattr(self, key)!r}")
        for key in ("metric", "version"):
            if not isinstance(getattr(self, key), str):
                raise SweepConfigError(f"{key}: expected text, got {getattr(self, key)!r}")
        if self.design not in get_args(Design):
            raise SweepConfigError(
                f"design: expected one of {get_args(Design)}, got {self.design!r}"
            )
        _set(self, "root_seed", _whole(self.root_seed, "root_seed", least=0))
        _set(self, "seeds", _indices(self.seeds))
        _set(self, "budgets", _budgets(self.budgets))
        _set(self, "contexts", _contexts(self.contexts))
        _set(self, "base", _plain(_mapping(self.base, "base"), "base"))
        _set(self, "hyperparameters", _grid(self.hyperparameters, self.base, self.design))

    @property
    def seed_indices(self) -> tuple[int, ...]:
        """Which repetitions there are of each cell."""
        return _indices(self.seeds)

    @property
    def all_budgets(self) -> tuple[int, ...]:
        """The budgets, ascending."""
        return _budgets(self.budgets)


@dataclass(frozen=True, eq=False)
class Trial:
    """One run of a sweep.

    Attributes:
        config: handed to `train`.
        contexts: label by context column, without the budget.
        budget: for how long.
        seed_index: which of the repetitions; the table's `seed`.
        seed: what `train` gets, in [0, 2**32).
        label: for people.
    """

    config: Mapping[str, Any]
    contexts: Mapping[str, str]
    budget: int
    seed_index: int
    seed: int
    label: str


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
            return cls(_spec_from(_load_yaml(path)), directory)
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
        every = tuple(_trials(self.spec))
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

        function = _as_job(train)
        _require_signature(train, next(_trials(self.spec)))
        return [
            Job(function, _arguments(self.spec, trial), label=trial.label)
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
        slices = list(_slices(self.spec, others))
        store = self._store(directory)
        done = {_canonical(result.arguments): result for result in store.done().values()}
        lost = {_canonical(result.arguments): result for result in store.failures().values()}
        trials = self.trials()
        keys = [_canonical(_arguments(self.spec, trial)) for trial in trials]
        failures = [lost[key] for key in keys if key in lost and key not in done]
        absent = sum(key not in done and key not in lost for key in keys)
        if absent == len(trials):
            raise EmptyInputError(f"{store.directory}: no results of this sweep; run it first")
        if absent and not partial:
            raise IncompleteSweepError(
                f"{store.directory}: {absent} of {len(trials)} runs have no result yet "
                f"({len(trials) - absent - len(failures)} done, {len(failures)} failed); run the "
                "sweep again to finish it, or take what there is with partial=True"
            )
        points = {
            trial: _points(done[key].value, trial, self.spec) if key in done else None
            for trial, key in zip(trials, keys, strict=True)
            if key in done or key in lost
        }
        frame = _frame(self.spec, points, slices)
        curves = "step" in frame.columns
        contexts = [*self.spec.contexts, *(["budget"] if len(self.spec.all_budgets) > 1 else [])]
        table = from_frame(frame, context=contexts, step="step" if curves else None)
        return replace(table, notes=tuple(_notes(failures, absent, len(trials))))

    def failures(self, *, directory: Path | str | None = None) -> tuple[JobResult, ...]:
        """The runs that failed or were killed and have no result, each with its traceback.

        Raises:
            MissingExtraError: without the extra `[experiments]`.
        """
        lost = self._store(directory).failures().values()
        mine = {_canonical(_arguments(self.spec, trial)) for trial in self.trials()}
        return tuple(result for result in lost if _canonical(result.arguments) in mine)

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
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        frame.to_csv(temporary, index=False, na_rep="nan", lineterminator="\n", encoding="utf-8")
        temporary.replace(path)

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
        temporary = folder / f".{_RECORD}.{os.getpid()}"
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)


# --- which runs there are ---------------------------------------------------------------------


def _configs(spec: SweepSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every configuration once, with a label for people."""
    if spec.design == "grid":
        for combination in itertools.product(*spec.hyperparameters.values()):
            changes = dict(zip(spec.hyperparameters, combination, strict=True))
            yield _spell(changes), {**spec.base, **changes}
        return
    yield "base", dict(spec.base)
    for name, values in spec.hyperparameters.items():
        for value in values:
            if _canonical(value) != _canonical(spec.base[name]):
                yield _spell({name: value}), {**spec.base, name: value}


def _slices(spec: SweepSpec, others: Others) -> Iterator[tuple[str, str, frozenset[str]]]:
    """Which configurations stand for each value: (hyper-parameter, value's label, configurations).

    Configurations are given as canonical text.
    """
    if others not in get_args(Others):
        raise ValueError(f"others must be one of {get_args(Others)}, got {others!r}")
    configs = [config for _, config in _configs(spec)]
    fixed = tuple(spec.hyperparameters) if others == "base" or spec.design != "grid" else ()
    for name, values in spec.hyperparameters.items():
        for value in values:
            want = {other: spec.base[other] for other in fixed if other in spec.base}
            want[name] = value
            chosen = frozenset(
                _canonical(config)
                for config in configs
                if all(_canonical(config[key]) == _canonical(v) for key, v in want.items())
            )
            if not chosen or any(other not in want for other in fixed):
                raise SweepConfigError(
                    'others: "base" needs the base value of every hyper-parameter to be in the '
                    f"grid; there is no run of {_spell(want)}"
                )
            yield name, label(value), chosen


def _trials(spec: SweepSpec) -> Iterator[Trial]:
    from decapod.seeding import Seeds

    seeds = Seeds(spec.root_seed)
    columns = list(spec.contexts)
    budgets = (max(spec.all_budgets),) if spec.checkpoints else spec.all_budgets
    for name, config in _configs(spec):
        for labels in itertools.product(*spec.contexts.values()):
            for budget in budgets:
                contexts = dict(zip(columns, labels, strict=True))
                shared = "" if spec.common_random_numbers else _canonical(config)
                stream = seeds.child("sweep", shared, _canonical(contexts), budget)
                for index in spec.seed_indices:
                    where = _spell({**contexts, "budget": budget, "seed": index})
                    yield Trial(
                        config, contexts, budget, index, stream.integer(index), f"{name} {where}"
                    )


def _arguments(spec: SweepSpec, trial: Trial) -> dict[str, Any]:
    return {
        "config": trial.config,
        "contexts": trial.contexts,
        "budget": trial.budget,
        "seed": trial.seed,
        "version": spec.version,
    }


# --- in the worker ----------------------------------------------------------------------------


def _as_job(train: Train) -> Callable[..., Any]:
    """`train` as a function that can be a job: it has a name, and gives JSON."""
    inner: Any = train
    bound = ""
    while isinstance(inner, functools.partial):
        try:
            bound += json.dumps([inner.args, inner.keywords], sort_keys=True)
        except TypeError as error:
            raise TypeError(
                f"train: the partial of {inner.func!r} binds something that is not JSON ({error}), "
                "so its results could not be told from those of another; bind it in a def instead"
            ) from error
        inner = inner.func

    def run(
        config: Mapping[str, Any], contexts: Mapping[str, str], budget: int, seed: int, version: str
    ) -> Any:
        del version  # part of the job's identity only
        return _as_json(train(config=config, **contexts, seed=seed, budget=budget))

    owner = inner if hasattr(inner, "__qualname__") else type(inner)
    # The job is known by, and travels to the workers like, the function that it wraps.
    run.__module__ = owner.__module__
    run.__qualname__ = owner.__qualname__ + bound
    return run


def _as_json(returned: Any) -> dict[str, Any]:
    if isinstance(returned, Mapping):
        return {"metrics": dict(returned)}
    if isinstance(returned, Real):
        return {"metrics": {"score": float(returned)}}
    if isinstance(returned, str) or not isinstance(returned, Iterable):
        raise TypeError(
            "train: expected a score, a mapping of metrics, or points (step, score), got "
            f"{returned!r}"
        )
    curve = []
    for point in returned:
        step, score = point
        curve.append([float(step), float(score)])
        if len(curve) > 1 and not curve[-2][0] < curve[-1][0]:
            raise ValueError(f"train: expected increasing steps, got {step} after {curve[-2][0]}")
    if not curve:
        raise ValueError("train: expected at least one point (step, score), got none")
    return {"curve": curve}


def _require_signature(train: Train, trial: Trial) -> None:
    arguments: dict[str, Any] = {"config": trial.config, **trial.contexts}
    arguments |= {"seed": trial.seed, "budget": trial.budget}
    try:
        signature = inspect.signature(train)
    except ValueError:  # built in: says nothing about itself
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise TypeError(
            f"train: expected a function of the keywords {', '.join(arguments)}, got one of "
            f"{signature} ({error}); contexts are passed under their column's name"
        ) from error


# --- from results to a table ------------------------------------------------------------------

_Point = tuple[int, float | None, float]  # budget, step, score


def _points(value: Any, trial: Trial, spec: SweepSpec) -> list[_Point]:
    """What one finished run contributes."""
    if "metrics" in value:
        metrics = value["metrics"]
        if spec.checkpoints:
            raise SweepResultError(
                f"{trial.label}: train gave no learning curve, so one run cannot serve the budgets "
                f"{list(spec.all_budgets)}; return points (step, score), or set checkpoints: false"
            )
        score = metrics.get(spec.metric)
        if not isinstance(score, int | float) or isinstance(score, bool):
            raise SweepResultError(
                f"{trial.label}: metric {spec.metric!r} is {score!r}; train gave: "
                f"{', '.join(metrics) or 'nothing'}"
            )
        return [(trial.budget, None, float(score))]
    curve = dict(value["curve"])
    if not spec.checkpoints:
        return [(trial.budget, step, score) for step, score in curve.items()]
    missing = [budget for budget in spec.all_budgets if budget not in curve]
    if missing:
        raise SweepResultError(
            f"{trial.label}: the learning curve has no point at budget {missing[0]}; its steps are "
            f"{', '.join(f'{step:g}' for step in list(curve)[:12])}"
        )
    return [(budget, None, curve[budget]) for budget in spec.all_budgets]


def _frame(
    spec: SweepSpec,
    points: Mapping[Trial, list[_Point] | None],
    slices: Iterable[tuple[str, str, frozenset[str]]],
) -> pd.DataFrame:
    """Rows of the table; `points` is None for a run that failed."""
    steps: dict[tuple[Any, ...], set[float | None]] = {}
    for trial, own in points.items():
        known = steps.setdefault((*trial.contexts.values(), trial.budget), set())
        known.update(step for _, step, _ in own or ())
    every = set().union(*steps.values())
    if None in every and len(every) > 1:
        raise SweepResultError("train gave scores in some runs and learning curves in others")
    curves = bool(every) and None not in every
    budgets = spec.all_budgets if spec.checkpoints else None
    by_config: dict[str, list[dict[str, Any]]] = {}
    for trial, own in points.items():
        if own is None:
            at = steps[(*trial.contexts.values(), trial.budget)] or {
                float(trial.budget) if curves else None
            }
            own = [(b, s, math.nan) for b in budgets or (trial.budget,) for s in at]
        rows = by_config.setdefault(_canonical(trial.config), [])
        for budget, step, score in own:
            row = {**trial.contexts, "budget": budget, "seed": trial.seed_index, "score": score}
            rows.append(row | ({"step": step} if curves else {}))
    frame = pd.DataFrame(
        {"hyperparameter": name, "value": value, **row}
        for name, value, configs in slices
        for config in sorted(configs)
        for row in by_config.get(config, ())
    )
    if spec.design != "grid":
        return frame
    keys = [column for column in frame.columns if column != "score"]
    mean = frame.groupby(keys, sort=False)["score"].agg(lambda scores: scores.mean(skipna=False))
    return mean.reset_index()


def _notes(failures: Sequence[JobResult], absent: int, total: int) -> Iterator[str]:
    if failures:
        killed = sum(result.status == "killed" for result in failures)
        yield (
            f"{len(failures)} of {total} runs failed ({killed} of them killed) and have the score "
            "NaN; running the sweep again repeats them"
        )
    if absent:
        yield f"{absent} of {total} runs have no result yet and are left out"


# --- reading and checking a description -------------------------------------------------------


def _load_yaml(path: Path) -> Any:
    if importlib.util.find_spec("yaml") is None:
        raise MissingExtraError("pyyaml", "experiments")
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe YAML that reads 1e-3 as a number and refuses a key given twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise SweepConfigError(f"{key}: given twice")
            return super().construct_mapping(node, deep=deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
    )
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SweepConfigError(f"not YAML: {error}") from error


def _spec_from(described: Any) -> SweepSpec:
    known = [f.name for f in fields(SweepSpec)]
    if not isinstance(described, Mapping):
        raise SweepConfigError(f"expected the keys {', '.join(known)}, got {described!r}")
    for key in described:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are: {', '.join(known)}"
            raise SweepConfigError(f"{key}: unknown key; {hint}")
    for f in fields(SweepSpec):
        if f.default is MISSING and f.name not in described:
            raise SweepConfigError(f"{f.name}: missing key")
    return SweepSpec(**described)


def _set(instance: object, name: str, value: object) -> None:
    """Store the checked form of a field of a frozen dataclass, in `__post_init__`."""
    object.__setattr__(instance, name, value)


def _whole(value: Any, key: str, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise SweepConfigError(f"{key}: expected a whole number of at least {least}, got {value!r}")
    return int(value)


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise SweepConfigError(f"{key}: expected a mapping with text keys, got {value!r}")
    return value


def _list(value: Any, key: str) -> list[Any]:
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise SweepConfigError(f"{key}: expected a list, got {value!r}")
    entries = list(value)
    if not entries:
        raise SweepConfigError(f"{key}: expected a list of at least one entry, got an empty one")
    labels = [label(entry) for entry in entries]
    twice = [text for text in labels if labels.count(text) > 1]
    if twice:
        raise SweepConfigError(f"{key}: {twice[0]} is given twice")
    return entries


def _indices(seeds: Any) -> tuple[int, ...]:
    if isinstance(seeds, int | np.integer):
        return tuple(range(_whole(seeds, "seeds", least=1)))
    return tuple(_whole(seed, "seeds", least=0) for seed in _list(seeds, "seeds"))


def _budgets(budgets: Any) -> tuple[int, ...]:
    given = [budgets] if isinstance(budgets, int | np.integer) else _list(budgets, "budgets")
    return tuple(sorted(_whole(budget, "budgets", least=1) for budget in given))


def _contexts(contexts: Any) -> dict[str, tuple[str, ...]]:
    checked = {}
    for column, labels in _mapping(contexts, "contexts").items():
        key = f"contexts.{column}"
        if not column.isidentifier() or column in (*_CANONICAL, *_KEYWORDS):
            raise SweepConfigError(
                f"{key}: expected a name that can be a keyword of train, other than "
                f"{', '.join((*_CANONICAL, *_KEYWORDS))}"
            )
        checked[column] = tuple(label(entry) for entry in _list(labels, key))
    if not checked:
        raise SweepConfigError("contexts: expected at least one, for example env: [CartPole-v1]")
    return checked


def _grid(
    hyperparameters: Any, base: Mapping[str, Any], design: Design
) -> dict[str, tuple[Any, ...]]:
    checked: dict[str, tuple[Any, ...]] = {}
    for name, given in _mapping(hyperparameters, "hyperparameters").items():
        key = f"hyperparameters.{name}"
        values = [_plain(value, key) for value in _list(given, key)]
        if len(values) < 2:
            raise SweepConfigError(f"{key}: expected at least two values to compare, got {values}")
        if name in base:
            # 1 and 1.0 would be two configurations: the base's spelling stands for both.
            values = [base[name] if _same(value, base[name]) else value for value in values]
        if design == "one-at-a-time":
            if name not in base:
                near = get_close_matches(name, base, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise SweepConfigError(f"{key}: base has no {name!r}{hint}")
            if base[name] not in values:
                raise SweepConfigError(
                    f"{key}: expected the base's value {base[name]!r} among the values, got "
                    f"{values}; add it"
                )
        checked[name] = tuple(values)
    if not checked:
        raise SweepConfigError("hyperparameters: expected at least one")
    return checked


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _plain(value: Any, key: str) -> Any:
    """A copy of plain JSON types."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise SweepConfigError(f"{key}: expected a finite number, got {value}")
        return value
    if isinstance(value, Mapping):
        return {k: _plain(v, f"{key}.{k}") for k, v in _mapping(value, key).items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{key}[{i}]") for i, entry in enumerate(value)]
    raise SweepConfigError(
        f"{key}: expected numbers, text, true or false, lists or mappings, got {value!r}"
    )


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _spell(entries: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={label(value)}" for name, value in entries.items())


def _require_decapod() -> None:
    if importlib.util.find_spec("decapod") is None:
        raise MissingExtraError("decapod", "experiments")
