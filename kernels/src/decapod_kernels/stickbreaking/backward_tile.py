"""The gradient inside one tile: from logits, products with the output's gradient, and two edges.

Names are the specification's: `t` logits in base 2, `acc` log2 of the stick at the tile's right
edge, `F` what the farther keys contributed to a row, up to the tile's left edge:

    a_ij = A_ij <do_i, v_j>,   F_ij = dr_i r_i + sum of a_il over visible l < j  (l = j excluded)
    dz_ij = (1 - beta_ij) a_ij - beta_ij F_ij

Nothing is subtracted that is nearly equal: F is a sum from the far end, and an exclusive one.
Where beta is 1 but for rounding, `(1 - beta) a` and `beta F` are both tiny, and both are right.
"""

from __future__ import annotations

import triton
import triton.language as tl

from decapod_kernels.stickbreaking.maths import dot, log2_1p


@triton.jit
def triangles(BN: tl.constexpr, EXACT: tl.constexpr):
    """Ones where the row is right of the column, and left of it: for `exclusive_sum`.

    To be made outside the loop over tiles, which leaves them in shared memory.
    """
    column = tl.arange(0, BN)
    dtype: tl.constexpr = tl.float32 if EXACT else tl.bfloat16
    # By way of float32: the interpreter turns no truth value into bfloat16.
    nearer = (column[:, None] > column[None, :]).to(tl.float32).to(dtype)
    farther = (column[:, None] < column[None, :]).to(tl.float32).to(dtype)
    return nearer, farther


@triton.jit
def exclusive_sum(x, triangle, UPCAST: tl.constexpr):
    """Sums of a tile's rows up to each column, itself excluded, from the side of the triangle.

    Never an inclusive sum minus the column: that loses what is small beside the column. It is a
    product with a triangle of ones, since Triton takes a scan of a product's result through shared
    memory and back. With a bfloat16 triangle x goes into it as two bfloat16 numbers: a relative
    error of 2^-16, and no cancellation.
    """
    if triangle.dtype == tl.float32:
        total = dot(x, triangle, tl.zeros_like(x), UPCAST)
    else:
        # Cut, not rounded: that takes one integer operation, and the rest is exact as well.
        high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        low = (x - high).to(tl.bfloat16)
        total = dot(high.to(tl.bfloat16), triangle, tl.zeros_like(x), UPCAST)
        total = dot(low, triangle, total, UPCAST)
    return total


@triton.jit
def visible_interval(row, first, last, offset, window, ATTEND_CURRENT: tl.constexpr):
    """First visible key of each row and one past the last; nothing where they cross."""
    position = row + offset + ATTEND_CURRENT
    return tl.maximum(first, position - window), tl.minimum(position, last)


@triton.jit
def mask_logits(t, key, lo, hi):
    """-inf where a key is not visible: softplus, weight, sigmoid and gradient are then all 0."""
    visible = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
    return tl.where(visible, t, float("-inf"))


@triton.jit
def tile_weights(t, acc, nearer, UPCAST: tl.constexpr):
    """Weights A `[rows, keys]`, and 2^-|t| with the sign of t, all that the gradient needs of t."""
    x = tl.exp2(-tl.abs(t))
    log_y = log2_1p(x)
    # All that is needed of t later, before the products: registers are what these kernels lack.
    log_beta = tl.minimum(t, 0.0) - log_y
    sign = t.to(tl.int32, bitcast=True) & -2147483648
    signed_x = (x.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    taken = exclusive_sum(tl.maximum(t, 0.0) + log_y, nearer, UPCAST)
    return tl.exp2(log_beta + (acc[:, None] - taken)), signed_x


@triton.jit
def logit_gradient(signed_x, a, F, farther, UPCAST: tl.constexpr):
    """dz from a = A <do, v> and from F at the tile's left edge."""
    F_j = exclusive_sum(a, farther, UPCAST) + F[:, None]
    # The larger of beta and 1 - beta is 1 / (1 + x), the smaller x times that. Where nothing is
    # visible x is -0: the sign is in the bits.
    x = tl.abs(signed_x)
    towards = signed_x.to(tl.int32, bitcast=True) >= 0
    numerator = tl.where(towards, x, 1.0) * a - tl.where(towards, 1.0, x) * F_j
    return numerator / (1.0 + x)
