"""Step values as an advantage estimator of verl: ``algorithm.adv_estimator=vine``.

verl computes advantages on the driver, for the whole batch, by a function that it looks up by name.
:func:`register_vine_estimator` puts one there. What remains to be decided is how the values of
steps get to it, because verl hands such functions only part of what a batch holds; see
:class:`VineEstimator`. Nothing here imports verl before it is registered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vineppo.advantages import (
    WHITENINGS,
    Whitening,
    step_advantages,
    to_token_advantages,
    whiten,
)
from vineppo.errors import InvalidInputError, fraction, one_of

VALUES, BORDERS, BASELINES = "step_values", "step_borders", "reward_baselines"


def vine_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    step_values: Sequence[npt.ArrayLike],
    step_borders: Sequence[npt.ArrayLike],
    *,
    gamma: float = 1.0,
    lam: float = 0.0,
    whitening: Whitening = None,
) -> tuple[Tensor, Tensor]:
    """Advantages of steps for their tokens, and returns, in verl's shapes.

    The reward of a step is the sum of those of its tokens, so a KL penalty in the rewards counts
    where it arises.

    Args:
        token_level_rewards: (B, T).
        response_mask: (B, T), 1 at the tokens of each response, which begin at 0 and leave no gap;
            0 everywhere for a row that only fills up the batch.
        step_values: of each response (S,), of the states in which its steps begin; NaN where there
            is no estimate.
        step_borders: of each response (S + 1,) token places from 0 to its length.
        gamma: discount per step.
        lam: λ over steps; 0 is Eq. 6 of arXiv 2410.01679.
        whitening: over all tokens of the batch, see :func:`vineppo.advantages.whiten`; returns are
            not whitened.

    Returns:
        Advantages and returns (B, T), of dtype and device of the rewards, 0 outside the mask. The
        return at a token is the advantage of its step and the value before it.

    Raises:
        InvalidInputError: shapes, values or borders do not fit; the message has the row.
    """
    fraction("gamma", gamma)
    fraction("lam", lam)
    one_of("whitening", whitening, WHITENINGS)
    mask = response_mask.bool().cpu()
    rewards = token_level_rewards.detach().double().cpu()
    if rewards.ndim != 2 or rewards.shape != mask.shape:
        raise InvalidInputError(
            "token_level_rewards, response_mask: expected the same shape (B, T), got "
            f"{tuple(rewards.shape)} and {tuple(mask.shape)}"
        )
    for name, given in ((VALUES, step_values), (BORDERS, step_borders)):
        if len(given) != len(mask):
            raise InvalidInputError(f"{name}: expected {len(mask)}, one per row, got {len(given)}")
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for row, (values, borders) in enumerate(zip(step_values, step_borders, strict=True)):
        length = int(mask[row].sum())
        cuts = _checked_borders(row, borders, mask[row], length)
        v = np.asarray(values, dtype=np.float64)
        if v.shape != (len(cuts) - 1,):
            raise InvalidInputError(
                f"{VALUES}[{row}]: expected {len(cuts) - 1} values, one per step, got the shape "
                f"{v.shape}"
            )
        if not length:
            continue
        r = np.add.reduceat(rewards[row, :length].numpy(), cuts[:-1])
        a = step_advantages(v, r, gamma, lam)
        for out, of in ((advantages, a), (returns, a + _filled(v, r, gamma))):
            out[row, :length] = torch.from_numpy(to_token_advantages(of, cuts))
    advantages = whiten(advantages, mask, whitening)
    to = {"device": token_level_rewards.device, "dtype": token_level_rewards.dtype}
    return advantages.to(**to), returns.to(**to)


def step_baselines(
    step_values: Sequence[npt.ArrayLike], step_borders: Sequence[npt.ArrayLike], width: int
) -> Tensor:
    """Step values and borders as one tensor, for a batch that carries only tensors.

    Args:
        step_values: of each response (S,); NaN where there is no estimate.
        step_borders: of each response (S + 1,).
        width: T, of verl's responses.

    Returns:
        float32 (B, T): at the first token of each step its value, or inf where there is no
        estimate; NaN at all other places. Values come back rounded to float32.

    Raises:
        InvalidInputError: a response is longer than ``width``.
    """
    out = torch.full((len(step_values), width), torch.nan)
    for row, (values, borders) in enumerate(zip(step_values, step_borders, strict=True)):
        cuts = np.asarray(borders, dtype=np.int64)
        if cuts[-1] > width:
            raise InvalidInputError(
                f"width: expected at least {cuts[-1]}, the length of response {row}, got {width}"
            )
        v = torch.from_numpy(np.asarray(values, dtype=np.float64)).float()
        out[row, torch.from_numpy(cuts[:-1])] = torch.where(v.isnan(), torch.inf, v)
    return out


@dataclass(frozen=True)
class VineEstimator:
    """The function that verl calls for ``algorithm.adv_estimator=vine``.

    It takes step values from the first of these places that has them:

    - the arguments ``step_values`` and ``step_borders``;
    - the same names in an argument ``non_tensor_batch``;
    - an argument ``reward_baselines`` (B, T) as :func:`step_baselines` makes it.

    verl's own ``gamma``, ``lam`` and normalisation are for its own estimators; they are not read.

    Args:
        gamma: discount per step.
        lam: λ over steps.
        whitening: over the batch.
    """

    gamma: float = 1.0
    lam: float = 0.0
    whitening: Whitening = "batch"

    def __post_init__(self) -> None:
        fraction("gamma", self.gamma)
        fraction("lam", self.lam)
        one_of("whitening", self.whitening, WHITENINGS)

    def __call__(
        self,
        token_level_rewards: Tensor,
        response_mask: Tensor,
        *,
        step_values: Sequence[npt.ArrayLike] | None = None,
        step_borders: Sequence[npt.ArrayLike] | None = None,
        non_tensor_batch: Mapping[str, Any] | None = None,
        reward_baselines: Tensor | None = None,
        **others: Any,  # noqa: ARG002 - verl also passes its configuration and ids of prompts
    ) -> tuple[Tensor, Tensor]:
        """Advantages and returns (B, T); see :func:`vine_advantages`.

        Raises:
            InvalidInputError: no step values, or ones that do not fit.
        """
        found = non_tensor_batch or {}
        values = found.get(VALUES) if step_values is None else step_values
        borders = found.get(BORDERS) if step_borders is None else step_borders
        if values is None and borders is None and reward_baselines is not None:
            values, borders = _from_baselines(reward_baselines, response_mask)
        if values is None or borders is None:
            raise InvalidInputError(
                f"{VALUES}, {BORDERS}: expected the values and borders of the steps of each "
                "response, got none; verl's trainers pass a registered estimator no column of the "
                f"batch but {BASELINES}. Put step_baselines(...) there, or call "
                "VineEstimator().add_to(data) in place of compute_advantage"
            )
        return vine_advantages(
            token_level_rewards,
            response_mask,
            values,
            borders,
            gamma=self.gamma,
            lam=self.lam,
            whitening=self.whitening,
        )

    def add_to(self, data: Any) -> Any:
        """Write ``advantages`` and ``returns`` into a batch, as verl's ``compute_advantage`` does.

        Args:
            data: a ``DataProto`` with ``token_level_rewards`` and ``response_mask`` in ``batch``,
                ``step_values`` and ``step_borders`` in ``non_tensor_batch``.

        Returns:
            The same batch.
        """
        keys = data.batch.keys()
        advantages, returns = self(
            data.batch["token_level_rewards"],
            data.batch["response_mask"],
            non_tensor_batch=data.non_tensor_batch,
            reward_baselines=data.batch[BASELINES] if BASELINES in keys else None,
        )
        data.batch["advantages"], data.batch["returns"] = advantages, returns
        return data


def register_vine_estimator(
    name: str = "vine",
    *,
    gamma: float = 1.0,
    lam: float = 0.0,
    whitening: Whitening = "batch",
) -> VineEstimator:
    """Register the estimator with verl, in the process in which its trainer runs.

    Args:
        name: for ``algorithm.adv_estimator``.
        gamma: see :class:`VineEstimator`.
        lam: see :class:`VineEstimator`.
        whitening: see :class:`VineEstimator`.

    Returns:
        What was registered.

    Raises:
        ImportError: verl is not installed.
        InvalidInputError: the name is taken, by another function or by other settings.
    """
    estimator = VineEstimator(gamma, lam, whitening)
    try:
        algorithms = import_module("verl.trainer.ppo.core_algos")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "verl":
            raise
        raise ImportError(
            "verl is not installed, and no extra of vineppo brings it, because it has needs of its "
            "own: install it as its guide says, pip install verl, in the environment that trains",
            name="verl",
        ) from error
    try:
        algorithms.register_adv_est(name)(estimator)
    except ValueError as error:
        raise InvalidInputError(f"name: {error}; choose another one than {name!r}") from error
    return estimator


def _from_baselines(
    baselines: Tensor, response_mask: Tensor
) -> tuple[list[npt.NDArray[np.float64]], list[list[int]]]:
    if baselines.shape != response_mask.shape:
        raise InvalidInputError(
            f"{BASELINES}: expected {tuple(response_mask.shape)} numbers from step_baselines, got "
            f"the shape {tuple(baselines.shape)}"
        )
    values, borders = [], []
    for of, mask in zip(baselines.double().cpu(), response_mask.bool().cpu(), strict=True):
        starts = (~of.isnan() & mask).nonzero()[:, 0]
        v = of[starts].numpy()
        values.append(np.where(np.isinf(v), np.nan, v))
        length = int(mask.sum())
        borders.append([*starts.tolist(), length] if length else [0])
    return values, borders


def _checked_borders(
    row: int, borders: npt.ArrayLike, mask: Tensor, length: int
) -> npt.NDArray[np.int64]:
    if not bool(mask[:length].all()):
        raise InvalidInputError(
            f"response_mask[{row}]: expected tokens from 0 without a gap, got a gap; responses "
            "that tools have written into have no state to restart from"
        )
    # A row of verl's object arrays holds objects, which a list gives a type again.
    cuts = np.asarray(list(borders) if isinstance(borders, Sequence | np.ndarray) else borders)
    fits = cuts.ndim == 1 and len(cuts) > 0 and np.issubdtype(cuts.dtype, np.number)
    if not fits or cuts[0] != 0 or cuts[-1] != length or (np.diff(cuts) < 1).any():
        raise InvalidInputError(
            f"{BORDERS}[{row}]: expected token places that increase from 0 to {length}, the length "
            f"of the response, got {borders!s:.80}"
        )
    return cuts.astype(np.int64)


def _filled(
    values: npt.NDArray[np.float64], rewards: npt.NDArray[np.float64], gamma: float
) -> npt.NDArray[np.float64]:
    """Values with the trajectory's own return in place of NaN, as `step_advantages` takes them."""
    out, following = values.copy(), 0.0
    for i in reversed(range(len(out))):
        if np.isnan(out[i]):
            out[i] = rewards[i] + gamma * following
        following = out[i]
    return out
