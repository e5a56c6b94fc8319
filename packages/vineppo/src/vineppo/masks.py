"""Tensors over tokens of which only those under a mask count, and checks of them."""

from __future__ import annotations

import torch
from torch import Tensor

from vineppo.errors import InvalidInputError, NotFiniteError


def on_mask(name: str, x: Tensor, mask: Tensor) -> Tensor:
    """The numbers under the mask, in float32 at least, and 0 elsewhere, whatever stands there.

    The gradient outside the mask is exactly 0 too, also where inf or NaN stands, because the
    choice is made before any arithmetic.

    Args:
        name: of the argument, for the error.
        x: (B, T).
        mask: (B, T) bool.

    Raises:
        InvalidInputError: the mask is not (B, T) bool, or ``x`` has another shape.
    """
    check_mask(mask)
    if x.shape != mask.shape:
        raise InvalidInputError(
            f"{name}: expected the mask's shape {tuple(mask.shape)}, got {tuple(x.shape)}"
        )
    return torch.where(mask, x.to(torch.promote_types(x.dtype, torch.float32)), 0.0)


def check_mask(mask: Tensor) -> None:
    """Refuse a mask that is not (B, T) bool.

    Raises:
        InvalidInputError: as the name says.
    """
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise InvalidInputError(
            f"mask: expected shape (B, T) of bool, got {tuple(mask.shape)} {mask.dtype}; "
            "convert it with mask.bool()"
        )


def check_finite(mask: Tensor, **named: Tensor) -> None:
    """Refuse NaN and inf under a mask.

    One pass over each tensor, and one bool per tensor read back from the device in one transfer.
    That waits for what the device has still to do, a cost that shows only where nothing else of
    the step is read back.

    Args:
        mask: bool of the shape of all tensors, or () for all their places.
        **named: tensors by the names of the arguments.

    Raises:
        NotFiniteError: says which argument, how many of its numbers, and the first place.
    """
    with torch.no_grad():
        bad = {name: mask & ~x.isfinite() for name, x in named.items()}
        found = torch.stack([places.any() for places in bad.values()]).tolist()
    for (name, places), any_bad in zip(bad.items(), found, strict=True):
        if any_bad:
            first = tuple(places.nonzero()[0].tolist())
            raise NotFiniteError(
                f"{name}: expected finite numbers under the mask, got {float(named[name][first])} "
                f"at {first} and {int(places.sum())} such in all; look for a diverged policy, "
                "a token that its distribution forbids, or half precision that overflows"
            )
