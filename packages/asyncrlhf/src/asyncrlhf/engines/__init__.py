"""Engines: whatever generates, behind one protocol. Names are loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from asyncrlhf.engines.protocol import Completion, GenerationEngine, VersionSpan
from asyncrlhf.errors import MissingExtraError

if TYPE_CHECKING:
    from asyncrlhf.engines.fake import FakeEngine
    from asyncrlhf.engines.hf import HFEngine
    from asyncrlhf.engines.local import LocalEngine
    from asyncrlhf.engines.on_ray import RayEngine
    from asyncrlhf.engines.on_vllm import VLLMInProcess
    from asyncrlhf.engines.remote import RemoteEngine
    from asyncrlhf.engines.replicas import Replicas
    from asyncrlhf.engines.server import VLLMServer

__all__ = [
    "Completion",
    "FakeEngine",
    "GenerationEngine",
    "HFEngine",
    "LocalEngine",
    "RayEngine",
    "RemoteEngine",
    "Replicas",
    "VLLMInProcess",
    "VLLMServer",
    "VersionSpan",
]

_HOME = {
    "FakeEngine": "fake",
    "HFEngine": "hf",
    "LocalEngine": "local",
    "RayEngine": "on_ray",
    "RemoteEngine": "remote",
    "Replicas": "replicas",
    "VLLMInProcess": "on_vllm",
    "VLLMServer": "server",
}
_EXTRA = {
    "decapod": "train",
    "httpx": "train",
    "ray": "ray",
    "transformers": "train",
    "vllm": "vllm",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"asyncrlhf.engines.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        raise MissingExtraError(missing, _EXTRA[missing]) from error
