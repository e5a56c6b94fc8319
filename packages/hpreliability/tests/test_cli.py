from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

from hpreliability.cli import main
from hpreliability.published import load_scores
from hpreliability.scoring import thc
from hpreliability.table import from_frame


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command line in this process, which saves the start of another one."""

    def call(*arguments: object) -> Done:
        status = main([str(argument) for argument in arguments])
        return Done(status, *capsys.readouterr())

    return call


def _run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hpreliability", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"COLUMNS": "200", "PYTHONIOENCODING": "utf-8"},
    )


def _frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        [
            {
                "hp": "lr",
                "v": v,
                "env": env,
                "agent": agent,
                "run": run,
                "return": rng.normal() + v,
            }
            for v in (1, 2, 3)
            for env in ("a", "b")
            for agent in ("x", "y")
            for run in range(3)
        ]
    )


_COLUMNS = ("--hyperparameter", "hp", "--value", "v", "--seed", "run", "--score", "return")


def _authors_pickles(folder: Path, *, altered: bool = False) -> Path:
    """The vendored scores in the layout of the authors' repository."""
    frame = load_scores().frame
    final = folder / "100k_experiments" / "final_perf"
    final.mkdir(parents=True)
    for name, of_name in frame.groupby("hyperparameter"):
        content: dict[str, dict[str, np.ndarray]] = {}
        for (agent, value), runs in of_name.groupby(["agent", "value"]):
            array = runs.pivot(index="seed", columns="env", values="score").to_numpy(np.float32)
            content.setdefault(f"{agent}_{name}", {})[f"{agent}_{name}_{value}"] = array
        if altered and name == "gammas":
            array = content["DER_gammas"]["DER_gammas_0.9"]
            content["DER_gammas"]["DER_gammas_0.9"] = array + 10
        (final / f"{name}.pickle").write_bytes(pickle.dumps(content))
    return folder


def test_score_prints_and_writes_what_the_library_computes(
    tmp_path: Path, call: Callable[..., Done]
) -> None:
    _frame().to_csv(tmp_path / "runs.csv", index=False)
    options = ("--by", "agent", "--permutations", 50, "--replicates", 50)
    for name in ("out.csv", "out.json"):
        done = call("score", tmp_path / "runs.csv", *_COLUMNS, *options, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    table = from_frame(
        _frame(),
        hyperparameter="hp",
        value="v",
        seed="run",
        score="return",
        context=["env", "agent"],
    )
    expected = thc(table, uncertainty="bootstrap", replicates=50, permutations=50).frame
    expected = expected.sort_values("calibrated", ascending=False, ignore_index=True)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out.csv"), expected, check_dtype=False)
    assert json.loads((tmp_path / "out.json").read_text("utf-8")) == expected.to_dict("records")
    assert f"{expected['calibrated'][0]:.3f}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.csv"], "no such file: absent.csv"),
        (["empty.csv"], "is empty"),
        ([], "expected at least one file"),
        (["runs.csv"], "no column 'hyperparameter'"),
        (["runs.csv", *_COLUMNS], "share their key"),
        (["runs.csv", *_COLUMNS, "--over", "env", "agent", "--out", "x.txt"], "ends in .csv"),
        (["nan.csv", *_COLUMNS, "--by", "agent"], "nonfinite="),
        (["runs.csv", *_COLUMNS, "--by", "agent", "--permutations", "-3"], "permutations"),
    ],
)
def test_bad_input_gives_one_line_and_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., Done],
    arguments: list[str],
    message: str,
) -> None:
    frame = _frame()
    frame.to_csv(tmp_path / "runs.csv", index=False)
    frame.assign(**{"return": [float("nan"), *frame["return"][1:]]}).to_csv(
        tmp_path / "nan.csv", index=False
    )
    (tmp_path / "empty.csv").touch()
    monkeypatch.chdir(tmp_path)
    done = call("score", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_dropped_runs_are_told_on_standard_error(tmp_path: Path, call: Callable[..., Done]) -> None:
    frame = _frame()
    frame.loc[0, "return"] = float("inf")
    frame.to_csv(tmp_path / "runs.csv", index=False)
    options = ("--by", "agent", "--permutations", 20, "--uncertainty", "none")
    done = call("score", tmp_path / "runs.csv", *_COLUMNS, *options, "--nonfinite", "drop")
    assert done.returncode == 0
    assert "note: 1 of 36 scores were not finite and their runs were dropped" in done.stderr


def test_reproduce_succeeds_and_writes_all_cells(tmp_path: Path, call: Callable[..., Done]) -> None:
    done = call("reproduce", "--permutations", 20, "--out", tmp_path / "cells.json")
    assert done.returncode == 0, done.stderr
    assert "41 of 41 cells match" in done.stdout
    cells = json.loads((tmp_path / "cells.json").read_text("utf-8"))
    assert len(cells) == 41
    assert all(cell["match"] and 0 < cell["p_value"] <= 1 for cell in cells)


def test_reproduce_reads_the_authors_pickles(tmp_path: Path, call: Callable[..., Done]) -> None:
    folder = _authors_pickles(tmp_path / "data")
    done = call("reproduce", "--data", folder, "--permutations", 1)
    assert done.returncode == 0, done.stderr
    assert "41 of 41 cells match" in done.stdout


def test_reproduce_fails_with_status_1_when_a_cell_differs(
    tmp_path: Path, call: Callable[..., Done]
) -> None:
    folder = _authors_pickles(tmp_path / "data", altered=True)
    done = call("reproduce", "--data", folder, "--permutations", 1)
    assert done.returncode == 1
    assert "40 of 41 cells match" in done.stdout


def test_report_writes_a_page(tmp_path: Path, call: Callable[..., Done]) -> None:
    pytest.importorskip("decapod.report")
    pytest.importorskip("matplotlib")
    _frame().to_csv(tmp_path / "runs.csv", index=False)
    options = ("--by", "agent", "--permutations", 20, "--replicates", 20)
    page = tmp_path / "page.html"
    done = call("report", tmp_path / "runs.csv", *_COLUMNS, *options, "-o", page)
    assert done.returncode == 0, done.stderr
    assert page.read_text("utf-8").lstrip().lower().startswith("<!doctype html>")


def test_the_module_can_be_run_and_knows_its_commands() -> None:
    done = _run("--help")
    assert done.returncode == 0
    for command in ("score", "report", "sweep", "reproduce"):
        assert command in done.stdout
    assert _run("scor").returncode == 2


_SWEEP = """
name: toy
base: {lr: 1.0}
hyperparameters: {lr: [0.5, 1.0, 2.0]}
contexts: {env: [a, b]}
budgets: 1
seeds: 2
"""
_TRAIN = """
def train(config, env, seed, budget):
    return config["lr"] * (1 if env == "a" else -1) + seed * 1e-12
def fails(config, env, seed, budget):
    raise RuntimeError("no luck")
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    pytest.importorskip("decapod.jobs")
    pytest.importorskip("yaml")
    (tmp_path / "sweep.yaml").write_text(_SWEEP, encoding="utf-8")
    (tmp_path / "mytrain.py").write_text(_TRAIN, encoding="utf-8")
    return tmp_path


def test_sweep_runs_shards_that_together_make_a_table_to_score(sweep: Path) -> None:
    command = ("sweep", "run", "sweep.yaml", "--train", "mytrain:train", "--directory", "out")
    first = _run(*command, "--shard", "0/2", cwd=sweep)
    assert first.returncode == 0, first.stderr
    assert "6 runs done (0 before), 0 failed, 6 left to other shards" in first.stdout
    second = _run(*command, "--shard", "1/2", cwd=sweep)
    assert "12 runs done (6 before), 0 failed, 0 left" in second.stdout
    scored = _run("score", "out/results.csv", "--uncertainty", "none", "--out", "s.csv", cwd=sweep)
    assert scored.returncode == 0, scored.stderr
    # The order of the three values is reversed in the other environment.
    assert pd.read_csv(sweep / "s.csv")["score"].tolist() == [pytest.approx(2 / 3)]


def test_a_sweep_whose_runs_fail_has_status_1_and_shows_why(sweep: Path) -> None:
    done = _run("sweep", "run", "sweep.yaml", "--train", "mytrain:fails", cwd=sweep)
    assert done.returncode == 1
    assert "12 failed" in done.stdout
    assert "RuntimeError: no luck" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "nothing:here"], "cannot load 'nothing:here'"),
        (["--train", "mytrain:absent"], "absent"),
        (["--train", "mytrain"], "module:function"),
        (["--train", "mytrain:train", "--shard", "2/2"], "shard"),
        (["--train", "mytrain:train", "--shard", "half"], "expected i/k"),
    ],
)
def test_a_sweep_that_cannot_be_run_gives_one_line_and_status_2(
    sweep: Path, options: list[str], message: str
) -> None:
    done = _run("sweep", "run", "sweep.yaml", *options, cwd=sweep)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
