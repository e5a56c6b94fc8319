"""Switching rotary position embedding off, in a way that a saved configuration keeps.

Stick breaking orders the keys by itself and was made to do without position embeddings. Most
models of transformers have no switch for theirs, but all read the rotation's frequencies from
`config.rope_parameters`. The type "llama3" divides every frequency with a wavelength above
`original_max_position_embeddings` by `factor`: with 1 for the former and a number near float32's
largest for the latter, all frequencies are zero to within 1e-38, the cosines 1 and the sines 0.
Readers of the configuration other than transformers, such as vLLM, understand it, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from sbattn.errors import UnsupportedError

Target = TypeVar("Target")

_STILL = {
    "rope_type": "llama3",
    "factor": 1e38,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1,
}


def without_rotary(target: Target) -> Target:
    """Switch rotary position embedding off in a configuration or a model, in place; returns it.

    SmolLM3 has a switch per layer, `no_rope_layers`, which is set to 0 everywhere. In other models
    `rope_parameters` becomes a rotation by nothing: queries and keys keep their values. Weights
    trained with the rotation need training without it.

    Args:
        target: a transformers configuration (before the model is made) or a model.

    Raises:
        UnsupportedError: the model has no rotary embedding of the kind that transformers shares
            among its models, so nothing here can switch it off. Nothing was changed.
    """
    model: Any = target if isinstance(target, torch.nn.Module) else None
    config: Any = target if model is None else model.config
    stopped = _still_parameters(config)
    rotations = {} if model is None else _rotations(model)
    if stopped is None:
        config.no_rope_layers = [0] * len(config.no_rope_layers)
        for module in () if model is None else model.modules():
            if hasattr(module, "use_rope"):
                module.use_rope = 0
        return target
    if model is not None and not rotations:
        raise UnsupportedError(
            f"{type(model).__name__}: found no module that computes its rotary embedding, so it "
            "cannot be switched off here; change the configuration before making the model"
        )
    config.rope_parameters = stopped
    for name, old in rotations.items():
        device = next(old.buffers()).device
        parent, _, leaf = name.rpartition(".")
        # Made anew from the configuration: the same as in a model loaded with it.
        setattr(model.get_submodule(parent), leaf, type(old)(config=old.config).to(device))
    return target


def applies_rotary(config: Any) -> bool:
    """Whether a model with this configuration rotates queries and keys in any layer."""
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or not any(getattr(config, "no_rope_layers", None) or [1]):
        return False
    sets = [each for each in parameters.values() if isinstance(each, Mapping)] or [parameters]
    return not all(_is_still(each) for each in sets)


def warn_if_rotating(config: Any) -> None:
    """Say once per kind of model that rotary embedding is on; compiled programs stay silent."""
    if torch.compiler.is_compiling() or not applies_rotary(config):
        return
    warnings.warn(
        f"this {config.model_type} model applies rotary position embedding under stick-breaking "
        "attention, which was made to do without; switch it off with "
        "sbattn.integrations.transformers.without_rotary(config) before making the model, or keep "
        "it and silence this warning",
        UserWarning,
        stacklevel=2,
    )


def _still_parameters(config: Any) -> dict[str, Any] | None:
    """`rope_parameters` that rotate by nothing; None where the model has a switch instead."""
    if getattr(config, "model_type", None) == "smollm3":
        return None
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise UnsupportedError(
            f"{getattr(config, 'model_type', type(config).__name__)}: the configuration has no "
            "rope_parameters, so there is no rotary embedding to switch off here; a model with "
            "other position embeddings keeps them"
        )
    if not _is_nested(parameters):
        return _stilled(parameters)
    return {
        kind: _stilled(each) if isinstance(each, Mapping) else each
        for kind, each in parameters.items()
    }


def _stilled(parameters: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("rope_theta", "partial_rotary_factor")
    return {**{key: parameters[key] for key in kept if key in parameters}, **_STILL}


def _is_nested(parameters: Mapping[str, Any]) -> bool:
    """Whether there is a set of parameters for each type of layer (as in Gemma 3)."""
    return any(isinstance(each, Mapping) for each in parameters.values())


def _is_still(parameters: Mapping[str, Any]) -> bool:
    return all(parameters.get(key) == value for key, value in _STILL.items())


def _rotations(model: Any) -> dict[str, Any]:
    """The modules that compute cosines and sines, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(leaf.endswith("inv_freq") for leaf, _ in module.named_buffers(recurse=False))
        and hasattr(module, "config")
    }
