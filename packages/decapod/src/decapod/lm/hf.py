"""Generation with a transformers model in this process.

A wave of requests runs like this. Prompts without their last token are the *contexts*; one that is
a prefix of another needs no computation of its own, because keys and values at a position depend on
the tokens up to it alone. What is left, the *roots*, goes through the model once. Each row of the
decoding batch then takes its part of its root's cache, moved to the right border (left padding),
and starts from its last prompt token. Rows that have ended leave the batch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from decapod.lm.engine import (
    Completion,
    EngineError,
    LogprobsError,
    Request,
    RequestError,
    check_requests,
)
from decapod.lm.sampling import choose, sampler_logprobs
from decapod.lm.waves import batches, share_prefixes

# Ended rows stay until they are this share of the batch: leaving costs a copy of the cache.
_COMPACT_BELOW = 0.75


class TransformersEngine:
    """A causal language model of transformers behind :class:`decapod.lm.GenerationEngine`.

    The model stays the caller's: train it, move it, change its weights in place, and the next call
    of :meth:`generate` uses what it then is. Generation runs in evaluation mode without gradients
    and leaves every module in the mode it was in. One call at a time.

    Args:
        model: decoder-only, with a cache of keys and values per position.
        tokenizer: needed only for requests with ``stop`` texts.
        eos_token_ids: tokens that end an answer; None takes the model's own, from its generation
            config or else its config.
        max_length: most tokens of prompt and answer together; None takes the number of positions
            of the model's config, where it says so.
        max_batch_size: most rows that run together.
        max_batch_tokens: most rows x (prompt + answer) tokens whose keys and values are held at the
            same time; a single request may exceed it. Up to as much again is held for contexts.

    Attributes:
        cached_prompt_tokens: of all requests so far, the tokens of their prompts that were not
            computed for them, because a prompt beside them begins alike. Padding is not counted.

    Raises:
        TypeError: the model is an encoder-decoder or keeps a recurrent state instead of a cache.
        ValueError: a limit is not positive.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        eos_token_ids: Iterable[int] | None = None,
        max_length: int | None = None,
        max_batch_size: int = 64,
        max_batch_tokens: int = 65_536,
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        if model.config.is_encoder_decoder:
            raise TypeError(f"model: expected a decoder-only model, got {type(model).__name__}")
        if getattr(model, "_is_stateful", False):
            raise TypeError(
                f"model: expected keys and values per position, but {type(model).__name__} keeps a "
                "recurrent state, which cannot be shared between prompts; use another engine"
            )
        limits = {"max_batch_size": max_batch_size, "max_batch_tokens": max_batch_tokens}
        if max_length is not None:
            limits["max_length"] = max_length
        for name, limit in limits.items():
            if limit < 1:
                raise ValueError(f"{name}: expected at least 1, got {limit}")
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length or getattr(config, "max_position_embeddings", None)
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.cached_prompt_tokens = 0
        self.eos_token_ids = _eos(model) if eos_token_ids is None else frozenset(eos_token_ids)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._takes = frozenset(inspect.signature(cast(Any, inner).forward).parameters)
        # Named so from transformers 5.24 on.
        self._cache = "cache" if "cache" in self._takes else "past_key_values"

    @property
    def vocab_size(self) -> int:
        """How many token ids the model has embeddings for."""
        return int(cast(Any, self.model.get_input_embeddings()).num_embeddings)

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy all weights of a state dict into the model; nothing is copied if one does not fit.

        Args:
            weights: as ``model.state_dict()`` gives them, on any device, of any floating type.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs.
        """
        own = self.model.state_dict()
        missing, unknown = sorted(own.keys() - weights), sorted(weights.keys() - own.keys())
        if missing or unknown:
            raise ValueError(
                f"weights: expected the {len(own)} names of the model; missing {missing[:3]}, "
                f"unknown {unknown[:3]} ({len(missing)} and {len(unknown)} in all)"
            )
        for name, tensor in own.items():
            if weights[name].shape != tensor.shape:
                raise ValueError(
                    f"weights[{name!r}]: expected shape {tuple(tensor.shape)}, got "
                    f"{tuple(weights[name].shape)}"
                )
        self.model.load_state_dict(weights)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answers in the order of the requests; see :class:`decapod.lm.GenerationEngine`.

        Raises:
            RequestError: a request cannot be served; nothing was generated.
            LogprobsError: the model gave log-probabilities that are not numbers.
        """
        answers = dict(self.iterate(requests))
        return [answers[i] for i in range(len(requests))]

    def iterate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """Answers as batches of them are done, each with the place of its request; see `generate`.

        The model may be used between two answers, but its weights must stay until the last: the
        keys and values of prompts that were computed go on being used.

        Raises:
            RequestError: a request cannot be served; raised by the call, not by the first answer.
            LogprobsError: the model gave log-probabilities that are not numbers.
        """
        check_requests(requests, vocab_size=self.vocab_size, max_length=self.max_length)
        for index, request in enumerate(requests):
            if request.params.stop and self.tokenizer is None:
                raise RequestError(
                    index, request.id, "params.stop: the engine has no tokenizer to read its "
                    "tokens as text; make it with one, or use stop_token_ids"
                )  # fmt: skip
        return self._iterate(requests)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients, and every module back in the mode it was in."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training

    def _iterate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        shared = share_prefixes([request.prompt[:-1] for request in requests])
        shared.sort(key=lambda root: len(root[0]))
        lengths = [len(context) for context, _ in shared]
        for some in batches(lengths, self.max_batch_size, self.max_batch_tokens):
            roots = [shared[i] for i in some]
            # Modes are put back before answers are handed over: the caller may train meanwhile.
            with self._evaluating():
                cache = self._prefill([context for context, _ in roots])
            self.cached_prompt_tokens += sum(
                sum(len(requests[i].prompt) - 1 for i in users) - len(context)
                for context, users in roots
            )
            pairs = [(row, index) for row, (_, users) in enumerate(roots) for index in users]
            sizes = [len(requests[i].prompt) + requests[i].params.max_new_tokens for _, i in pairs]
            for chunk in batches(sizes, self.max_batch_size, self.max_batch_tokens):
                indices = [pairs[i][1] for i in chunk]
                batch = [requests[i] for i in indices]
                with self._evaluating():
                    done = self._decode(batch, cache, [pairs[i][0] for i in chunk])
                yield from zip(indices, done, strict=True)

    def _forward(self, **inputs: Any) -> Any:
        if "position_ids" not in self._takes:
            del inputs["position_ids"]
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        return self.model(**inputs, use_cache=True)

    def _prefill(self, contexts: Sequence[tuple[int, ...]]) -> DynamicCache:
        """Keys and values of contexts, one per row, padded on the right by token 0."""
        cache = DynamicCache()
        width = max(map(len, contexts))
        if width:
            # Padding on the right is behind everything that is read later; no mask is needed.
            ids = [[*context, *[0] * (width - len(context))] for context in contexts]
            input_ids = torch.tensor(ids, device=self.model.device)
            self._forward(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                position_ids=torch.arange(width, device=input_ids.device)[None],
                **{self._cache: cache},
            )
            if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
                raise EngineError(
                    f"{type(self.model).__name__} does not keep keys and values per position; "
                    "use another engine"
                )
        return cache

    def _decode(
        self, batch: Sequence[Request], prefilled: DynamicCache, roots: Sequence[int]
    ) -> list[Completion]:
        """Answers to requests whose contexts are prefixes of rows ``roots`` of a cache."""
        device = self.model.device
        state = _Rows.of(batch, self.eos_token_ids, device)
        width = int(state.lengths.max())
        steps = int(state.limits.max())
        cache = _expand(prefilled, torch.tensor(roots, device=device), state.lengths, width)
        columns = torch.arange(width + steps, device=device)
        mask = (columns >= width - state.lengths[:, None]).long()
        tokens = torch.zeros(len(batch), steps, dtype=torch.long, device=device)
        logprobs = torch.zeros(len(batch), steps, device=device)
        sizes, stopped = [0] * len(batch), [False] * len(batch)
        texts = any(request.params.stop for request in batch)
        for step in range(steps):
            positions = state.lengths + step
            if self.max_length is not None:  # rows that have ended may run beyond
                positions = positions.clamp(max=self.max_length - 1)
            output = self._forward(
                input_ids=state.last[:, None],
                attention_mask=mask[:, : width + step + 1],
                position_ids=positions[:, None],
                **{self._cache: cache},
            )
            logits = output.logits[:, -1]
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            state.last = choose(
                scores, state.temperature, state.top_k, state.top_p, state.seeds, step
            )
            chosen = state.logprobs(scores)
            tokens[state.rows, step] = state.last
            logprobs[state.rows, step] = chosen.to(logprobs.dtype)
            stop = (state.last[:, None] == state.stops).any(-1)
            if texts:
                stop |= self._stop_texts(batch, state, tokens[:, : step + 1])
            ended = state.active & (stop | (step + 1 == state.limits))
            if bool(ended.any()):
                for row, is_stop in zip(
                    state.rows[ended].tolist(), stop[ended].tolist(), strict=True
                ):
                    sizes[row], stopped[row] = step + 1, is_stop
                state.active &= ~ended
                live = int(state.active.sum())
                if live == 0:
                    break
                if live <= _COMPACT_BELOW * len(state.active):
                    keep = state.active.nonzero()[:, 0]
                    state, mask = state.select(keep), mask[keep]
                    cache.batch_select_indices(keep)
        ids = tokens[:, : max(sizes)].tolist()
        values = logprobs[:, : max(sizes)].tolist()
        if any(math.isnan(v) for row, size in zip(values, sizes, strict=True) for v in row[:size]):
            raise LogprobsError(
                "the model's log-probabilities are not numbers (NaN); look for NaN or infinite "
                "values among its weights"
            )
        return [
            Completion(
                tuple(ids[row][: sizes[row]]),
                tuple(values[row][: sizes[row]]),
                "stop" if stopped[row] else "length",
                request.id,
            )
            for row, request in enumerate(batch)
        ]

    def _stop_texts(
        self, batch: Sequence[Request], state: _Rows, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Which rows have just completed one of their stop texts, (rows,) bool."""
        found = torch.zeros_like(state.active)
        tokenizer = cast(Any, self.tokenizer)
        for place, (row, active) in enumerate(
            zip(state.rows.tolist(), state.active.tolist(), strict=True)
        ):
            stops = batch[row].params.stop
            if active and stops:
                # No token is shorter than a byte, but for special ones: a few to spare.
                longest = max(len(stop.encode()) for stop in stops) + 4
                text = tokenizer.decode(
                    tokens[row, -longest:].tolist(),
                    skip_special_tokens=True,
                    clean_up_tokenization_spaces=False,
                )
                found[place] = any(stop in text for stop in stops)
        return found


@dataclass
class _Rows:
    """What belongs to each row of a decoding batch; all (rows,), but ``stops`` (rows, tokens)."""

    rows: torch.Tensor  # number in the batch as it was at the start
    active: torch.Tensor
    last: torch.Tensor  # token to run next
    lengths: torch.Tensor  # of the context
    limits: torch.Tensor
    stops: torch.Tensor  # padded by -1
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    seeds: torch.Tensor
    reshaped: torch.Tensor  # asks for log-probabilities of a sampler that is not the model

    @classmethod
    def of(cls, batch: Sequence[Request], eos: frozenset[int], device: torch.device) -> _Rows:
        """The start of a batch."""

        def column(values: list[Any], dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        params = [request.params for request in batch]
        stops = [[*p.stop_token_ids, *(() if p.ignore_eos else eos)] for p in params]
        widest = max(1, *map(len, stops))
        return cls(
            rows=torch.arange(len(batch), device=device),
            active=torch.ones(len(batch), dtype=torch.bool, device=device),
            last=column([request.prompt[-1] for request in batch]),
            lengths=column([len(request.prompt) - 1 for request in batch]),
            limits=column([p.max_new_tokens for p in params]),
            stops=column([[*row, *[-1] * (widest - len(row))] for row in stops]),
            temperature=column([p.temperature for p in params], torch.float64),
            top_k=column([p.top_k for p in params]),
            top_p=column([p.top_p for p in params], torch.float64),
            seeds=column([request.seed for request in batch]),
            reshaped=column(
                [p.logprobs_of == "sampler" and not p.draws_from_model for p in params], torch.bool
            ),
        )

    def logprobs(self, scores: torch.Tensor) -> torch.Tensor:
        """Of the last tokens, as each row asks for it; from (rows, vocabulary) of the model."""
        chosen = scores.gather(-1, self.last[:, None])[:, 0]
        rows = self.reshaped.nonzero()[:, 0]
        if len(rows):
            drawn_from = sampler_logprobs(
                scores[rows], self.temperature[rows], self.top_k[rows], self.top_p[rows]
            )
            found = drawn_from.gather(-1, self.last[rows, None])[:, 0]
            chosen[rows] = found.to(chosen.dtype)
        return chosen

    def select(self, keep: torch.Tensor) -> _Rows:
        """The rows of these places."""
        return _Rows(**{field.name: getattr(self, field.name)[keep] for field in fields(self)})


def _expand(
    prefilled: DynamicCache, roots: torch.Tensor, lengths: torch.Tensor, width: int
) -> DynamicCache:
    """A cache with the first ``lengths`` positions of rows ``roots``, padded on the left."""
    cache = DynamicCache()
    if width == 0:
        return cache
    columns = torch.arange(width, device=lengths.device)
    source = (columns - (width - lengths[:, None])).clamp(min=0)
    ragged = bool((lengths != width).any())
    for layer, (keys, values) in enumerate(_keys_and_values(prefilled)):
        moved = []
        for tensor in (keys, values):
            rows = tensor[:, :, :width].index_select(0, roots)
            if ragged:
                places = source[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
                rows = rows.gather(2, places)
            moved.append(rows)
        cache.update(moved[0], moved[1], layer)
    return cache


def _keys_and_values(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(cast(Any, layer).keys, cast(Any, layer).values) for layer in cache.layers]


def _eos(model: PreTrainedModel) -> frozenset[int]:
    for config in (model.generation_config, model.config.get_text_config(decoder=True)):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()
