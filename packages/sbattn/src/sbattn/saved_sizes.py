"""Sizes of what a forward pass keeps, also where a length is only a symbol.

While a program is traced for any length, a size that is computed from the length by rounding and
comparing would tie the program to the lengths for which the comparisons come out the same. The
tensors that are kept are nobody's business but the backward pass's, so their sizes are declared to
be known to the run alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def saved_size(formula: Callable[..., int], *lengths: int) -> int:
    """`formula(*lengths)`, or an unknown if a length is a symbol. For kernels of fake tensors."""
    if all(isinstance(length, int) for length in lengths):
        return formula(*lengths)
    return unknown_size()


def unknown_size() -> int:
    """A size that depends on the content of tensors. For kernels of fake tensors."""
    size: int = torch.library.get_ctx().new_dynamic_size()
    return size
