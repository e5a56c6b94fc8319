"""The rewards of a run: TRL's reward functions and reward models, weighted, checked, recorded.

What a function answers is checked before it can reach a gradient: a score is a finite number, or it
is an error with the name of the function and the row (:mod:`asyncrlhf.reward_calls`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import numpy.typing as npt

from asyncrlhf.errors import InvalidInputError, RewardError
from asyncrlhf.model_rewards import is_model, model_reward
from asyncrlhf.reward_calls import Answer, Call, FloatArray, Prompt, call_all, read, unwrapped
from asyncrlhf.settings import OnRewardError

# Columns that a reward function does not get, as in TRL, or gets from us.
_NOT_PASSED: Final = frozenset(("prompt", "completion", "prompt_ids"))


@dataclass(frozen=True)
class Rewards:
    """Scores of n completions.

    Attributes:
        scores: ``[n]`` float64, weighted sum over functions, or the score of a completion that did
            not end; NaN where not ``valid``.
        valid: ``[n]`` bool; False where a function failed (only with ``on_error="drop"``).
        table: what each function gave, ``[n]`` float64; NaN where it was not applicable or failed.
        seconds: that each function took.
        problems: what failed, one sentence each.
        metrics: means of what functions gave to ``log_metric``.
        extra: columns that functions gave to ``log_extra``.
    """

    scores: FloatArray
    valid: npt.NDArray[np.bool_]
    table: dict[str, FloatArray] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)


class RewardSuite:
    """All rewards of a run; called with the completions of a round.

    Reward models (of transformers, for sequence classification, with one label) score prompt and
    completion together. One without a tokenizer of its own shares the policy's vocabulary and is
    given the very token ids, end-of-sequence token included; others are given the joined texts,
    as in TRL, without it.

    Args:
        reward_funcs: one or several functions, reward models, or paths (names) of reward models.
        weights: of each; None: 1.
        tokenizer: of the policy.
        reward_tokenizers: of each; None where it is no model, or for the tokenizer saved beside it.
        on_error: what to do when a function raises or gives what is no score: ``"raise"``, or
            ``"drop"`` the completions concerned.
        missing_eos_score: score of completions that did not end, whatever the functions say (the
            paper's -1); None: what they say.
        batch_size: sequences per pass of a reward model.
        timeout: seconds that an ``async`` function may take.
        device: where reward models go that are given as paths; None leaves them on the CPU.

    Raises:
        InvalidInputError: no function, something that is none, or numbers that do not fit.
    """

    def __init__(
        self,
        reward_funcs: Any,
        *,
        weights: Sequence[float] | None = None,
        tokenizer: Any,
        reward_tokenizers: Any = None,
        on_error: str = "raise",
        missing_eos_score: float | None = -1.0,
        batch_size: int = 64,
        timeout: float = 600.0,
        device: str | None = None,
    ) -> None:
        self.functions: list[Any] = _listed(reward_funcs)
        if not self.functions:
            raise InvalidInputError("reward_funcs: expected at least one function, got none")
        n = len(self.functions)
        self.names = _names(self.functions)
        self.weights = [1.0] * n if weights is None else [float(weight) for weight in weights]
        self.reward_tokenizers: list[Any] = (
            [None] * n if reward_tokenizers is None else _listed(reward_tokenizers)
        )
        for name, values in (("weights", self.weights), ("tokenizers", self.reward_tokenizers)):
            if len(values) != n:
                raise InvalidInputError(
                    f"reward_{name}: expected one for each of {n} reward functions "
                    f"({', '.join(self.names)}), got {len(values)}"
                )
        if not all(math.isfinite(weight) for weight in self.weights):
            raise InvalidInputError(f"reward_weights: expected finite numbers, got {self.weights}")
        if on_error not in get_args(OnRewardError):
            raise InvalidInputError(
                f"on_error: expected one of {', '.join(get_args(OnRewardError))}, got {on_error!r}"
            )
        if missing_eos_score is not None and not math.isfinite(missing_eos_score):
            raise InvalidInputError(
                f"missing_eos_score: expected a finite number or None, got {missing_eos_score}"
            )
        if batch_size < 1 or not timeout > 0:
            raise InvalidInputError(
                f"batch_size, timeout: expected at least 1 and above 0, got {batch_size} and "
                f"{timeout}"
            )
        self.tokenizer = tokenizer
        self.on_error = on_error
        self.missing_eos_score = missing_eos_score
        self.batch_size = batch_size
        self.timeout = timeout
        self.device = device
        self._ready: list[Callable[..., Any]] | None = None

    def with_functions(self, functions: Sequence[Any]) -> RewardSuite:
        """The same with other functions in the places of these, under the same names."""
        if len(functions) != len(self.functions):
            raise InvalidInputError(
                f"functions: expected {len(self.functions)}, got {len(functions)}"
            )
        other = copy.copy(self)
        other.functions = list(functions)
        other._ready = None
        return other

    def __getstate__(self) -> dict[str, Any]:
        # Models that were loaded from paths are loaded again where they are needed.
        return {**self.__dict__, "_ready": None}

    def prepare(self) -> None:
        """Load the models that were given as paths; otherwise the first call does.

        Raises:
            InvalidInputError: a model cannot be loaded, or is none that scores.
        """
        if self._ready is None:
            self._ready = [
                model_reward(
                    function,
                    tokenizer,
                    self.tokenizer,
                    name=name,
                    batch_size=self.batch_size,
                    device=self.device,
                )
                if isinstance(function, str | Path) or is_model(function)
                else function
                for function, name, tokenizer in zip(
                    self.functions, self.names, self.reward_tokenizers, strict=True
                )
            ]

    def probe(self, prompt: Prompt, prompt_ids: Sequence[int], row: Mapping[str, Any]) -> None:
        """Call everything once with an empty completion that has ended, before work starts.

        Args:
            prompt: text or messages.
            prompt_ids: its token ids.
            row: the other columns of its row.

        Raises:
            RewardError: a function fails, whatever ``on_error`` says.
            InvalidInputError: as :meth:`prepare`.
        """
        self.prepare()
        end = self.tokenizer.eos_token_id  # of the model alone, perhaps
        strict = copy.copy(self)
        strict.on_error, strict._ready = "raise", self._ready
        strict(
            prompts=[prompt],
            prompt_ids=[prompt_ids],
            completion_ids=[[] if end is None else [end]],
            has_eos=[True],
            columns={name: [value] for name, value in row.items()},
        )

    def __call__(
        self,
        *,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        has_eos: Sequence[bool] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        trainer_state: Any = None,
    ) -> Rewards:
        """Score completions; all arguments have a row for each.

        Args:
            prompts: texts, or messages.
            prompt_ids: token ids of the prompts.
            completion_ids: token ids up to and with the first that ends an answer.
            has_eos: whether each ended; None: whether its last token is the tokenizer's
                end-of-sequence token.
            columns: of the data set, passed on by name.
            trainer_state: passed on.

        Raises:
            RewardError: a function failed, with ``on_error="raise"``.
            InvalidInputError: rows that do not belong together, or a name that cannot be passed on.
        """
        self.prepare()
        assert self._ready is not None
        if has_eos is None:
            eos = self.tokenizer.eos_token_id
            has_eos = [bool(len(ids)) and ids[-1] == eos for ids in completion_ids]
        passed = {k: v for k, v in (columns or {}).items() if k not in _NOT_PASSED}
        call = Call(
            prompts=list(prompts),
            prompt_ids=[list(ids) for ids in prompt_ids],
            completions=self._completions(prompts, completion_ids),
            completion_ids=[list(ids) for ids in completion_ids],
            columns={name: list(values) for name, values in passed.items()},
            trainer_state=trainer_state,
        )
        call.check(len(has_eos))
        return self._combined(
            call, call_all(self._ready, call, self.timeout), np.asarray(has_eos, dtype=np.bool_)
        )

    # --- calling ----------------------------------------------------------------------------------

    def _completions(
        self, prompts: Sequence[Prompt], completion_ids: Sequence[Sequence[int]]
    ) -> list[Any]:
        texts = self.tokenizer.batch_decode(
            [list(ids) for ids in completion_ids], skip_special_tokens=True
        )
        if not prompts or isinstance(prompts[0], str):
            return list(texts)
        return [[{"role": "assistant", "content": text}] for text in texts]

    def _combined(
        self, call: Call, answers: Sequence[Answer], has_eos: npt.NDArray[np.bool_]
    ) -> Rewards:
        n = len(call.prompts)
        problems: list[str] = []
        failed = np.zeros(n, dtype=np.bool_)
        table: dict[str, FloatArray] = {}
        for name, answer in zip(self.names, answers, strict=True):
            values, found = read(name, answer.output, call)
            if found and self.on_error == "raise":
                cause = answer.output if isinstance(answer.output, Exception) else None
                raise RewardError(next(iter(found.values()))) from cause
            failed[list(found)] = True
            problems += dict.fromkeys(found.values())
            table[name] = values
        given = np.stack(list(table.values()))
        scores = np.nansum(np.asarray(self.weights)[:, None] * given, axis=0)
        nothing = np.isnan(given).all(axis=0) & ~failed
        if self.missing_eos_score is not None:
            scores = np.where(has_eos, scores, self.missing_eos_score)
            failed, nothing = failed & has_eos, nothing & has_eos
        if nothing.any():
            row = int(nothing.argmax())
            problem = (
                f"reward functions {', '.join(self.names)}: all of them answered None for row "
                f"{row} ({call.shown(row)}); expected at least one number per completion"
            )
            if self.on_error == "raise":
                raise RewardError(problem)
            problems.append(problem)
        valid = ~(failed | nothing)
        return Rewards(
            np.where(valid, scores, np.nan),
            valid,
            table,
            {name: answer.seconds for name, answer in zip(self.names, answers, strict=True)},
            tuple(problems),
            {name: sum(values) / len(values) for name, values in call.metrics.items()},
            call.extra,
        )


def check_picklable(suite: RewardSuite) -> None:
    """Refuse reward functions that cannot be sent to another process, before one is started.

    Functions of scripts, lambdas and closures can: they travel as code.

    Raises:
        InvalidInputError: with the name of the function and the reason.
    """
    from asyncrlhf.processes import packed

    for name, function in zip(suite.names, suite.functions, strict=True):
        packed(function, f"reward_funcs: {name}")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _names(functions: Sequence[Any]) -> list[str]:
    """A name for each, as TRL logs them, with a number where several have the same."""
    names = []
    for place, function in enumerate(functions):
        if isinstance(function, str | Path):
            name = str(function).rstrip("/").split("/")[-1]
        elif is_model(function):
            path = getattr(function.config, "name_or_path", "")
            name = path.rstrip("/").split("/")[-1] or type(function).__name__
        elif callable(function):
            inner = unwrapped(function)
            name = getattr(inner, "__name__", type(inner).__name__)
        else:
            raise InvalidInputError(
                f"reward_funcs[{place}]: expected a function, a reward model or a path, got "
                f"{function!r}"
            )
        names.append(name)
    unique: list[str] = []
    for name in names:
        number, tried = 1, name
        while tried in unique:
            number += 1
            tried = f"{name}_{number}"
        unique.append(tried)
    return unique
