"""Ways of publishing weights to actors, behind one protocol. Names are loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from asyncrlhf.errors import MissingExtraError

if TYPE_CHECKING:
    from asyncrlhf.transport.directory import SafetensorsDir
    from asyncrlhf.transport.on_vllm import VLLMTransfer
    from asyncrlhf.transport.shared_memory import SharedMemory
    from asyncrlhf.transport.snapshot import Snapshot, Transport, checksum
    from asyncrlhf.transport.torch_dist import TorchDist
    from asyncrlhf.transport.vllm_folder import VLLMFolder

__all__ = [
    "SafetensorsDir",
    "SharedMemory",
    "Snapshot",
    "TorchDist",
    "Transport",
    "VLLMFolder",
    "VLLMTransfer",
    "checksum",
]

_HOME = {
    "SafetensorsDir": "directory",
    "SharedMemory": "shared_memory",
    "Snapshot": "snapshot",
    "TorchDist": "torch_dist",
    "Transport": "snapshot",
    "VLLMFolder": "vllm_folder",
    "VLLMTransfer": "on_vllm",
    "checksum": "snapshot",
}
_EXTRA = {"safetensors": "train", "vllm": "vllm"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"asyncrlhf.transport.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        raise MissingExtraError(missing, _EXTRA[missing]) from error
