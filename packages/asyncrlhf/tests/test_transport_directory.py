"""Snapshots as folders: whole or absent, as long as promised, and loadable by others."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asyncrlhf.errors import (
    InvalidInputError,
    MissingExtraError,
    WaitTimeoutError,
    WeightUpdateError,
)
from asyncrlhf.transport import SafetensorsDir, checksum

pytest.importorskip("safetensors")
Weights = list[tuple[str, Tensor]]


def tiny(value: float = 0.0) -> Weights:
    return [("b", torch.full((3, 5), float(value))), ("a", torch.full((7,), float(value)))]


def assorted() -> Weights:
    draw = torch.Generator().manual_seed(3)
    tied, flat = torch.randn(4, 3, generator=draw), torch.randn(20, generator=draw)
    return [
        ("float32", torch.randn(5, 3, generator=draw)),
        ("float16", torch.randn(7, generator=draw).half()),
        ("bfloat16", torch.randn(9, generator=draw).bfloat16()),
        ("float64", torch.randn(2, 1, 3, generator=draw).double()),
        ("buffer", torch.arange(11)),
        ("flags", torch.tensor([True, False, True])),
        ("step", torch.tensor(17)),
        ("nothing", torch.empty(0, 4)),
        ("transposed", torch.randn(3, 6, generator=draw).T),
        ("nan", torch.tensor([float("nan"), float("inf"), 1e-42])),
        ("learns", torch.randn(4, generator=draw, requires_grad=True)),
        ("embedding", tied),
        ("head", tied),
        ("first half", flat[:10]),
        ("second half", flat[10:]),
    ]


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_every_dtype_shape_and_tie_survives_in_the_published_order(tmp_path: Path) -> None:
    weights = assorted()
    with SafetensorsDir(tmp_path / "new" / "folder") as transport:
        snapshot = transport.publish(weights, 4)
        other = pickle.loads(pickle.dumps(snapshot))
        found = list(other)
        assert [name for name, _ in found] == [name for name, _ in weights]
        assert other.version == 4
        assert other.checksum == checksum(weights) == checksum(found)
        for (name, there), (_, ours) in zip(found, weights, strict=True):
            assert (there.dtype, there.shape) == (ours.dtype, ours.shape), name
        assert checksum(SafetensorsDir(transport.path).snapshot(4)) == snapshot.checksum


def test_a_learner_that_goes_on_in_place_never_changes_a_snapshot(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(6))
    with SafetensorsDir(tmp_path) as transport:
        before = transport.publish([("w", parameter)], 0)
        parameter.data.mul_(3)
        after = transport.publish([("w", parameter)], 1)
        assert [dict(snapshot)["w"].tolist() for snapshot in (before, after)] == [[1] * 6, [3] * 6]


def test_a_file_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    with SafetensorsDir(tmp_path) as transport:
        weights = assorted()
        loaded = load_file(transport.publish(weights, 0).path / "model.safetensors")
        assert checksum((name, loaded[name]) for name, _ in weights) == checksum(weights)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_versions_stay_and_older_ones_go(tmp_path: Path, keep: int) -> None:
    with SafetensorsDir(tmp_path, keep=keep) as transport:
        snapshots = [transport.publish(tiny(version), version) for version in range(0, 25, 5)]
        assert transport.versions == (0, 5, 10, 15, 20)[-keep:]
        assert names(tmp_path) == [f"weights-{version:010d}" for version in transport.versions]
        for snapshot in snapshots:
            if snapshot.version in transport.versions:
                assert checksum(snapshot) == checksum(tiny(snapshot.version))
            else:
                with pytest.raises(WeightUpdateError, match=r"pruned.*keep more versions"):
                    list(snapshot)
                with pytest.raises(WeightUpdateError, match=r"are not in .*; versions \["):
                    transport.snapshot(snapshot.version)
        latest = transport.latest()
        assert latest is not None
        assert latest.version == 20


def test_closing_removes_what_was_published_here_and_nothing_else(tmp_path: Path) -> None:
    first, second = SafetensorsDir(tmp_path), SafetensorsDir(tmp_path, prefix="weights-b")
    first.publish(tiny(), 3)
    second.publish(tiny(), 1)
    (tmp_path / "notes.txt").touch()
    SafetensorsDir(tmp_path).close()
    assert (first.versions, second.versions) == ((3,), (1,))
    first.close()
    first.close()
    assert names(tmp_path) == ["notes.txt", "weights-b-0000000001"]
    assert first.latest() is None


# --- half-written, damaged, late ------------------------------------------------------------------

KILLED = """
import os, signal, sys, torch
from asyncrlhf.transport import SafetensorsDir

class Deadly(torch.Tensor):
    armed = False
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.detach:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__torch_function__(func, types, args, kwargs or {})

transport = SafetensorsDir(sys.argv[1])
transport.publish([("a", torch.ones(3))], 1)
transport.publish([("a", torch.ones(3).as_subclass(Deadly))], 2)
"""


def test_what_a_killed_writer_leaves_is_never_seen_and_cleaned_up(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=60)
    assert run.returncode == -signal.SIGKILL
    left = names(tmp_path)
    assert len(left) == 2
    assert left[0].startswith(".weights-0000000002.")
    reader = SafetensorsDir(tmp_path)
    assert reader.versions == (1,)
    latest = reader.latest()
    assert latest is not None
    assert dict(latest)["a"].tolist() == [1, 1, 1]
    assert names(tmp_path) == left  # a reader leaves it to the writer, who might still be at it
    with pytest.raises(InvalidInputError, match=r"more than 1.*another run; .* rewind\(version\)"):
        SafetensorsDir(tmp_path).publish(tiny(), 1)
    assert names(tmp_path) == left
    SafetensorsDir(tmp_path).publish(tiny(2), 2)
    assert names(tmp_path) == ["weights-0000000001", "weights-0000000002"]


class Breaks(Tensor):
    error: BaseException

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.detach:
            raise args[0].error
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("error", [RuntimeError("gone"), KeyboardInterrupt()])
def test_a_publication_that_breaks_off_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    broken = torch.zeros(3).as_subclass(Breaks)
    broken.error = error
    with SafetensorsDir(tmp_path, keep=1) as transport:
        old = transport.publish(tiny(1), 1)
        expected = WeightUpdateError if isinstance(error, Exception) else KeyboardInterrupt
        with pytest.raises(expected):
            transport.publish([*tiny(2), ("c", broken)], 2)
        assert names(tmp_path) == ["weights-0000000001"]
        assert checksum(old) == checksum(tiny(1))
        assert transport.publish(tiny(2), 2).version == 2


def test_weights_that_do_not_fit_a_file_are_an_error(tmp_path: Path) -> None:
    with SafetensorsDir(tmp_path) as transport:
        with pytest.raises(WeightUpdateError, match="could not be written"):
            transport.publish([("a", torch.zeros(2, dtype=torch.complex128))], 0)
        with pytest.raises(InvalidInputError, match="got none"):
            transport.publish([], 0)
        assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WeightUpdateError, match="cannot be written"):
        SafetensorsDir(tmp_path / "file").publish(tiny(), 0)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "model.safetensors", -1),
        lambda folder: flip(folder / "model.safetensors", 7),  # length of the header
        lambda folder: flip(folder / "model.safetensors", 8),
        lambda folder: os.truncate(folder / "model.safetensors", 130),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: flip(folder / "manifest.json", 0),
        lambda folder: os.truncate(folder / "manifest.json", 20),
        lambda folder: (folder / "manifest.json").write_text('{"format": 9, "version": 1}'),
        lambda folder: (folder / "manifest.json").write_text("[]"),
    ],
)
def test_damage_is_noticed_before_the_first_tensor_is_given(tmp_path: Path, damage: Any) -> None:
    with SafetensorsDir(tmp_path) as transport:
        damage(transport.publish(tiny(), 1).path)
        with pytest.raises(WeightUpdateError, match=r"is damaged|cannot be read"):
            next(iter(transport.snapshot(1)))


def test_a_damaged_newest_version_is_not_passed_over(tmp_path: Path) -> None:
    with SafetensorsDir(tmp_path) as transport:
        transport.publish(tiny(), 1)
        flip(transport.publish(tiny(), 2).path / "manifest.json", 0)
        with pytest.raises(WeightUpdateError, match="damaged"):
            transport.latest()


def test_readers_beside_a_writer_see_whole_versions_only(tmp_path: Path) -> None:
    seen: list[int] = []
    wrong: list[str] = []
    done = threading.Event()

    def read() -> None:
        reader = SafetensorsDir(tmp_path)
        while not done.is_set():
            try:
                snapshot = reader.latest()
                if snapshot is None:
                    continue
                values = {float(x) for _, tensor in snapshot for x in tensor.reshape(-1)}
                if values != {snapshot.version}:
                    wrong.append(f"{snapshot.version}: {values}")
                seen.append(snapshot.version)
            except WeightUpdateError:
                pass  # pruned between the look and the read

    with SafetensorsDir(tmp_path, keep=1) as transport:
        thread = threading.Thread(target=read)
        thread.start()
        for version in range(60):
            transport.publish(tiny(version), version)
        while not seen or seen[-1] != 59:
            assert thread.is_alive()
            done.wait(0.001)
        done.set()
        thread.join()
    assert wrong == []
    assert seen == sorted(seen)
    assert len(set(seen)) > 1


def test_waiting_ends_when_the_version_is_there(tmp_path: Path) -> None:
    with SafetensorsDir(tmp_path) as transport:
        timer = threading.Timer(0.1, transport.publish, (tiny(4), 4))
        timer.start()
        found = SafetensorsDir(tmp_path).wait(4, timeout=30, poll=0.01)
        timer.join()
        assert checksum(found) == checksum(tiny(4))


def test_waiting_in_vain_says_for_what_and_where(tmp_path: Path) -> None:
    with SafetensorsDir(tmp_path) as transport:
        transport.publish(tiny(), 1)
        with pytest.raises(WaitTimeoutError, match=rf"waited 0.05 s for .*version 2 in {tmp_path}"):
            transport.wait(2, timeout=0.05, poll=0.01)
        transport.publish(tiny(), 3)
        with pytest.raises(WeightUpdateError, match=r"version 2 are not in .*versions \[1, 3\]"):
            transport.wait(2, timeout=600)  # not waited for: newer ones are there
        with pytest.raises(InvalidInputError, match="poll"):
            transport.wait(2, poll=0)


def test_a_run_that_goes_on_from_an_older_version_publishes_anew(tmp_path: Path) -> None:
    before = SafetensorsDir(tmp_path, keep=3)
    for version in (1, 2, 3):
        before.publish(tiny(version), version)
    resumed = SafetensorsDir(tmp_path)
    resumed.rewind(1)
    assert resumed.versions == (1,)
    assert checksum(resumed.publish(tiny(20), 2)) == checksum(tiny(20))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"keep": 0}, "keep: expected at least 1"),
        ({"prefix": "../up"}, "prefix: expected letters"),
        ({"prefix": ""}, "prefix: expected letters"),
        ({"extra_files": ["nowhere.json"]}, "extra_files: cannot read"),
        ({"extra_files": ["manifest.json"]}, "extra_files: expected each name once"),
    ],
)
def test_wrong_settings_are_refused_at_once(
    tmp_path: Path, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidInputError, match=says):
        SafetensorsDir(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_without_safetensors_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtraError, match=r"asyncrlhf\[train\]"):
        SafetensorsDir(tmp_path).publish(tiny(), 0)


# --- what others load -----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_version_with_its_configuration_is_a_pretrained_model(tmp_path: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    from decapod.lm import build_model, build_tokenizer

    tokenizer = build_tokenizer(["abc"])
    model = build_model(len(tokenizer), 16, 1, 2, init_std=0.2, tie_embeddings=tied)
    model.config.save_pretrained(tmp_path / "extra")
    tokenizer.save_pretrained(tmp_path / "extra")
    files = sorted((tmp_path / "extra").iterdir())
    with SafetensorsDir(tmp_path / "weights", extra_files=files) as transport:
        shutil.rmtree(tmp_path / "extra")  # they were read
        for version, weights in enumerate((model.named_parameters(), model.state_dict().items())):
            path = transport.publish(weights, version).path
            loaded = transformers.AutoModelForCausalLM.from_pretrained(path)
            assert checksum(loaded.named_parameters()) == checksum(model.named_parameters())
            assert transformers.AutoTokenizer.from_pretrained(path).encode("abc") == [4, 5, 6]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's
def test_an_adapter_is_a_folder_that_peft_loads(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from decapod.lm import build_model

    def base() -> Any:
        return build_model(11, 16, 1, 2, init_std=0.2)

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base(), config).eval()
    model.add_adapter("reference", config)
    ids = torch.arange(10).reshape(2, 5)
    with SafetensorsDir(tmp_path) as transport, torch.no_grad():
        first = transport.publish_adapter(model, 1)
        expected = model(ids).logits
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.mul_(2)
        second = transport.publish_adapter(model, 2)
        assert first.checksum == checksum(first) != second.checksum == checksum(second)
        assert {name.rpartition(".")[0].rpartition(".")[2] for name, _ in first} == {
            "lora_A",
            "lora_B",
        }
        assert json.loads((first.path / "adapter_config.json").read_text())["r"] == 2
        assert not (first.path / "reference").exists()
        loaded = peft.PeftModel.from_pretrained(base(), first.path).eval()
        assert torch.equal(loaded(ids).logits, expected)
        with pytest.raises(InvalidInputError, match="expected a PeftModel"):
            transport.publish_adapter(base(), 3)
