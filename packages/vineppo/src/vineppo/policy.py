"""The policy, with a critic where one is asked for, as one module with one forward pass.

All its outputs stand where the token that they speak about is *chosen*: entry (b, t) belongs to the
choice of ``input_ids[b, t + 1]`` in the state ``input_ids[b, : t + 1]``. There are the log-
probability of that token and the value of that state, so one mask serves both.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from vineppo.errors import InvalidInputError
from vineppo.logprobs import selective_logprobs

_DROPOUT = re.compile(r"(^|_)(drop|dropout|pdrop)(_|$)|dropout|pdrop")


class PolicyWithCritic(nn.Module):
    """A causal language model and, optionally, a critic.

    Args:
        policy: model of transformers, possibly with an adapter.
        critic: ``"copy"``: a full copy of the model with a scalar head, all of it trained;
            ``"shared"``: a scalar head on the policy's own last hidden states; None: no critic.
            Heads start at zero.
    """

    def __init__(self, policy: Any, critic: str | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.trunk: Any = None
        self.head: nn.Linear | None = None
        if critic is not None:
            base = _base(policy)
            config = base.config.get_text_config(decoder=True)
            if critic == "copy":
                self.trunk = copy.deepcopy(base.base_model)
                self.trunk.requires_grad_()
            parameter = next(base.parameters())
            head = nn.Linear(config.hidden_size, 1, device=parameter.device, dtype=torch.float32)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            self.head = head.to(torch.promote_types(parameter.dtype, torch.float32))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the next tokens and values of the states before them.

        Args:
            input_ids: (B, L), padded on the right.
            attention_mask: (B, L), 1 at tokens.
            temperature: logits are divided by it.

        Returns:
            Two tensors of (B, L - 1), or None in place of values without a critic.
        """
        shared = self.head is not None and self.trunk is None
        output = self.policy(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            output_hidden_states=shared,
        )
        logprobs = selective_logprobs(output.logits[:, :-1], input_ids[:, 1:], temperature)
        if self.head is None:
            return logprobs, None
        if shared:
            hidden = output.hidden_states[-1]
        else:
            hidden = self.trunk(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
        values = self.head(hidden[:, :-1].to(self.head.weight.dtype))[..., 0]
        return logprobs, values

    def critic_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that belong to the critic alone."""
        for name, parameter in self.named_parameters():
            if name.startswith(("trunk.", "head.")):
                yield name, parameter


def without_dropout(model: Any, *, gradient_checkpointing: bool) -> Any:
    """The model with every dropout off, in the mode that its training needs.

    Old and new log-probabilities of the same weights must be equal, or the first ratio of an
    iteration is not 1.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and _DROPOUT.search(name):
                setattr(module, name, 0.0)
    if gradient_checkpointing:
        # The second name is that of transformers before 5.24.
        for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
            if hasattr(model, name):
                getattr(model, name)({"use_reentrant": False})
                break
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        # transformers recomputes activations only where a module is in training mode.
        return model.train()
    return model.eval()


class Reference:
    """The frozen policy that divergence is measured from.

    Args:
        policy: as it is now.
        ref_model: None takes a copy of the policy, or the policy without its adapter.
    """

    def __init__(self, policy: Any, ref_model: Any | None) -> None:
        self._policy = policy
        self._without_adapter = ref_model is None and hasattr(policy, "disable_adapter")
        if self._without_adapter:
            return
        if ref_model is not None and ref_model in (policy, _base(policy)):
            raise InvalidInputError(
                "ref_model: expected another object than model, which is trained; pass None for a "
                "frozen copy"
            )
        self.model = copy.deepcopy(policy) if ref_model is None else ref_model
        self.model.eval().requires_grad_(requires_grad=False)

    @contextmanager
    def __call__(self) -> Iterator[PolicyWithCritic]:
        """The reference as a module with the policy's forward pass; while the context is open."""
        if not self._without_adapter:
            yield PolicyWithCritic(self.model)
            return
        with cast(Any, self._policy).disable_adapter():
            yield PolicyWithCritic(self._policy)


def _base(policy: Any) -> Any:
    """The model itself, without what PEFT puts around it."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the model's, and the tokenizer's.

    Raises:
        InvalidInputError: neither knows one, so no answer would ever end.
    """
    found: set[int] = set()
    configs = (getattr(model, "generation_config", None), model.config)
    for source in (*configs, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            found |= {ids} if isinstance(ids, int) else set(ids)
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise InvalidInputError(
            "processing_class: expected a tokenizer with an EOS token, got none; answers end with "
            "it. Set tokenizer.eos_token"
        )
    return frozenset(found)
