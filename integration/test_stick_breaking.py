"""The operator with its kernels, and with the generation engine, from their wheels."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, SmolLM3Config

from decapod.lm import Request, SamplingParams, TransformersEngine
from sbattn.integrations.transformers import register, without_rotary

# Triton reads the variable when it is imported, so this needs a process of its own.
KERNELS = """
import torch
from sbattn import stickbreaking_attention
torch.manual_seed(0)
def gradients(backend):
    leaves = [torch.randn(1, h, 48, 16, generator=torch.Generator().manual_seed(h)).requires_grad_()
              for h in (2, 1, 1)]
    out, rem = stickbreaking_attention(*leaves, enable_gqa=True, backend=backend)
    return (out, rem, *torch.autograd.grad(out.square().sum() + rem.sum(), leaves))
for name, x, y in zip(("out", "rem", "dq", "dk", "dv"), gradients("triton"), gradients("naive")):
    torch.testing.assert_close(x, y, atol=2e-5, rtol=2e-5, msg=name)
print("agree")
"""


def test_the_wheel_of_the_operator_finds_the_wheel_of_its_kernels() -> None:
    run = subprocess.run(
        [sys.executable, "-c", KERNELS],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "agree\n"


def test_the_engine_generates_with_a_model_that_breaks_sticks() -> None:
    register()
    config = without_rotary(
        SmolLM3Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        )
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="stickbreaking")
    engine = TransformersEngine(model)
    greedy = SamplingParams(max_new_tokens=12, temperature=0.0)
    # Prompts of different lengths share a batch, and two of them a beginning.
    prompts = [[5, 9, 3, 17, 22, 8], [5, 9, 3, 17, 41], [30, 2]]
    together = engine.generate([Request(prompt, greedy) for prompt in prompts])
    for prompt, completion in zip(prompts, together, strict=True):
        tokens = torch.tensor([prompt])
        alone = model.generate(tokens, max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert list(completion.token_ids) == alone.tolist()
