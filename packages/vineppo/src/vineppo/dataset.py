"""Prompts as token ids, with the columns that reward functions read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vineppo.errors import InvalidInputError

Row = Mapping[str, Any]


class Prompts:
    """Rows of a dataset, each with the ids of its prompt.

    Args:
        name: of the argument, for errors.
        rows: with ``prompt``, a text or messages, or ``prompt_ids``; other columns are kept. A
            list, or a dataset of the package ``datasets``.
        tokenizer: encodes prompts; answers are never encoded.
        max_length: most tokens of prompt and answer together; None does not check.
        max_response_tokens: most tokens of an answer.

    Raises:
        InvalidInputError: no row, a row without a prompt, one that is too long; nothing has been
            generated then.
    """

    def __init__(
        self,
        name: str,
        rows: Iterable[Row] | None,
        tokenizer: Any,
        max_length: int | None,
        max_response_tokens: int,
    ) -> None:
        if rows is None or isinstance(rows, str | Mapping):
            raise InvalidInputError(
                f"{name}: expected rows with a column prompt or prompt_ids, got "
                f"{type(rows).__name__}"
            )
        self.rows: list[Row] = list(rows)
        if not self.rows:
            raise InvalidInputError(f"{name}: expected at least one row, got none")
        self.ids: list[tuple[int, ...]] = []
        for index, row in enumerate(self.rows):
            ids = _encoded(name, index, row, tokenizer)
            if max_length is not None and len(ids) + max_response_tokens > max_length:
                raise InvalidInputError(
                    f"{name}[{index}]: its prompt of {len(ids)} tokens and max_response_tokens="
                    f"{max_response_tokens} are more than the {max_length} positions of the "
                    "model; shorten the prompt or lower max_response_tokens"
                )
            self.ids.append(ids)
        self.texts: list[Any] = [
            row["prompt"] if "prompt" in row else tokenizer.decode(ids, skip_special_tokens=True)
            for row, ids in zip(self.rows, self.ids, strict=True)
        ]
        columns = [set(row) for row in self.rows]
        if any(found != columns[0] for found in columns):
            odd = next(i for i, found in enumerate(columns) if found != columns[0])
            raise InvalidInputError(
                f"{name}[{odd}]: expected the columns {sorted(columns[0])} of the first row, got "
                f"{sorted(columns[odd])}"
            )
        self.columns = sorted(columns[0] - {"prompt", "prompt_ids"})

    def __len__(self) -> int:
        return len(self.rows)

    def is_conversation(self, row: int) -> bool:
        """Whether the prompt is messages, so that a completion is one, too."""
        return not isinstance(self.texts[row], str)


def _encoded(name: str, index: int, row: Row, tokenizer: Any) -> tuple[int, ...]:
    if not isinstance(row, Mapping):
        raise InvalidInputError(
            f"{name}[{index}]: expected a row with columns by name, got {type(row).__name__}"
        )
    if "prompt_ids" in row:
        ids: Sequence[int] = row["prompt_ids"]
    elif isinstance(row.get("prompt"), str):
        ids = tokenizer(row["prompt"])["input_ids"]
    elif isinstance(row.get("prompt"), Sequence) and row["prompt"]:
        ids = tokenizer.apply_chat_template(
            list(row["prompt"]), add_generation_prompt=True, return_dict=True
        )["input_ids"]
    else:
        raise InvalidInputError(
            f"{name}[{index}]: expected a text or messages as prompt, or prompt_ids, got the "
            f"columns {sorted(row)}"
        )
    if not len(ids):
        raise InvalidInputError(
            f"{name}[{index}]: expected a prompt of at least one token, got none; begin it with "
            "the BOS token"
        )
    return tuple(int(i) for i in ids)
