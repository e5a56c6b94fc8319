"""What the kernels compute per logit: softplus, weights, suffix sums, dot products.

Everything is in base 2: `t = z · log2(e)`, so that the hardware's `exp2` is used as it is, and
`sp = log2(1 + 2^t)` is what a key takes from the logarithm of the stick.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log2_1p(x):
    """`log2(1 + x)` for x in [0, 1], with a relative error below 2e-7 however small x is.

    A minimax polynomial: Triton's `log2` is one, too, and a longer one, and loses small x to the 1.
    """
    p = 0.0075491564348340034
    p = p * x - 0.04256695881485939
    p = p * x + 0.11285603046417236
    p = p * x - 0.1971188336610794
    p = p * x + 0.2756413519382477
    p = p * x - 0.35840845108032227
    p = p * x + 0.48069295287132263
    p = p * x - 0.7213401794433594
    p = p * x + 1.4426950216293335
    return p * x


@triton.jit
def softplus2(t):
    """`log2(1 + 2^t)`, stable on both sides, and `x = 2^-|t|`."""
    x = tl.exp2(-tl.abs(t))
    return tl.maximum(t, 0.0) + log2_1p(x), x


@triton.jit
def suffix_sum(x):
    """Sums of a tile's rows from each column to the right edge, the column itself included."""
    return tl.cumsum(x, axis=1, reverse=True)


@triton.jit
def tile_keys(BN: tl.constexpr):
    """Which of a tile's keys stands in each column: `break_stick` wants them in this order.

    A thread of a tensor-core result holds columns `8 g + 2 lane + {0, 1}` of a row. The order
    makes these a run of adjacent keys, so that products and sums along the keys stay in the thread
    but for one step over the 4 lanes. (In other layouts it is an order like any other.)
    """
    column = tl.arange(0, BN)
    return column % 8 // 2 * (BN // 4) + column // 8 * 2 + column % 2


@triton.jit
def break_stick(t, acc):
    """Weights `A` of a tile `t` [BM, BN] with keys ordered by `tile_keys`, and the new `acc`.

    `acc` [BM] is log2 of the stick left right of the tile. -inf in `t` stands for an unseen key.
    With x = 2^t, four adjacent keys 0..3 (3 is the nearest) leave Π 1/(1 + x_j) of the stick, and

        A_j = x_j Π_{l < j} (1 + x_l) · stick left after all four,

    which takes one logarithm and one exponential for the four beside their own 2^t. The products
    are kept as e = Π (1 + x) - 1, which small x are not lost from. Products stay finite because
    t is cut at 24 in them; what is cut off is taken from the stick after the four. So a key just
    behind a saturated one weighs at most 2^-24 of the stick, where the definition says 2^-t.
    """
    t0, t1, t2, t3 = in_fours(t)
    x0 = tl.exp2(at_most(t0, 24.0))
    x1 = tl.exp2(at_most(t1, 24.0))
    x2 = tl.exp2(at_most(t2, 24.0))
    x3 = tl.exp2(at_most(t3, 24.0))
    e1 = (x0 + x1) + x0 * x1
    e2 = (e1 + x2) + e1 * x2
    e3 = (e2 + x3) + e2 * x3
    log = _log2_1p_large(e3)
    cut = (_at_least_24(t0) + _at_least_24(t1)) + (_at_least_24(t2) + _at_least_24(t3))
    nearer, lane_sum = group_sums(log + (cut - 96.0), NEARER=True)
    nearer_lanes, taken = lane_sums(lane_sum, NEARER=True)
    stick = tl.exp2((acc[:, None] - nearer_lanes)[:, :, None] - nearer - log)
    w0 = x0 * stick
    w1 = (x1 + x1 * x0) * stick
    w2 = (x2 + x2 * e1) * stick
    w3 = (x3 + x3 * e2) * stick
    return from_fours(w0, w1, w2, w3), acc - taken


@triton.jit
def at_most(t, limit: tl.constexpr):
    """The smaller of the two. What is no number stays so: a broken model must not look sound."""
    return tl.minimum(t, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _at_least_24(t):
    return tl.maximum(t, 24.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _log2_1p_large(e):
    """`log2(1 + e)` for e in [0, 2^126]: `log2_1p` of e, or of the mantissa where e is above 1."""
    bits = (1.0 + e).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    return exponent.to(tl.float32) + log2_1p(tl.where(exponent == 0, e, mantissa - 1.0))


@triton.jit
def in_fours(x):
    """A tile `[BM, BN]` with keys ordered by `tile_keys`, as four `[BM, 4 lanes, BN / 16]`.

    These are the far to near keys of groups of four adjacent ones, and all of it moves nothing.
    """
    BM: tl.constexpr = x.shape[0]
    GROUPS: tl.constexpr = x.shape[1] // 16
    x = tl.permute(tl.reshape(x, [BM, GROUPS, 2, 4, 2]), (0, 3, 1, 2, 4))
    even, odd = tl.split(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def from_fours(x0, x1, x2, x3):
    """The tile that `in_fours` took apart."""
    BM: tl.constexpr = x0.shape[0]
    GROUPS: tl.constexpr = x0.shape[2]
    x = tl.join(tl.join(x0, x2), tl.join(x1, x3))  # [BM, lanes, GROUPS, 2, 2]
    return tl.reshape(tl.permute(x, (0, 2, 3, 1, 4)), [BM, 16 * GROUPS])


@triton.jit
def group_sums(x, NEARER: tl.constexpr):
    """Sums along the last dimension of all to the right of each element (NEARER), or to its left.

    The element itself is never in them, nor subtracted: a tree in registers. And the sum of all.
    """
    BM: tl.constexpr = x.shape[0]
    LANES: tl.constexpr = x.shape[1]
    SIZE: tl.constexpr = x.shape[2]
    if SIZE == 1:
        sums = tl.zeros_like(x)
        total = tl.reshape(x, [BM, LANES])
    else:
        far, near = tl.split(tl.reshape(x, [BM, LANES, SIZE // 2, 2]))
        pairs, total = group_sums(far + near, NEARER)
        if NEARER:
            sums = tl.reshape(tl.join(pairs + near, pairs), [BM, LANES, SIZE])
        else:
            sums = tl.reshape(tl.join(pairs, pairs + far), [BM, LANES, SIZE])
    return sums, total


@triton.jit
def lane_sums(x, NEARER: tl.constexpr):
    """The same over 4 lanes, `x` [BM, 4], by exchange between them."""
    BM: tl.constexpr = x.shape[0]
    x = tl.reshape(x, [BM, 2, 2])
    # Of each pair of lanes, and of pairs: the one that the other has in its sum.
    given = tl.arange(0, 2) == (1 if NEARER else 0)
    one = tl.sum(tl.where(given[None, None, :], x, 0.0), axis=2)
    pair = tl.sum(x, axis=2)
    one_pair = tl.sum(tl.where(given[None, :], pair, 0.0), axis=1)
    within = tl.where(given[None, None, :], 0.0, one[:, :, None])
    beyond = tl.where(given[None, :], 0.0, one_pair[:, None])
    return tl.reshape(within + beyond[:, :, None], [BM, 4]), tl.sum(pair, axis=1)


@triton.jit
def agreed(value, Scratch):
    """`value`, a number that all threads hold, such that the compiler knows that they do.

    Triton's reductions end in an exchange between lanes. What depends on one no longer counts as
    uniform, and in a loop that does, ptxas runs Hopper's matrix instructions one at a time (seen in
    the machine code). A number read from memory counts. Scratch: a float32 of the program's own.
    """
    tl.store(Scratch, value)
    tl.debug_barrier()
    value = tl.load(Scratch)
    tl.debug_barrier()  # nobody writes there before everybody has read
    return value


@triton.jit
def dot(a, b, accumulator, UPCAST: tl.constexpr):
    """`accumulator + a b` in float32. UPCAST: in the interpreter, whose bf16 products are wrong."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


def interpreting() -> bool:
    """Whether these kernels run in Triton's interpreter (TRITON_INTERPRET was set on import)."""
    return not isinstance(dot, triton.JITFunction)
