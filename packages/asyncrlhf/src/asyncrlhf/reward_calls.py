"""Calling reward functions as TRL does, and reading what they answer.

A function is called ``f(prompts=, completions=, completion_ids=, **columns)`` and answers with a
number or None (not applicable) per completion; it may be ``async``. Whatever else comes back
becomes a sentence with the name of the function and the row.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from asyncrlhf.errors import InvalidInputError

FloatArray = npt.NDArray[np.float64]
Prompt = str | Sequence[Mapping[str, str]]

# Names under which every function gets something of ours.
_OURS: Final = frozenset(
    ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
)


@dataclass(frozen=True)
class Call:
    """What all functions are called with, one entry per completion, and what they log.

    Attributes:
        prompts: texts or messages.
        prompt_ids: their token ids.
        completions: texts, or lists of one message.
        completion_ids: their token ids.
        columns: of the data set.
        trainer_state: passed on.
        metrics: given to ``log_metric``.
        extra: given to ``log_extra``.
    """

    prompts: list[Any]
    prompt_ids: list[list[int]]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    trainer_state: Any
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def check(self, flags: int) -> None:
        """Refuse rows that do not belong together.

        Args:
            flags: how many completions there are said to be that ended or not.

        Raises:
            InvalidInputError: numbers of rows that differ, or a column with a name of ours.
        """
        n = len(self.prompts)
        sizes = {
            "prompt_ids": len(self.prompt_ids),
            "completion_ids": len(self.completion_ids),
            "has_eos": flags,
            **{f"columns[{name!r}]": len(values) for name, values in self.columns.items()},
        }
        for name, size in sizes.items():
            if size != n or not n:
                raise InvalidInputError(
                    f"{name}: expected a row for each of the prompts, at least one, got {size} "
                    f"rows and {n} prompts"
                )
        if taken := _OURS & self.columns.keys():
            raise InvalidInputError(
                f"columns: {sorted(taken)} would hide what every reward function is given; rename "
                "them in the data set"
            )

    def arguments(self) -> dict[str, Any]:
        """Keywords of one function; fresh lists, so that none sees what another did to its own."""
        return {
            "prompts": list(self.prompts),
            "completions": list(self.completions),
            "completion_ids": [list(ids) for ids in self.completion_ids],
            "prompt_ids": [list(ids) for ids in self.prompt_ids],
            **{name: list(values) for name, values in self.columns.items()},
            "trainer_state": self.trainer_state,
            "log_extra": self._log_extra,
            "log_metric": self._log_metric,
        }

    def _log_extra(self, column: str, values: Sequence[Any]) -> None:
        self.extra.setdefault(column, []).extend(values)

    def _log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))

    def shown(self, row: int) -> str:
        """A row for a message."""
        prompt, completion = (_short(text) for text in (self.prompts[row], self.completions[row]))
        return f"prompt {prompt}, completion {completion}"


@dataclass(frozen=True)
class Answer:
    """What a function gave, or the exception that it raised, and the seconds it took."""

    output: Any
    seconds: float


def call_all(functions: Sequence[Callable[..., Any]], call: Call, timeout: float) -> list[Answer]:
    """What each function gives; ``async`` ones run together, after the others.

    Args:
        functions: with TRL's signature.
        call: what they are called with.
        timeout: seconds that an ``async`` function may take.
    """
    answers: dict[int, Answer] = {}
    waiting: dict[int, Callable[..., Any]] = {}
    for place, function in enumerate(functions):
        if _is_async(function):
            waiting[place] = function
            continue
        begin = time.perf_counter()
        try:
            output: Any = function(**call.arguments())
        except Exception as error:  # noqa: BLE001 - code of the user; reported with its name
            output = error
        answers[place] = Answer(output, time.perf_counter() - begin)
    if waiting:
        answers |= _call_together(waiting, call, timeout)
    return [answers[place] for place in range(len(functions))]


def _call_together(
    functions: Mapping[int, Callable[..., Any]], call: Call, timeout: float
) -> dict[int, Answer]:
    async def timed(function: Callable[..., Any]) -> Answer:
        begin = time.perf_counter()
        output: Any
        try:
            output = await asyncio.wait_for(function(**call.arguments()), timeout)
        except TimeoutError as error:
            # Its own time-outs have a message; that of wait_for has none.
            output = TimeoutError(str(error) or f"no answer within {timeout:g} s")
        except Exception as error:  # noqa: BLE001 - code of the user; reported with its name
            output = error
        return Answer(output, time.perf_counter() - begin)

    async def gathered() -> list[Answer]:
        return await asyncio.gather(*(timed(function) for function in functions.values()))

    # In a thread of its own, because this one may have a running loop (a notebook).
    with ThreadPoolExecutor(1, "asyncrlhf-rewards") as pool:
        answers = pool.submit(lambda: asyncio.run(gathered())).result()
    return dict(zip(functions, answers, strict=True))


def read(name: str, output: Any, call: Call) -> tuple[FloatArray, dict[int, str]]:
    """Scores out of what a function gave.

    Args:
        name: of the function.
        output: what it gave, or the exception that it raised.
        call: what it was called with.

    Returns:
        ``[n]`` scores, NaN where there is none; and a sentence for every row that has something
        wrong.
    """
    n = len(call.prompts)
    values = np.full(n, np.nan)
    if isinstance(output, Exception):
        problem = f"reward function {name} raised {type(output).__name__}: {output}"
        if isinstance(output, TypeError) and "argument" in str(output):
            given = [*sorted(_OURS), "prompt_ids", *sorted(call.columns)]
            problem += f"; it is called with {', '.join(given)}: take the rest as **kwargs"
        return values, dict.fromkeys(range(n), problem)
    output = output.tolist() if hasattr(output, "tolist") else output
    if not isinstance(output, list | tuple) or len(output) != n:
        got = f"{len(output)}" if isinstance(output, list | tuple) else f"a {type(output).__name__}"
        problem = (
            f"reward function {name}: expected a list of {n} numbers, one per completion, got {got}"
        )
        return values, dict.fromkeys(range(n), problem)
    problems: dict[int, str] = {}
    for row, given in enumerate(output):
        if given is None:
            continue
        value = given.item() if getattr(given, "ndim", None) == 0 else given
        if isinstance(value, numbers.Real) and math.isfinite(value):
            values[row] = float(value)
        else:
            problems[row] = (
                f"reward function {name}: expected a finite number or None for row {row}, got "
                f"{_short(given)} ({call.shown(row)}); let it answer None where it is not "
                "applicable, and a number where it failed"
            )
    return values, problems


def _is_async(function: Any) -> bool:
    function = unwrapped(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)


def unwrapped(function: Any) -> Any:
    """The function inside of ``functools.partial``."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
