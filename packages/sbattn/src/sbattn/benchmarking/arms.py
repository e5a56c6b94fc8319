"""The operator and its peers as functions of `q, k, v`, each in the layout that it likes best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sbattn import on_triton
from sbattn.errors import InvalidInputError
from sbattn.functional import stickbreaking_attention

Layout = Literal["heads first", "tokens first"]


@dataclass(frozen=True)
class Arm:
    """A way to compute attention.

    Attributes:
        name: shown in tables.
        run: from `q, k, v` to the outputs.
        layout: `heads first` is `[B, H, L, D]`, `tokens first` is `[B, L, H, D]`, both contiguous.
        stick_breaking: whether it computes stick-breaking attention; the others are softmax.
        missing: why it cannot run here; None if it can.
    """

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    layout: Layout = "heads first"
    stick_breaking: bool = True
    missing: str | None = None


def _ours(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    return stickbreaking_attention(q, k, v, enable_gqa=True, **settings)[0]


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _fla(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = import_module("fla.ops.stickbreaking_attn").parallel_stickbreaking_attn(q, k, v)[
        0
    ]
    return out


def _paper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    operator = import_module("stickbreaking_attention").sb_attn
    out: Tensor = operator(q, k, v, inv_temp=q.shape[-1] ** -0.5)[0]
    return out


def _absent(module: str, device: torch.device) -> str | None:
    if find_spec(module) is None:
        return "not installed"
    return None if device.type == "cuda" else "needs a GPU"


def all_arms(device: torch.device) -> dict[str, Arm]:
    """Every arm by its key, those that cannot run here with the reason.

    `skip` and `full` are this library with and without skipping, on the device's own backend;
    `sdpa` is softmax attention with torch's fused kernels; `naive` the definition with autograd;
    `fla` the operator of flash-linear-attention, `paper` the repository of the paper's authors.
    """
    backend = "triton" if device.type == "cuda" else "chunked"
    triton_missing = None
    if device.type == "cuda" and not on_triton.INSTALLED:
        triton_missing = 'not installed: pip install "sbattn[triton]"'
    arms = {
        "skip": Arm(f"{backend}, skipping", partial(_ours, backend=backend)),
        "full": Arm(f"{backend}, no skipping", partial(_ours, backend=backend, skip_tol=0)),
        "sdpa": Arm("softmax, SDPA", _sdpa, stick_breaking=False),
        "naive": Arm("naive", partial(_ours, backend="naive")),
        "fla": Arm("flash-linear-attention", _fla, "tokens first", missing=_absent("fla", device)),
        "paper": Arm(
            "the paper's kernel", _paper, missing=_absent("stickbreaking_attention", device)
        ),
    }
    for key in ("skip", "full"):
        arms[key] = Arm(**{**vars(arms[key]), "missing": triton_missing})
    return arms


def choose(names: tuple[str, ...], device: torch.device) -> dict[str, Arm]:
    """The arms of these keys.

    Raises:
        InvalidInputError: there is no such arm.
    """
    arms = all_arms(device)
    unknown = sorted(set(names) - set(arms))
    if unknown:
        raise InvalidInputError(f"arms: expected some of {', '.join(arms)}; got {unknown}")
    return {name: arms[name] for name in names}
