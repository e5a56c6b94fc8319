"""Rollouts with a transformers model of this process, and what all engines of `decapod.lm` share.

All samples of all states are requests of one call: the engine then computes a prompt that begins
another one, as successive states of a trajectory do, together with it, and K samples of a state
pay for it once. Requests hold token ids; no text is made or read.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from decapod.lm import (
    Completion,
    LogprobsError,
    Request,
    RequestError,
    SamplingParams,
    TransformersEngine,
)
from vineppo.backend import (
    RolloutBackend,
    Usage,
    check_prompts,
    counts_of,
    params_of,
    sample_seeds,
)
from vineppo.episodes import Rollout
from vineppo.errors import InvalidInputError, NotFiniteError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Call", "RolloutBackend", "SamplingParams", "TransformersBackend", "Usage"]


@dataclass(frozen=True)
class Call:
    """The requests of one call of a backend, all samples of a prompt side by side.

    Attributes:
        requests: of all samples; the id of each is its place.
        counts: samples of each prompt.
    """

    requests: list[Request]
    counts: list[int]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], n: Any, params: Any, seeds: Any) -> Call:
        """Check the arguments of :meth:`RolloutBackend.generate` and make requests of them.

        Raises:
            InvalidInputError: an argument does not fit.
        """
        check_prompts(prompts, seeds)
        counts = counts_of(n, len(prompts))
        each = params_of(params, len(prompts))
        requests: list[Request] = []
        for prompt, how, some in zip(prompts, each, sample_seeds(seeds, counts), strict=True):
            ids = tuple(prompt)
            requests += [Request(ids, how, seed, len(requests) + j) for j, seed in enumerate(some)]
        return cls(requests, counts)

    def needs_eos(self, name: str, known: bool) -> None:
        """Refuse rollouts that no token could end.

        Args:
            name: of the argument that should have brought an end-of-sequence token.
            known: whether it did.

        Raises:
            InvalidInputError: it did not, and a request has no other way to end.
        """
        if known:
            return
        for request in self.requests:
            params = request.params
            if not (params.ignore_eos or params.stop_token_ids or params.stop):
                raise InvalidInputError(
                    f"{name}: expected an end-of-sequence token, or no rollout would ever finish, "
                    "got none; give eos_token_ids or params.stop_token_ids, or ask for rollouts of "
                    "full length by params.ignore_eos=True"
                )

    @contextmanager
    def told(self) -> Iterator[None]:
        """Errors of the engine in words of the backend's arguments.

        Raises:
            InvalidInputError: the engine refused a request.
            NotFiniteError: log-probabilities are not numbers.
        """
        try:
            yield
        except RequestError as error:
            index = next(i for i, end in enumerate(self._ends()) if error.index < end)
            problem = str(error).partition("): ")[2]
            named = problem.removeprefix("prompt: ")
            where = f"prompts[{index}]"
            raise InvalidInputError(
                f"{where}: {named}" if named != problem else f"{problem} (for {where})"
            ) from error
        except LogprobsError as error:
            raise NotFiniteError(f"logprobs of rollouts: {error}") from error

    def rollouts(self, completions: Sequence[Completion]) -> list[list[Rollout]]:
        """The completions of the requests, by prompt.

        Raises:
            NotFiniteError: log-probabilities are not numbers.
        """
        found = []
        for done in completions:
            if any(math.isnan(value) for value in done.logprobs):
                raise NotFiniteError(
                    "logprobs of rollouts: the model's log-probabilities are not numbers (NaN); "
                    "look for NaN or infinite values among its weights"
                )
            found.append(Rollout(done.token_ids, done.logprobs, done.finish_reason == "stop"))
        return [
            found[end - count : end] for count, end in zip(self.counts, self._ends(), strict=True)
        ]

    def usage(self, completions: Sequence[Completion], reused: int, seconds: float) -> Usage:
        """What serving it took."""
        return Usage(
            sum(len(done.token_ids) for done in completions),
            sum(len(request.prompt) for request in self.requests),
            reused,
            seconds,
            len(self.requests),
        )

    def _ends(self) -> list[int]:
        ends, end = [], 0
        for count in self.counts:
            end += count
            ends.append(end)
        return ends


def adjacent_shares(requests: Sequence[Request], shares: int) -> list[list[int]]:
    """Cut requests into shares of about equal length, each of prompts that begin alike.

    In lexicographic order all states of a trajectory, and all trajectories of a problem, stand
    side by side; so a cut costs the prefix of one trajectory, which two then compute.

    Args:
        requests: of a call.
        shares: at most so many.

    Returns:
        Places of the requests of each share, none empty; equal prompts in order.
    """
    order = sorted(range(len(requests)), key=lambda i: (requests[i].prompt, i))
    total = sum(request.params.max_new_tokens for request in requests)
    found: dict[int, list[int]] = {}
    before = 0
    for index in order:
        found.setdefault(before * shares // max(1, total), []).append(index)
        before += requests[index].params.max_new_tokens
    return list(found.values())


class TransformersBackend:
    """Rollouts with a transformers model of this process; see :class:`RolloutBackend`.

    The model stays the caller's: what it is at a call is what generates, in evaluation mode and
    without gradients. It may be wrapped by PEFT.

    Args:
        model: decoder-only, with a cache of keys and values per position.
        tokenizer: needed for ``params.stop`` texts; brings its end-of-sequence token.
        eos_token_ids: tokens that end a rollout; None takes the model's own and the tokenizer's.
        max_length: most tokens of prompt and rollout together; None takes the model's positions.
        max_batch_size: most rollouts that run together.
        max_batch_tokens: most rollouts x tokens whose keys and values are held at the same time.

    Attributes:
        engine: that serves the requests.

    Raises:
        InvalidInputError: the model is of another kind, a limit is not positive, or the tokenizer
            has no end-of-sequence token and none is given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        eos_token_ids: Iterable[int] | None = None,
        max_length: int | None = None,
        max_batch_size: int = 256,
        max_batch_tokens: int = 65_536,
    ) -> None:
        try:
            self.engine = TransformersEngine(
                model,
                tokenizer,
                eos_token_ids=eos_token_ids,
                max_length=max_length,
                max_batch_size=max_batch_size,
                max_batch_tokens=max_batch_tokens,
            )
        except (TypeError, ValueError) as error:
            raise InvalidInputError(str(error)) from error
        if eos_token_ids is None and tokenizer is not None:
            if tokenizer.eos_token_id is None:
                raise InvalidInputError(
                    "tokenizer: expected one with an end-of-sequence token, got none; set "
                    "tokenizer.eos_token, or give eos_token_ids"
                )
            self.engine.eos_token_ids |= {int(tokenizer.eos_token_id)}
        self._usage = Usage()

    @property
    def model(self) -> PreTrainedModel:
        """That generates."""
        return self.engine.model

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a rollout, unless ``params.ignore_eos`` is set."""
        return self.engine.eos_token_ids

    @property
    def usage(self) -> Usage:
        """What was done since the backend was made."""
        return self._usage

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int | Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        seeds: Sequence[int],
    ) -> list[list[Rollout]]:
        """Rollouts from each prompt; see :meth:`RolloutBackend.generate`."""
        call = Call.of(prompts, n, params, seeds)
        call.needs_eos("model", bool(self.eos_token_ids))
        started, reused = time.perf_counter(), self.engine.cached_prompt_tokens
        with call.told():
            completions = self.engine.generate(call.requests)
        reused = self.engine.cached_prompt_tokens - reused
        self._usage += call.usage(completions, reused, time.perf_counter() - started)
        return call.rollouts(completions)

    def check(self, requests: Sequence[Request]) -> None:
        """Refuse what the engine would refuse, without generating.

        Raises:
            decapod.lm.RequestError: with the place of the first request that does not fit.
        """
        self.engine.iterate(requests)

    def load_weights(self, model: Any) -> None:
        """Copy the weights of another model into this one's; nothing for the very same model.

        Args:
            model: of the same kind. Adapters of PEFT are merged where this one has none.

        Raises:
            InvalidInputError: the weights do not fit; nothing was copied.
        """
        if model is self.model:
            return
        source = model if hasattr(self.model, "peft_config") else merged(model)
        try:
            self.engine.load_weights(source.state_dict())
        except ValueError as error:
            raise InvalidInputError(f"model: {error}") from error


def merged(model: Any) -> Any:
    """The model itself, or where PEFT wraps it a copy with the adapters merged into its weights.

    A copy, because merging in place and undoing it would round the learner's weights.

    Raises:
        InvalidInputError: the adapters are of a kind that cannot be merged.
    """
    if not hasattr(model, "peft_config"):
        return model
    if not hasattr(model, "merge_and_unload"):
        raise InvalidInputError(
            "model: expected adapters that can be merged into the weights, such as LoRA, got "
            f"{type(model).__name__} with prompts that are learned; use TransformersBackend"
        )
    with torch.no_grad():
        return copy.deepcopy(model).merge_and_unload()
