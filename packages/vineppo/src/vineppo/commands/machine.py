"""What of a recipe is on this machine: packages, model, tokenizer. Nothing is loaded or fetched."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vineppo.commands.backends import PACKAGES
from vineppo.commands.data import chain_of
from vineppo.commands.recipe import Recipe
from vineppo.commands.sections import ChainArithmeticTask
from vineppo.errors import InvalidInputError

_REPORTERS = ("tensorboard", "wandb")  # those whose package has their name


@dataclass(frozen=True)
class Weights:
    """How many parameters a model has.

    Attributes:
        policy: all of them.
        trunk: without the head over the vocabulary: what a critic copies.
    """

    policy: int
    trunk: int


def packages_of(recipe: Recipe) -> list[str]:
    """Packages that a run of the recipe imports."""
    found = ["torch", "transformers", "accelerate", *PACKAGES[recipe.rollouts.kind]]
    if recipe.peft is not None:
        found.append("peft")
    return [*found, *(name for name in recipe.training.report_to if name in _REPORTERS)]


def lacks(package: str) -> bool:
    """Whether a package is not installed."""
    return importlib.util.find_spec(package) is None


def model_is_here(recipe: Recipe) -> bool:
    """Whether the model is a folder, in the cache of downloads, or made on the spot."""
    path = recipe.model.path
    if path is None or (Path(path) / "config.json").is_file():
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(path, "config.json"), str)
    except HFValidationError:  # a folder that is not there
        return False


def config_of(recipe: Recipe) -> Any:
    """The model's configuration, if it is here."""
    if recipe.model.path is None or not model_is_here(recipe):
        return None
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(recipe.model.path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"model.path: {recipe.model.path} has no configuration that transformers knows: "
            f"{' '.join(str(error).split()):.200}"
        ) from error


def tokenizer_of(recipe: Recipe) -> Any:
    """The tokenizer, if it is here."""
    if recipe.model.path is None:
        assert isinstance(recipe.task, ChainArithmeticTask)
        return chain_of(recipe.task).tokenizer()
    name = recipe.model.tokenizer or recipe.model.path
    if not model_is_here(recipe) and not Path(name).is_dir():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return None


def weights_of(recipe: Recipe, config: Any) -> Weights | None:
    """How large the model is, as its configuration or else the recipe says; None if neither."""
    import torch

    if recipe.model.path is None:
        model: Any = _tiny(recipe)
    elif config is not None:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    elif recipe.model.parameters is not None:
        return Weights(int(recipe.model.parameters), int(recipe.model.parameters))
    else:
        return None
    return Weights(_count(model), _count(model.base_model))


def _tiny(recipe: Recipe) -> Any:
    """A model of the shape that a tiny one will have, with random weights."""
    from decapod.lm import build_model

    assert recipe.model.tiny is not None
    assert isinstance(recipe.task, ChainArithmeticTask)
    task = chain_of(recipe.task)
    known: Mapping[str, inspect.Parameter] = inspect.signature(task.sft_model).parameters
    width, layers, heads = (
        recipe.model.tiny.get(name, known[name].default) for name in ("width", "layers", "heads")
    )
    try:
        return build_model(len(task.tokenizer()), width, layers, heads)
    except ValueError as error:
        raise InvalidInputError(f"model.tiny: {error}") from error


def _count(model: Any) -> int:
    return int(sum(parameter.numel() for parameter in model.parameters()))
