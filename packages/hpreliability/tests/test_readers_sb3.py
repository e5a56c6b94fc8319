"""Logs that real Stable-Baselines3 runs wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpreliability.errors import EmptyInputError, SourceFormatError
from hpreliability.readers import from_sb3
from hpreliability.table import Table

gymnasium = pytest.importorskip("gymnasium")
sb3 = pytest.importorskip("stable_baselines3")

LAYOUT = "{hyperparameter}={value}/{env}/{seed}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stable_baselines3.common.callbacks import EvalCallback
    from stable_baselines3.common.monitor import Monitor

    root = tmp_path_factory.mktemp("sb3")
    for rate in ("0.001", "0.01"):
        for seed in range(2):
            folder = root / f"lr={rate}" / "CartPole-v1" / str(seed)
            env = Monitor(gymnasium.make("CartPole-v1"), str(folder / "monitor.csv"))
            judge = Monitor(gymnasium.make("CartPole-v1"))
            callback = EvalCallback(
                judge, eval_freq=100, n_eval_episodes=2, log_path=str(folder), verbose=0
            )
            agent = sb3.DQN("MlpPolicy", env, learning_rate=float(rate), seed=seed, device="cpu")
            agent.learn(300, callback=callback)
            env.close()
            judge.close()
    return root


def test_evaluations_become_curves_of_mean_returns(runs: Path) -> None:
    table = from_sb3(runs, layout=LAYOUT)
    assert table.values("lr") == ("0.001", "0.01")
    assert len(table.frame) == 2 * 2 * 3
    run = table.select(value="0.01", seed="1").frame
    assert run["step"].tolist() == [100, 200, 300]
    with np.load(runs / "lr=0.01/CartPole-v1/1/evaluations.npz") as arrays:
        np.testing.assert_array_equal(run["score"], arrays["results"].mean(axis=1))
    assert len(table.reduce("auc").frame) == 4


def test_monitors_become_curves_of_episode_returns(runs: Path) -> None:
    from stable_baselines3.common.monitor import load_results

    table = from_sb3(runs, layout=LAYOUT, log="monitor")
    run = table.select(value="0.001", seed="0").frame
    expected = load_results(str(runs / "lr=0.001/CartPole-v1/0"))
    np.testing.assert_array_equal(run["score"], expected["r"])
    np.testing.assert_array_equal(run["step"], expected["l"].cumsum())


def test_several_monitors_of_one_run_are_merged_as_sb3_does(tmp_path: Path) -> None:
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.monitor import load_results

    for value in "12":
        folder = tmp_path / f"lr={value}" / "CartPole-v1" / "0"
        envs = make_vec_env("CartPole-v1", n_envs=2, seed=0, monitor_dir=str(folder))
        sb3.PPO("MlpPolicy", envs, n_steps=64, n_epochs=1, seed=0, device="cpu").learn(200)
        envs.close()
    run = from_sb3(tmp_path, layout=LAYOUT, log="monitor").select(value="2").frame
    expected = load_results(str(tmp_path / "lr=2/CartPole-v1/0"))
    np.testing.assert_array_equal(run["score"], expected["r"])


def copied(runs: Path, tmp_path: Path, name: str) -> Path:
    for value in ("1", "2"):
        to = tmp_path / f"lr={value}" / "A" / "0" / name
        to.parent.mkdir(parents=True)
        to.write_bytes((runs / "lr=0.01/CartPole-v1/0" / name).read_bytes())
    return tmp_path / "lr=2/A/0" / name


def read(tmp_path: Path, log: str) -> Table:
    return from_sb3(tmp_path, layout=LAYOUT, log=log)


def test_a_run_without_an_episode_is_a_failed_run(runs: Path, tmp_path: Path) -> None:
    file = copied(runs, tmp_path, "monitor.csv")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    table = read(tmp_path, "monitor")
    assert table.select(value="2").frame["score"].isna().tolist() == [True]
    assert "1 runs logged nothing" in table.notes[0]


def test_a_torn_monitor_is_refused_with_its_line(runs: Path, tmp_path: Path) -> None:
    file = copied(runs, tmp_path, "monitor.csv")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]) + "12.0,1")
    with pytest.raises(SourceFormatError, match="line 5: 2 cells under 3"):
        read(tmp_path, "monitor")


@pytest.mark.parametrize(("name", "log"), [("monitor.csv", "monitor"), ("evaluations.npz", "e")])
def test_an_empty_log_is_refused_by_name(runs: Path, tmp_path: Path, name: str, log: str) -> None:
    copied(runs, tmp_path, name).write_bytes(b"")
    with pytest.raises(EmptyInputError, match=name):
        read(tmp_path, "monitor" if log == "monitor" else "evaluations")


def test_another_npz_is_refused(runs: Path, tmp_path: Path) -> None:
    file = copied(runs, tmp_path, "evaluations.npz")
    np.savez(file, timesteps=np.arange(3), results=np.array([[1], [2, 3]], dtype=object))
    with pytest.raises(SourceFormatError, match=r"evaluations\.npz"):
        read(tmp_path, "evaluations")
    np.savez(file, other=np.arange(3))
    with pytest.raises(SourceFormatError, match="timesteps"):
        read(tmp_path, "evaluations")


def test_an_unknown_log_is_refused(runs: Path) -> None:
    with pytest.raises(ValueError, match="evaluations"):
        read(runs, "progress")
