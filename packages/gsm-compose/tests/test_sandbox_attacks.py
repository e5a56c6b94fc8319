"""Attacks on the machine around a program, really carried out.

Every attack is a program that would return `PRIZE`, or leave a trace, if it got through. Each is
first run in a plain interpreter, where it must succeed: otherwise its failure in the sandbox would
show nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gsm_compose.sandbox import Layer, Limits, Sandbox, works
from gsm_compose.sandbox.running import _why_not

PRIZE = 424242
TIGHT = Limits(wall_seconds=1.5, cpu_seconds=1, memory_bytes=256 * 2**20, output_bytes=100_000)
CONFINED: tuple[Layer, ...] = ("namespaces", "seccomp", "restricted")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the attacks use Linux's /proc")


@pytest.fixture(scope="module", params=CONFINED)
def box(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    layer: Layer = request.param
    if not works(layer):
        pytest.skip(f"this machine has no {layer}: {_why_not(layer)}")
    with Sandbox(layer) as sandbox:
        yield sandbox


def unconfined(source: str) -> str:
    """What the attack returns in a plain interpreter."""
    call = "\nprint(solution())\n"
    done = subprocess.run(
        [sys.executable, "-c", source + call], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def expect_no_prize(box: Sandbox, source: str) -> None:
    result = box.run(source, limits=TIGHT)
    assert result.values == {"solution": None}
    restricted = result.isolation == "restricted"
    assert result.error == ("refused" if restricted else "exception"), result
    assert "not allowed" in result.detail or "not permitted" in result.detail
    # The next program is not disturbed.
    assert box.run("def solution():\n    return 7\n").values == {"solution": 7}


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.touch(mode=0o600)
    path.write_text(str(PRIZE))
    return path


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """Another process of the same user, with a secret in its environment."""
    sleeper = "import sys, time; print('up', flush=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", sleeper],
        env={**os.environ, "PRIZE": str(PRIZE)},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_a_private_file_cannot_be_read(box: Sandbox, secret: Path) -> None:
    attack = f"def solution():\n    return int(open({str(secret)!r}).read())\n"
    assert unconfined(attack) == str(PRIZE)
    expect_no_prize(box, attack)


def test_a_private_file_cannot_be_read_through_the_process_folder(
    box: Sandbox, secret: Path
) -> None:
    attack = (
        "import os\ndef solution():\n"
        f"    handle = os.open('/proc/self/root' + {str(secret)!r}, os.O_RDONLY)\n"
        "    return int(os.read(handle, 100))\n"
    )
    assert unconfined(attack) == str(PRIZE)
    expect_no_prize(box, attack)


def test_the_environment_of_another_process_cannot_be_read(
    box: Sandbox, victim: subprocess.Popen[bytes]
) -> None:
    attack = (
        "def solution():\n"
        f"    text = open('/proc/{victim.pid}/environ').read()\n"
        "    return int(text.split('PRIZE=')[1].split(chr(0))[0])\n"
    )
    assert unconfined(attack) == str(PRIZE)
    expect_no_prize(box, attack)


def test_the_environment_and_arguments_hold_nothing_of_the_parent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = next((name for name in ("namespaces", "seccomp") if works(name)), None)
    if layer is None:
        pytest.skip("needs a program that may import os and is confined")
    monkeypatch.setenv("PRIZE", str(PRIZE))
    with Sandbox(layer) as box:
        names = box.run("import os\ndef solution():\n    return ' '.join(os.environ)\n")
        assert names.detail == "solution: the text 'PYTHONHASHSEED LC_ALL' is not a number"
        # Nor is the last program's text in the memory of the next one.
        secret = "marker = ['prizeofthefirst']\n"
        look = (
            "import gc\nneedle = ''.join(reversed('tsrifehtfoezirp'))\ndef solution():\n"
            "    return sum(1 for o in gc.get_objects() if isinstance(o, (list, tuple))"
            " for t in o if isinstance(t, str) and needle in t and t is not needle)\n"
        )
        assert box.run(secret + look).values != {"solution": 0}
        assert box.run(look).values == {"solution": 0}


@pytest.mark.parametrize("how", ["write", "append", "link", "folder", "remove", "chmod"])
def test_nothing_can_be_changed_in_the_file_system(box: Sandbox, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "open to all"
    folder.mkdir()
    folder.chmod(0o777)
    tmp_path.chmod(0o755)
    target = folder / "target"
    act = {
        "write": f"open({str(target)!r}, 'w').write('x')",
        "append": f"os.open({str(target)!r}, os.O_CREAT | os.O_APPEND | os.O_WRONLY)",
        "link": f"os.symlink('/etc/passwd', {str(target)!r})",
        "folder": f"os.mkdir({str(target)!r})",
        "remove": f"os.remove({str(target)!r})",
        "chmod": f"os.chmod({str(target)!r}, 0o777)",
    }[how]
    attack = f"import os\ndef solution():\n    {act}\n    return {PRIZE}\n"

    def state() -> list[tuple[str, int]]:
        return [(path.name, path.lstat().st_mode) for path in folder.iterdir()]

    def prepare() -> list[tuple[str, int]]:
        if how in ("remove", "chmod"):
            target.touch(mode=0o600)
        return state()

    before = prepare()
    assert unconfined(attack) == str(PRIZE)
    assert state() != before
    for path in folder.iterdir():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    before = prepare()
    expect_no_prize(box, attack)
    assert state() == before


def test_a_server_on_this_machine_cannot_be_reached(box: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        attack = (
            "import socket\ndef solution():\n"
            f"    socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)\n"
            f"    return {PRIZE}\n"
        )
        assert unconfined(attack) == str(PRIZE)
        server.accept()[0].close()
        # The module is not among those that a program may load, so its C part is tried as well.
        raw = attack.replace("import socket", "import _socket, posix").replace(
            "socket.create_connection((", "_socket.socket(2, 1).connect(("
        )
        for text in (attack, raw.replace(", 2)", ")")):
            result = box.run(text, limits=TIGHT)
            assert result.values == {"solution": None}
            assert result.error in ("exception", "refused")
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_network_calls_themselves_are_refused() -> None:
    """By number, past every module: what machine code could do."""
    layer = next((name for name in ("namespaces", "seccomp") if works(name)), None)
    machine = os.uname().machine
    if layer is None or machine not in ("x86_64", "aarch64"):
        pytest.skip("needs a system-call filter")
    # socket, connect, ptrace, openat, execve, kill, clone3, process_vm_readv, io_uring_setup, bpf
    numbers = {
        "x86_64": (41, 42, 101, 257, 59, 62, 435, 310, 425, 321),
        "aarch64": (198, 203, 117, 56, 221, 129, 435, 270, 425, 280),
    }[machine]
    source = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\ndef solution():\n"
        f"    return sum(libc.syscall(n, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1"
        f" for n in {numbers})\n"
    )
    with Sandbox(layer) as box:
        assert box.run(source).values == {"solution": len(numbers)}


def test_no_other_process_can_be_signalled(box: Sandbox, victim: subprocess.Popen[bytes]) -> None:
    attack = f"import os\ndef solution():\n    os.kill({victim.pid}, 9)\n    return {PRIZE}\n"
    expect_no_prize(box, attack)
    for target in ("os.getppid()", "-1", "0", "1"):
        expect_no_prize(box, attack.replace(str(victim.pid), target))
    assert victim.poll() is None
    assert unconfined(attack) == str(PRIZE)
    assert victim.wait() == -signal.SIGKILL


@pytest.mark.parametrize("call", ["os.fork()", "os.forkpty()", "os.execv('/bin/sh', ['sh'])"])
def test_no_process_can_be_started(box: Sandbox, call: str) -> None:
    expect_no_prize(box, f"import os\ndef solution():\n    {call}\n    return {PRIZE}\n")


def test_a_fork_bomb_is_no_bomb(box: Sandbox) -> None:
    expect_no_prize(box, "import os\ndef solution():\n    while True:\n        os.fork()\n")


def test_a_patient_fork_bomb_is_ended_by_the_clock(box: Sandbox) -> None:
    attack = (
        "import os\ndef solution():\n    while True:\n        try:\n            os.fork()\n"
        "        except OSError:\n            pass\n"
    )
    assert box.run(attack, limits=TIGHT).error in ("timeout", "refused")


def test_no_daemon_outlives_its_program(box: Sandbox, tmp_path: Path) -> None:
    folder = tmp_path / "open to all"
    folder.mkdir()
    folder.chmod(0o777)
    tmp_path.chmod(0o755)

    def attack(beat: Path) -> str:
        return (
            "import os, time\ndef solution():\n"
            "    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
            "            for handle in range(3):\n                os.close(handle)\n"
            "            time.sleep(0.3)\n"
            f"            open({str(beat)!r}, 'w').write('alive')\n"
            "        os._exit(0)\n"
            f"    return {PRIZE}\n"
        )

    outlived = folder / "outlived"
    assert unconfined(attack(outlived)) == str(PRIZE)
    assert _within(20.0, outlived.exists)
    expect_no_prize(box, attack(folder / "confined"))
    time.sleep(1.0)
    assert list(folder.iterdir()) == [outlived]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os\nos._exit(0)\n", "killed"),
        ("import os\nos._exit(86)\n", "memory"),  # it says of itself that it had no memory
        ("import os\nos.abort()\n", "killed"),
        ("import ctypes\nctypes.string_at(0)\n", "killed"),
        ("import sys\nsys.exit(0)\n", "exception"),
        ("raise SystemExit\n", "exception"),
        ("raise KeyboardInterrupt\n", "exception"),
        ("class E(Exception):\n    def __str__(self): raise E\nraise E\n", "exception"),
        ("import time\ntime.sleep(600)\n", "timeout"),
        (
            "while True:\n    try:\n        while True: pass\n    except BaseException: pass\n",
            "timeout",
        ),
        ("import os\nos.closerange(0, 9)\nwhile True: pass\n", "timeout"),
        ("import os\nos.closerange(0, 9)\nimport time\ntime.sleep(600)\n", "timeout"),
        ("import os\nwhile True:\n    os.write(2, b'x' * 10 ** 6)\n", "output"),
        ("import os\nwhile True:\n    os.write(3, b'x' * 10 ** 6)\n", "output"),
        (
            "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()\n",
            {"timeout", "memory", "killed"},
        ),
        (
            "x = []\nwhile True:\n    try:\n        x.append(bytearray(10 ** 6))\n"
            "    except MemoryError:\n        pass\n",
            "timeout",
        ),
        (
            "import signal\nfor s in (24, 15, 2): signal.signal(s, signal.SIG_IGN)\n"
            "while True: pass\n",
            {"exception", "timeout"},
        ),
        (
            "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))\n"
            "while True: pass\n",
            "exception",
        ),
    ],
)
def test_a_program_that_ends_or_floods_or_hangs_on_purpose_is_reported(
    box: Sandbox, source: str, expected: str | set[str]
) -> None:
    result = box.run(source + "def solution():\n    return 1\n", limits=TIGHT)
    possible = expected if isinstance(expected, set) else {expected}
    if result.isolation == "restricted":
        possible = {"refused"}
    assert result.values == {"solution": None}
    assert result.error in possible, result
    assert box.run("def solution():\n    return 7\n").values == {"solution": 7}


def test_tracing_and_patching_the_interpreter_change_nothing_but_ones_own_answer() -> None:
    layer = next((name for name in ("namespaces", "seccomp") if works(name)), None)
    if layer is None:
        pytest.skip("needs a program that may import sys and is confined")
    with Sandbox(layer) as box:
        assert box.run(
            "import sys\ndef look(*a):\n    return look\nsys.settrace(look)\n"
            "def solution():\n    return 3\n"
        ).values == {"solution": 3}
        box.run(
            "import sys, builtins, os\nbuiltins.callable = lambda f: False\n"
            "for name, module in list(sys.modules.items()):\n"
            "    if name.startswith('gsm_compose'):\n        module.__dict__.clear()\n"
            "os.write = None\n"
        )
        assert box.run("def solution():\n    return 4\n").values == {"solution": 4}


@pytest.mark.parametrize("layer", ["namespaces", "seccomp", "restricted"])
def test_nothing_is_left_when_the_parent_is_killed_in_the_middle(layer: Layer) -> None:
    if not works(layer):
        pytest.skip(f"this machine has no {layer}: {_why_not(layer)}")
    code = (
        "from gsm_compose.sandbox import Limits, run_code\n"
        "print('up', flush=True)\n"
        "run_code('while True: pass', limits=Limits(wall_seconds=600, cpu_seconds=600),"
        f" isolation={layer!r})\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        # The interpreter, the first process of its namespace if there is one, and the program.
        count = 3 if layer == "namespaces" else 2
        assert _within(20.0, lambda: len(_descendants(parent.pid)) >= count)
        family = _descendants(parent.pid)
        parent.kill()
        parent.wait()
    assert _within(20.0, lambda: not any(map(_is_alive, family)))


@pytest.mark.parametrize("layer", ["namespaces", "seccomp", "restricted"])
def test_nothing_is_left_after_use(
    layer: Layer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not works(layer):
        pytest.skip(f"this machine has no {layer}: {_why_not(layer)}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    others = _descendants(os.getpid())
    with Sandbox(layer) as box:
        box.run("def solution():\n    return 1\n")
        spinning = threading.Thread(
            target=box.run,
            args=("while True: pass\n",),
            kwargs={"limits": Limits(wall_seconds=1.0)},
        )
        spinning.start()
        family = set()
        while spinning.is_alive():
            family |= _descendants(os.getpid()) - others
        spinning.join()
    assert len(family) >= 2  # the interpreter and the program, at least
    assert _within(20.0, lambda: not any(map(_is_alive, family)))
    assert not list(tmp_path.iterdir())


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held


def _parents() -> dict[int, int]:
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    found[int(folder.name)] = int(parent)
    return found


def _is_alive(pid: int) -> bool:
    return pid in _parents()


def _descendants(pid: int) -> set[int]:
    parents = _parents()
    family = {pid}
    for _ in range(5):
        family |= {child for child, parent in parents.items() if parent in family}
    return family - {pid}
