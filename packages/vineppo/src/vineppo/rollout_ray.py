"""Rollouts by actors of a Ray cluster, each with a copy of the model (extra ``vineppo[ray]``)."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from decapod.lm import EngineError, LogprobsError, Request, SamplingParams
from vineppo.backend import Usage
from vineppo.episodes import Rollout
from vineppo.errors import InvalidInputError, MissingExtraError, NotFiniteError, at_least, positive
from vineppo.rollout import Call, TransformersBackend, adjacent_shares, merged

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RayBackend:
    """Rollouts by actors on one machine or many; see :class:`vineppo.rollout.RolloutBackend`.

    A call is cut into one share per actor, of states that begin alike. Which actor has which share
    does not change a rollout: seeds are those of :class:`TransformersBackend`. New weights are put
    into Ray's object store once, from where every machine fetches them. An actor that dies is
    started again by Ray, takes the weights of the call, and generates its share anew.

    A Ray that is already connected is used and left running. Otherwise the cluster at ``address``,
    or at the environment variable ``RAY_ADDRESS``, is joined, and left again by :meth:`close`;
    without either a Ray of this machine alone is started, and shut down by :meth:`close`. The
    machines need this package, with its extra ``ray``, and the model's code.

    Args:
        model: of which each actor gets a copy, as it is now; may be wrapped by PEFT.
        tokenizer: as for :class:`TransformersBackend`.
        actors: how many.
        device: where an actor's copy lives; an actor sees only the GPUs reserved for it.
        num_cpus: logical CPUs that Ray reserves for each actor.
        num_gpus: GPUs that Ray reserves for each actor.
        threads: numeric threads of each actor.
        address: of a running cluster, as ``ray.init`` takes it.
        ray_init: more arguments of ``ray.init``.
        start_timeout: seconds until all actors must be there.
        timeout: seconds that one call may take.
        max_restarts: deaths of an actor after which it is given up.
        eos_token_ids: as for :class:`TransformersBackend`.
        max_batch_size: most rollouts that run together in an actor.
        max_batch_tokens: as for :class:`TransformersBackend`.

    Raises:
        MissingExtraError: without the extra.
        InvalidInputError: an argument does not fit.
        decapod.lm.EngineError: the actors did not start in time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        actors: int = 2,
        device: str = "cpu",
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        threads: int = 1,
        address: str | None = None,
        ray_init: Mapping[str, Any] | None = None,
        start_timeout: float = 180.0,
        timeout: float = 1800.0,
        max_restarts: int = 3,
        eos_token_ids: Iterable[int] | None = None,
        max_batch_size: int = 256,
        max_batch_tokens: int = 65_536,
    ) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise MissingExtraError("ray", "ray") from error
        for name, value, least in (
            ("actors", actors, 1), ("threads", threads, 1), ("max_restarts", max_restarts, 0),
            ("num_cpus", num_cpus, 0), ("num_gpus", num_gpus, 0),
        ):  # fmt: skip
            at_least(name, value, least)
        positive("start_timeout", start_timeout)
        positive("timeout", timeout)
        if device.startswith("cuda") and not num_gpus:
            raise InvalidInputError(
                f"num_gpus: expected a number above 0 for device={device!r}, got {num_gpus:g}; an "
                "actor sees only what Ray reserved for it"
            )
        options = {"max_batch_size": max_batch_size, "max_batch_tokens": max_batch_tokens}
        # Of the caller's own model; it checks requests here, where nothing has been sent yet.
        self._local = TransformersBackend(model, tokenizer, eos_token_ids=eos_token_ids, **options)
        self._ray: Any = ray
        self._timeout = timeout
        self._usage = Usage()
        self._version, self._weights = 0, None
        self._actors: list[Any] = []
        self._joined = not ray.is_initialized()
        if self._joined:
            _join(ray, address, actors * num_cpus, ray_init or {})
        try:
            self._shapes = {name: value.shape for name, value in model.state_dict().items()}
            portable = model if model.device.type == "cpu" else copy.deepcopy(model).to("cpu")
            ends = sorted(self._local.eos_token_ids)
            # Kept: an actor that is started again takes it once more.
            self._made_of = ray.put((portable, tokenizer, {**options, "eos_token_ids": ends}))
            placed = ray.remote(_Actor).options(
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                max_restarts=max_restarts,
                max_task_retries=max_restarts,
                scheduling_strategy="SPREAD",
            )
            # In a list, a reference is sent as such.
            self._actors = [placed.remote([self._made_of], device, threads) for _ in range(actors)]
            self.nodes = self._answers(
                [actor.node.remote() for actor in self._actors], start_timeout, "to start"
            )
        except BaseException:
            self.close()
            raise

    @property
    def usage(self) -> Usage:
        """What was done since the backend was made."""
        return self._usage

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int | Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        seeds: Sequence[int],
    ) -> list[list[Rollout]]:
        """Rollouts from each prompt; see :meth:`vineppo.rollout.RolloutBackend.generate`.

        Raises:
            decapod.lm.EngineError: an actor failed or took too long, or :meth:`close` was called.
        """
        if not self._actors:
            raise EngineError("the actors were ended by close(); make a new RayBackend")
        call = Call.of(prompts, n, params, seeds)
        call.needs_eos("model", bool(self._local.eos_token_ids))
        with call.told():
            self._local.check(call.requests)
        started = time.perf_counter()
        shares = adjacent_shares(call.requests, len(self._actors))
        asked = [
            actor.generate.remote([call.requests[i] for i in share], self._version, [self._weights])
            for actor, share in zip(self._actors, shares, strict=False)
        ]
        answers = self._answers(asked, self._timeout, "to generate")
        by_place: dict[int, Any] = {}
        reused = 0
        for share, (completions, cached, problem) in zip(shares, answers, strict=True):
            if problem:
                raise NotFiniteError(f"logprobs of rollouts: {problem}")
            reused += cached
            by_place.update(zip(share, completions, strict=True))
        ordered = [by_place[index] for index in range(len(call.requests))]
        self._usage += call.usage(ordered, reused, time.perf_counter() - started)
        return call.rollouts(ordered)

    def load_weights(self, model: Any) -> None:
        """Put the weights into the object store; actors use them from the next call on.

        Args:
            model: of the kind that the backend was made with, also the very same, whose copies in
                the actors do not follow it. Adapters of PEFT are merged where that one had none.

        Raises:
            InvalidInputError: the weights do not fit.
        """
        source = model if hasattr(self._local.model, "peft_config") else merged(model)
        weights = source.state_dict()
        shapes = {name: value.shape for name, value in weights.items()}
        if shapes != self._shapes:
            differ = sorted(
                name for name in shapes | self._shapes if shapes.get(name) != self._shapes.get(name)
            )
            raise InvalidInputError(
                "model: expected the names and shapes that the actors' copies have, got others for "
                f"{differ[:3]} ({len(differ)} in all)"
            )
        self._weights = self._ray.put(_packed(source))
        self._version += 1

    def close(self) -> None:
        """End the actors, and leave or shut down a Ray that was joined or started for them."""
        if self._ray.is_initialized():
            for actor in self._actors:
                with suppress(self._ray.exceptions.RayError):
                    self._ray.kill(actor)
            if self._joined:
                self._ray.shutdown()
        self._actors, self._joined = [], False

    def __enter__(self) -> RayBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answers(self, asked: list[Any], timeout: float, what: str) -> list[Any]:
        try:
            return list(self._ray.get(asked, timeout=timeout))
        except self._ray.exceptions.GetTimeoutError as error:
            free = self._ray.available_resources()
            raise EngineError(
                f"the {len(self._actors)} actors took longer than {timeout:g} s {what}; free in "
                f"the cluster are {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"
            ) from error
        except self._ray.exceptions.RayError as error:
            raise EngineError(f"an actor failed {what}: {error}") from error


class _Actor:
    """What runs in the cluster."""

    def __init__(self, made_of: list[Any], device: str, threads: int) -> None:
        import ray

        torch.set_num_threads(threads)
        model, tokenizer, options = ray.get(made_of[0])
        self._backend = TransformersBackend(model.to(device), tokenizer, **options)
        self._version = 0

    def node(self) -> str:
        """Id of the node it runs on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def generate(
        self, requests: list[Request], version: int, weights: list[Any]
    ) -> tuple[list[Any], int, str]:
        """Completions, prompt tokens reused, and what is wrong with log-probabilities, if it is."""
        import ray

        if version != self._version:
            _unpack(ray.get(weights[0]), self._backend.model)
            self._version = version
        before = self._backend.engine.cached_prompt_tokens
        try:
            completions = self._backend.engine.generate(requests)
        except LogprobsError as error:
            return [], 0, str(error)
        return completions, self._backend.engine.cached_prompt_tokens - before, ""


def _packed(model: Any) -> list[tuple[str, Any, tuple[int, ...], Any]]:
    """Names, types, shapes and bytes of weights; those tied to others are left out.

    Bytes in arrays go into the store, and are read there, without another copy.
    """
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = every - {name for name, _ in model.named_parameters()}
    pieces = []
    for name, value in model.state_dict().items():
        if name not in tied:
            flat = value.detach().to("cpu").contiguous().reshape(-1)
            pieces.append((name, value.dtype, tuple(value.shape), flat.view(torch.uint8).numpy()))
    return pieces


def _unpack(pieces: Iterable[tuple[str, Any, tuple[int, ...], Any]], model: Any) -> None:
    own = model.state_dict()
    for name, dtype, shape, data in pieces:
        # A copy: torch warns of memory that, as the store's, cannot be written.
        value = torch.empty(shape, dtype=dtype)
        value.reshape(-1).view(torch.uint8).numpy()[:] = data
        own[name].copy_(value)


def _join(ray: Any, address: str | None, cpus: float, given: Mapping[str, Any]) -> None:
    where = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": where, "logging_level": "warning"}
    if not where:
        # "local" and not None, which would join any cluster that this machine happens to run.
        options |= {"address": "local", "include_dashboard": False}
        options["num_cpus"] = max(int(-(-cpus // 1)), os.cpu_count() or 1)
    ray.init(**{**options, **given})
