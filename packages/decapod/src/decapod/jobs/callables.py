"""Functions on their way to another process."""

from __future__ import annotations

import importlib.machinery
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle


def pack(function: Callable[..., Any]) -> bytes:
    """The function as bytes that :func:`pickle.loads` turns back in any worker process.

    Closures, lambdas and functions of the main script travel as code. Functions of a module that
    a worker can import travel by name; those of a module that it cannot import (a test file, a
    module loaded from a path) travel as code too.

    Raises:
        Exception: whatever pickling what the function captures raises.
    """
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    if module is None or module.__name__ == "__main__" or _importable(module):
        return bytes(cloudpickle.dumps(function))
    cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(function))
    finally:
        cloudpickle.unregister_pickle_by_value(module)


class Packing:
    """Packs every function once, however many jobs call it."""

    def __init__(self) -> None:
        # The function is kept beside its bytes, so that its id is not given to another one.
        self._known: dict[int, tuple[Callable[..., Any], bytes, str | None]] = {}

    def of(self, function: Callable[..., Any]) -> tuple[bytes, str | None]:
        """The packed function, and the traceback if it cannot be packed."""
        if id(function) not in self._known:
            try:
                self._known[id(function)] = function, pack(function), None
            except Exception:  # noqa: BLE001 - pickling runs code of what the function captures
                self._known[id(function)] = function, b"", traceback.format_exc()
        return self._known[id(function)][1:]


def _importable(module: ModuleType) -> bool:
    """Whether a fresh interpreter with our ``sys.path`` would find this very module."""
    search: list[str] | None = None
    spec: importlib.machinery.ModuleSpec | None = None
    parts = module.__name__.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        spec = _find(name, search)
        if spec is None:
            return False
        search = list(spec.submodule_search_locations or [])
    file = getattr(module, "__file__", None)
    if spec is None or spec.origin is None or file is None:
        return True
    return not spec.has_location or Path(spec.origin).resolve() == Path(file).resolve()


def _find(name: str, search: list[str] | None) -> importlib.machinery.ModuleSpec | None:
    for finder in sys.meta_path:
        spec = finder.find_spec(name, search)
        if spec is not None:
            return spec
    return None
