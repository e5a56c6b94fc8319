"""A result grid and an experiment folder that the real Ray Tune wrote."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hpreliability.errors import EmptyInputError, MissingColumnError, SourceFormatError
from hpreliability.readers import from_ray_results

PARAMS = {"params": ["net/width", "lr"], "score": "eval/return"}


def train(config: dict[str, Any]) -> None:
    from ray import tune

    for iteration in range(2):
        tune.report({"eval": {"return": config["lr"] * (iteration + 1), "loss": 1.0}})
    if config["lr"] == 0.5 and config["env"] == "B":
        raise RuntimeError("diverged")


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    with warnings.catch_warnings():
        # Ray's own, of which no part concerns reading what it wrote.
        warnings.simplefilter("ignore")
        from ray import tune

        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        try:
            space = {
                "lr": tune.grid_search([0.25, 0.5]),
                "env": tune.grid_search(["A", "B"]),
                "net": {"width": 64},
                "seed": 0,
            }
            run = tune.RunConfig(
                name="sweep", storage_path=str(tmp_path_factory.mktemp("ray")), verbose=0
            )
            one = tune.TuneConfig(max_concurrent_trials=1, reuse_actors=True)  # few processes
            yield tune.Tuner(train, param_space=space, tune_config=one, run_config=run).fit()
        finally:
            ray.shutdown()


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
def test_grid_and_folder_give_the_same_table(grid: Any) -> None:
    table = from_ray_results(grid, **PARAMS)
    assert table.values("lr") == ("0.25", "0.5")
    assert table.values("net/width") == ("64",)
    lr = table.select(hyperparameter="lr").frame
    assert len(lr) == 4
    assert lr[lr["env"] == "A"]["score"].tolist() == [0.5, 1.0]
    assert lr["score"].isna().tolist() == [False, False, False, True]  # (0.5, B) raised
    assert "1 of 4 trials failed" in table.notes[0]
    folder = from_ray_results(grid.experiment_path, **PARAMS)
    pd.testing.assert_frame_equal(folder.frame, table.frame)


@pytest.mark.ray
def test_curves_end_in_nan_where_a_trial_failed(grid: Any) -> None:
    table = from_ray_results(
        grid, params=["lr"], score="eval/return", seed=None, step="training_iteration"
    )
    assert table.select(value="0.25", env="A").frame["step"].tolist() == [1, 2]
    final = table.reduce("final").frame
    assert final[final["score"].isna()][["value", "env"]].to_numpy().tolist() == [["0.5", "B"]]


@pytest.mark.ray
def test_a_trial_that_never_reported_is_a_failed_run(grid: Any, tmp_path: Path) -> None:
    for trial in Path(grid.experiment_path).glob("*/"):
        copy = tmp_path / trial.name
        copy.mkdir()
        for file in ("params.json", "result.json"):
            (copy / file).write_bytes((trial / file).read_bytes())
    (copy / "result.json").write_bytes(b"")
    table = from_ray_results(tmp_path, params=["lr"], score="eval/return")
    assert table.frame["score"].isna().sum() == 1
    (copy / "result.json").write_text('{"eval": ')
    with pytest.raises(SourceFormatError, match=r"result\.json, line 1"):
        from_ray_results(tmp_path, params=["lr"], score="eval/return")


@pytest.mark.ray
def test_unknown_names_list_the_known(grid: Any) -> None:
    with pytest.raises(MissingColumnError, match="eval/loss"):
        from_ray_results(grid, params=["lr"], score="reward")
    with pytest.raises(MissingColumnError, match="net/width"):
        from_ray_results(grid, params=["gamma"], score="eval/return")


def test_other_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EmptyInputError, match=r"params\.json"):
        from_ray_results(tmp_path, **PARAMS)
    with pytest.raises(FileNotFoundError):
        from_ray_results(tmp_path / "gone", **PARAMS)
    with pytest.raises(SourceFormatError, match="list"):
        from_ray_results([], **PARAMS)


def test_damaged_params_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial/params.json").write_text(json.dumps({"lr": 1})[:-2])
    with pytest.raises(SourceFormatError, match=r"params\.json is not JSON"):
        from_ray_results(tmp_path, **PARAMS)
