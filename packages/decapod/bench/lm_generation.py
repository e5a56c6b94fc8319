"""Tokens per CPU second of the transformers engine beside `transformers.generate`, on one thread.

    python bench/lm_generation.py [--repeats 5]

Both draw at temperature 1 without cuts, from the same random-weight Llama, in one process, taking
turns; a figure is the median over the repeats. CPU time is what one thread would take on an idle
core, and does not change with what else the machine does. Cases:

- `batch`: 64 prompts of 64 tokens, 64 new tokens each;
- `samples`: 8 prompts of 256 tokens, 8 samples of 64 new tokens each (`num_return_sequences=8`);
- `states`: 12 states along each of 4 trajectories of 192 tokens, 3 samples of 32 new tokens each,
  beside one padded batch of all, and beside one call per state and sample;
- `ends`: as `batch` with up to 256 new tokens, where answers end at EOS, each token with a chance
  of about 1/64; tokens are counted up to each answer's own end.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from record import write
from transformers import LlamaForCausalLM

from decapod.lm import SamplingParams, TransformersEngine, build_model, sample_requests

RESULT = Path(__file__).parent / "results" / "lm_generation.json"
MODELS = {
    "tiny": {"vocab_size": 64, "hidden_size": 64, "layers": 2, "heads": 4},
    "small": {"vocab_size": 4096, "hidden_size": 256, "layers": 4, "heads": 8},
}
Run = Callable[[], int]


def prompts(rows: int, length: int, vocab: int) -> list[list[int]]:
    """Random prompts without special tokens."""
    return np.random.default_rng(0).integers(3, vocab, (rows, length)).tolist()


def ours(model: LlamaForCausalLM, asked: list[list[int]], new: int, n: int, eos: bool) -> Run:
    """A call of the engine; returns the number of tokens."""
    engine = TransformersEngine(model, max_batch_size=256)
    requests = sample_requests(asked, SamplingParams(new, ignore_eos=not eos), n=n)
    return lambda: sum(len(answer.token_ids) for answer in engine.generate(requests))


def theirs(model: LlamaForCausalLM, asked: list[list[int]], new: int, n: int, eos: bool) -> Run:
    """A call of `generate` with padding on the left; tokens after an answer's end do not count."""
    width = max(map(len, asked))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in asked])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in asked])
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": new, "num_return_sequences": n}
    options |= {} if eos else {"min_new_tokens": new}

    def run() -> int:
        out = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)[:, width:]
        ended = (out == 2).long().cumsum(1)
        return int((ended == 0).sum() + (ended[:, -1] > 0).sum()) if eos else out.numel()

    return run


def one_by_one(model: LlamaForCausalLM, asked: list[list[int]], new: int, n: int) -> Run:
    """One call of `generate` per prompt and sample."""
    calls = [theirs(model, [prompt], new, 1, eos=False) for prompt in asked for _ in range(n)]
    return lambda: sum(call() for call in calls)


def cases(model: LlamaForCausalLM) -> dict[str, dict[str, Run]]:
    """What is timed, by case and by who runs it."""
    vocab = model.config.vocab_size
    states = [
        trajectory[:end] for trajectory in prompts(4, 192, vocab) for end in range(16, 193, 16)
    ]
    plain = {
        "batch": (prompts(64, 64, vocab), 64, 1, False),
        "samples": (prompts(8, 256, vocab), 64, 8, False),
        "states": (states, 32, 3, False),
        "ends": (prompts(64, 64, vocab), 256, 1, True),
    }
    found: dict[str, dict[str, Run]] = {
        name: {"decapod": ours(model, *case), "transformers": theirs(model, *case)}
        for name, case in plain.items()
    }
    found["states"]["transformers, one call each"] = one_by_one(model, states, 32, 3)
    return found


def likelier_eos(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Give EOS (2) a chance of about 1/64 among nearly equal ones, whatever the vocabulary."""
    shift = torch.zeros(model.config.vocab_size)
    shift[2] = np.log(model.config.vocab_size / 64)
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits + shift)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for size, shape in MODELS.items():
        model = likelier_eos(build_model(**shape))
        for case, runs in cases(model).items():
            if size == "small":  # minutes of waiting for a figure that the tiny model gives
                runs.pop("transformers, one call each", None)
            rates: dict[str, list[float]] = {name: [] for name in runs}
            for repeat in range(repeats + 1):
                for name, run in runs.items():
                    if name.endswith("each") and repeat > 1:
                        continue
                    started = time.process_time()
                    tokens = run()
                    if repeat:  # the first is a warm-up
                        rates[name].append(tokens / (time.process_time() - started))
            medians = {name: round(statistics.median(values)) for name, values in rates.items()}
            rows.append(
                {
                    "model": size,
                    "case": case,
                    "tokens_per_cpu_second": medians,
                    "lowest": {name: round(min(values)) for name, values in rates.items()},
                    "times_transformers": round(medians["decapod"] / medians["transformers"], 2),
                }
            )
            print(rows[-1], flush=True)
    write(
        RESULT,
        {"threads": 1, "repeats": repeats, "models": MODELS, "cases": rows},
        ("decapod", "torch", "transformers", "numpy"),
    )


if __name__ == "__main__":
    main()
