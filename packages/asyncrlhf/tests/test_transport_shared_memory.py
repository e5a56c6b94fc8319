"""Snapshots in shared memory: what they hold, who sees them when, and what is left behind."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asyncrlhf import transport as transport_package
from asyncrlhf.errors import InvalidInputError, WeightUpdateError
from asyncrlhf.transport import SharedMemory, checksum

WORKER = Path(__file__).with_name("shared_memory_worker.py")
SHM = Path("/dev/shm")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="lists /dev/shm")
Weights = list[tuple[str, Tensor]]


def tiny(value: float = 0.0) -> Weights:
    return [("a", torch.full((3, 5), float(value))), ("b", torch.full((7,), float(value)))]


def assorted() -> Weights:
    draw = torch.Generator().manual_seed(3)
    tied = torch.randn(4, 3, generator=draw)
    return [
        ("float32", torch.randn(5, 3, generator=draw)),
        ("float16", torch.randn(7, generator=draw).half()),
        ("bfloat16", torch.randn(9, generator=draw).bfloat16()),
        ("float64", torch.randn(2, 1, 3, generator=draw).double()),
        ("buffer", torch.arange(11)),
        ("flags", torch.tensor([True, False, True])),
        ("step", torch.tensor(17)),
        ("scale", torch.tensor(-0.0)),
        ("nothing", torch.empty(0, 4)),
        ("transposed", torch.randn(3, 6, generator=draw).T),
        ("part", torch.randn(10, 10, generator=draw)[2:5, 3:9]),
        ("nan", torch.tensor([float("nan"), float("inf"), 1e-42])),
        ("learns", torch.randn(4, generator=draw, requires_grad=True)),
        ("embedding", tied),
        ("head", tied),
    ]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def archived(weights: Any) -> Weights:
    return [(name, tensor.detach().clone()) for name, tensor in weights]


class Interrupts(Tensor):
    """Raises when its values are asked for, after the tensors before it were copied."""

    error: BaseException

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.detach:
            raise args[0].error
        return super().__torch_function__(func, types, args, kwargs or {})


def interrupting(shape: tuple[int, ...], error: BaseException) -> Tensor:
    tensor = torch.zeros(shape).as_subclass(Interrupts)
    tensor.error = error
    return tensor


# --- other processes ------------------------------------------------------------------------------


class Processes:
    """Processes made by the worker script, none of them a child of multiprocessing."""

    def __init__(self) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def order(self, *words: Any) -> int:
        assert self.popen.stdin
        assert self.popen.stdout
        self.popen.stdin.write(json.dumps(words) + "\n")
        self.popen.stdin.flush()
        answer: int = json.loads(self.popen.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    made = Processes()
    yield made
    assert made.popen.stdin
    made.popen.stdin.close()
    assert made.popen.wait(30) == 0
    assert made.popen.stdout
    made.popen.stdout.close()


@pytest.fixture
def plain_reader(processes: Processes, tmp_path: Path) -> Iterator[tuple[Connection, int, Path]]:
    errors = tmp_path / "reader.txt"
    with Listener(str(tmp_path / "socket"), authkey=b"tests") as listener:
        pid = processes.order("connect", listener.address, str(errors))
        with listener.accept() as connection:
            yield connection, pid, errors


@pytest.fixture(scope="module")
def spawned_reader() -> Iterator[Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # Children import their target by name, which a test file does not have.
    process = context.Process(
        target=runpy.run_path, args=(str(WORKER), {"connection": theirs}, "spawned")
    )
    process.start()
    theirs.close()
    yield ours
    ours.send(("end",))
    process.join(30)
    assert process.exitcode == 0


@pytest.fixture
def readers(
    spawned_reader: Any, plain_reader: tuple[Connection, int, Path]
) -> dict[str, Connection]:
    return {"spawned": spawned_reader, "plain": plain_reader[0]}


def ask(reader: Connection, *words: Any) -> Any:
    reader.send(words)
    assert reader.poll(60)
    return reader.recv()


def soon(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_the_names_of_the_package_are_loaded_when_first_used() -> None:
    code = """
import sys
import asyncrlhf.transport
assert not {"torch", "safetensors", "multiprocessing.shared_memory"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    for name in transport_package.__all__:
        assert getattr(transport_package, name).__name__ == name
    with pytest.raises(AttributeError, match="Nothing"):
        _ = transport_package.Nothing


# --- what a snapshot holds ------------------------------------------------------------------------


def test_every_dtype_shape_and_tie_survives_bit_by_bit() -> None:
    with SharedMemory() as transport:
        given_weights = assorted()
        snapshot = transport.publish(given_weights, 4)
        for _ in range(2):  # it can be read several times
            found = list(snapshot)
            assert [name for name, _ in found] == [name for name, _ in given_weights]
            for (name, there), (_, ours) in zip(found, given_weights, strict=True):
                assert (there.dtype, there.shape) == (ours.dtype, ours.shape), name
                assert there.is_contiguous(), name
                assert not there.requires_grad, name
                assert bits(there) == bits(ours), name
        assert snapshot.version == 4
        assert snapshot.checksum == checksum(given_weights) == checksum(snapshot)


def test_a_learner_that_goes_on_in_place_never_changes_a_snapshot() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    archive: dict[int, Weights] = {}
    with SharedMemory(slots=3) as transport:
        for version in range(6):
            snapshot = transport.publish(model.named_parameters(), version)
            archive[version] = archived(model.named_parameters())
            optimizer.zero_grad()
            model(torch.ones(3, 5)).square().sum().backward()
            optimizer.step()
            with torch.no_grad():
                next(model.parameters()).mul_(1.5)
            for old in transport.versions:
                kept = transport.snapshot(old)
                assert checksum(kept) == kept.checksum == checksum(archive[old])
            assert snapshot.checksum != checksum(model.named_parameters())


def test_without_checksums_one_is_computed_when_asked_for() -> None:
    with SharedMemory(checksum=False) as transport:
        first = transport.publish(tiny(1), 1)
        assert first.checksum == checksum(tiny(1))
        transport.publish(tiny(2), 2)
        transport.publish(tiny(3), 3)
        with pytest.raises(WeightUpdateError, match="version 1 were overwritten by version 3"):
            _ = first.checksum


@on_linux
def test_snapshots_are_aligned_views_of_one_mapping() -> None:
    with SharedMemory() as transport:
        snapshot = transport.publish(assorted(), 0)
        again = pickle.loads(pickle.dumps(snapshot))
        assert len(pickle.dumps(snapshot)) < 300
        maps = Path("/proc/self/maps").read_text().splitlines()
        (mapped,) = (line for line in maps if line.endswith(snapshot.name))
        begin, end = (int(side, 16) for side in mapped.split()[0].split("-"))
        for (name, ours), (_, other) in zip(snapshot, again, strict=True):
            if not ours.numel():
                continue
            assert begin <= ours.data_ptr() < end, name
            assert ours.data_ptr() + ours.nbytes <= end, name
            assert ours.data_ptr() % 64 == 0, name
            assert ours.data_ptr() == other.data_ptr(), name


def test_a_model_on_views_computes_the_bits_of_a_model_on_copies() -> None:
    pytest.importorskip("transformers")
    from decapod.lm import build_model

    copies = build_model(37, hidden_size=24, layers=2, heads=3, intermediate=52, init_std=0.2)
    views = build_model(37, hidden_size=24, layers=2, heads=3, intermediate=52, seed=1)
    ids = torch.arange(3 * 11).reshape(3, 11) % 37
    with SharedMemory() as transport, torch.no_grad():
        snapshot = transport.publish(copies.named_parameters(), 0)
        parameters = dict(views.named_parameters())
        for name, tensor in snapshot:
            parameters[name].data = tensor
        expected = copies(ids).logits
        got = views(ids).logits
        snapshot.verify()
    assert bits(got) == bits(expected)


# --- which versions can be read -------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    slots=st.integers(2, 4),
    outcomes=st.lists(
        st.sampled_from(["good", "unreadable", "misshapen", "broken", "interrupted"]), max_size=14
    ),
)
def test_the_newest_versions_can_be_read_and_no_half_one_ever(
    slots: int, outcomes: list[str]
) -> None:
    def failing() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.full((3, 5), -1.0)
        raise OSError("the source broke")

    first = ("a", torch.full((3, 5), -1.0))
    ctrl_c = ("b", interrupting((7,), KeyboardInterrupt()))
    bad: dict[str, tuple[Any, type[BaseException]]] = {
        "unreadable": (failing, WeightUpdateError),
        "misshapen": (lambda: [first, ("b", torch.ones(8))], InvalidInputError),
        "broken": (
            lambda: [first, ("b", interrupting((7,), RuntimeError("gone")))],
            WeightUpdateError,
        ),
        "interrupted": (lambda: [first, ctrl_c], KeyboardInterrupt),
    }
    with SharedMemory(slots) as transport:
        ever = {0: transport.publish(tiny(0), 0)}
        alive: list[int | None] = [None] * (slots - 1) + [0]  # by slot, the next to go first
        for version, outcome in enumerate(outcomes, start=1):
            if outcome == "good":
                ever[version] = transport.publish(tiny(version), version)
                alive = [*alive[1:], version]
            else:
                weights, error = bad[outcome]
                with pytest.raises(error):
                    transport.publish(weights(), version)
                if outcome in ("broken", "interrupted"):
                    alive[0] = None
            readable = [v for v in alive if v is not None]
            assert list(transport.versions) == readable
            for v, snapshot in ever.items():
                if v in readable:
                    snapshot.verify()
                    assert transport.snapshot(v).checksum == checksum(snapshot)
                    assert checksum(snapshot) == checksum(tiny(v))
                else:
                    with pytest.raises(WeightUpdateError, match=f"version {v} were overwritten"):
                        snapshot.verify()
                    with pytest.raises(WeightUpdateError, match="overwritten"):
                        list(snapshot)
                    with pytest.raises(WeightUpdateError, match=f"version {v} are not there"):
                        transport.snapshot(v)


def test_a_read_that_is_overtaken_raises_at_its_end_and_when_verified() -> None:
    with SharedMemory() as transport:
        snapshot = transport.publish(tiny(0), 0)
        transport.publish(tiny(1), 1)
        pairs = iter(snapshot)
        next(pairs)
        snapshot.verify()
        transport.publish(tiny(2), 2)
        _, overwritten = next(pairs)
        assert overwritten[0] == 2  # the loop would have used it
        with pytest.raises(WeightUpdateError, match="version 0 were overwritten by version 2"):
            next(pairs)
        with pytest.raises(WeightUpdateError, match="more slots"):
            snapshot.verify()


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([("a", torch.ones(3, 5)), ("c", torch.ones(7))], r"expected b \(float32, \(7,\)\), got c"),
        ([("a", torch.ones(3, 5)), ("b", torch.ones(7).half())], r"got b \(float16, \(7,\)\)"),
        ([("a", torch.ones(5, 3)), ("b", torch.ones(7))], r"got a \(float32, \(5, 3\)\)"),
        ([("b", torch.ones(7)), ("a", torch.ones(3, 5))], r"expected a .* got b"),
        ([("a", torch.ones(3, 5))], "expected 2 tensors, got 1"),
        ([*tiny(), ("c", torch.ones(1))], "expected 2 tensors, got 3"),
        ([*tiny(), ("b", torch.ones(7))], "'b' twice"),
        ([], "got none"),
        (["ab"], "got str"),
        ([("a", 1.0)], "got tuple"),
        ([("a", torch.ones(3, 5, device="meta"))], "dense tensor with values"),
        ([("a", torch.ones(3, 5).to_sparse())], "dense tensor with values"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(
    weights: Any, says: str
) -> None:
    with SharedMemory() as transport:
        kept = [transport.publish(tiny(version), version) for version in (1, 2)]
        with pytest.raises(InvalidInputError, match=says):
            transport.publish(weights, 3)
        assert [checksum(snapshot) for snapshot in kept] == [checksum(tiny(v)) for v in (1, 2)]


@pytest.mark.parametrize("version", [-1, True, 1.0, "2", None, 0, 3])
def test_a_version_must_be_a_larger_count_of_steps(version: Any) -> None:
    with SharedMemory() as transport:
        transport.publish(tiny(), 3)
        with pytest.raises(InvalidInputError, match="version: expected"):
            transport.publish(tiny(), version)
        assert transport.versions == (3,)


def test_a_single_slot_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="slots: expected at least 2, got 1"):
        SharedMemory(slots=1)


# --- how long memory lives ------------------------------------------------------------------------


def test_tensors_outlive_snapshot_and_transport() -> None:
    transport = SharedMemory()
    snapshot = transport.publish(tiny(8), 8)
    handle = pickle.dumps(snapshot)
    transport.close()
    transport.close()
    assert transport.versions == ()
    assert checksum(snapshot) == snapshot.checksum  # nobody can overwrite it any more
    _, tensor = next(iter(snapshot))
    del snapshot, transport
    gc.collect()
    assert bits(tensor) == bits(tiny(8)[0][1])
    late = pickle.loads(handle)  # what arrives too late says so when it is read
    assert late.version == 8
    with pytest.raises(WeightUpdateError, match="the transport was closed"):
        list(late)
    with pytest.raises(WeightUpdateError, match="the transport was closed"):
        late.verify()


def test_a_closed_transport_publishes_nothing() -> None:
    transport = SharedMemory()
    transport.close()
    with pytest.raises(WeightUpdateError, match="closed"):
        transport.publish(tiny(), 0)


@on_linux
def test_a_segment_goes_with_its_transport() -> None:
    transport = SharedMemory()
    name = transport.publish(tiny(), 0).name
    assert (SHM / name).exists()
    del transport
    gc.collect()
    assert not (SHM / name).exists()


@on_linux
def test_too_little_memory_is_an_error_and_no_signal() -> None:
    room = os.statvfs(SHM)
    size = room.f_blocks * room.f_frsize  # of each of two slots
    if not size:
        pytest.skip("/dev/shm has no limit")
    huge = torch.zeros((), dtype=torch.uint8).expand(size)
    with SharedMemory() as transport:
        with pytest.raises(WeightUpdateError, match=r"bytes, [\d,]+ are free; enlarge /dev/shm"):
            transport.publish([("a", huge)], 0)
        left = [path for path in SHM.iterdir() if path.exists() and path.stat().st_size > size]
        assert left == []
        assert transport.publish(tiny(), 0).version == 0


# --- other processes ------------------------------------------------------------------------------


def test_readers_in_other_processes_see_the_learners_bits(
    readers: dict[str, Connection],
) -> None:
    weights = assorted()
    with SharedMemory() as transport:
        for version in (1, 2, 3):
            snapshot = transport.publish(weights, version)
            archive = checksum(archived(weights))
            for kind, reader in readers.items():
                assert ask(reader, "check", snapshot) == (version, archive), kind
            with torch.no_grad():
                weights[0][1].add_(1)
        lost = pickle.loads(pickle.dumps(transport.snapshot(2)))
        transport.publish(weights, 4)
        for kind, reader in readers.items():
            assert "version 2 were overwritten" in ask(reader, "check", lost), kind


def test_what_a_reader_holds_outlives_the_transport(readers: dict[str, Connection]) -> None:
    with SharedMemory() as transport:
        snapshot = transport.publish(tiny(5), 5)
        for reader in readers.values():
            assert ask(reader, "hold", snapshot) == 2
    for kind, reader in readers.items():
        assert ask(reader, "held") == [tensor.tolist() for _, tensor in tiny(5)], kind


def test_a_race_with_the_writer_is_won_or_noticed(spawned_reader: Connection) -> None:
    reader = spawned_reader
    with SharedMemory() as transport:
        reader.send(("race",))
        assert reader.poll(60)
        for version in range(3000):
            values = torch.full((1500,), float(version))
            snapshot = transport.publish([(str(i), values) for i in range(16)], version)
            if reader.poll():
                reader.recv_bytes()
                reader.send(snapshot)
        assert reader.poll(30)
        reader.recv_bytes()
        reader.send(snapshot)  # nothing more is written: this one is read in peace
        assert reader.poll(30)
        reader.recv_bytes()
        reader.send(None)
        assert reader.poll(30)
        counts = reader.recv()
    assert counts["wrong"] == 0
    assert counts["correct"] > 0
    assert counts["torn"] > 0


@on_linux
@pytest.mark.parametrize("how", ["ended", "killed"])
def test_the_end_of_a_reader_disturbs_nobody(
    how: str, processes: Processes, plain_reader: tuple[Connection, int, Path]
) -> None:
    reader, pid, errors = plain_reader
    with SharedMemory() as transport:
        snapshot = transport.publish(tiny(1), 1)
        assert ask(reader, "hold", snapshot) == 2
        if how == "killed":
            os.kill(pid, signal.SIGKILL)
        else:
            reader.send(("end",))
        assert processes.order("wait", pid) == (-signal.SIGKILL if how == "killed" else 0)
        time.sleep(0.3)  # a resource tracker, if it had one, would now remove the segment
        assert (SHM / snapshot.name).exists()
        assert checksum(pickle.loads(pickle.dumps(snapshot))) == snapshot.checksum
        transport.publish(tiny(2), 2)
    assert not (SHM / snapshot.name).exists()
    assert errors.read_text() == ""


@on_linux
@pytest.mark.parametrize(
    "ending",
    ["left open", "closed", "raised", "forked", "removed by others", "SIGTERM", "SIGKILL"],
)
def test_however_a_creator_ends_it_leaves_no_segment(
    ending: str, processes: Processes, tmp_path: Path
) -> None:
    errors = tmp_path / "errors.txt"
    killed = ending.startswith("SIG")
    pid = processes.order("create", str(tmp_path), "killed" if killed else ending, str(errors))
    soon((tmp_path / "name").exists, "the creator to publish")
    name = (tmp_path / "name").read_text()
    if killed:
        assert (SHM / name).exists()
        os.kill(pid, getattr(signal, ending))
    code = processes.order("wait", pid)
    soon(lambda: not (SHM / name).exists(), "the segment to go")
    if killed:
        assert code == -getattr(signal, ending)
        return
    assert code == (1 if ending == "raised" else 0)
    assert "leaked" not in errors.read_text()
    assert "Traceback" not in errors.read_text() or ending == "raised"
