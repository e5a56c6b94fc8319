"""Several engines as one."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from asyncrlhf.engines.protocol import Completion, GenerationEngine
from asyncrlhf.errors import ActorError, InvalidInputError, WaitTimeoutError, WeightUpdateError
from asyncrlhf.settings import positive

if TYPE_CHECKING:
    from decapod.lm import Request

_LOG = logging.getLogger(__name__)


class Replicas:
    """Engines that hold the same weights and share each call's requests.

    The requests of one prompt stay together, so that each prompt is computed, and cached, in one
    place; of neighbouring prompts each engine gets a run of about equal length. The split depends
    on the requests and on which engines can serve, and on nothing else.

    An engine that fails while it generates leaves its share to the others, which have the same
    weights; it is asked again in the next call if it then says that it is well. Where rounding
    depends on what stands beside a request, requests that were split otherwise may come back with
    log-probabilities that differ in the last digits.

    New weights go to all engines at once, and the version moves when all have them. If some have
    not, the engines hold different weights: :meth:`generate` refuses until an update reaches all.
    So an engine that died for good stops a run; start it again, or go on with the others in a new
    object.

    Args:
        engines: at least one; they belong to this object from now on.
        names: of each, for messages; None numbers them.
        timeout: seconds that one call of any engine may take here, beside its own limits.

    Raises:
        InvalidInputError: no engines, not as many names, engines with different versions, or a
            number out of range.
    """

    def __init__(
        self,
        engines: Sequence[GenerationEngine],
        *,
        names: Sequence[str] | None = None,
        timeout: float = 3600.0,
    ) -> None:
        if not engines:
            raise InvalidInputError("engines: expected at least one, got none")
        if names is not None and len(names) != len(engines):
            raise InvalidInputError(f"names: expected {len(engines)}, got {len(names)}")
        positive("timeout", timeout)
        versions = {engine.version for engine in engines}
        if len(versions) > 1:
            raise InvalidInputError(
                f"engines: expected one version of weights in all, got {sorted(versions)}; load "
                "the same weights into all first"
            )
        self._engines = list(engines)
        self._names = list(names or (f"replica {i}" for i in range(len(engines))))
        self._timeout = timeout
        self._version = versions.pop()
        self._mixed = ""
        self.failures = [0] * len(engines)
        """How often each engine left its share to the others."""

    @property
    def version(self) -> int:
        """Version of the weights that all engines have acknowledged last."""
        return self._version

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Completions in the order of the requests; returns when all are there.

        Raises:
            decapod.lm.RequestError: a request cannot be served.
            ActorError: every engine failed; the message has what each said.
            WeightUpdateError: the engines hold different weights since an update failed.
            WaitTimeoutError: an engine took too long.
        """
        if self._mixed:
            raise WeightUpdateError(
                f"{self._mixed}. Nothing is generated until an update reaches all of them"
            )
        requests = list(requests)
        done: dict[int, Completion] = {}
        problems = self._problems()
        left = list(range(len(requests)))
        serving = [i for i in range(len(self._engines)) if i not in problems]
        while left:
            if not serving:
                told = "; ".join(f"{self._names[i]}: {said}" for i, said in problems.items())
                raise ActorError(f"no replica is left for {len(left)} requests: {told}")
            shares = split([requests[i] for i in left], len(serving))
            places = {
                engine: [left[i] for i in share]
                for engine, share in zip(serving, shares, strict=True)
                if share
            }
            given, raised = self._each(
                {
                    engine: _generating(self._engines[engine], [requests[i] for i in share])
                    for engine, share in places.items()
                },
                "generate",
            )
            for engine, completions in given.items():
                done.update(zip(places[engine], completions, strict=True))
            for engine, error in raised.items():
                self._note(engine, error, places[engine], problems)
            serving = [engine for engine in serving if engine not in raised]
            left = [i for i in left if i not in done]
        return iter([done[i] for i in range(len(requests))])

    def load_weights(self, source: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Use these weights from now on, in all engines.

        Raises:
            WeightUpdateError: some engines have not got them; the version stays. Where others have,
                nothing is generated until an update reaches all.
        """
        if iter(source) is source:  # can be read once only
            source = list(source)
        _, raised = self._each(
            {i: _loading(engine, source, version) for i, engine in enumerate(self._engines)},
            "load weights",
        )
        if not raised:
            self._version, self._mixed = version, ""
            return
        told = "; ".join(f"{self._names[i]}: {error}" for i, error in raised.items())
        versions = {
            name: engine.version for name, engine in zip(self._names, self._engines, strict=True)
        }
        # Those that have not answered may still load them.
        late = any(isinstance(error, WaitTimeoutError) for error in raised.values())
        if late or set(versions.values()) != {self._version}:
            self._mixed = f"replicas hold different weights: {versions}"
        raise WeightUpdateError(
            f"weights of version {version} reached {len(self._engines) - len(raised)} of "
            f"{len(self._engines)} replicas; {told}"
        ) from next(iter(raised.values()))

    def pause(self) -> None:
        """Hold back further requests."""
        for engine in self._engines:
            engine.pause()

    def resume(self) -> None:
        """Take requests again."""
        for engine in self._engines:
            engine.resume()

    def health(self) -> str:
        """Empty when all engines can serve, else what is wrong with which."""
        said = [f"{self._names[i]}: {problem}" for i, problem in self._problems().items()]
        return self._mixed or "; ".join(said)

    def close(self) -> None:
        """Close all engines; can be called twice."""
        for engine in self._engines:
            engine.close()

    def attach(self, model: Any, eos_token_ids: Iterable[int]) -> None:
        """Pass the learner's model to the engines that take one."""
        eos = tuple(eos_token_ids)
        for engine in self._engines:
            attach = getattr(engine, "attach", None)
            if attach is not None:
                attach(model, eos)

    def _problems(self) -> dict[int, str]:
        """What is wrong with engines, by their place."""
        found = {}
        for i, engine in enumerate(self._engines):
            problem = engine.health()
            if not problem and engine.version != self._version:
                problem = f"it has weights of version {engine.version} instead of {self._version}"
            if problem:
                found[i] = problem
        return found

    def _note(
        self, engine: int, error: Exception, share: list[int], problems: dict[int, str]
    ) -> None:
        from decapod.lm import RequestError

        if isinstance(error, RequestError):
            _, _, problem = str(error).partition("): ")
            raise RequestError(share[error.index], error.id, problem) from error
        problems[engine] = f"{type(error).__name__}: {error}"
        self.failures[engine] += 1
        _LOG.warning(
            "%s failed, its %d requests go to the others: %s",
            self._names[engine],
            len(share),
            problems[engine],
        )

    def _each(
        self, work: dict[int, Callable[[], Any]], what: str
    ) -> tuple[dict[int, Any], dict[int, Exception]]:
        """What each engine gave, and what others raised, side by side in threads."""
        given: dict[int, Any] = {}
        raised: dict[int, Exception] = {}

        def run(engine: int) -> None:
            try:
                given[engine] = work[engine]()
            except Exception as error:  # noqa: BLE001 - told to the caller
                raised[engine] = error

        threads = {
            engine: threading.Thread(
                target=run, args=(engine,), name=f"asyncrlhf-{self._names[engine]}", daemon=True
            )
            for engine in work
        }
        for thread in threads.values():
            thread.start()
        deadline = time.monotonic() + self._timeout
        for engine, thread in threads.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raised[engine] = WaitTimeoutError(f"{self._names[engine]} to {what}", self._timeout)
        # Copies: one that is late must not add to what was told.
        failed = {engine: raised[engine] for engine in work if engine in raised}
        return {engine: given[engine] for engine in work if engine not in failed}, failed


def split(requests: Sequence[Request], parts: int) -> list[list[int]]:
    """Places of the requests of each part: runs of about equal length that part no equal prompts.

    A share differs from the mean by less than the longest run of equal prompts.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    begin = 0
    for _, group in itertools.groupby(requests, key=lambda request: request.prompt):
        size = sum(1 for _ in group)
        # Twice the middle of the group, in whole numbers.
        part = (2 * begin + size) * parts // (2 * len(requests))
        shares[part].extend(range(begin, begin + size))
        begin += size
    return shares


def _generating(
    engine: GenerationEngine, requests: list[Request]
) -> Callable[[], list[Completion]]:
    return lambda: list(engine.generate(requests))


def _loading(
    engine: GenerationEngine, source: Iterable[tuple[str, Tensor]], version: int
) -> Callable[[], None]:
    return lambda: engine.load_weights(source, version)
