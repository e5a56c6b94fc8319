"""What the backward needs beside inputs and gradients, and how it is kept small.

Keys are taken super-block by super-block, query rows and heads chunk by chunk, so that the edges of
tiles (8 bytes per row and tile) exist for one super-block and one chunk at a time:

    per query row of the chunk      4 bytes of F, and 4 per element of dq where it must be carried
                                    in float32 from one super-block to the next
    per row of a pass, and tile     8 bytes of edges
    per key of a super-block        dk and dv in float32, where several passes or splits add to them

All are linear in the length. So is what the forward saves, 4 bytes per row and super-block, as long
as the number of super-blocks is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from decapod_kernels.stickbreaking.configs import ForwardConfig

# Of the bytes of inputs and gradients: what all that comes on top may take. A fifth is the promise;
# the rest is left to the allocator.
_SHARE = 0.18
# Below this there is nothing to save, and large launches are faster.
_SMALL = 32 * 2**20
_MAX_SPLITS = 8


@dataclass(frozen=True)
class BackwardConfig:
    """How the backward kernels cut their work.

    Attributes:
        forward: the configuration with which `edges` and `stop` were made.
        rows_block: query rows per program of the row owner.
        keys_block: query rows per step of the key owner.
        block_k: keys per tile, of both.
        rows_warps, rows_stages: of the row owner's programs.
        keys_warps, keys_stages: of the key owner's programs.
        programs: programs per launch that fill the device; 1: never split a key tile's rows.
        workspace: bytes that may be used beside inputs and gradients (None: a fifth of those).
    """

    forward: ForwardConfig
    rows_block: int
    keys_block: int
    block_k: int
    rows_warps: int
    rows_stages: int
    keys_warps: int
    keys_stages: int
    programs: int = 1
    workspace: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows_block", "keys_block", "block_k"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two of at least 16, got {size}")
        if self.forward.superblock % self.block_k:
            raise ValueError(
                f"block_k must divide the forward's superblock, {self.forward.superblock}, "
                f"got {self.block_k}"
            )
        if self.programs < 1:
            raise ValueError(f"programs must be at least 1, got {self.programs}")


@dataclass(frozen=True)
class Sizes:
    """Of one call: `queries` and `keys` are rows per batch row; packed, the totals of one."""

    batch: int
    q_heads: int
    kv_heads: int
    queries: int
    keys: int
    max_k: int
    key_dim: int
    value_dim: int
    itemsize: int
    packed: bool = False

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.q_heads // self.kv_heads

    @property
    def tensor_bytes(self) -> int:
        """Bytes of q, k, v, d_out, dq, dk and dv."""
        q_rows = self.batch * self.queries * self.q_heads
        k_rows = self.batch * self.keys * self.kv_heads
        both = self.key_dim + self.value_dim
        return (q_rows * (self.key_dim + both) + k_rows * 2 * both) * self.itemsize


@dataclass(frozen=True)
class BackwardPlan:
    """One backward's chunks and workspaces.

    Attributes:
        batch: batch rows per chunk.
        kv_heads: key-value heads per chunk.
        rows: query rows per pass.
        splits: programs among which a key tile's row blocks are shared out.
        superblocks: of keys.
        tiles: per super-block.
        carry_dq: whether dq is summed in a float32 buffer of its own.
        partial: whether dk and dv are summed in float32 buffers of their own.
        carry_bytes, edge_bytes, partial_bytes: of the workspaces.
        saved_bytes: of the edges that the forward saved for this.
        tensor_bytes: of inputs and gradients.
    """

    batch: int
    kv_heads: int
    rows: int
    splits: int
    superblocks: int
    tiles: int
    carry_dq: bool
    partial: bool
    carry_bytes: int
    edge_bytes: int
    partial_bytes: int
    saved_bytes: int
    tensor_bytes: int

    @property
    def workspace_bytes(self) -> int:
        """Allocated by the backward beside the gradients."""
        return self.carry_bytes + self.edge_bytes + self.partial_bytes

    @property
    def overhead(self) -> float:
        """Workspaces and saved edges, as a share of inputs and gradients."""
        return (self.workspace_bytes + self.saved_bytes) / self.tensor_bytes


def plan_backward(sizes: Sizes, config: BackwardConfig) -> BackwardPlan:
    """Chunks as large as the workspace allows; then splits, if the device would not be full.

    Several batch rows per chunk, or some heads of one; only where one head is too much are its
    query rows taken in several passes (dense tensors only), and never less than one row block.
    """
    superblock = config.forward.superblock
    superblocks = -(-sizes.max_k // superblock)
    saved = 4 * superblocks * sizes.batch * sizes.q_heads * sizes.queries
    budget = config.workspace
    if budget is None:
        budget = max(int(_SHARE * sizes.tensor_bytes) - saved, _SMALL)
    align = max(config.rows_block, config.keys_block)
    units = sizes.kv_heads * (1 if sizes.packed else sizes.batch)

    def candidate(units: int, rows: int, splits: int) -> BackwardPlan:
        return _lay_out(sizes, config, superblocks, saved, units, rows, splits)

    while units > 1 and candidate(units, sizes.queries, 1).workspace_bytes > budget:
        units -= 1
    rows = sizes.queries
    tiles = candidate(units, rows, 1).tiles
    if not sizes.packed and candidate(units, rows, 1).workspace_bytes > budget:
        # Of one head only part of the rows; room is left for splits, which one head will need.
        wanted = min(_MAX_SPLITS, -(-config.programs // tiles))
        blocks = -(-rows // align)
        while blocks > 1 and candidate(1, blocks * align, wanted).workspace_bytes > budget:
            blocks -= max(1, blocks // 16)
        rows = min(blocks * align, rows)
    best = candidate(units, rows, 1)
    if sizes.packed:
        return best
    for fewer in range(units, units // 2, -1):
        programs = tiles * fewer
        splits = min(_MAX_SPLITS, -(-config.programs // programs), -(-rows // config.keys_block))
        if splits <= 1:
            break
        split = candidate(fewer, rows, splits)
        if split.workspace_bytes <= budget:
            return split
    return best


def _lay_out(
    sizes: Sizes,
    config: BackwardConfig,
    superblocks: int,
    saved: int,
    units: int,
    rows: int,
    splits: int,
) -> BackwardPlan:
    """The plan with at most `units` key-value heads per chunk, counted over its batch rows."""
    batch = 1 if sizes.packed else max(1, units // sizes.kv_heads)
    # Chunks of about one size, rather than full ones and a rest.
    batch = _even(1 if sizes.packed else sizes.batch, batch)
    kv_heads = _even(sizes.kv_heads, min(units, sizes.kv_heads))
    heads = batch * kv_heads * sizes.group
    tiles = -(-min(config.forward.superblock, sizes.max_k) // config.block_k)
    carry_dq = superblocks > 1 and sizes.itemsize < 4
    partial = splits > 1 or rows < sizes.queries
    partial_bytes = 0
    if partial:
        keys = batch * kv_heads * tiles * config.block_k
        partial_bytes = 4 * keys * splits * (sizes.key_dim + sizes.value_dim)
        # Their sum over the splits, one after the other.
        partial_bytes += 4 * keys * max(sizes.key_dim, sizes.value_dim)
    return BackwardPlan(
        batch=batch,
        kv_heads=kv_heads,
        rows=rows,
        splits=splits,
        superblocks=superblocks,
        tiles=tiles,
        carry_dq=carry_dq,
        partial=partial,
        carry_bytes=4 * heads * sizes.queries * (1 + carry_dq * sizes.key_dim),
        edge_bytes=8 * heads * rows * tiles,
        partial_bytes=partial_bytes,
        saved_bytes=saved,
        tensor_bytes=sizes.tensor_bytes,
    )


def _even(total: int, most: int) -> int:
    """The smallest chunk size that needs as few chunks as `most` does."""
    chunks = -(-total // most)
    return -(-total // chunks)


def backward_config(
    head_dim: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    forward: ForwardConfig,
    *,
    processors: int = 1,
) -> BackwardConfig:
    """The backward kernels' tiles.

    Args:
        head_dim: the larger of the keys' and the values' head size.
        dtype: of the inputs.
        capability: the device's compute capability, or None for the interpreter.
        forward: the configuration of the forward.
        processors: multiprocessors of the device.
    """
    if capability is None:
        return BackwardConfig(
            forward,
            rows_block=min(32, forward.block_q),
            keys_block=min(32, forward.block_q),
            block_k=min(32, forward.block_k),
            rows_warps=4,
            rows_stages=1,
            keys_warps=4,
            keys_stages=1,
        )
    # Rows, warps, stages: NOTES.md has what was weighed. Tensor cores want 16 rows per warp, or
    # warps compute the same twice: only capability 8.0 at 256 has less, for want of registers.
    if dtype == torch.float32:
        rows = keys = (16, 4 if head_dim <= 64 else 8, 1)
        block_k = 16
    elif capability >= (9, 0):
        rows = (128, 8, 2 if head_dim <= 128 else 1)
        keys = (128, 8, 2 if head_dim <= 64 else 1)
        block_k = 64 if head_dim <= 128 else 32
    else:
        block_k = 32
        if head_dim > 128:
            rows = keys = (32, 8, 1)
        else:
            rows = (128, 8, 2)
            keys = (128, 8, 1) if head_dim <= 64 else (64, 4, 2)
    return BackwardConfig(
        forward,
        rows_block=rows[0],
        keys_block=keys[0],
        block_k=block_k,
        rows_warps=rows[1],
        rows_stages=rows[2],
        keys_warps=keys[1],
        keys_stages=keys[2],
        programs=2 * processors,
    )
