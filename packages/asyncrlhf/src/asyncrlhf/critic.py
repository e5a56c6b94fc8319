"""The critic of PPO: a value for every token of a completion."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from asyncrlhf.errors import InvalidInputError

if TYPE_CHECKING:
    from asyncrlhf.sequences import Batch


class Critic(nn.Module):
    """A transformer with one number per position.

    The value at a token of the completion is read at the position *before* it: it says what the
    state is worth in which that token was drawn.

    Args:
        backbone: a transformers model whose output has ``last_hidden_state``.
        hidden_size: width of that state.
    """

    def __init__(self, backbone: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_policy(cls, model: Any) -> Critic:
        """A critic on a copy of the policy's backbone; its values start at 0.

        Raises:
            InvalidInputError: the policy's backbone cannot be told from its head.
        """
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        backbone = getattr(inner, inner.base_model_prefix, None)
        if backbone is None or backbone is inner:
            raise InvalidInputError(
                f"model: {type(inner).__name__} has no backbone apart from its head; pass "
                "value_model=Critic(backbone, hidden_size)"
            )
        copied = copy.deepcopy(backbone).requires_grad_(requires_grad=True)
        critic = cls(copied, inner.config.get_text_config(decoder=True).hidden_size)
        first = next(copied.parameters())
        critic.to(first.device)
        return critic

    def forward(self, batch: Batch) -> Tensor:
        """(n, L) float32 values, 0 outside the mask of completions."""
        width = batch.completion_mask.shape[1]
        states = self.backbone(
            input_ids=batch.input_ids[:, :-1],
            attention_mask=batch.attention_mask[:, :-1],
            position_ids=batch.position_ids[:, :-1],
            use_cache=False,
        ).last_hidden_state[:, -width:]
        values = self.head(states.to(self.head.weight.dtype))[..., 0].float()
        return torch.where(batch.completion_mask, values, 0.0)
