"""Ranks of the tests of TorchDist: every case in processes of its own, results to files.

Usage: torch_dist_worker.py FOLDER CASE...; imports torch once, then forks.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asyncrlhf.errors import InvalidInputError, WaitTimeoutError, WeightUpdateError
from asyncrlhf.transport import TorchDist, checksum

Weights = list[tuple[str, Tensor]]


def assorted(value: float = 1.0) -> Weights:
    tied = torch.full((4, 3), value)
    return [
        ("float32", torch.arange(15.0).reshape(5, 3) * value),
        ("bfloat16", torch.full((9,), value).bfloat16()),
        ("float16", torch.full((3,), value).half()),
        ("buffer", torch.arange(11)),
        ("flags", torch.tensor([True, False, True])),
        ("step", torch.tensor(17)),
        ("nothing", torch.empty(0, 4)),
        ("transposed", torch.arange(12.0).reshape(3, 4).T * value),
        ("learns", torch.full((4,), value, requires_grad=True)),
        ("embedding", tied),
        ("head", tied),
    ]


def outcome(action: Callable[[], Any]) -> str:
    """Checksum of a snapshot, or the error."""
    try:
        snapshot = action()
        assert snapshot.checksum == checksum(snapshot)
        return f"{snapshot.version} {snapshot.checksum}"
    except (InvalidInputError, WaitTimeoutError, WeightUpdateError) as error:
        return f"{type(error).__name__}: {error}"


def exchange(transport: TorchDist, weights: Any, version: Any) -> str:
    """Publish or receive, whichever is this rank's part."""
    if dist.get_rank() == transport._src:
        return outcome(lambda: transport.publish(weights, version))
    return outcome(lambda: transport.receive(30))


def versions(rank: int) -> list[Any]:
    """Several versions; the learner goes on in place, and the layout changes."""
    results: list[Any] = []
    with TorchDist(bucket_bytes=100 if rank == 0 else 5000) as transport:
        kept = []
        for version, value in enumerate((1.0, 2.0, 3.0)):
            weights = assorted(value)
            if rank == 0:
                kept.append(transport.publish(weights, version))
                with torch.no_grad():
                    weights[0][1].mul_(-1)
            else:
                kept.append(transport.receive(30))
                for _, tensor in kept[-1]:
                    assert tensor.data_ptr() % 64 == 0 or not tensor.numel()
        results += [outcome(lambda s=s: pickle.loads(pickle.dumps(s))) for s in kept]
        results.append(exchange(transport, [("other", torch.ones(2))], 7))
    results.append(exchange(transport, assorted(), 8))
    return results


def subgroup(rank: int) -> list[Any]:
    """Ranks 1 and 2 alone, with rank 2 as the source; roles and members are checked."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return [outcome(lambda: TorchDist(group, src=2))]
    results = [outcome(lambda: TorchDist(group, src=0))]
    transport = TorchDist(group, src=2, checksum=False)
    results.append(exchange(transport, assorted(4.0), 4))
    results.append(
        outcome(lambda: transport.receive() if rank == 2 else transport.publish(assorted(), 5))
    )
    return results


def failing(rank: int) -> list[Any]:
    """Failures of one rank that all hear of, each followed by a version that counts."""

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(2)
        raise OSError("the source broke")

    transport = TorchDist(timeout=30)
    results = [exchange(transport, assorted(1.0), 1)]
    results.append(exchange(transport, broken(), 2))
    results.append(exchange(transport, assorted(), 1))  # no larger version
    results.append(exchange(transport, assorted(2.0), 2))

    allocated, transferred = transport._allocated, transport._transfer

    def no_memory(*arguments: Any) -> Any:
        raise MemoryError("no memory on rank 1")

    def corrupted(snapshot: Any) -> None:
        transferred(snapshot)
        snapshot._blocks[0][0] ^= 1

    if rank == 1:
        transport._allocated = no_memory  # type: ignore[method-assign]
    results.append(exchange(transport, [("b", torch.ones(3))], 3))
    transport._allocated = allocated  # type: ignore[method-assign]
    results.append(exchange(transport, [("b", torch.ones(3))], 3))
    if rank == 2:
        transport._transfer = corrupted  # type: ignore[method-assign]
    results.append(exchange(transport, [("b", torch.ones(3))], 4))
    transport._transfer = transferred  # type: ignore[method-assign]
    results.append(exchange(transport, [("b", torch.ones(3))], 4))
    return results


def killed(rank: int) -> list[Any]:
    """Rank 1 is killed in the middle of a publication."""
    transport = TorchDist(timeout=20)
    if rank == 1:
        transport._transfer = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    results = [exchange(transport, assorted(), 1)]
    results.append(exchange(transport, assorted(), 2))
    return results


def source_killed(rank: int) -> list[Any]:
    """The publishing rank is killed while the others wait."""
    transport = TorchDist(timeout=20)
    if rank == 0:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    return [exchange(transport, assorted(), 1), exchange(transport, assorted(), 2)]


def silent(rank: int, folder: Path) -> list[Any]:
    """A receiver that is early waits again; one that never comes ends the wait of the others."""
    transport = TorchDist(timeout=2)
    results = []
    if rank == 1:
        results.append(outcome(lambda: transport.receive(0.05)))
        (folder / "early").touch()
    else:
        while not (folder / "early").exists():
            time.sleep(0.01)
    results.append(exchange(transport, assorted(), 1))
    if rank == 0:
        results.append(exchange(transport, assorted(), 2))
        results.append(exchange(transport, assorted(), 3))
        (folder / "over").touch()
    else:
        while not (folder / "over").exists():
            time.sleep(0.01)
    return results


CASES: dict[str, tuple[Callable[..., list[Any]], int]] = {
    "versions": (versions, 2),
    "subgroup": (subgroup, 3),
    "failing": (failing, 3),
    "killed": (killed, 3),
    "source killed": (source_killed, 3),
    "silent": (silent, 2),
}


def run(case: str, rank: int, folder: Path) -> None:
    work, size = CASES[case]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=40),
    )
    results = work(rank, folder) if case == "silent" else work(rank)
    (folder / f"{rank}.json").write_text(json.dumps(results))


def main() -> None:
    root, *cases = sys.argv[1:]
    for case in cases:
        folder = Path(root, case.replace(" ", "_"))
        folder.mkdir()
        pids = []
        for rank in range(CASES[case][1]):
            pids.append(os.fork())
            if pids[-1] == 0:
                code = 1
                try:
                    run(case, rank, folder)
                    code = 0
                finally:
                    # At once: a rank that leaves in order would wait for those that are dead.
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
