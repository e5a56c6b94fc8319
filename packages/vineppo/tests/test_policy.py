"""The policy's outputs stand where tokens are chosen, whatever pads, wraps or drops."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("decapod.lm")
pytest.importorskip("transformers")

from vineppo.batch import Response, at_tokens, collate
from vineppo.errors import InvalidInputError
from vineppo.policy import PolicyWithCritic, Reference, eos_token_ids, without_dropout

RESPONSES = [
    Response((1, 4, 5), (6, 7, 2)),
    Response((1, 8), (9,)),
    Response((1, 4, 5, 6, 4), (4, 4, 3, 2)),
]


@pytest.fixture
def policy(tiny: Any) -> Any:
    return tiny.model()


def naive_logprobs(model: Any, response: Response, temperature: float) -> list[float]:
    """Of each response token, by a pass over everything before it."""
    ids, found = list(response.prompt_ids), []
    for token in response.response_ids:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1] / temperature
        found.append(float(logits.log_softmax(-1)[token]))
        ids.append(token)
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("critic", [None, "copy", "shared"])
def test_padded_logprobs_are_those_of_single_tokens(
    policy: Any, temperature: float, critic: str | None
) -> None:
    rows = collate(RESPONSES, 0)
    with torch.no_grad():
        logprobs, values = PolicyWithCritic(policy, critic)(
            rows.input_ids, rows.attention_mask, temperature
        )
    assert (values is None) == (critic is None)
    assert logprobs.dtype == torch.float64
    for found, response in zip(at_tokens(logprobs, rows.mask), RESPONSES, strict=True):
        expected = naive_logprobs(policy, response, temperature)
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("critic", ["copy", "shared"])
def test_values_are_those_of_the_state_before_each_token(policy: Any, critic: str) -> None:
    module = PolicyWithCritic(policy, critic)
    rows = collate(RESPONSES, 0)
    with torch.no_grad():
        _, values = module(rows.input_ids, rows.attention_mask)
        assert not values.any()  # heads start at zero
        module.head.weight.normal_(generator=torch.Generator().manual_seed(0))
        module.head.bias.fill_(0.5)
        _, values = module(rows.input_ids, rows.attention_mask)
        for found, response in zip(at_tokens(values, rows.mask), RESPONSES, strict=True):
            for place, value in enumerate(found):
                state = response.prompt_ids + response.response_ids[:place]
                hidden = policy.model(torch.tensor([state])).last_hidden_state[0, -1]
                assert value == pytest.approx(float(module.head(hidden)), abs=1e-12)


def test_a_copied_critic_shares_no_weight_and_a_shared_one_is_a_head(policy: Any) -> None:
    copied, shared = PolicyWithCritic(policy, "copy"), PolicyWithCritic(policy, "shared")
    own = {id(p) for p in policy.parameters()}
    of_critic = dict(copied.critic_parameters())
    assert not own & {id(p) for p in of_critic.values()}
    assert len(of_critic) == len(list(policy.model.parameters())) + 2
    assert all(p.requires_grad for p in of_critic.values())
    for name, p in policy.model.named_parameters():
        assert torch.equal(of_critic[f"trunk.{name}"], p)
    assert [name for name, _ in shared.critic_parameters()] == ["head.weight", "head.bias"]
    assert list(PolicyWithCritic(policy).critic_parameters()) == []


def test_the_critic_of_a_copy_does_not_move_the_policy(policy: Any) -> None:
    rows = collate(RESPONSES, 0)
    for critic, moves in (("copy", False), ("shared", True)):
        module = PolicyWithCritic(policy, critic)
        torch.nn.init.ones_(module.head.weight)
        _, values = module(rows.input_ids, rows.attention_mask)
        policy.zero_grad()
        values[rows.mask].sum().backward()
        grads = [p.grad for p in policy.parameters() if p.grad is not None]
        assert any(bool(g.any()) for g in grads) == moves


@pytest.mark.parametrize("pad", [0, 2, 5])
def test_padding_is_read_by_nothing(policy: Any, pad: int) -> None:
    module = PolicyWithCritic(policy, "shared")
    torch.nn.init.ones_(module.head.weight)
    found = []
    for token in (0, pad):
        rows = collate(RESPONSES, token)
        logprobs, values = module(rows.input_ids, rows.attention_mask)
        policy.zero_grad()
        (logprobs * rows.mask + values * rows.mask).sum().backward()
        grads = {n: p.grad.clone() for n, p in policy.named_parameters()}
        found.append((logprobs[rows.mask], values[rows.mask], grads))
    (lp, v, g), (other_lp, other_v, other_g) = found
    assert torch.equal(lp, other_lp)
    assert torch.equal(v, other_v)
    assert all(torch.equal(g[name], other_g[name]) for name in g)


def test_collation_puts_numbers_where_tokens_are_chosen() -> None:
    given = [
        Response(
            (1, 4), (5, 6, 2), np.array([1.0, 2.0, 3.0]), old_values=np.array([7.0, 8.0, 9.0])
        ),
        Response((1, 4, 5), (2,), np.array([4.0]), old_values=np.array([5.0])),
    ]
    rows = collate(given, 0, torch.float64)
    assert rows.input_ids.tolist() == [[1, 4, 5, 6, 2], [1, 4, 5, 2, 0]]
    assert rows.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert rows.mask.tolist() == [[False, True, True, True], [False, False, True, False]]
    assert rows.per_token["advantages"].tolist() == [[0, 1, 2, 3], [0, 0, 4, 0]]
    assert rows.per_token["old_values"].tolist() == [[0, 7, 8, 9], [0, 0, 5, 0]]
    assert rows.per_token.keys() == {"advantages", "old_values"}
    assert [list(a) for a in at_tokens(rows.per_token["advantages"], rows.mask)] == [[1, 2, 3], [4]]
    assert rows.to("cpu").per_token["advantages"].dtype == torch.float64


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=10, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.5,
        embd_pdrop=0.5, attn_pdrop=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).double()


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, attention_dropout=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_no_dropout_is_left(make: Any, checkpointing: bool) -> None:
    ids = torch.tensor([[1, 4, 5, 6, 7, 8]])
    model = make()
    plain = model.eval()(ids).logits.detach()
    assert not torch.equal(model.train()(ids).logits.detach(), plain)
    prepared = without_dropout(model, gradient_checkpointing=checkpointing)
    assert prepared.training == checkpointing
    assert torch.equal(prepared(ids, use_cache=False).logits.detach(), plain)


def test_checkpointed_gradients_are_those_of_plain_passes() -> None:
    ids = torch.tensor([[1, 4, 5, 6, 7, 8]])
    grads = []
    for checkpointing in (False, True):
        model = without_dropout(llama(), gradient_checkpointing=checkpointing)
        calls: list[int] = []
        model.model.layers[0].self_attn.register_forward_hook(lambda *_, c=calls: c.append(1))
        model(ids, use_cache=False).logits.square().sum().backward()
        assert len(calls) == 1 + checkpointing  # computed twice
        grads.append([p.grad for p in model.parameters()])
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right, atol=1e-12, rtol=0)


def test_the_reference_is_a_frozen_copy_unless_one_is_given(tiny: Any, policy: Any) -> None:
    ids = torch.tensor([[1, 4, 5]])
    before = policy(ids).logits.detach()
    reference = Reference(policy, None)
    with torch.no_grad():
        policy.lm_head.weight.mul_(2)
    with reference() as module:
        assert torch.equal(module.policy(ids).logits, before)
        assert not any(p.requires_grad for p in module.parameters())
    assert all(p.requires_grad for p in policy.parameters())
    other = tiny.model(seed=1)
    with Reference(policy, other)() as module:
        assert module.policy is other
    with pytest.raises(InvalidInputError, match="ref_model: expected another object than model"):
        Reference(policy, policy)


def test_tokens_that_end_an_answer_are_those_of_model_and_tokenizer(tiny: Any) -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    assert eos_token_ids(model, tokenizer) == {tiny.EOS}
    model.generation_config.eos_token_id = [2, 7]
    assert eos_token_ids(model, tokenizer) == {2, 7}
    tokenizer.eos_token = "="
    assert eos_token_ids(model, tokenizer) == {2, 7, tokenizer.convert_tokens_to_ids("=")}
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(InvalidInputError, match="processing_class: expected a tokenizer with an E"):
        eos_token_ids(model, tokenizer)
