import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from asyncrlhf.engines import Completion, FakeEngine, RemoteEngine
from asyncrlhf.errors import ActorError, InvalidInputError, WaitTimeoutError, WeightUpdateError
from asyncrlhf.processes import ProcessDiedError, SupervisedProcess
from decapod.lm import Request, RequestError, SamplingParams

LIMIT = 60.0  # seconds; what a test waits for at most
PARAMS = SamplingParams(max_new_tokens=12)
REQUESTS = [Request((3, 4 + i % 5), PARAMS, seed=i, id=f"r{i}") for i in range(20)]


def workbench() -> type:
    """A class whose code travels: a child that had to import this module would be slow to start."""

    class Workbench:
        def __init__(self) -> None:
            self.calls = 0

        def count(self) -> int:
            self.calls += 1
            return self.calls

        def sleep(self, seconds: float) -> str:
            time.sleep(seconds)
            return "slept"

        def size(self, value: bytes) -> int:
            return len(value)

        def echo(self, value: object) -> object:
            return value

        def session(self) -> int:
            return os.getsid(0)

        def unsendable(self) -> object:
            return threading.Lock()

        def refuse(self, how: str) -> None:
            if how == "ours":
                raise WaitTimeoutError("the kettle", 3.0)
            if how == "request":
                raise RequestError(4, "r4", "prompt: expected at least one token")
            raise ZeroDivisionError("nothing to share")

        def print(self) -> int:
            print("text on standard output must not get between the messages", flush=True)
            return 1

    return Workbench


class NeverRead:
    """Pickles, but cannot be unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return int, ("not a number",)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"waited {LIMIT} s for {what}"
        time.sleep(0.02)


def state_of(pid: int) -> str:
    """The letter of the process state as Linux gives it; Z as well where there is no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def gone(pid: int) -> bool:
    return state_of(pid) == "Z"


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state_of(pid) == "T", "the process to stop")


@contextmanager
def soon(action: Callable[[], None], seconds: float = 0.3) -> Iterator[None]:
    timer = threading.Timer(seconds, action)
    timer.start()
    yield
    timer.join()


def expected(version: int = 0) -> list[Completion]:
    engine = FakeEngine()
    engine.load_weights([], version)
    return list(engine.generate(REQUESTS))


@pytest.fixture(scope="module")
def bench() -> Iterator[SupervisedProcess]:
    process = SupervisedProcess(workbench(), what="the workbench")
    process.start()
    yield process
    process.close()
    process.close()


def call(process: SupervisedProcess, method: str, *args: object, timeout: float = LIMIT) -> Any:
    if not process.alive:  # an earlier test made it end
        process.start()
    return process.call(method, *args, timeout=timeout)


# --- a process and its calls ----------------------------------------------------------------------


def test_an_object_keeps_its_state_between_calls(
    bench: SupervisedProcess,
) -> None:
    first = call(bench, "count")
    assert call(bench, "count") == first + 1
    assert call(bench, "print") == 1  # and the next answer is still read rightly
    assert call(bench, "count") == first + 2


def test_the_child_has_a_session_of_its_own(bench: SupervisedProcess) -> None:
    assert call(bench, "session") == bench.pid != os.getsid(0)


def test_large_messages_pass_in_both_directions(bench: SupervisedProcess) -> None:
    value = os.urandom(3_000_000)
    assert call(bench, "size", value) == len(value)
    assert call(bench, "echo", value) == value


def test_our_exceptions_come_back_as_themselves_and_others_with_their_traceback(
    bench: SupervisedProcess,
) -> None:
    with pytest.raises(WaitTimeoutError, match="waited 3 s for the kettle") as waited:
        call(bench, "refuse", "ours")
    assert (waited.value.what, waited.value.seconds) == ("the kettle", 3.0)
    with pytest.raises(RequestError, match="at least one token") as refused:
        call(bench, "refuse", "request")
    assert (refused.value.index, refused.value.id) == (4, "r4")
    assert "in refuse" in "".join(refused.value.__notes__)
    with pytest.raises(ActorError, match=r"the workbench raised ZeroDivisionError: nothing") as it:
        call(bench, "refuse", "other")
    assert "in refuse" in str(it.value)


def test_what_cannot_be_pickled_or_unpickled_is_said_at_once_and_the_child_lives(
    bench: SupervisedProcess,
) -> None:
    call(bench, "count")
    pid = bench.pid
    with pytest.raises(TypeError, match="pickle"):
        call(bench, "echo", threading.Lock())
    with pytest.raises(ActorError, match="raised TypeError: cannot pickle"):
        call(bench, "unsendable")
    with pytest.raises(ActorError, match="raised ValueError: invalid literal"):
        call(bench, "echo", NeverRead())
    assert call(bench, "size", b"abc") == 3
    assert bench.pid == pid


def test_a_call_that_takes_too_long_names_what_it_waited_for_and_ends_the_child(
    bench: SupervisedProcess,
) -> None:
    call(bench, "count")
    pid = bench.pid
    assert pid is not None
    with pytest.raises(WaitTimeoutError, match=r"waited 0.2 s for the workbench to finish sleep"):
        call(bench, "sleep", LIMIT, timeout=0.2)
    assert not bench.alive
    assert gone(pid)
    assert call(bench, "count") == 1  # started again


def test_a_call_of_a_dead_child_says_how_it_ended(bench: SupervisedProcess) -> None:
    call(bench, "count")
    pid = bench.pid
    assert pid is not None
    with (
        soon(lambda: os.kill(pid, signal.SIGKILL)),
        pytest.raises(ProcessDiedError, match="was killed by SIGKILL"),
    ):
        call(bench, "sleep", LIMIT)


def test_a_child_that_takes_nothing_is_noticed_though_the_call_cannot_be_sent() -> None:
    process = SupervisedProcess(workbench(), what="the sleeper", silence_timeout=3.0)
    try:
        process.start()
        pid = process.pid
        assert pid is not None
        stop(pid)
        with pytest.raises(ProcessDiedError, match="took nothing for 3 s"):
            process.call("size", bytes(1_000_000), timeout=LIMIT)  # more than fits into a pipe
        assert gone(pid)
    finally:
        process.close()


# --- starting and ending --------------------------------------------------------------------------


def test_a_factory_that_raises_gives_its_traceback() -> None:
    def broken() -> object:
        raise LookupError("no such model")

    process = SupervisedProcess(broken, what="the actor")
    with pytest.raises(ActorError, match="raised LookupError: no such model") as caught:
        process.start()
    assert "in broken" in str(caught.value)
    assert not process.alive
    process.close()


def test_a_factory_that_ends_or_delays_its_process_is_an_error() -> None:
    def leave() -> object:
        os._exit(3)

    process = SupervisedProcess(leave, what="the actor")
    with pytest.raises(ActorError, match="did not start: the actor ended with exit code 3"):
        process.start()
    process.close()
    slow = SupervisedProcess(lambda: time.sleep(60), what="the slow actor", start_timeout=0.3)
    with pytest.raises(WaitTimeoutError, match=r"waited 0.3 s for the slow actor to start"):
        slow.start()
    assert not slow.alive
    slow.close()


def test_bad_arguments_are_refused_before_anything_starts() -> None:
    lock = threading.Lock()
    with pytest.raises(InvalidInputError, match="the actor: cannot be sent to another process"):
        RemoteEngine(lambda: lock)  # type: ignore[arg-type, return-value]
    with pytest.raises(InvalidInputError, match="threads: expected at least 1, got 0"):
        RemoteEngine(FakeEngine, threads=0)
    for name in ("start_timeout", "silence_timeout"):
        with pytest.raises(InvalidInputError, match=f"{name}: expected seconds above 0, got -1"):
            RemoteEngine(FakeEngine, **{name: -1.0})


def test_closing_ends_the_child_also_while_another_thread_waits_for_it() -> None:
    process = SupervisedProcess(workbench(), what="the workbench")
    process.start()
    pid = process.pid
    assert pid is not None
    errors: list[BaseException] = []

    def work() -> None:
        try:
            process.call("sleep", LIMIT, timeout=LIMIT)
        except ActorError as error:
            errors.append(error)

    waiting = threading.Thread(target=work)
    waiting.start()
    time.sleep(0.2)
    process.close()
    waiting.join(LIMIT)
    assert not waiting.is_alive()
    assert "the workbench was closed" in str(errors[0])
    assert gone(pid)
    assert process.pid is None
    assert not process.alive
    process.close()
    with pytest.raises(ActorError, match="was closed"):
        process.start()


SCRIPT = """
from asyncrlhf.engines import FakeEngine, RemoteEngine

class Mine(FakeEngine):  # of a script without a guard, which the child must not run
    pass

print("once", flush=True)
engine = RemoteEngine(lambda: Mine(latency=LATENCY), what="mine")
engine.load_weights([], 7)
print(engine.pid, flush=True)
from decapod.lm import Request, SamplingParams
print(len(list(engine.generate([Request((3,), SamplingParams(max_new_tokens=4))]))), flush=True)
"""


def script(tmp_path: Path, latency: str) -> subprocess.Popen[str]:
    path = tmp_path / "script.py"
    path.write_text(f"LATENCY = {latency}{SCRIPT}")
    return subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True)


def test_a_script_without_a_guard_runs_once_and_its_end_leaves_no_child(tmp_path: Path) -> None:
    with script(tmp_path, "0") as parent:
        out, _ = parent.communicate(timeout=LIMIT)
    first, pid, completions = out.split()
    assert (parent.returncode, first, completions) == (0, "once", "1")
    wait_until(lambda: gone(int(pid)), "the child to end")  # the script never called close()


def test_killing_the_parent_ends_a_child_that_is_at_work(tmp_path: Path) -> None:
    with script(tmp_path, "600") as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "once\n"
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        time.sleep(0.2)  # the call is under way
        parent.kill()
        parent.wait(LIMIT)
        wait_until(lambda: gone(pid), "the child to end")


# --- an engine in a process -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


def make_engine(folder: Path, **options: Any) -> RemoteEngine:
    """An engine that looks for files which say what it is to do."""

    def latency(number: int) -> float:
        while (folder / f"hold {os.getpid()}").exists():
            (folder / f"held {os.getpid()}").touch()
            time.sleep(0.02)
        return 0.0

    class Breakable(FakeEngine):
        def load_weights(self, source: Any, version: int) -> None:
            if (folder / f"fail {version}").exists():
                raise WeightUpdateError("this load was to fail")
            super().load_weights(source, version)

    return RemoteEngine(lambda: Breakable(latency), what="the actor", **options)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[RemoteEngine]:
    remote = make_engine(folder)
    yield remote
    remote.close()
    remote.close()


@contextmanager
def in_mid_call(folder: Path, pid: int, action: Callable[[], None]) -> Iterator[None]:
    """Does something while the process generates, which it goes on with only afterwards."""
    hold, held = folder / f"hold {pid}", folder / f"held {pid}"

    def act() -> None:
        wait_until(held.exists, "the call to begin")
        action()
        hold.unlink()

    held.unlink(missing_ok=True)
    hold.touch()
    thread = threading.Thread(target=act)
    thread.start()
    yield
    thread.join()


def pid_of(engine: RemoteEngine) -> int:
    engine.start()
    assert engine.pid is not None
    return engine.pid


def test_a_killed_engine_comes_back_with_its_weights_and_the_same_completions(
    engine: RemoteEngine, folder: Path
) -> None:
    engine.load_weights([], 4)
    pid, restarts, again = pid_of(engine), engine.restarts, engine.regenerated
    with in_mid_call(folder, pid, lambda: os.kill(pid, signal.SIGKILL)):
        completions = list(engine.generate(REQUESTS))
    assert completions == expected(version=4)
    assert (engine.restarts, engine.regenerated) == (restarts + 1, again + 1)
    assert engine.version == 4
    assert gone(pid)
    assert list(engine.generate(REQUESTS)) == completions
    assert (engine.restarts, engine.regenerated) == (restarts + 1, again + 1)


def test_an_engine_that_stops_in_mid_call_is_started_again(folder: Path) -> None:
    engine = make_engine(folder, silence_timeout=3.0)
    try:
        engine.load_weights([], 2)
        pid = pid_of(engine)
        with in_mid_call(folder, pid, lambda: stop(pid)):
            assert list(engine.generate(REQUESTS)) == expected(version=2)
        # A machine with too much to do may keep the next process silent as well.
        assert engine.regenerated >= 1
        assert engine.restarts == engine.regenerated
        assert gone(pid)
    finally:
        engine.close()


def test_a_failed_load_keeps_the_old_version_in_the_next_process_too(
    engine: RemoteEngine, folder: Path
) -> None:
    engine.load_weights([], 5)
    (folder / "fail 6").touch()
    with pytest.raises(WeightUpdateError, match="was to fail"):
        engine.load_weights([], 6)
    assert engine.version == 5
    assert list(engine.generate(REQUESTS)) == expected(version=5)
    pid, restarts = pid_of(engine), engine.restarts
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WeightUpdateError, match="was to fail"):
        engine.load_weights([], 6)
    assert engine.version == 5
    assert list(engine.generate(REQUESTS)) == expected(version=5)
    assert engine.restarts == restarts + 1


def test_a_new_process_needs_no_old_weights_when_new_ones_come(
    engine: RemoteEngine, folder: Path
) -> None:
    engine.load_weights([], 1)
    (folder / "fail 1").touch()  # as a snapshot that was overwritten meanwhile
    os.kill(pid_of(engine), signal.SIGKILL)
    engine.load_weights([], 2)
    assert list(engine.generate(REQUESTS)) == expected(version=2)


def test_pause_holds_back_and_resume_and_health_get_through_while_a_call_waits(
    engine: RemoteEngine,
) -> None:
    assert pid_of(engine)
    assert engine.health() == ""
    found: list[Completion] = []
    engine.pause()
    waiting = threading.Thread(target=lambda: found.extend(engine.generate(REQUESTS)))
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive()
    assert not found
    assert engine.health() == ""
    engine.resume()
    waiting.join(LIMIT)
    assert found == expected(engine.version)


def test_two_threads_take_turns(engine: RemoteEngine, folder: Path) -> None:
    found: list[list[Completion]] = []
    states: list[str] = []

    def work() -> None:
        found.append(list(engine.generate(REQUESTS)))

    other = threading.Thread(target=work)

    def look() -> None:
        other.start()
        states.append(engine.health())

    with in_mid_call(folder, pid_of(engine), look):
        work()
    other.join(LIMIT)
    assert states == [""]
    assert found == [expected(engine.version)] * 2


def test_an_engine_that_dies_whenever_it_is_called_is_given_up() -> None:
    class Fatal(FakeEngine):
        def generate(self, requests: Any) -> Any:  # noqa: ARG002
            os._exit(9)

    engine = RemoteEngine(Fatal, what="the actor", max_restarts=1)
    try:
        with pytest.raises(ActorError, match=r"died 2 times in a row: .* ended with exit code 9"):
            list(engine.generate(REQUESTS))
        assert engine.restarts == 1
    finally:
        engine.close()
    with pytest.raises(ActorError, match="was closed"):
        list(engine.generate(REQUESTS))
    assert engine.health() == "the actor does not run"
