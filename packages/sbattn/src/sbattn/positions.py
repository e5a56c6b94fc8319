"""Where tokens stand: positions, the embeddings made from them, and which of them count."""

from __future__ import annotations

import torch
from torch import Tensor

from sbattn.errors import InvalidInputError


def token_positions(
    length: int, device: torch.device, past: int = 0, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Position of each token in its sequence, `[length]` integers.

    `past` tokens stand before the first one; or `cu_seqlens` says where packed sequences begin.
    """
    positions = torch.arange(past, past + length, device=device)
    if cu_seqlens is None:
        return positions
    return positions - sequence_starts(positions, cu_seqlens)


def sequence_starts(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Where the packed sequence of each token begins: integers `[length]` to the same shape."""
    bounds = cu_seqlens.to(tokens.dtype)
    return bounds[torch.searchsorted(bounds, tokens, right=True) - 1]


def valid_keys(key_padding: Tensor, batch: int, keys: int) -> Tensor:
    """The bool mask `[B, keys]` of `key_padding`, given as a mask or as `[B, 2]` integers."""
    if key_padding.dtype == torch.bool and tuple(key_padding.shape) == (batch, keys):
        return key_padding
    if key_padding.dtype not in (torch.int32, torch.int64) or key_padding.shape != (batch, 2):
        raise InvalidInputError(
            f"key_padding: expected [start, end) of each row, integers of shape [{batch}, 2], or "
            f"a bool mask [{batch}, {keys}]; got {key_padding.dtype} of shape "
            f"{tuple(key_padding.shape)}"
        )
    columns = torch.arange(keys, device=key_padding.device)
    return (columns >= key_padding[:, :1]) & (columns < key_padding[:, 1:])


def rotate(heads: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of `[B, H, L, D]`, `D` even.

    The pair of coordinates `(i, i + D/2)` turns by `position · theta^(-2i/D)`: products of two
    rotated vectors depend on the difference of their positions only. Computed in float32, or
    float64 if `heads` is; the angles always in float64, because positions are large.
    """
    dtype = torch.float64 if heads.dtype == torch.float64 else torch.float32
    size = heads.shape[-1]
    exponents = torch.arange(0, size, 2, dtype=torch.float64, device=heads.device) / size
    angles = positions[:, None].to(torch.float64) * theta**-exponents
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    first, second = heads.to(dtype).chunk(2, dim=-1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.cat(turned, dim=-1).to(heads.dtype)


def alibi_slopes(num_heads: int) -> list[float]:
    """How fast each head's ALiBi bias (arXiv 2108.12409) falls with distance.

    For a power of two, `n`, the slopes are `2^(-8h/n)`, `h = 1 … n`. For other counts they are
    those of the power of two below, filled up with every second one of the power above.
    """
    below = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * head / below) for head in range(1, below + 1)]
    between = [2.0 ** (-4 * head / below) for head in range(1, 2 * below, 2)]
    return slopes + between[: num_heads - below]


def alibi_bias(queries: int, keys: int, slopes: Tensor) -> Tensor:
    """`-slope · distance` of the last `queries` of `keys` tokens, `[heads, queries, keys]`."""
    columns = torch.arange(keys, device=slopes.device)
    distances = columns[keys - queries :, None] - columns
    return -slopes[:, None, None] * distances
