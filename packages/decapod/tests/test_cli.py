from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from decapod.cli import main
from decapod.jobs import Store
from decapod.reproductions import Outcome

SLOW_TOY = """
import time
from pathlib import Path
from toys_module import reproduction
from decapod.jobs import Job

def measure(seed, pause):
    time.sleep(pause)
    return 1.0 + seed

def jobs(profile):
    pauses = [0.0, 0.0, 60.0 if not Path("hurry").exists() else 0.0]
    return [Job(measure, {"seed": s, "pause": p}) for s, p in enumerate(pauses)]

SLOW = reproduction("slow", jobs)
"""


def start(arguments, site: Path, cwd: Path) -> subprocess.Popen[str]:
    paths = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH", ""))))
    return subprocess.Popen(
        [sys.executable, "-m", "decapod", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8", "COLUMNS": "200"},
    )


def decapod(arguments, site: Path, cwd: Path) -> tuple[int, str, str]:
    process = start(arguments, site, cwd)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture
def here(toys, tmp_path, monkeypatch, capsys) -> Callable[[list[str]], tuple[int, str, str]]:
    """The command line in this process, which spares the start of another."""
    monkeypatch.syspath_prepend(toys)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "toys_module", raising=False)

    def run(arguments: list[str]) -> tuple[int, str, str]:
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def toys(install) -> Path:
    install({"crashing": "bad_module:TOY"}, "bad", "raise OSError('no such disk')")
    return install({"toy": "toys_module:TOY", "raising": "toys_module:RAISING"})


def test_list_shows_claims_and_explains_the_broken(toys, tmp_path):
    code, out, err = decapod(["list"], toys, tmp_path)
    assert code == 1
    assert "toy: On toys (Venue 2024)" in out
    assert "gain: Toys gain" in out
    assert "decapod: crashing cannot be loaded: OSError: no such disk" in err
    assert "Traceback" not in err


def test_reproduce_writes_the_report_and_says_the_verdict(toys, tmp_path):
    code, out, err = decapod(["reproduce", "toy", "--jobs", "1"], toys, tmp_path)
    assert code == 0, err
    assert "✓ shown      Toys gain: 1.15 [1.00, 1.30] (n = 4 seeds)" in out
    folder = tmp_path / "decapod-report"
    assert str(folder / "report.html") in out
    for name in ("report.html", "report.md", "report.json", "toy/outcome.json", "toy/claims.json"):
        assert (folder / name).stat().st_size > 0
    assert not list(folder.rglob("*.tmp"))


def test_one_that_fails_and_one_that_is_broken_leave_the_others_running(toys, tmp_path):
    arguments = ["reproduce", "crashing", "raising", "toy", "--jobs", "1", "--out", "out"]
    code, out, err = decapod(arguments, toys, tmp_path)
    assert code == 1
    assert "decapod: crashing cannot be loaded: OSError: no such disk" in err
    assert "decapod: raising failed: RuntimeError: the toy broke" in err
    assert "✓ shown" in out
    assert "the toy broke" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_shards_on_two_machines_merge_into_the_same_verdict(here, tmp_path):
    for i in range(2):
        arguments = ["reproduce", "toy", "--jobs", "1", "--shard", f"{i}/2", "--out", "out"]
        code, out, err = here(arguments)
        assert code == 0, err
        assert f"{2 * i + 2} of 4 jobs are done" in out
        assert "without --shard" in out
        assert not (tmp_path / "out" / "report.html").exists()
    code, out, err = here(["reproduce", "toy", "--jobs", "1", "--out", "out"])
    assert code == 0, err
    assert Outcome.load(tmp_path / "out" / "toy" / "outcome.json").jobs_reused == 4


def test_report_is_made_again_from_outcomes_alone(here, tmp_path):
    here(["reproduce", "toy", "--jobs", "1", "--out", "out"])
    html = (tmp_path / "out" / "report.html").read_bytes()
    (tmp_path / "out" / "report.html").unlink()
    code, _, err = here(["report", "out"])
    assert code == 0, err
    assert (tmp_path / "out" / "report.html").read_bytes() == html


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reproduce", "tou"], "unknown reproduction 'tou'. Did you mean 'toy'? Known: "),
        (["reproduce", "toy", "--out", "a-file/out"], "--out: cannot write to a-file/out"),
        (["reproduce", "toy", "--shard", "2/2"], "--shard: "),
        (["reproduce", "toy", "--shard", "half"], "--shard: expected i/k such as 0/4, got 'half'"),
        (["reproduce", "toy", "--jobs", "0"], "n_jobs"),
        (["report", "nowhere"], "nowhere: expected outcomes"),
        (["reproduce", "toy", "--profile", "big"], "quick"),
        ([], "subcommand"),
    ],
)
def test_a_wrong_request_is_one_clear_message_and_runs_nothing(here, tmp_path, arguments, words):
    (tmp_path / "a-file").write_text("in the way")
    code, out, err = here(arguments)
    assert code == 2
    assert words in err + out
    assert "Traceback" not in err
    assert not (tmp_path / "decapod-report" / "toy").exists()


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C reaches a child differently there")
def test_ctrl_c_keeps_finished_jobs_and_the_same_command_ends_the_work(install, tmp_path):
    install({}, "toys")
    site = install({"slow": "slow_module:SLOW"}, "slow", SLOW_TOY)
    arguments = ["reproduce", "slow", "--jobs", "1", "--out", "out"]
    process = start(arguments, site, tmp_path)
    store = Store(tmp_path / "out" / "slow" / "jobs")
    deadline = time.monotonic() + 60
    while len(store.done()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The same command again runs the rest" in err
    assert "Traceback" not in err
    assert len(store.done()) == 2
    assert not (tmp_path / "out" / "slow" / "outcome.json").exists()


def test_import_of_decapod_brings_in_nothing_heavy():
    code = (
        "import sys, decapod; "
        "heavy = {'torch', 'matplotlib', 'pandas', 'ray', 'scipy', 'jinja2', 'tyro'}; "
        "print(sorted(heavy & set(sys.modules)), decapod.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ")


def test_command_line_starts_without_the_optional_and_the_numeric_heavyweights():
    code = (
        "import sys, decapod.cli; "
        "heavy = {'torch', 'matplotlib', 'pandas', 'ray', 'scipy'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
