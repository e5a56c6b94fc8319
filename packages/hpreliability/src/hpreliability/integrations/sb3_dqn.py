"""Stable-Baselines3's DQN on gymnasium's classic control, as a `train` function for a sweep.

Everything counts in environment steps, and nothing depends on how long the run is (exploration
decays over `exploration_steps`, not over a share of the run): the first 3,000 steps of a run of
9,000 are a run of 3,000. One run can so serve several budgets; see `SweepSpec.checkpoints`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hpreliability.errors import MissingExtraError
from hpreliability.sweep import Sweep


@dataclass(frozen=True)
class DQNConfig:
    """Everything that can be swept.

    The defaults learn CartPole-v1 and Acrobot-v1 well above chance within 20,000 steps and a few
    seconds on one core; they are not tuned further.

    Attributes:
        learning_rate: of Adam.
        gamma: discount.
        n_steps: horizon of the bootstrapped return.
        target_update_interval: environment steps between copies to the target network.
        batch_size: transitions per gradient step.
        buffer_size: transitions kept for replay.
        learning_starts: environment steps before the first gradient step.
        train_freq: environment steps between updates.
        gradient_steps: gradient steps per update.
        exploration_steps: environment steps over which the share of random actions falls from 1.
        exploration_final: the share that it falls to.
        max_grad_norm: gradients are clipped to this norm.
        hidden_layers: number of hidden layers.
        hidden_units: units in each.
        evaluate_every: environment steps between evaluations; the end is always evaluated.
        evaluation_episodes: greedy episodes per evaluation, whose mean return is the score. All
            runs are evaluated on the same episodes' initial states.

    Raises:
        ValueError: a field is out of range.
    """

    learning_rate: float = 1e-3
    gamma: float = 0.99
    n_steps: int = 5
    target_update_interval: int = 250
    batch_size: int = 64
    buffer_size: int = 50_000
    learning_starts: int = 500
    train_freq: int = 4
    gradient_steps: int = 1
    exploration_steps: int = 3_000
    exploration_final: float = 0.1
    max_grad_norm: float = 10.0
    hidden_layers: int = 2
    hidden_units: int = 64
    evaluate_every: int = 5_000
    evaluation_episodes: int = 20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name in ("learning_starts", "gamma", "exploration_final") else None
            if value < 0 or (least is None and value == 0):
                raise ValueError(f"{name}: expected a number above 0, got {value!r}")
        if self.gamma > 1 or self.exploration_final > 1:
            raise ValueError(
                f"gamma, exploration_final: expected at most 1, got {self.gamma}, "
                f"{self.exploration_final}"
            )


def train(config: Mapping[str, Any], env: str, seed: int, budget: int) -> list[tuple[int, float]]:
    """Train one DQN and evaluate it as it learns.

    The same arguments give the same scores on the same machine and versions. Torch is set to one
    thread for this process.

    Args:
        config: fields of `DQNConfig` that differ from its defaults.
        env: id of a gymnasium environment with discrete actions and vector observations.
        seed: of initialisation, exploration and replay, in [0, 2**32).
        budget: environment steps.

    Returns:
        Points (environment steps, mean return of the evaluation episodes).

    Raises:
        ValueError: an unknown or bad entry of `config`, or `budget < 1`.
        MissingExtraError: without the extra `[sb3]`.
    """
    settings = _settings(config)
    if budget < 1:
        raise ValueError(f"budget: expected at least one environment step, got {budget}")
    model = agent(settings, env, seed, budget)
    points: list[tuple[int, float]] = []

    def after_step(_locals: Mapping[str, Any], _globals: Mapping[str, Any]) -> bool:
        step = int(model.num_timesteps)
        if step % settings.evaluate_every == 0 or step == budget:
            points.append((step, evaluate(model, env, settings.evaluation_episodes)))
        # A rollout of train_freq steps may end beyond the budget; the run does not.
        return step < budget

    model.learn(budget, callback=after_step, log_interval=budget + 1)
    model.get_env().close()
    return points


def agent(settings: DQNConfig, env: str, seed: int, budget: int) -> Any:
    """The untrained `stable_baselines3.DQN`, with its environment; arguments as for `train`.

    Raises:
        MissingExtraError: without the extra `[sb3]`.
    """
    if importlib.util.find_spec("stable_baselines3") is None:
        raise MissingExtraError("stable-baselines3", "sb3")
    import gymnasium
    import torch
    from stable_baselines3 import DQN

    torch.set_num_threads(1)
    return DQN(
        "MlpPolicy",
        gymnasium.make(env),
        learning_rate=settings.learning_rate,
        gamma=settings.gamma,
        n_steps=settings.n_steps,
        target_update_interval=settings.target_update_interval,
        batch_size=settings.batch_size,
        buffer_size=settings.buffer_size,
        learning_starts=settings.learning_starts,
        train_freq=settings.train_freq,
        gradient_steps=settings.gradient_steps,
        exploration_fraction=settings.exploration_steps / budget,
        exploration_final_eps=settings.exploration_final,
        max_grad_norm=settings.max_grad_norm,
        policy_kwargs={"net_arch": [settings.hidden_units] * settings.hidden_layers},
        seed=seed,
        device="cpu",
    )


def evaluate(model: Any, env: str, episodes: int, seed: int = 0) -> float:
    """Mean return of greedy episodes, whose initial states `seed` fixes.

    Args:
        model: anything with Stable-Baselines3's `predict(observations, deterministic=True)`.
        env: id of a gymnasium environment.
        episodes: how many.
        seed: of the first episode; the next have the following ones.
    """
    import gymnasium

    # Side by side, so that the network is asked once per step for all of them.
    worlds = [gymnasium.make(env) for _ in range(episodes)]
    observations = [world.reset(seed=seed + i)[0] for i, world in enumerate(worlds)]
    returns = np.zeros(episodes)
    running = list(range(episodes))
    while running:
        actions, _ = model.predict(np.stack([observations[i] for i in running]), deterministic=True)
        ended = set()
        for i, action in zip(running, actions, strict=True):
            observations[i], reward, terminated, truncated, _ = worlds[i].step(int(action))
            returns[i] += float(reward)
            if terminated or truncated:
                ended.add(i)
        running = [i for i in running if i not in ended]
    for world in worlds:
        world.close()
    return float(returns.mean())


def example_sweep(
    profile: Literal["quick", "standard"], *, directory: Path | str | None = None
) -> Sweep:
    """The sweep of this agent that comes with the package.

    `"quick"` (a minute on two cores) compares three learning rates in two environments;
    `"standard"` (under half an hour) varies four hyper-parameters. Both have two budgets and three
    seeds or more. Run them with `train`.

    Raises:
        ValueError: another profile.
        MissingExtraError: without the extra `[sb3]`.
    """
    if profile not in ("quick", "standard"):
        raise ValueError(f'profile: expected "quick" or "standard", got {profile!r}')
    with as_file(files("hpreliability") / "data" / "sweeps" / f"{profile}.yaml") as path:
        return Sweep.from_yaml(path, directory=directory)


def _settings(config: Mapping[str, Any]) -> DQNConfig:
    known = [f.name for f in fields(DQNConfig)]
    unknown = [key for key in config if key not in known]
    if unknown:
        raise ValueError(f"config: unknown {unknown}; there are: {', '.join(known)}")
    return DQNConfig(**config)
