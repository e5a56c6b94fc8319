"""Stick-breaking attention: exact, deterministic, linear in memory, on CPU and GPU.

The attention of arXiv 2410.17980, in which each query breaks a stick from the nearest key to the
farthest, with everything around it: training, packed sequences, decoding, segments that merge, a
layer and a small language model. Names are loaded when they are first used, so importing the
package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sbattn._version import __version__

if TYPE_CHECKING:
    from sbattn.attention import MultiHeadAttention, StickBreakingAttention
    from sbattn.baselines import ForgettingAttention, SoftmaxAttention
    from sbattn.cache import KeyValueCache, LayerCache
    from sbattn.context_parallel import context_parallel_attention
    from sbattn.decode import stickbreaking_decode
    from sbattn.errors import InvalidInputError, MissingExtraError, UnsupportedError
    from sbattn.functional import (
        stickbreaking_attention,
        stickbreaking_attention_varlen,
        stickbreaking_weights,
    )
    from sbattn.live import live_keys, live_tile_fraction, model_live_fractions
    from sbattn.model import CausalLM, ModelConfig
    from sbattn.segments import merge_segments

_HOMES = {
    "attention": (
        "MultiHeadAttention",
        "StickBreakingAttention",
    ),
    "baselines": (
        "ForgettingAttention",
        "SoftmaxAttention",
    ),
    "cache": (
        "KeyValueCache",
        "LayerCache",
    ),
    "context_parallel": ("context_parallel_attention",),
    "decode": ("stickbreaking_decode",),
    "errors": (
        "InvalidInputError",
        "MissingExtraError",
        "UnsupportedError",
    ),
    "functional": (
        "stickbreaking_attention",
        "stickbreaking_attention_varlen",
        "stickbreaking_weights",
    ),
    "live": (
        "live_keys",
        "live_tile_fraction",
        "model_live_fractions",
    ),
    "model": (
        "CausalLM",
        "ModelConfig",
    ),
    "segments": ("merge_segments",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CausalLM",
    "ForgettingAttention",
    "InvalidInputError",
    "KeyValueCache",
    "LayerCache",
    "MissingExtraError",
    "ModelConfig",
    "MultiHeadAttention",
    "SoftmaxAttention",
    "StickBreakingAttention",
    "UnsupportedError",
    "__version__",
    "context_parallel_attention",
    "live_keys",
    "live_tile_fraction",
    "merge_segments",
    "model_live_fractions",
    "stickbreaking_attention",
    "stickbreaking_attention_varlen",
    "stickbreaking_decode",
    "stickbreaking_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sbattn' has no attribute {name!r}")
    found = getattr(import_module(f"sbattn.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
