"""What samples, by the names of recipes; options are those of the classes themselves."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vineppo.commands.checking import check_arguments, check_value, refuse_unknown
from vineppo.commands.sections import Model, Rollouts
from vineppo.errors import InvalidInputError, MissingExtraError, at_least

if TYPE_CHECKING:
    from vineppo.backend import RolloutBackend

PACKAGES: Final[Mapping[str, tuple[str, ...]]] = {
    "transformers": (),
    "vllm": ("vllm",),
    "servers": ("httpx",),
    "ray": ("ray",),
}
"""What each kind needs beside the extra ``train``."""

# What other sections or the trainer say.
_OURS: Final = ("model", "tokenizer", "eos_token_ids")
_LIMITS: Final = ("max_batch_size", "max_batch_tokens")


def check_rollouts(rollouts: Rollouts) -> None:
    """Hold options against the class that takes them; starts nothing.

    Those of ``vllm`` are checked where vLLM is installed.

    Raises:
        MissingExtraError: the extra ``train`` is not installed.
        InvalidInputError: an option that is unknown or does not fit.
    """
    options = rollouts.options
    if rollouts.kind == "transformers":
        refuse_unknown("rollouts.", options, _LIMITS)
        for name, value in options.items():
            check_value(f"rollouts.{name}", value, int)
            at_least(f"rollouts.{name}", value, 1)
    elif rollouts.kind == "servers":
        from vineppo.rollout_vllm import ServersBackend

        # The name that servers know the model by is its path, unless they were told another.
        check_arguments("rollouts", ServersBackend, {"model": "", **options})
    elif rollouts.kind == "ray":
        from vineppo.rollout_ray import RayBackend

        check_arguments("rollouts", RayBackend, options, _OURS)
    else:
        for name in ("model", "tokenizer"):
            if name in options:
                raise InvalidInputError(f"rollouts.{name}: say it in the section model")
        if importlib.util.find_spec("vllm") is not None:
            _check_vllm(options)


def build_backend(
    rollouts: Rollouts, model: Model, policy: Any, tokenizer: Any, stack: ExitStack
) -> RolloutBackend | None:
    """What samples.

    Args:
        rollouts: checked.
        model: of the recipe.
        policy: the loaded model, without an adapter.
        tokenizer: of the policy.
        stack: ends what was started.

    Returns:
        None for ``transformers``: the trainer makes its own, of the very model that it trains.

    Raises:
        MissingExtraError: its package is not installed.
        InvalidInputError: its class refuses an option.
    """
    options = dict(rollouts.options)
    if rollouts.kind == "transformers":
        return None
    if rollouts.kind == "ray":
        from vineppo.rollout_ray import RayBackend

        return stack.enter_context(RayBackend(policy, tokenizer, **options))
    from vineppo.rollout_vllm import ServersBackend, VLLMBackend, make_llm

    if rollouts.kind == "servers":
        return ServersBackend(model=options.pop("model", model.path), **options)
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vllm", "vllm")
    path = model.path
    if path is None or not (Path(path) / "tokenizer_config.json").is_file():
        # vLLM reads files; the weights that count come with load_weights.
        path = stack.enter_context(tempfile.TemporaryDirectory(prefix="vineppo-"))
        policy.save_pretrained(path)
        tokenizer.save_pretrained(path)
    try:
        llm = make_llm(path, **{"dtype": model.dtype, **options})
    except ValueError as error:  # of pydantic among them
        why = " ".join(str(error).split())
        raise InvalidInputError(f"rollouts: vLLM refuses its options: {why:.300}") from error
    return VLLMBackend(llm)


def set_limits(backend: RolloutBackend, rollouts: Rollouts) -> None:
    """Give a :class:`TransformersBackend` the limits of a recipe."""
    from vineppo.rollout import TransformersBackend

    assert isinstance(backend, TransformersBackend)
    for name, value in rollouts.options.items():
        setattr(backend.engine, name, value)


def _check_vllm(options: Mapping[str, Any]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    made: Callable[..., Any] = EngineArgs
    refuse_unknown("rollouts.", options, list(made.__dataclass_fields__))  # type: ignore[attr-defined]
