"""vLLM's server behind the engine protocol: token ids by HTTP, weights by folder or transfer."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from asyncrlhf.engines.control import (
    ControlError,
    InFlight,
    ServerControl,
    ServerHolder,
)
from asyncrlhf.engines.protocol import Completion, VersionSpan
from asyncrlhf.engines.updates import LoadedWeights
from asyncrlhf.errors import InvalidInputError, WaitTimeoutError, WeightUpdateError
from asyncrlhf.settings import at_least, one_of, positive
from asyncrlhf.transport.model_folder import ModelFolder
from asyncrlhf.transport.routes import Route
from asyncrlhf.transport.vllm_folder import ReloadFolder, VLLMFolder
from decapod.lm import Completion as Answer
from decapod.lm import Request, ServerEngine, ServerError
from decapod.lm.engine import check_requests
from decapod.lm.server import answer

Endpoint = Literal["completions", "generate"]
_HEALTH_SECONDS = 5.0


class VLLMServer:
    """Generates with a server of vLLM that runs elsewhere, and sends it new weights.

    The server must be started with ``--logprobs-mode processed_logprobs``, or log-probabilities are
    those of the model before temperature, which nothing in an answer tells; and with
    ``VLLM_SERVER_DEV_MODE=1`` in its environment, or it has no routes for weights. Those routes
    obey everybody who reaches them: keep the server on a private network. On a CPU it also needs
    ``--no-enable-chunked-prefill``: vLLM 0.32 ends there when a seeded prompt is computed in parts.

    Version spans: ``endpoint="generate"`` is vLLM's route for token ids alone
    (``--enable-scale-out``), whose answers say which weights drew which token. Those of
    ``"completions"`` do not; a completion then has the version that was loaded when its request was
    handed in, which is the older one if weights were swapped meanwhile.

    The server's label of its weights is set to the version, and compared before and after
    generating: a server that was started again has lost its weights, and says so by its label.

    An update that fails is undone, by loading the version before once more. Where that fails too,
    the server stays paused, since it would end when asked to generate, and :meth:`generate`
    raises until an update succeeds.

    Args:
        base_url: of the server, such as ``"http://127.0.0.1:8000"``.
        model: its name, as the server knows it.
        weights: how weights get there: a :class:`~asyncrlhf.transport.on_vllm.VLLMTransfer`, a
            :class:`~asyncrlhf.transport.vllm_folder.VLLMFolder`, or the absolute path for one; None
            refuses updates.
        start: folder of the model that the server was started with, against which weights are
            checked and from which those that do not learn are taken; None asks the server for it,
            and where it is not on this machine, every update must hold all weights, and the names
            and shapes of the learner's model must be right.
        endpoint: see above.
        in_flight: what an update does to completions that are being generated: ``"wait"`` for
            their end, ``"keep"`` them and go on with new weights, or ``"abort"`` them.
        concurrency: most requests in flight.
        timeout: seconds that the server may take over one completion.
        update_timeout: seconds that it may take over one step of an update.
        pause_timeout: seconds that :meth:`generate` waits for :meth:`resume` or an update.
        retries: repetitions of requests, and of those steps that can be made twice.
        api_key: sent as bearer token when given.

    Raises:
        InvalidInputError: an address, choice or number that does not fit.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        weights: Route | str | Path | None = None,
        start: str | Path | None = None,
        endpoint: Endpoint = "completions",
        in_flight: InFlight = "wait",
        concurrency: int = 64,
        timeout: float = 600.0,
        update_timeout: float = 300.0,
        pause_timeout: float = 600.0,
        retries: int = 3,
        api_key: str | None = None,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise InvalidInputError(
                f"base_url: expected an address that begins with http:// or https://, got "
                f"{base_url!r}"
            )
        one_of("endpoint", endpoint, get_args(Endpoint))
        one_of("in_flight", in_flight, get_args(InFlight))
        at_least("concurrency", concurrency, 1)
        at_least("retries", retries, 0)
        for name, seconds in (
            ("timeout", timeout),
            ("update_timeout", update_timeout),
            ("pause_timeout", pause_timeout),
        ):
            positive(name, seconds)
        self.url = base_url.rstrip("/").removesuffix("/v1")
        self.model = model
        self.endpoint: Endpoint = endpoint
        self._route = VLLMFolder(weights) if isinstance(weights, str | Path) else weights
        self._start_path = None if start is None else Path(start).absolute()
        self._timeout = timeout
        self._pause_timeout = pause_timeout
        path = "v1" if endpoint == "completions" else "inference/v1"
        self._client = ServerEngine(
            f"{self.url}/{path}",
            model,
            api_key=api_key,
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
        )
        self._control = ServerControl(
            self.url, timeout=update_timeout, retries=retries, api_key=api_key
        )
        self._server = ServerHolder(self._control, in_flight)
        self._busy = threading.RLock()  # weights are being changed, or looked at
        self._running = threading.Event()
        self._running.set()
        self._loaded: LoadedWeights | None = None
        self._start: ModelFolder | None = None

    @property
    def version(self) -> int:
        """Version of the weights in use; 0 before any were loaded."""
        return 0 if self._loaded is None else self._loaded.version

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Completions in the order of the requests; returns when all are there.

        Raises:
            decapod.lm.RequestError: a prompt is empty; nothing was sent.
            decapod.lm.EngineError: the server refused a request, or failed for good.
            WaitTimeoutError: it took too long, or the engine stayed paused.
            WeightUpdateError: the weights of the server are not those that were loaded.
        """
        requests = list(requests)
        check_requests(requests, vocab_size=None, max_length=None)
        if not self._running.wait(self._pause_timeout):
            raise WaitTimeoutError("the paused engine to be resumed", self._pause_timeout)
        with self._changing("weights to be loaded"):
            loaded = self._weights_in_use()
            loaded.refuse_if_broken()
            version = loaded.version
            self._server.check_label(version)
        try:
            found = self._asked(requests, version)
        except ServerError as error:
            if error.timed_out:
                raise WaitTimeoutError(
                    f"{error.url} to answer a request",
                    self._timeout,
                    "look at the server's log, allow more time, or ask for fewer tokens",
                ) from error
            raise
        with self._changing("weights to be loaded"):
            self._server.check_label(self.version)
        return iter(found)

    def load_weights(self, source: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send weights to the server, and return when they are in use.

        Raises:
            WeightUpdateError: they do not fit, or a step failed; the old version stays.
            WaitTimeoutError: an earlier update did not end.
        """
        if self._route is None:
            raise WeightUpdateError(
                "weights: this engine was made without a way of sending them; give VLLMServer "
                "weights='/a/folder/that/the/server/reads' or a VLLMTransfer"
            )
        with self._changing("an earlier update to end"):
            try:
                loaded = self._weights_in_use()
            except (ControlError, WaitTimeoutError) as error:
                problem = f"weights of version {version} were not sent: {error}"
                raise WeightUpdateError(problem) from error
            update = self._route.prepare(source, version, self._start)
            loaded.replace(update, version)

    def pause(self, mode: InFlight | None = None) -> None:
        """Hold back further requests, here and in the server.

        Args:
            mode: what happens to completions that are being generated: ``"wait"`` until they have
                ended, ``"keep"`` them as they are, ``"abort"`` them; None is ``in_flight``.

        Raises:
            decapod.lm.EngineError: the server refused.
            WaitTimeoutError: it did not answer.
        """
        if mode is not None:
            one_of("mode", mode, get_args(InFlight))
        self._running.clear()
        self._server.pause(mode)
        self._server.stays_paused = True

    def resume(self) -> None:
        """Take requests again.

        Raises:
            decapod.lm.EngineError: the server refused.
            WaitTimeoutError: it did not answer.
            WeightUpdateError: its weights are broken, and it must stay paused.
        """
        if self._loaded is not None:
            self._loaded.refuse_if_broken()
        self._server.stays_paused = False
        self._server.resume()
        self._running.set()

    def health(self) -> str:
        """Empty when the server can serve, else what is wrong."""
        if self._loaded is not None and self._loaded.problem:
            return self._loaded.problem
        try:
            self._control.get("health", timeout=_HEALTH_SECONDS)
        except (ControlError, WaitTimeoutError) as error:
            return str(error)
        return ""

    def close(self) -> None:
        """Remove what was written for the server, which goes on with the weights it has."""
        self._running.set()
        close = getattr(self._route, "close", None)
        if close is not None:
            close()

    @contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        if not self._busy.acquire(timeout=self._pause_timeout):
            raise WaitTimeoutError(what, self._pause_timeout)
        try:
            yield
        finally:
            self._busy.release()

    def _weights_in_use(self) -> LoadedWeights:
        """What the server began with, asked for when it is first needed."""
        if self._loaded is None:
            root = self._server.folder(self.model)
            here = self._start_path or root
            if here.is_absolute() and any(here.glob("*.safetensors")):
                self._start = ModelFolder(here)
            elif self._start_path is not None:
                raise InvalidInputError(f"start: {here.absolute()} holds no safetensors files")
            start = ReloadFolder(root) if self._server.fresh else None
            self._loaded = LoadedWeights(self._server, start, f"the server {self.url}")
        return self._loaded

    def _asked(self, requests: Sequence[Request], version: int) -> list[Completion]:
        if self.endpoint == "completions":
            return [_completion(given, version, None) for given in self._client.generate(requests)]

        def read(index: int, choice: Mapping[str, Any]) -> Completion:
            given = answer(
                requests[index],
                choice["token_ids"],
                [float(token["logprob"]) for token in choice["logprobs"]["content"]],
                choice["finish_reason"],
            )
            return _completion(given, version, self._server.spans(choice))

        return self._client.post_all([("generate", _body(request)) for request in requests], read)


def _completion(given: Answer, version: int, spans: list[VersionSpan] | None) -> Completion:
    length = len(given.token_ids)
    spans = spans or [VersionSpan(0, length, version)]
    ends = [0, *(span.end for span in spans)]
    without_gaps = [span.start for span in spans] == ends[:-1]
    if not without_gaps or ends != sorted(ends) or ends[-1] != length:
        raise ValueError(f"{length} tokens with the version spans {spans}")
    return Completion(given.token_ids, given.logprobs, tuple(spans), given.finish_reason, given.id)


def _body(request: Request) -> dict[str, Any]:
    params = request.params
    return {
        "token_ids": list(request.prompt),
        "sampling_params": {
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "seed": request.seed,
            "stop_token_ids": list(params.stop_token_ids),
            "stop": list(params.stop),
            "ignore_eos": params.ignore_eos,
            "logprobs": 0,
            "detokenize": bool(params.stop),
        },
    }
