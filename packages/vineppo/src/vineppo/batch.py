"""Episodes of an iteration, what each token of them is worth, and rows that a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vineppo.episodes import Episode

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class EpisodeBatch:
    """The episodes of an iteration.

    Attributes:
        episodes: answers to one prompt stand together.
        scores: float64 [episodes].
        groups: int64 [episodes], equal for answers to one prompt.
        token_values: by a critic, of the state before each token of each response; None without.
    """

    episodes: Sequence[Episode]
    scores: Floats
    groups: npt.NDArray[np.int64]
    token_values: Sequence[Floats] | None = None


@dataclass(frozen=True)
class Response:
    """A response that the learner reads, with what its loss needs at each response token.

    Attributes:
        prompt_ids: not empty.
        response_ids: T tokens.
        advantages: float64 [T]; None where the loss has none.
        old_logprobs: float64 [T]; of the policy that sampled.
        ref_logprobs: float64 [T]; of the reference.
        old_values: float64 [T]; of the critic before the update.
        returns: float64 [T]; what the critic learns.
        chosen: whether it is the better one of a pair.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    advantages: Floats | None = None
    old_logprobs: Floats | None = None
    ref_logprobs: Floats | None = None
    old_values: Floats | None = None
    returns: Floats | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Rows:
    """Sequences as tensors; all of (B, L - 1) but the ids, aligned as `PolicyWithCritic` says.

    Attributes:
        input_ids: (B, L), padded on the right.
        attention_mask: (B, L).
        mask: 1 where a response token is chosen.
        per_token: by the names of :class:`Response`; zero elsewhere.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    per_token: dict[str, Tensor]

    def to(self, device: torch.device | str) -> Rows:
        """On another device."""
        return Rows(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.mask.to(device),
            {name: value.to(device) for name, value in self.per_token.items()},
        )


_PER_TOKEN = ("advantages", "old_logprobs", "ref_logprobs", "old_values", "returns")


def collate(sequences: Sequence[Response], pad_id: int, dtype: torch.dtype = torch.float32) -> Rows:
    """Pad on the right.

    Args:
        sequences: at least one.
        pad_id: any token of the model; nothing reads it.
        dtype: of what stands at each token.
    """
    lengths = [len(s.prompt_ids) + len(s.response_ids) for s in sequences]
    width = max(lengths)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    attention = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width - 1, dtype=torch.bool)
    found = {
        name: torch.zeros(len(sequences), width - 1, dtype=dtype)
        for name in _PER_TOKEN
        if getattr(sequences[0], name) is not None
    }
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        ids[row, :length] = torch.tensor(sequence.prompt_ids + sequence.response_ids)
        attention[row, :length] = 1
        at = slice(len(sequence.prompt_ids) - 1, length - 1)
        mask[row, at] = True
        for name, tensor in found.items():
            tensor[row, at] = torch.from_numpy(np.asarray(getattr(sequence, name))).to(dtype)
    return Rows(ids, attention, mask, found)


def at_tokens(values: Tensor, mask: Tensor) -> list[Floats]:
    """The entries at response tokens of each row, float64 [T]."""
    return [
        row[kept].double().cpu().numpy() for row, kept in zip(values.detach(), mask, strict=True)
    ]
