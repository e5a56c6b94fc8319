"""What the trainer asks of whatever generates: token ids in, completions with provenance out.

Requests are those of :mod:`decapod.lm`, which also holds the samplers; what is added here is *which
weights* a token was drawn with, and the handing over of new ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from decapod.lm import Request

FinishReason = Literal["stop", "length"]


class VersionSpan(NamedTuple):
    """Tokens ``start`` to ``end`` (exclusive) were drawn with weights ``version``."""

    start: int
    end: int
    version: int


@dataclass(frozen=True)
class Completion:
    """An answer with its provenance.

    Attributes:
        ids: the generated tokens; with ``"stop"`` the last one is the token that ended it.
        logprobs: natural log-probability of each under the distribution it was *drawn from*:
            log-softmax of the logits divided by the temperature (at temperature 0, by 1). These
            are the behaviour log-probabilities of importance ratios.
        version_spans: in order, without gaps, from 0 to ``len(ids)``; one span unless weights were
            swapped while the answer was being generated.
        finish_reason: ``"stop"`` at an end-of-sequence token, ``"length"`` at the limit.
        id: of the request.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    version_spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    id: int | str = 0

    @property
    def oldest_version(self) -> int:
        """The smallest version among its tokens; its staleness at step u is u minus this."""
        return min(span.version for span in self.version_spans)


@runtime_checkable
class GenerationEngine(Protocol):
    """The seam between the trainer and whatever generates.

    The contract, held by one test that runs against every engine:

    - completions come in the order of the requests, all requests are checked before the first;
    - with a deterministic engine, equal weights and equal requests (seeds included) give equal
      completions, bit for bit, however often and in whichever process;
    - a completion is tagged with the version that was loaded when its tokens were drawn;
    - :meth:`load_weights` returns after the weights are in use; when it raises, the old version
      stays the one that tags;
    - no call waits for ever: each has a limit, and says what it waited for.
    """

    @property
    def version(self) -> int:
        """Version of the weights in use."""
        ...

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Completions in the order of the requests.

        Raises:
            decapod.lm.RequestError: a request cannot be served; nothing was generated.
            decapod.lm.EngineError: generation failed.
            WaitTimeoutError: it took too long.
        """
        ...

    def load_weights(self, source: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Use these weights from now on.

        Args:
            source: names of the learner's parameters with their values, such as a
                :class:`asyncrlhf.transport.Snapshot`; all of them, or those that learn.
            version: number of optimizer steps that they have seen.

        Raises:
            WeightUpdateError: they do not fit or did not arrive; the old version stays.
        """
        ...

    def pause(self) -> None:
        """Hold back further requests; those being generated go on."""
        ...

    def resume(self) -> None:
        """Take requests again."""
        ...

    def health(self) -> str:
        """Empty when the engine can serve, else what is wrong."""
        ...

    def close(self) -> None:
        """Free what the engine holds; can be called twice."""
        ...
