"""A sweep that is killed, stopped or loses a worker ends, after a restart, in the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpreliability.sweep import Sweep, SweepSpec

JOBS = 4 * 2 * 5
SCRIPT = """
import sys, time
import numpy as np
from hpreliability.sweep import Sweep, SweepSpec

SPEC = SweepSpec(
    name="walk",
    base={"lr": 0.1, "decay": 0.5},
    hyperparameters={"lr": [0.01, 0.1, 1.0], "decay": [0.5, 0.9]},
    contexts={"env": ["a", "b"]},
    budgets=50,
    seeds=5,
)

def train(config, env, seed, budget):
    time.sleep(0.1)
    rng = np.random.default_rng(seed)
    x = 0.0
    for _ in range(budget):
        x = config["decay"] * x + config["lr"] * rng.normal(ord(env) - 97)
    return x

if __name__ == "__main__":
    sweep = Sweep(SPEC, sys.argv[1])
    report = sweep.run(train, n_jobs=2)
    print("reused", report.reused)
    sweep.write_csv(sys.argv[2])
"""


def start(folder: Path, name: str) -> subprocess.Popen[str]:
    script = folder / "walk.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(folder / name), str(folder / f"{name}.csv")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> int:
    """Waits for the end; returns how many results it found."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return int(out.split()[-1])


def finished(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("jobs-*.jsonl"))


def wait_for(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while finished(folder) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert finish(start(folder, "whole")) == 0
    assert finished(folder / "whole") == JOBS
    return (folder / "whole.csv").read_bytes()


def test_killed_three_times_at_random_it_ends_in_the_bytes_of_an_undisturbed_run(
    tmp_path: Path, undisturbed: bytes
) -> None:
    chance = random.Random()
    for _ in range(3):
        process = start(tmp_path, "killed")
        # Somewhere within the next jobs, be it in a job, between two, or while a line is written.
        wait_for(tmp_path / "killed", finished(tmp_path / "killed") + 1, process)
        time.sleep(chance.uniform(0, 0.25))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "killed.csv").exists()
    kept = finished(tmp_path / "killed")
    assert 3 <= kept < JOBS
    assert finish(start(tmp_path, "killed")) == kept
    assert (tmp_path / "killed.csv").read_bytes() == undisturbed


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to another process")
def test_ctrl_c_leaves_a_store_that_the_same_command_finishes(
    tmp_path: Path, undisturbed: bytes
) -> None:
    process = start(tmp_path, "stopped")
    wait_for(tmp_path / "stopped", 2, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "interrupted" in err
    kept = finished(tmp_path / "stopped")
    assert 2 <= kept < JOBS
    assert finish(start(tmp_path, "stopped")) == kept
    assert (tmp_path / "stopped.csv").read_bytes() == undisturbed


@pytest.fixture
def ray_cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


def lost_worker_then_restart(folder: Path, executor: str) -> None:
    spec = SweepSpec(
        name="lost",
        base={"lr": 0.1},
        hyperparameters={"lr": [0.1, 1.0, 10.0]},
        contexts={"env": ["a", "b"]},
        budgets=50,
        seeds=2,
    )
    once = folder / "killed-once"

    def train(config: dict[str, Any], env: str, seed: int, budget: int) -> float:
        if config["lr"] == 1.0 and env == "b" and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return float(config["lr"] * budget + seed / 2**32)

    sweep = Sweep(spec, folder / "sweep")
    report = sweep.run(train, executor=executor, n_jobs=2, progress=False)
    assert [failure.status for failure in report.failures] == ["killed"]
    assert "lr=1.0 env=b" in report.failures[0].label
    assert len(report.results) == 11  # the others went on
    table = sweep.results()
    assert table.frame["score"].isna().sum() == 1
    assert "1 of 12 runs failed (1 of them killed)" in table.notes[0]
    report = sweep.run(train, executor=executor, n_jobs=2, progress=False)
    assert report.complete
    assert report.reused == 11
    sweep.write_csv(folder / "restarted.csv")
    undisturbed = Sweep(spec, folder / "undisturbed")
    assert undisturbed.run(train, progress=False).complete
    undisturbed.write_csv(folder / "undisturbed.csv")
    assert (folder / "restarted.csv").read_bytes() == (folder / "undisturbed.csv").read_bytes()


def test_a_killed_worker_is_reported_and_a_restart_ends_in_the_same_bytes(tmp_path: Path) -> None:
    lost_worker_then_restart(tmp_path, "local")


@pytest.mark.ray
def test_a_killed_ray_worker_is_reported_and_a_restart_ends_in_the_same_bytes(
    tmp_path: Path, ray_cluster: None
) -> None:
    lost_worker_then_restart(tmp_path, "ray")
