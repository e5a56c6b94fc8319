"""The tensors of one minibatch, and how they are cut out of a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.rounds import Round


@dataclass(frozen=True)
class Minibatch:
    """n completions, those of one prompt side by side; L tokens of the longest.

    Attributes:
        prompts: token ids of each completion's prompt.
        completions: token ids of each, up to and with the first end of sequence.
        mask: (n, L) bool, the tokens of the completions.
        behaviour_logps: (n, L) of the weights that generated them; 0 outside the mask.
        group_ids: (n,) int64, equal for completions of one prompt.
        scores: (n,).
        valid: (n,) bool; False where a reward failed.
        oldest_version: smallest weights' version among all tokens.
        ref_logps: (n, L) of the reference.
        proximal_logps: (n, L) of the learner when the round arrived; None where nothing uses them.
        values: (n, L) of the critic at that time; None without one.
        advantages: (n, L), whitened; None without a critic.
        returns: (n, L), targets of the critic; None without one.
        weights: importance weights, (n,) or (n, L); None without a correction.
    """

    prompts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...]
    mask: Tensor
    behaviour_logps: Tensor
    group_ids: Tensor
    scores: Tensor
    valid: Tensor
    oldest_version: int
    ref_logps: Tensor | None = None
    proximal_logps: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.completions)

    def rows(self, start: int, stop: int) -> Minibatch:
        """Completions ``start`` to ``stop``, with L the longest among them."""
        longest = max(1, max(map(len, self.completions[start:stop]), default=1))
        cut: dict[str, object] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                value = value[start:stop]
                cut[entry.name] = value[:, :longest] if value.dim() == 2 else value
            elif isinstance(value, tuple):
                cut[entry.name] = value[start:stop]
        return replace(self, **cut)  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Minibatch:
        """The same on a device."""
        moved = {
            entry.name: getattr(self, entry.name).to(device)
            for entry in fields(self)
            if isinstance(getattr(self, entry.name), Tensor)
        }
        return replace(self, **moved)


def minibatches(
    done: Round, *, count: int, samples: int, share: tuple[int, int] = (0, 1)
) -> list[Minibatch]:
    """Cut a scored round into its minibatches.

    Args:
        done: a round of count × B × samples completions.
        count: minibatches per round, N.
        samples: completions per prompt, K.
        share: (i, k) takes the i-th of k equal parts of every minibatch's prompts.

    Raises:
        InvalidInputError: the round was not scored, or its size does not divide.
    """
    if done.rewards is None:
        raise InvalidInputError(f"round {done.order.index}: expected scores, got none")
    part, parts = share
    size, rest = divmod(len(done.completions), count * samples * parts)
    if rest or not size:
        raise InvalidInputError(
            f"round {done.order.index}: {len(done.completions)} completions do not divide into "
            f"{count} minibatches of prompts with {samples} completions for {parts} processes"
        )
    per_step = len(done.completions) // count
    here = size * samples
    return [
        _minibatch(done, start, start + here, samples)
        for start in (step * per_step + part * here for step in range(count))
    ]


def _minibatch(done: Round, start: int, stop: int, samples: int) -> Minibatch:
    chosen = done.completions[start:stop]
    rewards = done.rewards
    assert rewards is not None
    scores = torch.as_tensor(rewards.scores[start:stop], dtype=torch.float32)
    valid = torch.as_tensor(rewards.valid[start:stop], dtype=torch.bool)
    return Minibatch(
        prompts=tuple(request.prompt for request in done.order.requests[start:stop]),
        completions=tuple(completion.ids for completion in chosen),
        mask=rows_to_tensor([[1.0] * len(c.ids) for c in chosen]).bool(),
        behaviour_logps=rows_to_tensor([c.logprobs for c in chosen]),
        group_ids=torch.arange(start, stop) // samples,
        scores=torch.where(valid, scores, 0.0),
        valid=valid,
        oldest_version=min(completion.oldest_version for completion in chosen),
    )


def rows_to_tensor(rows: Sequence[Sequence[float]]) -> Tensor:
    """(n, L) float32 of rows of different length, 0 behind their ends; L is at least 1."""
    longest = max(1, max(map(len, rows), default=1))
    return torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in rows])
