"""Reward models of transformers as reward functions: loading, tokens or texts, scores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from asyncrlhf.errors import InvalidInputError, MissingExtraError
from asyncrlhf.reward_calls import FloatArray, Prompt


def is_model(function: Any) -> bool:
    """Whether it is a model of transformers rather than a function."""
    return hasattr(function, "config") and hasattr(function, "parameters")


def model_reward(
    model: Any,
    tokenizer: Any,
    policy_tokenizer: Any,
    *,
    name: str,
    batch_size: int,
    device: str | None = None,
) -> Callable[..., Any]:
    """A reward function out of a reward model.

    Prompt and completion are scored as the very token ids, end-of-sequence token included, if the
    model has no tokenizer of its own or one with the policy's vocabulary; otherwise as the joined
    text (or chat) that its tokenizer encodes, without that token, as TRL does.

    Args:
        model: for sequence classification with one label, or the path (name) of one.
        tokenizer: of the model; None takes the one saved beside it, if there is one.
        policy_tokenizer: of the policy.
        name: for messages.
        batch_size: sequences per pass.
        device: where a model that is loaded from a path goes; others stay where they are.

    Raises:
        InvalidInputError: it cannot be loaded, it is no reward model, or it needs a tokenizer.
    """
    if isinstance(model, str | Path):
        model = _loaded(str(model), name).to(device)
    if model.config.num_labels != 1:
        raise InvalidInputError(
            f"reward_funcs: {name}: expected a model with one label, its score, got "
            f"{model.config.num_labels}"
        )
    if tokenizer is None:
        tokenizer = _tokenizer_beside(model, name)
    if tokenizer is None or tokenizer.get_vocab() == policy_tokenizer.get_vocab():
        size = model.get_input_embeddings().num_embeddings
        if size < len(policy_tokenizer):
            raise InvalidInputError(
                f"reward_funcs: {name}: it knows {size} tokens, the policy's tokenizer "
                f"{len(policy_tokenizer)}; give its own in reward_processing_classes"
            )
        tokenizer = None
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        owner = policy_tokenizer if tokenizer is None else tokenizer
        pad = owner.eos_token_id if owner.pad_token_id is None else owner.pad_token_id
        config.pad_token_id = pad
    return functools.partial(_score, model, tokenizer, batch_size)


def _score(
    model: Any,
    tokenizer: Any,
    batch_size: int,
    *,
    prompts: Sequence[Prompt],
    completions: Sequence[Any],
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    **_: Any,
) -> FloatArray:
    from asyncrlhf.reward_models import score_ids

    if tokenizer is None:
        sequences = [[*p, *c] for p, c in zip(prompt_ids, completion_ids, strict=True)]
    else:
        texts = [
            prompt + completion
            if isinstance(prompt, str)
            else tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        sequences = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return score_ids(model, sequences, batch_size)


def _loaded(path: str, name: str) -> Any:
    try:
        from transformers import AutoModelForSequenceClassification
    except ModuleNotFoundError as error:
        raise MissingExtraError("transformers", "train") from error
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"reward_funcs: {name}: expected the folder of a reward model with one label, got "
            f"{path!r}: {error}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise InvalidInputError(
            f"reward_funcs: {name}: {path!r} has no weights {', '.join(missing[:3])}; it is no "
            "reward model, and random weights would score at random"
        )
    return model


def _tokenizer_beside(model: Any, name: str) -> Any:
    """The tokenizer saved with a model, if it was loaded from somewhere and has one there."""
    path = getattr(model.config, "name_or_path", "")
    if not path or (Path(path).is_dir() and not (Path(path) / "tokenizer_config.json").is_file()):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"reward_funcs: {name}: no tokenizer was found at {path!r} ({error}); give one in "
            "reward_processing_classes"
        ) from error
