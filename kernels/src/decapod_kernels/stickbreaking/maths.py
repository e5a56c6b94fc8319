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
    BM: tl.constexpr = t.shape[0]
    GROUPS: tl.constexpr = t.shape[1] // 16
    t = tl.permute(tl.reshape(t, [BM, GROUPS, 2, 4, 2]), (0, 3, 1, 2, 4))
    even, odd = tl.split(t)
    t0, t2 = tl.split(even)
    t1, t3 = tl.split(odd)  # each [BM, 4 lanes, GROUPS]
    x0 = tl.exp2(tl.minimum(t0, 24.0))
    x1 = tl.exp2(tl.minimum(t1, 24.0))
    x2 = tl.exp2(tl.minimum(t2, 24.0))
    x3 = tl.exp2(tl.minimum(t3, 24.0))
    e1 = (x0 + x1) + x0 * x1
    e2 = (e1 + x2) + e1 * x2
    e3 = (e2 + x3) + e2 * x3
    log = _log2_1p_large(e3)
    cut = (tl.maximum(t0, 24.0) + tl.maximum(t1, 24.0)) + (
        tl.maximum(t2, 24.0) + tl.maximum(t3, 24.0)
    )
    nearer, lane_sum = _exclusive_suffix(log + (cut - 96.0))
    nearer_lanes, taken = _lane_suffix(lane_sum)
    stick = tl.exp2((acc[:, None] - nearer_lanes)[:, :, None] - nearer - log)
    w0 = x0 * stick
    w1 = (x1 + x1 * x0) * stick
    w2 = (x2 + x2 * e1) * stick
    w3 = (x3 + x3 * e2) * stick
    weights = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BM, lanes, GROUPS, 2, 2]
    weights = tl.reshape(tl.permute(weights, (0, 2, 3, 1, 4)), [BM, 16 * GROUPS])
    return weights, acc - taken


@triton.jit
def _log2_1p_large(e):
    """`log2(1 + e)` for e in [0, 2^126]: `log2_1p` of e, or of the mantissa where e is above 1."""
    bits = (1.0 + e).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    return exponent.to(tl.float32) + log2_1p(tl.where(exponent == 0, e, mantissa - 1.0))


@triton.jit
def _exclusive_suffix(x):
    """Sums along the last dimension right of each element, and of all: a tree in registers."""
    BM: tl.constexpr = x.shape[0]
    LANES: tl.constexpr = x.shape[1]
    SIZE: tl.constexpr = x.shape[2]
    if SIZE == 1:
        sums = tl.zeros_like(x)
        total = tl.reshape(x, [BM, LANES])
    else:
        far, near = tl.split(tl.reshape(x, [BM, LANES, SIZE // 2, 2]))
        nearer, total = _exclusive_suffix(far + near)
        sums = tl.reshape(tl.join(nearer + near, nearer), [BM, LANES, SIZE])
    return sums, total


@triton.jit
def _lane_suffix(x):
    """The same over 4 lanes, `x` [BM, 4], by exchange between them."""
    BM: tl.constexpr = x.shape[0]
    x = tl.reshape(x, [BM, 2, 2])
    right = tl.arange(0, 2) == 1
    near = tl.sum(tl.where(right[None, None, :], x, 0.0), axis=2)  # of each pair of lanes
    pair = tl.sum(x, axis=2)
    near_pair = tl.sum(tl.where(right[None, :], pair, 0.0), axis=1)
    within = tl.where(right[None, None, :], 0.0, near[:, :, None])
    beyond = tl.where(right[None, :], 0.0, near_pair[:, None])
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
