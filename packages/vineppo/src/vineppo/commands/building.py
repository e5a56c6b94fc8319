"""From a recipe to a trainer: model, tokenizer, data, what samples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from vineppo.commands.backends import build_backend, set_limits
from vineppo.commands.data import chain_of, read_data
from vineppo.commands.output import bar
from vineppo.commands.recipe import Recipe
from vineppo.commands.sections import ChainArithmeticTask
from vineppo.errors import InvalidInputError

if TYPE_CHECKING:
    from vineppo.trainer import EpisodeTrainer

Tell = Callable[[str], None]


def build_trainer(recipe: Recipe, tell: Tell, stack: ExitStack) -> EpisodeTrainer:
    """Load and make all parts.

    Args:
        recipe: checked.
        tell: called with what is done next.
        stack: ends what was started.

    Raises:
        InvalidInputError: something cannot be loaded or does not fit.
        MissingExtraError: an optional package is not installed.
    """
    trainer_class = recipe.trainer_class()
    tell("reading the data")
    data = read_data(recipe)
    model, tokenizer = load_model(recipe, tell)
    reference = recipe.model.reference
    backend = build_backend(recipe.rollouts, recipe.model, model, tokenizer, stack)
    trainer = trainer_class(
        model,
        None if reference is None else _pretrained(reference, recipe.model.dtype, "reference"),
        data.rewards,
        data.train,
        tokenizer,
        recipe.training,
        backend,
        eval_dataset=data.evaluation,
        peft_config=adapter_of(recipe),
    )
    if backend is None:
        set_limits(trainer.backend, recipe.rollouts)
    return trainer


def load_model(recipe: Recipe, tell: Tell) -> tuple[Any, Any]:
    """The policy and its tokenizer, on the CPU.

    Raises:
        InvalidInputError: they cannot be loaded.
    """
    wanted, task = recipe.model, recipe.task
    if wanted.path is None:
        assert wanted.tiny is not None
        assert isinstance(task, ChainArithmeticTask)
        return _tiny(task, dict(wanted.tiny), wanted.dtype, tell)
    tell(f"loading {wanted.path}")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(wanted.tokenizer or wanted.path)
    except (OSError, ValueError) as error:
        raise _cannot_load("model", wanted.tokenizer or wanted.path, error) from error
    return _pretrained(wanted.path, wanted.dtype, "path"), tokenizer


def adapter_of(recipe: Recipe) -> Any:
    """The configuration of an adapter; None trains all weights."""
    if recipe.peft is None:
        return None
    from peft import LoraConfig

    return LoraConfig(**{"task_type": "CAUSAL_LM", **recipe.peft})


def _tiny(
    task: ChainArithmeticTask, given: dict[str, Any], dtype: str, tell: Tell
) -> tuple[Any, Any]:
    import inspect

    import torch

    made = chain_of(task)
    default = inspect.signature(made.sft_model).parameters["steps"].default
    tell("fine-tuning a tiny model on right answers, or taking the one that is kept")
    with bar("fine-tuning", given.get("steps", default), "step") as shown:
        # A kept model is loaded without a step.
        model = made.sft_model(**given, on_step=lambda done: _advance(shown, done))
    return model.to(getattr(torch, dtype)), made.tokenizer()


def _advance(shown: Any, done: Any) -> None:
    shown.set_postfix_str(f"loss {done.loss:.3f}", refresh=False)
    shown.update()


def _pretrained(path: str, dtype: str, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise _cannot_load(f"model.{name}", path, error) from error


def _cannot_load(name: str, path: str, error: Exception) -> InvalidInputError:
    why = " ".join(str(error).split())
    return InvalidInputError(
        f"{name}: expected the folder or name of a causal language model, got {path}: {why:.240}"
    )
