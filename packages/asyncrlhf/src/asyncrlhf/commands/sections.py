"""The sections of a recipe that this library has no other class for: model, task, timing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.settings import at_least, positive

TINY: Final = "tiny"


@dataclass(frozen=True)
class Model:
    """The policy.

    Attributes:
        path: folder or name of a causal language model; ``tiny`` makes one on the spot.
        tokenizer: folder or name; None: the model's.
        reference: folder or name; None: the model as it is at the start.
        dtype: of the weights that learn.
        parameters: how many it has, for the estimates of --dry-run where it is not at hand.
        seed: of a tiny model's weights.
        width: of a tiny model.
        layers: of a tiny model.
        heads: of a tiny model.
        sft_steps: of a tiny model's fine-tuning on the task synthetic_summary.
        cache: folder that keeps fine-tuned tiny models.
    """

    path: str = TINY
    tokenizer: str | None = None
    reference: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    parameters: float | None = None
    seed: int = 0
    width: int = 48
    layers: int = 2
    heads: int = 8
    sft_steps: int = 500
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "sft_steps"):
            at_least(f"model.{name}", getattr(self, name), 1)
        if self.parameters is not None:
            positive("model.parameters", self.parameters)


@dataclass(frozen=True)
class SyntheticTask:
    """Summaries of random symbols; see :class:`asyncrlhf.tasks.SyntheticSummary`.

    Attributes:
        symbols: see there.
        length: see there.
        rule: see there.
        noise: see there.
        penalty: see there.
        train_prompts: how many prompts there are to train on.
        eval_prompts: how many to evaluate on at the end.
        proxy_pairs: pairs of samples that the reward ``proxy`` is trained on.
        seed: of all prompts and pairs.
    """

    symbols: int = 12
    length: int = 5
    rule: Literal["sort", "most_frequent"] = "sort"
    noise: float = 0.7
    penalty: float = -1.0
    train_prompts: int = 4096
    eval_prompts: int = 256
    proxy_pairs: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train_prompts", "eval_prompts", "proxy_pairs"):
            at_least(f"task.{name}", getattr(self, name), 1)


@dataclass(frozen=True)
class GSM8KTask:
    """Grade school mathematics from the reader's own files.

    Attributes:
        path: a jsonl file with ``question`` and ``answer``.
        eval_path: the same, to evaluate on at the end.
        template: the prompt; ``{prompt}`` stands for the question.
        limit: most rows of each file.
        fallback: what counts where an answer has no ``####``.
    """

    path: str
    eval_path: str | None = None
    template: str = "{prompt}"
    limit: int | None = None
    fallback: Literal["none", "last_number"] = "none"

    def __post_init__(self) -> None:
        _check_rows(self.template, self.limit)


@dataclass(frozen=True)
class JsonlTask:
    """Prompts from a jsonl file; further columns go to the reward functions.

    Attributes:
        path: a jsonl file.
        eval_path: the same, to evaluate on at the end.
        prompt_column: name of the column with the prompt, a text or messages.
        template: the prompt, where it is a text; ``{prompt}`` stands for the column.
        limit: most rows of each file; --dry-run assumes so many where the file is not at hand.
        drop_longer: rows with longer prompts, in tokens, are left out.
    """

    path: str
    eval_path: str | None = None
    prompt_column: str = "prompt"
    template: str = "{prompt}"
    limit: int | None = None
    drop_longer: int | None = None

    def __post_init__(self) -> None:
        _check_rows(self.template, self.limit)
        if self.drop_longer is not None:
            at_least("task.drop_longer", self.drop_longer, 1)


Task = SyntheticTask | GSM8KTask | JsonlTask
TASKS: Final[Mapping[str, type[Task]]] = {
    "synthetic_summary": SyntheticTask,
    "gsm8k": GSM8KTask,
    "jsonl": JsonlTask,
}


@dataclass(frozen=True)
class Timing:
    """Seconds a round of each stage, as a pilot measured them; for the prediction of --dry-run."""

    generate: float
    train: float
    score: float = 0.0
    publish: float = 0.0

    def __post_init__(self) -> None:
        for name in ("generate", "train", "score", "publish"):
            at_least(f"timing.{name}", getattr(self, name), 0)


def _check_rows(template: str, limit: int | None) -> None:
    if "{prompt}" not in template:
        raise InvalidInputError(
            f"task.template: expected a text with {{prompt}} in it, got {template!r}"
        )
    if limit is not None:
        at_least("task.limit", limit, 1)
