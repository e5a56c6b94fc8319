"""Extra memory of the backward: promised before anything is allocated, small, and linear."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from decapod_kernels.stickbreaking.backward import backward
from decapod_kernels.stickbreaking.backward_plan import (
    BackwardConfig,
    Sizes,
    backward_config,
    plan_backward,
)
from decapod_kernels.stickbreaking.configs import ForwardConfig, forward_config
from decapod_kernels.stickbreaking.forward import forward

HOPPER = (9, 0)


def sizes(length: int, *, q_heads: int = 12, kv_heads: int = 12, dim: int = 128) -> Sizes:
    return Sizes(
        batch=1,
        q_heads=q_heads,
        kv_heads=kv_heads,
        queries=length,
        keys=length,
        max_k=length,
        key_dim=dim,
        value_dim=dim,
        itemsize=2,
    )


def hopper_config(length: int, dim: int = 128) -> BackwardConfig:
    forward_tiles = forward_config(dim, torch.bfloat16, HOPPER, length)
    return backward_config(dim, torch.bfloat16, HOPPER, forward_tiles, processors=132)


def small_config(**changes: object) -> BackwardConfig:
    forward_tiles = ForwardConfig(block_q=32, block_k=32, superblock=64, warps=4, stages=1)
    settings: dict[str, object] = {
        "rows_block": 32,
        "keys_block": 32,
        "block_k": 32,
        "rows_warps": 4,
        "rows_stages": 1,
        "keys_warps": 4,
        "keys_stages": 1,
    }
    return BackwardConfig(forward_tiles, **(settings | changes))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(12, 12), (32, 8)])
def test_extra_memory_is_a_fifth_of_inputs_and_gradients_at_65k(
    q_heads: int, kv_heads: int, dim: int
) -> None:
    length = 65536
    call = sizes(length, q_heads=q_heads, kv_heads=kv_heads, dim=dim)

    plan = plan_backward(call, hopper_config(length, dim))

    assert plan.overhead <= 0.2
    # Written out once, so that the share is of what it says: q, d_out, dq; k, v, dk, dv; bf16.
    assert call.tensor_bytes == 2 * length * dim * (3 * q_heads + 4 * kv_heads)


@pytest.mark.parametrize("dim", [64, 128])
def test_extra_memory_is_linear_in_the_length(dim: int) -> None:
    """Of what the length multiplies, no more than a fifth is added at any length."""
    for length in (2**exponent for exponent in range(16, 23)):
        plan = plan_backward(sizes(length, dim=dim), hopper_config(length, dim))
        assert plan.overhead <= 0.2, length


def test_chunks_cover_the_call_and_fit_the_workspace() -> None:
    call = Sizes(
        batch=3, q_heads=8, kv_heads=4, queries=256, keys=256, max_k=256, key_dim=16,
        value_dim=16, itemsize=4,
    )  # fmt: skip
    unbounded = plan_backward(call, small_config(workspace=2**40))
    assert (unbounded.batch, unbounded.kv_heads, unbounded.rows) == (3, 4, 256)
    for budget in (200_000, 100_000, 50_000, 20_000):
        plan = plan_backward(call, small_config(workspace=budget))
        assert plan.workspace_bytes <= budget
        assert plan.rows % 32 == 0
        # Whole batch rows, or heads of one: never heads of several.
        assert plan.batch == 1 or plan.kv_heads == 4
    # The carried sums of a head are the least there is.
    assert plan_backward(call, small_config(workspace=1)).rows == 32


def test_rows_of_a_key_tile_are_split_where_the_device_would_be_idle() -> None:
    call = sizes(65536)
    plan = plan_backward(call, hopper_config(65536))
    programs = plan.splits * plan.tiles * plan.batch * plan.kv_heads
    assert programs >= 132
    one = plan_backward(call, small_config())
    assert one.splits == 1


class Allocations(TorchDispatchMode):
    """The bytes of every tensor that an operator made while this was on; views are none."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.storages: dict[int, int] = {}
        self.kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, torch.Tensor):
                self.kept.append(x)  # so that no address is used twice
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.storages[storage.data_ptr()] = storage.nbytes()
        return out

    @property
    def total(self) -> int:
        return sum(self.storages.values())


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.float32, {}),
        (torch.float16, {}),
        (torch.float16, {"workspace": 40_000}),
        (torch.float16, {"programs": 8}),
    ],
    ids=["float32", "float16", "chunks", "splits"],
)
def test_the_backward_allocates_what_its_plan_says(
    dtype: torch.dtype, changes: dict[str, int], device: torch.device
) -> None:
    config = small_config(**changes)
    q, k, v, d_out = (torch.randn(1, 2, 128, 16, device=device).to(dtype) for _ in range(4))
    d_log_rem = torch.randn(1, 2, 128, device=device)
    saved = forward(q, k, v, scale=0.25, save=True, config=config.forward)
    call = Sizes(
        batch=1, q_heads=2, kv_heads=2, queries=128, keys=128, max_k=128, key_dim=16,
        value_dim=16, itemsize=dtype.itemsize,
    )  # fmt: skip
    plan = plan_backward(call, config)
    with Allocations(q, k, v, d_out, d_log_rem, saved.edges, saved.stop) as made:
        grads = backward(
            q, k, v, d_out, d_log_rem, saved.edges, saved.stop, scale=0.25, config=config
        )
    gradients = sum(x.untyped_storage().nbytes() for x in grads)
    allocated = made.total - gradients
    # Of the sums over splits the plan counts one, since they live one after the other; here all
    # count: those of dk and dv, of each super-block, and of dk once more for its scale.
    repeated = plan.superblocks * plan.partial_bytes if plan.partial else 0
    assert plan.workspace_bytes <= allocated + repeated
    assert allocated <= plan.workspace_bytes + repeated
    if not plan.partial:
        assert allocated == plan.workspace_bytes
    assert saved.edges.untyped_storage().nbytes() == plan.saved_bytes
