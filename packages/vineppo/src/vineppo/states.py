"""Which states of an episode need a value, and which of them are the same state.

With S steps there are S + 1 states. The last one is the finished answer: its value is 0 by
convention and nothing is ever sampled from it (section 2 of arXiv 2410.01679, and the reference
code). So the states are s_0, the prompt, to s_{S-1}, where the last step begins.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vineppo.episodes import Episode, State
from vineppo.errors import InvalidInputError


def borders_to_states(
    episode: Episode, borders: Sequence[int], max_value_steps: int | None = None
) -> list[State]:
    """The states in which the steps of an episode begin.

    Args:
        episode: prompt and answer, as they were sampled.
        borders: step borders in tokens of the answer, S + 1 of them for S steps: 0, ...,
            ``len(episode.response_ids)``, strictly increasing; ``[0]`` for an empty answer.
        max_value_steps: M, a cap on the estimates: s_0 to s_{M-1} alone are returned. Later states
            have no estimate and take the return of their own trajectory
            (:func:`vineppo.advantages.step_advantages`). None is no cap.

    Returns:
        min(S, M) states in the order of the trajectory; the ids of each are the first ids of the
        next one, and of the episode.

    Raises:
        InvalidInputError: borders that are not those of this answer, or a cap below 1.
    """
    if max_value_steps is not None and max_value_steps < 1:
        raise InvalidInputError(
            f"max_value_steps: expected at least 1 or None for no cap, got {max_value_steps}"
        )
    length = len(episode.response_ids)
    cuts = list(borders)
    increasing = all(a < b for a, b in itertools.pairwise(cuts))
    if not (cuts and cuts[0] == 0 and cuts[-1] == length and increasing):
        shown = str(cuts) if len(cuts) <= 12 else f"{cuts[:12]} and {len(cuts) - 12} more"
        raise InvalidInputError(
            f"borders: expected strictly increasing token places from 0 to {length}, the length of "
            f"the answer of row {episode.row}, got {shown}"
        )
    return [
        State(episode.row, episode.prompt_ids, episode.response_ids[:cut])
        for cut in cuts[:-1][:max_value_steps]
    ]


def unique(states: Sequence[State]) -> tuple[list[State], npt.NDArray[np.int64]]:
    """Each different state once, in an order that does not depend on that of ``states``.

    They are sorted by row and then like words in a dictionary, so the states of one trajectory
    follow each other, each behind the ones it begins with: what an engine has computed of a state
    is still there when the next one needs it.

    Args:
        states: in any order.

    Returns:
        The different states, and ``[len(states)]`` int64, the place of each state among them.
    """
    different = sorted(set(states), key=lambda s: (s.row, s.prompt_ids, s.response_ids))
    place = {state: i for i, state in enumerate(different)}
    return different, np.array([place[state] for state in states], dtype=np.int64)
