"""The benchmark's problems, arms and records, and its command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sbattn.bench import main
from sbattn.benchmarking.arms import all_arms
from sbattn.benchmarking.comparison import Options, Row, measure
from sbattn.benchmarking.inputs import Problem, make_inputs
from sbattn.benchmarking.timing import ratio_interval, time_in_turns
from sbattn.errors import InvalidInputError
from sbattn.live import live_keys

CPU = torch.device("cpu")
PACKAGE = Path(__file__).parents[1]


def test_logits_have_the_mean_of_their_head() -> None:
    problem = Problem(heads=4, kv_heads=2, length=256, head_dim=64, logits="mixed")
    q, k, _, _ = make_inputs(problem, CPU)
    z = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) / 8
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.linspace(-1, -5, 4), atol=0.05, rtol=0)
    assert float(z.std((0, 2, 3)).max()) == pytest.approx(1, abs=0.1)


def test_kinds_of_logits_differ_in_how_far_rows_reach() -> None:
    reach = {}
    for logits in ("random", "mixed", "far"):
        problem = Problem(heads=2, kv_heads=2, length=1024, head_dim=32, logits=logits)
        q, k, _, _ = make_inputs(problem, CPU)
        reach[logits] = live_keys(q, k)[:, :, -1].float().mean(0)
    assert float(reach["random"].max()) < 100
    assert float(reach["mixed"][0]) < float(reach["mixed"][1])
    assert reach["far"].tolist() == [1023.0, 1023.0]


def test_arms_take_turns_and_all_are_timed() -> None:
    calls: list[str] = []
    work = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    times = time_in_turns(work, rounds=3, device=CPU)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert {name: len(timing.milliseconds) for name, timing in times.items()} == {"a": 3, "b": 3}


def test_a_ratio_of_equal_arms_is_one_with_an_interval_around_it() -> None:
    ratio, low, high = ratio_interval([1.0, 2.0, 3.0, 4.1], [1.0, 2.0, 3.1, 4.0])
    assert low <= ratio <= high
    assert ratio == pytest.approx(1, abs=0.05)


def test_arms_of_stick_breaking_agree_where_they_can_run() -> None:
    inputs = make_inputs(Problem(heads=2, kv_heads=1, length=96, head_dim=16), CPU)
    outs = {
        name: arm.run(*inputs[:3])
        for name, arm in all_arms(CPU).items()
        if arm.stick_breaking and not arm.missing and arm.layout == "heads first"
    }
    assert {"skip", "full", "naive"} <= outs.keys()
    for out in outs.values():
        torch.testing.assert_close(out, outs["naive"], atol=1e-5, rtol=1e-5)


def test_every_problem_pass_and_arm_has_a_row() -> None:
    options = Options(lengths=(32, 64), heads=2, head_dim=8, rounds=1, arms=("skip", "sdpa"))
    told: list[str] = []
    rows: list[Row] = [row for _, _, found in measure(options, told.append) for row in found]
    assert len(rows) == 2 * 2 * 2
    assert told == []
    assert all(row.milliseconds > 0 for row in rows)
    assert {row.live is None for row in rows if "SDPA" in row.arm} == {True}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"arms": ("skip", "flash")}, "arms"),
        ({"arms": ()}, "arms: expected at least one"),
        ({"rounds": 0}, "rounds"),
        ({"lengths": (0,)}, "length"),
        ({"heads": 8, "kv_heads": 3}, "kv_heads"),
        ({"out": Path("/nowhere/at/all.json")}, "out"),
    ],
)
def test_bad_options_are_refused_before_anything_is_timed(
    settings: dict[str, object], words: str
) -> None:
    with pytest.raises(InvalidInputError, match=words):
        Options(**settings)  # type: ignore[arg-type]  # the point is that they are bad


def test_the_command_writes_what_it_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tyro")
    pytest.importorskip("rich")
    threads = torch.get_num_threads()
    out = tmp_path / "result.json"
    settings = "--lengths 64 --heads 2 --head-dim 8 --rounds 2 --arms skip naive fla --out"
    try:
        main([*settings.split(), str(out)])
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert "64 tokens, mixed logits" in shown
    assert "flash-linear-attention: left out" in shown
    written = json.loads(out.read_text(encoding="utf-8"))
    assert {row["arm"] for row in written["rows"]} == {"chunked, skipping", "naive"}
    assert written["versions"]["torch"] == torch.__version__
    assert written["machine"]["threads"] == 1


@pytest.mark.slow
def test_the_gpu_command_runs_dry_where_there_is_no_gpu() -> None:
    pytest.importorskip("decapod_kernels")
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, PACKAGE / "bench" / "gpu.py", "--dry-run"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("dry run passed\n")
