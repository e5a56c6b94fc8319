"""Texts and chats at the rim of an engine that knows tokens only."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from decapod.lm.engine import GenerationEngine, Request, SamplingParams, request_seed
from decapod.seeding import Seeds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
Prompt = str | Sequence[Message]


class TextGenerator:
    """A function from prompts to answers, ``generate(prompts) -> texts``, for evaluation.

    A prompt is a text or a chat (messages with ``role`` and ``content``), which goes through the
    tokenizer's chat template up to where the assistant begins. Texts get the special tokens that
    the tokenizer adds by itself; chats get those of the template alone. Answers come without
    special tokens and end before the first of ``params.stop``.

    The seed of an answer comes from ``seed``, the prompt, and how many equal prompts stand before
    it in the same call: cutting a list of prompts into other calls changes no answer to a prompt
    that occurs once.

    Args:
        engine: any generation engine; one that can read ``params.stop`` if that is set.
        tokenizer: the model's own.
        params: how to draw and when to stop.
        seed: root of all seeds.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        tokenizer: PreTrainedTokenizerBase,
        params: SamplingParams | None = None,
        seed: int = 0,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.params = params or SamplingParams()
        self.seed = seed

    def __call__(self, prompts: Sequence[Prompt]) -> list[str]:
        """Answers in the order of the prompts.

        Raises:
            RequestError: a prompt is too long or becomes no token at all; its ``index`` is the
                place of the prompt.
            EngineError: generation failed.
            ValueError: a chat, and the tokenizer has no chat template.
        """
        requests = [
            Request(self._encode(prompt), self.params, seed, index)
            for index, (prompt, seed) in enumerate(
                zip(prompts, prompt_seeds(prompts, self.seed), strict=True)
            )
        ]
        return [self._decode(answer.token_ids) for answer in self.engine.generate(requests)]

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        tokenizer = cast(Any, self.tokenizer)
        if isinstance(prompt, str):
            return tuple(tokenizer(prompt)["input_ids"])
        text = tokenizer.apply_chat_template(
            [dict(message) for message in prompt], add_generation_prompt=True, tokenize=False
        )
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, token_ids: tuple[int, ...]) -> str:
        text = cast(Any, self.tokenizer).decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return cut(text, self.params.stop)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text in it; all of it when there is none."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def prompt_seeds(prompts: Sequence[Prompt], seed: int) -> list[int]:
    """A request's seed for each prompt, from its content and its number among equal ones."""
    seeds = Seeds(seed).child("decapod.lm")
    before: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        name = (
            prompt
            if isinstance(prompt, str)
            else json.dumps([dict(message) for message in prompt], sort_keys=True)
        )
        found.append(request_seed(seeds, name, before[name]))
        before[name] += 1
    return found
