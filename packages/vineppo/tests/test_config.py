"""Settings are those of the paper unless changed, and numbers out of range are refused by name."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vineppo.config import (
    DPOPositiveConfig,
    GRPOConfig,
    PolicyGradientConfig,
    PPOConfig,
    RestEMConfig,
    RLOOConfig,
    TrainerConfig,
    VinePPOConfig,
)
from vineppo.errors import InvalidInputError
from vineppo.schedule import rate_factor

ALL = (
    TrainerConfig, PolicyGradientConfig, VinePPOConfig, PPOConfig, RLOOConfig, GRPOConfig,
    RestEMConfig, DPOPositiveConfig,
)  # fmt: skip


def test_defaults_are_those_of_the_specification() -> None:
    """Sections 2 to 4 of the specification of arXiv 2410.01679."""
    vine, ppo = VinePPOConfig(), PPOConfig()
    for config in (vine, ppo, RLOOConfig(), GRPOConfig()):
        assert (config.iterations, config.episodes_per_iteration) == (650, 512)
        assert (config.num_generations, config.mini_batch_size, config.num_epochs) == (8, 64, 2)
        assert config.prompts_per_iteration == 64
        assert (config.temperature, config.top_p, config.max_response_tokens) == (0.6, 0.9, 1024)
        assert (config.learning_rate, config.weight_decay, config.max_grad_norm) == (1e-6, 0, 1)
        assert (config.warmup_ratio, config.lr_schedule) == (0.03, "linear")
        assert (config.beta, config.kl, config.kl_clamp) == (1e-4, "k3", 10)
        assert (config.kl_reduction, config.pg_reduction) == ("sequence_sum", "token")
        assert (config.clip_range, config.ratio_limit, config.whiten) == (0.2, 10, "batch")
        assert (config.eval_temperature, config.eval_top_p, config.eval_samples) == (0.35, 0.9, 16)
        assert config.unfinished_score == 0
    assert (vine.num_rollouts, vine.gamma, vine.lam, vine.max_value_steps) == (9, 1, 0, None)
    assert (ppo.gamma, ppo.lam, ppo.value_clip_range, ppo.critic) == (1, 1, 0.2, "copy")
    rest, dpo = RestEMConfig(), DPOPositiveConfig()
    assert (rest.iterations, rest.num_epochs, rest.temperature) == (10, 8, 0.6)
    assert (dpo.iterations, dpo.num_generations, dpo.num_epochs) == (1, 64, 3)
    assert (dpo.dpo_beta, dpo.dpo_lambda, dpo.max_pairs_per_prompt) == (0.1, 50, 64)


BAD: list[tuple[type[TrainerConfig], str, Any]] = [
    *((TrainerConfig, name, bad)
      for name in ("iterations", "episodes_per_iteration", "num_generations", "mini_batch_size",
                   "micro_batch_size", "num_epochs", "max_response_tokens", "eval_samples",
                   "log_every", "save_total_limit")
      for bad in (0, -1, 2.0, True, "3")),
    *((TrainerConfig, name, bad) for name in ("eval_every", "save_every", "seed")
      for bad in (-1, 0.5)),
    *((TrainerConfig, name, bad) for name in ("learning_rate", "max_grad_norm", "adam_epsilon")
      for bad in (0, -1e-6, math.nan)),
    *((TrainerConfig, "temperature", bad) for bad in (0, -1, math.inf, math.nan)),
    *((TrainerConfig, name, bad) for name in ("top_p", "eval_top_p") for bad in (0, 1.1, math.nan)),
    (TrainerConfig, "weight_decay", -0.1),
    (TrainerConfig, "weight_decay", math.nan),
    (TrainerConfig, "eval_temperature", -0.1),
    (TrainerConfig, "warmup_ratio", 1.5),
    (TrainerConfig, "lr_schedule", "polynomial"),
    (TrainerConfig, "mixed_precision", "fp8"),
    (TrainerConfig, "unfinished_score", math.inf),
    (TrainerConfig, "stop", "Problem:"),
    (TrainerConfig, "report_to", "tensorboard"),
    (TrainerConfig, "reward_weights", (1.0, math.nan)),
    (TrainerConfig, "adam_betas", (0.9,)),
    (TrainerConfig, "adam_betas", (0.9, 1.0)),
    (TrainerConfig, "adam_betas", (-0.1, 0.9)),
    *((PolicyGradientConfig, name, bad) for name in ("clip_range", "kl_clamp", "ratio_limit")
      for bad in (0, -1, math.nan)),
    (PolicyGradientConfig, "beta", -1e-4),
    (PolicyGradientConfig, "whiten", "tokens"),
    (PolicyGradientConfig, "kl", "k4"),
    (PolicyGradientConfig, "kl", "k1"),
    (PolicyGradientConfig, "pg_reduction", "sum"),
    (PolicyGradientConfig, "kl_reduction", "sequence"),
    *((VinePPOConfig, "num_rollouts", bad) for bad in (0, -3, 1.5, True)),
    (VinePPOConfig, "max_value_steps", 0),
    (VinePPOConfig, "adaptive_pilot", 1),
    (VinePPOConfig, "adaptive_pilot", 9),
    *((kind, name, bad) for kind in (VinePPOConfig, PPOConfig) for name in ("gamma", "lam")
      for bad in (-0.1, 1.1, math.nan)),
    (PPOConfig, "critic", "both"),
    (PPOConfig, "critic_learning_rate", 0),
    (PPOConfig, "value_clip_range", 0),
    (PPOConfig, "value_coefficient", -1),
    (PPOConfig, "constant_value", math.nan),
    (RestEMConfig, "validation_share", 1.0),
    (RestEMConfig, "max_correct_per_prompt", 0),
    (DPOPositiveConfig, "dpo_beta", 0),
    (DPOPositiveConfig, "dpo_lambda", -1),
    (DPOPositiveConfig, "max_pairs_per_prompt", 0),
    *((kind, "num_generations", 1) for kind in (RLOOConfig, GRPOConfig, DPOPositiveConfig)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "value"), BAD)
def test_numbers_out_of_range_are_refused_by_name(
    kind: type[TrainerConfig], name: str, value: Any
) -> None:
    with pytest.raises(InvalidInputError, match=f"^{name}: "):
        kind(**{name: value})


def test_numbers_must_fit_together() -> None:
    with pytest.raises(InvalidInputError, match="episodes_per_iteration: expected a multiple of"):
        TrainerConfig(episodes_per_iteration=10, num_generations=4)
    assert TrainerConfig(episodes_per_iteration=12, num_generations=4).prompts_per_iteration == 3
    PolicyGradientConfig(kl="k1", beta=0)  # as a mere metric it does no harm


@pytest.mark.parametrize("kind", ALL)
def test_settings_survive_json_and_do_not_change(kind: type[TrainerConfig]) -> None:
    config = kind(stop=["Problem:"], adam_betas=[0.8, 0.9])
    assert (config.stop, config.adam_betas) == (("Problem:",), (0.8, 0.9))
    assert kind(**json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("kind", ALL)
def test_every_setting_is_documented(kind: type[TrainerConfig]) -> None:
    for cls in kind.__mro__:
        for name in inspect.get_annotations(cls):
            assert f"\n        {name}: " in (cls.__doc__ or ""), f"{cls.__name__}.{name}"


def test_what_is_shown_is_no_part_of_the_result() -> None:
    base = VinePPOConfig()
    assert base.result_settings() == VinePPOConfig(
        output_dir="elsewhere", save_every=3, log_every=5, report_to=("wandb",), progress=False,
        eval_every=2, eval_samples=1, use_cpu=True, save_total_limit=2, run_name="it",
    ).result_settings()  # fmt: skip
    for changes in ({"seed": 1}, {"num_rollouts": 3}, {"temperature": 1.0}, {"stop": ("x",)}):
        assert base.result_settings() != VinePPOConfig(**changes).result_settings()  # type: ignore[arg-type]
    assert base.result_settings() == json.loads(json.dumps(base.result_settings()))


def test_rates_rise_linearly_and_fall_to_0() -> None:
    assert [rate_factor(p, "linear", 0.5) for p in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.5, 0]
    assert [rate_factor(p, "constant", 0.5) for p in (0.25, 0.5, 1)] == [0.5, 1, 1]
    cosine = [rate_factor(p, "cosine", 0.0) for p in (0, 0.25, 0.5, 1)]
    assert cosine == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, 0])
    assert rate_factor(1.0, "linear", 1.0) == 1
    assert rate_factor(0.0, "linear", 0.0) == 1


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["linear", "cosine", "constant"]))
def test_rates_are_shares_of_their_peak(progress: float, warmup: float, schedule: Any) -> None:
    assert 0 <= rate_factor(progress, schedule, warmup) <= 1
