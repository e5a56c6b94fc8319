"""Engines as actors of a Ray cluster, on one machine or many."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, get_args

import ray

from asyncrlhf.engines.local import LocalEngine
from asyncrlhf.engines.protocol import Completion, GenerationEngine
from asyncrlhf.engines.ray_actors import RayProcess, stored
from asyncrlhf.engines.remote import SupervisedEngine, served
from asyncrlhf.engines.replicas import Replicas
from asyncrlhf.errors import ActorError, InvalidInputError, WaitTimeoutError
from asyncrlhf.processes import numeric_threads, packed
from asyncrlhf.settings import at_least, one_of, positive

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from decapod.lm import Request

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
_LOG = logging.getLogger(__name__)


class RayEngine:
    """Generates with copies of the learner's transformers model in actors that Ray places.

    Each actor holds a whole copy. The requests of a call are shared out as
    :class:`~asyncrlhf.engines.Replicas` does it, whatever actor is faster; with one actor the
    completions are those of :class:`~asyncrlhf.engines.HFEngine`, bit for bit where numeric threads
    are alike. New weights are put into Ray's object store once, from where every machine fetches
    them, and are in use when all actors have acknowledged them. An actor that dies is placed again,
    gets the weights it had, and generates its share once more; one that cannot be placed any more
    leaves its share to the others.

    A Ray that is already connected is used and left running. Otherwise the cluster at ``address``,
    or at the environment variable ``RAY_ADDRESS``, is joined, and left again by :meth:`close`;
    without either a Ray of this machine alone is started, and shut down by :meth:`close`. The
    machines of a cluster need this package, with its extra ``ray``, and the model's code.

    The trainer calls :meth:`attach`; without a trainer, call it yourself before anything else.

    Args:
        device: where an actor's copy lives, ``"cpu"`` or ``"cuda"``: an actor sees only the GPUs
            that Ray reserved for it, so the first of them is right.
        num_actors: how many.
        engine_factory: makes the engine of an actor, in the actor; it is not given the model, and
            ``device``, ``max_batch_size`` and ``max_batch_tokens`` mean nothing then.
        num_cpus: logical CPUs that Ray reserves for each actor.
        num_gpus: GPUs that Ray reserves for each actor.
        resources: custom resources that Ray reserves for each actor.
        strategy: how the actors are laid out over machines; the placement strategy of Ray.
        runtime_env: of the actors, as Ray takes it.
        address: of a running cluster, as ``ray.init`` takes it.
        ray_init: more arguments of ``ray.init``.
        threads: numeric threads of each actor.
        max_batch_size: most rows that run together.
        max_batch_tokens: most rows x tokens whose keys and values are held at the same time.
        timeout: seconds that one call of an actor may take; a silent one is noticed only then.
        start_timeout: seconds until the cluster has room for all actors, and again until each of
            them must be ready.
        max_restarts: deaths of an actor in a row after which it is given up.

    Raises:
        MissingExtraError: without the extra ``asyncrlhf[ray]``.
        InvalidInputError: a number out of range, an unknown strategy, or nothing to reserve.
    """

    def __init__(
        self,
        device: str = "cpu",
        num_actors: int = 1,
        *,
        engine_factory: Callable[[], GenerationEngine] | None = None,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        resources: Mapping[str, float] | None = None,
        strategy: Strategy = "SPREAD",
        runtime_env: Mapping[str, Any] | None = None,
        address: str | None = None,
        ray_init: Mapping[str, Any] | None = None,
        threads: int = 1,
        max_batch_size: int = 64,
        max_batch_tokens: int = 65_536,
        timeout: float = 1800.0,
        start_timeout: float = 180.0,
        max_restarts: int = 3,
    ) -> None:
        at_least("num_actors", num_actors, 1)
        at_least("threads", threads, 1)
        at_least("max_batch_size", max_batch_size, 1)
        at_least("max_batch_tokens", max_batch_tokens, 1)
        at_least("max_restarts", max_restarts, 0)
        positive("timeout", timeout)
        positive("start_timeout", start_timeout)
        one_of("strategy", strategy, get_args(Strategy))
        reserved = {"CPU": num_cpus, "GPU": num_gpus, **(resources or {})}
        for name, amount in reserved.items():
            at_least(f"reserved {name}", amount, 0)
        if not any(reserved.values()):
            raise InvalidInputError(
                "num_cpus, num_gpus, resources: expected one above 0 to place actors by, got none"
            )
        if engine_factory is None and device.startswith("cuda") and not num_gpus:
            raise InvalidInputError(
                f"num_gpus: expected a number above 0 for device={device!r}, got {num_gpus:g}; an "
                "actor sees only what Ray reserved for it"
            )
        self.device = device
        self.num_actors = num_actors
        self.threads = threads
        self._factory = engine_factory
        self._reserved = {name: amount for name, amount in reserved.items() if amount}
        self._strategy = strategy
        self._runtime_env = dict(runtime_env or {})
        self._address, self._ray_init = address, dict(ray_init or {})
        self._sizes = {"max_batch_size": max_batch_size, "max_batch_tokens": max_batch_tokens}
        self._timeout, self._start_timeout = timeout, start_timeout
        self._max_restarts = max_restarts
        self._connected = False  # to a Ray that is to be left again
        self._group: Any = None
        self._actors: list[SupervisedEngine] = []
        self._processes: list[RayProcess] = []
        self._together: Replicas | None = None

    def attach(self, model: PreTrainedModel, eos_token_ids: Iterable[int]) -> None:
        """Place the actors, each with a copy of the model.

        Args:
            model: the learner's, unwrapped; also one wrapped by PEFT.
            eos_token_ids: tokens that end a completion.

        Raises:
            InvalidInputError: the model cannot be sent to another process.
            ActorError: an actor did not start.
            WaitTimeoutError: the cluster has no room for all actors, or one did not start in time.
            ConnectionError: there is no cluster at ``address``.
        """
        self.close()
        try:
            self._start(self._factory or self._copies_of(model, eos_token_ids))
        except BaseException:
            self.close()
            raise

    @property
    def nodes(self) -> tuple[str, ...]:
        """Ids of the nodes on which the actors run, in their order."""
        return tuple(process.node for process in self._processes)

    @property
    def pids(self) -> tuple[int | None, ...]:
        """Process ids of the actors, each on its machine, in their order."""
        return tuple(process.pid for process in self._processes)

    @property
    def restarts(self) -> int:
        """How often actors were placed again."""
        return sum(actor.restarts for actor in self._actors)

    @property
    def regenerated(self) -> int:
        """How many shares of rounds were generated again because an actor died."""
        return sum(actor.regenerated for actor in self._actors)

    @property
    def version(self) -> int:
        """Version of the weights that all actors have acknowledged last."""
        return self._ready.version

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Completions in the order of the requests; see the protocol.

        Raises:
            decapod.lm.RequestError: a request cannot be served.
            ActorError: no actor is left.
            WeightUpdateError: the actors hold different weights since an update failed.
            WaitTimeoutError: an actor took too long.
        """
        together = self._ready
        # Replicas would leave the share of an actor that died idle to the others.
        for actor in self._actors:
            if actor.health():
                try:
                    actor.start()
                except (ActorError, WaitTimeoutError) as error:
                    _LOG.warning("%s", error)
        return together.generate(requests)

    def load_weights(self, source: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Use these weights from now on, in all actors.

        Raises:
            WeightUpdateError: not all actors have acknowledged them; the version stays, and nothing
                is generated until an update reaches all, unless all still have the old weights.
        """
        self._ready.load_weights(stored(source, version, self._timeout), version)

    def pause(self) -> None:
        """Hold back further requests."""
        self._ready.pause()

    def resume(self) -> None:
        """Take requests again."""
        self._ready.resume()

    def health(self) -> str:
        """Empty when all actors can serve, else what is wrong with which."""
        return "no actors placed" if self._together is None else self._together.health()

    def close(self) -> None:
        """End the actors, and leave or shut down a Ray that was joined or started for them."""
        for actor in self._actors:
            actor.close()
        self._together, self._actors, self._processes = None, [], []
        if self._group is not None:
            with suppress(ray.exceptions.RayError):
                ray.util.remove_placement_group(self._group)
            self._group = None
        if self._connected:
            self._connected = False
            ray.shutdown()

    @property
    def _ready(self) -> Replicas:
        if self._together is None:
            raise InvalidInputError(
                "engine: it has no actors yet; call attach(model, eos_token_ids) first, or give "
                "it to AsyncRLHFTrainer, which does"
            )
        return self._together

    def _copies_of(
        self, model: PreTrainedModel, eos_token_ids: Iterable[int]
    ) -> Callable[[], GenerationEngine]:
        eos, device, sizes = tuple(eos_token_ids), self.device, self._sizes
        # An actor may have other GPUs, or none.
        portable = model if model.device.type == "cpu" else copy.deepcopy(model).to("cpu")
        return lambda: LocalEngine(portable.to(device), eos, **sizes)

    def _start(self, factory: Callable[[], GenerationEngine]) -> None:
        names = [f"actor {i} of {self.num_actors} on Ray" for i in range(self.num_actors)]
        code = packed(served(factory, "an actor on Ray"), "an actor on Ray")
        if not ray.is_initialized():
            self._connect()
            self._connected = True
        self._reserve()
        in_store = ray.put(code)  # once, for all of them
        self._processes = [
            RayProcess(in_store, self._options(i), name, self.threads, self._start_timeout)
            for i, name in enumerate(names)
        ]
        self._actors = [
            SupervisedEngine(
                process, what=name, max_restarts=self._max_restarts, timeout=self._timeout
            )
            for process, name in zip(self._processes, names, strict=True)
        ]
        for process in self._processes:  # all begin before any is waited for
            process.begin()
        for process in self._processes:
            process.wait()
        # Each call has limits of its own; this one is for what they do not see.
        limit = (self._max_restarts + 1) * (self._start_timeout + 2 * self._timeout)
        self._together = Replicas(self._actors, names=names, timeout=limit)

    def _connect(self) -> None:
        address = self._address or os.environ.get("RAY_ADDRESS") or None
        options: dict[str, Any] = {"log_to_driver": True, "logging_level": "warning"}
        if address is None:
            cpus = math.ceil(self.num_actors * self._reserved.get("CPU", 0))
            # "local" and not None: None would join any cluster that this machine happens to run.
            options |= {"address": "local", "include_dashboard": False}
            options["num_cpus"] = max(cpus, os.cpu_count() or 1)
        else:
            options["address"] = address
        ray.init(**{**options, **self._ray_init})

    def _reserve(self) -> None:
        bundles = [dict(self._reserved) for _ in range(self.num_actors)]
        self._group = ray.util.placement_group(bundles, strategy=self._strategy)
        if not self._group.wait(math.ceil(self._start_timeout)):  # it takes whole seconds
            free = {name: ray.available_resources().get(name, 0) for name in self._reserved}
            raise WaitTimeoutError(
                f"Ray to reserve {self.num_actors} x {self._reserved} by {self._strategy}",
                self._start_timeout,
                f"free in the whole cluster are {free}",
            )

    def _options(self, index: int) -> dict[str, Any]:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        variables = {**numeric_threads(self.threads), **self._runtime_env.get("env_vars", {})}
        named = {name: n for name, n in self._reserved.items() if name not in ("CPU", "GPU")}
        return {
            "num_cpus": self._reserved.get("CPU", 0),
            "num_gpus": self._reserved.get("GPU", 0),
            "resources": named,
            "runtime_env": {**self._runtime_env, "env_vars": variables},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, index),
            # Ray would start it again without its weights.
            "max_restarts": 0,
            "max_task_retries": 0,
        }
