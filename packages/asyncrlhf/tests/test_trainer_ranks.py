"""Several learner processes: the weights of one, and errors that reach all of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("decapod.lm")

import torch

SCRIPT = Path(__file__).with_name("ranks_run.py")
RANKS = 2


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def ranks_run(replay: Any) -> ModuleType:
    """The script as a module."""
    import importlib.util

    sys.modules["replay_run"] = replay
    spec = importlib.util.spec_from_file_location("asyncrlhf_ranks_run", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def started(folder: Path) -> tuple[list[int], str]:
    """Exit codes of all ranks, and what they wrote."""
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(RANKS),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [process.returncode for process in processes], "\n".join(told)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks have left what they found."""
    for _ in range(3):
        folder = tmp_path_factory.mktemp("ranks")
        codes, told = started(folder)
        if "EADDRINUSE" not in told:  # somebody else may take the port before we do
            break
    assert codes == [0] * RANKS, told
    return folder


@pytest.fixture(scope="module")
def found(ranks: Path) -> list[dict[str, Any]]:
    return [json.loads((ranks / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", ["online_dpo", "ppo"])
def test_two_ranks_learn_what_one_learns(
    ranks_run: Any, ranks: Path, found: list[dict[str, Any]], tmp_path: Path, name: str
) -> None:
    alone = ranks_run.trainer(tmp_path, 4, **ranks_run.RUNS[name])
    alone.train()
    first, second = (torch.load(ranks / f"{name}-{rank}.pt") for rank in range(RANKS))
    for key, value in alone.model.state_dict().items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], value, atol=1e-6, rtol=0)
    for rank in range(RANKS):
        here = found[rank][name]["history"]
        for row, expected in zip(here, ranks_run.history(alone), strict=True):
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["online_dpo", "ppo"])
def test_rank_0_alone_generates_scores_and_saves(
    ranks: Path, found: list[dict[str, Any]], name: str
) -> None:
    assert [rank[name]["generated"] for rank in found] == [True, False]
    assert found[0]["calls"] > 0
    assert found[1]["calls"] == 0
    assert {folder.name for folder in (ranks / name).iterdir()} == {"checkpoint-4", "checkpoint-6"}


@pytest.mark.parametrize(
    ("name", "error", "message", "steps"),
    [
        ("reward", "RewardError", "the judge is out", 2),
        ("engine", "EngineError", "call 1 of the fake engine", 1),
        ("save", "NotADirectoryError", "Not a directory", 4),
    ],
)
def test_an_error_of_rank_0_ends_all_ranks(
    found: list[dict[str, Any]], name: str, error: str, message: str, steps: int
) -> None:
    (kind, told, at), (other_kind, other_told, other_at) = (rank[name] for rank in found)
    assert (kind, at, other_at) == (error, steps, steps)
    assert message in told
    assert message in other_told
    # What is not ours to rebuild is told by its name.
    assert other_kind == error or (other_kind == "ActorError" and error in other_told)


def test_waiting_for_a_round_is_no_failure_of_the_process_group(
    replay: Any, tmp_path: Path
) -> None:
    args = replay.settings(tmp_path, round_timeout=7000.0)
    assert args.ddp_timeout > 7000
    assert replay.settings(tmp_path, ddp_timeout=9000).ddp_timeout == 9000
