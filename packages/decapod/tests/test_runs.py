import json
import math
import platform
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decapod.jsonl import FileInUseError
from decapod.runs import Run, RunExistsError, TensorBoardMirror, WandbMirror, environment


@dataclass(frozen=True)
class Config:
    rate: float = 0.1
    layers: tuple[int, ...] = (64, 64)
    name: str = "größe"


def test_a_run_can_be_read_back_with_all_that_made_it(tmp_path: Path) -> None:
    with Run.create(
        tmp_path / "run", config=Config(), seed=3, packages=("scipy", "no-such")
    ) as run:
        run.log({"loss": np.float32(0.5), "note": "warm"}, step=1)
        run.log({"loss": math.nan}, step=2)
    found = Run.open(tmp_path / "run")
    assert found.config == {"rate": 0.1, "layers": [64, 64], "name": "größe"}
    assert found.seed == 3
    assert found.record["argv"] == sys.argv
    assert found.record["resumed"] == []
    versions = found.record["environment"]["packages"]
    assert versions["numpy"] == np.__version__
    assert versions["no-such"] is None
    assert found.record["environment"]["python"] == platform.python_version()
    first, second = found.read_metrics()
    assert (first["step"], first["loss"], first["note"]) == (1, 0.5, "warm")
    assert first["seconds"] <= second["seconds"]
    assert math.isnan(second["loss"])


def test_a_killed_run_keeps_every_line_that_was_logged(tmp_path: Path) -> None:
    code = (
        "import os, sys; from decapod.runs import Run\n"
        "run = Run.create(sys.argv[1], config={}, seed=0)\n"
        "for step in range(5): run.log({'x': step}, step=step)\n"
        "os._exit(9)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False)
    assert ended.returncode == 9
    assert [line["x"] for line in Run.open(tmp_path / "run").read_metrics()] == [0, 1, 2, 3, 4]


def test_a_resumed_run_goes_on_where_it_was_and_says_so(tmp_path: Path) -> None:
    for step in range(3):
        with Run.create(tmp_path / "run", config=Config(), seed=3, resume=True) as run:
            run.log({"x": step}, step=step)
    found = Run.open(tmp_path / "run")
    assert [line["x"] for line in found.read_metrics()] == [0, 1, 2]
    assert len(found.record["resumed"]) == 2
    assert found.record["resumed"][0]["argv"] == sys.argv


def test_a_folder_with_a_run_in_it_is_refused(tmp_path: Path) -> None:
    Run.create(tmp_path / "run", config={}, seed=0).close()
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(RunExistsError, match="holds a run; choose another folder or pass resume"):
        Run.create(tmp_path / "run", config={}, seed=0)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunExistsError, match="holds other files"):
        Run.create(tmp_path, config={}, seed=0, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_resuming_with_another_config_or_seed_names_what_differs(tmp_path: Path) -> None:
    nan = {"a": math.nan}
    Run.create(tmp_path / "run", config={"rate": 0.1, **nan}, seed=0).close()
    Run.create(tmp_path / "run", config={"rate": 0.1, **nan}, seed=0, resume=True).close()
    with pytest.raises(ValueError, match=r"rate, seed differ \(rate: 0\.1 there, 0\.2 here\)"):
        Run.create(tmp_path / "run", config={"rate": 0.2, **nan}, seed=1, resume=True)


def test_a_run_has_one_writer(tmp_path: Path) -> None:
    with (
        Run.create(tmp_path / "run", config={}, seed=0),
        pytest.raises(FileInUseError),
    ):
        Run.create(tmp_path / "run", config={}, seed=0, resume=True)


def test_reserved_names_and_values_that_are_not_json_are_refused(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", config={}, seed=0) as run:
        with pytest.raises(ValueError, match="'step'; rename it"):
            run.log({"step": 1}, step=1)
        with pytest.raises(TypeError, match=r"metrics\['x'\]"):
            run.log({"x": np.zeros(3)}, step=1)
    assert Run.open(tmp_path / "run").read_metrics() == []


def test_a_config_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"config\['path'\]"):
        Run.create(tmp_path / "run", config={"path": tmp_path}, seed=0)
    with pytest.raises(TypeError, match="config: expected a dataclass instance or a mapping"):
        Run.create(tmp_path / "run", config=Config, seed=0)  # type: ignore[arg-type]  # the point
    assert not (tmp_path / "run").exists()


def test_opening_a_folder_without_a_run_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run\.json"):
        Run.open(tmp_path)


def test_the_environment_knows_commit_and_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["commit"] is None
    (tmp_path / "a.txt").write_text("1")
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@example.org")
    for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "first")):
        subprocess.run((*git, *command), check=True)
    clean = environment()
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "a.txt").write_text("2")
    assert environment()["dirty"] is True
    assert environment()["commit"] == clean["commit"]


def test_the_environment_is_json_and_complete() -> None:
    found = environment(("scipy",))
    assert json.loads(json.dumps(found)) == found
    assert found["cpu_count"] >= 1
    assert set(found["packages"]) == {"decapod", "numpy", "scipy"}


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Run.create(
        tmp_path / "run", config=Config(), seed=0, mirrors=[TensorBoardMirror()]
    ) as run:
        for step in range(4):
            run.log({"loss": 1.0 / (step + 1), "note": "text stays out"}, step=step)
    events = accumulators.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == [0, 1, 2, 3]
    assert [event.value for event in scalars] == pytest.approx([1.0, 0.5, 1 / 3, 0.25])
    assert len(Run.open(tmp_path / "run").read_metrics()) == 4


def wandb_records(path: Path) -> Iterator[Any]:
    """The messages in W&B's own file: LevelDB's log format after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, message = path.read_bytes(), 7, b""
    block, full, last = 32768, 1, 4
    while position < len(data):
        left = block - position % block
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (full, last):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            message = b""
            yield record


def test_wandb_reads_back_offline_what_was_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    mirror = WandbMirror(mode="offline", project="test")
    with Run.create(tmp_path / "run", config=Config(), seed=0, mirrors=[mirror]) as run:
        for step in range(3):
            run.log({"loss": 0.5**step}, step=step)
    wandb.teardown()  # waits for W&B's process, which writes the file

    (file,) = (tmp_path / "run").rglob("*.wandb")
    losses = {}
    for record in wandb_records(file):
        if record.HasField("history"):
            row = {
                (item.key or item.nested_key[0]): json.loads(item.value_json)
                for item in record.history.item
            }
            losses[row["_step"]] = row["loss"]
    assert losses == {0: 1.0, 1: 0.5, 2: 0.25}


@pytest.mark.parametrize(
    ("library", "mirror", "extra"),
    [
        ("tensorboardX", "TensorBoardMirror", "decapod[tensorboard]"),
        ("wandb", "WandbMirror", "decapod[wandb]"),
    ],
)
def test_a_missing_mirror_library_is_an_error_that_names_the_extra(
    library: str, mirror: str, extra: str
) -> None:
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"
        "from decapod import runs\n"
        f"try: runs.{mirror}()\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert extra in done.stdout
