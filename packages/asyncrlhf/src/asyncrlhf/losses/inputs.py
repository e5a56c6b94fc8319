"""Checks of what losses are given, and its one form: numbers per sequence, rows in groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.sequences import sequence_logps


@dataclass(frozen=True, eq=False)
class Groups:
    """Completions of the same prompt as rows of a table, padded to the largest group.

    Sums over a table run in a fixed order on every device, those of scattered additions do not.

    Attributes:
        scores: (n,) float; 0 where not usable.
        usable: (n,) bool, completions that are valid and have a token in the mask.
        group: (n,) int64, the row of each completion.
        place: (n,) int64, its column; earlier completions of a batch stand further left.
        members: (groups, columns) int64, the completion at each place.
        present: (groups, columns) bool, places with a usable completion.
    """

    scores: Tensor
    usable: Tensor
    group: Tensor
    place: Tensor
    members: Tensor
    present: Tensor

    def __len__(self) -> int:
        return int(self.members.shape[0])

    def table(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(n,) to (groups, columns); `fill` where no usable completion is."""
        return torch.where(self.present, x[self.members], fill)

    def per_completion(self, table: Tensor) -> Tensor:
        """(groups, columns) to (n,); 0 where not usable."""
        return torch.where(self.usable, table[self.group, self.place], 0.0)

    def centred(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Table of x less the smallest of its group, 0 where absent; counts (groups, 1).

        Differences within a group are all that advantages use. Taken this way, equal numbers give
        exact zeros, and a large common part costs no digits.
        """
        low = self.table(x, torch.inf).amin(1, keepdim=True)
        count = self.present.sum(1, keepdim=True)
        return torch.where(self.present, x[self.members] - low, 0.0), count


def grouped(
    loss: str,
    scores: Tensor,
    group_ids: Tensor,
    mask: Tensor | None,
    valid: Tensor | None,
    device: torch.device,
) -> Groups:
    """Check scores and groups of a loss that needs two completions per prompt.

    Raises:
        InvalidInputError: shapes or dtypes do not fit, a group of one, or a score that is not
            finite and not excluded.
    """
    n = scores.shape[0] if scores.ndim == 1 else 0
    if n == 0:
        raise InvalidInputError(f"scores: expected shape (n,), n > 0, got {tuple(scores.shape)}")
    if group_ids.shape != (n,) or group_ids.is_floating_point():
        raise InvalidInputError(
            f"group_ids: expected {n} integers, got {tuple(group_ids.shape)} {group_ids.dtype}"
        )
    scores, group_ids = scores.detach().to(device), group_ids.to(device)
    scores = at_least_float32(scores)
    usable = torch.ones(n, dtype=torch.bool, device=device)
    for name, x, dims in (("valid", valid, 1), ("mask", mask, 2)):
        if x is None:
            continue
        if x.ndim != dims or x.shape[0] != n or x.dtype != torch.bool:
            shape = f"({n},)" if dims == 1 else f"({n}, L)"
            raise InvalidInputError(
                f"{name}: expected shape {shape} of bool, got {tuple(x.shape)} {x.dtype}"
            )
        usable = usable & (x.to(device) if dims == 1 else x.to(device).any(1))
    if not bool((scores.isfinite() | ~usable).all()):
        raise InvalidInputError(
            "scores: expected finite numbers, got NaN or inf; exclude completions whose reward "
            "failed with valid=scores.isfinite()"
        )
    found, group, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    smallest = int(sizes.argmin())
    if int(sizes[smallest]) < 2:
        raise InvalidInputError(
            f"group_ids: expected at least 2 completions per prompt for {loss}, got 1 in group "
            f"{int(found[smallest])} (K=1); set num_generations to 2 or more and keep the "
            "completions of a prompt in one micro-batch"
        )
    order = group.argsort(stable=True)
    start = sizes.cumsum(0) - sizes
    place = torch.empty_like(group)
    place[order] = torch.arange(n, device=device) - start[group[order]]
    members = group.new_zeros(len(found), int(sizes.max()))
    members[group, place] = torch.arange(n, device=device)
    present = torch.zeros_like(members, dtype=torch.bool)
    present[group, place] = usable
    return Groups(torch.where(usable, scores, 0.0), usable, group, place, members, present)


def per_sequence(name: str, x: Tensor, mask: Tensor | None, usable: Tensor) -> Tensor:
    """Numbers per sequence, (n,), from those per token, (n, L), or as they are; 0 where unusable.

    Raises:
        InvalidInputError: the shape does not fit, or numbers per token come without a mask.
    """
    n = usable.shape[0]
    if x.ndim == 2 and mask is None:
        raise InvalidInputError(
            f"mask: expected (n, L) bool, because {name} is per token; got None"
        )
    if x.shape != (mask.shape if x.ndim == 2 and mask is not None else (n,)):
        expected = f"({n},)" if mask is None else f"({n},) or {tuple(mask.shape)}"
        raise InvalidInputError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
    x = at_least_float32(x)
    summed = sequence_logps(x, mask) if x.ndim == 2 else x
    return torch.where(usable, summed, 0.0)


def per_token(name: str, x: Tensor, mask: Tensor) -> Tensor:
    """Numbers per token, (n, L); 0 outside the mask, whatever stands there.

    Raises:
        InvalidInputError: the shape is not that of the mask.
    """
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise InvalidInputError(
            f"mask: expected shape (n, L) of bool, got {tuple(mask.shape)} {mask.dtype}"
        )
    if x.shape != mask.shape:
        raise InvalidInputError(
            f"{name}: expected the mask's shape {tuple(mask.shape)}, got {tuple(x.shape)}"
        )
    return torch.where(mask, at_least_float32(x), 0.0)


def importance(weights: Tensor | None, mask: Tensor) -> Tensor:
    """Importance weights per token, without gradient, (n, L), from (n,), (n, L), or None for 1.

    They are 0 outside the mask, whatever stands there.

    Raises:
        InvalidInputError: another shape.
    """
    if weights is None:
        return mask.float()
    if weights.shape not in (mask.shape, mask.shape[:1]):
        raise InvalidInputError(
            f"weights: expected shape ({mask.shape[0]},) or {tuple(mask.shape)}, got "
            f"{tuple(weights.shape)}"
        )
    columns = weights[:, None] if weights.ndim == 1 else weights
    return torch.where(mask, columns.detach(), 0.0)


def at_least_float32(x: Tensor) -> Tensor:
    """The same numbers in float32, or in float64 if they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def positive(name: str, value: float) -> None:
    """Refuse what is not a positive number; inf is one.

    Raises:
        InvalidInputError: as the name says.
    """
    if not value > 0:
        raise InvalidInputError(f"{name}: expected a positive number, got {value}")


def not_negative(name: str, value: float) -> None:
    """Refuse what is not a finite number from 0.

    Raises:
        InvalidInputError: as the name says.
    """
    if not 0 <= value < float("inf"):
        raise InvalidInputError(f"{name}: expected a number from 0, got {value}")
