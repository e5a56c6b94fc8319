"""The parts of the GPU benchmark. Each takes a `Size` and returns what it measured.

They run on the GPU at full size, and at a tiny size on a CPU through Triton's interpreter, so that
the command can be tried where there is no GPU. What each part shows:

- `correctness`: errors of outputs and gradients against float64, ours and the peers'.
- `determinism`: gradients of repeated backward passes, compared bit by bit.
- `memory`: peak of the backward beside the bytes of inputs and gradients.
- `speed`: forward, and forward with backward, beside softmax and the peers in the same run.
- `trained`: the same on queries and keys of a language model that is trained on the spot.
- `decode`: one token against a long cache, beside softmax and the memory's bandwidth.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sbattn.benchmarking.arms import Arm, all_arms
from sbattn.benchmarking.comparison import Options, Pass, measure, work_of
from sbattn.benchmarking.inputs import Logits, Problem, make_inputs
from sbattn.benchmarking.timing import peak_gpu_bytes, ratio_interval, time_in_turns
from sbattn.benchmarking.trained import trained_layers
from sbattn.decode import stickbreaking_decode
from sbattn.functional import stickbreaking_attention
from sbattn.live import live_keys, live_tile_fraction
from sbattn.naive import naive_attention
from sbattn.visibility import Visibility

PASSES: tuple[Pass, ...] = ("forward", "both")
KINDS: tuple[Logits, ...] = ("random", "mixed", "far")


@dataclass(frozen=True)
class Size:
    """How large the problems are.

    Attributes:
        device: where they are computed.
        batch: of the timed problems.
        heads: of the timed problems.
        head_dim: of all problems.
        checked: length at which errors are measured against float64.
        dtypes: whose errors are measured.
        repeats: of the backward pass that must not change.
        lengths: that are timed.
        long: length of the memory measurement.
        cache: tokens in the cache when decoding.
        rounds: of every timing.
        training: steps of the language model, and the length of its texts.
    """

    device: str
    batch: int
    heads: int
    head_dim: int
    checked: int
    dtypes: tuple[str, ...]
    repeats: int
    lengths: tuple[int, ...]
    long: int
    cache: int
    rounds: int
    training: tuple[int, int]


FULL = Size(
    device="cuda",
    batch=4,
    heads=12,
    head_dim=128,
    checked=2048,
    dtypes=("bfloat16", "float16", "float32"),
    repeats=20,
    lengths=(4096, 8192, 16384),
    long=65536,
    cache=131072,
    rounds=20,
    training=(600, 2048),
)
# bfloat16 matrix products are wrong in the interpreter, so it is not among the types here.
TINY = Size(
    device="cpu",
    batch=1,
    heads=2,
    head_dim=16,
    checked=64,
    dtypes=("float32",),
    repeats=2,
    lengths=(64,),
    long=64,
    cache=128,
    rounds=2,
    training=(2, 64),
)


def correctness(size: Size) -> dict[str, Any]:
    """Largest errors relative to the largest true value, overall and in the worst row."""
    device = torch.device(size.device)
    rows = []
    for dtype in size.dtypes:
        for logits in KINDS:
            problem = Problem(
                heads=size.heads,
                kv_heads=size.heads // 2,
                length=size.checked,
                head_dim=size.head_dim,
                dtype=dtype,
                logits=logits,
            )
            inputs = make_inputs(problem, device)
            truth = _gradients(_exact, inputs, torch.float64)
            for arm in _stick_breaking_arms(device).values():
                if arm.name == "the paper's kernel" and dtype != "bfloat16":
                    continue  # it returns bfloat16 gradients whatever the inputs are
                found = _arm_gradients(arm, inputs)
                errors = {
                    name: _errors(x, y)
                    for name, x, y in zip(("out", "dq", "dk", "dv"), found, truth, strict=True)
                }
                rows.append({"arm": arm.name, "problem": problem.to_dict(), "errors": errors})
                worst = max(error["rows"] for error in errors.values())
                _say(f"{dtype:9s} {logits:7s} {arm.name:24s} worst row {worst:.1e}")
    return {"rows": rows}


def determinism(size: Size) -> dict[str, Any]:
    """How many of the repeated backward passes differ from the first in any bit."""
    problem = Problem(
        batch=size.batch,
        heads=size.heads,
        kv_heads=size.heads,
        length=size.lengths[0],
        head_dim=size.head_dim,
        dtype=size.dtypes[0],
    )
    inputs = make_inputs(problem, torch.device(size.device))
    first = _triton_gradients(inputs)
    different = 0
    for _ in range(size.repeats):
        again = _triton_gradients(inputs)
        different += not all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    _say(f"{different} of {size.repeats} repetitions differ")
    return {"problem": problem.to_dict(), "repeats": size.repeats, "different": different}


def memory(size: Size) -> dict[str, Any]:
    """Peak of the backward, against the bytes of `q, k, v, d_out` and the three gradients."""
    rows = []
    for logits in ("random", "far"):
        problem = Problem(
            heads=size.heads,
            kv_heads=size.heads,
            length=size.long,
            head_dim=size.head_dim,
            dtype=size.dtypes[0],
            logits=logits,
        )
        inputs = make_inputs(problem, torch.device(size.device))
        needed = sum(x.numel() * x.element_size() for x in (*inputs, *inputs[:3]))
        leaves = [x.requires_grad_() for x in inputs[:3]]
        before = torch.cuda.memory_allocated() if size.device == "cuda" else 0
        out, _ = stickbreaking_attention(*leaves, backend="triton")
        row: dict[str, Any] = {"problem": problem.to_dict(), "inputs_and_gradients": needed}
        if size.device == "cuda":
            # The inputs are there before; so is what the forward keeps for the backward.
            kept = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
            inside = peak_gpu_bytes(lambda: torch.autograd.grad(out, leaves, inputs[3]))  # noqa: B023
            given = sum(x.numel() * x.element_size() for x in inputs)
            row["peak"] = given + kept + inside
            row["ratio"] = row["peak"] / needed
            _say(f"{logits}: {row['ratio']:.3f} times the inputs and gradients")
        else:
            torch.autograd.grad(out, leaves, inputs[3])
        rows.append(row)
    return {"rows": rows}


def speed(size: Size) -> dict[str, Any]:
    """Every arm at every length, on all kinds of logits."""
    options = Options(
        lengths=size.lengths,
        logits=KINDS,
        arms=("skip", "full", "sdpa", "fla", "paper"),
        batch=size.batch,
        heads=size.heads,
        head_dim=size.head_dim,
        device="cuda" if size.device == "cuda" else "cpu",
        rounds=size.rounds,
    )
    rows = []
    for _, _, found in measure(options, _say):
        for row in found:
            problem = row.problem
            what = f"{problem['length']} {problem['logits']} {row.passes} {row.arm}"
            _say(f"{what}: {row.milliseconds:.3f} ms")
            rows.append(asdict(row))
    return {"rows": rows}


def trained(size: Size) -> dict[str, Any]:
    """Times on the queries and keys of a language model's layers, trained on the spot."""
    device = torch.device(size.device)
    arms = {n: a for n, a in all_arms(device).items() if n != "naive" and not a.missing}
    rows = []
    for layer in trained_layers(
        heads=size.heads,
        head_dim=size.head_dim,
        batch=size.batch,
        length=size.lengths[-1],
        steps=size.training[0],
        trained_length=size.training[1],
        dtype=getattr(torch, size.dtypes[0]),
        device=device,
    ):
        q, k = layer.inputs[:2]
        live = live_tile_fraction(q, k)
        for passes in PASSES:
            work = {name: work_of(arm, layer.inputs, passes) for name, arm in arms.items()}
            times = time_in_turns(work, rounds=size.rounds, device=device)
            skip = times["skip"].milliseconds
            row = {
                "layer": layer.layer,
                "passes": passes,
                "shape": list(q.shape),
                "live_by_head": live.mean(0).tolist(),
                "milliseconds": {name: t.median for name, t in times.items()},
                "skip_beside": {
                    name: ratio_interval(skip, t.milliseconds)
                    for name, t in times.items()
                    if name != "skip"
                },
            }
            rows.append(row)
            _say(f"layer {layer.layer} {passes}: {float(live.mean()):.3f} live, "
                 f"{times['skip'].median:.3f} ms")  # fmt: skip
    return {"rows": rows}


def decode(size: Size) -> dict[str, Any]:
    """One token of every sequence against its cache; bytes of the live keys set the floor."""
    device = torch.device(size.device)
    rows = []
    for logits in KINDS:
        problem = Problem(
            batch=size.batch,
            heads=size.heads,
            kv_heads=size.heads,
            length=size.cache,
            head_dim=size.head_dim,
            dtype=size.dtypes[0],
            logits=logits,
        )
        inputs = make_inputs(replace(problem, batch=1), device)
        q, k, v = (x.expand(size.batch, -1, -1, -1) for x in inputs[:3])
        query = q[:, :, -1:].transpose(1, 2)
        cached = [x.transpose(1, 2).contiguous() for x in (k, v)]
        filled = torch.full((size.batch,), size.cache, dtype=torch.int32, device=device)

        def ours(
            skip_tol: Any = "exact", query: Tensor = query, cached: Any = cached, n: Tensor = filled
        ) -> Tensor:
            found = stickbreaking_decode(
                query, *cached, cache_seqlens=n, skip_tol=skip_tol, backend="triton"
            )
            return found[0]

        def softmax(q: Tensor = q[:, :, -1:], k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

        work = {"skip": ours, "full": lambda run=ours: run(skip_tol=0), "sdpa": softmax}
        times = time_in_turns(work, rounds=size.rounds, device=device)
        live = float(live_keys(q[:1, :, -1:], k[:1]).float().mean())
        row = {
            "problem": problem.to_dict(),
            "live_keys": live,
            "live": live / size.cache,
            "cache_bytes": sum(x.numel() * x.element_size() for x in cached),
            "milliseconds": {name: t.median for name, t in times.items()},
        }
        _say(f"{logits}: {live / size.cache:.4f} live, {row['milliseconds']}")
        rows.append(row)
    return {"rows": rows}


# --- inside ---------------------------------------------------------------------------------------


def _stick_breaking_arms(device: torch.device) -> dict[str, Arm]:
    found = {n: a for n, a in all_arms(device).items() if a.stick_breaking and not a.missing}
    del found["naive"]
    if device.type == "cpu":
        return {"triton": Arm("triton, interpreted", _triton), **found}
    return found


def _triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return stickbreaking_attention(q, k, v, enable_gqa=True, backend="triton")[0]


def _exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rule = Visibility(kv_offset=k.shape[2] - q.shape[2])
    return naive_attention(q, k, v, scale=q.shape[-1] ** -0.5, visibility=rule)[0]


def _gradients(run: Any, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs[:3]]
    out = run(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, inputs[3].to(dtype)))


def _triton_gradients(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return _gradients(_triton, inputs, inputs[0].dtype)


def _arm_gradients(arm: Arm, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if arm.layout == "heads first":
        return _gradients(arm.run, inputs, inputs[0].dtype)
    turned = tuple(x.transpose(1, 2).contiguous() for x in inputs)
    found = _gradients(arm.run, turned, inputs[0].dtype)
    return tuple(x.transpose(1, 2) for x in found)


def _errors(found: Tensor, truth: Tensor) -> dict[str, float]:
    """`all` hides broken rows behind large ones; `rows` is the worst row's, relative to itself."""
    off = (found.double() - truth).abs()
    per_row = off.amax(-1) / truth.abs().amax(-1).clamp(min=1e-3 * float(truth.abs().max()))
    return {"all": float(off.max() / truth.abs().max()), "rows": float(per_row.max())}


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
