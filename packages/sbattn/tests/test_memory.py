"""Memory of the chunked path, counted allocation by allocation."""

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sbattn.chunked import chunked_backward, chunked_forward
from sbattn.naive import naive_attention
from sbattn.visibility import Visibility


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators return, for as long as they live."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves(args) if torch.is_tensor(x)}
        for x in tree_leaves(found):
            if torch.is_tensor(x):
                self._count(x.untyped_storage(), given)
        return found

    def _count(self, storage, given):
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self._known.discard(key)
        self.now -= size


def inputs(length):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(1, 1, length, 16, generator=gen) for _ in range(4)]


def chunked_peak(length, log2_tol):
    q, k, v, d_out = inputs(length)
    rest = {"scale": 0.25, "visibility": Visibility(0), "log2_tol": log2_tol}
    with LiveBytes() as live:
        _, log_rem, edges, stop = chunked_forward(q, k, v, **rest, save=True)
        chunked_backward(d_out, torch.ones_like(log_rem), q, k, v, edges, stop, **rest)
    return live.peak


def naive_peak(length):
    q, k, v, d_out = inputs(length)
    with LiveBytes() as live:
        q.requires_grad_()
        out, _ = naive_attention(q, k, v, scale=0.25, visibility=Visibility(0))
        out.backward(d_out)
    return live.peak


@pytest.mark.parametrize("log2_tol", [-24.0, -math.inf], ids=["skipping", "not skipping"])
def test_memory_of_forward_and_backward_grows_linearly_with_length(log2_tol):
    short, middle, long = (chunked_peak(n, log2_tol) for n in (2048, 4096, 8192))
    # Differences, so that what does not depend on the length drops out.
    assert 0 < long - middle < 2.2 * (middle - short)
    # q, k, v, the gradient, and their results are 7 · 16 floats for each position.
    assert long - middle < 3 * 4096 * 4 * (7 * 16)


def test_the_count_sees_that_the_definition_is_quadratic():
    short, middle, long = (naive_peak(n) for n in (128, 256, 512))
    assert long - middle > 3.5 * (middle - short)
