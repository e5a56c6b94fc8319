"""Two facts about the operator that can be counted: its saturated gradient and its early exit."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from sbattn.functional import stickbreaking_attention

LOGITS: Final = range(1, 31)
"""Logits at which the gradient is tested: at 30 its true size is 9e-14."""

TOLERANCE: Final = 1e-4
"""Relative error below which a gradient counts as right."""

_REMAINDER_GRADIENT: Final = 0.25
_KEYS, _SIZE = 1024, 16
_ROUNDING = 1e-13  # of a float64 sum of weights, with room to spare


def saturated_gradients() -> dict[str, list[float]]:
    """Relative errors in float32 of the gradient of one saturated logit, by form and logit.

    A query with one visible key, value 1 and output gradient 1 has the closed form
    ∂/∂z = σ(z) σ(−z) (1 − ∂/∂r). "exclusive" is this package's operator; "inclusive" subtracts
    β Σ_{l ≤ j} a_l, algebraically the same, in the same precision.
    """
    errors: dict[str, list[float]] = {"exclusive": [], "inclusive": []}
    for logit in LOGITS:
        small = math.exp(-logit)
        truth = small / (1 + small) ** 2 * (1 - _REMAINDER_GRADIENT)
        inclusive = _inclusive_form(torch.tensor(float(logit)))
        errors["exclusive"].append(abs(_gradient(float(logit)) / truth - 1))
        errors["inclusive"].append(abs(inclusive / truth - 1))
    return errors


def _gradient(logit: float) -> float:
    query = torch.tensor([0.0, logit]).view(1, 1, 2, 1).requires_grad_()
    ones = torch.ones(1, 1, 2, 1)
    out, rem = stickbreaking_attention(query, ones, ones, scale=1.0)
    (out[0, 0, 1, 0] + _REMAINDER_GRADIENT * rem[0, 0, 1]).backward()
    return float(query.grad[0, 0, 1, 0])


def _inclusive_form(logit: Tensor) -> float:
    beta = torch.sigmoid(logit)
    a = beta * (1 - _REMAINDER_GRADIENT)
    return float(a - beta * a)


def exit_errors(seed: int) -> dict[str, float]:
    """How far outputs with early exit are from those without, against what is certified.

    Heads differ in how soon they stop. The values are made against the exit: in one head of two
    they grow with the distance, in the other all are equal, so that whatever is left out is missed
    in full. Float64, whose rounding is far below the tolerances.

    Returns:
        ``rows`` that stopped early, ``inside``, how many of them err by no more than what they left
        of the stick times the largest value, and ``worst``, the largest error as a share of that.
    """
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0], dtype=torch.float64)
    query, key, value = (
        torch.randn(1, len(shifts), _KEYS, _SIZE, generator=generator, dtype=torch.float64)
        for _ in range(3)
    )
    # The first feature carries the mean logit of its head.
    query[..., 0], key[..., 0] = math.sqrt(_SIZE), -shifts[:, None]
    value *= torch.linspace(8, 0, _KEYS, dtype=torch.float64).exp()[:, None]
    value[:, 1::2] = 1.0
    limit = value.abs().amax(dim=(2, 3))[..., None]
    exact, exact_log = stickbreaking_attention(
        query, key, value, skip_tol=0, return_log_remainder=True
    )
    rows, inside, worst = 0, 0, 0.0
    for tolerance in (2.0**-24, 2.0**-12, 2.0**-6, 0.25):
        out, log_rem = stickbreaking_attention(
            query, key, value, skip_tol=tolerance, return_log_remainder=True
        )
        stopped = log_rem > exact_log + 1e-9
        # A stick that ends within a tile leaves less than rounding does.
        certified = (log_rem.exp() + _ROUNDING) * limit
        share = ((out - exact).abs().amax(dim=-1) / certified)[stopped]
        rows += share.numel()
        inside += int((share <= 1).sum())
        worst = max(worst, float(share.max()) if share.numel() else 0.0)
    return {"rows": rows, "inside": inside, "worst": worst}
