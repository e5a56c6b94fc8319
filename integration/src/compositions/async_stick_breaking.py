"""asyncrlhf x sbattn: what online DPO teaches on short prompts, and what of it holds on long ones.

Stick-breaking attention (arXiv 2410.17980) was studied in pre-training, asynchronous online DPO
(arXiv 2410.18252) with softmax and positions. Here a policy that has neither learns from its own
samples while an actor draws the next ones with older weights, beside the same model with softmax
and rotary embedding. The task has a gold score at any length: what was learnt can be asked for at
lengths that neither fine-tuning nor DPO has seen.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.nn import functional as F
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from asyncrlhf import AsyncRLHFConfig, AsyncRLHFTrainer
from asyncrlhf.engines import HFEngine
from asyncrlhf.evaluate import evaluate_policy
from asyncrlhf.tasks import SyntheticSummary
from sbattn.integrations.transformers import register, without_rotary

TRAINED, LONGER = (4, 5, 6), (8, 10)  # symbols of a prompt
TASKS = {n: SyntheticSummary(length=n, noise=0.5) for n in (*TRAINED, *LONGER)}
TASK = TASKS[max(TRAINED)]  # they share one vocabulary
TEMPERATURE, BATCH = 0.7, 32
Run = tuple[int, Literal["inline", "process"]]  # rounds ahead, and where the actor is

register()


class Policy(SmolLM3ForCausalLM):  # type: ignore[misc]
    """SmolLM3 as a class of this module: where it is unpickled, ``register`` has been called.

    A registered attention is known in one process only, and the actor's is another.
    """


def policy(attention: str, seed: int) -> Any:
    """Random weights, equal for both kinds of attention; rotary positions with softmax only."""
    config = SmolLM3Config(
        vocab_size=TASK.vocab_size, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        no_rope_layers=[1, 1], rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.05, tie_word_embeddings=False, attn_implementation=attention,
        pad_token_id=TASK.pad_token_id, bos_token_id=None, eos_token_id=TASK.eos_token_id,
    )  # fmt: skip
    if attention == "stickbreaking":
        without_rotary(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Policy(config).float().eval()


def fine_tune(model: Any, seed: int, steps: int, rate: float) -> None:
    """On the task's noisy answers, as ``SyntheticSummary.sft_model`` does it with GPT-NeoX."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        length = TRAINED[step % len(TRAINED)]
        rows = TASKS[length].sft_examples(96, seed * 100_000 + step)
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"] for row in rows])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, length:]
        F.cross_entropy(logits.flatten(0, 1), ids[:, length + 1 :].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def gold(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], **_: Any
) -> list[float]:
    """The score at whichever length a prompt has; both the reward and the measure."""
    return [
        float(TASKS[len(prompt) - 1].gold_score([prompt], [answer])[0])
        for prompt, answer in zip(prompt_ids, completion_ids, strict=True)
    ]


def measured(model: Any, reference: Any, seed: int, prompts: int) -> dict[str, list[float]]:
    """Gold, divergence from the reference and tokens of answers to unseen prompts, by length."""
    rows = [
        evaluate_policy(
            model, reference, gold, [r["prompt_ids"] for r in task.prompts(prompts, seed, "eval")],
            max_new_tokens=task.max_completion_length, temperature=TEMPERATURE, seed=seed)
        for task in TASKS.values()
    ]  # fmt: skip
    return {name: [row[name] for row in rows] for name in ("gold", "kl", "length")}


def train(
    *, attention: str, seed: int, rate: float, runs: Sequence[Run], fine_tuning: int,
    updates: int, prompts: int,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune once; then online DPO from there for each of ``runs``."""
    torch.set_num_threads(1)
    start = policy(attention, seed)
    fine_tune(start, seed, fine_tuning, rate=4e-3)
    each = -(-updates * BATCH // len(TRAINED))  # one pass over the data
    data = [row for n in TRAINED for row in TASKS[n].prompts(each, seed)]
    found: dict[str, Any] = {"start": measured(start, start, seed, prompts), "ends": []}
    for ahead, placement in runs:
        with tempfile.TemporaryDirectory() as folder:
            args = AsyncRLHFConfig(
                output_dir=folder, loss="online_dpo", rounds_ahead=ahead, max_steps=updates,
                per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, seed=seed,
                learning_rate=rate, lr_scheduler_type="constant", temperature=TEMPERATURE,
                max_completion_length=TASK.max_completion_length, logging_steps=10**9,
                save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
            )  # fmt: skip
            trainer = AsyncRLHFTrainer(
                model=copy.deepcopy(start), reward_funcs=gold, args=args, train_dataset=data,
                processing_class=TASK.tokenizer(), engine=HFEngine(placement=placement, threads=1),
            )  # fmt: skip
            trainer.train()
        weights = hashlib.sha256()
        for value in trainer.model.parameters():
            weights.update(value.detach().numpy().tobytes())
        end = measured(trainer.model, start, seed, prompts)
        stale = {str(old): steps for old, steps in trainer.report().staleness.items()}
        found["ends"].append({**end, "weights": weights.hexdigest(), "staleness": stale})
    return found
