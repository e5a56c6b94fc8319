"""Rollouts with vLLM: in this process, or by several of its servers.

vLLM keeps keys and values of prompts in blocks and finds them again for every prompt that begins
with the same tokens. Requests are therefore sent in the order of their ids, in which states of a
trajectory stand side by side, and the cache is emptied whenever weights change.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from decapod.lm import EngineError, SamplingParams, ServerEngine
from decapod.lm.engine import check_requests
from vineppo.backend import Usage
from vineppo.episodes import Rollout
from vineppo.errors import InvalidInputError, MissingExtraError, at_least, positive
from vineppo.rollout import Call, adjacent_shares, merged

_LOG = logging.getLogger(__name__)
_IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"


def make_llm(model: str | Path, **options: Any) -> Any:
    """A ``vllm.LLM`` for :class:`VLLMBackend`: in this process, with prefix caching.

    Args:
        model: folder or name.
        **options: of ``vllm.LLM``; they win over what is set here.

    Raises:
        MissingExtraError: without the extra ``vineppo[vllm]``.
    """
    before = os.environ.get(_IN_PROCESS)
    os.environ[_IN_PROCESS] = "0"  # weights are handed over in memory
    try:
        from vllm import LLM
        from vllm.platforms import current_platform

        given: dict[str, Any] = {"enable_prefix_caching": True}
        if current_platform.is_cpu():
            # A prompt computed in parts makes vLLM rewind its request's generator, which torch's
            # generators on a CPU cannot do: vLLM 0.32 ends when a request has a seed.
            given["enable_chunked_prefill"] = False
        return LLM(str(model), **{**given, **options})
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise MissingExtraError("vllm", "vllm") from error
    finally:
        del os.environ[_IN_PROCESS]
        if before is not None:
            os.environ[_IN_PROCESS] = before


class VLLMBackend:
    """Rollouts with a ``vllm.LLM`` of this process; see :class:`vineppo.rollout.RolloutBackend`.

    Log-probabilities are of the kind that the LLM was made for; a request for the other kind is
    refused. Rollouts end at the tokens that vLLM knows as ends: the tokenizer's and those of the
    model's generation config.

    Args:
        llm: made by :func:`make_llm`, or likewise: on a CPU with ``enable_chunked_prefill=False``,
            and for :meth:`load_weights` with ``VLLM_ENABLE_V1_MULTIPROCESSING=0``.

    Raises:
        InvalidInputError: it gives logits in place of log-probabilities.
        MissingExtraError: without the extra ``vineppo[vllm]``.
    """

    def __init__(self, llm: Any) -> None:
        try:
            import vllm  # noqa: F401 - so that a missing one is told apart
        except ModuleNotFoundError as error:
            raise MissingExtraError("vllm", "vllm") from error
        from decapod.lm import VLLMEngine

        try:
            self._engine = VLLMEngine(llm)
        except ValueError as error:
            raise InvalidInputError(str(error)) from error
        if not llm.llm_engine.vllm_config.cache_config.enable_prefix_caching:
            _LOG.warning(
                "llm: prefix caching is off, so every rollout computes its whole prompt; make "
                "vllm.LLM with enable_prefix_caching=True"
            )
        self._usage = Usage()

    @property
    def llm(self) -> Any:
        """That generates."""
        return self._engine.llm

    @property
    def usage(self) -> Usage:
        """What was done since the backend was made; reused is what vLLM had in its cache."""
        return self._usage

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int | Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        seeds: Sequence[int],
    ) -> list[list[Rollout]]:
        """Rollouts from each prompt; see :meth:`vineppo.rollout.RolloutBackend.generate`."""
        call = Call.of(prompts, n, params, seeds)
        call.needs_eos("llm", self._has_eos())
        started, reused = time.perf_counter(), self._engine.cached_prompt_tokens
        with call.told():
            completions = self._engine.generate(call.requests)  # which sorts them
        reused = self._engine.cached_prompt_tokens - reused
        self._usage += call.usage(completions, reused, time.perf_counter() - started)
        return call.rollouts(completions)

    def load_weights(self, model: Any) -> None:
        """Load the weights of a transformers model, merged if PEFT wraps it; empty the cache."""
        source = merged(model).state_dict()
        self._engine.load_weights({name: value.detach() for name, value in source.items()})

    def _has_eos(self) -> bool:
        config = self.llm.llm_engine.model_config
        if config.try_get_generation_config().get("eos_token_id") is not None:
            return True
        if config.skip_tokenizer_init:
            return False
        return self.llm.get_tokenizer().eos_token_id is not None


class ServersBackend:
    """Rollouts by several vLLM servers that hold the same model; by token ids.

    A call is cut into one share per server, of states that begin alike, so that each server
    finds prefixes in its own cache. Which server has which share does not change a rollout, but for
    the rounding of unequal machines. Log-probabilities are of the kind that ``--logprobs-mode`` of
    the servers says, whatever ``params`` ask for. How many tokens of prompts were reused, servers
    tell only with ``--enable-prompt-tokens-details``.

    Args:
        urls: of the servers, each up to and with the version: ``http://10.0.0.1:8000/v1``.
        model: its name, as the servers know it.
        weights_folder: where :meth:`load_weights` writes model files; all servers must see it under
            the same path, and have been started with ``VLLM_SERVER_DEV_MODE=1``.
        api_key: sent as bearer token when given.
        concurrency: most requests in flight to each server.
        timeout: seconds of silence after which one try is given up.
        retries: further tries of one request.

    Raises:
        InvalidInputError: no address, one that is none, the same twice, or a number out of range.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        *,
        weights_folder: str | Path | None = None,
        api_key: str | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        retries: int = 5,
    ) -> None:
        if isinstance(urls, str) or not urls:
            raise InvalidInputError(f"urls: expected a list of at least one address, got {urls!r}")
        if len({url.rstrip("/") for url in urls}) < len(urls):
            raise InvalidInputError(f"urls: expected different addresses, got {list(urls)}")
        at_least("concurrency", concurrency, 1)
        at_least("retries", retries, 0)
        positive("timeout", timeout)
        try:
            self._servers = [
                ServerEngine(
                    url,
                    model,
                    api_key=api_key,
                    concurrency=concurrency,
                    timeout=timeout,
                    retries=retries,
                )
                for url in urls
            ]
        except ValueError as error:
            raise InvalidInputError(f"urls: {error}") from error
        self._folder = None if weights_folder is None else Path(weights_folder)
        self._key, self._timeout = api_key, timeout
        self._labels: list[str] = [""] * len(self._servers)  # of the weights that were loaded
        self._max_length: int | None = None  # of prompt and rollout; asked for when first needed
        self._stale = ""  # why the servers' weights cannot be trusted
        self._usage = Usage()

    @property
    def usage(self) -> Usage:
        """What was done since the backend was made; reused is what the servers tell."""
        return self._usage

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int | Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        seeds: Sequence[int],
    ) -> list[list[Rollout]]:
        """Rollouts from each prompt; see :meth:`vineppo.rollout.RolloutBackend.generate`.

        Whether ids are in the vocabulary, only the servers know: that is a ServerError.

        Raises:
            InvalidInputError: also where a server does not know the model.
            decapod.lm.ServerError: a server failed for good.
            decapod.lm.EngineError: the servers may hold different weights.
        """
        if self._stale:
            raise EngineError(f"{self._stale}; call load_weights again before generate")
        call = Call.of(prompts, n, params, seeds)
        if call.requests and self._max_length is None:
            self._max_length = min(_together(self._length_of, self._servers))
        with call.told():
            # vLLM's server would cut what is too long, instead of refusing it.
            check_requests(call.requests, vocab_size=None, max_length=self._max_length)
        shares = adjacent_shares(call.requests, len(self._servers))
        started, reused = time.perf_counter(), self._reused()

        def served(place: int) -> list[Any]:
            return self._servers[place].generate([call.requests[i] for i in shares[place]])

        with call.told():
            answers = _together(served, range(len(shares)))
        by_place = {
            index: done
            for share, some in zip(shares, answers, strict=True)
            for index, done in zip(share, some, strict=True)
        }
        self._check_labels()
        completions = [by_place[index] for index in range(len(call.requests))]
        self._usage += call.usage(
            completions, self._reused() - reused, time.perf_counter() - started
        )
        return call.rollouts(completions)

    def load_weights(self, model: Any) -> None:
        """Write the model to ``weights_folder``, and have all servers load it.

        Where it fails, servers may hold different weights, and :meth:`generate` refuses to work
        until a call succeeds.

        Args:
            model: of transformers; adapters of PEFT are merged into a copy.

        Raises:
            InvalidInputError: there is no ``weights_folder``.
            decapod.lm.EngineError: a server refused, or did not answer.
        """
        if self._folder is None:
            raise InvalidInputError(
                "weights_folder: expected a folder that all servers see, to hand over weights, got "
                "None; give it to ServersBackend"
            )
        source = merged(model)
        folder = self._folder / f"weights-{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        try:
            source.save_pretrained(folder)
            self._stale = "the servers may hold different weights: an update did not reach all"
            self._labels = _together(lambda server: self._update(server, folder), self._servers)
            self._stale = ""
        finally:
            shutil.rmtree(folder)

    def _update(self, server: ServerEngine, folder: Path) -> str:
        """Have a server load model files; the label it has them under, if it knows labels."""
        with self._control(server) as client:
            # What an earlier call left behind would keep blocks of the cache.
            _call(client, "POST", "/pause", query={"mode": "abort"})
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            _call(client, "POST", "/collective_rpc", body=reload)
            if not _call(client, "POST", "/reset_prefix_cache").get("success", True):
                raise EngineError(f"{client.base_url}: the server did not empty its prefix cache")
            label = {"new_version": folder.name}
            known = _call(client, "POST", "/update_weight_version", body=label, may_lack=True)
            _call(client, "POST", "/resume")
        return folder.name if known else ""

    def _check_labels(self) -> None:
        """Refuse answers of a server that was started again, with the weights it began with."""
        for server, label in zip(self._servers, self._labels, strict=True):
            if not label:
                continue
            with self._control(server) as client:
                now = _call(client, "GET", "/weight_info").get("weight_version")
            if now != label:
                self._stale = (
                    f"{client.base_url} has weights {now!r} in place of those that were loaded: "
                    "it was started again, or somebody else changes its weights"
                )
                raise EngineError(f"{self._stale}; call load_weights again")

    def _length_of(self, server: ServerEngine) -> int:
        with self._control(server) as client:
            path = f"{urlsplit(server.base_url).path}/models"
            cards = _call(client, "GET", path).get("data", [])
        for card in cards:
            if card["id"] == server.model:
                return int(card["max_model_len"])
        raise InvalidInputError(
            f"model: expected a name that {server.base_url} knows, "
            f"{[card['id'] for card in cards]}, got {server.model!r}"
        )

    def _control(self, server: ServerEngine) -> httpx.Client:
        address = urlsplit(server.base_url)
        return httpx.Client(
            base_url=f"{address.scheme}://{address.netloc}",
            headers={} if self._key is None else {"Authorization": f"Bearer {self._key}"},
            timeout=self._timeout,
            verify=address.scheme == "https",
        )

    def _reused(self) -> int:
        return sum(server.cached_prompt_tokens for server in self._servers)


def _together(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Work on all items at the same time; the first that fails is raised when all have ended."""
    if not items:
        return []
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(work, items))


def _call(
    client: httpx.Client,
    method: str,
    path: str,
    *,
    query: dict[str, str] | None = None,
    body: dict[str, Any] | None = None,
    may_lack: bool = False,
) -> dict[str, Any]:
    """What a server answers to a control call; empty where it may lack the route and does."""
    what = f"{method} {client.base_url}{path}"
    try:
        answer = client.request(method, path, params=query, json=body)
    except httpx.TransportError as error:
        raise EngineError(f"{what}: no answer ({type(error).__name__}: {error})") from error
    if answer.status_code == 404 and may_lack:
        return {}
    if not answer.is_success:
        said = " ".join(answer.text.split())[:300]
        hint = "; start the server with VLLM_SERVER_DEV_MODE=1" if answer.status_code == 404 else ""
        raise EngineError(f"{what}: status {answer.status_code}: {said}{hint}")
    decoded = answer.json() if answer.content else None
    return decoded if isinstance(decoded, dict) else {}
