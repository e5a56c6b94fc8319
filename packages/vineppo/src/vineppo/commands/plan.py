"""``vineppo train --dry-run``: what a recipe will do, cost and need, before a weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from rich.table import Table

from vineppo.commands.data import absent, chain_of, evaluation_rows, rewards_of, train_rows
from vineppo.commands.machine import (
    Weights,
    config_of,
    lacks,
    model_is_here,
    packages_of,
    tokenizer_of,
    weights_of,
)
from vineppo.commands.recipe import Recipe
from vineppo.commands.sections import ChainArithmeticTask, DatasetTask, GSM8KTask
from vineppo.config import PolicyGradientConfig, PPOConfig, RestEMConfig, VinePPOConfig
from vineppo.dataset import Prompts
from vineppo.errors import InvalidInputError
from vineppo.segmenters import (
    FixedLengthSegmenter,
    Segmenter,
    WholeResponseSegmenter,
    make_segmenter,
)

_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
_GIB: Final = 2**30
_LITTLE: Final = 4 * _GIB  # below it, a model trains on a CPU
_LOOKED_AT: Final = 2000  # rows whose prompts and solutions are measured


@dataclass(frozen=True)
class Plan:
    """The numbers of a run.

    Attributes:
        recipe: what is planned.
        rows: to train on.
        evaluation_rows: to evaluate on; None where nothing is.
        weights: of the model; None where nobody can tell.
        prompt_tokens: of the longest prompts and in the mean; None without a tokenizer.
        solution_steps: mean steps of the task's own solutions; None where there are none.
        missing: what a run needs and this machine lacks.
    """

    recipe: Recipe
    rows: int
    evaluation_rows: int | None
    weights: Weights | None
    prompt_tokens: tuple[int, float] | None
    solution_steps: float | None
    missing: Sequence[str] = field(default_factory=tuple)

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps; at most so many where answers are sorted out first."""
        config = self.recipe.training
        units = config.episodes_per_iteration
        if self.recipe.method == "dpo_positive":
            pairs = (config.num_generations // 2) * -(-config.num_generations // 2)
            units = config.prompts_per_iteration * min(
                pairs, getattr(config, "max_pairs_per_prompt", pairs)
            )
        return config.num_epochs * -(-units // config.mini_batch_size)

    @property
    def most_states(self) -> int | None:
        """States of one answer that are rolled out, at most; None without rollouts."""
        config = self.recipe.training
        if not isinstance(config, VinePPOConfig):
            return None
        segmenter = make_segmenter(config.segmenter)
        most = config.max_response_tokens  # a step has a token
        if isinstance(segmenter, WholeResponseSegmenter):
            most = 1
        elif isinstance(segmenter, FixedLengthSegmenter):
            most = -(-most // segmenter.tokens)
        return min(most, config.max_value_steps or most)

    def rollouts(self, states: float) -> float:
        """Rollouts of an iteration when every answer has so many states.

        Answers to one prompt share their first state, the prompt.
        """
        config = self.recipe.training
        assert isinstance(config, VinePPOConfig)
        different = config.prompts_per_iteration + config.episodes_per_iteration * (states - 1)
        return different * config.num_rollouts

    def memory(self) -> dict[str, float]:
        """Bytes of the learner by what holds them; empty where the model's size is not known."""
        if self.weights is None:
            return {}
        recipe, config = self.recipe, self.recipe.training
        one = _BYTES[recipe.model.dtype]
        size = float(self.weights.policy * one)
        found = {"policy": size}
        if recipe.peft is None:
            found |= {"gradients": size, "AdamW": 2 * size}
            if not isinstance(config, RestEMConfig):
                found["reference"] = size
            elif config.restart:
                found["weights to restart from"] = size
        critic = self.critic_memory()
        if isinstance(config, PPOConfig) and config.constant_value is None:
            found["critic"] = critic if config.critic == "copy" else 0.0
        return found

    def critic_memory(self) -> float:
        """Bytes of PPO's critic: weights, gradients and two moments of a copy of the model."""
        assert self.weights is not None
        return 4.0 * self.weights.trunk * _BYTES[self.recipe.model.dtype]


def plan_of(recipe: Recipe) -> Plan:
    """Check everything about a recipe but the weights, and count.

    Raises:
        InvalidInputError: something does not fit; with the key.
        MissingExtraError: a package that the check itself needs is not installed.
    """
    recipe.check_parts()
    if isinstance(recipe.task, DatasetTask):
        rewards_of(recipe)
    if isinstance(recipe.task, ChainArithmeticTask):
        chain_of(recipe.task)
    missing = [f"the package {name}" for name in packages_of(recipe) if lacks(name)]
    task, wanted = recipe.task, recipe.evaluation
    rows: list[dict[str, Any]] = []
    if (lacking := absent(recipe)) is None:
        rows = train_rows(recipe)
        count = len(rows)
    else:
        count = _assumed("task", task, lacking)
        missing.append(f"{lacking}: {count:,} rows are assumed")
    evaluated = None
    held_out: list[dict[str, Any]] = []
    if wanted is not None:
        if (lacking := absent(recipe, wanted)) is None:
            held_out = evaluation_rows(recipe, wanted)
            evaluated = len(held_out)
        else:
            evaluated = _assumed("evaluation", wanted, lacking)
            missing.append(f"{lacking}: {evaluated:,} rows to evaluate on are assumed")
    if not model_is_here(recipe):
        missing.append(f"the model {recipe.model.path}")
    config, tokenizer = config_of(recipe), tokenizer_of(recipe)
    lengths = None
    if tokenizer is not None and rows:
        lengths = _lengths(recipe, rows, held_out, tokenizer, config)
    found = Plan(
        recipe, count, evaluated, weights_of(recipe, config), lengths, _solution_steps(recipe, rows)
    )
    return Plan(**{**vars(found), "missing": (*missing, *_missing_device(found))})


def table(plan: Plan) -> Table:
    """The plan for people."""
    shown = Table(title="Dry run", title_justify="left", show_header=False)
    shown.add_column(style="bold")
    shown.add_column()
    for name, text in _lines(plan):
        shown.add_row(name, text)
    return shown


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    recipe, config = plan.recipe, plan.recipe.training
    yield "method", recipe.method
    yield "model", _model_text(plan)
    tokens = ""
    if plan.prompt_tokens is not None:
        tokens = (
            f"; {plan.prompt_tokens[1]:.0f} tokens in the mean, at most {plan.prompt_tokens[0]}"
        )
    yield "prompts", f"{plan.rows:,} to train on{tokens}"
    if plan.evaluation_rows is not None:
        samples = config.eval_samples if config.eval_temperature > 0 else 1
        yield "", f"{plan.evaluation_rows:,} to evaluate on, {_n(samples, 'answer')} each"
    prompts = config.iterations * config.prompts_per_iteration
    yield (
        "an iteration",
        f"{_n(config.prompts_per_iteration, 'prompt')} × {config.num_generations} = "
        f"{_n(config.episodes_per_iteration, 'episode')} of up to "
        f"{_n(config.max_response_tokens, 'token')}",
    )
    sorted_out = isinstance(config, PolicyGradientConfig)
    most = "" if sorted_out else "at most "
    yield "", f"{most}{_n(plan.steps_per_iteration, 'optimizer step')}"
    if plan.most_states is not None and isinstance(config, VinePPOConfig):
        yield from _rollout_lines(plan, config)
    yield (
        "the run",
        f"{_n(config.iterations, 'iteration')}: "
        f"{_n(config.iterations * config.episodes_per_iteration, 'episode')}, {most}"
        f"{_n(config.iterations * plan.steps_per_iteration, 'optimizer step')}, "
        f"{prompts / plan.rows:.3g} passes over the prompts",
    )
    yield "rollouts by", _backend_text(recipe)
    yield from _memory_lines(plan)
    yield "folder", str(recipe.output_dir)
    yield "needs", ", ".join([*packages_of(recipe), *(["a GPU"] if _needs_gpu(plan) else [])])
    yield "missing here", "\n".join(plan.missing) or "nothing"


def _rollout_lines(plan: Plan, config: VinePPOConfig) -> Iterator[tuple[str, str]]:
    assert plan.most_states is not None
    most = plan.rollouts(plan.most_states)
    yield (
        "rollouts",
        f"K = {config.num_rollouts}, at most {_n(plan.most_states, 'state')} an answer: up to "
        f"{most:,.0f} an iteration",
    )
    if plan.solution_steps is not None:
        steps = min(plan.solution_steps, plan.most_states)
        yield (
            "",
            f"about {plan.rollouts(steps):,.0f}, if answers have the {steps:.1f} steps of the "
            "solutions in the data",
        )


def _memory_lines(plan: Plan) -> Iterator[tuple[str, str]]:
    parts = plan.memory()
    if not parts:
        yield "learner memory", "not known: the model is not here; model.parameters would tell"
        return
    told = " + ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    adapter = "" if plan.recipe.peft is None else ", and the adapter with its moments"
    yield "learner memory", f"{_size(sum(parts.values()))}: {told}"
    yield "", f"activations and logits come on top{adapter}"
    critic = _size(plan.critic_memory())
    config = plan.recipe.training
    if not isinstance(config, PPOConfig) or config.constant_value is not None:
        yield "critic", f"none; PPO's copy of the model would take {critic} more"
    elif config.critic == "copy":
        yield "critic", f"{critic} of this; VinePPO has none"
    else:
        yield "critic", f"a head on the policy itself; a copy of the model would take {critic}"


def _model_text(plan: Plan) -> str:
    model = plan.recipe.model
    name = "tiny, fine-tuned on the task" if model.path is None else model.path
    size = "" if plan.weights is None else f", {plan.weights.policy:,} parameters"
    adapter = "" if plan.recipe.peft is None else ", with a LoRA adapter"
    return f"{name}{size}, {model.dtype}{adapter}"


def _backend_text(recipe: Recipe) -> str:
    kind, options = recipe.rollouts.kind, recipe.rollouts.options
    if kind == "servers":
        return f"{_n(len(options['urls']), 'vLLM server')}: {', '.join(options['urls'])}"
    if kind == "ray":
        return f"{_n(options.get('actors', 2), 'Ray actor')}"
    return {"transformers": "the model itself", "vllm": "vLLM in the same process"}[kind]


def _n(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _size(size: float) -> str:
    return f"{size / _GIB:.3g} GiB" if size >= _GIB else f"{size / 2**20:.3g} MiB"


# --- data and device -----------------------------------------------------------------------------


def _needs_gpu(plan: Plan) -> bool:
    if plan.recipe.training.use_cpu:
        return False
    large = sum(plan.memory().values()) > _LITTLE
    return large or plan.recipe.rollouts.kind == "vllm"


def _missing_device(plan: Plan) -> list[str]:
    import torch

    if not _needs_gpu(plan):
        return []
    if not torch.cuda.is_available():
        return ["a GPU"]
    has = torch.cuda.get_device_properties(0).total_memory
    needs = sum(plan.memory().values())
    return [f"{_size(needs - has)} of memory on the GPU"] if needs > has else []


def _assumed(section: str, wanted: Any, lacking: str) -> int:
    rows: int | None = wanted.rows
    if rows is None:
        raise InvalidInputError(
            f"{section}.path: {lacking} is not here; give it, or {section}.rows, which a dry run "
            "then believes"
        )
    return min(rows, wanted.examples or rows)


def _lengths(
    recipe: Recipe,
    rows: list[dict[str, Any]],
    held_out: list[dict[str, Any]],
    tokenizer: Any,
    config: Any,
) -> tuple[int, float]:
    """Longest and mean prompt, in tokens; prompts that do not fit are refused."""
    positions = None
    if isinstance(recipe.task, ChainArithmeticTask) and recipe.model.path is None:
        positions = chain_of(recipe.task)._positions  # of the model that it makes
    if config is not None:
        text = config.get_text_config(decoder=True)
        positions = getattr(text, "max_position_embeddings", None)
    most = recipe.training.max_response_tokens
    found = Prompts("task", rows, tokenizer, positions, most)
    if held_out:
        Prompts("evaluation", held_out, tokenizer, positions, most)
    lengths = [len(ids) for ids in found.ids]
    return max(lengths), float(np.mean(lengths))


def _solution_steps(recipe: Recipe, rows: list[dict[str, Any]]) -> float | None:
    config = recipe.training
    if not isinstance(config, VinePPOConfig) or not rows:
        return None
    if not isinstance(recipe.task, ChainArithmeticTask | GSM8KTask):
        return None
    segmenter = make_segmenter(config.segmenter)
    if not isinstance(segmenter, Segmenter):
        return None
    return float(
        np.mean([len(segmenter.segment(row["solution"])) - 1 for row in rows[:_LOOKED_AT]])
    )
