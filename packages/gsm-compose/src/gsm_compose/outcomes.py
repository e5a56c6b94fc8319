"""What a model got right, item by item, and what kind of error the rest are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gsm_compose.errors import StatisticsError
from gsm_compose.items import Item

Category = Literal[
    "correct",
    "lucky",
    "wrong X",
    "wrong Q2",
    "X ignored",
    "answered X",
    "swapped",
    "unparsable",
    "execution error",
]
CATEGORIES: Final[tuple[Category, ...]] = get_args(Category)

Bools = NDArray[np.bool_]


def classify(
    item: Item, q1: Fraction | None, final: Fraction | None, error: str | None = None
) -> Category:
    """The kind of an answer to a composition; the first that applies, in this order.

    1. No final answer: "execution error" if running the code failed, else "unparsable".
    2. The final answer is right: "correct" if the first is, else "lucky" (also where the answer
       does not state the first one).
    3. "swapped": the first answer is the gold final one and the final answer is X.
    4. "X ignored": the final answer is that of the last question with its original numbers. It
       differs from the gold one by construction.
    5. "answered X": the final answer is X.
    6. "wrong Q2" if the first answer is right, else "wrong X".

    In chains of more than two questions X is the first one's answer, and "wrong Q2" is an error in
    any later question.

    Args:
        item: the composition.
        q1: the model's answer to the first question within the composition, None if not stated.
        final: its final answer, None if there is none.
        error: why code could not be run to the end, None if it could or there was none.
    """
    if final is None:
        return "unparsable" if error is None else "execution error"
    if final == item.gold:
        return "correct" if q1 == item.x else "lucky"
    if q1 == item.gold and final == item.x:
        return "swapped"
    if final == item.ignored:
        return "X ignored"
    if final == item.x:
        return "answered X"
    return "wrong Q2" if q1 == item.x else "wrong X"


@dataclass(frozen=True)
class Outcomes:
    """Correctness of one model on n items; all arrays are (n,) in the order of `item_ids`.

    Attributes:
        item_ids: ids, all different.
        q1_ids: row of the first question; items with the same row are not independent.
        q2_ids: row of the last question. A row in both arrays is the same question.
        q1: first question right, asked alone ("original").
        q2: last question with its new numbers right, asked alone ("modified").
        c1: first question right within the composition.
        cf: final answer of the composition right.
        category: kind of the composition's answer, see `classify`.
        independent: last question right after an unrelated one; None if not asked.
        original_q2: last question with its original numbers right; None if not asked.
        code: final answer of the composition right in code; None if not asked.
        parsable: answers under all three conditions of Δ had a number to read; None if not known.
        unparsable: share of answers without one, by condition.

    Raises:
        StatisticsError: shapes differ, ids repeat, or `category` contradicts `c1` and `cf`.
    """

    item_ids: NDArray[np.str_]
    q1_ids: NDArray[np.str_]
    q2_ids: NDArray[np.str_]
    q1: Bools
    q2: Bools
    c1: Bools
    cf: Bools
    category: NDArray[np.str_]
    independent: Bools | None = None
    original_q2: Bools | None = None
    code: Bools | None = None
    parsable: Bools | None = None
    unparsable: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.item_ids)
        for name, array in self._arrays().items():
            if np.shape(array) != (n,) or n == 0:
                raise StatisticsError(
                    f"{name}: expected one value for each of the {n} item_ids (at least one), "
                    f"got shape {np.shape(array)}."
                )
            words = name.endswith("_ids") or name == "category"
            if not words and np.asarray(array).dtype != np.bool_:
                raise StatisticsError(f"{name}: expected booleans, got {np.asarray(array).dtype}.")
        if len(np.unique(self.item_ids)) < n:
            raise StatisticsError("item_ids: expected every item once, some occur twice.")
        unknown = set(self.category.tolist()) - set(CATEGORIES)
        right, lucky = self.category == "correct", self.category == "lucky"
        if unknown or (right != (self.cf & self.c1)).any() or (lucky != (self.cf & ~self.c1)).any():
            raise StatisticsError(
                "category: expected 'correct' where c1 and cf, 'lucky' where cf alone, and another "
                f"of {', '.join(CATEGORIES)} elsewhere; got something else"
                + (f" ({', '.join(sorted(unknown))})." if unknown else ".")
            )

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def clusters(self) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
        """Rows by role, for the functions of `gsm_compose.stats`."""
        return self.q1_ids, self.q2_ids

    def take(self, which: Bools | NDArray[np.intp]) -> Outcomes:
        """The items of a mask (n,), or at positions; `unparsable` is not known for them.

        Raises:
            StatisticsError: no item is left.
        """
        arrays = {name: array[which] for name, array in self._arrays().items()}
        return replace(self, **arrays, unparsable={})

    def _arrays(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {k: v for k, v in values.items() if k != "unparsable" and v is not None}
