"""The gradient inside one tile: from logits, products with the output's gradient, and two edges.

Names are the specification's: `t` logits in base 2, `acc` log2 of the stick at the tile's right
edge, `F` what the farther keys contributed to a row, up to the tile's left edge:

    a_ij = A_ij <do_i, v_j>,   F_ij = dr_i r_i + sum of a_il over visible l < j  (l = j excluded)
    dz_ij = (1 - beta_ij) a_ij - beta_ij F_ij

Nothing is subtracted that is nearly equal: F is a sum from the far end, and an exclusive one.
Where beta is 1 but for rounding, `(1 - beta) a` and `beta F` are both tiny, and both are right.

Keys of a tile are ordered by `maths.tile_keys`, so that a thread holds groups of four adjacent
ones, and all sums along the keys stay in registers but for a step over 4 lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from decapod_kernels.stickbreaking.maths import (
    at_most,
    from_fours,
    group_sums,
    in_fours,
    lane_sums,
    log2_1p,
)


@triton.jit
def visible_interval(row, first, last, offset, window, ATTEND_CURRENT: tl.constexpr):
    """First visible key of each row and one past the last; nothing where they cross."""
    position = row + offset + ATTEND_CURRENT
    return tl.maximum(first, position - window), tl.minimum(position, last)


@triton.jit
def block_stop(Stop, begin, end, BM: tl.constexpr, STOP_ROWS: tl.constexpr):
    """First key that the forward visited, of each of BM rows from `begin`; the least, the largest.

    Numbers of the block, not of a row, where the forward's blocks were no smaller. Rows from `end`
    on have none.
    """
    stop = tl.load(Stop + begin // STOP_ROWS)
    least = stop
    largest = stop
    for part in tl.static_range(1, (BM + STOP_ROWS - 1) // STOP_ROWS):
        first = begin + part * STOP_ROWS
        other = tl.load(Stop + first // STOP_ROWS, mask=first < end, other=least)
        stop = tl.where(tl.arange(0, BM) >= part * STOP_ROWS, other, stop)
        least = tl.minimum(least, other)
        largest = tl.maximum(largest, other)
    return stop, least, largest


@triton.jit
def mask_logits(t, key, lo, hi):
    """-inf where a key is not visible: softplus, weight, sigmoid and gradient are then all 0."""
    visible = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
    return tl.where(visible, t, float("-inf"))


@triton.jit
def odds(t):
    """x = 2^t = beta / (1 - beta), of logits up to 60: beyond, 1 - beta is no less than 2^-60."""
    return tl.exp2(at_most(t, 60.0))


@triton.jit
def taken_by_four(x0, x1, x2, x3):
    """`log2 Π (1 + x)` of four keys, by one logarithm, for x from 0 to 2^60.

    The product runs from 1 to 2^240, more than a float holds above 1, and is kept times 2^-120.
    Near 1 it has lost what small x add, but there `e = Π (1 + x) - 1` has it.
    """
    e01 = (x0 + x1) + x0 * x1
    e23 = (x2 + x3) + x2 * x3
    e = (e01 + e23) + tl.minimum(e01, 1.0) * e23  # only looked at below 1
    scaled = e01 * 2.0**-120 + 2.0**-120
    bits = (scaled * e23 + scaled).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - (127 - 120)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    return exponent.to(tl.float32) + log2_1p(tl.where(exponent == 0, e, mantissa - 1.0))


@triton.jit
def tile_taken(t):
    """What a tile takes from `acc`: the sum of the logits' softplus along each row."""
    x0, x1, x2, x3 = in_fours(odds(t))
    return tl.sum(tl.sum(taken_by_four(x0, x1, x2, x3), axis=2), axis=1)


@triton.jit
def tile_weights(t, acc):
    """Weights A `[rows, keys]`, the odds x and 1 - beta = 1 / (1 + x).

    The stick at a group's right edge takes one exponential; A = x times the stick left of a key.
    """
    x = odds(t)
    # 1 + x is in [1, 2^60]: no division with its care for extreme scales is needed.
    root = tl.rsqrt(1.0 + x)
    rest = root * root
    x0, x1, x2, x3 = in_fours(x)
    nearer, lane_taken = group_sums(taken_by_four(x0, x1, x2, x3), NEARER=True)
    nearer_lanes, _ = lane_sums(lane_taken, NEARER=True)
    rest0, rest1, rest2, rest3 = in_fours(rest)
    stick3 = tl.exp2((acc[:, None] - nearer_lanes)[:, :, None] - nearer) * rest3
    stick2 = stick3 * rest2
    stick1 = stick2 * rest1
    stick0 = stick1 * rest0
    return from_fours(x0 * stick0, x1 * stick1, x2 * stick2, x3 * stick3), x, rest


@triton.jit
def logit_gradient(a, x, rest, F):
    """dz from a = A <do, v> and from F at the tile's left edge; and F at its right edge."""
    a0, a1, a2, a3 = in_fours(a)
    a01 = a0 + a1
    a012 = a01 + a2
    farther, lane_sum = group_sums(a012 + a3, NEARER=False)
    farther_lanes, total = lane_sums(lane_sum, NEARER=False)
    F0 = (F[:, None] + farther_lanes)[:, :, None] + farther
    F_j = from_fours(F0, F0 + a0, F0 + a01, F0 + a012)
    return (a - x * F_j) * rest, F + total
