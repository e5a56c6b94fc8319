"""Which settings of TRL's GRPO a trainer with token advantages can keep, and how it samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vineppo.errors import InvalidInputError

if TYPE_CHECKING:
    from decapod.lm import SamplingParams

ONE_PER_ANSWER = "it takes one advantage per answer, and here each token has its own"
OTHER_SAMPLER = "rollouts must be drawn as answers are, and backends know nothing of it"


def check_settings(args: Any) -> None:
    """Refuse settings that token advantages or rollouts cannot keep.

    Args:
        args: ``trl.GRPOConfig``.

    Raises:
        InvalidInputError: the first of them, with the remedy.
    """
    refused: list[tuple[str, bool, str, str]] = [
        (
            "importance_sampling_level",
            args.importance_sampling_level == "token",
            "'token'",
            ONE_PER_ANSWER,
        ),
        (
            "loss_type",
            args.loss_type not in ("vespo", "luspo"),
            "'dapo', 'bnpo', 'dr_grpo', 'grpo', 'cispo' or 'sapo'",
            ONE_PER_ANSWER,
        ),
        (
            "off_policy_mask_threshold",
            args.off_policy_mask_threshold is None,
            "None",
            ONE_PER_ANSWER,
        ),
        (
            "multi_objective_aggregation",
            args.multi_objective_aggregation == "sum_then_normalize",
            "'sum_then_normalize'",
            "a rollout has one score, the weighted sum; there is no group to normalise it in",
        ),
        (
            "use_liger_kernel",
            not args.use_liger_kernel,
            "False",
            "its losses take one advantage per answer",
        ),
        ("min_p", not args.min_p, "None", OTHER_SAMPLER),
        ("repetition_penalty", args.repetition_penalty == 1, "1", OTHER_SAMPLER),
        ("generation_kwargs", not args.generation_kwargs, "None", OTHER_SAMPLER),
        (
            "vllm_structured_outputs_regex",
            args.vllm_structured_outputs_regex is None,
            "None",
            OTHER_SAMPLER,
        ),
    ]
    for name, fits, expected, why in refused:
        if not fits:
            raise InvalidInputError(
                f"{name}: expected {expected}, got {getattr(args, name)!r}; {why}"
            )


def check_parts(parts: Mapping[str, Any]) -> None:
    """Refuse tools and environments among the arguments of the trainer.

    Args:
        parts: arguments of ``GRPOTrainer`` by name.

    Raises:
        InvalidInputError: as the name says.
    """
    for name in ("tools", "environment_factory"):
        if parts.get(name):
            raise InvalidInputError(
                f"{name}: expected None, got {parts[name]!r:.60}; a state in the middle of an "
                "answer can be restarted from its tokens only where nothing but the policy writes"
            )


def check_text_only(columns: Iterable[str], vision: object) -> None:
    """Refuse images.

    Args:
        columns: of the data set.
        vision: whether the processing class is one for images.

    Raises:
        InvalidInputError: as the name says.
    """
    images = sorted({"image", "images"} & set(columns))
    if images or vision:
        got = f"the column {images[0]!r}" if images else "a processor of images"
        raise InvalidInputError(
            f"train_dataset, processing_class: expected text, got {got}; rollouts restart from "
            "token ids, which do not hold the picture"
        )


def check_shared_vllm(args: Any) -> None:
    """Refuse to roll out with TRL's own vLLM engine where it is not this process's alone.

    Args:
        args: ``trl.GRPOConfig``.

    Raises:
        InvalidInputError: as the name says.
    """
    if args.vllm_tensor_parallel_size != 1:
        raise InvalidInputError(
            f"vllm_tensor_parallel_size: expected 1, got {args.vllm_tensor_parallel_size}; the "
            "processes that share an engine have different rollouts to ask for. Pass a "
            "ServersBackend as rollout_backend"
        )
    if args.vllm_enable_sleep_mode:
        raise InvalidInputError(
            "vllm_enable_sleep_mode: expected False, got True; TRL puts its engine to sleep, "
            "without weights, before rollouts begin"
        )


def sampling_params(args: Any, eos_token_ids: Iterable[int], backend: Any) -> SamplingParams:
    """How rollouts are drawn: as TRL draws answers.

    Args:
        args: ``trl.GRPOConfig`` that :func:`check_settings` lets pass.
        eos_token_ids: tokens at which the trainer ends an answer.
        backend: that draws them. Nothing here reads log-probabilities, but a vLLM engine gives one
            kind of them and refuses to be asked for the other; TRL's gives the sampler's.
    """
    from decapod.lm import SamplingParams

    engine = getattr(getattr(backend, "llm", None), "llm_engine", None)
    mode = getattr(getattr(engine, "model_config", None), "logprobs_mode", "raw_logprobs")
    return SamplingParams(
        max_new_tokens=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=max(args.top_k or 0, 0),
        stop_token_ids=tuple(eos_token_ids),
        logprobs_of="sampler" if mode == "processed_logprobs" else "model",
    )
