"""Which states to judge a value function on: those of trajectories, and alternatives to them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vineppo.backend import RolloutBackend
from vineppo.diagnostics.truth import ALTERNATIVES, GroundTruth, stream_seed
from vineppo.episodes import Episode, State
from vineppo.errors import InvalidInputError, at_least
from vineppo.states import borders_to_states
from vineppo.values import state_seed

if TYPE_CHECKING:
    from decapod.lm import SamplingParams

Borders = Callable[[Sequence[int]], Sequence[int]]
"""Step borders in tokens of an answer's ids: 0, ..., their number, strictly increasing. E.g.
``lambda ids: token_borders(NewlineSegmenter(), ids, tokenizer)``, or the method ``segment_ids`` of
a segmenter of tokens."""


@dataclass(frozen=True)
class StateSample:
    """States in which the steps of trajectories begin.

    A state that several trajectories share is in here as often, so that means over the sample are
    means over what the policy visits. Estimators and truths sample it once.

    Attributes:
        states: in the order of the trajectories.
        positions: of each, i/S for step i of S: 0 at the prompt, below 1.
        clusters: of each, the number of its prompt.
        trajectories: of each, the number of its episode.
    """

    states: tuple[State, ...]
    positions: tuple[float, ...]
    clusters: tuple[int, ...]
    trajectories: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.states)


def collect_states(
    episodes: Sequence[Episode],
    borders: Borders,
    *,
    limit: int | None = None,
    max_value_steps: int | None = None,
    seed: int = 0,
) -> StateSample:
    """The states of trajectories that need a value: where their steps begin.

    Args:
        episodes: sampled from the policy.
        borders: cuts an answer into steps.
        limit: at most so many states, drawn at random without replacement; None: all of them.
        max_value_steps: see :func:`vineppo.states.borders_to_states`; positions still count all
            steps.
        seed: of that draw.

    Raises:
        InvalidInputError: no episode, no step in any of them, borders that are not those of the
            answer, or a number out of its range.
    """
    if not episodes:
        raise InvalidInputError("episodes: expected at least one, got none")
    if limit is not None:
        at_least("limit", limit, 1)
    prompts: dict[Hashable, int] = {}
    found: list[tuple[State, float, int, int]] = []
    for number, episode in enumerate(episodes):
        cuts = borders(episode.response_ids)
        steps = len(cuts) - 1
        prompt = prompts.setdefault((episode.row, episode.prompt_ids), len(prompts))
        found += [
            (state, i / steps, prompt, number)
            for i, state in enumerate(borders_to_states(episode, cuts, max_value_steps))
        ]
    if not found:
        raise InvalidInputError("episodes: expected at least one with a step, got empty answers")
    if limit is not None and limit < len(found):
        rng = np.random.default_rng(stream_seed("states", seed))
        found = [found[i] for i in np.sort(rng.permutation(len(found))[:limit])]
    states, positions, clusters, trajectories = zip(*found, strict=True)
    return StateSample(states, positions, clusters, trajectories)


@dataclass(frozen=True)
class Alternatives:
    """What the next step from one state might be.

    Attributes:
        origin: where the step begins.
        states: where it ends, one for each alternative, all different; at least 2.
    """

    origin: State
    states: tuple[State, ...]


def alternatives(
    backend: RolloutBackend,
    states: Sequence[State],
    borders: Borders,
    n: int = 5,
    seed: int = 0,
    *,
    params: SamplingParams,
    samples: int | None = None,
    max_response_tokens: int | None = None,
) -> list[Alternatives]:
    """Up to ``n`` different next steps from each state (up to 5 in Sec. 7 of arXiv 2410.01679).

    Continuations are sampled and cut at their first step border. Left out are continuations that
    end within the step: a finished answer has a score and no value, and a step that was cut by
    length has no end.

    Args:
        backend: samples from the policy.
        states: where steps begin; repetitions are looked at once.
        borders: cuts an answer, of state and continuation together, into steps.
        n: most alternatives of a state, at least 2; the first ones sampled are kept.
        seed: of the stream that is kept for alternatives.
        params: how continuations are drawn; ``max_new_tokens`` bounds the length of a step.
        samples: continuations drawn from each state; None: 2 n, as some are equal.
        max_response_tokens: alternatives that leave no room for another token are left out too.

    Returns:
        In the order of ``states``; states with fewer than two alternatives are left out, as there
        is nothing to choose.

    Raises:
        InvalidInputError: no state, or a number out of its range.
    """
    if not states:
        raise InvalidInputError("states: expected at least one, got none")
    at_least("n", n, 2)
    samples = 2 * n if samples is None else samples
    at_least("samples", samples, 2)
    origins = list(dict.fromkeys(states))
    root = stream_seed(ALTERNATIVES, seed)
    seeds = [state_seed(root, origin, ALTERNATIVES) for origin in origins]
    found = []
    sampled = backend.generate([origin.ids for origin in origins], samples, params, seeds)
    for origin, rollouts in zip(origins, sampled, strict=True):
        steps: dict[State, None] = {}
        for rollout in rollouts:
            answer = origin.response_ids + rollout.token_ids
            end = next((cut for cut in borders(answer) if cut > len(origin.response_ids)), 0)
            inside = 0 < end < len(answer)
            room = max_response_tokens is None or end < max_response_tokens
            if inside and room and len(steps) < n:
                steps[State(origin.row, origin.prompt_ids, answer[:end])] = None
        if len(steps) > 1:
            found.append(Alternatives(origin, tuple(steps)))
    return found


@dataclass(frozen=True, eq=False)
class Candidates:
    """Sets of alternatives, and what they are truly worth.

    Attributes:
        sets: of :func:`alternatives`.
        truth: of all their states, set after set: ``ground_truth(..., states_of(sets), ...)``.
        clusters: a label for each set; None: sets of the same prompt belong together.

    Raises:
        InvalidInputError: no set, or not one truth per state, or one label per set.
    """

    sets: Sequence[Alternatives]
    truth: GroundTruth
    clusters: Sequence[Hashable] | None = None

    def __post_init__(self) -> None:
        if not self.sets:
            raise InvalidInputError(
                "sets: expected at least one, got none; sample more continuations, or judge "
                "without candidates"
            )
        wanted = len(states_of(self.sets))
        if len(self.truth) != wanted:
            raise InvalidInputError(
                f"truth: expected one value for each of the {wanted} states of the sets, got "
                f"{len(self.truth)}"
            )
        if self.clusters is not None and len(self.clusters) != len(self.sets):
            raise InvalidInputError(
                f"clusters: expected a label for each of the {len(self.sets)} sets, got "
                f"{len(self.clusters)}"
            )


def states_of(sets: Sequence[Alternatives]) -> list[State]:
    """The states of all sets, set after set."""

    def each() -> Iterator[State]:
        for one in sets:
            yield from one.states

    return list(each())
