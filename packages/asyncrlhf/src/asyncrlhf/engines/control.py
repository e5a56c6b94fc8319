"""The control plane of a vLLM server: one call, one limit, and what failed in words."""

from __future__ import annotations

import time
from typing import Any

import httpx

from asyncrlhf.errors import WaitTimeoutError
from decapod.lm import EngineError

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
        retries: repetitions of a call that can be made twice, after lost connections and the
            statuses 502 to 504. Silence and refusals are final.
        api_key: sent as bearer token when given.
    """

    def __init__(
        self, url: str, *, timeout: float, retries: int, api_key: str | None = None
    ) -> None:
        self.url = url
        self.timeout = timeout
        self._retries = retries
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def post(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        query: dict[str, Any] | None = None,
        twice: bool = True,
    ) -> Any:
        """What the server answers, as decoded JSON; None for an empty answer.

        Args:
            path: of the route, without a slash in front.
            body: sent as JSON.
            query: parameters of the address.
            twice: whether making the call twice does what making it once does.

        Raises:
            ControlError: the server refused, failed, or was not there.
            WaitTimeoutError: it was silent for too long.
        """
        return self._call("POST", path, body, query, self._retries if twice else 0, self.timeout)

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
                # A connection of its own: the server closes the one on which a call failed, and
                # the next call would find that out by failing too.
                answer = httpx.request(
                    method,
                    f"{self.url}/{path}",
                    json=body,
                    params=query,
                    headers=self._headers,
                    timeout=timeout,
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


def _decoded(answer: httpx.Response, what: str) -> Any:
    if not answer.content:
        return None
    try:
        return answer.json()
    except ValueError as error:
        raise ControlError(
            f"{what}: the answer is no JSON: {answer.text[:100]!r}", answer.status_code
        ) from error
