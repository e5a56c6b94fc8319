"""Engines and transports by the names that recipes give them, with options of their own classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from asyncrlhf.commands.checking import check_arguments
from asyncrlhf.errors import InvalidInputError
from asyncrlhf.settings import one_of

if TYPE_CHECKING:
    from asyncrlhf.engines import GenerationEngine
    from asyncrlhf.transport import Transport

ENGINES: Final[Mapping[str, str]] = {
    "hf": "HFEngine",
    "vllm_server": "VLLMServer",
    "vllm": "VLLMInProcess",
    "ray": "RayEngine",
    "fake": "FakeEngine",
}
TRANSPORTS: Final[Mapping[str, str]] = {
    "shared_memory": "SharedMemory",
    "directory": "SafetensorsDir",
    "torch_dist": "TorchDist",
    "vllm": "VLLMTransfer",
}
# What the trainer or another part decides.
_OURS: Final[Mapping[str, tuple[str, ...]]] = {
    "vllm_server": ("base_url", "model"),
    "vllm": ("llm", "model", "weight_transfer"),
    "ray": ("engine_factory",),
    "fake": ("vocab_size", "eos_token_id"),
    "shared_memory": ("slots", "checksum"),
    "directory": ("keep",),
    "vllm_transfer": ("trainer_init",),
}


@dataclass(frozen=True)
class Part:
    """A class by its name in recipes, and arguments for it.

    Attributes:
        kind: of :data:`ENGINES` or :data:`TRANSPORTS`.
        options: keyword arguments.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, content: Any, kinds: Mapping[str, str]) -> Part:
        """The part that a section holds.

        Raises:
            InvalidInputError: no kind, or an unknown one.
        """
        if not isinstance(content, Mapping) or "kind" not in content:
            raise InvalidInputError(f"{name}: expected a kind of {', '.join(kinds)}, got {content}")
        one_of(f"{name}.kind", content["kind"], kinds)
        return cls(content["kind"], {k: v for k, v in content.items() if k != "kind"})


def addresses(engine: Part) -> list[str]:
    """The servers of a ``vllm_server``: ``base_url`` is one address or a list of them.

    Raises:
        InvalidInputError: there is none.
    """
    given = engine.options.get("base_url")
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, list) or not found or not all(isinstance(x, str) for x in found):
        raise InvalidInputError(
            "engine.base_url: expected the address of a vLLM server, or a list of them, got "
            f"{given!r}"
        )
    return found


def check_engine(engine: Part, transport: Part) -> None:
    """Refuse what the engine's class does not take, and a transport that does not reach it.

    Raises:
        MissingExtraError: its package is not installed.
        InvalidInputError: with the key.
    """
    from asyncrlhf import engines

    options = dict(engine.options)
    served = engine.kind in ("vllm_server", "vllm")
    if transport.kind == "vllm" and not served:
        raise InvalidInputError(
            f"transport.kind: vllm sends weights into vLLM, and the engine is {engine.kind}; use "
            "shared_memory or directory"
        )
    ours = _OURS.get(engine.kind, ())
    if engine.kind == "vllm_server":
        addresses(engine)
        options.pop("base_url")
        options.pop("model", None)
        way = options.get("weights"), transport.kind in ("directory", "vllm")
        if bool(way[0]) == way[1]:
            raise InvalidInputError(
                "engine.weights: expected one way of sending weights to the server: here the "
                "absolute path of a folder that it reads too, or the transport directory or vllm, "
                f"got {'both' if way[1] else 'none'}"
            )
    check_arguments("engine.", getattr(engines, ENGINES[engine.kind]), options, ours)


def check_transport(transport: Part) -> None:
    """Refuse what the transport's class does not take.

    Raises:
        InvalidInputError: with the key.
    """
    from asyncrlhf.transport import SafetensorsDir, SharedMemory, VLLMTransfer

    kind, options = transport.kind, transport.options
    if kind == "torch_dist":
        raise InvalidInputError(
            "transport.kind: torch_dist sends to ranks that call receive(), and a recipe starts "
            "none; from Python, AsyncRLHFTrainer(transport=TorchDist(group)) uses it"
        )
    classes = {"shared_memory": SharedMemory, "directory": SafetensorsDir, "vllm": VLLMTransfer}
    ours = _OURS["vllm_transfer" if kind == "vllm" else kind]
    check_arguments("transport.", classes[kind], options, ours)


def build_transport(transport: Part, ahead: int) -> Transport | None:
    """The trainer's transport; None: its own, shared memory.

    Args:
        transport: checked.
        ahead: D.
    """
    if transport.kind == "directory":
        from asyncrlhf.transport import SafetensorsDir

        return SafetensorsDir(keep=max(2, ahead + 1), **transport.options)
    return None


def build_engine(engine: Part, transport: Part, model: str, tokenizer: Any) -> GenerationEngine:
    """The engine.

    Args:
        engine: checked.
        transport: checked.
        model: path or name of the policy.
        tokenizer: of the policy.

    Raises:
        MissingExtraError: its package is not installed.
        InvalidInputError: its class refuses something.
    """
    from asyncrlhf import engines

    options: dict[str, Any] = dict(engine.options)
    if engine.kind == "fake":
        return engines.FakeEngine(
            vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **options
        )
    if engine.kind == "vllm":
        if transport.kind == "vllm":
            options["weight_transfer"] = _transfer(transport, 0)
        return engines.VLLMInProcess(model=model, **options)
    if engine.kind != "vllm_server":
        made: GenerationEngine = getattr(engines, ENGINES[engine.kind])(**options)
        return made
    urls = addresses(engine)
    del options["base_url"]
    name = options.pop("model", model)
    weights = _folder(transport, options.pop("weights", None))
    servers = [
        engines.VLLMServer(
            url,
            name,
            weights=weights if transport.kind != "vllm" else _transfer(transport, place),
            **options,
        )
        for place, url in enumerate(urls)
    ]
    return servers[0] if len(servers) == 1 else engines.Replicas(servers, names=urls)


def _folder(transport: Part, weights: str | None) -> Any:
    """One object for all servers, so that a version is written once."""
    from asyncrlhf.transport.vllm_folder import VLLMFolder

    if transport.kind == "directory":
        weights = str(Path(transport.options["path"]).absolute())
    return None if weights is None else VLLMFolder(weights)


def _transfer(transport: Part, place: int) -> Any:
    """Each server joins a group of its own, on a port of its own."""
    from asyncrlhf.transport import VLLMTransfer

    options = dict(transport.options)
    if place:
        options["master_port"] = options.get("master_port", 29_600) + place
    return VLLMTransfer(**options)
