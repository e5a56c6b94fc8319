"""A run's folder: what was run (``run.json``) and what it measured (``metrics.jsonl``)."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from decapod.jsonl import JSON, Appender, dumps, loads, read, to_json
from decapod.writing import write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RECORD_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
_OWN_FIELDS = ("step", "seconds")
_GIT_SECONDS = 10.0


class RunExistsError(FileExistsError):
    """The folder already holds a run, or files that are no run's."""


class Mirror(Protocol):
    """A second place for the metrics of a run. ``metrics.jsonl`` always has them first."""

    def start(self, directory: Path, config: dict[str, Any]) -> None:
        """Called once, when the run's folder is there."""
        ...

    def log(self, metrics: Mapping[str, JSON], step: int) -> None:
        """Called for every :meth:`Run.log`, in order."""
        ...

    def close(self) -> None:
        """Called once, at the end."""
        ...


class TensorBoardMirror:
    """Writes numbers as TensorBoard scalars, into ``tensorboard/`` of the run's folder.

    Values that are no numbers are left to ``metrics.jsonl``.

    Raises:
        ImportError: without the extra ``decapod[tensorboard]``.
    """

    def __init__(self) -> None:
        try:
            import tensorboardX
        except ImportError as error:
            raise ImportError(
                'TensorBoardMirror needs tensorboardX; run `pip install "decapod[tensorboard]"`'
            ) from error
        self._library: Any = tensorboardX
        self._writer: Any = None

    def start(self, directory: Path, config: dict[str, Any]) -> None:
        """Opens the event file and puts the config there as text."""
        self._writer = self._library.SummaryWriter(str(directory / "tensorboard"))
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```")

    def log(self, metrics: Mapping[str, JSON], step: int) -> None:
        """Adds one scalar per number."""
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class WandbMirror:
    """Logs to Weights & Biases, with the run's folder as the place for its files.

    Args:
        options: what ``wandb.init`` takes besides ``dir`` and ``config``: ``project``, ``name``,
            ``mode="offline"``.

    Raises:
        ImportError: without the extra ``decapod[wandb]``.
    """

    def __init__(self, **options: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                'WandbMirror needs wandb; run `pip install "decapod[wandb]"`'
            ) from error
        self._library: Any = wandb
        self._options = options
        self._run: Any = None

    def start(self, directory: Path, config: dict[str, Any]) -> None:
        """Starts the W&B run."""
        self._run = self._library.init(dir=str(directory), config=config, **self._options)

    def log(self, metrics: Mapping[str, JSON], step: int) -> None:
        """Logs all values at this step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finishes the W&B run; waits for the upload unless offline.

        W&B's background process may write the end of an offline file a moment later.
        """
        self._run.finish()


class Run:
    """A run that is being written. Use :meth:`create`, as a context manager.

    ``metrics.jsonl`` has one line per :meth:`log`: ``step``, ``seconds`` since the process opened
    the run, and the metrics.
    """

    def __init__(
        self, directory: Path, record: dict[str, Any], mirrors: Sequence[Mirror], metrics: Appender
    ) -> None:
        self.directory = directory
        self.record = record
        self._mirrors = mirrors
        self._metrics = metrics
        self._begin = time.perf_counter()

    @classmethod
    def create(
        cls,
        directory: Path | str,
        *,
        config: DataclassInstance | Mapping[str, Any],
        seed: int,
        packages: Iterable[str] = (),
        mirrors: Sequence[Mirror] = (),
        resume: bool = False,
    ) -> Run:
        """Starts a run, or continues one.

        ``run.json`` gets the config, the seed, the command, the start time and
        :func:`environment`; every continuation is added to its ``resumed`` list.

        Args:
            directory: must be absent or empty, unless ``resume``.
            config: the resolved config, of JSON values (paths as text).
            seed: the root seed.
            packages: distributions whose versions are recorded, beside decapod's own.
            mirrors: further places for the metrics.
            resume: continue the run that is there, if one is; its config and seed must be equal.

        Raises:
            RunExistsError: the folder is not empty and ``resume`` is False, or it holds no run.
            ValueError: the run there has another config or seed.
            TypeError: the config is not made of JSON values.
            decapod.jsonl.FileInUseError: another process is writing this run.
        """
        directory = Path(directory)
        resolved = _resolve(config)
        start = {
            "argv": list(sys.argv),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(packages),
        }
        path = directory / RECORD_FILE
        if directory.exists() and not directory.is_dir():
            raise RunExistsError(f"directory: expected a folder, got the file {directory}")
        if directory.exists() and any(directory.iterdir()):
            if not resume:
                held = "a run" if path.exists() else "other files"
                raise RunExistsError(
                    f"directory: expected an empty folder, but {directory} holds {held}; choose "
                    "another folder" + (" or pass resume=True" if path.exists() else "")
                )
            if not path.exists() and not (directory / METRICS_FILE).exists():
                raise RunExistsError(
                    f"directory: expected a run to resume, but {directory} holds other files; "
                    "choose another folder"
                )
        metrics = Appender(directory / METRICS_FILE)  # from here on we are the only writer
        try:
            if path.exists():
                record = _read_record(path)
                _refuse_other_run(record, resolved, seed, path)
                record["resumed"] = [*record["resumed"], start]
            else:
                record = {"config": resolved, "seed": seed, **start, "resumed": []}
            _write_record(path, record)
            run = cls(directory, record, tuple(mirrors), metrics)
            for mirror in run._mirrors:
                mirror.start(directory, resolved)
        except BaseException:
            metrics.close()
            raise
        return run

    @classmethod
    def open(cls, directory: Path | str) -> RunRecord:
        """Reads a run, finished or not.

        Raises:
            FileNotFoundError: there is no run in this folder.
        """
        return RunRecord(Path(directory))

    def log(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """Appends one line of metrics; returns when it is on disk.

        Args:
            metrics: name to JSON value; numpy scalars and non-finite numbers are allowed.
            step: the caller's own count.

        Raises:
            TypeError: a value is not JSON (a tensor: call ``.item()`` on it).
            ValueError: a metric is called ``step`` or ``seconds``.
        """
        values = to_json(metrics, "metrics")
        assert isinstance(values, dict)
        taken = [name for name in _OWN_FIELDS if name in values]
        if taken:
            raise ValueError(
                f"metrics: expected names other than {', '.join(_OWN_FIELDS)}, got {taken[0]!r}; "
                "rename it, or pass it as the argument step"
            )
        seconds = round(time.perf_counter() - self._begin, 3)
        self._metrics.append({"step": int(step), "seconds": seconds, **values})
        for mirror in self._mirrors:
            mirror.log(values, int(step))

    def close(self) -> None:
        """Ends the run and its mirrors."""
        self._metrics.close()
        mirrors, self._mirrors = self._mirrors, ()
        for mirror in mirrors:
            mirror.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class RunRecord:
    """A run on disk, for reading.

    Attributes:
        directory: its folder.
        record: what ``run.json`` holds: ``config``, ``seed``, ``argv``, ``started``,
            ``environment``, ``resumed``.

    Raises:
        FileNotFoundError: there is no run in this folder.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / RECORD_FILE
        if not path.exists():
            raise FileNotFoundError(
                f"directory: expected a run's folder with {RECORD_FILE} in it, got {directory}"
            )
        self.record = _read_record(path)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config."""
        return dict(self.record["config"])

    @property
    def seed(self) -> int:
        """The root seed."""
        return int(self.record["seed"])

    def read_metrics(self) -> list[dict[str, Any]]:
        """One dict per :meth:`Run.log`, oldest first; a torn last line is passed over.

        Raises:
            decapod.jsonl.CorruptLineError: an earlier line is damaged.
        """
        lines = read(self.directory / METRICS_FILE)
        return [line for line in lines if isinstance(line, dict)]


def environment(packages: Iterable[str] = ()) -> dict[str, Any]:
    """The machine and the software that a number was made with.

    Args:
        packages: distribution names; decapod and numpy are always among them.

    Returns:
        ``python``, ``implementation``, ``platform``, ``machine``, ``processor``, ``cpu_count``
        (that this process may use), ``commit`` and ``dirty`` of the git repository around the
        current folder (None outside of one; untracked files do not count as dirty), and
        ``packages``: name to version, None if not installed.
    """
    commit, dirty = _git_state()
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpu_count": _usable_cpus(),
        "commit": commit,
        "dirty": dirty,
        "packages": {
            name: _version(name) for name in dict.fromkeys(("decapod", "numpy", *packages))
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _usable_cpus() -> int | None:
    # A container or a batch system may give this process fewer than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_state() -> tuple[str | None, bool | None]:
    commit = _git("rev-parse", "--verify", "HEAD")
    if commit is None:
        return None, None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return commit.strip(), None if changes is None else bool(changes.strip())


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ("git", *arguments), capture_output=True, text=True, timeout=_GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None


def _resolve(config: DataclassInstance | Mapping[str, Any]) -> dict[str, Any]:
    if is_dataclass(config) and not isinstance(config, type):
        config = asdict(config)
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config: expected a dataclass instance or a mapping, got {type(config).__name__}"
        )
    resolved = to_json(config, "config")
    assert isinstance(resolved, dict)
    return resolved


def _refuse_other_run(
    record: dict[str, Any], config: dict[str, Any], seed: int, path: Path
) -> None:
    old = {**record["config"], "seed": record["seed"]}
    new = {**config, "seed": seed}
    # Compared as text, since NaN is not equal to itself.
    differing = sorted(
        name
        for name in old.keys() | new.keys()
        if name not in old or name not in new or dumps(old[name]) != dumps(new[name])
    )
    if differing:
        name = differing[0]
        raise ValueError(
            f"resume: expected the config and seed in {path}, but {', '.join(differing)} differ "
            f"({name}: {old.get(name)!r} there, {new.get(name)!r} here); use another folder for "
            "another config"
        )


def _read_record(path: Path) -> dict[str, Any]:
    record = loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not {"config", "seed", "resumed"} <= record.keys():
        raise ValueError(f"{path}: expected the record of a run, got {str(record)[:60]}")
    return record


def _write_record(path: Path, record: dict[str, Any]) -> None:
    write_text(path, json.dumps(json.loads(dumps(record, name="run")), indent=2) + "\n")
