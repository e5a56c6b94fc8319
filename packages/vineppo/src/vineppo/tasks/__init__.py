"""Tasks with verifiable rewards: exact token trees, chain arithmetic, and GSM8K.

:class:`TokenTree` needs numpy alone; a name is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vineppo.tasks.chain_arithmetic import ChainArithmetic
    from vineppo.tasks.gsm8k import GSM8K
    from vineppo.tasks.token_tree import TokenTree

__all__ = ["GSM8K", "ChainArithmetic", "TokenTree"]

_HOME = {"ChainArithmetic": "chain_arithmetic", "GSM8K": "gsm8k", "TokenTree": "token_tree"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"vineppo.tasks.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
