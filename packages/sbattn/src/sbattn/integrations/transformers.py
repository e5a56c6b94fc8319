"""Stick-breaking attention for the models of transformers (5.16 and later).

    from sbattn.integrations.transformers import register, without_rotary

    register()
    config = without_rotary(LlamaConfig(...))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="stickbreaking")

transformers calls the registered function in every attention layer, after projections, rotary
embedding and cache. Nothing of the model changes but the weighting of the values, so a model
trained with softmax attention needs training with this one before it is of use.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, TypeVar

import torch

from sbattn import functional
from sbattn.errors import InvalidInputError, MissingExtraError, UnsupportedError
from sbattn.integrations.forward import Settings, attend
from sbattn.integrations.masks import stickbreaking_mask
from sbattn.integrations.rotary import applies_rotary, without_rotary

__all__ = ["applies_rotary", "convert", "register", "without_rotary"]

Model = TypeVar("Model", bound=torch.nn.Module)


# The settings of every name registered in this process, as transformers' own table is global.
_registered: dict[str, Settings] = {}


def register(
    name: str = "stickbreaking",
    *,
    attend_current: bool = False,
    remainder: Literal["none", "value"] = "none",
    skip_tol: float | Literal["exact"] = "exact",
    backend: functional.Backend = "auto",
) -> None:
    """Make `attn_implementation=name` mean stick-breaking attention in this process.

    Registering a name again with the same settings does nothing. transformers does not save the
    name with a model: pass it to `from_pretrained` again.

    Args:
        name: without "/", ":" or "|", which transformers reads as something else.
        attend_current: whether a token attends to itself.
        remainder: what becomes of the stick that is left: nothing ("none"), or it goes to the
            token's own value ("value").
        skip_tol: see :func:`sbattn.stickbreaking_attention`.
        backend: see :func:`sbattn.stickbreaking_attention`.

    Raises:
        MissingExtraError: transformers is not installed.
        InvalidInputError: the name is taken, by transformers or with other settings.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise MissingExtraError("transformers", "transformers") from error
    settings = Settings(attend_current, remainder, skip_tol, backend)
    if not name or set(name) & set("/:|"):
        raise InvalidInputError(f'name: expected a name without "/", ":" and "|", got {name!r}')
    known = _registered.get(name)
    if known == settings:
        return
    if known is not None:
        raise InvalidInputError(
            f"name: {name!r} is registered with {known}, got {settings}; choose another name"
        )
    if name == "eager" or name in AttentionInterface.valid_keys(AttentionInterface()):
        raise InvalidInputError(
            f"name: {name!r} is another attention of transformers; choose another name"
        )
    AttentionInterface.register(name, partial(attend, settings=settings))
    AttentionMaskInterface.register(name, stickbreaking_mask)
    _registered[name] = settings


def convert(
    model: Model,
    *,
    name: str = "stickbreaking",
    attend_current: bool = False,
    remainder: Literal["none", "value"] = "none",
    skip_tol: float | Literal["exact"] = "exact",
    backend: functional.Backend = "auto",
) -> Model:
    """Give an existing model stick-breaking attention and no rotary embedding, in place.

    The weights stay what they are and were trained for something else: until it is trained again,
    the model predicts poorly. The settings that the weights will depend on are kept in
    `model.config.stickbreaking`, are saved with it, and are checked when it runs.

    Args:
        model: a causal language model of transformers, of text alone.
        name: see :func:`register`, as for the other arguments.

    Raises:
        UnsupportedError: the model is made of several, does not let its attention be chosen, or
            has a rotary embedding that cannot be switched off. Nothing was changed.
    """
    register(
        name,
        attend_current=attend_current,
        remainder=remainder,
        skip_tol=skip_tol,
        backend=backend,
    )
    if model.config.sub_configs:
        raise UnsupportedError(
            f"{type(model).__name__} is made of several models "
            f"({', '.join(model.config.sub_configs)}); convert the causal language model alone"
        )
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise UnsupportedError(
            f"{type(model).__name__} does not let its attention be chosen; use a model of "
            "transformers that supports attn_implementation"
        )
    if applies_rotary(model.config):
        try:
            without_rotary(model)
        except UnsupportedError:
            model.set_attn_implementation(before)
            raise
    model.config.stickbreaking = _registered[name].of_weights()
    return model
