"""A small causal language model with the attention of your choice.

Llama-like: RMSNorm before each part, SwiGLU, no biases. Stick-breaking ("stickbreaking"), plain
softmax ("nope") and forgetting attention ("fox") have no position embedding; the other arms have
the one of their name. All arms of one configuration have the same number of parameters, except
that forgetting attention adds its gates (`hidden_size · num_heads + num_heads` per layer), and
stick-breaking adds `num_heads · head_dim` with `remainder="bias"` and twice that with `head_norm`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbattn.attention import (
    MultiHeadAttention,
    Remainder,
    StickBreakingAttention,
    check_choice,
    check_heads,
)
from sbattn.baselines import ForgettingAttention, SoftmaxAttention
from sbattn.cache import KeyValueCache, LayerCache, unchanged_by_failure
from sbattn.checks import check_options
from sbattn.errors import InvalidInputError
from sbattn.functional import Backend

Attention = Literal["stickbreaking", "rope", "alibi", "nope", "swa", "fox"]


@dataclass(frozen=True)
class ModelConfig:
    """What a `CausalLM` is made of.

    Attributes:
        vocab_size: how many tokens there are.
        hidden_size: width of the residual stream.
        num_layers: how many blocks of attention and MLP.
        num_heads: query heads.
        num_kv_heads: key and value heads (None: as many as query heads).
        head_dim: size of a head (None: `hidden_size / num_heads`).
        mlp_size: inner width of the MLP (None: `8/3 · hidden_size`, rounded up to a multiple of 8).
        attn: the attention: "stickbreaking"; softmax with rotary embeddings ("rope"), with ALiBi
            ("alibi"), with neither ("nope"), or rotary in a sliding window ("swa"); or forgetting
            attention ("fox").
        remainder: stick-breaking only: where the rest of the stick goes; "none", "value", "bias".
        head_norm: stick-breaking only: whether each head's output is normalised.
        attend_current: stick-breaking only: whether a token sees its own key.
        rope_theta: base of rotary embeddings.
        add_rope: stick-breaking only: rotary embeddings on top, for ablation.
        window: how many positions back a token sees; needed for "swa" (in which its own position
            is one of them), possible for "stickbreaking".
        tie_embeddings: whether the output matrix is the embedding matrix.
        norm_eps: added to the mean square in RMSNorm.
        skip_tol: stick-breaking only: see `stickbreaking_attention`.
        backend: stick-breaking only: see `stickbreaking_attention`.

    Raises:
        InvalidInputError: if the fields do not fit together.
    """

    vocab_size: int
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 2
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_size: int | None = None
    attn: Attention = "stickbreaking"
    remainder: Remainder = "none"
    head_norm: bool = False
    attend_current: bool = False
    rope_theta: float = 10000.0
    add_rope: bool = False
    window: int | None = None
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    skip_tol: float | Literal["exact"] = "exact"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        check_choice("attn", self.attn, get_args(Attention))
        check_choice("remainder", self.remainder, get_args(Remainder))
        check_choice("backend", self.backend, get_args(Backend))
        check_options(None, self.window, self.skip_tol)
        check_heads(
            self.hidden_size,
            self.num_heads,
            self.num_heads if self.num_kv_heads is None else self.num_kv_heads,
            self.head_dim,
            rotary=self.attn in ("rope", "swa") or self.add_rope,
        )
        for name in ("vocab_size", "num_layers", "mlp_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise InvalidInputError(f"{name}: expected at least 1, got {size}")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidInputError(
                    f"{name}: expected a positive number, got {getattr(self, name)}"
                )
        if self.attn == "swa" and self.window is None:
            raise InvalidInputError('window: attn="swa" needs one, in positions; got None')
        if self.window is not None and self.attn not in ("swa", "stickbreaking"):
            raise InvalidInputError(
                f'window: only attn="swa" and attn="stickbreaking" have one, got '
                f"window={self.window} with attn={self.attn!r}"
            )
        if self.attn != "stickbreaking":
            for name, plain in (
                ("remainder", "none"),
                ("head_norm", False),
                ("attend_current", False),
                ("add_rope", False),
            ):
                if getattr(self, name) != plain:
                    raise InvalidInputError(
                        f'{name}: only attn="stickbreaking" has it, got '
                        f"{getattr(self, name)!r} with attn={self.attn!r}; leave it out"
                    )


class CausalLM(nn.Module):
    """A decoder-only language model.

    Matrices start normal with variance `1 / (3 · inputs)`, those that write to the residual stream
    (`o_proj`, `down`) with `1 / (6 · inputs · num_layers)`, so that the stream does not grow with
    depth. Embeddings start standard normal, or with variance `1 / hidden_size` if the output
    matrix is theirs. Gains are 1 and biases 0.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        key_padding: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits of the next token after each token.

        Args:
            input_ids: `[B, L]` integers.
            cu_seqlens: int32 `[N + 1]`, the bounds of `N` sequences packed into one row (`B = 1`).
            max_seqlen: the longest packed sequence, if known.
            key_padding: which tokens count: `[B, 2]` integers, `[start, end)` of each row, or a
                bool mask `[B, L]` (True: counts) with one run of True per row. With a cache, only
                when it is empty, and padding must be on the left; it is remembered.
            cache: what came before, from `new_cache`; it grows by `input_ids`. Needs
                `torch.no_grad()`.

        Returns:
            `[B, L, vocab_size]`. What stands at padding has no meaning.

        Raises:
            InvalidInputError: if the shapes do not fit, or the cache is full or another batch's.
            UnsupportedError: for packed sequences with a cache, and gradients with a cache.
        """
        _check_ids(input_ids)
        x = self.embedding(input_ids)
        with unchanged_by_failure(cache):
            if cache is not None:
                batch, length = input_ids.shape
                key_padding = cache.bounds(batch, length, key_padding)
            for index, block in enumerate(self.blocks):
                x = block(
                    x,
                    key_padding=key_padding,
                    cu_seqlens=cu_seqlens,
                    max_seqlen=max_seqlen,
                    cache=None if cache is None else cache.layers[index],
                )
        return self.lm_head(self.norm(x))

    def new_cache(self, batch: int, max_length: int) -> KeyValueCache:
        """An empty cache for `batch` rows of at most `max_length` tokens, padding included."""
        return KeyValueCache(self.config.num_layers, batch, max_length)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        *,
        key_padding: Tensor | None = None,
    ) -> Tensor:
        """Go on from prompts.

        Args:
            input_ids: `[B, L]`, `L ≥ 1`; prompts of different lengths are padded on the left.
            max_new_tokens: how many tokens to add.
            temperature: 0 takes the likeliest token, 1 samples as the model says.
            generator: where the randomness comes from.
            key_padding: which prompt tokens count, as in `forward`.

        Returns:
            `[B, L + max_new_tokens]`: the prompts and what follows.
        """
        _check_ids(input_ids)
        batch, length = input_ids.shape
        if length < 1 or max_new_tokens < 0 or not temperature >= 0:
            raise InvalidInputError(
                "generate: expected a prompt of at least one token, max_new_tokens ≥ 0 and "
                f"temperature ≥ 0; got {length}, {max_new_tokens} and {temperature}"
            )
        cache = self.new_cache(batch, length + max_new_tokens)
        tokens, new = input_ids, input_ids
        for _ in range(max_new_tokens):
            with torch.no_grad():
                logits = self(new, key_padding=key_padding, cache=cache)[:, -1]
            key_padding = None  # the cache remembers it
            new = next_token(logits, temperature, generator)
            tokens = torch.cat([tokens, new], dim=1)
        return tokens

    def num_parameters(self) -> int:
        """How many numbers are learned."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = 1 / math.sqrt(3 * module.in_features)
                if name.endswith(("o_proj", "down")):
                    std /= math.sqrt(2 * self.config.num_layers)
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        tied = self.config.tie_embeddings
        nn.init.normal_(
            self.embedding.weight, std=1 / math.sqrt(self.config.hidden_size) if tied else 1.0
        )


class Block(nn.Module):
    """Attention, then a SwiGLU MLP, each on normalised input and added to what came."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.mlp_size or -(-config.hidden_size // 3) * 8
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = make_attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gate = nn.Linear(config.hidden_size, inner, bias=False)
        self.up = nn.Linear(config.hidden_size, inner, bias=False)
        self.down = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """`[B, L, hidden_size]` to the same shape."""
        x = x + self.attention(
            self.attention_norm(x),
            key_padding=key_padding,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            cache=cache,
        )
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def make_attention(config: ModelConfig) -> MultiHeadAttention:
    """The attention layer that a configuration names."""
    sizes = (config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim)
    if config.attn == "stickbreaking":
        return StickBreakingAttention(
            *sizes,
            remainder=config.remainder,
            head_norm=config.head_norm,
            attend_current=config.attend_current,
            window=config.window,
            skip_tol=config.skip_tol,
            backend=config.backend,
            rope_theta=config.rope_theta if config.add_rope else None,
        )
    if config.attn == "fox":
        return ForgettingAttention(*sizes)
    if config.attn == "alibi":
        return SoftmaxAttention(*sizes, position="alibi")
    if config.attn == "nope":
        return SoftmaxAttention(*sizes, position="none")
    return SoftmaxAttention(
        *sizes, position="rope", rope_theta=config.rope_theta, window=config.window
    )


def next_token(
    logits: Tensor, temperature: float, generator: torch.Generator | None = None
) -> Tensor:
    """The likeliest token, or one drawn at a temperature: `[B, V]` to `[B, 1]`."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    weights = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(weights, 1, generator=generator)


def _check_ids(input_ids: Tensor) -> None:
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise InvalidInputError(
            "input_ids: expected integers of shape [batch, length], got "
            f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
        )
