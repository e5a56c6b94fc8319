"""The models of a run as they are used: without dropout, with a reference, with an end."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from asyncrlhf.errors import InvalidInputError


def without_dropout(
    model: Any, checkpointing: bool, options: Mapping[str, Any] | None = None
) -> Any:
    """The model without dropout, which would make a policy differ from the one that sampled.

    Args:
        model: is changed.
        checkpointing: whether activations are computed again in the backward pass.
        options: of ``torch.utils.checkpoint``.
    """
    if not checkpointing:
        return model.eval()
    # Older releases of transformers have the second name alone.
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    enable(dict(options) if options else None)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.train()  # checkpointing works in training mode alone


def reference_of(model: Any, given: Any | None) -> Any | None:
    """The frozen reference: the given one, a copy, or None for an adapter that can be switched off.

    Raises:
        InvalidInputError: it is the model itself.
    """
    if isinstance(given, str):
        given = AutoModelForCausalLM.from_pretrained(given)
    if given is None:
        if hasattr(model, "disable_adapter"):
            return None
        given = copy.deepcopy(model)
    # An adapter is put into the model that it is made from.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if given is model or given is base:
        raise InvalidInputError(
            "ref_model: it is the very model that learns; leave it out, and a copy is made"
        )
    return given.eval().requires_grad_(requires_grad=False)


def eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a completion: the tokenizer's, or else the model's.

    Raises:
        InvalidInputError: there is none.
    """
    found = getattr(model.generation_config, "eos_token_id", None)
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else found
    if found is None:
        raise InvalidInputError(
            "processing_class: the tokenizer has no EOS token, so no completion could end; set "
            "tokenizer.eos_token"
        )
    return (found,) if isinstance(found, int) else tuple(found)
