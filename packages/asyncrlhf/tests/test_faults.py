"""Killed actors, killed learners, Ctrl-C: nothing changes, nothing hangs, nothing is left."""

from __future__ import annotations

import contextlib
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

pytest.importorskip("transformers")
pytest.importorskip("decapod.lm")

from asyncrlhf.engines import FakeEngine, HFEngine
from asyncrlhf.errors import ActorError, WaitTimeoutError

SCRIPT = Path(__file__).with_name("replay_run.py")
STEPS = 12


def shared_memory(creators: set[int]) -> list[str]:
    """Segments that these processes made and that are still there."""
    names = (path.name for path in Path("/dev/shm").glob("asyncrlhf_*"))
    return [name for name in names if int(name.split("_")[1]) in creators]


def runs(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition: Any, what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.02)


@pytest.fixture
def nothing_left() -> Iterator[set[int]]:
    """Holds the processes whose shared memory must be gone at the end."""
    creators = {os.getpid()}
    yield creators
    wait_until(lambda: not shared_memory(creators), "shared memory to go")


@pytest.fixture(scope="module")
def undisturbed(replay: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    args = replay.settings(tmp_path_factory.mktemp("undisturbed"), max_steps=STEPS)
    run = replay.trainer(args, HFEngine(placement="inline"))
    run.train()
    found: str = replay.digest(run.model)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("chance", range(10))
def test_an_actor_killed_at_a_random_time_changes_nothing(
    replay: Any, undisturbed: str, nothing_left: set[int], tmp_path: Path, chance: int
) -> None:
    engine = HFEngine(placement="process", threads=1)
    moment = random.Random(chance).uniform(0, 0.5)
    killed: list[int] = []

    def kill() -> None:
        time.sleep(moment)
        pid = engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    killer = threading.Thread(target=kill)

    class Starting(replay.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            killer.start()

        def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            time.sleep(0.02)
            if state.global_step == STEPS - 3:  # late enough for every moment, with work left
                killer.join()

    run = replay.trainer(replay.settings(tmp_path, max_steps=STEPS), engine, callbacks=[Starting()])
    run.train()
    assert replay.digest(run.model) == undisturbed
    assert killed
    assert not any(map(runs, killed))
    lost = run.report().regenerated
    assert lost < 2


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def started(nothing_left: set[int]) -> Iterator[Start]:
    """Starts runs in processes of their own, which end with the test."""
    with contextlib.ExitStack() as stack:

        def start(folder: Path, *words: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT), str(folder), *words],
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            stack.enter_context(process)  # waits, and closes its pipe
            stack.callback(process.kill)
            nothing_left.add(process.pid)
            return process

        yield start


def read_until(process: subprocess.Popen[str], beginning: str) -> str:
    """The first line of output that begins like this, without its beginning."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return line.removeprefix(beginning).strip()
    raise AssertionError(f"the run ended before it said {beginning!r}")


def test_a_killed_learner_goes_on_to_the_same_end(
    undisturbed: str, started: Start, tmp_path: Path
) -> None:
    words = [f"max_steps={STEPS}", "save_strategy='steps'", "save_steps=2", "rounds_ahead=1"]
    first = started(tmp_path, *words, "dawdle=0.2")
    actor = int(read_until(first, "actor "))
    read_until(first, "step 5")
    first.kill()
    first.communicate()
    wait_until(lambda: not runs(actor), "the actor to end after its learner")
    again = started(tmp_path, *words, "resume=True")
    assert read_until(again, "step ") != "1"
    assert read_until(again, "digest ") == undisturbed
    again.communicate()
    assert again.returncode == 0


def test_ctrl_c_ends_everything_soon(started: Start, tmp_path: Path) -> None:
    process = started(tmp_path, "max_steps=1000", "dawdle=0.1")
    actor = int(read_until(process, "actor "))
    read_until(process, "step 3")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode not in (0, None)
    assert not runs(actor)


def test_an_engine_that_fails_ends_the_run_with_its_error(
    replay: Any, nothing_left: set[int], tmp_path: Path
) -> None:
    from decapod.lm import EngineError

    engine = FakeEngine(fail_at=[2], vocab_size=13)
    run = replay.trainer(replay.settings(tmp_path), engine)
    with pytest.raises(EngineError, match="call 2") as caught:
        run.train()
    assert any("round 2" in note for note in caught.value.__notes__)
    assert run.state.global_step == 2


def test_weights_that_do_not_arrive_end_the_run(
    replay: Any, nothing_left: set[int], tmp_path: Path
) -> None:
    from asyncrlhf.errors import WeightUpdateError

    run = replay.trainer(replay.settings(tmp_path), FakeEngine(fail_load_at=[1], vocab_size=13))
    with pytest.raises(WeightUpdateError, match="load 1"):
        run.train()


def test_an_engine_that_hangs_is_named_after_the_timeout(
    replay: Any, nothing_left: set[int], tmp_path: Path
) -> None:
    hang = threading.Event()

    class Hanging(FakeEngine):
        def generate(self, requests: Any) -> Any:
            hang.wait(20)
            return super().generate(requests)

        def close(self) -> None:
            hang.set()
            super().close()

    run = replay.trainer(replay.settings(tmp_path, round_timeout=0.3), Hanging(vocab_size=13))
    with pytest.raises(WaitTimeoutError, match="round 0 to be generated"):
        run.train()


def test_an_actor_that_dies_again_and_again_is_given_up(
    replay: Any, nothing_left: set[int], tmp_path: Path
) -> None:
    class Doomed(HFEngine):
        def load_weights(self, source: Any, version: int) -> None:
            pid = self.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            super().load_weights(source, version)

    engine = Doomed(placement="process", threads=1, max_restarts=0)
    run = replay.trainer(replay.settings(tmp_path), engine)
    with pytest.raises(ActorError, match="killed by SIGKILL"):
        run.train()
