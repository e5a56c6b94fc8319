"""What samples from states: the protocol of all backends, their counts, and their seeds.

A backend gets token ids and gives token ids. One call holds all states of a batch with all their
samples, so that whoever generates can compute what they share once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vineppo.episodes import Rollout
from vineppo.errors import InvalidInputError

if TYPE_CHECKING:
    from decapod.lm import SamplingParams

SEED_LIMIT = 2**63
# Constants of SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
# OOPSLA 2014; the mixer is Stafford's variant 13.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), 0xBF58476D1CE4E5B9), (np.uint64(27), 0x94D049BB133111EB))


@dataclass(frozen=True)
class Usage:
    """What a backend has done since it was made; the difference of two is what was done between.

    Attributes:
        generated_tokens: of all rollouts, the ending token among them.
        prompt_tokens: of all prompts, each counted as often as it was sampled from.
        reused_tokens: those of ``prompt_tokens`` that were not computed, because keys and values of
            an equal beginning were at hand. The last token of a prompt is always computed.
        seconds: spent in ``generate``.
        requests: rollouts asked for.
    """

    generated_tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    seconds: float = 0.0
    requests: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that needed no computation; 0 before the first."""
        return self.reused_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.generated_tokens + other.generated_tokens,
            self.prompt_tokens + other.prompt_tokens,
            self.reused_tokens + other.reused_tokens,
            self.seconds + other.seconds,
            self.requests + other.requests,
        )

    def __sub__(self, other: Usage) -> Usage:
        return Usage(
            self.generated_tokens - other.generated_tokens,
            self.prompt_tokens - other.prompt_tokens,
            self.reused_tokens - other.reused_tokens,
            self.seconds - other.seconds,
            self.requests - other.requests,
        )


class RolloutBackend(Protocol):
    """Samples continuations of token ids.

    The contract, held by the tests of every backend here:

    - rollouts come in the order of the prompts, and of a prompt in the order of its samples;
    - everything is checked before the first token is generated;
    - sample j of a prompt is a function of its ids, its params, its seed, j and the weights alone:
      not of the number of samples, nor of what else is asked for, nor of the order. That is: up to
      the rounding of the model's arithmetic, which does depend on the shape of a batch;
    - no prompt is turned into text.
    """

    @property
    def usage(self) -> Usage:
        """What was done since the backend was made."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int | Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        seeds: Sequence[int],
    ) -> list[list[Rollout]]:
        """Rollouts from each prompt.

        Args:
            prompts: token ids, none empty.
            n: rollouts from each prompt: one number of at least 1, or one per prompt, where 0 asks
                for none from that prompt.
            params: how to draw and when to stop, for all prompts or for each of them.
            seeds: of each prompt, in [0, 2**63).

        Returns:
            For each prompt a list of its rollouts.

        Raises:
            InvalidInputError: an argument does not fit; nothing was generated.
            NotFiniteError: the model's log-probabilities are not numbers.
        """
        ...

    def load_weights(self, model: Any) -> None:
        """Generate by the weights of this model from now on, and forget all cached prefixes.

        Does nothing where the backend holds the very same model.
        """
        ...


def sample_seeds(seeds: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """A seed for each sample of each prompt; that of sample j depends on seed and j alone.

    Args:
        seeds: of each prompt, in [0, 2**63).
        counts: samples of each prompt, at least 0.

    Returns:
        For each prompt ``counts`` seeds in [0, 2**63): two rounds of SplitMix64 over seed and j.

    Raises:
        InvalidInputError: a seed is out of its range or no whole number.
    """
    given: Sequence[Any] = seeds
    for index, seed in enumerate(given):
        if not isinstance(seed, int | np.integer) or not 0 <= seed < SEED_LIMIT:
            raise InvalidInputError(
                f"seeds[{index}]: expected a whole number in [0, 2**63), got {seed!r}"
            )
    roots = np.asarray([int(seed) for seed in seeds], dtype=np.uint64)
    streams = _mixed((roots + np.uint64(1)) * _GAMMA)
    numbers = np.arange(1, max(counts, default=0) + 1, dtype=np.uint64) * _GAMMA
    words = _mixed(streams[:, None] + numbers) >> np.uint64(1)
    return [row[:count] for row, count in zip(words.tolist(), counts, strict=True)]


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for bits, factor in _MIX:
        x = (x ^ (x >> bits)) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def counts_of(n: Any, prompts: int) -> list[int]:
    """How many rollouts each of so many prompts gets.

    Args:
        n: one number of at least 1, or one of at least 0 per prompt.
        prompts: how many there are.

    Raises:
        InvalidInputError: ``n`` is 0 or less, a member is negative, one is no whole number, or
            there are more or fewer of them than prompts.
    """
    if isinstance(n, int | np.integer) and not isinstance(n, bool):
        if n < 1:
            raise InvalidInputError(f"n: expected at least 1 rollout per prompt, got {n}")
        return [int(n)] * prompts
    if isinstance(n, bool | float | str) or not hasattr(n, "__len__"):
        raise InvalidInputError(f"n: expected a whole number, or one per prompt, got {n!r}")
    if len(n) != prompts:
        raise InvalidInputError(f"n: expected one number per prompt, {prompts}, got {len(n)}")
    for index, count in enumerate(n):
        if not isinstance(count, int | np.integer) or isinstance(count, bool) or count < 0:
            raise InvalidInputError(
                f"n[{index}]: expected a whole number of at least 0, got {count}"
            )
    return [int(count) for count in n]


def params_of(params: Any, prompts: int) -> list[SamplingParams]:
    """The sampling parameters of each of so many prompts.

    Args:
        params: for all of them, or a list with one for each.
        prompts: how many there are.

    Raises:
        InvalidInputError: there are more or fewer of them than prompts.
    """
    if not isinstance(params, list | tuple):
        if not hasattr(params, "max_new_tokens"):
            raise InvalidInputError(
                f"params: expected SamplingParams, or a list of them, got {type(params).__name__}"
            )
        return [params] * prompts
    if len(params) != prompts:
        raise InvalidInputError(
            f"params: expected SamplingParams, or one per prompt, {prompts}, got {len(params)}"
        )
    return list(params)


def check_prompts(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
    """Refuse empty prompts, and seeds that are not one per prompt.

    Raises:
        InvalidInputError: with the name of the argument.
    """
    if len(seeds) != len(prompts):
        raise InvalidInputError(f"seeds: expected one per prompt, {len(prompts)}, got {len(seeds)}")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InvalidInputError(
                f"prompts[{index}]: expected at least one token, got none; begin it with the BOS "
                "token"
            )
