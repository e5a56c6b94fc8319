"""What a recipe will do, in numbers, before a weight is loaded: `asyncrlhf train --dry-run`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.table import Table

from asyncrlhf import losses
from asyncrlhf.commands.building import load_function, read_rows, synthetic_task
from asyncrlhf.commands.parts import addresses
from asyncrlhf.commands.recipe import Recipe, is_function
from asyncrlhf.commands.sections import TINY, SyntheticTask, Timing
from asyncrlhf.commands.simulation import timelines
from asyncrlhf.errors import InvalidInputError
from asyncrlhf.schedule import RoundSchedule, Timeline

if TYPE_CHECKING:
    from asyncrlhf.config import AsyncRLHFConfig
    from asyncrlhf.settings import Scoring

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_GIB = 2**30
# Where no pilot was measured, a picture of the schedule at stages that take equally long.
_EQUAL = Timing(generate=1.0, train=1.0)


@dataclass(frozen=True)
class Plan:
    """The numbers of a run.

    Attributes:
        recipe: what is planned.
        args: its settings.
        schedule: N, T, D.
        rows: of the training data.
        rows_assumed: whether the data is not at hand, and ``task.limit`` was believed.
        prompts_per_step: B, over all learner processes.
        rounds: of the whole run.
        parameters: of the model; None where nobody can tell.
    """

    recipe: Recipe
    args: AsyncRLHFConfig
    schedule: RoundSchedule
    rows: int
    rows_assumed: bool
    prompts_per_step: int
    rounds: int
    parameters: int | None

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.rounds * self.schedule.steps_per_round

    @property
    def prompts(self) -> int:
        """Prompts that are generated for, counting repetitions."""
        return self.rounds * self.schedule.minibatches * self.prompts_per_step

    @property
    def timing(self) -> Timing:
        """Seconds a round; where the recipe has none, one unit each for generation and training."""
        return self.recipe.timing or _EQUAL

    def timelines(self) -> list[Timeline]:
        """The run synchronously and as planned."""
        seconds, schedule = self.timing, self.schedule
        return timelines(
            g=seconds.generate,
            r=seconds.score,
            t=seconds.train,
            w=seconds.publish,
            ahead=[schedule.ahead],
            rounds=self.rounds,
            minibatches=schedule.minibatches,
            epochs=schedule.epochs,
            stages=cast("Scoring", self.args.scoring),
        )

    def memory(self) -> dict[str, float]:
        """Bytes by what holds it; empty where the number of parameters is not known."""
        if self.parameters is None:
            return {}
        size = float(self.parameters * _BYTES[self.recipe.model.dtype])
        found = {"policy": size}
        if self.recipe.peft is None:
            found |= {"gradients": size, "AdamW moments": 2 * size, "reference": size}
        if losses.INFO[self.args.loss].needs_critic:
            found["critic with gradients and moments"] = 4 * size
        return found


def plan(recipe: Recipe) -> Plan:
    """Check everything about a recipe but the weights, and count.

    Raises:
        InvalidInputError: something does not fit; with the key.
        MissingExtraError: a package that it needs is not installed.
    """
    import torch

    args = recipe.settings(on_cpu=not torch.cuda.is_available())
    recipe.check_parts()
    synthetic_task(recipe)
    for reward in recipe.rewards:
        _check_reward(reward)
    rows, assumed = _rows(recipe)
    schedule = args.schedule()
    per_step = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * recipe.processes
    )
    rounds = _rounds(args, schedule, rows, per_step)
    return Plan(recipe, args, schedule, rows, assumed, per_step, rounds, _parameters(recipe))


def table(found: Plan) -> Table:
    """The plan for people."""
    shown = Table(title="Plan", title_justify="left", show_header=False)
    shown.add_column(style="bold")
    shown.add_column()
    for name, text in _lines(found):
        shown.add_row(name, text)
    return shown


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    recipe, args, schedule = plan.recipe, plan.args, plan.schedule
    n, t, d = schedule.minibatches, schedule.epochs, schedule.ahead
    k = args.num_generations
    yield "model", _model_text(plan)
    assumed = ", assumed: the file is not here" if plan.rows_assumed else ""
    yield "data", f"{plan.rows:,} prompts{assumed}"
    scorer = "the learner" if args.scoring == "learner" else "a process of its own"
    yield "rewards", f"{', '.join(recipe.rewards)}; scored by {scorer}"
    rate = f"{args.learning_rate:g} ({args.lr_scheduler_type.value})"
    yield "loss", f"{args.loss}, learning rate {rate}"
    b = plan.prompts_per_step
    yield (
        "a step",
        f"{b:,} prompts × {k} = {_n(b * k, 'completion')} of up to {args.max_completion_length} "
        f"tokens at temperature {args.temperature:g}",
    )
    yield (
        "",
        f"({_n(args.per_device_train_batch_size, 'prompt')} × "
        f"{_n(args.gradient_accumulation_steps, 'part')} × "
        f"{_n(recipe.processes, 'learner process', 'es')})",
    )
    yield (
        "a round",
        f"{_n(n, 'minibatch', 'es')} × {_n(t, 'epoch')} = {_n(n * t, 'step')}; generation runs "
        f"{_n(d, 'round')} ahead",
    )
    yield (
        "the run",
        f"{_n(plan.rounds, 'round')}, {_n(plan.steps, 'step')}, {_n(plan.prompts, 'prompt')}, "
        f"{_n(plan.prompts * k, 'completion')}",
    )
    if d < args.rounds_ahead:
        yield "", f"{d} instead of {_n(args.rounds_ahead, 'round')} ahead, to keep max_staleness"
    limit = "" if args.max_staleness is None else f"; limit {args.max_staleness}: {_policy(args)}"
    mean, most = schedule.mean_staleness, schedule.max_staleness
    yield "staleness", f"mean {mean:g}, at most {_n(most, 'optimizer step')}{limit}"
    yield "devices", _devices(recipe)
    memory = plan.memory()
    if memory:
        parts = " + ".join(f"{name} {_size(size)}" for name, size in memory.items())
        yield "learner memory", f"{_size(sum(memory.values()))} a process: {parts}"
        yield (
            "",
            "activations and logits come on top"
            + (", and the adapter" if recipe.peft is not None else ""),
        )
        if recipe.transport.kind != "directory" and recipe.peft is None:
            slots = max(2, d + 1)
            yield "shared memory", f"{_size(slots * memory['policy'])} for {slots} versions"
    else:
        yield "learner memory", "unknown: the model is not here; model.parameters would tell"
    yield "folder", str(recipe.output_dir)


def _n(count: int, noun: str, plural: str = "s") -> str:
    return f"{count:,} {noun}{'' if count == 1 else plural}"


def _size(size: float) -> str:
    return f"{size / _GIB:.3g} GiB" if size >= _GIB else f"{size / 2**20:.3g} MiB"


def _policy(args: AsyncRLHFConfig) -> str:
    return "others are dropped" if args.stale_policy == "drop" else "kept by running less far ahead"


def _model_text(plan: Plan) -> str:
    model = plan.recipe.model
    size = "" if plan.parameters is None else f", {plan.parameters:,} parameters"
    adapter = "" if plan.recipe.peft is None else ", LoRA adapter"
    return f"{model.path} in {model.dtype}{size}{adapter}"


def _devices(recipe: Recipe) -> str:
    kind = "CPU" if recipe.args.get("use_cpu") else "GPU"
    where = f"{_n(recipe.processes, 'learner process', 'es')} with a {kind} each"
    engine = recipe.engine
    if engine.kind == "vllm_server":
        urls = addresses(engine)
        return f"{where}; {_n(len(urls), 'vLLM server')} beside: {', '.join(urls)}"
    if engine.kind == "hf":
        device, placement = (engine.options.get(name, given) for name, given in
                             (("device", "cpu"), ("placement", "process")))  # fmt: skip
        return f"{where}; actor on {device} ({placement})"
    return f"{where}; actor: {engine.kind}"


def _check_reward(reward: str) -> None:
    if is_function(reward):
        load_function(reward)
    elif reward.startswith(("/", ".", "~")) and not Path(reward).expanduser().is_dir():
        raise InvalidInputError(f"rewards: {reward} is no folder")


def _rows(recipe: Recipe) -> tuple[int, bool]:
    task = recipe.task
    if isinstance(task, SyntheticTask):
        return task.train_prompts, False
    if Path(task.path).is_file():
        rows, _ = read_rows(recipe)
        return len(rows), False
    if task.limit is None:
        raise InvalidInputError(
            f"task.path: {task.path} is not here; with task.limit a dry run assumes so many rows"
        )
    return task.limit, True


def _rounds(args: AsyncRLHFConfig, schedule: RoundSchedule, rows: int, per_step: int) -> int:
    """As the trainer counts them."""
    steps = schedule.steps_per_round
    if args.max_steps > 0:
        rounds, rest = divmod(args.max_steps, steps)
        if rest:
            raise InvalidInputError(
                f"args.max_steps: expected a multiple of the {steps} steps of a round "
                f"(minibatches_per_round * epochs_per_round), got {args.max_steps}"
            )
        return int(rounds)
    per_round = per_step * schedule.minibatches
    rounds = int(args.num_train_epochs * rows) // per_round
    if rounds < 1:
        raise InvalidInputError(
            f"task: one round takes {per_round} prompts, and num_train_epochs="
            f"{args.num_train_epochs:g} of {rows} rows are fewer; give more rows, set "
            "args.max_steps, or make batches smaller"
        )
    return int(rounds)


def _parameters(recipe: Recipe) -> int | None:
    """From the recipe, or of the model without its weights."""
    model = recipe.model
    if model.parameters is not None:
        return int(model.parameters)
    if model.path == TINY:
        task = synthetic_task(recipe)
        config: Any = task and task.model_config(model.width, model.layers, model.heads)
    elif (Path(model.path) / "config.json").is_file():
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model.path)
    else:
        return None
    if config is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    return int(sum(parameter.numel() for parameter in made.parameters()))
