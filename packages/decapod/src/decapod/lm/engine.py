"""What every generation engine takes and gives: token ids in, token ids and log-probs out.

Text is no part of this contract. Encoding a text that was decoded from tokens may give other
tokens, so whoever continues or scores an answer must keep its ids; see :mod:`decapod.lm.text` for
texts at the rim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from decapod.seeding import Seeds

FinishReason = Literal["stop", "length"]
LogprobsOf = Literal["model", "sampler"]
SEED_LIMIT = 2**63


class RequestError(ValueError):
    """A request that cannot be served; raised before anything is generated.

    Attributes:
        index: its place in the requests.
        id: its id.
    """

    def __init__(self, index: int, id: int | str, problem: str) -> None:
        super().__init__(f"requests[{index}] (id {id!r}): {problem}")
        self.index = index
        self.id = id


class EngineError(RuntimeError):
    """The model or the engine failed while generating."""


class LogprobsError(EngineError):
    """The model gave log-probabilities that are not numbers."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and when to stop.

    The distribution of the model is divided by ``temperature``, cut to the ``top_k`` most probable
    tokens, cut to the smallest set of the most probable ones that holds at least ``top_p`` of what
    is left, and renormalised, in this order.

    Attributes:
        max_new_tokens: most tokens of an answer, the stopping token among them.
        temperature: 0 takes the most probable token (``top_k`` and ``top_p`` then mean nothing).
        top_p: in (0, 1]; 1 keeps all.
        top_k: 0 keeps all.
        stop_token_ids: tokens that end an answer, beside the model's own end-of-sequence tokens.
        stop: texts that end an answer as soon as one appears in what was generated.
        ignore_eos: do not stop at the model's own end-of-sequence tokens.
        logprobs_of: whose log-probabilities an answer carries. ``"model"``: before temperature,
            ``top_k`` and ``top_p``. ``"sampler"``: of the distribution that tokens are drawn from,
            that is log-softmax of the logits divided by ``temperature`` after the cuts; at
            temperature 0 it is that of the model.

    Raises:
        ValueError: a value out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logprobs_of: LogprobsOf = "model"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"temperature: expected a finite number of at least 0, got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected at least 0 (0 keeps all), got {self.top_k}")
        if isinstance(self.stop, str):
            raise ValueError(f"stop: expected several texts, got one; write ({self.stop!r},)")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(int(i) for i in self.stop_token_ids))
        if not all(self.stop):
            raise ValueError("stop: expected texts that are not empty, got an empty one; drop it")
        if any(token < 0 for token in self.stop_token_ids):
            raise ValueError(
                f"stop_token_ids: expected ids of at least 0, got {self.stop_token_ids}"
            )
        if self.logprobs_of not in ("model", "sampler"):
            raise ValueError(
                f"logprobs_of: expected 'model' or 'sampler', got {self.logprobs_of!r}"
            )

    @property
    def draws_from_model(self) -> bool:
        """Whether log-probabilities of the sampler and of the model are the same numbers."""
        uncut = self.top_k == 0 and self.top_p == 1
        return self.temperature == 0 or (self.temperature == 1 and uncut)


@dataclass(frozen=True)
class Request:
    """One answer to one prompt.

    Several answers to one prompt are several requests with the same prompt and different seeds;
    engines see that the prompts are equal and compute them once.

    Attributes:
        prompt: token ids, not empty.
        params: how to draw.
        seed: in [0, 2**63). Equal requests with equal seeds have equal answers, whatever else is
            generated beside them and in whatever order (see :class:`GenerationEngine`).
        id: the caller's name for it, given back with the answer.

    Raises:
        ValueError: ``seed`` out of its range.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
    id: int | str = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(int(token) for token in self.prompt))
        object.__setattr__(self, "seed", int(self.seed))
        if not 0 <= self.seed < SEED_LIMIT:
            raise ValueError(f"seed: expected a whole number in [0, 2**63), got {self.seed}")


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        token_ids: the generated tokens; with ``"stop"`` the last one is the token that ended it.
        logprobs: natural log-probability of each of them: under the *model*, before temperature,
            ``top_k`` and ``top_p``, or under the distribution that they were drawn from, as
            ``params.logprobs_of`` asks. The two are equal at temperature 1 without cuts.
        finish_reason: ``"stop"`` at a stop token or text, ``"length"`` at ``max_new_tokens``.
        id: of the request.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    id: int | str = 0


class GenerationEngine(Protocol):
    """Generates answers to requests.

    The contract, held by the tests of every engine here:

    - answers come in the order of the requests;
    - all requests are checked before the first token is generated (:class:`RequestError`);
    - an answer depends on its own request and the weights alone, not on the other requests. That
      is: up to the rounding of the model's arithmetic, which does depend on the shape of a batch.
      Another token is drawn only where rounding (about 1e-6 in float32) decides between two;
    - seeds mean something within one kind of engine: another kind draws other answers;
    - weights that give numbers which are not finite raise :class:`LogprobsError`, where the engine
      sees them, and :class:`EngineError` elsewhere.
    """

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answers in the order of the requests.

        Raises:
            RequestError: a prompt is empty, too long with its ``max_new_tokens``, or holds an id
                that is not in the vocabulary.
            EngineError: generation failed.
        """
        ...


def sample_requests(
    prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int = 0, n: int = 1
) -> list[Request]:
    """``n`` requests for each prompt, with seeds and ids of their own.

    Args:
        prompts: token ids of each prompt.
        params: the same for all.
        seed: root of the seeds; prompt i's j-th sample has the same seed however many there are.
        n: samples per prompt.

    Returns:
        ``len(prompts) * n`` requests; sample j of prompt i has the id ``i * n + j``, its place.

    Raises:
        ValueError: ``n`` is less than 1.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    seeds = Seeds(seed).child("decapod.lm")
    return [
        Request(tuple(prompt), params, request_seed(seeds, i, j), i * n + j)
        for i, prompt in enumerate(prompts)
        for j in range(n)
    ]


def request_seed(seeds: Seeds, *names: int | str) -> int:
    """A 63-bit seed for a request out of a tree of named streams."""
    return int(seeds.sequence(*names).generate_state(1, np.uint64)[0] >> np.uint64(1))


def check_requests(
    requests: Sequence[Request], *, vocab_size: int | None, max_length: int | None
) -> None:
    """Refuse the first request that an engine cannot serve.

    Args:
        requests: all of a call.
        vocab_size: ids must be smaller; None when the engine does not know.
        max_length: most tokens of prompt and answer together; None when the engine does not know.

    Raises:
        RequestError: with the request's place and id, what was expected and got, and the remedy.
    """
    for index, request in enumerate(requests):

        def refuse(problem: str, index: int = index, request: Request = request) -> None:
            raise RequestError(index, request.id, problem)

        if not request.prompt:
            refuse("prompt: expected at least one token, got none; begin it with the BOS token")
        length, new = len(request.prompt), request.params.max_new_tokens
        if max_length is not None and length + new > max_length:
            refuse(
                f"prompt: {length} tokens and max_new_tokens={new} are more than the {max_length} "
                "positions of the model; shorten the prompt or lower max_new_tokens"
            )
        low, high = min(request.prompt), max(request.prompt)
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            refuse(
                f"prompt: expected ids in [0, {vocab_size or 'size of the vocabulary'}), got "
                f"{low if low < 0 else high}; encode it with the model's own tokenizer"
            )
