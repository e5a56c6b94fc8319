"""Which run speaks for which hyper-parameter, design by design."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpreliability.errors import (
    DuplicateKeyError,
    EmptyInputError,
    MissingColumnError,
    ShapeError,
    SourceFormatError,
)
from hpreliability.readers import SparseCellWarning, from_runs

DEFAULT = {"lr": 1e-3, "gamma": 0.99}
LRS, GAMMAS, ENVS, SEEDS = (1e-2, 1e-3, 1e-4), (0.9, 0.99), ("A", "B"), (0, 1)


def runs(configs: list[tuple[float, float]]) -> pd.DataFrame:
    """Scores lr + gamma, so that every average can be told."""
    rows = [
        {"lr": lr, "gamma": gamma, "env": env, "seed": seed, "score": lr + gamma}
        for (lr, gamma), env, seed in itertools.product(configs, ENVS, SEEDS)
    ]
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


ONE_AT_A_TIME = [(1e-3, 0.99), (1e-2, 0.99), (1e-4, 0.99), (1e-3, 0.9)]
GRID = list(itertools.product(LRS, GAMMAS))


def test_a_default_run_counts_for_every_hyperparameter() -> None:
    table = from_runs(runs(ONE_AT_A_TIME), params=["lr", "gamma"], default=DEFAULT)
    assert table.values("lr") == ("0.0001", "0.001", "0.01")
    assert table.values("gamma") == ("0.9", "0.99")
    assert len(table.frame) == (3 + 2) * len(ENVS) * len(SEEDS)
    at_default = table.select(value="0.99", env="A", seed="0").frame
    assert at_default["score"].tolist() == [1e-3 + 0.99]
    assert table.notes == ()


def test_the_default_is_compared_as_a_number() -> None:
    text = runs(ONE_AT_A_TIME).astype({"lr": str, "gamma": str})
    table = from_runs(text, params=["lr", "gamma"], default={"lr": "1e-3", "gamma": ".99"})
    assert len(table.frame) == 5 * len(ENVS) * len(SEEDS)


def test_a_run_that_differs_in_two_is_an_error_or_a_note() -> None:
    frame = runs(GRID)
    with pytest.raises(SourceFormatError, match=r"8 rows differ.*more than one"):
        from_runs(frame, params=["lr", "gamma"], default=DEFAULT)
    table = from_runs(frame, params=["lr", "gamma"], default=DEFAULT, design="conditioned")
    expected = from_runs(runs(ONE_AT_A_TIME), params=["lr", "gamma"], default=DEFAULT)
    pd.testing.assert_frame_equal(table.frame, expected.frame)
    assert table.notes == (
        "8 of 24 rows differ from the default in more than one hyper-parameter and were left out",
    )


def test_a_complete_grid_is_averaged_over_the_others() -> None:
    table = from_runs(runs(GRID), params=["lr", "gamma"], design="grid")
    assert len(table.frame) == 5 * len(ENVS) * len(SEEDS)
    cell = table.select(hyperparameter="lr", value="0.01", env="B", seed="1").frame
    np.testing.assert_allclose(cell["score"], 1e-2 + np.mean(GAMMAS))
    assert "means over 2 configs" in table.notes[0]


def test_an_incomplete_grid_is_refused() -> None:
    with pytest.raises(ShapeError, match="not complete"):
        from_runs(runs(GRID[:-1]), params=["lr", "gamma"], design="grid")


def test_a_grid_with_equal_counts_but_other_partners_is_refused() -> None:
    crossed = [(1e-2, 0.9), (1e-2, 0.99), (1e-3, 0.9), (1e-3, 0.5)]
    with pytest.raises(ShapeError, match="not complete"):
        from_runs(runs(crossed), params=["lr", "gamma"], design="grid")


def test_a_failed_run_does_not_vanish_in_a_grids_mean() -> None:
    frame = runs(GRID).reset_index(drop=True)
    frame.loc[0, "score"] = np.nan
    table = from_runs(frame, params=["lr", "gamma"], design="grid")
    assert table.frame["score"].isna().sum() == 2  # once per hyper-parameter


def test_runs_with_a_name_each_are_not_averaged() -> None:
    frame = runs(GRID).assign(seed=lambda f: [f"run{i}" for i in range(len(f))])
    table = from_runs(frame, params=["lr", "gamma"], design="grid")
    assert len(table.frame) == 2 * len(frame)


def sampled(n: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "lr": 10 ** rng.uniform(-5, -1, size=n),
            "act": rng.choice(["relu", "tanh"], size=n),
            "env": np.tile(["A", "B"], n // 2),
            "seed": np.arange(n),
            "score": rng.normal(size=n),
        }
    )


@pytest.mark.parametrize("binning", ["quantile", "log"])
def test_sampled_numbers_are_binned_and_every_run_is_in_its_bin(binning: str) -> None:
    frame = sampled()
    table = from_runs(
        frame,
        params=["lr", "act"],
        design="sampled",
        bins=4,
        binning=binning,
    )
    assert len(table.values("lr")) == 4
    assert table.values("act") == ("relu", "tanh")
    assert len(table.frame) == 2 * len(frame)
    of_seed = table.select(hyperparameter="lr").frame.set_index("seed")["value"].astype(float)
    ordered = of_seed[frame.sort_values("lr")["seed"].astype(str)].to_numpy()
    assert (np.diff(ordered) >= 0).all()
    assert f"60 values in {binning} bins" in table.notes[0]
    if binning == "quantile":
        assert set(of_seed.value_counts()) == {15}


def test_a_thin_bin_is_left_out_with_a_warning_and_a_note() -> None:
    frame = sampled()
    frame.loc[0, "lr"] = 1e9
    with pytest.warns(SparseCellWarning, match="fewer than 3 runs"):
        table = from_runs(frame, params=["lr"], design="sampled", binning="log")
    assert any("were left out" in note for note in table.notes)
    assert "1000000000.0" not in table.values("lr")


def test_log_bins_refuse_zero() -> None:
    frame = sampled()
    frame.loc[0, "lr"] = 0.0
    with pytest.raises(SourceFormatError, match="positive"):
        from_runs(frame, params=["lr"], design="sampled", binning="log")


def test_integers_and_floats_of_one_hyperparameter_are_one_value() -> None:
    frame = pd.DataFrame(
        {
            "lr": pd.Series([1, 1.0, 2, 2.0], dtype=object),
            "env": list("ABAB"),
            "seed": 0,
            "score": 1.0,
        }
    )
    assert from_runs(frame, params=["lr"], design="grid").values("lr") == ("1.0", "2.0")


def test_two_runs_with_one_config_and_seed_are_refused() -> None:
    frame = runs(ONE_AT_A_TIME)
    with pytest.raises(DuplicateKeyError, match="2 rows share"):
        from_runs(pd.concat([frame, frame.iloc[:1]]), params=["lr", "gamma"], default=DEFAULT)


def test_misuse_is_refused_before_work_starts() -> None:
    frame = runs(GRID)
    with pytest.raises(ValueError, match="default"):
        from_runs(frame, params=["lr", "gamma"])
    with pytest.raises(ValueError, match="design"):
        from_runs(frame, params=["lr"], design="latin")
    with pytest.raises(ValueError, match="list"):
        from_runs(frame, params="lr", design="grid")
    with pytest.raises(ValueError, match="bins"):
        from_runs(frame, params=["lr"], design="sampled", bins=1)
    with pytest.raises(MissingColumnError, match="'depth'"):
        from_runs(frame, params=["depth"], design="grid")
    with pytest.raises(EmptyInputError):
        from_runs(frame.iloc[:0], params=["lr"], design="grid")


@settings(max_examples=10)
@given(st.permutations(range(len(GRID) * len(ENVS) * len(SEEDS))))
def test_row_order_is_irrelevant(order: list[int]) -> None:
    frame = runs(GRID)
    expected = from_runs(frame, params=["lr", "gamma"], design="grid")
    shuffled = from_runs(frame.iloc[order], params=["lr", "gamma"], design="grid")
    pd.testing.assert_frame_equal(shuffled.frame, expected.frame)
