"""A transformers model in this process behind the engine protocol."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asyncrlhf.engines.protocol import Completion, VersionSpan
from asyncrlhf.errors import WaitTimeoutError, WeightUpdateError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from decapod.lm import Request


class LocalEngine:
    """Generates with a model of its own, in the calling thread.

    Its parameters become views of a snapshot that is held in shared memory; those of any other
    source are copied.

    Args:
        model: decoder-only causal language model; it belongs to the engine from now on.
        eos_token_ids: tokens that end a completion.
        max_batch_size: most rows that run together.
        max_batch_tokens: most rows x tokens whose keys and values are held at the same time.
        pause_timeout: seconds that :meth:`generate` waits for :meth:`resume`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos_token_ids: Iterable[int],
        *,
        max_batch_size: int = 64,
        max_batch_tokens: int = 65_536,
        pause_timeout: float = 600.0,
    ) -> None:
        from decapod.lm import TransformersEngine

        self._model = model.requires_grad_(requires_grad=False)
        self._parameters: dict[str, Any] = dict(model.named_parameters())
        self._engine = TransformersEngine(
            model,
            eos_token_ids=eos_token_ids,
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
        )
        self._version = 0
        self._source: Any = None  # of parameters that are views; can tell whether they changed
        self._whole = True
        self._running = threading.Event()
        self._running.set()
        self._pause_timeout = pause_timeout

    @property
    def version(self) -> int:
        """Version of the weights in use; 0 before any were loaded."""
        return self._version

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Completions in the order of the requests.

        Raises:
            decapod.lm.RequestError: a request cannot be served; nothing was generated.
            decapod.lm.EngineError: generation failed.
            WaitTimeoutError: the engine stayed paused too long.
            WeightUpdateError: the snapshot was overwritten while it was in use, or the last one
                while it was loaded.
        """
        if not self._running.wait(self._pause_timeout):
            raise WaitTimeoutError("the paused engine to be resumed", self._pause_timeout)
        if not self._whole:
            raise WeightUpdateError(
                "the engine's weights are of two versions, because loading broke off; load again"
            )
        answers = self._engine.generate(requests)
        if self._source is not None:
            self._source.verify()
        for answer in answers:
            span = VersionSpan(0, len(answer.token_ids), self._version)
            yield Completion(
                answer.token_ids, answer.logprobs, (span,), answer.finish_reason, answer.id
            )

    def load_weights(self, source: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Use these weights from now on; nothing changes if one of them does not fit.

        Raises:
            WeightUpdateError: an unknown name or another shape, or the source cannot be read.
        """
        weights = list(source)
        for name, value in weights:
            own = self._parameters.get(name)
            if own is None:
                raise WeightUpdateError(
                    f"weights: the engine's model has no parameter {name!r}; publish the "
                    "parameters of the model that the engine was made from"
                )
            if own.shape != value.shape:
                raise WeightUpdateError(
                    f"weights[{name!r}]: expected shape {tuple(own.shape)}, got "
                    f"{tuple(value.shape)}"
                )
        verify = getattr(source, "verify", None)
        in_place = self._whole and self._source is None
        self._whole = views = False
        with torch.no_grad():
            for name, value in weights:
                own = self._parameters[name]
                if verify is not None and own.dtype == value.dtype and own.device == value.device:
                    own.data = value
                    views = True
                elif in_place:
                    own.copy_(value)
                else:  # what it holds may be a view of somebody else's memory
                    own.data = value.detach().to(own.device, own.dtype, copy=True)
        if verify is not None:
            verify()  # copies were made after the source was read to its end
        self._source = source if views else None
        self._version, self._whole = version, True

    def pause(self) -> None:
        """Hold back further requests."""
        self._running.clear()

    def resume(self) -> None:
        """Take requests again."""
        self._running.set()

    def health(self) -> str:
        """Always empty: what could be wrong would have raised."""
        return ""

    def close(self) -> None:
        """Nothing is held that outlives the object."""
