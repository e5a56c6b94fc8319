"""The control plane of a vLLM server: one call, one limit, and what failed in words."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import httpx

from asyncrlhf.engines.protocol import VersionSpan
from asyncrlhf.errors import (
    InvalidInputError,
    MissingExtraError,
    WaitTimeoutError,
    WeightUpdateError,
)
from asyncrlhf.transport.routes import SyncClient
from decapod.lm import EngineError

InFlight = Literal["wait", "keep", "abort"]
_FIRST_LABEL = "default"  # of the weights that a server starts with
_PAUSE = 0.1  # seconds before the first repetition; doubled each time


class ControlError(EngineError):
    """A server refused a control call, or was not there.

    Attributes:
        status: of its answer; None when there was none.
    """

    def __init__(self, problem: str, status: int | None) -> None:
        super().__init__(problem)
        self.status = status


class ServerControl:
    """Calls to the routes that steer a server, most of which need ``VLLM_SERVER_DEV_MODE=1`` there.

    Args:
        url: of the server, without a path.
        timeout: seconds of silence after which a call is given up.
        retries: repetitions of a call after a lost connection and the statuses 502 to 504.
            Silence and refusals are final.
        api_key: sent as bearer token when given.
    """

    def __init__(
        self, url: str, *, timeout: float, retries: int, api_key: str | None = None
    ) -> None:
        self.url = url
        self.timeout = timeout
        self._retries = retries
        # No connection is kept: the server closes the one on which a call failed, and the next
        # call would find that out by failing too.
        self._http = httpx.Client(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            limits=httpx.Limits(max_keepalive_connections=0),
            verify=url.startswith("https:"),  # reading certificates takes its time
        )

    def post(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        query: dict[str, Any] | None = None,
    ) -> Any:
        """What the server answers, as decoded JSON; None for an empty answer.

        Only for calls that do the same when they are made twice.

        Args:
            path: of the route, without a slash in front.
            body: sent as JSON.
            query: parameters of the address.

        Raises:
            ControlError: the server refused, failed, or was not there.
            WaitTimeoutError: it was silent for too long.
        """
        return self._call("POST", path, body, query, self._retries, self.timeout)

    def get(self, path: str, *, timeout: float | None = None) -> Any:
        """As :meth:`post`, for what changes nothing; ``timeout`` replaces that of the object."""
        retries = self._retries if timeout is None else 0
        return self._call("GET", path, None, None, retries, timeout or self.timeout)

    def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        query: dict[str, Any] | None,
        retries: int,
        timeout: float,
    ) -> Any:
        what = f"{method} {self.url}/{path}"
        for attempt in range(retries + 1):
            status = None
            try:
                answer = self._http.request(
                    method, f"{self.url}/{path}", json=body, params=query, timeout=timeout
                )
            except httpx.TimeoutException as error:
                raise WaitTimeoutError(
                    f"an answer to {what}", timeout, "look at the server's log"
                ) from error
            except httpx.TransportError as error:
                problem = f"no answer ({type(error).__name__}: {error})"
            else:
                status = answer.status_code
                if answer.is_success:
                    return _decoded(answer, what)
                problem = f"status {status}: {' '.join(answer.text.split())[:300]}"
                if status not in (502, 503, 504):
                    break
            if attempt < retries:
                time.sleep(_PAUSE * 2**attempt)
        raise ControlError(f"{what}: {problem}", status)


class ServerHolder:
    """A server as a holder of weights; see :class:`asyncrlhf.engines.updates.Holder`.

    Args:
        control: calls to it.
        in_flight: what an update does to completions that are being generated.
    """

    def __init__(self, control: ServerControl, in_flight: InFlight) -> None:
        self._control = control
        self._in_flight: InFlight = in_flight
        self.stays_paused = False
        self.fresh = True  # has the weights that it was started with, as far as it tells
        self._versions: dict[str, int] | None = None  # by label; None where there are no labels

    def folder(self, model: str) -> Path:
        """The folder or name that the server was started with; and learn its label."""
        cards = self._control.get("v1/models")["data"]
        try:
            label = str(self._control.get("weight_info")["weight_version"])
            self._versions, self.fresh = {label: 0}, label == _FIRST_LABEL
        except ControlError as error:
            if error.status != 404:
                raise
        for card in cards:
            if card["id"] == model:
                return Path(card.get("root") or model)
        raise InvalidInputError(
            f"model: the server knows {[card['id'] for card in cards]}, not {model!r}"
        )

    def pause(self, mode: InFlight | None) -> None:
        """Hold back requests; ``mode`` decides about those in flight."""
        self._control.post("pause", query={"mode": mode or self._in_flight})

    def resume(self) -> None:
        """Take requests again."""
        self._control.post("resume")

    def hold(self) -> None:
        """Pause."""
        self.pause(None)

    def mend(self) -> None:
        """End an update in four phases that was left open, or the next could not start."""
        with suppress(ControlError, WaitTimeoutError):  # mostly because none is open
            self._control.post("finish_weight_update")

    def reload(self, folder: Path) -> None:
        """Load the model files of a folder."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._control.post("collective_rpc", call)

    def sync_client(self, timeout: float) -> SyncClient:
        """vLLM's own client of the transfer in four phases."""
        try:
            from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient
        except ModuleNotFoundError as error:
            raise MissingExtraError("vllm", "vllm") from error
        client: SyncClient = HTTPVLLMWeightSyncClient(self._control.url, timeout=timeout)
        return client

    def world_size(self) -> int:
        """How many workers receive."""
        return int(self._control.get("get_world_size")["world_size"])

    def settle(self, version: int) -> None:
        """Empty the prefix cache, set the label, and resume."""
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


def _decoded(answer: httpx.Response, what: str) -> Any:
    if not answer.content:
        return None
    try:
        return answer.json()
    except ValueError as error:
        raise ControlError(
            f"{what}: the answer is no JSON: {answer.text[:100]!r}", answer.status_code
        ) from error
