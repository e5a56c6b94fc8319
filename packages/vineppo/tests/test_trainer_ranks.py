"""Two processes learn what one does, and the first of them alone writes."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("decapod.lm")
pytest.importorskip("transformers")

SCRIPT = Path(__file__).with_name("ranks_run.py")
METHODS = ("VinePPO", "PPO", "DPOPositive", "RestEM")
RANKS = 2


@pytest.fixture(scope="module")
def script(tiny: Any) -> Any:
    """The script as a module."""
    sys.modules["tiny_runs"] = tiny
    spec = importlib.util.spec_from_file_location("vineppo_ranks_run", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


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
        told = [process.communicate(timeout=280)[0] for process in processes]
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


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_learn_what_one_learns(
    tiny: Any, script: Any, ranks: Path, tmp_path: Path, method: str
) -> None:
    assert tuple(script.RUNS) == METHODS
    alone = script.trainer(method, tmp_path)
    alone.train()
    own = dict(alone.module.named_parameters())
    assert tiny.difference(tiny.parameters(alone), tiny.START) > 1e-3
    for rank in range(RANKS):
        found = torch.load(ranks / f"{method}-{rank}.pt")
        assert found["ranks"] == RANKS
        assert found["parameters"].keys() == own.keys()
        for name, value in found["parameters"].items():
            torch.testing.assert_close(value, own[name].detach(), atol=1e-6, rtol=0, msg=name)
        for row, expected in zip(found["history"], tiny.history(alone), strict=True):
            apart = {"hit_rate"}  # what ranks compute twice
            assert {k: v for k, v in row.items() if k not in apart} == pytest.approx(
                {k: v for k, v in expected.items() if k not in apart}, abs=1e-5
            )


@pytest.mark.parametrize("method", METHODS)
def test_the_runs_have_fewer_units_than_ranks(ranks: Path, method: str) -> None:
    first, second = (torch.load(ranks / f"{method}-{rank}.pt")["sizes"] for rank in range(RANKS))
    assert first == second
    assert 1 == min(first) < RANKS <= max(first)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_rank_alone_writes(ranks: Path, method: str) -> None:
    written = {path.name for path in (ranks / f"{method}-0").iterdir()}
    assert written == {"settings.json", "checkpoint-1", "checkpoint-2"}
    assert not (ranks / f"{method}-1").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_two_ranks_is_one_of_one(
    tiny: Any, script: Any, ranks: Path, tmp_path: Path, method: str
) -> None:
    run = script.trainer(method, tmp_path)
    run.train(resume_from_checkpoint=ranks / f"{method}-0" / "checkpoint-1")
    expected = torch.load(ranks / f"{method}-0.pt")["parameters"]
    for name, value in run.module.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], atol=1e-6, rtol=0, msg=name)


def test_what_fails_on_one_rank_is_said_by_all(ranks: Path) -> None:
    said = [(ranks / f"failing-{rank}.txt").read_text(encoding="utf-8") for rank in range(RANKS)]
    own = said[-1]
    assert own.startswith("reward_funcs: no scores for")
    assert said == [f"rank {RANKS - 1}: {own}", own]
