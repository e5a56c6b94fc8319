from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from hpreliability.errors import MissingExtraError
from hpreliability.integrations.sb3_dqn import DQNConfig, agent, evaluate, example_sweep, train
from hpreliability.sweep import Sweep, SweepSpec

pytest.importorskip("stable_baselines3")
gymnasium = pytest.importorskip("gymnasium")

SMALL = {"learning_starts": 50, "evaluate_every": 300, "evaluation_episodes": 5}


def test_the_same_seed_gives_the_same_scores_and_another_seed_others() -> None:
    config = {**SMALL, "learning_rate": 1e-2, "evaluate_every": 50}
    one = train(config, "CartPole-v1", seed=1, budget=400)
    assert len(one) == 8
    assert one == train(config, "CartPole-v1", seed=1, budget=400)
    assert one != train(config, "CartPole-v1", seed=2, budget=400)


def test_a_short_run_is_the_beginning_of_a_long_one() -> None:
    # 302 is inside a rollout of train_freq steps, before which exploration has not ended either.
    short = train(SMALL, "CartPole-v1", seed=3, budget=302)
    long = train({**SMALL, "evaluate_every": 151}, "CartPole-v1", seed=3, budget=604)
    assert [step for step, _ in short] == [300, 302]
    assert short[-1] in long


def test_every_hyperparameter_reaches_the_agent() -> None:
    settings = DQNConfig(
        learning_rate=2e-2,
        gamma=0.5,
        n_steps=7,
        target_update_interval=3,
        batch_size=8,
        buffer_size=60,
        learning_starts=200,
        train_freq=5,
        gradient_steps=9,
        exploration_steps=100,
        exploration_final=0.25,
        max_grad_norm=1e-3,
        hidden_layers=3,
        hidden_units=11,
    )
    model = agent(settings, "CartPole-v1", seed=13, budget=400)
    assert model.seed == 13
    assert model.policy.optimizer.param_groups[0]["lr"] == settings.learning_rate
    assert (model.gamma, model.replay_buffer.gamma) == (settings.gamma, settings.gamma)
    assert model.replay_buffer.n_steps == settings.n_steps
    assert model.target_update_interval == settings.target_update_interval
    assert model.batch_size == settings.batch_size
    assert model.replay_buffer.buffer_size == settings.buffer_size
    assert model.learning_starts == settings.learning_starts
    assert model.train_freq.frequency == settings.train_freq
    assert model.gradient_steps == settings.gradient_steps
    # The schedule takes the share of the run that is left: at step 50 of 400, 350/400.
    assert model.exploration_schedule(350 / 400) == pytest.approx((1 + 0.25) / 2)
    assert model.exploration_schedule(299 / 400) == settings.exploration_final
    assert model.max_grad_norm == settings.max_grad_norm
    widths = [p.shape[0] for name, p in model.q_net.named_parameters() if "weight" in name]
    assert widths == [11, 11, 11, 2]


class Constant:
    """Always the same action."""

    def predict(self, observations: np.ndarray, deterministic: bool) -> tuple[np.ndarray, None]:
        assert deterministic
        return np.zeros(len(observations), dtype=np.int64), None


def test_the_score_is_the_mean_return_of_episodes_that_the_seed_fixes() -> None:
    returns = []
    for seed in range(10):
        world = gymnasium.make("CartPole-v1")
        world.reset(seed=seed)
        steps = 1
        while not world.step(0)[2]:
            steps += 1
        returns.append(steps)
    assert len(set(returns)) > 1
    assert evaluate(Constant(), "CartPole-v1", 10) == np.mean(returns)
    assert evaluate(Constant(), "CartPole-v1", 4, seed=6) == np.mean(returns[6:])


@pytest.mark.slow
@pytest.mark.parametrize(("env", "above"), [("CartPole-v1", 150.0), ("Acrobot-v1", -250.0)])
def test_the_defaults_learn(env: str, above: float) -> None:
    points = train({"evaluate_every": 20_000}, env, seed=0, budget=20_000)
    assert points[-1][1] > above


def test_it_learns_to_balance_longer_than_chance_within_a_few_thousand_steps() -> None:
    # A random policy balances for about 22 steps.
    points = train({"exploration_steps": 1_000}, "CartPole-v1", seed=0, budget=3_000)
    assert points[-1][1] > 40


def test_a_real_sweep_ends_in_a_table(tmp_path: Path) -> None:
    spec = SweepSpec(
        name="tiny",
        base={**SMALL, "evaluate_every": 100, "learning_rate": 1e-3},
        hyperparameters={"learning_rate": [1e-3, 1e-4]},
        contexts={"env": ["CartPole-v1", "MountainCar-v0"]},
        budgets=[100, 200],
        seeds=1,
        checkpoints=True,
    )
    sweep = Sweep(spec, tmp_path)
    report = sweep.run(train, n_jobs=2, progress=False)
    report.raise_if_failed()
    table = sweep.results()
    assert len(table.frame) == 2 * 2 * 2
    assert table.frame["score"].between(-500, 500).all()
    # The worker process computes what this one does.
    trial = sweep.trials()[0]
    here = dict(train(trial.config, trial.contexts["env"], trial.seed, trial.budget))
    there = table.select(value="0.001", env=trial.contexts["env"], budget="200").frame["score"]
    assert there.tolist() == [here[200]]


@pytest.mark.parametrize("profile", ["quick", "standard"])
def test_the_sweeps_in_the_package_ask_for_what_train_can_give(
    profile: Literal["quick", "standard"],
) -> None:
    sweep = example_sweep(profile)
    assert len(sweep.spec.seed_indices) >= 3
    assert len(sweep.spec.all_budgets) == 2
    assert sweep.spec.checkpoints
    assert sweep.jobs(train)
    for trial in sweep.trials():
        settings = DQNConfig(**trial.config)
        assert all(budget % settings.evaluate_every == 0 for budget in sweep.spec.all_budgets)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"learning_rat": 1e-3}, "unknown .*learning_rat"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0"),
        ({"gamma": 1.5}, "gamma"),
    ],
)
def test_a_bad_config_is_refused_before_training(config: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(config, "CartPole-v1", seed=0, budget=100)


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)  # what Python takes for absent
    with pytest.raises(MissingExtraError, match=r"hpreliability\[sb3\]"):
        train({}, "CartPole-v1", seed=0, budget=100)
