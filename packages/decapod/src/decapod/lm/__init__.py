"""Text generation by causal language models, by token ids (extra ``decapod[lm]``).

Importing this package imports neither torch nor transformers; a name below imports what it needs
when it is first asked for, and an ImportError names the extra that is missing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from decapod.lm.engine import (
    Completion,
    EngineError,
    GenerationEngine,
    LogprobsError,
    Request,
    RequestError,
    SamplingParams,
    sample_requests,
)

if TYPE_CHECKING:
    from decapod.lm.hf import TransformersEngine
    from decapod.lm.on_vllm import VLLMEngine
    from decapod.lm.server import ServerEngine, ServerError, ServerTextGenerator
    from decapod.lm.text import TextGenerator
    from decapod.lm.tiny import build_model, build_tokenizer

__all__ = [
    "Completion",
    "EngineError",
    "GenerationEngine",
    "LogprobsError",
    "Request",
    "RequestError",
    "SamplingParams",
    "ServerEngine",
    "ServerError",
    "ServerTextGenerator",
    "TextGenerator",
    "TransformersEngine",
    "VLLMEngine",
    "build_model",
    "build_tokenizer",
    "sample_requests",
]

_HOME = {
    "ServerEngine": "server",
    "ServerError": "server",
    "ServerTextGenerator": "server",
    "TextGenerator": "text",
    "TransformersEngine": "hf",
    "VLLMEngine": "on_vllm",
    "build_model": "tiny",
    "build_tokenizer": "tiny",
}
_EXTRA = {"httpx": "lm", "tokenizers": "lm", "torch": "lm", "transformers": "lm", "vllm": "vllm"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"decapod.lm.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        raise ImportError(
            f"decapod.lm.{name} needs {missing}, which is not installed; run "
            f'`pip install "decapod[{_EXTRA[missing]}]"`',
            name=missing,
        ) from error
