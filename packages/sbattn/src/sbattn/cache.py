"""Keys and values of the tokens read so far, so that decoding reads each token once.

A cache is for inference: what it holds takes no part in gradients. All rows of a batch grow
together. Prompts of different lengths are therefore padded on the left; `KeyValueCache.starts`
remembers where each row begins, and every later step hides what stands before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sbattn.checks import check_padding
from sbattn.errors import InvalidInputError, UnsupportedError
from sbattn.positions import valid_keys


class LayerCache:
    """One layer's tensors over time, in buffers of `max_length` tokens.

    What is kept is the layer's business (keys and values; forgetting attention adds its gates):
    any tensors of shape `[B, heads, tokens, ...]`, always the same ones. The buffers are allocated
    at the first `append`, in the shapes, dtypes and on the device of what comes.

    Attributes:
        length: how many tokens are held.
        max_length: how many fit.
    """

    def __init__(self, max_length: int) -> None:
        if max_length < 1:
            raise InvalidInputError(f"max_length: expected at least 1, got {max_length}")
        self.max_length = max_length
        self.length = 0
        self._buffers: list[Tensor] = []

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Add tokens; views of everything held, the new tokens included, in the order given.

        Raises:
            InvalidInputError: if the tokens do not fit, or are not of the shapes held.
            UnsupportedError: if the tensors require gradients.
        """
        count = new[0].shape[2]
        end = self.length + count
        if end > self.max_length:
            raise InvalidInputError(
                f"cache: {self.length} tokens are held and {count} come, but max_length is "
                f"{self.max_length}; make the cache longer, or call reset()"
            )
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in new):
            raise UnsupportedError(
                "cache: gradients do not pass through a cache; call the model under "
                "torch.no_grad(), or without a cache"
            )
        if not self._buffers:
            self._buffers = [
                tensor.new_zeros(*tensor.shape[:2], self.max_length, *tensor.shape[3:])
                for tensor in new
            ]
        for buffer, tensor in zip(self._buffers, new, strict=True):
            expected = (*buffer.shape[:2], count, *buffer.shape[3:])
            if tuple(tensor.shape) != expected:
                raise InvalidInputError(
                    f"cache: expected a tensor of shape {expected} to append, got "
                    f"{tuple(tensor.shape)}; use one cache for one batch and one model"
                )
            buffer[:, :, self.length : end] = tensor
        self.length = end
        return tuple(buffer[:, :, :end] for buffer in self._buffers)

    def reset(self) -> None:
        """Forget all tokens; the buffers are kept and written over."""
        self.length = 0

    def reorder(self, rows: Tensor) -> None:
        """Let row `i` go on from what was row `rows[i]` (`[B]` integers): a beam search's step."""
        self._buffers = [buffer.index_select(0, rows) for buffer in self._buffers]


class KeyValueCache:
    """The caches of all layers of a model, and where each row of the batch begins.

    Attributes:
        layers: one `LayerCache` per layer.
        batch: rows of the batch.
        max_length: how many tokens fit.
        starts: `[B]` integers, the first token of each row that is not padding (None: 0).
    """

    def __init__(self, num_layers: int, batch: int, max_length: int) -> None:
        if num_layers < 1 or batch < 1:
            raise InvalidInputError(
                "num_layers, batch: expected at least one layer and one row, got "
                f"num_layers={num_layers}, batch={batch}"
            )
        self.layers = [LayerCache(max_length) for _ in range(num_layers)]
        self.batch = batch
        self.max_length = max_length
        self.starts: Tensor | None = None

    @property
    def length(self) -> int:
        """How many tokens of each row are held, padding included."""
        return self.layers[0].length

    def bounds(self, batch: int, length: int, key_padding: Tensor | None) -> Tensor | None:
        """`[start, end)` of every row, `[B, 2]`, once `length` tokens more are held.

        `key_padding`, if given, is the first tokens'; it is remembered. None: nothing is padding.

        Raises:
            InvalidInputError: if the batch is another one, or the padding comes late, on the right
                or with bounds beyond the tokens.
        """
        if batch != self.batch:
            raise InvalidInputError(
                f"cache: it is for a batch of {self.batch}, got {batch} rows; make another"
            )
        if key_padding is not None:
            if self.length:
                raise InvalidInputError(
                    "key_padding: it is given with the first tokens and remembered; the cache "
                    f"holds {self.length} already, so leave it out"
                )
            valid = valid_keys(key_padding, batch, length)
            check_padding(key_padding, length)
            if not bool((valid[:, 1:] >= valid[:, :-1]).all() and valid[:, -1].all()):
                raise InvalidInputError(
                    "key_padding: with a cache, padding must be on the left of every row, because "
                    "all rows grow at the same end"
                )
            self.starts = length - valid.sum(1)
        if self.starts is None:
            return None
        ends = torch.full_like(self.starts, self.length + length)
        return torch.stack([self.starts, ends], dim=1)

    def reset(self) -> None:
        """Forget all tokens and the padding; the buffers are kept."""
        self.starts = None
        for layer in self.layers:
            layer.reset()

    def reorder(self, rows: Tensor) -> None:
        """Let row `i` go on from what was row `rows[i]` (`[B]` integers): a beam search's step."""
        if rows.shape != (self.batch,):
            raise InvalidInputError(
                f"rows: expected {self.batch} integers, one per row, got shape {tuple(rows.shape)}"
            )
        if self.starts is not None:
            self.starts = self.starts[rows]
        for layer in self.layers:
            layer.reorder(rows)


@contextmanager
def unchanged_by_failure(cache: LayerCache | KeyValueCache | None) -> Iterator[None]:
    """If what is done here fails, hold what was held before: the call can be made again."""
    layers = cache.layers if isinstance(cache, KeyValueCache) else [cache] if cache else []
    lengths = [layer.length for layer in layers]
    starts = cache.starts if isinstance(cache, KeyValueCache) else None
    try:
        yield
    except BaseException:
        for layer, length in zip(layers, lengths, strict=True):
            layer.length = length
        if isinstance(cache, KeyValueCache):
            cache.starts = starts
        raise
