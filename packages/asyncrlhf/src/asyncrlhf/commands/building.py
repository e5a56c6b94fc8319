"""From a recipe to a trainer: model, data, rewards, engine, transport."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncrlhf.commands.parts import build_engine, build_transport
from asyncrlhf.commands.recipe import Recipe, is_function
from asyncrlhf.commands.sections import TINY, GSM8KTask, JsonlTask, SyntheticTask
from asyncrlhf.errors import InvalidInputError

if TYPE_CHECKING:
    from asyncrlhf.config import AsyncRLHFConfig
    from asyncrlhf.tasks import SyntheticSummary
    from asyncrlhf.trainer import AsyncRLHFTrainer

Rows = list[dict[str, Any]]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Built:
    """What a run is made of.

    Attributes:
        trainer: ready to train.
        synthetic: the task, where its true score is known for every answer.
        eval_rows: rows of the evaluation set; None where there is none.
    """

    trainer: AsyncRLHFTrainer
    synthetic: SyntheticSummary | None
    eval_rows: Rows | None


def build(recipe: Recipe, args: AsyncRLHFConfig, tell: Tell) -> Built:
    """Load and make all parts.

    Args:
        recipe: checked.
        args: its settings.
        tell: called with what is done next, where it may take a while.

    Raises:
        InvalidInputError: something cannot be loaded or does not fit.
        MissingExtraError: an optional package is not installed.
    """
    from asyncrlhf.trainer import AsyncRLHFTrainer

    tell("reading the data")
    train, evaluation = read_rows(recipe)
    model, tokenizer = _model(recipe, args, train, tell)
    task = recipe.task
    if isinstance(task, JsonlTask) and task.drop_longer is not None:
        train = _short(train, tokenizer, task.drop_longer, tell)
        evaluation = evaluation and _short(evaluation, tokenizer, task.drop_longer, tell)
    rewards = [_reward(name, recipe, model, tell) for name in recipe.rewards]
    tell("building the trainer")
    trainer = AsyncRLHFTrainer(
        model=model,
        ref_model=recipe.model.reference,
        reward_funcs=rewards,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        engine=build_engine(recipe.engine, recipe.transport, recipe.model.path, tokenizer),
        transport=build_transport(recipe.transport, args.schedule().ahead),
        peft_config=_adapter(recipe.peft),
    )
    return Built(trainer, synthetic_task(recipe), evaluation)


def synthetic_task(recipe: Recipe) -> SyntheticSummary | None:
    """The task of symbols; None for other tasks.

    Raises:
        InvalidInputError: numbers that make no task.
    """
    task = recipe.task
    if not isinstance(task, SyntheticTask):
        return None
    from asyncrlhf.tasks import SyntheticSummary

    return SyntheticSummary(task.symbols, task.length, task.rule, task.noise, task.penalty)


def read_rows(recipe: Recipe) -> tuple[Rows, Rows | None]:
    """Rows to train on and to evaluate on, with ``prompt`` and the columns of rewards.

    Raises:
        InvalidInputError: a file that is not there, or a row that is none.
    """
    task = recipe.task
    if isinstance(task, SyntheticTask):
        made = synthetic_task(recipe)
        assert made is not None
        return (
            made.prompts(task.train_prompts, task.seed, "train"),
            made.prompts(task.eval_prompts, task.seed, "eval"),
        )
    read = _gsm8k if isinstance(task, GSM8KTask) else _jsonl
    return read(task.path, task), None if task.eval_path is None else read(task.eval_path, task)


def load_function(name: str) -> Callable[..., Any]:
    """The function that ``module:function`` names; modules of the current folder count.

    Raises:
        InvalidInputError: there is none.
    """
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InvalidInputError(f"rewards: {name} cannot be loaded: {error}") from error
    if not callable(found):
        raise InvalidInputError(f"rewards: {name} is no function but a {type(found).__name__}")
    function: Callable[..., Any] = found
    return function


# --- model ----------------------------------------------------------------------------------------


def _model(recipe: Recipe, args: AsyncRLHFConfig, rows: Rows, tell: Tell) -> tuple[Any, Any]:
    wanted = recipe.model
    if wanted.path != TINY:
        return _loaded(recipe, tell)
    task = synthetic_task(recipe)
    if task is None:
        return _random_model(recipe, args, rows)
    tell(f"fine-tuning a tiny model, {wanted.sft_steps} steps")
    model = task.sft_model(
        wanted.seed,
        wanted.sft_steps,
        width=wanted.width,
        layers=wanted.layers,
        heads=wanted.heads,
        cache_dir=wanted.cache,
    )
    return model, task.tokenizer()


def _loaded(recipe: Recipe, tell: Tell) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted = recipe.model
    tell(f"loading {wanted.path}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            wanted.tokenizer or wanted.path, padding_side="left"
        )
        model = AutoModelForCausalLM.from_pretrained(wanted.path, dtype=wanted.dtype)
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"model: {wanted.path} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    return model, tokenizer


def _random_model(recipe: Recipe, args: AsyncRLHFConfig, rows: Rows) -> tuple[Any, Any]:
    """A tiny model that knows nothing, to try a recipe's data, rewards and engine."""
    from decapod.lm import build_model, build_tokenizer

    wanted = recipe.model
    texts = [
        row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"])
        for row in rows
    ]
    tokenizer = build_tokenizer(texts, "bpe", chat=not isinstance(rows[0]["prompt"], str))
    longest = max(len(tokenizer(text)["input_ids"]) for text in texts)
    model = build_model(
        len(tokenizer),
        hidden_size=wanted.width,
        layers=wanted.layers,
        heads=wanted.heads,
        max_positions=longest + args.max_completion_length,
        seed=wanted.seed,
    )
    return model, tokenizer


def _adapter(fields: Mapping[str, Any] | None) -> Any:
    if fields is None:
        return None
    from peft import LoraConfig

    return LoraConfig(**{"task_type": "CAUSAL_LM", **fields})


# --- data -----------------------------------------------------------------------------------------


def _gsm8k(path: str, task: Any) -> Rows:
    from asyncrlhf.tasks import load_gsm8k

    rows: Rows = [dict(row) for row in load_gsm8k(path, task.limit)]
    return [{**row, "prompt": task.template.replace("{prompt}", row["prompt"])} for row in rows]


def _jsonl(path: str, task: Any) -> Rows:
    file = Path(path)
    if not file.is_file():
        raise InvalidInputError(f"task.path: expected a jsonl file, got {path}, which is no file")
    rows: Rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if len(rows) == task.limit:
                break
            if line.strip():
                rows.append(_row(line, task, f"task.path: {path}, line {number}"))
    if not rows:
        raise InvalidInputError(f"task.path: expected at least one row, got none in {path}")
    return rows


def _row(line: str, task: Any, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"{where}: expected one JSON object, got {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get(task.prompt_column), str | list):
        raise InvalidInputError(
            f"{where}: expected an object with the prompt (text or messages) in "
            f"{task.prompt_column!r}, got {line.strip()[:60]!r}"
        )
    prompt = row.pop(task.prompt_column)
    if isinstance(prompt, str):
        prompt = task.template.replace("{prompt}", prompt)
    return {**row, "prompt": prompt}


def _short(rows: Rows, tokenizer: Any, longest: int, tell: Tell) -> Rows:
    from asyncrlhf.dataset import Prompts

    # Their lengths are those that the trainer will see.
    ids = Prompts.of(
        [{"prompt": row["prompt"]} for row in rows], tokenizer, name="task.path",
        max_prompt_length=None, max_new_tokens=0, positions=None,
    ).ids  # fmt: skip
    kept = [row for row, tokens in zip(rows, ids, strict=True) if len(tokens) <= longest]
    if not kept:
        raise InvalidInputError(
            f"task.drop_longer: all {len(rows)} prompts have more than {longest} tokens"
        )
    tell(f"{len(rows) - len(kept)} of {len(rows)} prompts have more than {longest} tokens")
    return kept


# --- rewards --------------------------------------------------------------------------------------


def _reward(name: str, recipe: Recipe, model: Any, tell: Tell) -> Any:
    if name == "gold":
        return _gold(recipe)
    if name == "proxy":
        return _proxy(recipe, model, tell)
    return load_function(name) if is_function(name) else name


def _gold(recipe: Recipe) -> Any:
    if isinstance(recipe.task, GSM8KTask):
        from asyncrlhf.tasks import GSM8KReward

        return GSM8KReward(recipe.task.fallback)
    task = synthetic_task(recipe)
    assert task is not None
    return task.gold


def _proxy(recipe: Recipe, model: Any, tell: Tell) -> Any:
    """A small reward model that learns from the gold score which of two answers is better."""
    from asyncrlhf.reward_models import train_proxy

    task, wanted = synthetic_task(recipe), recipe.task
    assert task is not None
    assert isinstance(wanted, SyntheticTask)
    tell(f"training the proxy reward on {wanted.proxy_pairs} pairs")
    return train_proxy(task, model, pairs=wanted.proxy_pairs, seed=wanted.seed)
