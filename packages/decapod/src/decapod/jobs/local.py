"""Jobs on the processes of this machine.

Every worker is a fresh interpreter with two pipes of its own: nothing is shared between workers,
no lock and no queue, so that killing one at any moment, even in the middle of a message, can
neither block nor end another. A worker runs many jobs, so importing a large library is paid once.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from decapod.jobs.callables import Packing
from decapod.jobs.job import Job, JobResult, Outcome, require_count, result_of
from decapod.jobs.worker import ENVIRONMENT, receive, send

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
    "from decapod.jobs.worker import serve; serve()"
)
# Generous, because a start may also be killed from outside, when memory runs out for instance.
_FAILED_STARTS_ALLOWED = 10
_GOODBYE_SECONDS = 5.0

# A group of its own: Ctrl-C at the terminal reaches only the parent, and a worker can be ended
# together with the processes its job has started.
_OWN_GROUP: dict[str, Any]
if sys.platform == "win32":
    _OWN_GROUP = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
else:
    _OWN_GROUP = {"start_new_session": True}

_Event = Outcome | Literal["ready", "ended"]


@dataclass(frozen=True)
class LocalExecutor:
    """Runs jobs on ``n_jobs`` worker processes of this machine.

    A worker ignores Ctrl-C (the parent decides what to stop), uses one numeric thread, sends what
    its jobs print to standard error, and ends itself, with everything its job has started, when
    the parent is gone.

    Attributes:
        n_jobs: number of worker processes, at least 1.
        timeout: seconds that one job may take before its worker is killed; None for no limit.

    Raises:
        ValueError: ``n_jobs`` or ``timeout`` out of range.
    """

    n_jobs: int = 1
    timeout: float | None = None

    def __post_init__(self) -> None:
        require_count(self.n_jobs)
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout: expected seconds above 0 or None, got {self.timeout!r}")

    def run(self, jobs: Sequence[Job]) -> Iterator[JobResult]:
        """Results in order of completion; all workers are gone when the iterator ends or is closed.

        Raises:
            RuntimeError: worker processes do not start at all.
        """
        waiting = deque(jobs)
        packing = Packing()
        events: queue.SimpleQueue[tuple[_Worker, _Event]] = queue.SimpleQueue()
        workers: set[_Worker] = set()
        failed_starts = 0
        finished = False
        try:
            while waiting or any(worker.job is not None for worker in workers):
                busy = sum(worker.job is not None for worker in workers)
                while len(workers) < min(self.n_jobs, busy + len(waiting)):
                    workers.add(_Worker(events.put))
                self._stop_overdue(workers)
                try:
                    worker, event = events.get(timeout=self._patience(workers))
                except queue.Empty:
                    continue
                results: list[JobResult] = []
                if event == "ended":
                    workers.discard(worker)
                    worker.join()
                    failed_starts += not worker.ready
                    if failed_starts >= _FAILED_STARTS_ALLOWED:
                        raise RuntimeError(
                            f"workers: expected a new Python process to start, but "
                            f"{failed_starts} in a row ended first (the last one "
                            f"{worker.ending()}); their standard error says why"
                        )
                    if worker.job is not None:
                        results.append(worker.killed(self.timeout))
                elif event == "ready":
                    worker.ready = True
                    failed_starts = 0
                elif worker.job is not None:
                    results.append(result_of(worker.job, event))
                    worker.job = None
                # The worker gets its next job before the caller gets the result, so that it does
                # not wait while the result is written to disk.
                while event != "ended" and waiting and worker.job is None and not worker.overdue:
                    job = waiting.popleft()
                    function, fault = packing.of(job.function)
                    if fault is not None:
                        results.append(result_of(job, ("failed", None, fault, 0.0)))
                    elif not worker.start(job, function):
                        waiting.appendleft(job)  # it died idle: the job never reached it
                        break
                yield from results
            finished = True
        finally:
            if finished:
                _dismiss(workers)
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.join()

    def _patience(self, workers: set[_Worker]) -> float:
        # Never without limit: on Windows an endless wait would not notice Ctrl-C.
        if self.timeout is None:
            return 1.0
        now = time.monotonic()
        left = [
            worker.started + self.timeout - now
            for worker in workers
            if worker.job is not None and not worker.overdue
        ]
        return min(1.0, max(0.0, min(left, default=1.0)))

    def _stop_overdue(self, workers: set[_Worker]) -> None:
        if self.timeout is None:
            return
        for worker in workers:
            if worker.job is not None and time.monotonic() - worker.started >= self.timeout:
                worker.overdue = True
                worker.kill()


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, report: Callable[[tuple[_Worker, _Event]], None]) -> None:
        self.job: Job | None = None
        self.started = 0.0
        self.ready = False
        self.overdue = False
        self._report = report
        # -P keeps the current folder from shadowing the standard library during the start.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, json.dumps([str(entry) for entry in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **ENVIRONMENT},
            **_OWN_GROUP,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._inbox = self._process.stdin
        self._outbox = self._process.stdout
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._reader.start()
        self._watcher.start()

    def start(self, job: Job, function: bytes) -> bool:
        """Hands over a job; False if the process is gone."""
        try:
            send(self._inbox.fileno(), (function, job.arguments))
        except OSError:
            return False
        self.job = job
        self.started = time.monotonic()
        return True

    def dismiss(self) -> None:
        """Asks an idle worker to end by itself, so that exit handlers of libraries run."""
        with suppress(OSError):  # it has ended already, which is what we want
            send(self._inbox.fileno(), None)

    def wait(self, seconds: float) -> None:
        """Waits for the process to end, but not longer than this."""
        with suppress(subprocess.TimeoutExpired):  # kill() comes next
            self._process.wait(seconds)

    def kill(self) -> None:
        """Ends the process, and what its job has started."""
        if self._process.poll() is None:
            _kill_group(self._process.pid)
            self._process.kill()

    def join(self) -> None:
        """Waits until the process is gone and frees its pipes."""
        self._watcher.join()
        self._inbox.close()
        if not self._reader.is_alive():  # else a process that left the group still holds the pipe
            self._outbox.close()

    def killed(self, timeout: float | None) -> JobResult:
        """The result of the job under which the process ended."""
        assert self.job is not None
        error = f"the job's process {self.ending()}"
        if self.overdue:
            error = f"the job was stopped at its time limit of {timeout:g} s"
        return result_of(self.job, ("killed", None, error, time.monotonic() - self.started))

    def ending(self) -> str:
        """How the process ended, in words."""
        code = self._process.wait()
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        memory = " (the system does this when memory runs out)" if name == "SIGKILL" else ""
        return f"was killed by {name}{memory}"

    def _read(self) -> None:
        with suppress(EOFError, OSError):  # the process has ended; _watch reports that
            while True:
                self._report((self, receive(self._outbox.fileno())))

    def _watch(self) -> None:
        pid = self._process.pid
        self._process.wait()
        # What the job has forked holds our pipe open, and would outlive us.
        _kill_group(pid)
        # What the worker has sent before its end is reported before its end.
        self._reader.join(timeout=_GOODBYE_SECONDS)
        self._report((self, "ended"))


def _dismiss(workers: set[_Worker]) -> None:
    idle = [worker for worker in workers if worker.ready]
    for worker in idle:
        worker.dismiss()
    deadline = time.monotonic() + _GOODBYE_SECONDS
    for worker in idle:
        worker.wait(max(0.0, deadline - time.monotonic()))


def _kill_group(pid: int) -> None:
    if sys.platform != "win32":
        with suppress(ProcessLookupError, PermissionError):  # nobody is left in the group
            os.killpg(pid, signal.SIGKILL)
