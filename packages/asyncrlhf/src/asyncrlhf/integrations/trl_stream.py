"""Prompt groups as a pure function of their place in the stream: nothing to save or restore."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from asyncrlhf.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from asyncrlhf.integrations.trl_plan import Plan
    from decapod.lm import Request


class GroupStream:
    """Rows of a data set in order and over again, with tokens and seeds.

    The seed of a completion is a hash of the run's seed, the number of its group and its place in
    the group; the state of a generator plays no part.

    Args:
        dataset: rows with a ``prompt``.
        tokenizer: with a chat template where prompts are lists of messages.
        plan: counts and sampling settings.
        first: number of the first group.

    Raises:
        InvalidInputError: no rows, rows that cannot be taken by number, or no column ``prompt``.
    """

    def __init__(
        self,
        dataset: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        plan: Plan,
        first: int = 0,
    ) -> None:
        from decapod.seeding import Seeds

        if not hasattr(dataset, "__len__") or not len(dataset):
            raise InvalidInputError(
                "dataset: expected rows that can be counted and taken by number, got "
                f"{type(dataset).__name__} without any; read a stream into a Dataset first"
            )
        if "prompt" not in dataset[0]:
            raise InvalidInputError(
                f"dataset: expected a column 'prompt', got {sorted(dataset[0])}; rename it"
            )
        if first < 0:
            raise InvalidInputError(f"first_group: expected at least 0, got {first}")
        self._dataset = dataset
        self._tokenizer = tokenizer
        self._plan = plan
        self._first = first
        self._seeds = Seeds(plan.seed).child("asyncrlhf", "trl")

    def number(self, place: int) -> int:
        """Number of the group at a place; places count from the first group of this run."""
        return self._first + place

    def row(self, place: int) -> Mapping[str, Any]:
        """Row of the data set."""
        return self._dataset[self.number(place) % len(self._dataset)]

    def prompt_ids(self, place: int) -> tuple[int, ...]:
        """Tokens of the prompt."""
        prompt, tokenizer = self.row(place)["prompt"], self._tokenizer
        if isinstance(prompt, str):
            return tuple(tokenizer(prompt)["input_ids"])
        ids: Any = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=False, **self._plan.template
        )
        return tuple(ids)

    def requests(self, place: int) -> list[Request]:
        """K requests for completions of the prompt."""
        from decapod.lm import Request
        from decapod.lm.engine import request_seed

        prompt, number, count = self.prompt_ids(place), self.number(place), self._plan.per_group
        return [
            Request(
                prompt,
                self._plan.params,
                request_seed(self._seeds, number, sample),
                number * count + sample,
            )
            for sample in range(count)
        ]

    def text(self, ids: Sequence[int]) -> str:
        """A completion without its special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
