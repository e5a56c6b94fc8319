"""Queries, keys and values as a trained language model makes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sbattn.attention import StickBreakingAttention
from sbattn.model import CausalLM, ModelConfig
from sbattn.positions import token_positions
from sbattn.tasks import stdlib_corpus
from sbattn.training import TrainingConfig, lines, train


@dataclass(frozen=True)
class Trained:
    """What one layer's attention is given.

    Attributes:
        layer: counted from 0.
        inputs: `q, k, v` and a random gradient of the output, `[B, H, L, D]`.
    """

    layer: int
    inputs: tuple[Tensor, Tensor, Tensor, Tensor]


def trained_layers(
    *,
    heads: int,
    head_dim: int,
    batch: int,
    length: int,
    steps: int,
    trained_length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Trained]:
    """Train a byte-level model on Python's standard library, and read held-out text with it.

    Args:
        heads, head_dim: of its four layers.
        batch, length: of the text that it reads afterwards.
        steps: of training, on 16 texts each.
        trained_length: bytes per text in training.
        dtype: of the inputs that are returned, and of the activations in training on a GPU.
        device: where all of this happens.
    """
    config = ModelConfig(
        vocab_size=256,
        hidden_size=heads * head_dim,
        num_layers=4,
        num_heads=heads,
        remainder="bias",
        head_norm=True,
    )
    torch.manual_seed(0)
    model = CausalLM(config)
    corpus = stdlib_corpus(20_000_000)
    on_gpu = device.type == "cuda"
    plan = TrainingConfig(
        steps=steps,
        batch_size=16 if on_gpu else 1,
        length=trained_length,
        learning_rate=1e-3,
        dtype="bfloat16" if on_gpu else "float32",
        device=device.type,
    )
    train(model, corpus.train, plan, on_step=lines())
    unseen = np.concatenate(corpus.held_out)[: batch * length].astype(np.int64)
    tokens = torch.from_numpy(unseen).view(batch, length).to(device)
    generator = torch.Generator().manual_seed(0)
    layers = [m for m in model.modules() if isinstance(m, StickBreakingAttention)]
    seen: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for m in layers]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    for index, (layer, x) in enumerate(zip(layers, seen, strict=True)):
        with torch.no_grad():
            q, k, v = layer.heads(x, token_positions(length, device))
        d_out = torch.randn(q.shape, generator=generator).to(device)
        q, k, v, d_out = (part.to(dtype).contiguous() for part in (q, k, v, d_out))
        yield Trained(index, (q, k, v, d_out))
