"""Attention over a part of the keys, and how the parts make the whole.

Over any contiguous run of keys the operator gives the pair `(out, log r)`: what was read, and the
logarithm of what was left of the stick. Two neighbouring runs compose:

    near ⊕ far = (out_near + r_near · out_far, log r_near + log r_far)

for the far run gets what the near run has left. ⊕ is associative, not commutative, and its
identity is (0, 0): nothing read, nothing spent.

**How to attend to a segment.** For the keys `[a, b)` of a longer sequence, pass `key[:, :, a:b]`,
`value[:, :, a:b]` and `kv_offset = offset - a`, where `offset` is the first query's position among
all the keys (`Lk - Lq` when the last query is the last key's token). A segment that lies wholly
before the queries is then wholly visible, one that lies after them gives the identity, and a
window keeps its meaning. Merge from the queries outwards: the nearest segment is `near`.
"""

from __future__ import annotations

from torch import Tensor

from sbattn.errors import InvalidInputError

Segment = tuple[Tensor, Tensor]


def merge_segments(near: Segment, far: Segment) -> Segment:
    """The result over two neighbouring segments of keys, from the results over each.

    Args:
        near: outputs `[..., Dv]` and log remainders `[...]` of the segment nearer to the queries,
            as `stickbreaking_attention(..., return_log_remainder=True)` gives them.
        far: the same for the segment before it.

    Returns:
        Outputs in the dtype of `near`'s, and log remainders. Differentiable in all four tensors.

    Raises:
        InvalidInputError: the shapes do not fit each other.

    Half-precision outputs are added in the precision of the log remainders and rounded once.
    """
    (near_out, near_log), (far_out, far_log) = near, far
    if near_out.shape != far_out.shape:
        raise InvalidInputError(
            f"far: expected outputs of near's shape, {tuple(near_out.shape)}, "
            f"got {tuple(far_out.shape)}"
        )
    for name, log_rem in (("near", near_log), ("far", far_log)):
        if log_rem.shape != near_out.shape[:-1]:
            raise InvalidInputError(
                f"{name}: expected log remainders {tuple(near_out.shape[:-1])}, one per row of "
                f"the outputs, got {tuple(log_rem.shape)}"
            )
    out = near_out + near_log.exp()[..., None] * far_out
    return out.to(near_out.dtype), near_log + far_log
