"""The contract of an executor, held to by the local one and by a real Ray cluster of two nodes."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from decapod.jobs import Executor, Job, JobResult, LocalExecutor, Store, run_jobs


@pytest.fixture(scope="module")
def cluster(ray_cluster: str) -> Iterator[str]:
    import ray

    # One driver for all tests: RayExecutor uses it and must leave it running.
    ray.init(address=ray_cluster, log_to_driver=False, logging_level="error")
    yield ray_cluster
    ray.shutdown()


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def executor(request: pytest.FixtureRequest) -> Executor:
    if request.param == "local":
        return LocalExecutor(2)
    request.getfixturevalue("cluster")
    from decapod.jobs.on_ray import RayExecutor

    return RayExecutor(2)


def square(i: int) -> int:
    return i * i


def where(i: int, ballast: str = "") -> dict[str, Any]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONHASHSEED")
    return {
        "pid": os.getpid(),
        "ballast": ballast,
        **{name: os.environ.get(name) for name in names},
    }


def fault(i: int, how: str) -> Any:
    if how == "raise":
        raise LookupError(f"job {i} has a fault")
    if how == "exit":
        sys.exit(3)
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "return":
        return {"x": [object()]}
    if how == "_exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return i


def run(executor: Executor, jobs: list[Job]) -> dict[str, JobResult]:
    results = list(executor.run(jobs))
    assert len(results) == len(jobs)
    return {result.key: result for result in results}


def test_every_job_has_one_result_and_it_is_what_the_function_returns(executor: Executor) -> None:
    jobs = [Job(square, {"i": i}, label=f"square {i}") for i in range(60)]
    results = run(executor, jobs)
    for job in jobs:
        found = results[job.key]
        assert (found.status, found.value, found.error) == ("done", job.arguments["i"] ** 2, None)
        assert (found.label, found.arguments) == (job.label, job.arguments)
        assert found.seconds >= 0


@pytest.mark.parametrize("how", ["raise", "exit", "interrupt", "return"])
def test_a_fault_is_the_jobs_own_and_comes_with_its_traceback(executor: Executor, how: str) -> None:
    jobs = [Job(fault, {"i": i, "how": how if i == 1 else "none"}) for i in range(4)]
    results = run(executor, jobs)
    found = results[jobs[1].key]
    assert found.status == "failed"
    assert found.error is not None
    assert {
        "raise": "LookupError: job 1 has a fault",
        "exit": "SystemExit: 3",
        "interrupt": "KeyboardInterrupt",
        "return": "returned value['x'][0]: expected a JSON value, got builtins.object",
    }[how] in found.error
    assert "Traceback" in found.error
    assert [results[job.key].value for job in jobs if job is not jobs[1]] == [0, 2, 3]


@pytest.mark.parametrize(
    "how",
    [
        "_exit",
        pytest.param("kill", marks=pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")),
    ],
)
def test_a_worker_that_dies_takes_only_its_own_job_with_it(executor: Executor, how: str) -> None:
    jobs = [Job(fault, {"i": i, "how": how if i in (2, 5) else "none"}) for i in range(10)]
    results = run(executor, jobs)
    statuses = [results[job.key].status for job in jobs]
    assert statuses == ["killed" if i in (2, 5) else "done" for i in range(10)]
    assert results[jobs[2].key].error


def test_closures_lambdas_and_functions_of_test_files_can_be_jobs(executor: Executor) -> None:
    factor = 3

    def scaled(i: int) -> int:
        return factor * square(i)

    jobs = [Job(scaled, {"i": 2}), Job(lambda i: i - factor, {"i": 2}), Job(square, {"i": 2})]
    results = run(executor, jobs)
    assert [results[job.key].value for job in jobs] == [12, -1, 4]


def test_a_function_that_cannot_travel_is_a_failed_job(executor: Executor) -> None:
    generator = (i for i in range(3))

    def stuck(i: int) -> int:
        return next(generator)

    jobs = [Job(stuck, {"i": 1}), Job(square, {"i": 2})]
    results = run(executor, jobs)
    assert results[jobs[0].key].status == "failed"
    assert "generator" in (results[jobs[0].key].error or "")
    assert results[jobs[1].key].value == 4


def test_workers_have_one_numeric_thread_and_are_other_processes(executor: Executor) -> None:
    jobs = [Job(where, {"i": i}) for i in range(6)]
    for found in run(executor, jobs).values():
        assert isinstance(found.value, dict)
        assert found.value.pop("pid") != os.getpid()
        found.value.pop("ballast")
        assert set(found.value.values()) == {"1", "0"}
        assert found.value["PYTHONHASHSEED"] == "0"


def test_workers_are_kept_for_many_jobs(executor: Executor) -> None:
    jobs = [Job(where, {"i": i}) for i in range(30)]
    pids = [found.value["pid"] for found in run(executor, jobs).values()]  # type: ignore[index, call-overload]  # a dict, see where()
    assert len(set(pids)) < 10


def test_a_restart_after_failures_runs_only_what_is_not_done(
    executor: Executor, tmp_path: Path
) -> None:
    def once(i: int, folder: str) -> int:
        with Path(folder, f"{i}-{time.time_ns()}").open("x"):
            pass
        attempts = len(list(Path(folder).glob(f"{i}-*")))
        if i == 1 and attempts == 1:
            raise RuntimeError("first attempt")
        if i == 2 and attempts == 1:
            os._exit(1)
        return 10 * i

    (tmp_path / "seen").mkdir()
    jobs = [Job(once, {"i": i, "folder": str(tmp_path / "seen")}) for i in range(5)]
    first = run_jobs(jobs, tmp_path / "store", executor=executor, progress=False)
    assert [found.status for found in first.failures] == ["failed", "killed"]
    assert not first.complete
    assert len(Store(tmp_path / "store").failures()) == 2

    second = run_jobs(jobs, tmp_path / "store", executor=executor, progress=False)
    assert second.complete
    assert second.reused == 3
    assert [found.value for found in second.results] == [0, 10, 20, 30, 40]
    counts = [len(list((tmp_path / "seen").glob(f"{i}-*"))) for i in range(5)]
    assert counts == [1, 2, 2, 1, 1]
    assert Store(tmp_path / "store").failures() == {}


def test_closing_the_results_early_stops_the_work(executor: Executor, tmp_path: Path) -> None:
    def mark(i: int, folder: str) -> int:
        Path(folder, str(i)).touch()
        time.sleep(0.05 if i == 0 else 600)
        return i

    jobs = [Job(mark, {"i": i, "folder": str(tmp_path)}) for i in range(8)]
    results = executor.run(jobs)
    assert next(iter(results)).value == 0
    results.close()  # type: ignore[attr-defined]  # both executors yield from generators
    assert len(list(tmp_path.iterdir())) <= 3


@pytest.mark.parametrize("n", [0, 1])
def test_lists_shorter_than_the_workers_are_fine(executor: Executor, n: int) -> None:
    assert len(run(executor, [Job(square, {"i": i}) for i in range(n)])) == n


# --- Ray alone


@pytest.mark.ray
def test_jobs_run_on_every_node_of_the_cluster_and_it_is_left_running(
    cluster: str, tmp_path: Path
) -> None:
    import ray

    from decapod.jobs.on_ray import RayExecutor

    def meet(i: int, folder: str) -> str:
        import ray

        node = ray.get_runtime_context().get_node_id()
        Path(folder, node).touch()
        deadline = time.monotonic() + 60  # until a job on another node has come
        while len(list(Path(folder).iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        return str(node)

    jobs = [Job(meet, {"i": i, "folder": str(tmp_path)}) for i in range(2)]
    results = run(RayExecutor(), jobs)
    assert len({found.value for found in results.values()}) == 2
    assert ray.is_initialized()


# --- the local executor alone


def test_thousands_of_jobs_lose_none_though_some_end_their_worker() -> None:
    def risky(i: int) -> int:
        if i % 197 == 0:
            os._exit(i % 7)
        return i

    jobs = [Job(risky, {"i": i}) for i in range(2000)]
    results = run(LocalExecutor(2), jobs)
    for job in jobs:
        i = job.arguments["i"]
        assert results[job.key].status == ("killed" if i % 197 == 0 else "done")
        assert results[job.key].value == (None if i % 197 == 0 else i)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_killing_workers_at_any_moment_costs_at_most_the_job_under_way() -> None:
    # Idle, starting, working or in the middle of a message: all happen here.
    jobs = [Job(where, {"i": i, "ballast": "x" * 100_000}) for i in range(400)]
    rng = random.Random(0)
    kills, over = 0, threading.Event()

    def killer() -> None:
        nonlocal kills
        while kills < 8 and not over.wait(rng.random() * 0.2):
            children = workers_of(os.getpid())
            if children:
                os.kill(rng.choice(children), signal.SIGKILL)
                kills += 1

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        results = run(LocalExecutor(2), jobs)
    finally:
        over.set()
        thread.join()
    lost = [found for found in results.values() if found.status != "done"]
    assert len(lost) <= kills
    assert all("SIGKILL" in (found.error or "") for found in lost)


def workers_of(parent: int) -> list[int]:
    """The processes that a process has started; fork and exec are over for all of them."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    return [int(row[0]) for row in rows if int(row[1]) == parent and "decapod.jobs" in row[-1]]


def test_a_job_over_its_time_limit_is_stopped_and_the_others_go_on() -> None:
    def slow(i: int) -> int:
        time.sleep(600 if i == 1 else 0)
        return i

    jobs = [Job(slow, {"i": i}) for i in range(5)]
    results = run(LocalExecutor(2, timeout=3.0), jobs)
    assert [results[job.key].value for job in jobs] == [0, None, 2, 3, 4]
    assert results[jobs[1].key].status == "killed"
    assert "time limit of 3 s" in (results[jobs[1].key].error or "")


@pytest.mark.skipif(os.name == "nt", reason="process groups")
def test_what_a_job_has_started_does_not_outlive_the_worker(tmp_path: Path) -> None:
    def parent_of_a_sleeper(how: str, note: str) -> Any:
        child = os.fork()
        if child == 0:
            time.sleep(600)
        Path(note).write_text(str(child))
        if how == "_exit":
            os._exit(1)
        return how

    notes = {how: tmp_path / how for how in ("_exit", "return")}
    jobs = [Job(parent_of_a_sleeper, {"how": how, "note": str(notes[how])}) for how in notes]
    results = run(LocalExecutor(1), jobs)
    assert [results[job.key].status for job in jobs] == ["killed", "done"]
    assert all(ended(int(note.read_text())) for note in notes.values())


def ended(pid: int, patience: float = 10.0) -> bool:
    """Whether the process ends; one that only waits for its parent to take note has ended."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] in "ZX":
            return True
        time.sleep(0.05)
    return False


def test_jobs_may_print_and_read_standard_input(capfd: pytest.CaptureFixture[str]) -> None:
    def chatty(i: int) -> Any:
        print("from a job", flush=True)
        os.write(1, b"from the system\n")
        return [sys.stdin.read(), i]

    jobs = [Job(chatty, {"i": i}) for i in range(3)]
    results = run(LocalExecutor(1), jobs)
    assert [results[job.key].value for job in jobs] == [["", i] for i in range(3)]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("from a job") == 3
    assert captured.err.count("from the system") == 3


def test_large_arguments_and_results_pass_whole() -> None:
    def reverse(text: str) -> str:
        return text[::-1]

    jobs = [Job(reverse, {"text": f"{i}" * 3_000_000}) for i in range(3)]
    results = run(LocalExecutor(2), jobs)
    assert [results[job.key].value == job.arguments["text"] for job in jobs] == [True] * 3


def test_workers_that_cannot_start_are_an_error_and_not_an_endless_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(RuntimeError, match=r"10 in a row ended first .* exit code 1"):
        list(LocalExecutor(2).run([Job(square, {"i": 1})]))


def test_a_job_may_start_processes_of_its_own() -> None:
    def nested(i: int) -> list[int]:
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            return list(pool.map(abs, [-i, -2]))

    job = Job(nested, {"i": 1})
    assert run(LocalExecutor(1), [job])[job.key].value == [1, 2]


def test_a_module_found_only_by_our_own_search_path_is_found_by_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("def answer(i): return __name__ + str(i)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module: Any = __import__("only_here")
    answer: Callable[..., Any] = module.answer
    job = Job(answer, {"i": 1})
    assert run(LocalExecutor(1), [job])[job.key].value == "only_here1"


@pytest.mark.ray
@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="needs a virtual environment")
def test_ray_files_inside_the_virtual_environment_are_refused_and_not_waited_for() -> None:
    pytest.importorskip("ray")
    code = (
        "from decapod.jobs import Job\n"
        "from decapod.jobs.on_ray import RayExecutor\n"
        "list(RayExecutor(1).run([Job(abs, {})]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": sys.prefix, "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "set TMPDIR to a folder outside of it" in done.stderr
