"""A client for servers that speak the OpenAI completion and chat protocols."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import httpx

from decapod.lm.engine import (
    Completion,
    EngineError,
    Request,
    RequestError,
    SamplingParams,
    check_requests,
)
from decapod.lm.text import Prompt, prompt_seeds

T = TypeVar("T")
_LONGEST_WAIT = 60.0


class ServerError(EngineError):
    """A request to a server failed for good.

    Attributes:
        url: that was asked.
        status: HTTP status of the last answer; None when there was none.
        finished: what was answered before, by its place in the list that was asked for; keep it
            and ask for the rest.
        total: length of that list.
        timed_out: whether the last try ended because the server was silent for too long.
    """

    def __init__(
        self,
        problem: str,
        url: str,
        status: int | None,
        finished: Mapping[int, Any] | None = None,
        total: int = 1,
        *,
        timed_out: bool = False,
    ) -> None:
        self.problem, self.url, self.status = problem, url, status
        self.finished, self.total = dict(finished or {}), total
        self.timed_out = timed_out
        shown = "no answer" if status is None else f"status {status}"
        super().__init__(
            f"POST {url}: {shown}: {problem} ({len(self.finished)} of {total} were finished before)"
        )


class ServerEngine:
    """Requests to an OpenAI-compatible server, several at a time, in order, with retries.

    :meth:`generate` works by token ids, which vLLM's server understands (``return_token_ids``); it
    then fulfils :class:`decapod.lm.GenerationEngine`, as far as the server does. For servers that
    know texts alone, see :class:`ServerTextGenerator`.

    A request is tried again after connection errors, timeouts and the statuses 408, 429 and 5xx,
    waiting ``backoff * 2**k`` seconds (up to 60, shortened by chance by up to a half) or as long
    as ``Retry-After`` says. Threads do the waiting; the object may be used from several.

    Args:
        base_url: up to and with the version, such as ``http://127.0.0.1:8000/v1``.
        model: name of the model as the server knows it.
        api_key: sent as bearer token when given.
        concurrency: most requests in flight.
        timeout: seconds of silence after which one try is given up.
        retries: further tries of one request.
        backoff: seconds before the first of them.
        extra_body: further fields of every request; None removes a field. A server that wants
            ``max_completion_tokens`` gets ``{"max_tokens": None, "max_completion_tokens": 512}``.

    Attributes:
        cached_prompt_tokens: of all answers so far, the tokens of their prompts that the server had
            in its cache, as far as it tells: vLLM's does with ``--enable-prompt-tokens-details``.

    Raises:
        ValueError: a number out of range, or ``base_url`` is no address.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 16,
        timeout: float = 120.0,
        retries: int = 5,
        backoff: float = 0.5,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"base_url: expected an address that begins with http:// or https://, got "
                f"{base_url!r}"
            )
        if concurrency < 1:
            raise ValueError(f"concurrency: expected at least 1, got {concurrency}")
        if retries < 0:
            raise ValueError(f"retries: expected at least 0, got {retries}")
        if timeout <= 0 or backoff < 0:
            raise ValueError(
                f"timeout, backoff: expected seconds above 0 and of at least 0, got {timeout} and "
                f"{backoff}"
            )
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.extra_body = dict(extra_body or {})
        self.cached_prompt_tokens = 0
        self._counting = threading.Lock()
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answers by token ids, in the order of the requests.

        Log-probabilities are those that the server gives, whatever ``params.logprobs_of`` asks:
        with vLLM's, those of the model, or those of the sampler if it was started with
        ``--logprobs-mode processed_logprobs``. Answers do not say which, so it cannot be checked.

        Raises:
            RequestError: a prompt is empty; nothing was sent. Whether it is too long or not in the
                vocabulary, only the server knows: that is a ServerError with status 400.
            ServerError: a request failed for good, or the server does not return token ids.
        """
        check_requests(requests, vocab_size=None, max_length=None)
        bodies = [
            {
                "prompt": list(request.prompt),
                **_fields(request.params, request.seed),
                "logprobs": 0,
                "return_token_ids": True,
            }
            for request in requests
        ]

        def read(index: int, choice: Mapping[str, Any]) -> Completion:
            if choice.get("token_ids") is None:
                raise KeyError("token_ids")
            return answer(
                requests[index],
                choice["token_ids"],
                choice["logprobs"]["token_logprobs"],
                choice["finish_reason"],
            )

        return self.post_all([("completions", body) for body in bodies], read)

    def complete(
        self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int]
    ) -> list[str]:
        """Answers as texts, in order: a text by ``/completions``, a chat by ``/chat/completions``.

        Args:
            prompts: texts and lists of messages.
            params: ``top_k``, ``stop_token_ids`` and ``ignore_eos`` are sent only when they are
                set, since not every server knows them.
            seeds: of each prompt.

        Raises:
            RequestError: a prompt is empty; nothing was sent.
            ServerError: a request failed for good.
        """
        asked: list[tuple[str, dict[str, Any]]] = []
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            if not prompt:
                raise RequestError(index, index, "prompt: expected a text or messages, got none")
            fields = _fields(params, seed)
            if isinstance(prompt, str):
                asked.append(("completions", {"prompt": prompt, **fields}))
            else:
                messages = [dict(message) for message in prompt]
                asked.append(("chat/completions", {"messages": messages, **fields}))

        def read(index: int, choice: Mapping[str, Any]) -> str:
            if isinstance(prompts[index], str):
                return str(choice["text"])
            return str(choice["message"]["content"] or "")

        return self.post_all(asked, read)

    def post_all(
        self,
        asked: Sequence[tuple[str, dict[str, Any]]],
        read: Callable[[int, Mapping[str, Any]], T],
    ) -> list[T]:
        """Send many bodies, for endpoints that the other methods do not know.

        Args:
            asked: path, relative to ``base_url``, and body of each.
            read: makes an answer of a request's place and the first of the ``choices`` that came
                back. ValueError, KeyError, TypeError and IndexError in it are server errors.

        Returns:
            What ``read`` gave, in order.

        Raises:
            ServerError: a request failed for good.
        """
        gave_up = threading.Event()
        failures: list[ServerError] = []  # in the order in which they happened
        limits = httpx.Limits(max_connections=self.concurrency)
        client = httpx.Client(
            timeout=self.timeout,
            headers=self._headers,
            limits=limits,
            # Reading all certificates takes longer than a short answer; redirects are not followed.
            verify=self.base_url.startswith("https:"),
        )

        def one(index: int) -> T:
            path, body = asked[index]
            url = f"{self.base_url}/{path}"
            merged = {"model": self.model, **body, **self.extra_body}
            fields = {name: value for name, value in merged.items() if value is not None}
            try:
                response = self._post(client, url, fields, gave_up)
                answered = _read(response, url, lambda choice: read(index, choice))
                with self._counting:
                    self.cached_prompt_tokens += _cached_tokens(response)
                return answered
            except ServerError as error:
                failures.append(error)
                gave_up.set()
                raise

        with client, ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(one, index) for index in range(len(asked))]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # also on Ctrl-C: nothing new is sent, nothing is tried again
                gave_up.set()
                for future in futures:
                    future.cancel()
        if failures:
            first = failures[0]
            finished = {
                index: future.result()
                for index, future in enumerate(futures)
                if not future.cancelled() and future.exception() is None
            }
            raise ServerError(
                first.problem,
                first.url,
                first.status,
                finished,
                len(asked),
                timed_out=first.timed_out,
            ) from first
        return [future.result() for future in futures]

    def _post(
        self, client: httpx.Client, url: str, body: dict[str, Any], gave_up: threading.Event
    ) -> httpx.Response:
        for attempt in range(self.retries + 1):
            status: int | None = None
            timed_out = False
            pause = min(_LONGEST_WAIT, self.backoff * 2**attempt) * random.uniform(0.5, 1)
            try:
                response = client.post(url, json=body)
            except httpx.TransportError as error:
                timed_out = isinstance(error, httpx.TimeoutException)
                problem = f"{type(error).__name__}: {error}"
            else:
                status = response.status_code
                if response.is_success:
                    return response
                problem = _excerpt(response)
                if status not in (408, 429) and status < 500:
                    break
                pause = max(pause, _retry_after(response))
            if attempt == self.retries or gave_up.wait(pause):
                break
        tries = "try" if attempt == 0 else "tries"
        raise ServerError(
            f"{problem} (after {attempt + 1} {tries})", url, status, timed_out=timed_out
        )


class ServerTextGenerator:
    """``generate(prompts) -> texts`` by a server, like :class:`decapod.lm.TextGenerator`.

    The server tokenizes and applies its own chat template. Seeds follow the same rule as there;
    what they are worth is up to the server.

    Args:
        server: the client.
        params: how to draw and when to stop.
        seed: root of all seeds.
    """

    def __init__(
        self, server: ServerEngine, params: SamplingParams | None = None, seed: int = 0
    ) -> None:
        self.server = server
        self.params = params or SamplingParams()
        self.seed = seed

    def __call__(self, prompts: Sequence[Prompt]) -> list[str]:
        """Answers in the order of the prompts.

        Raises:
            RequestError: a prompt is empty; nothing was sent.
            ServerError: a request failed for good; ``finished`` holds the texts that came before.
        """
        return self.server.complete(prompts, self.params, prompt_seeds(prompts, self.seed))


def answer(
    request: Request,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    finish_reason: str,
) -> Completion:
    """The completion that a server's fields make.

    Raises:
        ValueError: the fields do not fit together, or the server did not finish the answer.
    """
    if len(token_ids) != len(logprobs):
        raise ValueError(f"{len(token_ids)} token ids and {len(logprobs)} log-probabilities")
    if finish_reason not in ("stop", "length"):
        raise ValueError(f"the server ended it early: finish_reason is {finish_reason!r}")
    if len(token_ids) > request.params.max_new_tokens:
        raise ValueError(f"{len(token_ids)} tokens, {request.params.max_new_tokens} asked for")
    return Completion(
        tuple(int(token) for token in token_ids),
        tuple(float(value) for value in logprobs),
        "stop" if finish_reason == "stop" else "length",
        request.id,
    )


def _read(response: httpx.Response, url: str, read: Callable[[Mapping[str, Any]], T]) -> T:
    """What ``read`` makes of the first choice in a response."""
    try:
        return read(response.json()["choices"][0])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        problem = (
            "the server does not return token ids; use vLLM's server, or ServerTextGenerator for "
            "texts"
            if error.args == ("token_ids",)
            else f"cannot read the answer ({error!r}): {_excerpt(response)}"
        )
        raise ServerError(problem, url, response.status_code) from error


def _cached_tokens(response: httpx.Response) -> int:
    """Tokens of the prompt that the server had in its cache; 0 where it does not tell."""
    usage = response.json().get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return cached if isinstance(cached, int) else 0


def _fields(params: SamplingParams, seed: int) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "seed": seed,
    }
    if params.stop:
        fields["stop"] = list(params.stop)
    if params.top_k:
        fields["top_k"] = params.top_k
    if params.stop_token_ids:
        fields["stop_token_ids"] = list(params.stop_token_ids)
    if params.ignore_eos:
        fields["ignore_eos"] = True
    return fields


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait; 0 when it does not say so in seconds."""
    try:
        return min(_LONGEST_WAIT, max(0.0, float(response.headers.get("Retry-After", "0"))))
    except ValueError:
        return 0.0


def _excerpt(response: httpx.Response) -> str:
    return " ".join(response.text.split())[:300] or response.reason_phrase
