"""Real processes over gloo, held against one process that has the whole sequence."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sbattn.functional import stickbreaking_attention

WORKER = Path(__file__).with_name("context_parallel_worker.py")
SCRIPT = Path(__file__).parents[1] / "experiments" / "context_parallel.py"


def load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sbattn_context_parallel_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load_worker()


def start(script: Path, size: int, *arguments: str) -> list[str]:
    """Run a script once per rank, all at the same time; what each printed."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(n), "WORLD_SIZE": str(size)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(size)
    ]
    try:
        printed = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size
    return printed


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(2, id="two ranks"),
        pytest.param(3, id="three ranks", marks=pytest.mark.slow),
    ],
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank of a group found."""
    folder, size = tmp_path_factory.mktemp("ring"), request.param
    start(WORKER, size, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def single_process(name: str) -> dict[str, Tensor]:
    options = worker.CASES[name]
    whole = worker.make_inputs(1 if options.get("enable_gqa") else 2)
    leaves = [whole[key].requires_grad_() for key in ("q", "k", "v")]
    out, rem = stickbreaking_attention(*leaves, **{**options, "backend": "naive"})
    torch.autograd.backward((out, rem), (whole["d_out"], whole["d_rem"]))
    gradients = {f"d_{key}": whole[key].grad for key in ("q", "k", "v")}
    return {"out": out.detach(), "rem": rem.detach(), **gradients}


@pytest.mark.parametrize("name", list(worker.CASES))
def test_shards_give_what_one_process_gives_forward_and_backward(
    ranks: list[Any], name: str
) -> None:
    for key, expected in single_process(name).items():
        found = torch.cat([rank["cases"][name][key] for rank in ranks], dim=2)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_a_shard_behind_which_nothing_is_left_of_any_stick_is_never_looked_at(
    ranks: list[Any],
) -> None:
    assert ranks[0]["poison"].isnan().all()
    for rank in ranks[1:]:
        torch.testing.assert_close(rank["poison"], torch.ones_like(rank["poison"]))


def test_under_autocast_shards_travel_in_low_precision_and_gradients_come_back_in_full(
    ranks: list[Any],
) -> None:
    whole = worker.make_inputs(2)
    leaves = [whole[key].requires_grad_() for key in ("q", "k", "v")]
    out, _ = stickbreaking_attention(*leaves, backend="naive")
    expected = torch.autograd.grad(out, leaves, whole["d_out"])
    for key, value in zip(("out", "d_q", "d_k", "d_v"), (out, *expected), strict=True):
        found = torch.cat([rank["autocast"][key] for rank in ranks], dim=2)
        assert found.dtype == (torch.bfloat16 if key == "out" else torch.float32)
        error = (found.double() - value).norm() / value.norm()
        assert error < 0.02, key


def test_shards_that_do_not_fit_each_other_are_an_error_on_every_rank(ranks: list[Any]) -> None:
    for rank in ranks:
        assert "expected the same head_dim of keys on every rank" in rank["misfit"]


@pytest.mark.slow
def test_the_experiment_prints_the_difference_to_one_process(tmp_path: Path) -> None:
    meeting = f"file://{tmp_path / 'rendezvous'}"
    printed, _ = start(SCRIPT, 2, "--length", "33", "--init-method", meeting)
    label, _, number = printed.strip().splitlines()[-1].rpartition(" ")
    assert label == "largest difference, forward and gradients:"
    assert float(number) < 1e-10
