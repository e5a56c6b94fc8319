"""What the plug-ins take for granted about TRL, looked up before they are used.

The asynchronous trainer of TRL is experimental and its seams change between releases. A plug-in
that no longer fits would fail somewhere in the middle of a run; here it fails at once, and says
what differs.
"""

from __future__ import annotations

import dataclasses
import inspect
from importlib import import_module, metadata
from typing import Any

from asyncrlhf.errors import MissingExtraError

SERIES = (1, 16)
"""The releases of TRL whose contract is known: 1.16 and its corrections."""

WORKER = {
    "start": (),
    "stop": (),
    "update_model_version": ("model_version",),
    "check_health": ("stale_after_s",),
}
"""Methods of TRL's rollout worker, with the names of their arguments."""

TRANSFER = {
    "init_weight_transfer": (),
    "pause": (),
    "send_weights": ("iterator",),
    "resume": (),
    "destroy": (),
}
"""Methods of TRL's weight transfer."""

WORKER_ATTRIBUTES = ("rollout_buffer", "metrics_queue")
"""Queues that TRL's trainer reads from its worker."""

SAMPLE = (
    "prompt",
    "completion",
    "input_ids",
    "completion_mask",
    "old_log_probs",
    "advantage",
    "model_version",
    "group_id",
    "metrics",
    "enqueued_at",
)
"""Fields of the samples in the first queue."""


class TRLContractError(ImportError):
    """The installed TRL is another one than the plug-ins were made for; the message says how."""


def check_contract() -> None:
    """Compare the installed TRL with what the plug-ins were made for.

    Raises:
        MissingExtraError: TRL is not installed.
        TRLContractError: its release or one of its protocols differs.
    """
    try:
        version = metadata.version("trl")
    except metadata.PackageNotFoundError as error:
        raise MissingExtraError("trl", "trl") from error
    remedy = f'pip install "trl>={_dotted(SERIES)},<{_dotted((SERIES[0], SERIES[1] + 1))}"'
    if not version.startswith(f"{_dotted(SERIES)}."):
        raise TRLContractError(
            f"trl: expected a release {_dotted(SERIES)}.x, which the plug-ins were tested with, "
            f"got {version}; {remedy}"
        )
    trainer = import_module("trl.experimental.async_grpo.async_grpo_trainer")
    found = differences(
        trainer.RolloutWorkerProtocol, trainer.WeightTransferProtocol, trainer.RolloutSample
    )
    if found:
        raise TRLContractError(
            f"trl {version}: its asynchronous trainer asks for something else than the plug-ins "
            f"give: {'; '.join(found)}; {remedy}, or look for a newer asyncrlhf"
        )


def differences(worker: Any, transfer: Any, sample: Any) -> list[str]:
    """What differs between TRL's classes and what is known of them, in words.

    Args:
        worker: TRL's protocol of a rollout worker.
        transfer: TRL's protocol of a weight transfer.
        sample: TRL's dataclass of a sample.
    """
    found = [*_methods_that_differ(worker, WORKER), *_methods_that_differ(transfer, TRANSFER)]
    attributes = tuple(getattr(worker, "__annotations__", ()))
    fields = tuple(field.name for field in dataclasses.fields(sample))
    for what, known, got in (
        (f"attributes of {worker.__name__}", WORKER_ATTRIBUTES, attributes),
        (f"fields of {sample.__name__}", SAMPLE, fields),
    ):
        if set(known) != set(got):
            found.append(f"{what}: expected {', '.join(known)}, got {', '.join(got) or 'none'}")
    return found


def _methods_that_differ(protocol: Any, known: dict[str, tuple[str, ...]]) -> list[str]:
    methods = {
        name: tuple(inspect.signature(method).parameters)[1:]
        for name, method in vars(protocol).items()
        if inspect.isfunction(method) and not name.startswith("_")
    }
    return [
        f"{protocol.__name__}.{name}: expected {_call(known.get(name))}, got "
        f"{_call(methods.get(name))}"
        for name in dict.fromkeys((*known, *methods))
        if known.get(name) != methods.get(name)
    ]


def _call(arguments: tuple[str, ...] | None) -> str:
    return "no such method" if arguments is None else f"({', '.join(arguments)})"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
