"""Snapshots by broadcast: equal on all ranks, or an error on all ranks, and never a hang."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.transport import TorchDist, checksum
from asyncrlhf.transport.layout import TensorSpec, offsets
from asyncrlhf.transport.torch_dist import _buckets

WORKER = Path(__file__).with_name("torch_dist_worker.py")
CASES = ("versions", "subgroup", "failing", "killed", "source killed", "silent")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or os.name == "nt", reason="forks ranks over gloo"
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case run once."""
    folder = tmp_path_factory.mktemp("ranks")
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform, "")
    subprocess.run(
        [sys.executable, str(WORKER), str(folder), *CASES],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback},
        check=True,
        timeout=110,
    )
    return folder


def results(ran: Path, case: str, rank: int) -> list[str]:
    found: list[str] = json.loads((ran / case.replace(" ", "_") / f"{rank}.json").read_text())
    return found


def codes(ran: Path, case: str) -> list[int]:
    found: list[int] = json.loads((ran / case.replace(" ", "_") / "codes.json").read_text())
    return found


def sent(value: float) -> str:
    """Checksum of what the ranks send, computed here."""
    worker: dict[str, Any] = runpy.run_path(str(WORKER))
    return checksum(worker["assorted"](value))


def test_every_rank_holds_the_learners_bits_and_keeps_them(ran: Path) -> None:
    expected = [f"{version} {sent(value)}" for version, value in enumerate((1.0, 2.0, 3.0))]
    expected.append(f"7 {checksum([('other', torch.ones(2))])}")
    for rank in (0, 1):
        found = results(ran, "versions", rank)
        assert found[:4] == expected
        assert "it was closed" in found[4]


def test_a_group_of_some_ranks_leaves_the_others_alone(ran: Path) -> None:
    assert results(ran, "subgroup", 0) == [
        "InvalidInputError: group: expected a group with rank 0, got [1, 2]"
    ]
    for rank, wrong in ((1, "publish: rank 1 has to call receive"), (2, "receive: rank 2 has to")):
        source, received, role = results(ran, "subgroup", rank)
        assert source == "InvalidInputError: src: expected a group with rank 0, got [1, 2]"
        assert received == f"4 {sent(4.0)}"
        assert wrong in role


def test_a_failure_of_one_rank_is_an_error_on_all_and_the_next_version_counts(ran: Path) -> None:
    small = checksum([("b", torch.ones(3))])
    counted = [f"1 {sent(1.0)}", f"2 {sent(2.0)}", f"3 {small}", f"4 {small}"]
    assert codes(ran, "failing") == [0, 0, 0]
    for rank in (0, 1, 2):
        first, broken, repeated, second, memory, third, corrupted, fourth = results(
            ran, "failing", rank
        )
        assert [first, second, third, fourth] == counted
        if rank == 0:
            assert "OSError: the source broke; nothing was published" in broken
            assert repeated.startswith("InvalidInputError: version: expected more than 1")
        else:
            for error in (broken, repeated):
                assert error.startswith("WeightUpdateError: rank 0 failed to publish")
        for error, guilty, reason in (
            (memory, 1, "MemoryError: no memory on rank 1"),
            (corrupted, 2, f"expected checksum {small}, got"),
        ):
            assert error.startswith("WeightUpdateError: version ")
            assert f"rank {guilty} could not take it" in error
            assert (reason in error) == (rank == guilty)


@pytest.mark.parametrize(("case", "dead"), [("killed", 1), ("source killed", 0)])
def test_a_killed_rank_is_an_error_on_all_others(ran: Path, case: str, dead: int) -> None:
    assert codes(ran, case) == [-9 if rank == dead else 0 for rank in range(3)]
    for rank in {0, 1, 2} - {dead}:
        during, after = results(ran, case, rank)
        assert during.startswith("WeightUpdateError: ")
        assert "did not get through between ranks [0, 1, 2]" in during
        assert "make a new process group" in after


def test_no_wait_is_for_ever_and_an_early_one_can_be_taken_up_again(ran: Path) -> None:
    early, received = results(ran, "silent", 1)
    assert early == "WaitTimeoutError: waited 0.05 s for rank 0 to publish weights"
    assert received == f"1 {sent(1.0)}"
    published, unanswered, later = results(ran, "silent", 0)
    assert published == received
    assert "did not get through between ranks [0, 1]" in unanswered
    assert "make a new process group" in later


@settings(deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=12),
    limit=st.integers(1, 2000),
)
def test_buckets_hold_all_tensors_in_order_within_the_limit(
    sizes: list[list[int]], limit: int
) -> None:
    specs = [TensorSpec(str(i), torch.bfloat16, tuple(size)) for i, size in enumerate(sizes)]
    buckets = _buckets(specs, limit)
    assert [spec for bucket in buckets for spec in bucket] == specs
    for bucket in buckets:
        begins, end = offsets(bucket)
        assert end <= limit or len([spec for spec in bucket if spec.nbytes]) == 1
        assert all(begin % 64 == 0 for begin in begins)
        ends = [begin + spec.nbytes for begin, spec in zip(begins, bucket, strict=True)]
        assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False))
        assert ends[-1] <= end


def test_without_a_process_group_the_remedy_is_named() -> None:
    with pytest.raises(InvalidInputError, match="init_process_group"):
        TorchDist()


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"bucket_bytes": 0}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        TorchDist(**wrong)
