"""The operator among PyTorch's: tracing, compilation, export, autocast, derivatives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sbattn import ops
from sbattn.errors import InvalidInputError, UnsupportedError
from sbattn.functional import stickbreaking_attention, stickbreaking_attention_varlen

FUSED = ["chunked", "triton"]


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A backend behind the operator, and its device here."""
    if request.param == "chunked":
        return "chunked", "cpu"
    pytest.importorskip("decapod_kernels")
    pytest.importorskip("triton")
    return "triton", "cuda" if torch.cuda.is_available() else "cpu"


def leaves(device: str, length: int = 9, shift: int = 2, **options: Any) -> list[Tensor]:
    shapes = [(1, 2, length, 8), (1, 1, length + shift, 8), (1, 1, length + shift, 4)]
    return [torch.randn(s, device=device, **options).requires_grad_() for s in shapes]


def packed(device: str) -> tuple[Any, ...]:
    tensors = [torch.randn(s, device=device) for s in ((9, 2, 8), (11, 1, 8), (11, 1, 4))]
    cu_q, cu_k = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 4, 9], [0, 6, 11])
    )
    return *(x.requires_grad_() for x in tensors), cu_q, cu_k, 5, 6


@pytest.mark.parametrize("padded", [False, True])
def test_the_dense_operator_passes_opcheck(fused: tuple[str, str], padded: bool) -> None:
    backend, device = fused
    padding = torch.tensor([[1, 10]], device=device) if padded else None
    arguments = (*leaves(device), padding, 0.5, 2, False, 7, 2.0**-24, True, False, backend)
    torch.library.opcheck(ops.dense, arguments)
    torch.library.opcheck(ops.dense, (*arguments[:9], False, *arguments[10:]), test_utils=STATIC)


def test_the_packed_operator_passes_opcheck(fused: tuple[str, str]) -> None:
    backend, device = fused
    arguments = (*packed(device), 0.5, False, None, 0.0, True, False, backend)
    torch.library.opcheck(ops.varlen, arguments)


# Without saved state there is nothing to differentiate, so only form can be checked.
STATIC = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("transposed", [False, True])
def test_the_backward_operators_pass_opcheck(fused: tuple[str, str], transposed: bool) -> None:
    backend, device = fused
    inputs = [x.detach() for x in leaves(device)]
    if transposed:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    options = (None, 0.5, 2, True, None, 0.0)
    out, log_rem, edges, stop = ops.dense(
        *inputs, *options, save=True, validate=False, backend=backend
    )
    for d_log_rem in (None, torch.ones_like(log_rem)):
        torch.library.opcheck(
            ops.dense_backward,
            (torch.ones_like(out), d_log_rem, *inputs, edges, stop, *options, backend),
            test_utils=STATIC,
        )
    *inputs, cu_q, cu_k, longest_q, longest_k = packed(device)
    inputs = [x.detach() for x in inputs]
    packing = (cu_q, cu_k, longest_q, longest_k, 0.5, True, None, 0.0)
    out, log_rem, edges, stop = ops.varlen(
        *inputs, *packing, save=True, validate=False, backend=backend
    )
    torch.library.opcheck(
        ops.varlen_backward,
        (torch.ones_like(out), log_rem, *inputs, edges, stop, *packing, backend),
        test_utils=STATIC,
    )


def both_ways(
    function: Callable[..., Tensor], inputs: list[Tensor], *more: Any
) -> tuple[Tensor, ...]:
    out = function(*inputs, *more)
    return out.detach(), *torch.autograd.grad(out.square().sum(), inputs)


def dense_program(backend: str) -> Callable[..., Tensor]:
    def program(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        out, rem = stickbreaking_attention(
            q * 2, k, v, enable_gqa=True, key_padding=padding, backend=backend
        )
        return out + rem[..., None]

    return program


def packed_program(backend: str) -> Callable[..., Tensor]:
    def program(*arguments: Any) -> Tensor:
        out, rem = stickbreaking_attention_varlen(*arguments, backend=backend)
        return out + rem[..., None]

    return program


COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
            # Raised by the compiler's own code.
            pytest.mark.filterwarnings("ignore::DeprecationWarning"),
        ],
    ),
]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_compiled_program_gives_what_the_eager_one_gives_for_any_length(
    fused: tuple[str, str], compiler: str
) -> None:
    """One graph without breaks, compiled once for all lengths."""
    backend, device = fused
    torch._dynamo.reset()
    program = dense_program(backend)
    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend=compiler)
    for length, shift in ((40, 0), (41, 0), (65, 0)):
        inputs = leaves(device, length, shift)
        padding = torch.ones(1, length, dtype=torch.bool, device=device)
        padding[:, :3] = False
        with torch._dynamo.config.patch(error_on_recompile=length != 40):
            found = both_ways(compiled, inputs, padding)
        for a, b in zip(found, both_ways(program, inputs, padding), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_compiled_packed_program_gives_what_the_eager_one_gives(
    fused: tuple[str, str], compiler: str
) -> None:
    backend, device = fused
    torch._dynamo.reset()
    program = packed_program(backend)
    compiled = torch.compile(program, fullgraph=True, backend=compiler)
    *inputs, cu_q, cu_k, longest_q, longest_k = packed(device)
    more = (cu_q, cu_k, longest_q, longest_k)
    found = both_ways(compiled, inputs, *more)
    for a, b in zip(found, both_ways(program, inputs, *more), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_compiled_program_still_looks_at_offsets_and_masks() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(dense_program("chunked"), fullgraph=True, backend="aot_eager")
    padding = torch.tensor([[True, False, True, True]])
    with pytest.raises(InvalidInputError, match="one contiguous run"):
        compiled(*leaves("cpu", 4, 0), padding)
    compiled = torch.compile(packed_program("chunked"), fullgraph=True, backend="aot_eager")
    *arguments, cu_k, longest_q, longest_k = packed("cpu")
    with pytest.raises(InvalidInputError, match="first offset to be 0, got 1"):
        compiled(*arguments, cu_k + 1, longest_q, longest_k)


class Attention(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return stickbreaking_attention(q, k, v, enable_gqa=True, backend=self.backend)[0]


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
def test_an_exported_program_takes_any_length(fused: tuple[str, str], trained: bool) -> None:
    backend, device = fused
    module = Attention(backend)
    length = torch.export.Dim("length", min=2, max=4096)

    def draw(n: int) -> tuple[Tensor, ...]:
        return tuple(x if trained else x.detach() for x in leaves(device, n, 0))

    exported = torch.export.export(module, draw(12), dynamic_shapes=({2: length},) * 3)
    inputs = draw(70)
    torch.testing.assert_close(exported.module()(*inputs), module(*inputs))


def test_autocast_casts_as_it_does_for_softmax_attention(fused: tuple[str, str]) -> None:
    backend, device = fused
    q, k, v = leaves(device)
    mixed = v.detach().half().requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        out, rem = stickbreaking_attention(q, k, mixed, enable_gqa=True, backend=backend)
        doubles = [x.detach().double() for x in (q, k, v)]
        exact, _ = stickbreaking_attention(*doubles, enable_gqa=True, backend="naive")
    assert out.dtype == torch.bfloat16
    assert rem.dtype == torch.float32
    assert exact.dtype == torch.float64
    torch.testing.assert_close(out.double(), exact, rtol=0.03, atol=0.03)
    (out.float().sum() + rem.sum()).backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
    assert mixed.grad is not None
    assert mixed.grad.dtype == torch.float16


def test_autocast_does_not_lower_the_precision_within() -> None:
    """The tensor code inside the operator must not be cast a second time."""
    inputs = [x.detach().bfloat16() for x in leaves("cpu", 60, 0)]
    for backend in ("naive", "chunked"):
        plain = stickbreaking_attention(*inputs, enable_gqa=True, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = stickbreaking_attention(*inputs, enable_gqa=True, backend=backend)
        for a, b in zip(plain, cast, strict=True):
            assert torch.equal(a, b)


def test_a_second_derivative_is_refused_with_the_remedy(fused: tuple[str, str]) -> None:
    backend, device = fused
    inputs = leaves(device)
    out, rem = stickbreaking_attention(*inputs, enable_gqa=True, backend=backend)
    gradients = torch.autograd.grad(out.sum() + rem.sum(), inputs, create_graph=True)
    with pytest.raises(UnsupportedError, match=r'double backward: .* pass backend="naive"'):
        gradients[0].sum().backward()
    arguments = packed(device)
    out, _ = stickbreaking_attention_varlen(*arguments, backend=backend)
    (gradient,) = torch.autograd.grad(out.sum(), arguments[1], create_graph=True)
    with pytest.raises(UnsupportedError, match="double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_the_gradients_asked_for_are_given(fused: tuple[str, str], wanted: int) -> None:
    backend, device = fused
    inputs = [x.detach() for x in leaves(device)]
    inputs[wanted].requires_grad_()
    out, rem = stickbreaking_attention(*inputs, enable_gqa=True, backend=backend)
    (out.sum() + rem.sum()).backward()
    assert [x.grad is not None for x in inputs] == [n == wanted for n in range(3)]


def test_either_result_alone_can_be_differentiated(fused: tuple[str, str]) -> None:
    """With the other one's gradient missing, not zero."""
    backend, device = fused
    inputs = leaves(device)
    results = stickbreaking_attention(*inputs, enable_gqa=True, backend=backend)
    expected = stickbreaking_attention(*inputs, enable_gqa=True, backend="naive")
    for a, b in zip(results, expected, strict=True):
        for x, y in zip(
            torch.autograd.grad(a.sum(), inputs, retain_graph=True),
            torch.autograd.grad(b.sum(), inputs, retain_graph=True, materialize_grads=True),
            strict=True,
        ):
            torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)


def test_nothing_is_kept_for_a_backward_pass_that_cannot_come(fused: tuple[str, str]) -> None:
    backend, device = fused
    kept: list[bool] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is torch.ops.sbattn.dense.default:
                kept.append(args[9])
            return func(*args, **(kwargs or {}))

    inputs = leaves(device)
    constants = [x.detach() for x in inputs]
    with Watch():
        stickbreaking_attention(*inputs, enable_gqa=True, backend=backend)
        stickbreaking_attention(*constants, enable_gqa=True, backend=backend)
        with torch.no_grad():
            stickbreaking_attention(*inputs, enable_gqa=True, backend=backend)
    assert kept == [True, False, False]
    options = (None, 0.5, 2, False, None, 0.0, False, False, backend)
    _, _, edges, stop = ops.dense(*constants, *options)
    assert edges.numel() == stop.numel() == 0


def test_a_backward_pass_through_an_operator_that_kept_nothing_is_refused() -> None:
    options = (None, 0.5, 2, False, None, 0.0, False, False, "chunked")
    out, *_ = ops.dense(*leaves("cpu"), *options)
    with pytest.raises(UnsupportedError, match="save: the forward pass kept nothing"):
        out.sum().backward()


def test_activation_checkpointing_gives_the_same_gradients(fused: tuple[str, str]) -> None:
    backend, device = fused
    inputs = leaves(device)

    def program(*x: Tensor) -> Tensor:
        return stickbreaking_attention(*x, enable_gqa=True, backend=backend)[0]

    def checkpointed(*x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(program, *x, use_reentrant=False)

    for a, b in zip(both_ways(program, inputs), both_ways(checkpointed, inputs), strict=True):
        assert torch.equal(a, b)
