from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpreliability.errors import MissingContextError
from hpreliability.table import Table, from_frame
from hpreliability.transfer import transfer


def _table(means: dict[str, dict[str, list[float]]]) -> Table:
    """Two equal seeds of `means[hyperparameter][env][value]`."""
    return from_frame(
        pd.DataFrame(
            [
                {"hyperparameter": h, "value": v, "env": env, "seed": seed, "score": score}
                for h, envs in means.items()
                for env, scores in envs.items()
                for v, score in enumerate(scores)
                for seed in range(2)
            ]
        )
    )


def test_regret_is_the_share_of_the_range_that_the_carried_choice_loses() -> None:
    found = transfer(_table({"lr": {"a": [0, 5, 10], "b": [4, 3, 2]}}), "env")
    # a's best (value 2) is b's worst; b's best (value 0) is a's worst.
    assert found.matrix.tolist() == [[0, 1], [1, 0]]
    found = transfer(_table({"lr": {"a": [0, 5, 10], "b": [4, 0, 3]}}), "env")
    assert found.matrix[0, 1] == pytest.approx(0.25)


def test_equal_rankings_correlate_fully_and_reversed_ones_negatively() -> None:
    table = _table({"lr": {"a": [0, 5, 10], "b": [1, 2, 3], "c": [3, 2, 1]}})
    found = transfer(table, "env", measure="correlation")
    assert found.matrix.tolist() == [[1, 1, -1], [1, 1, -1], [-1, -1, 1]]


def test_a_constant_ranking_has_no_correlation_and_costs_nothing() -> None:
    table = _table({"lr": {"a": [1, 1, 1], "b": [1, 2, 3]}})
    assert np.isnan(transfer(table, "env", measure="correlation").matrix[0, 1])
    assert transfer(table, "env").matrix[1, 0] == 0


def test_a_hyperparameter_of_one_context_is_left_out_and_named() -> None:
    table = _table({"lr": {"a": [0, 1], "b": [0, 1]}, "atoms": {"a": [0, 1]}})
    found = transfer(table, "env")
    assert found.hyperparameters == ("lr",)
    assert any("atoms was left out" in note for note in found.notes)


def test_a_single_context_has_no_transfer() -> None:
    with pytest.raises(MissingContextError, match="two contexts"):
        transfer(_table({"lr": {"a": [0, 1]}}), "env")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(-5, 5), min_size=4, max_size=4), min_size=2, max_size=4))
def test_regret_lies_between_0_and_1_and_is_0_at_home(rows: list[list[int]]) -> None:
    table = _table({"lr": {f"e{i}": [float(x) for x in row] for i, row in enumerate(rows)}})
    matrix = transfer(table, "env").matrix
    assert ((matrix >= 0) & (matrix <= 1)).all()
    assert (np.diag(matrix) == 0).all()
