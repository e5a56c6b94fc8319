"""Running a list of jobs to its end, over as many attempts as it takes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from decapod.jobs import sharding
from decapod.jobs.job import Job, JobResult
from decapod.jobs.local import LocalExecutor
from decapod.jobs.progress import make_progress
from decapod.jobs.store import Store


class Executor(Protocol):
    """Where jobs run.

    The contract, which the same tests hold every executor to: one result for every job, in order
    of completion; whatever goes wrong with a job is its result and never an exception, and does
    not touch the other jobs; when the iterator ends, is closed or is interrupted, nothing that it
    started is left running.
    """

    def run(self, jobs: Sequence[Job]) -> Iterator[JobResult]:
        """Runs all jobs and yields their results as they come."""
        ...


class JobsFailedError(RuntimeError):
    """Some jobs of a list did not return a value."""


@dataclass(frozen=True)
class JobReport:
    """What is known about a list of jobs after :func:`run_jobs`.

    Attributes:
        results: of the jobs that are done, in the order of the list. They do not depend on the
            order of completion, on interruptions or on the executor.
        failures: of the jobs that failed or were killed in this attempt, in the order of the list.
        missing: jobs of other shards whose results are not in the store.
        reused: how many of ``results`` were in the store before.
    """

    results: tuple[JobResult, ...]
    failures: tuple[JobResult, ...]
    missing: tuple[Job, ...]
    reused: int

    @property
    def complete(self) -> bool:
        """Whether every job of the list is done."""
        return not self.failures and not self.missing

    def raise_if_failed(self) -> None:
        """Raises if a job failed or was killed; jobs of other shards are no failure.

        Raises:
            JobsFailedError: with the error of the first failure.
        """
        if not self.failures:
            return
        first = self.failures[0]
        total = len(self.results) + len(self.failures) + len(self.missing)
        raise JobsFailedError(
            f"{len(self.failures)} of {total} jobs failed; the results of the others are kept and "
            f"a restart runs only what is missing. The first, {first.label or first.key}, "
            f"{first.status}:\n{first.error}"
        )


def make_executor(name: str, n_jobs: int = 1) -> Executor:
    """The executor of that name: ``local`` (processes of this machine) or ``ray``.

    Args:
        name: ``local`` or ``ray``.
        n_jobs: how many jobs run at the same time, at least 1.

    Raises:
        ValueError: unknown name, or ``n_jobs`` out of range.
        ImportError: ``ray`` without the extra ``decapod[ray]``.
    """
    if name == "local":
        return LocalExecutor(n_jobs)
    if name == "ray":
        from decapod.jobs.on_ray import RayExecutor

        return RayExecutor(n_jobs)
    raise ValueError(f"executor: expected 'local' or 'ray', got {name!r}")


def run_jobs(
    jobs: Sequence[Job],
    store: Store | Path | str,
    *,
    executor: str | Executor = "local",
    n_jobs: int = 1,
    shard: tuple[int, int] | None = None,
    progress: bool = True,
    title: str = "jobs",
) -> JobReport:
    """Runs the jobs whose results the store lacks.

    Every result is on disk before the next one is looked at, so this process and its workers may
    be killed at any moment: the same call, made again, runs what is missing. Jobs that failed
    before are run again.

    Args:
        jobs: no two of them with the same key.
        store: a store, or its folder.
        executor: ``local``, ``ray`` or an :class:`Executor`.
        n_jobs: how many jobs run at the same time, if ``executor`` is a name.
        shard: (index, count), 0-based: run only every ``count``-th job and write to the file of
            that shard. Copy the files of all shards into one folder to merge them.
        progress: tell on standard error how far it is.
        title: what to call the list there.

    Raises:
        ValueError: two jobs are the same, or an argument is out of range; nothing has run.
        decapod.jsonl.FileInUseError: another process runs jobs into the same file.
        KeyboardInterrupt: after Ctrl-C, once the workers are stopped.
    """
    jobs = list(jobs)
    _refuse_duplicates(jobs)
    mine = jobs
    if shard is not None:
        mine = sharding.shard(jobs, *shard)
        directory = store.directory if isinstance(store, Store) else store
        store = Store(directory, f"{shard[0]}of{shard[1]}")
    elif not isinstance(store, Store):
        store = Store(store)
    runner = make_executor(executor, n_jobs) if isinstance(executor, str) else executor

    failures: dict[str, JobResult] = {}
    with ExitStack() as stack:
        stack.enter_context(store)  # claimed before we look, so that no other run adds to it
        before = store.done()
        fresh: dict[str, JobResult] = {}
        todo = [job for job in mine if job.key not in before]
        try:
            if todo:
                bar = stack.enter_context(make_progress(title, len(todo), shown=progress))
                results = runner.run(todo)
                stack.callback(_close, results)
                for result in results:
                    store.append(result)
                    (fresh if result.done else failures)[result.key] = result
                    bar.advance(failed=not result.done)
        except KeyboardInterrupt:
            stack.close()
            finished = store.done()  # asked of the disk: the last result may have just got there
            done = sum(job.key in finished for job in mine)
            sys.stderr.write(
                f"{title}: interrupted; {done} of {len(mine)} jobs are done and kept in "
                f"{store.directory}. The same command again runs the rest.\n"
            )
            raise

    known = before | fresh
    return JobReport(
        results=tuple(known[job.key] for job in jobs if job.key in known),
        failures=tuple(failures[job.key] for job in jobs if job.key in failures),
        missing=tuple(job for job in jobs if job.key not in known and job.key not in failures),
        reused=sum(job.key in before for job in jobs),
    )


def _close(results: Iterator[JobResult]) -> None:
    # Generators stop their workers when closed; a plain iterator has nothing to stop.
    close = getattr(results, "close", None)
    if close is not None:
        close()


def _refuse_duplicates(jobs: Sequence[Job]) -> None:
    seen: dict[str, int] = {}
    for position, job in enumerate(jobs):
        if job.key in seen:
            first = seen[job.key]
            raise ValueError(
                f"jobs: expected different jobs, but jobs[{first}] ({jobs[first].label!r}) and "
                f"jobs[{position}] ({job.label!r}) have the same function, arguments and version; "
                "put what makes them different into the arguments"
            )
        seen[job.key] = position
