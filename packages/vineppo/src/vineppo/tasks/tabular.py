"""Exact samples of a token tree, by the protocol of all rollout backends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vineppo.backend import SEED_LIMIT, Usage, check_prompts, counts_of, params_of
from vineppo.episodes import Rollout
from vineppo.errors import InvalidInputError

if TYPE_CHECKING:
    from decapod.lm import SamplingParams
    from vineppo.tasks.token_tree import TokenTree

Floats = npt.NDArray[np.float64]


class TabularBackend:
    """Samples responses of a tree exactly; a ``RolloutBackend``.

    Nothing is computed twice where nothing is computed: all but the last token of a prompt count
    as reused.

    Attributes:
        usage: what was done since it was made.
    """

    def __init__(self, tree: TokenTree) -> None:
        self._tree = tree
        self.usage = Usage()

    def load_weights(self, model: TokenTree) -> None:
        """Sample from this tree from now on; :meth:`TokenTree.with_logits` gives it a policy."""
        self._tree = model

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int | Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        seeds: Sequence[int],
    ) -> list[list[Rollout]]:
        """See :class:`vineppo.backend.RolloutBackend`.

        Raises:
            InvalidInputError: an argument does not fit, a prompt is no state of the tree or has
                ended, or ``params`` asks for a stop text, which a tree has not.
        """
        started = time.perf_counter()
        counts, wanted = counts_of(n, len(prompts)), params_of(params, len(prompts))
        check_prompts(prompts, seeds)
        for i, seed in enumerate(seeds):
            if not 0 <= seed < SEED_LIMIT:
                raise InvalidInputError(f"seeds[{i}]: expected a number in [0, 2**63), got {seed}")
        nodes = [self._start(i, ids) for i, ids in enumerate(prompts)]
        for i, each in enumerate(wanted):
            if each.stop:
                raise InvalidInputError(
                    f"params[{i}].stop: expected none, got {each.stop!r}; the tokens of a tree are "
                    "no text, use stop_token_ids"
                )
        tables = {_drawn_by(p): draw_logprobs(self._tree.logits, *_drawn_by(p)) for p in wanted}
        found = [
            self._rollouts(node, count, each, tables[_drawn_by(each)], [int(seed), *ids])
            for node, count, each, seed, ids in zip(
                nodes, counts, wanted, seeds, prompts, strict=True
            )
        ]
        asked = sum(count * len(ids) for count, ids in zip(counts, prompts, strict=True))
        self.usage += Usage(
            generated_tokens=sum(len(one.token_ids) for row in found for one in row),
            prompt_tokens=asked,
            reused_tokens=asked - sum(counts),
            seconds=time.perf_counter() - started,
            requests=sum(counts),
        )
        return found

    def _start(self, index: int, ids: Sequence[int]) -> int:
        shape = self._tree.shape
        if ids[0] != shape.vocabulary:
            raise InvalidInputError(
                f"prompts[{index}]: expected the root's token {shape.vocabulary} first, got "
                f"{ids[0]}"
            )
        node = self._tree.node(ids[1:])
        if node >= shape.internal:
            raise InvalidInputError(
                f"prompts[{index}]: expected a response that has not ended, got the leaf "
                f"{tuple(ids[1:])}; its value is its reward, nothing can be sampled from it"
            )
        return node

    def _rollouts(
        self, start: int, count: int, params: SamplingParams, drawn: Floats, entropy: list[int]
    ) -> list[Rollout]:
        """All samples of a prompt, a token at a time; row j of the random numbers is sample j's."""
        shape = self._tree.shape
        logprobs = drawn if params.logprobs_of == "sampler" else self._tree.logprobs
        uniform = np.random.default_rng(entropy).random((count, shape.horizon))
        bounds = np.exp(drawn).cumsum(axis=1)
        bounds /= bounds[:, -1:]  # 1 only up to rounding
        tokens = np.zeros((count, shape.horizon), dtype=np.int64)
        of_tokens = np.zeros((count, shape.horizon))
        lengths = np.zeros(count, dtype=np.int64)
        finished = np.zeros(count, dtype=bool)
        node = np.full(count, start)
        for step in range(min(params.max_new_tokens, shape.horizon)):
            going = np.flatnonzero(~finished)
            here = node[going]
            token = (bounds[here] <= uniform[going, step, None]).sum(axis=1)
            tokens[going, step], of_tokens[going, step] = token, logprobs[here, token]
            lengths[going] += 1
            node[going] = shape.children[here, token]
            finished[going] = (node[going] >= shape.internal) | np.isin(
                token, params.stop_token_ids
            )
        return [
            Rollout(tuple(ids[:length]), tuple(of[:length]), done)
            for ids, of, length, done in zip(
                tokens.tolist(), of_tokens.tolist(), lengths, finished.tolist(), strict=True
            )
        ]


def _drawn_by(params: SamplingParams) -> tuple[float, float, int]:
    return params.temperature, params.top_p, params.top_k


def draw_logprobs(logits: Floats, temperature: float, top_p: float, top_k: int) -> Floats:
    """Log-probabilities of the distribution that tokens are drawn from.

    Args:
        logits: [n, vocabulary].
        temperature: divides the logits; 0 takes the most probable token.
        top_p: keep the smallest set of the most probable tokens that holds so much; 1 keeps all.
        top_k: keep so many of the most probable ones, before ``top_p``; 0 keeps all.

    Returns:
        [n, vocabulary], -inf for what is cut.
    """
    if temperature == 0:
        best = logits.argmax(axis=1)
        return np.where(np.arange(logits.shape[1]) == best[:, None], 0.0, -np.inf)
    scaled = logits / temperature
    order = np.argsort(-scaled, axis=1, kind="stable")
    ranked = np.take_along_axis(scaled, order, axis=1)
    if top_k:
        ranked[:, top_k:] = -np.inf
    share = np.exp(log_softmax(ranked))
    if top_p < 1:
        ranked[share.cumsum(axis=1) - share >= top_p] = -np.inf
    np.put_along_axis(scaled, order, ranked, axis=1)
    return log_softmax(scaled)


def log_softmax(logits: Floats) -> Floats:
    """Natural log-probabilities along the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found
