"""Multirun folders that a real Hydra application wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpreliability.errors import EmptyInputError, MissingColumnError, SourceFormatError
from hpreliability.readers import from_hydra

pytest.importorskip("hydra")

APP = """
import json
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig


@hydra.main(version_base=None, config_path=".", config_name="config")
def main(config: DictConfig) -> None:
    out = Path(HydraConfig.get().runtime.output_dir)
    score = config.optim.lr * 1000 + config.n_step
    if (config.n_step, config.env) == (5, "B"):
        return  # a job that ends without its metrics
    (out / "metrics.json").write_text(json.dumps({"return": score}))
    (out / "curve.csv").write_text(f"t,return\\n1,0.0\\n2,{score}\\n")


main()
"""
CONFIG = "optim:\n  lr: 1e-5\nn_step: 1\nenv: A\nseed: 0\nname: run-${seed}\n"
DEFAULT = {"optim.lr": 1e-5, "n_step": 1}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hydra")
    (root / "app.py").write_text(APP)
    (root / "config.yaml").write_text(CONFIG)
    for overrides in (["optim.lr=1e-5,0.01"], ["n_step=5"]):
        command = [sys.executable, "app.py", "--multirun", *overrides, "env=A,B", "seed=0,1"]
        command.append(f"hydra.sweep.dir=multirun/{overrides[0].partition('=')[0]}")
        subprocess.run(command, cwd=root, check=True, capture_output=True)
    return root / "multirun"


def test_jobs_of_several_sweeps_become_one_table(sweep: Path) -> None:
    table = from_hydra(sweep, score="return", design="one_at_a_time", default=DEFAULT)
    assert table.hyperparameters == ("n_step", "optim.lr")
    assert table.values("optim.lr") == ("1e-05", "0.01")
    assert table.values("n_step") == ("1", "5")
    assert len(table.frame) == 2 * 2 * 2 * 2
    cell = table.select(value="0.01", env="B", seed="1").frame
    assert cell["score"].tolist() == [11.0]
    failed = table.frame[table.frame["score"].isna()]
    assert failed[["value", "env"]].to_numpy().tolist() == [["5", "B"]] * 2
    assert "2 of 12 jobs wrote no metrics.json" in table.notes[0]


def test_curves_are_read_from_csv(sweep: Path) -> None:
    table = from_hydra(sweep / "optim.lr", score="return", metrics="curve.csv", step="t", seed=None)
    assert table.hyperparameters == ("optim.lr", "seed")
    assert set(table.frame["step"]) == {1.0, 2.0}
    last = from_hydra(sweep / "optim.lr", score="return", metrics="curve.csv")
    assert last.select(value="0.01").frame["score"].tolist() == [11.0] * 4


def test_unknown_names_are_refused(sweep: Path) -> None:
    with pytest.raises(MissingColumnError, match="reward"):
        from_hydra(sweep, score="reward")
    with pytest.raises(MissingColumnError, match=r"agent.*'optim\.lr'"):
        from_hydra(sweep, score="return", context=["agent"])
    with pytest.raises(MissingColumnError, match=r"none of 12 jobs .* wrote out\.json"):
        from_hydra(sweep, score="return", metrics="out.json")


def test_a_folder_without_jobs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmptyInputError, match=r"overrides\.yaml"):
        from_hydra(tmp_path, score="return")
    with pytest.raises(FileNotFoundError):
        from_hydra(tmp_path / "gone", score="return")


def test_damaged_files_are_refused_by_name(sweep: Path, tmp_path: Path) -> None:
    job = tmp_path / "0"
    (job / ".hydra").mkdir(parents=True)
    for name in ("config.yaml", "overrides.yaml"):
        source = sweep / "optim.lr/0/.hydra" / name
        (job / ".hydra" / name).write_bytes(source.read_bytes())
    (job / "metrics.json").write_text('{"return": ')
    with pytest.raises(SourceFormatError, match=r"metrics\.json is not JSON"):
        from_hydra(tmp_path, score="return")
    (job / ".hydra/config.yaml").write_text("a: [")
    with pytest.raises(SourceFormatError, match="cannot be read"):
        from_hydra(tmp_path, score="return")
