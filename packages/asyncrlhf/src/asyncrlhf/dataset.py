"""Prompts of a data set as token ids, checked before the first round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncrlhf.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IDS = "prompt_ids"


@dataclass(frozen=True)
class Prompts:
    """Prompts with the columns that reward functions get.

    Attributes:
        ids: token ids of every row.
        prompts: as the rows have them: texts or lists of messages.
        columns: the other columns, by name.
    """

    ids: tuple[tuple[int, ...], ...]
    prompts: tuple[Any, ...]
    columns: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(
        cls,
        dataset: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        max_prompt_length: int | None,
        max_new_tokens: int,
        positions: int | None,
        vocab_size: int | None = None,
    ) -> Prompts:
        """Encode the column ``prompt``, or take the token ids of ``prompt_ids``.

        Args:
            dataset: a ``datasets.Dataset`` or a list of rows (mappings).
            tokenizer: with a chat template where prompts are messages.
            name: of the argument, for messages.
            max_prompt_length: longer prompts are refused; None: what the model allows.
            max_new_tokens: of a completion.
            positions: of the model, prompt and completion together; None when it does not say.
            vocab_size: token ids that the model has; None leaves them unchecked.

        Raises:
            InvalidInputError: no rows, no prompt, an empty or too long one, or one with a token
                that the model does not have; with the row.
        """
        rows = [dict(row) for row in dataset]
        if not rows:
            raise InvalidInputError(f"{name}: expected at least one row, got none")
        missing = [i for i, row in enumerate(rows) if "prompt" not in row and _IDS not in row]
        if missing:
            raise InvalidInputError(
                f"{name}: row {missing[0]} has neither 'prompt' nor '{_IDS}', but "
                f"{sorted(rows[missing[0]])}; rename the column of the prompts"
            )
        limit = None if positions is None else positions - max_new_tokens
        if max_prompt_length is not None:
            limit = max_prompt_length if limit is None else min(limit, max_prompt_length)
        encoded = []
        for number, row in enumerate(rows):
            ids = tuple(int(token) for token in _encoded(row, tokenizer))
            if not ids:
                raise InvalidInputError(f"{name}: the prompt of row {number} is empty")
            if limit is not None and len(ids) > limit:
                raise InvalidInputError(
                    f"{name}: the prompt of row {number} has {len(ids)} tokens; at most {limit} "
                    f"leave room for max_completion_length={max_new_tokens}; filter the data, or "
                    "lower max_completion_length"
                )
            wrong = [i for i in ids if i < 0 or (vocab_size is not None and i >= vocab_size)]
            if wrong:
                raise InvalidInputError(
                    f"{name}: the prompt of row {number} has the token {wrong[0]}, but the model "
                    f"has {vocab_size}; encode it with the model's own tokenizer"
                )
            encoded.append(ids)
        names = sorted({key for row in rows for key in row} - {"prompt", _IDS})
        return cls(
            tuple(encoded),
            tuple(
                row["prompt"] if "prompt" in row else tokenizer.decode(list(ids))
                for row, ids in zip(rows, encoded, strict=True)
            ),
            {key: [row.get(key) for row in rows] for key in names},
        )


def _encoded(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Sequence[int]:
    if _IDS in row:
        given: Sequence[int] = row[_IDS]
        return given
    prompt = row["prompt"]
    if isinstance(prompt, str):
        ids: Sequence[int] = tokenizer(prompt)["input_ids"]
        # A tokenizer that ends every text would end the prompt before the answer begins.
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    chat: Sequence[int] = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return chat
