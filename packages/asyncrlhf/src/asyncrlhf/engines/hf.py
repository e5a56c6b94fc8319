"""The transformers engine: one name, three places where it can run."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from asyncrlhf.engines.local import LocalEngine
from asyncrlhf.engines.protocol import Completion
from asyncrlhf.engines.remote import RemoteEngine
from asyncrlhf.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from decapod.lm import Request

Placement = Literal["process", "thread", "inline"]


class HFEngine:
    """Generates with a copy of the learner's transformers model.

    The three placements give the same completions, bit for bit, where numeric threads are alike:

    - ``"process"``: a process of its own, watched and started again when it dies. The only one in
      which generation and learning do not compete for Python's interpreter.
    - ``"thread"``: a thread of this process; good enough where a GPU does the work.
    - ``"inline"``: in the caller's thread, when the round is ordered. Nothing overlaps; this is
      the plain loop that the others must equal.

    The trainer calls :meth:`attach`; without a trainer, call it yourself before anything else.

    Args:
        device: where the copy lives, such as ``"cpu"`` or ``"cuda:1"``.
        placement: see above.
        dtype: of the copy's weights, such as ``"bfloat16"``; None leaves them as the learner's.
            Where it differs, so do log-probabilities: see ``is_correction``.
        threads: numeric threads of the process; None takes half of the cores.
        cores: CPU cores that the process is pinned to.
        max_batch_size: most rows that run together.
        max_batch_tokens: most rows x tokens whose keys and values are held at the same time.
        timeout: seconds that one round may take.
        start_timeout: seconds until the process must be ready.
        max_restarts: deaths of the process in a row after which it is given up.

    Raises:
        InvalidInputError: an unknown placement, or a number out of range.
    """

    def __init__(
        self,
        device: str = "cpu",
        placement: Placement = "process",
        *,
        dtype: str | None = None,
        threads: int | None = None,
        cores: Sequence[int] | None = None,
        max_batch_size: int = 64,
        max_batch_tokens: int = 65_536,
        timeout: float = 1800.0,
        start_timeout: float = 180.0,
        max_restarts: int = 3,
    ) -> None:
        if placement not in get_args(Placement):
            raise InvalidInputError(
                f"placement: expected one of {', '.join(get_args(Placement))}, got {placement!r}"
            )
        numbers = {"max_batch_size": max_batch_size, "max_batch_tokens": max_batch_tokens}
        if threads is not None:
            numbers["threads"] = threads
        for name, number in numbers.items():
            if number < 1:
                raise InvalidInputError(f"{name}: expected at least 1, got {number}")
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise InvalidInputError(f"dtype: expected one of torch, got {dtype!r}")
        if max_restarts < 0:
            raise InvalidInputError(f"max_restarts: expected at least 0, got {max_restarts}")
        self.device = device
        self.placement: Placement = placement
        self.dtype = dtype
        self.threads = threads or max(1, (os.cpu_count() or 1) // 2)
        self._sizes = {"max_batch_size": max_batch_size, "max_batch_tokens": max_batch_tokens}
        self._remote = {
            "cores": cores,
            "timeout": timeout,
            "start_timeout": start_timeout,
            "max_restarts": max_restarts,
        }
        self._engine: LocalEngine | RemoteEngine | None = None

    def attach(self, model: PreTrainedModel, eos_token_ids: Iterable[int]) -> None:
        """Copy the model; for ``"process"``, start it there.

        Args:
            model: the learner's, unwrapped; also one wrapped by PEFT.
            eos_token_ids: tokens that end a completion.

        Raises:
            InvalidInputError: the model cannot be sent to another process.
            ActorError: the process did not start.
        """
        self.close()
        eos, device, sizes = tuple(eos_token_ids), self.device, dict(self._sizes)
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        if self.placement != "process":
            self._engine = LocalEngine(copy.deepcopy(model).to(device, dtype), eos, **sizes)
            return

        def make() -> LocalEngine:
            return LocalEngine(model.to(device, dtype), eos, **sizes)

        remote: dict[str, Any] = self._remote
        self._engine = RemoteEngine(
            make, what=f"the actor on {device}", threads=self.threads, **remote
        )
        self._engine.start()

    @property
    def _ready(self) -> LocalEngine | RemoteEngine:
        if self._engine is None:
            raise InvalidInputError(
                "engine: it has no model yet; call attach(model, eos_token_ids) first, or give "
                "it to AsyncRLHFTrainer, which does"
            )
        return self._engine

    @property
    def pid(self) -> int | None:
        """Process id of the actor; None where it runs in this process."""
        return self._engine.pid if isinstance(self._engine, RemoteEngine) else None

    @property
    def restarts(self) -> int:
        """How often the actor was started again."""
        return self._engine.restarts if isinstance(self._engine, RemoteEngine) else 0

    @property
    def regenerated(self) -> int:
        """How many rounds were generated again because the actor died."""
        return self._engine.regenerated if isinstance(self._engine, RemoteEngine) else 0

    @property
    def version(self) -> int:
        """Version of the weights in use."""
        return self._ready.version

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Completions in the order of the requests; see the protocol."""
        return self._ready.generate(requests)

    def load_weights(self, source: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Use these weights from now on; see the protocol."""
        self._ready.load_weights(source, version)

    def pause(self) -> None:
        """Hold back further requests."""
        self._ready.pause()

    def resume(self) -> None:
        """Take requests again."""
        self._ready.resume()

    def health(self) -> str:
        """Empty when the engine can serve, else what is wrong."""
        return "no model attached" if self._engine is None else self._engine.health()

    def close(self) -> None:
        """Free the copy, and end the process."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
