"""Engines by name, as the command line takes them: ``hf:PATH``, ``server:URL`` and so on.

Needs the extra `lm` for all but simulated reasoners.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from gsm_compose.benchmark import Benchmark
from gsm_compose.errors import MissingExtraError, UsageError
from gsm_compose.prompts import CONDITIONS, PromptSpec, stop_sequences
from gsm_compose.simulate import SimulatedReasoner

if TYPE_CHECKING:
    from gsm_compose.evaluation import Generate

Kind = Literal["hf", "vllm", "server", "simulated"]
_FORMS: Final = "hf:PATH, vllm:PATH, server:URL or simulated:e1=0.1,e2=0.2"


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        temperature: 0 takes the most probable token.
        top_p: share of the most probable tokens that is drawn from.
        max_new_tokens: longest answer.
        seed: root of all draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Engine:
    """Something that answers prompts, not yet loaded.

    Attributes:
        kind: what runs the model.
        where: folder or hub name, address, or parameters, by `kind`.
    """

    kind: Kind
    where: str

    @classmethod
    def parse(cls, text: str) -> Engine:
        """The engine of a text such as ``hf:path/to/model``.

        Raises:
            UsageError: it has none of the known forms.
        """
        name, _, where = text.partition(":")
        kind: Kind | None = next((kind for kind in get_args(Kind) if kind == name), None)
        if kind is None or not (where or kind == "simulated"):
            raise UsageError(f"engine: expected {_FORMS}, got {text!r}.")
        if kind == "server" and not where.startswith(("http://", "https://")):
            raise UsageError(
                "engine: expected server:URL with http:// or https://, such as "
                f"server:http://127.0.0.1:8000/v1, got {text!r}."
            )
        found = cls(kind, where)
        if kind == "simulated":
            found.reasoner(seed=0)
        return found

    def label(self, model: str | None) -> str:
        """A name of the model for results."""
        if self.kind == "server":
            return model or self.where
        if self.kind == "simulated":
            return f"simulated:{self.where}"
        return Path(self.where).name or self.where

    def reasoner(self, seed: int) -> SimulatedReasoner:
        """The simulated reasoner of the parameters.

        Raises:
            UsageError: a parameter is unknown, or not a probability.
        """
        known = [field.name for field in fields(SimulatedReasoner) if field.name != "seed"]
        values: dict[str, Any] = {"seed": seed}
        for part in filter(None, self.where.split(",")):
            name, equals, text = part.partition("=")
            try:
                if not equals or name not in known:
                    raise ValueError
                values[name] = float(text)
            except ValueError:
                raise UsageError(
                    f"engine: expected name=number with a name of {', '.join(known)}, got {part!r}."
                ) from None
        return SimulatedReasoner(**values)


@dataclass(frozen=True)
class Server:
    """What a server needs besides its address.

    Attributes:
        model: name of the model as the server knows it.
        api_key_env: environment variable that holds the key; None for a server without one.
        concurrency: most requests in flight.
        timeout: seconds of silence after which one try is given up.
        retries: further tries of one request.
    """

    model: str | None = None
    api_key_env: str | None = None
    concurrency: int = 16
    timeout: float = 120.0
    retries: int = 5

    def api_key(self, environment: Mapping[str, str]) -> str | None:
        """The key.

        Raises:
            UsageError: the variable is not set.
        """
        if self.api_key_env is None:
            return None
        key = environment.get(self.api_key_env)
        if not key:
            raise UsageError(f"api-key-env: the variable {self.api_key_env!r} is not set.")
        return key


def load(
    engine: Engine,
    sampling: Sampling,
    benchmark: Benchmark,
    specs: Sequence[PromptSpec],
    server: Server | None = None,
    batch_size: int = 64,
) -> list[Generate]:
    """A function from prompts to texts for each way of asking; a model is loaded once.

    Args:
        engine: what answers.
        sampling: how.
        benchmark: what will be asked; simulated reasoners recognise its prompts.
        specs: how it will be asked.
        server: for an engine of that kind.
        batch_size: rows that a model in this process runs together.

    Raises:
        MissingExtraError: decapod, or what it needs for this kind of engine, is not installed.
        UsageError: the model cannot be loaded, or an option is missing or out of range.
    """
    if engine.kind == "simulated":
        reasoner = engine.reasoner(sampling.seed)
        return [reasoner.generate_for(benchmark, spec) for spec in specs]
    try:
        from decapod import lm
    except ImportError as error:
        raise MissingExtraError("decapod", "lm") from error
    stops = {stop for spec in specs for name in CONDITIONS for stop in stop_sequences(name, spec)}
    settings = asdict(sampling)
    seed = settings.pop("seed")
    try:
        params = lm.SamplingParams(**settings, stop=tuple(sorted(stops)))
        if engine.kind == "server":
            made = _server(lm, engine, server or Server())
            return [lm.ServerTextGenerator(made, params, seed)] * len(specs)
        model, tokenizer = _model(lm, engine, batch_size)
    except ImportError as error:
        extra = "vllm" if error.name == "vllm" else "lm"
        raise MissingExtraError(error.name or "decapod", extra) from error
    if any(spec.chat for spec in specs) and tokenizer.chat_template is None:
        raise UsageError(
            f"chat: the tokenizer of {engine.where} has no chat template. Ask without --chat."
        )
    return [lm.TextGenerator(model, tokenizer, params, seed)] * len(specs)


def _server(lm: Any, engine: Engine, server: Server) -> Any:
    if server.model is None:
        raise UsageError("model: expected the name of the model on the server, got none.")
    key = server.api_key(os.environ)
    try:
        return lm.ServerEngine(
            engine.where,
            server.model,
            api_key=key,
            concurrency=server.concurrency,
            timeout=server.timeout,
            retries=server.retries,
        )
    except ValueError as error:
        raise UsageError(f"engine: {error}") from error


def _model(lm: Any, engine: Engine, batch_size: int) -> tuple[Any, Any]:
    """Engine and tokenizer of a model in this process."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(engine.where)
        if engine.kind == "vllm":
            import vllm

            return lm.VLLMEngine(vllm.LLM(model=engine.where)), tokenizer
        model = AutoModelForCausalLM.from_pretrained(engine.where, dtype="auto")
    except (OSError, ValueError) as error:
        raise UsageError(f"engine: cannot load {engine.where!r}: {error}") from error
    return lm.TransformersEngine(_placed(model), tokenizer, max_batch_size=batch_size), tokenizer


def _placed(model: Any) -> Any:
    """On an accelerator where there is one."""
    import torch

    return model.to("cuda") if torch.cuda.is_available() else model
