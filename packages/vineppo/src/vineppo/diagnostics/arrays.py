"""Numbers from outside, as arrays that are known to be whole."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vineppo.errors import InvalidInputError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def floats(name: str, values: Any, shape: tuple[int | None, ...] = (None,)) -> Floats:
    """Numbers in float64, of a shape, all finite.

    Args:
        name: of the argument, for the message.
        values: anything that numpy can read, or a torch tensor on any device.
        shape: what is expected; None stands for any number of at least 1.

    Raises:
        InvalidInputError: they are no numbers, too few or too many, or one is not finite.
    """
    expected = f"({', '.join('n' if size is None else str(size) for size in shape)})"
    if hasattr(values, "detach"):  # a tensor, which numpy reads only from where it can
        values = values.detach().cpu().double().numpy()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{name}: expected numbers of shape {expected}, got {type(values).__name__} ({error})"
        ) from error
    fits = array.ndim == len(shape) and all(
        got > 0 if size is None else got == size
        for got, size in zip(array.shape, shape, strict=True)
    )
    if not fits:
        raise InvalidInputError(
            f"{name}: expected numbers of shape {expected}, n at least 1, got shape {array.shape}"
        )
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        place = tuple(int(i) for i in bad[0])
        raise InvalidInputError(
            f"{name}: expected finite numbers, got {array[place]} at {list(place)} "
            f"({len(bad)} in all)"
        )
    return array


def codes(name: str, labels: Sequence[Hashable], length: int) -> Ints:
    """Labels numbered in the order in which they first appear.

    Args:
        name: of the argument, for the message.
        labels: anything that can be a key.
        length: how many are expected.

    Returns:
        (length,) whole numbers from 0.

    Raises:
        InvalidInputError: there are more or fewer of them.
    """
    given = list(labels)
    if len(given) != length:
        raise InvalidInputError(f"{name}: expected {length} labels, got {len(given)}")
    places: dict[Hashable, int] = {}
    return np.array([places.setdefault(label, len(places)) for label in given], dtype=np.int64)
