"""Shared floor of the Decapod research libraries."""

from decapod._version import __version__

__all__ = ["__version__"]
