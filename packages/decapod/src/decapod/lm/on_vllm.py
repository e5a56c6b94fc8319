"""Generation with vLLM in this process."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import vllm

from decapod.lm.engine import (
    Completion,
    EngineError,
    LogprobsError,
    LogprobsOf,
    Request,
    RequestError,
    check_requests,
)

if TYPE_CHECKING:
    import torch

_LOGPROBS_OF: dict[str, LogprobsOf] = {"raw_logprobs": "model", "processed_logprobs": "sampler"}


class VLLMEngine:
    """A ``vllm.LLM`` behind :class:`decapod.lm.GenerationEngine`.

    vLLM draws with a generator of its own per request, so answers are as independent of the batch
    as its arithmetic is, but other ones than :class:`TransformersEngine` draws. Among equally
    probable tokens, ``top_k`` keeps all.

    Whose log-probabilities it can give is decided when the model is made: those of the model by
    default, those of the sampler with ``LLM(..., logprobs_mode="processed_logprobs")``.

    Args:
        llm: the model, made with whatever vLLM's options the machine needs.

    Attributes:
        cached_prompt_tokens: of all requests so far, the tokens of their prompts whose keys and
            values vLLM had in its prefix cache.

    Raises:
        ValueError: ``llm`` reports logits in place of log-probabilities.
    """

    def __init__(self, llm: vllm.LLM) -> None:
        config = llm.llm_engine.model_config
        if config.logprobs_mode not in _LOGPROBS_OF:
            raise ValueError(
                "llm: expected logprobs_mode='raw_logprobs' (log-probabilities of the model) or "
                "'processed_logprobs' (of the sampler), got "
                f"{config.logprobs_mode!r}; make vllm.LLM with one of the two"
            )
        self.logprobs_of: LogprobsOf = _LOGPROBS_OF[config.logprobs_mode]
        self.llm = llm
        self.cached_prompt_tokens = 0
        self.max_length: int = config.max_model_len
        self.vocab_size: int = config.get_vocab_size()

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load a state dict with the names of transformers, and forget all cached prefixes.

        The tensors are handed over in memory, for which vLLM's engine must run in this process:
        ``VLLM_ENABLE_V1_MULTIPROCESSING=0`` in the environment before vLLM is imported.

        Raises:
            EngineError: cached prefixes could not be forgotten.
        """
        self.llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": list(weights.items())}
        )
        if not self.llm.reset_prefix_cache():
            raise EngineError("vLLM did not empty its prefix cache: answers would mix weights")

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answers in the order of the requests; see :class:`decapod.lm.GenerationEngine`.

        Raises:
            RequestError: a request cannot be served; nothing was generated.
            LogprobsError: the model gave log-probabilities that are not numbers.
        """
        check_requests(requests, vocab_size=self.vocab_size, max_length=self.max_length)
        for index, request in enumerate(requests):
            wanted = request.params.logprobs_of
            if wanted != self.logprobs_of and not request.params.draws_from_model:
                mode = next(mode for mode, of in _LOGPROBS_OF.items() if of == wanted)
                raise RequestError(
                    index, request.id, f"params.logprobs_of: this vllm.LLM gives those of the "
                    f"{self.logprobs_of}, got {wanted!r}; make it with logprobs_mode={mode!r}, or "
                    f"ask for {self.logprobs_of!r}"
                )  # fmt: skip
        if not requests:
            return []
        # Prompts that begin alike stand together, so that cached blocks are still there.
        order = sorted(range(len(requests)), key=lambda i: requests[i].prompt)
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(requests[i].prompt)} for i in order],
            [_params(requests[i]) for i in order],
            use_tqdm=False,
        )
        self.cached_prompt_tokens += sum(output.num_cached_tokens or 0 for output in outputs)
        answers = {
            i: _completion(requests[i], output.outputs[0])
            for i, output in zip(order, outputs, strict=True)
        }
        return [answers[i] for i in range(len(requests))]


def _params(request: Request) -> vllm.SamplingParams:
    params = request.params
    return vllm.SamplingParams(
        max_tokens=params.max_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=request.seed,
        stop_token_ids=list(params.stop_token_ids),
        stop=list(params.stop),
        ignore_eos=params.ignore_eos,
        logprobs=0,
        detokenize=bool(params.stop),
    )


def _completion(request: Request, output: Any) -> Completion:
    token_ids = tuple(output.token_ids)
    logprobs = tuple(
        float(here[token].logprob) for token, here in zip(token_ids, output.logprobs, strict=True)
    )
    if any(math.isnan(value) for value in logprobs):
        raise LogprobsError(
            f"request {request.id!r}: the model's log-probabilities are not numbers (NaN); look "
            "for NaN or infinite values among its weights"
        )
    return Completion(
        token_ids, logprobs, "stop" if output.finish_reason == "stop" else "length", request.id
    )
