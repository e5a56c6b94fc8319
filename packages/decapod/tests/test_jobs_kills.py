"""Whole runs that are killed or interrupted, and what a restart makes of what is left."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from decapod.jobs import Store
from decapod.jsonl import read

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")

SCRIPT = """
import os, sys, time
from pathlib import Path
from decapod.jobs import Job, run_jobs
from decapod.jsonl import dumps

folder, executor, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
if executor == "ray":
    from decapod.jobs.on_ray import RayExecutor
    executor = RayExecutor(2, ray_init={"log_to_driver": False})

def work(i, pids, seconds, shadow):
    import numpy as np
    from decapod.seeding import Seeds
    Path(pids, str(os.getpid())).touch()
    time.sleep(seconds)
    if shadow and i == 3 and not Path(pids, "died").exists():
        Path(pids, "died").touch()
        os.kill(os.getpid(), 9)
    draws = Seeds(7).generator("work", i).standard_normal(50)
    return {"mean": float(draws.mean()), "all": draws.tolist(), "nan": float("nan")}

pids = folder / "pids"
pids.mkdir(parents=True, exist_ok=True)
arguments = {"pids": str(pids), "seconds": seconds, "shadow": "shadow" in sys.argv}
jobs = [Job(work, {"i": i, **arguments}) for i in range(16)]
report = run_jobs(jobs, folder / "store", executor=executor, n_jobs=2, title="work")
table = "".join(dumps([r.arguments["i"], r.value]) + "\\n" for r in report.results)
(folder / "table.part").write_text(table)
(folder / "table.part").rename(folder / "table.txt")
sys.exit(0 if report.complete else 1)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "ray":
        # The driver is killed, the cluster stays: as on many machines.
        monkeypatch.setenv("RAY_ADDRESS", request.getfixturevalue("ray_cluster"))
    return name


def start(script: Path, folder: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), *arguments],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(script: Path, folder: Path, *arguments: str) -> int:
    with start(script, folder, *arguments) as process:
        process.communicate(timeout=120)
        return process.returncode


def wait_for_results(folder: Path, count: int, process: "subprocess.Popen[bytes]") -> None:
    """Returns when the store has this many finished lines."""
    path = Store(folder / "store").path
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)
    raise AssertionError(f"ended before {count} results: {process.communicate()[1].decode()}")


def still_alive(folder: Path) -> list[int]:
    return [int(note.name) for note in (folder / "pids").glob("[0-9]*") if alive(int(note.name))]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:  # a process that only waits for its parent to take note is dead
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def workers_end(folder: Path, patience: float = 30.0) -> bool:
    deadline = time.monotonic() + patience
    while still_alive(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_three_kills_and_a_killed_worker_change_no_byte_of_the_final_table(
    script: Path, tmp_path: Path, executor: str
) -> None:
    folder = tmp_path / "run"
    # Far enough from the end that a slow machine kills in time.
    for point in sorted(random.Random(5).sample(range(2, 9), 3)):
        with start(script, folder, executor, "0.1", "shadow") as process:
            wait_for_results(folder, point, process)
            time.sleep(random.Random(point).random() * 0.1)
            process.kill()
        assert workers_end(folder), "workers outlive the parent that was killed"
        assert not (folder / "table.txt").exists()
    store = Store(folder / "store")
    assert len(store.done()) < 16
    finish(script, folder, executor, "0.1", "shadow")
    assert (folder / "pids" / "died").exists()
    assert finish(script, folder, executor, "0.1", "shadow") == 0
    disturbed = (folder / "table.txt").read_bytes()
    told = [record["status"] for record in read(store.path) if isinstance(record, dict)]
    assert told.count("killed") <= 1  # the parent may have died before it could tell
    assert told.count("done") == 16

    # The undisturbed run is local and has the same folder name, which is among the arguments.
    folder.rename(tmp_path / "kept")
    (folder / "pids").mkdir(parents=True)
    (folder / "pids" / "died").touch()
    assert finish(script, folder, "local", "0.1", "shadow") == 0
    assert (folder / "table.txt").read_bytes() == disturbed
    assert disturbed.count(b"\n") == 16


@pytest.mark.parametrize("target", ["the parent", "the whole group"])
def test_ctrl_c_stops_all_and_leaves_a_store_that_a_restart_completes(
    script: Path, tmp_path: Path, target: str
) -> None:
    folder = tmp_path / "run"
    with start(script, folder, "local", "0.1") as process:
        wait_for_results(folder, 3, process)
        if target == "the parent":
            process.send_signal(signal.SIGINT)
        else:
            os.killpg(process.pid, signal.SIGINT)
        message = process.communicate(timeout=60)[1].decode()
    assert process.returncode == -signal.SIGINT, message
    done = len(Store(folder / "store").done())
    assert 3 <= done < 16
    assert f"work: interrupted; {done} of 16 jobs are done and kept in" in message
    assert Store(folder / "store").failures() == {}
    assert workers_end(folder)
    assert finish(script, folder, "local", "0.1") == 0
    assert len(Store(folder / "store").done()) == 16


@pytest.mark.ray
def test_ray_started_for_a_run_ends_with_it_even_if_it_is_interrupted(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder = tmp_path / "run"
    with start(script, folder, "ray", "0.1") as process:
        wait_for_results(folder, 2, process)
        os.killpg(process.pid, signal.SIGINT)
        message = process.communicate(timeout=60)[1].decode()
    assert process.returncode == -signal.SIGINT, message
    assert "work: interrupted" in message
    assert workers_end(folder)


def test_sigterm_leaves_a_store_that_a_restart_completes(script: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start(script, folder, "local", "0.1") as process:
        wait_for_results(folder, 3, process)
        process.terminate()
    assert workers_end(folder)
    assert finish(script, folder, "local", "0.1") == 0
    assert len(Store(folder / "store").done()) == 16


def test_workers_deep_in_a_job_end_with_their_parent(script: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start(script, folder, "local", "600") as process:
        while len(still_alive(folder)) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert workers_end(folder)


def test_a_script_without_a_main_guard_can_run_jobs(tmp_path: Path) -> None:
    code = (
        "import sys; from decapod.jobs import Job, run_jobs\n"
        "def square(i): return i * i\n"
        "report = run_jobs([Job(square, {'i': i}) for i in range(4)], sys.argv[1], n_jobs=2)\n"
        "print([r.value for r in report.results])\n"
    )
    script = tmp_path / "plain.py"
    script.write_text(code)
    for way, text in (([str(script)], None), (["-"], code)):
        done = subprocess.run(
            [sys.executable, *way, str(tmp_path / way[0].replace("/", "_"))],
            input=text,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "[0, 1, 4, 9]\n"
        assert "jobs: 4/4" in done.stderr


def test_the_library_leaves_no_process_behind_when_results_are_never_closed(
    tmp_path: Path,
) -> None:
    code = (
        "import os, sys; from decapod.jobs import Job, LocalExecutor\n"
        "def pid(i): return os.getpid()\n"
        "results = LocalExecutor(2).run([Job(pid, {'i': i}) for i in range(9)])\n"
        "print(next(results).value)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    pid = int(done.stdout)
    for _ in ticks():
        if not alive(pid):
            break
    assert not alive(pid)


def ticks(seconds: float = 20.0) -> Iterator[None]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
        time.sleep(0.05)
