"""Run by hand in an environment that holds this package alone: `python smoke.py`."""

import torch

import sbattn


def named_extra() -> str:
    """The remedy that the Triton backend names where its extra is not installed."""
    x = torch.ones(1, 1, 4, 8)
    try:
        sbattn.stickbreaking_attention(x, x, x, backend="triton")
    except ImportError as error:
        return str(error).rpartition(": ")[2]
    return "none: the extra is installed"


def main() -> None:
    """Attend, differentiate, decode, generate, and meet the error of a missing extra."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 16, generator=generator).requires_grad_() for _ in range(3))
    out, rem = sbattn.stickbreaking_attention(q, k, v)
    weights, _ = sbattn.stickbreaking_weights(q, k)
    assert torch.allclose(out, weights @ v, atol=1e-5)
    assert torch.allclose(weights.sum(-1) + rem, torch.ones_like(rem), atol=1e-5)
    (out.sum() + rem.sum()).backward()
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v))

    last, cache_k, cache_v = (x.detach().transpose(1, 2) for x in (q[:, :, -1:], k, v))
    step, _ = sbattn.stickbreaking_decode(last, cache_k, cache_v, cache_seqlens=300)
    assert torch.allclose(step[:, 0], out[:, :, -1], atol=1e-5)

    model = sbattn.CausalLM(sbattn.ModelConfig(vocab_size=16))
    assert model.generate(torch.zeros(1, 3, dtype=torch.long), 5).shape == (1, 8)
    assert named_extra() == 'pip install "sbattn[triton]"'
    live = sbattn.live_tile_fraction(q, k, tile=(32, 32)).mean()
    print(f"sbattn {sbattn.__version__}: {live:.0%} of the tiles visited")


if __name__ == "__main__":
    main()
