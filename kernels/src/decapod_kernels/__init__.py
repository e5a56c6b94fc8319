"""Triton kernels of the Decapod libraries. Importing this loads neither torch nor Triton."""

from __future__ import annotations

from decapod_kernels._version import __version__

__all__ = ["__version__"]
