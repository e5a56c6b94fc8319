"""Stick-breaking attention in vLLM (0.32 and later): the plug-in's door.

Installed beside vLLM, the package registers itself through the entry point
`vllm.general_plugins`, in every process of vLLM. That only gives vLLM's backend CUSTOM a meaning;
it is used where it is asked for:

    LLM(model, attention_backend="CUSTOM")            # or: vllm serve --attention-backend CUSTOM

On a CPU vLLM takes its own backend whatever is asked for. The environment variable
`SBATTN_VLLM_ON_CPU=1` puts stick breaking in its place, through vLLM's own way of overriding a
backend; every model in the process then attends with it.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sbattn.errors import MissingExtraError

if TYPE_CHECKING:
    from sbattn.integrations.vllm_backend import StickBreakingBackend

__all__ = ["BACKEND_PATH", "CPU_VARIABLE", "StickBreakingBackend", "register"]

BACKEND_PATH = "sbattn.integrations.vllm.StickBreakingBackend"
CPU_VARIABLE = "SBATTN_VLLM_ON_CPU"

_log = logging.getLogger(__name__)


def register() -> None:
    """Give vLLM's backend CUSTOM the meaning of stick breaking; may be called any number of times.

    Selects nothing, unless `SBATTN_VLLM_ON_CPU=1` says so for a CPU. Where another plug-in has
    taken CUSTOM, it keeps it, and a warning is logged.

    Raises:
        MissingExtraError: vLLM is not installed.
    """
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        raise MissingExtraError("vLLM", "vllm") from error
    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != BACKEND_PATH:
        _log.warning(
            "vLLM's backend CUSTOM belongs to %s already; stick breaking is not registered",
            custom.get_path(),
        )
    else:
        register_backend(custom, BACKEND_PATH)
    if os.environ.get(CPU_VARIABLE) == "1":
        register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND_PATH)


def __getattr__(name: str) -> Any:
    # The backend's classes derive from vLLM's, so they can only be made where vLLM is.
    if name != "StickBreakingBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return import_module("sbattn.integrations.vllm_backend").StickBreakingBackend
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "vllm":
            raise
        raise MissingExtraError("vLLM", "vllm") from error
