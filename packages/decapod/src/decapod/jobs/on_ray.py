"""Jobs on a Ray cluster, of one machine or many."""

from __future__ import annotations

import os
import queue
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decapod.jobs.callables import Packing
from decapod.jobs.job import Job, JobResult, Outcome, require_count, result_of
from decapod.jobs.worker import ENVIRONMENT, execute

_CANCEL_SECONDS = 5.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class RayExecutor:
    """Runs every job as a Ray task on one CPU, without retries.

    A Ray that is already connected is used and left running. Otherwise the cluster at ``address``,
    or at the environment variable ``RAY_ADDRESS``, is joined and left again; and without either a
    cluster of this machine alone is started, with ``n_jobs`` CPUs, and shut down at the end. The
    machines of a cluster need decapod and the packages that the jobs use.

    Attributes:
        n_jobs: how many jobs run at the same time; None for as many as the cluster has CPUs.
        address: of a running cluster, as ``ray.init`` takes it.
        ray_init: more arguments of ``ray.init``.

    Raises:
        ImportError: without the extra ``decapod[ray]``.
        ValueError: ``n_jobs`` out of range.
    """

    n_jobs: int | None = None
    address: str | None = None
    ray_init: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.n_jobs is not None:
            require_count(self.n_jobs)
        _ray()

    def run(self, jobs: Sequence[Job]) -> Iterator[JobResult]:
        """Results in order of completion; what runs is cancelled when the iterator is closed.

        Raises:
            ConnectionError: there is no cluster at ``address``.
        """
        ray = _ray()
        joined = not ray.is_initialized()
        if joined:
            self._join(ray)
        results: queue.SimpleQueue[JobResult | BaseException | None] = queue.SimpleQueue()
        stop = threading.Event()
        # Ctrl-C is raised in the main thread only. There it may not hit Ray in the middle of a
        # call, which comes out as some other error, or as a Ray that cannot be shut down.
        pump = threading.Thread(target=self._pump, args=(ray, jobs, results.put, stop), daemon=True)
        try:
            pump.start()
            while (result := _next(results)) is not None:
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            stop.set()
            pump.join()
            if joined:
                ray.shutdown()

    def _pump(
        self,
        ray: Any,
        jobs: Sequence[Job],
        put: Callable[[JobResult | BaseException | None], None],
        stop: threading.Event,
    ) -> None:
        running: dict[Any, tuple[Job, float]] = {}
        try:
            self._run_all(ray, deque(jobs), running, put, stop)
            put(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            put(error)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=_CANCEL_SECONDS)

    def _run_all(
        self,
        ray: Any,
        waiting: deque[Job],
        running: dict[Any, tuple[Job, float]],
        put: Callable[[JobResult], None],
        stop: threading.Event,
    ) -> None:
        remote = ray.remote(num_cpus=1, max_retries=0, runtime_env={"env_vars": dict(ENVIRONMENT)})(
            execute
        )
        packing = Packing()
        while (waiting or running) and not stop.is_set():
            room = self._room(ray)
            while waiting and len(running) < room:
                job = waiting.popleft()
                function, fault = packing.of(job.function)
                if fault is not None:
                    put(result_of(job, ("failed", None, fault, 0.0)))
                else:
                    reference = remote.remote(function, dict(job.arguments))
                    running[reference] = job, time.monotonic()
            ended, _ = ray.wait(list(running), timeout=_POLL_SECONDS) if running else ([], [])
            for reference in ended:
                job, submitted = running.pop(reference)
                put(result_of(job, _outcome(ray, reference, submitted)))

    def _join(self, ray: Any) -> None:
        address = self.address or os.environ.get("RAY_ADDRESS") or None
        options: dict[str, Any] = {"log_to_driver": True, "logging_level": "warning"}
        if address is None:
            _refuse_temporary_folder_in_environment()
            # "local" and not None: None would join any cluster that this machine happens to run.
            options |= {"address": "local", "num_cpus": self.n_jobs, "include_dashboard": False}
        else:
            options["address"] = address
        ray.init(**{**options, **self.ray_init})

    def _room(self, ray: Any) -> int:
        # Asked again every time: a cluster grows and shrinks.
        return self.n_jobs or max(1, int(ray.cluster_resources().get("CPU", 1)))


def _refuse_temporary_folder_in_environment() -> None:
    # Ray's workers refuse this too, but only in a log, and ray.init then waits for them for ever.
    folder = Path(tempfile.gettempdir()).resolve()
    if sys.prefix != sys.base_prefix and folder.is_relative_to(Path(sys.prefix).resolve()):
        raise RuntimeError(
            f"Ray cannot keep its files in {folder}, inside the virtual environment {sys.prefix}; "
            "set TMPDIR to a folder outside of it"
        )


def _next(
    results: queue.SimpleQueue[JobResult | BaseException | None],
) -> JobResult | BaseException | None:
    while True:
        # Never without limit: on Windows an endless wait would not notice Ctrl-C.
        with suppress(queue.Empty):
            return results.get(timeout=_POLL_SECONDS)


def _outcome(ray: Any, reference: Any, submitted: float) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # Not the job, which catches its own errors: the worker could not even load our code.
        return "failed", None, str(error), time.monotonic() - submitted
    except ray.exceptions.RayError as error:
        text = f"the job's process was lost: {type(error).__name__}: {error}"
        return "killed", None, text, time.monotonic() - submitted
    return outcome


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            'the Ray executor needs Ray; run `pip install "decapod[ray]"`, or use the executor '
            "'local'"
        ) from error
    return ray
