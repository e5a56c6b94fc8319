"""vineppo x gsm-compose: does credit for single sentences close the second hop?

A tiny Llama that has learnt one-hop problems from scratch fails where the answer to one is a number
of the next. Reinforcement sees only whether the final answer is right: RLOO credits all tokens of
an answer alike, VinePPO asks of every sentence whether it made that likelier. By vineppo alone one
sees the reward rise. By gsm-compose one sees whether composing was learnt: on pairs of templates
that were never composed, with numbers that they were never trained on. Each question is also asked
alone, and what is missing is split into distraction, the second hop itself, and luck.
"""

from __future__ import annotations

import copy
import functools
import random
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gsm_compose.learning.examples import EOS_ID, ONE_HOP, PAD_ID, composition, encode, words
from gsm_compose.learning.experiment import rates
from gsm_compose.learning.measuring import held_out_pairs, measure
from gsm_compose.learning.problems import Pair, draw_pair, is_held_out
from gsm_compose.learning.training import TrainingConfig, build, train
from gsm_compose.rewards import composition_reward
from vineppo import RLOOConfig, RLOOTrainer, VinePPOConfig, VinePPOTrainer

K, GROUP = 9, 4
LONGEST = 32  # tokens of an answer; a right one has 30, with the one that ends it


class Sentences:
    """A step is a sentence with its mark, whatever comes next; for vineppo, on ids."""

    def segment_ids(self, ids: Sequence[int]) -> list[int]:
        """Where sentences begin, and where the last one ends."""
        (mark,) = encode(".")
        return [0, *(i for i in range(1, len(ids)) if ids[i - 1] == mark), len(ids)]


def tokenizer() -> PreTrainedTokenizerFast:
    """The words of gsm-compose's language under its own ids, for whoever wants a tokenizer."""
    built = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words())}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token=words()[PAD_ID],
        eos_token=words()[EOS_ID],
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@functools.cache  # arms of a seed start from the same model; half a megabyte each
def start(seed: int, steps: int, share: float) -> Any:
    """Fine-tuned from scratch on one-hop problems, in the second half with a few compositions."""
    config = TrainingConfig(steps=steps)
    one_hop = {kind: (1 - share) * of for kind, of in ONE_HOP.items()}
    model = build(config, seed)
    for _ in train(model, config, (ONE_HOP, {**one_hop, "composition": share}), "cot", seed):
        pass
    return model


def apart(learnt: Sequence[Pair], tested: Sequence[Pair]) -> bool:
    """Whether tested pairs are of other templates, with numbers that no training draws for them.

    A hash keeps an eighth of all templates with numbers for tests. Fine-tuning, too, draws from the
    rest, and composes templates of group A alone, as reinforcement does.
    """
    of = [{q for pair in pairs for q in (pair.q1, pair.q2)} for pairs in (learnt, tested)]
    kept = [{is_held_out(q.template, q.a, q.b) for q in some} for some in of]
    templates = [{q.template for q in some} for some in of]
    return kept == [{False}, {True}] and not templates[0] & templates[1]


def learn(
    *, arm: str, seed: int, steps: int, share: float, iterations: int, episodes: int, rate: float,
    pairs: int,
) -> dict[str, Any]:  # fmt: skip
    """Reinforce one model by one method; S1, S2, S_comp and the parts of the gap before and after.

    Arms of a seed share the model, the prompts in their order, and the pairs they are tested on.
    """
    torch.set_num_threads(1)
    model = copy.deepcopy(start(seed, steps, share))
    rng = random.Random(f"compositions of {seed}")
    count = iterations * episodes // GROUP  # prompts, each asked once
    learnt = [draw_pair(rng, ("A",), held_out=False) for _ in range(count)]
    tested = held_out_pairs(seed, pairs)
    assert apart(learnt, tested)
    texts = [composition(pair, "cot").prompt for pair in learnt]
    rows = [
        {"prompt": text, "prompt_ids": encode(text), "gold_final": pair.q2.answer}
        for text, pair in zip(texts, learnt, strict=True)
    ]
    before = rates(measure(model, tested, "cot"))
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder, "iterations": iterations, "episodes_per_iteration": episodes,
            "num_generations": GROUP, "temperature": 1.0, "top_p": 1.0, "learning_rate": rate,
            "mini_batch_size": episodes // 2, "micro_batch_size": episodes // 2, "seed": seed,
            "max_response_tokens": LONGEST, "beta": 0.01, "progress": False, "use_cpu": True,
            "whiten": "std",  # about the mean, tokens without credit would get some
        }  # fmt: skip
        given = (model, None, composition_reward, rows, tokenizer())
        trainer: Any
        if arm == "VinePPO":
            args = VinePPOConfig(num_rollouts=K, **settings)
            trainer = VinePPOTrainer(*given, args, segmenter=Sentences())
        else:
            trainer = RLOOTrainer(*given, RLOOConfig(**settings))
        history = trainer.train().history
    return {
        "before": before,
        "after": rates(measure(trainer.model, tested, "cot")),
        "reward": [row["reward"] for row in history],
        "tokens": history[-1]["total_generated_tokens"],
    }
