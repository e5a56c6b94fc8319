"""The estimator for verl: its numbers against the library's, and verl's own registry if it is here.

Checked by hand with verl 0.9.1, which no environment of the tests has room for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vineppo.advantages import step_advantages, step_rewards, to_token_advantages, whiten
from vineppo.errors import InvalidInputError
from vineppo.integrations.verl import (
    VineEstimator,
    register_vine_estimator,
    step_baselines,
    vine_advantages,
)

PAGE = Path(__file__).parents[3] / "docs" / "pages" / "vineppo" / "verl.md"
HERE = importlib.util.find_spec("verl") is not None
needs_verl = pytest.mark.skipif(not HERE, reason="verl is not installed")


class Answers:
    """A batch in verl's shapes, whose score stands at the last token of each response."""

    def __init__(self, seed: int, rows: int, width: int, capped: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.lengths = rng.integers(1, width + 1, rows)
        self.scores = rng.integers(0, 2, rows).astype(float)
        self.mask = torch.zeros(rows, width, dtype=torch.long)
        self.rewards = torch.zeros(rows, width, dtype=torch.float64)
        self.borders, self.values = [], []
        for row, length in enumerate(self.lengths):
            inner = np.flatnonzero(rng.random(length - 1) < 0.4) + 1
            self.borders.append([0, *inner.tolist(), int(length)])
            values = rng.integers(0, 10, len(self.borders[-1]) - 1) / 9
            if capped:
                values[2:] = np.nan
            self.values.append(values)
            self.mask[row, :length] = 1
            self.rewards[row, length - 1] = self.scores[row]

    def expected(self, gamma: float = 1.0, lam: float = 0.0) -> torch.Tensor:
        out = torch.zeros_like(self.rewards)
        for row, (values, borders) in enumerate(zip(self.values, self.borders, strict=True)):
            rewards = step_rewards(self.scores[row], len(values))
            of = to_token_advantages(step_advantages(values, rewards, gamma, lam), borders)
            out[row, : len(of)] = torch.from_numpy(of)
        return out

    def data(self) -> Any:
        """What verl's trainers hold, with NumPy's arrays of objects for columns of lists."""
        columns = {}
        for name, lists in (("step_values", self.values), ("step_borders", self.borders)):
            columns[name] = np.empty(len(lists), dtype=object)
            columns[name][:] = lists
        batch = {"token_level_rewards": self.rewards, "response_mask": self.mask}
        return SimpleNamespace(batch=batch, non_tensor_batch=columns)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 9), st.booleans(),
    st.sampled_from([1.0, 0.9]), st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
def test_advantages_are_those_of_the_library(
    seed: int, rows: int, width: int, capped: bool, gamma: float, lam: float
) -> None:
    batch = Answers(seed, rows, width, capped)
    advantages, _ = vine_advantages(
        batch.rewards, batch.mask, batch.values, batch.borders, gamma=gamma, lam=lam
    )
    torch.testing.assert_close(advantages, batch.expected(gamma, lam), rtol=0, atol=1e-12)


@pytest.mark.parametrize("capped", [False, True])
def test_advantages_of_steps_telescope_and_lambda_one_returns_are_the_score(capped: bool) -> None:
    batch = Answers(3, 8, 12, capped)
    arguments = batch.rewards, batch.mask, batch.values, batch.borders
    advantages, _ = vine_advantages(*arguments)
    for row, (values, borders) in enumerate(zip(batch.values, batch.borders, strict=True)):
        total = advantages[row, borders[:-1]].sum()
        assert total == pytest.approx(batch.scores[row] - values[0], abs=1e-12)
    _, returns = vine_advantages(*arguments, lam=1.0)
    torch.testing.assert_close(returns, torch.from_numpy(batch.scores)[:, None] * batch.mask)


def test_rewards_inside_a_step_are_summed() -> None:
    rewards = torch.tensor([[0.25, -0.5, 0.0, 1.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    advantages, _ = vine_advantages(rewards, mask, [[0.5, 0.75]], [[0, 2, 4]])
    # A_0 = (0.25 - 0.5) + 0.75 - 0.5, A_1 = (0 + 1) - 0.75; the 9 stands behind the response.
    assert advantages.tolist() == [[0.0, 0.0, 0.25, 0.25, 0.0]]


def test_whitening_is_the_library_s_over_the_batch_and_leaves_returns_alone() -> None:
    batch = Answers(1, 6, 10)
    advantages, returns = VineEstimator()(
        batch.rewards, batch.mask, step_values=batch.values, step_borders=batch.borders
    )
    plain = vine_advantages(batch.rewards, batch.mask, batch.values, batch.borders)
    torch.testing.assert_close(advantages, whiten(plain[0], batch.mask.bool(), "batch"))
    torch.testing.assert_close(returns, plain[1])


def test_every_carrier_gives_the_same_advantages() -> None:
    batch = Answers(5, 6, 10, capped=True)
    batch.values = [np.round(values * 8) / 8 for values in batch.values]  # exact in float32
    estimator = VineEstimator(whitening=None)
    expected = batch.expected()
    baselines = step_baselines(batch.values, batch.borders, batch.mask.shape[1])
    by_columns = batch.data()
    by_tensor = batch.data()
    by_tensor.non_tensor_batch, by_tensor.batch["reward_baselines"] = {}, baselines
    for found in (
        estimator(
            batch.rewards, batch.mask, non_tensor_batch=by_columns.non_tensor_batch, config={}
        )[0],
        estimator(batch.rewards, batch.mask, reward_baselines=baselines, index=None)[0],
        estimator.add_to(by_columns).batch["advantages"],
        estimator.add_to(by_tensor).batch["advantages"],
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_columns_of_equal_lengths_are_read_as_well() -> None:
    columns = {
        "step_values": np.array([[0.5, 0.25], [1.0, 0.0]], dtype=object),
        "step_borders": np.array([[0, 1, 3], [0, 2, 3]], dtype=object),
    }
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    estimator = VineEstimator(whitening=None)
    found, _ = estimator(rewards, torch.ones(2, 3), non_tensor_batch=columns)
    assert found.tolist() == [[-0.25, 0.75, 0.75], [-1.0, -1.0, 0.0]]
    assert found.dtype == rewards.dtype


def test_rows_that_only_fill_the_batch_get_nothing() -> None:
    rewards, mask = torch.zeros(2, 3), torch.tensor([[1, 1, 0], [0, 0, 0]])
    advantages, _ = vine_advantages(rewards, mask, [[0.5], []], [[0, 2], [0]])
    assert advantages.tolist() == [[-0.5, -0.5, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step_values": [[0.5, 0.5, 0.5]]}, r"step_values\[0\]: expected 2 values"),
        ({"step_values": []}, "step_values: expected 1, one per row, got 0"),
        ({"step_borders": [[0, 2, 4]]}, r"step_borders\[0\]: expected token places .* to 3"),
        ({"step_borders": [[0, 2, 2, 3]]}, r"step_borders\[0\]"),
        ({"response_mask": torch.tensor([[1, 0, 1, 1]])}, r"response_mask\[0\]: .*a gap"),
        ({"token_level_rewards": torch.zeros(1, 3)}, "expected the same shape"),
        ({"lam": 1.5}, "lam: expected a number from 0 to 1"),
        ({"whitening": "group"}, "whitening: expected one of"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {
        "token_level_rewards": torch.zeros(1, 4),
        "response_mask": torch.tensor([[1, 1, 1, 0]]),
        "step_values": [[0.5, 0.5]],
        "step_borders": [[0, 2, 3]],
    }
    with pytest.raises(InvalidInputError, match=said):
        vine_advantages(**{**arguments, **change})


def test_a_batch_without_step_values_is_refused_with_the_way_to_bring_them() -> None:
    with pytest.raises(InvalidInputError, match=r"step_values, step_borders: .*step_baselines"):
        VineEstimator()(torch.zeros(1, 2), torch.ones(1, 2), config={}, index=np.array(["a"]))


def test_the_module_needs_no_verl_until_it_registers() -> None:
    code = (
        "import sys, vineppo.integrations.verl as module\n"
        "assert 'verl' not in sys.modules and 'decapod' not in sys.modules\n"
        "sys.modules['verl'] = None  # as if it were not installed\n"
        "try:\n    module.register_vine_estimator()\n"
        "except ImportError as error:\n    print(error.name, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("verl verl is not installed, and no extra of vineppo brings it")


def blocks(language: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return [part.split("```")[0] for part in text.split(f"```{language}\n")[1:]]


def test_the_page_runs_and_says_what_happens() -> None:
    printed = io.StringIO()
    names: dict[str, Any] = {"__name__": "page"}
    with contextlib.redirect_stdout(printed):
        for block in blocks("python"):
            exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102
    assert blocks("text")
    for expected in blocks("text"):
        assert expected in printed.getvalue()


@needs_verl
@pytest.mark.filterwarnings("ignore")  # verl tells of every engine that is not there
def test_verl_finds_the_estimator_by_name_and_registering_twice_is_harmless() -> None:
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    estimator = register_vine_estimator()
    assert register_vine_estimator() == estimator
    assert get_adv_estimator_fn("vine") == estimator
    with pytest.raises(InvalidInputError, match=r"name: .*already been registered"):
        register_vine_estimator(lam=0.5)


@needs_verl
@pytest.mark.filterwarnings("ignore")  # verl tells of every engine that is not there
def test_compute_advantage_of_verl_hands_the_baselines_to_the_estimator() -> None:
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    register_vine_estimator("vine-plain", whitening=None)
    batch = Answers(7, 4, 8, capped=True)
    batch.values = [np.round(values * 8) / 8 for values in batch.values]
    tensors = {
        **batch.data().batch,
        "reward_baselines": step_baselines(batch.values, batch.borders, 8),
    }
    data = DataProto.from_dict(tensors, non_tensors={"uid": np.array(list("aabb"), dtype=object)})
    data = compute_advantage(data, "vine-plain", config={})
    torch.testing.assert_close(data.batch["advantages"], batch.expected(), rtol=0, atol=1e-12)

    columns = DataProto.from_dict(batch.data().batch, non_tensors=batch.data().non_tensor_batch)
    with pytest.raises(InvalidInputError, match="no column of the batch"):
        compute_advantage(columns, "vine-plain", config={})
    done = VineEstimator(whitening=None).add_to(columns)
    torch.testing.assert_close(done.batch["advantages"], batch.expected(), rtol=0, atol=1e-12)
