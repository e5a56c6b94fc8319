"""vLLM's server behind the engine protocol: token ids by HTTP, weights by folder or transfer."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from asyncrlhf.engines.control import ControlError, ServerControl
from asyncrlhf.engines.protocol import Completion, VersionSpan
from asyncrlhf.engines.updates import LoadedWeights
from asyncrlhf.errors import InvalidInputError, WaitTimeoutError, WeightUpdateError
from asyncrlhf.settings import at_least, one_of, positive
from asyncrlhf.transport.model_folder import ModelFolder
from asyncrlhf.transport.routes import Route, SyncClient
from asyncrlhf.transport.vllm_folder import ReloadFolder, VLLMFolder
from decapod.lm import Completion as Answer
from decapod.lm import EngineError, Request, ServerEngine, ServerError
from decapod.lm.engine import check_requests
from decapod.lm.server import answer

if TYPE_CHECKING:
    from httpx import Response  # noqa: F401

Endpoint = Literal["completions", "generate"]
InFlight = Literal["wait", "keep", "abort"]
_HEALTH_SECONDS = 5.0


class VLLMServer:
    """Generates with a server of vLLM that runs elsewhere, and sends it new weights.

    The server must be started with ``--logprobs-mode processed_logprobs``, or log-probabilities are
    those of the model before temperature, which nothing in an answer tells; and with
    ``VLLM_SERVER_DEV_MODE=1`` in its environment, or it has no routes for weights. Those routes
    obey everybody who reaches them: keep the server on a private network.

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
        self._start_path = None if start is None else Path(start)
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
        self._server = _Server(self._control, in_flight)
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
                raise WeightUpdateError(f"weights of version {version} were not sent: {error}") from (
                    error
                )
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
            here = self._start_path or Path(root)
            if any(here.glob("*.safetensors")):
                self._start = ModelFolder(here)
            elif self._start_path is not None:
                raise InvalidInputError(f"start: {here} holds no safetensors files")
            self._loaded = LoadedWeights(
                self._server, ReloadFolder(Path(root)), f"the server {self.url}"
            )
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


class _Server:
    """The server as a holder of weights."""

    def __init__(self, control: ServerControl, in_flight: InFlight) -> None:
        self._control = control
        self._in_flight: InFlight = in_flight
        self.stays_paused = False
        self._versions: dict[str, int] | None = None  # by label; None where there are no labels

    def folder(self, model: str) -> str:
        """The folder or name that the server was started with; and learn its label."""
        cards = self._control.get("v1/models")["data"]
        try:
            self._versions = {str(self._control.get("weight_info")["weight_version"]): 0}
        except ControlError as error:
            if error.status != 404:
                raise
        for card in cards:
            if card["id"] == model:
                return str(card.get("root") or model)
        raise InvalidInputError(
            f"model: the server knows {[card['id'] for card in cards]}, not {model!r}"
        )

    def pause(self, mode: InFlight | None) -> None:
        self._control.post("pause", query={"mode": mode or self._in_flight})

    def resume(self) -> None:
        self._control.post("resume")

    def hold(self) -> None:
        self.pause(None)

    def mend(self) -> None:
        """Nothing can be done from here; most failures leave nothing to mend."""

    def reload(self, folder: Path) -> None:
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._control.post("collective_rpc", call)

    def sync_client(self, timeout: float) -> SyncClient:
        from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient

        client: SyncClient = HTTPVLLMWeightSyncClient(self._control.url, timeout=timeout)
        return client

    def world_size(self) -> int:
        return int(self._control.get("get_world_size")["world_size"])

    def settle(self, version: int) -> None:
        # Those that are kept get their keys and values anew, by the new weights.
        query = {"reset_running_requests": self._in_flight == "keep"}
        done = self._control.post("reset_prefix_cache", query=query)
        if not (done or {}).get("success", True):
            raise ControlError("the server did not empty its prefix cache", None)
        if self._versions is not None:
            self._control.post("update_weight_version", {"new_version": str(version)})
            self._versions[str(version)] = version
        if not self.stays_paused:
            self.resume()

    def check_label(self, version: int) -> None:
        """Raise if the server says that its weights are not those of the version.

        Raises:
            WeightUpdateError: with what it says.
        """
        if self._versions is None:
            return
        label = str(self._control.get("weight_info")["weight_version"])
        if self._versions.get(label) != version:
            raise WeightUpdateError(
                f"the server {self._control.url} says that its weights are {label!r}, but version "
                f"{version} was loaded; it was started again, or somebody else changes its "
                "weights; load weights again"
            )

    def spans(self, choice: Mapping[str, Any]) -> list[VersionSpan] | None:
        """The spans of an answer; None where the server does not tell."""
        if self._versions is None or not choice.get("weight_versions"):
            return None
        spans = []
        for span in choice["weight_versions"]:
            version = self._versions.get(str(span["version"]))
            if version is None:
                raise ValueError(f"tokens by weights {span['version']!r}, which nobody loaded here")
            spans.append(VersionSpan(int(span["start"]), int(span["end"]), version))
        return spans


def _completion(given: Answer, version: int, spans: list[VersionSpan] | None) -> Completion:
    length = len(given.token_ids)
    spans = spans or [VersionSpan(0, length, version)]
    ends = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != ends[:-1] or ends[-1] != length:
        raise EngineError(f"request {given.id!r}: {length} tokens with version spans {spans}")
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
