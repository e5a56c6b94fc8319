"""The attention backend itself; imported by vLLM, through :mod:`sbattn.integrations.vllm`.

A step of vLLM holds requests of any length, those with one new token first. These are decoded from
the paged cache, nearest page first. The others (whole prompts, or chunks of them after a cached
prefix) attend as packed sequences over their keys, gathered from the cache where there is a past.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from sbattn.decode import stickbreaking_decode
from sbattn.errors import InvalidInputError, UnsupportedError
from sbattn.functional import stickbreaking_attention_varlen
from sbattn.integrations.rotary import applies_rotary

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

_PLAIN_CACHES = ("auto", "float16", "bfloat16", "float32")


class StickBreakingBackend(AttentionBackend):
    """Stick-breaking attention over vLLM's paged cache, for decoders."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        """The name under which vLLM knows it."""
        return "CUSTOM"

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Any size up to 256."""
        return 1 <= head_size <= 256

    @staticmethod
    def get_impl_cls() -> type[StickBreakingImpl]:
        """The layer's part."""
        return StickBreakingImpl

    @staticmethod
    def get_builder_cls() -> type[StickBreakingMetadataBuilder]:
        """The part that looks at a step's requests, once for all layers."""
        return StickBreakingMetadataBuilder


@dataclass(frozen=True)
class Prefills:
    """The requests of a step with more than one new token.

    Attributes:
        offsets_q: `[requests + 1]` int32, where each one's queries start among these requests'.
        offsets_k: `[requests + 1]` int32, the same of keys, the past included.
        longest_q: most queries of a request.
        longest_k: most keys of a request.
        pages: `[keys]`, the page of the cache in which each key is; None where no request has a
            past, so that the step's own keys are all there are.
        slots: `[keys]`, its place in the page.
    """

    offsets_q: Tensor
    offsets_k: Tensor
    longest_q: int
    longest_k: int
    pages: Tensor | None
    slots: Tensor | None


@dataclass(frozen=True)
class StepMetadata:
    """What a step's layers need to know.

    Attributes:
        tokens: number of tokens, padding excluded.
        decodes: how many of them, at the front, are a request's only new token.
        lengths: `[requests]` int32, tokens of each request with the new ones.
        block_table: `[requests, pages]` int32.
        prefills: the other requests, if any.
    """

    tokens: int
    decodes: int
    lengths: Tensor
    block_table: Tensor
    prefills: Prefills | None


class StickBreakingMetadataBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Sorts a step's requests into decodes and prefills."""

    # Requests with one new token come first.
    reorder_batch_threshold: int | None = 1

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.page_size: int = kv_cache_spec.block_size

    def build(
        self,
        common_prefix_len: int,  # noqa: ARG002, vLLM passes it by name
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,  # noqa: ARG002, the same
    ) -> StepMetadata:
        """The metadata of one step."""
        step = common_attn_metadata
        if step.causal is not True:
            raise UnsupportedError("vLLM asks for attention that is not causal; not supported")
        decode_requests, requests, decodes, _ = split_decodes_and_prefills(step)
        return StepMetadata(
            tokens=step.num_actual_tokens,
            decodes=decodes,
            lengths=step.seq_lens,
            block_table=step.block_table_tensor,
            prefills=self._prefills(step, decode_requests) if requests else None,
        )

    def _prefills(self, step: CommonAttentionMetadata, first: int) -> Prefills:
        starts = step.query_start_loc_cpu[first : step.num_reqs + 1]
        queries = starts.diff()
        keys = step.seq_lens_cpu_upper_bound[first : step.num_reqs]  # exact for prefills
        pages = slots = None
        if not torch.equal(queries, keys):
            table = step.block_table_tensor[first : step.num_reqs]
            rows = torch.repeat_interleave(torch.arange(len(keys)), keys)
            positions = torch.cat([torch.arange(n) for n in keys.tolist()])
            where = (rows.to(table.device), (positions // self.page_size).to(table.device))
            pages = table[where].long()
            slots = (positions % self.page_size).to(table.device)
        return Prefills(
            offsets_q=(starts - starts[0]).int().to(self.device),
            offsets_k=torch.nn.functional.pad(keys.cumsum(0), (1, 0)).int().to(self.device),
            longest_q=int(queries.max()),
            longest_k=int(keys.max()),
            pages=pages,
            slots=slots,
        )


class StickBreakingImpl(AttentionImpl[StepMetadata]):
    """One layer's attention.

    Raises:
        UnsupportedError: the layer wants what stick breaking does not have; named in the message.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        refused = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            f"a KV cache of {kv_cache_dtype}": kv_cache_dtype not in _PLAIN_CACHES,
            "a cap on logits": bool(logits_soft_cap),
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            "a cache shared between layers": kv_sharing_target_layer_name is not None,
            **{name: value is not None for name, value in others.items()},
        }
        for what, wanted in refused.items():
            if wanted:
                raise UnsupportedError(
                    f"stick-breaking attention in vLLM: the model asks for {what}, which is not "
                    "supported; serve it with transformers, or with another attention"
                )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.attend_current, self.remainder = _settings_of_weights()

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,  # noqa: ARG002, part of vLLM's interface
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Write new keys and values to their places in the cache.

        Padding has the place -1, for which page 0 serves: vLLM gives it to no request.
        """
        keys, values = self._pages(kv_cache)
        places = slot_mapping.long().clamp(min=0)
        pages, slots = places // keys.shape[1], places % keys.shape[1]
        keys[pages, slots] = key[: len(places)].to(keys.dtype)
        values[pages, slots] = value[: len(places)].to(values.dtype)

    def forward(
        self,
        layer: Any,  # noqa: ARG002, part of vLLM's interface
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: StepMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend for `query` `[tokens, heads, head_size]`; fills and returns `output`."""
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("quantised attention output is not supported")
        if attn_metadata is None:  # vLLM's profiling run
            return output.zero_()
        step, n = attn_metadata, attn_metadata.decodes
        keys, values = self._pages(kv_cache)
        out = output.view(-1, self.num_heads, self.head_size)
        if n:
            decoded, log_rem = stickbreaking_decode(
                query[:n, None],
                keys,
                values,
                cache_seqlens=step.lengths[:n],
                block_table=step.block_table[:n],
                scale=self.scale,
                attend_current=self.attend_current,
            )
            out[:n] = self._with_rest(decoded[:, 0], log_rem[:, 0].exp(), value[:n])
        if step.prefills is not None:
            prefill = slice(n, step.tokens)
            out[prefill] = self._prefill(
                query[prefill], key[prefill], value[prefill], keys, values, step.prefills
            )
        return output

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, step: Prefills
    ) -> Tensor:
        own = v
        if step.pages is not None:
            k, v = keys[step.pages, step.slots], values[step.pages, step.slots]
        out, rem = stickbreaking_attention_varlen(
            q,
            k,
            v,
            step.offsets_q,
            step.offsets_k,
            step.longest_q,
            step.longest_k,
            scale=self.scale,
            attend_current=self.attend_current,
        )
        return self._with_rest(out, rem, own)

    def _with_rest(self, out: Tensor, rem: Tensor, own: Tensor) -> Tensor:
        if self.remainder == "none":
            return out
        own = own.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        return torch.addcmul(out.to(rem.dtype), rem[..., None], own.to(rem.dtype)).to(out.dtype)

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[pages, page size, key heads, head_size]`, views of vLLM's cache."""
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return keys, values


def _settings_of_weights() -> tuple[bool, str]:
    """`attend_current` and `remainder` as `convert` wrote them into the model's configuration."""
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None or vllm_config.model_config is None:
        return False, "none"
    config = vllm_config.model_config.hf_config
    if applies_rotary(config):
        warnings.warn(
            f"this {config.model_type} model applies rotary position embedding under "
            "stick-breaking attention, which was made to do without; switch it off with "
            "sbattn.integrations.transformers.without_rotary",
            UserWarning,
            stacklevel=2,
        )
    written = getattr(config, "stickbreaking", None) or {}
    attend_current = written.get("attend_current", False)
    remainder = written.get("remainder", "none")
    if remainder not in ("none", "value"):
        raise InvalidInputError(
            f'config.stickbreaking: expected remainder "none" or "value", got {remainder!r}'
        )
    return attend_current, remainder
