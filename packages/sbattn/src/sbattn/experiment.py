"""An experiment as data: which model learns what, and how it is measured.

Written in a TOML file or as a mapping; `run` does the rest. The reproduction, `sbattn-repro` and
`experiments/train.py` all go this way, from a hundred thousand parameters to hundreds of millions.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from sbattn.errors import InvalidInputError
from sbattn.evaluation import evaluate_recall, loss_by_position
from sbattn.live import model_live_fractions
from sbattn.model import CausalLM, ModelConfig
from sbattn.tasks import (
    MQRAR,
    Corpus,
    Task,
    file_corpus,
    staggered_windows,
    stdlib_corpus,
    token_corpus,
)
from sbattn.training import StepDone, TrainingConfig, train

_T = TypeVar("_T")

_TILES: Final = (64, 8)  # about what kernels have, and fine enough to see a head of 24 keys shrink

TINY: Final[dict[str, dict[str, Any]]] = {
    "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "mlp_size": 64},
    "training": {"steps": 2, "batch_size": 2, "micro_batch": 1, "length": 64, "dtype": "float32"},
    "evaluation": {"length": 128, "block": 64, "blocks": 2, "stretches": 1},
}
"""What `Experiment.smoke` puts in place of an experiment's own sizes."""


@dataclass(frozen=True)
class RecallData:
    """Associative recall, as `sbattn.tasks.MQRAR`, and the lengths at which it is tested.

    Attributes:
        keys: how many keys there are.
        values: how many values there are.
        reassign: whether a key gets a new value each time.
        lengths: tokens per test sequence.
        sequences: per length.
    """

    keys: int = 8
    values: int = 16
    reassign: bool = True
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    sequences: int = 64

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 4 or self.sequences < 1:
            raise InvalidInputError(
                "lengths, sequences: expected at least 4 tokens (two pairs), and at least "
                f"one sequence, got {list(self.lengths)} and {self.sequences}"
            )

    def task(self) -> MQRAR:
        """The generator of sequences."""
        return MQRAR(self.keys, self.values, self.reassign)


@dataclass(frozen=True)
class TextData:
    """A text, and how long its tokens' contexts are in the test.

    Without `path` the text is the sources of Python's standard library. A file is read as bytes,
    or as raw token ids if `vocab_size` is given.

    Attributes:
        path: the file.
        vocab_size: of the token ids.
        token_dtype: their type in the file.
        max_bytes: of the standard library's sources.
        length: tokens per test context.
        block: positions whose losses are averaged; divides `length`.
        blocks: of text tested at every position, per stretch.
        stretches: places in the held-out text.
    """

    path: str | None = None
    vocab_size: int | None = None
    token_dtype: str = "uint16"
    max_bytes: int = 4_000_000
    length: int = 2048
    block: int = 128
    blocks: int = 16
    stretches: int = 4

    def corpus(self) -> Corpus:
        """Read it.

        Raises:
            InvalidInputError: the text does not fit.
            OSError: the file cannot be read.
        """
        if self.path is None:
            if self.vocab_size is not None:
                raise InvalidInputError(
                    "path: expected a file of token ids where vocab_size is given, got none; "
                    "name one with --data"
                )
            return stdlib_corpus(self.max_bytes)
        if self.vocab_size is None:
            return file_corpus(Path(self.path))
        return token_corpus(Path(self.path), self.vocab_size, self.token_dtype)


@dataclass(frozen=True)
class Experiment:
    """A model, what it learns, and how it is measured.

    Attributes:
        model: what is trained.
        training: how; its seed is that of the weights too.
        data: what it learns.

    Raises:
        InvalidInputError: on `from_mapping` and `load`, for what does not fit.
    """

    model: ModelConfig
    training: TrainingConfig
    data: RecallData | TextData = field(default_factory=RecallData)

    @classmethod
    def from_mapping(
        cls, content: Mapping[str, Any], attn: str = "stickbreaking", **training: Any
    ) -> Experiment:
        """From what a TOML file holds.

        Args:
            content: tables `model` (fields of `ModelConfig`), `training` (of `TrainingConfig`), and
                `recall` or `text` (of the classes here); and `arms`, whose tables override `model`
                for the attention of their name.
            attn: the attention.
            training: fields of `TrainingConfig` that override the table.
        """
        known = ("model", "training", "recall", "text", "arms")
        unknown = sorted(set(content) - set(known))
        if unknown or ("recall" in content) == ("text" in content):
            raise InvalidInputError(
                f"experiment: expected tables out of {list(known)}, with either recall or text; "
                f"got {sorted(content)}"
            )
        data: RecallData | TextData
        if "recall" in content:
            data = _made(RecallData, "recall", content["recall"])
            vocab_size = data.task().vocab_size
        else:
            data = _made(TextData, "text", content["text"])
            vocab_size = data.vocab_size or 256
        model = {
            **content.get("model", {}),
            **content.get("arms", {}).get(attn, {}),
            "attn": attn,
            "vocab_size": vocab_size,
        }
        return cls(
            _made(ModelConfig, "model", model),
            _made(TrainingConfig, "training", {**content.get("training", {}), **training}),
            data,
        )

    @classmethod
    def load(cls, path: Path, attn: str = "stickbreaking", **training: Any) -> Experiment:
        """From a TOML file; see `from_mapping`."""
        with path.open("rb") as file:
            try:
                content = tomllib.load(file)
            except tomllib.TOMLDecodeError as error:
                raise InvalidInputError(f"{path}: expected TOML, got {error}") from error
        return cls.from_mapping(content, attn, **training)

    def smoke(self) -> Experiment:
        """The same experiment in two steps on a tiny model: every line of its way, no result."""
        data = self.data
        if isinstance(data, RecallData):
            data = dataclasses.replace(data, lengths=(64, 128), sequences=2)
        else:
            data = dataclasses.replace(data, **TINY["evaluation"])
        window = None if self.model.window is None else 32
        grouped = None if self.model.num_kv_heads is None else 1
        return Experiment(
            dataclasses.replace(
                self.model, **TINY["model"], head_dim=None, window=window, num_kv_heads=grouped
            ),
            dataclasses.replace(self.training, **TINY["training"]),
            data,
        )

    def parameters(self) -> int:
        """How many numbers the model learns, counted without allocating them."""
        with torch.device("meta"):
            return CausalLM(self.model).num_parameters()


def _made(kind: Callable[..., _T], name: str, content: Mapping[str, Any]) -> _T:
    fields = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]  # a dataclass
    unknown = sorted(set(content) - fields)
    if unknown:
        raise InvalidInputError(f"{name}: expected fields out of {sorted(fields)}, got {unknown}")
    # TOML and JSON have lists where these classes have tuples.
    return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in content.items()})


def run(
    experiment: Experiment,
    *,
    checkpoint: Path | None = None,
    on_step: Callable[[StepDone], None] | None = None,
) -> dict[str, Any]:
    """Train and measure. The same experiment gives the same numbers on the same machine.

    Args:
        experiment: what to run.
        checkpoint: as in `sbattn.training.train`.
        on_step: as there.

    Returns:
        JSON values: ``attn``, ``seed``, ``parameters``, ``data``, ``loss`` (mean over the last
        tenth of the steps); for recall ``recall``, a list of ``length``, ``accuracy``, ``loss`` and
        ``questions``; for text ``by_position``, the loss per block of positions, and ``block``;
        and, where the model is stick-breaking and learns text, ``live``: by tile size ("64", "8")
        the live-tile fractions ``before`` and ``after`` training, one list of heads per layer, on
        two held-out contexts of the test length. Errors are those of `train` and of the data.
    """
    config = experiment.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = CausalLM(experiment.model).to(config.device)

    def learn(task: Task) -> dict[str, Any]:
        losses = train(model, task, config, checkpoint=checkpoint, on_step=on_step)
        tail = losses[-max(1, len(losses) // 10) :]
        return {
            "attn": experiment.model.attn,
            "seed": config.seed,
            "parameters": model.num_parameters(),
            "data": task.label,
            "loss": sum(tail) / len(tail),
        }

    if isinstance(experiment.data, RecallData):
        return _run_recall(model, experiment.data, learn)
    return _run_text(model, experiment.data, learn, config)


_Learn = Callable[[Task], dict[str, Any]]


def _run_recall(model: CausalLM, data: RecallData, learn: _Learn) -> dict[str, Any]:
    task = data.task()
    found = learn(task)
    measured = evaluate_recall(model, task, data.lengths, sequences=data.sequences)
    return found | {"recall": [{"length": n, **r._asdict()} for n, r in measured.items()]}


def _run_text(
    model: CausalLM, data: TextData, learn: _Learn, config: TrainingConfig
) -> dict[str, Any]:
    corpus = data.corpus()
    # Made before training, so that a text that is too short is refused at once.
    stretches = list(
        staggered_windows(corpus.held_out, data.length, data.block, data.blocks, data.stretches)
    )
    contexts = torch.stack([windows[0, :-1] for windows in stretches[:2]]).to(config.device)

    def live() -> dict[str, Any]:
        model.eval()
        return {
            str(size): model_live_fractions(model, contexts, tile=(size, size)).tolist()
            for size in _TILES
        }

    watched = model.config.attn == "stickbreaking"
    before = live() if watched else {}
    found = learn(corpus.train)
    found["block"] = data.block
    found["by_position"] = loss_by_position(model, stretches, data.block, dtype=config.dtype)
    if watched:
        after = live()
        found["live"] = {size: {"before": before[size], "after": after[size]} for size in after}
    return found
