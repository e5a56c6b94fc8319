"""The canonical table: what it keeps, reduces, normalises, settles and hands to ranking."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpreliability.errors import (
    DuplicateKeyError,
    EmptyInputError,
    HPReliabilityError,
    MissingColumnError,
    MissingContextError,
    NonFiniteScoreError,
    ShapeError,
    SourceFormatError,
    TooFewValuesError,
)
from hpreliability.table import Table, from_frame, label, value_order

CONTEXTS = ["env", "agent"]


def frame(values: tuple[str, ...] = ("0.1", "0.01", "1e-3"), seeds: int = 3) -> pd.DataFrame:
    cells = pd.MultiIndex.from_product(
        [["lr", "eps"], values, ["A", "B", "C"], ["dqn", "c51"], range(seeds)],
        names=["hyperparameter", "value", *CONTEXTS, "seed"],
    ).to_frame(index=False)
    return cells.assign(score=np.random.default_rng(0).normal(size=len(cells)))


def table(**columns: object) -> Table:
    return from_frame(frame().assign(**columns), context=CONTEXTS)


def curves() -> Table:
    """Two runs with the points 1, 2, 6 and 10, 20, 60 at uneven steps, out of order."""
    rows = [
        ("lr", value, "A", 0, step, score * factor)
        for value, factor in (("0.1", 1.0), ("0.2", 10.0))
        for step, score in ((300, 6.0), (10, 1.0), (20, 2.0))
    ]
    columns = ["hyperparameter", "value", "env", "seed", "t", "score"]
    return from_frame(pd.DataFrame(rows, columns=columns), step="t")


# Building


@settings(max_examples=15)
@given(st.permutations(range(108)))
def test_row_order_is_irrelevant(order: list[int]) -> None:
    shuffled = from_frame(frame().iloc[order], context=CONTEXTS)
    pd.testing.assert_frame_equal(shuffled.frame, table().frame)
    array = shuffled.scores("lr", over="env", agent="dqn").scores
    np.testing.assert_array_equal(array, table().scores("lr", over="env", agent="dqn").scores)


@settings(max_examples=15)
@given(st.integers(0, 107), st.floats(-10, 10))
def test_a_key_that_is_there_twice_raises_wherever_it_is(row: int, score: float) -> None:
    again = frame().iloc[[row]].assign(score=score)
    with pytest.raises(DuplicateKeyError, match="2 rows share their key") as caught:
        from_frame(pd.concat([frame(), again]), context=CONTEXTS)
    for text in again[["value", "env", "agent"]].iloc[0]:
        assert repr(text) in str(caught.value)


def test_any_frame_that_converts_to_pandas_is_taken() -> None:
    polars = pytest.importorskip("polars")
    pyarrow = pytest.importorskip("pyarrow")
    for other in (polars.from_pandas(frame()), pyarrow.Table.from_pandas(frame())):
        built = from_frame(other, context=CONTEXTS)
        pd.testing.assert_frame_equal(built.frame, table().frame)
    with pytest.raises(SourceFormatError, match="got dict"):
        from_frame({"score": [1.0]})


def test_columns_may_have_other_names_and_others_are_ignored() -> None:
    renamed = frame().rename(columns={"hyperparameter": "hp", "score": "return"}).assign(noise=1)
    built = from_frame(renamed, hyperparameter="hp", score="return", context=CONTEXTS)
    pd.testing.assert_frame_equal(built.frame, table().frame)


@pytest.mark.parametrize("column", ["hyperparameter", "value", "env", "agent", "seed", "score"])
def test_a_missing_column_is_named_beside_those_there_are(column: str) -> None:
    with pytest.raises(MissingColumnError, match=f"'{column}'; there are: .*'"):
        from_frame(frame().drop(columns=column), context=CONTEXTS)


def test_bad_columns_are_refused_with_their_place() -> None:
    with pytest.raises(EmptyInputError, match="no rows"):
        from_frame(frame().iloc[:0], context=CONTEXTS)
    with pytest.raises(SourceFormatError, match="'env' has no label in row 5"):
        from_frame(frame().assign(env=lambda f: f["env"].where(f.index != 5)), context=CONTEXTS)
    text = frame()["score"].astype(object)
    text.iloc[7] = "1,5"
    with pytest.raises(SourceFormatError, match="not a number in row 7: '1,5'"):
        from_frame(frame().assign(score=text), context=CONTEXTS)
    with pytest.raises(SourceFormatError, match="'t' is not a finite number in row 0"):
        from_frame(frame().assign(t=np.nan), context=CONTEXTS, step="t")
    with pytest.raises(SourceFormatError, match="two columns are called 'score'"):
        from_frame(pd.concat([frame(), frame()[["score"]]], axis=1), context=CONTEXTS)
    with pytest.raises(ValueError, match="distinct"):
        from_frame(frame(), context=["env", "env"])
    with pytest.raises(ValueError, match="seed"):
        from_frame(frame(), context=["seed"])


def test_one_number_in_two_spellings_is_refused() -> None:
    both = pd.concat([frame(("0.1", "0.2")), frame(("1e-1", "0.3"))])
    with pytest.raises(
        SourceFormatError, match=r"eps has one value under two labels, '0.1' and '1"
    ):
        from_frame(both, context=CONTEXTS)


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (True, "True"),
        (np.True_, "True"),
        (3, "3"),
        (np.int32(3), "3"),
        (1e-4, "0.0001"),
        (np.float32(1e-4), "0.0001"),
        (np.float64(0.1), "0.1"),
        ("1e-4", "1e-4"),
        (2.0, "2.0"),
    ],
)
def test_labels_are_the_shortest_spelling(item: object, text: str) -> None:
    assert label(item) == text


def test_a_mixed_column_keeps_true_and_one_apart() -> None:
    mixed = pd.DataFrame(
        {
            "hyperparameter": "clip",
            "value": pd.Series([True, 1, "1e0x"], dtype=object),
            "env": "A",
            "seed": 0,
            "score": 1.0,
        }
    )
    assert from_frame(mixed).values("clip") == ("1", "1e0x", "True")


def test_values_are_ordered_as_numbers_where_all_are_numbers() -> None:
    assert table().values("lr") == ("1e-3", "0.01", "0.1")
    assert sorted(["10", "9", "none"], key=value_order(["10", "9", "none"])) == ["10", "9", "none"]
    assert sorted(["2", "nan"], key=value_order(["2", "nan"])) == ["2", "nan"]


# Selecting


def test_selection_keeps_the_rows_with_the_labels() -> None:
    chosen = table().select(hyperparameter="lr", env=["A", "B"], seed=[1])
    assert chosen.hyperparameters == ("lr",)
    assert set(chosen.frame["env"]) == {"A", "B"}
    assert len(chosen.frame) == 3 * 2 * 2
    with pytest.raises(EmptyInputError, match=r"env in \['D'\]; there are: 'A', 'B', 'C'"):
        table().select(env="D")
    with pytest.raises(MissingColumnError, match="'game'"):
        table().select(game="A")


# Curves


@pytest.mark.parametrize(
    ("how", "expected"), [("final", 6.0), ("last", 4.0), ("auc", 5.5), ("best", 6.0)]
)
def test_a_curve_becomes_one_score(how: str, expected: float) -> None:
    reduced = curves().reduce(how, last=2)
    assert reduced.frame["score"].tolist() == [expected, 10 * expected]
    assert not reduced.has_curves


def test_the_area_of_a_constant_curve_is_its_height_times_the_intervals() -> None:
    flat = curves().frame.assign(score=7.0)
    reduced = from_frame(flat, step="step").reduce("auc")
    assert reduced.frame["score"].tolist() == [14.0, 14.0]


@pytest.mark.parametrize("how", ["final", "last", "auc", "best"])
def test_a_curve_that_failed_at_its_end_is_a_failed_run(how: str) -> None:
    broken = curves().frame
    broken.loc[2, "score"] = np.nan
    reduced = from_frame(broken, step="step").reduce(how, last=2)
    assert reduced.frame["score"].isna().tolist() == [True, False]


def test_reduction_refuses_what_it_cannot_do() -> None:
    with pytest.raises(MissingColumnError, match="step"):
        table().reduce()
    with pytest.raises(ShapeError, match=r"at least 10 points.*2 runs have fewer.*with 3"):
        curves().reduce("last")
    with pytest.raises(ValueError, match="how must be one of"):
        curves().reduce("first")
    with pytest.raises(ValueError, match="last must be"):
        curves().reduce("last", last=0)
    with pytest.raises(ShapeError, match="reduce"):
        curves().scores("lr", over="env")


# Normalising


def test_minmax_maps_every_label_to_the_unit_interval() -> None:
    scores = table().normalize("minmax").frame.groupby("env")["score"]
    assert scores.min().tolist() == [0.0] * 3
    assert scores.max().tolist() == [1.0] * 3


def test_cdf_is_the_share_of_runs_that_score_no_more() -> None:
    raw, mapped = table().frame, table().normalize("cdf", over="agent").frame
    for row in (0, 17, 53):
        peers = raw[raw["agent"] == raw["agent"].iloc[row]]["score"]
        share = (peers <= raw["score"].iloc[row]).mean()
        assert mapped["score"].iloc[row] == pytest.approx(share)


def test_references_map_low_to_zero_and_high_to_one() -> None:
    references = {"A": (0.0, 1.0), "B": (1.0, 3.0), "C": (0.0, -2.0)}
    raw = table().frame
    mapped = table().normalize("reference", references=references).frame
    for env, (low, high) in references.items():
        np.testing.assert_allclose(
            mapped.loc[raw["env"] == env, "score"],
            (raw.loc[raw["env"] == env, "score"] - low) / (high - low),
        )


def test_normalisation_refuses_what_has_no_scale() -> None:
    with pytest.raises(MissingColumnError, match="'game'"):
        table().normalize("cdf", over="game")
    with pytest.raises(ValueError, match="equal in env='A'"):
        table(score=1.0).normalize("minmax")
    with pytest.raises(ValueError, match="lack 2 of env"):
        table().normalize("reference", references={"A": (0, 1)})
    with pytest.raises(ValueError, match="two different"):
        table().normalize("reference", references=dict.fromkeys("ABC", (1, 1)))
    with pytest.raises(ValueError, match="references are needed"):
        table().normalize("reference")
    with pytest.raises(ValueError, match="references are needed"):
        table().normalize("minmax", references=dict.fromkeys("ABC", (0, 1)))
    with pytest.raises(ValueError, match="how must be"):
        table().normalize("zscore")
    with pytest.raises(NonFiniteScoreError, match="108 of 108"):
        table(score=np.nan).normalize("minmax")


# Failed runs


def failing(*rows: int, bad: float = np.nan) -> Table:
    scores = frame()["score"].to_numpy().copy()
    scores[list(rows)] = bad
    return table(score=scores)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_failed_runs_are_refused_until_a_rule_is_chosen(bad: float) -> None:
    broken = failing(3, 50, bad=bad)
    for act in (broken.settle, lambda: broken.scores("lr", over="env", agent="dqn")):
        with pytest.raises(
            NonFiniteScoreError, match=r"of \d+ scores are not finite.*'worst'|worst"
        ):
            act()


def test_nothing_changes_where_every_score_is_finite() -> None:
    whole = table()
    for rule in ("raise", "worst", "drop"):
        assert whole.settle(rule) is whole


def test_worst_is_the_lowest_score_of_hyperparameter_and_context() -> None:
    broken = failing(0, 1)  # both lr=0.1, env A, dqn
    settled = broken.settle("worst")
    peers = {"hyperparameter": "lr", "env": "A", "agent": "dqn"}
    worst = broken.select(**peers).frame["score"].min()
    stand_ins = settled.select(**peers, value="0.1", seed=["0", "1"]).frame["score"]
    assert stand_ins.tolist() == [worst, worst]
    assert "2 of 108 scores were not finite and count as the worst" in settled.notes[0]
    with pytest.raises(NonFiniteScoreError, match="no finite score to stand in"):
        table(score=np.nan).settle("worst")


def test_dropped_runs_are_counted_and_labels_without_a_run_are_named() -> None:
    dropped = failing(0).settle("drop")
    assert len(dropped.frame) == 107
    assert dropped.notes == ("1 of 108 scores were not finite and their runs were dropped",)
    gone = table(score=frame()["score"].where(frame()["value"] != "0.01")).settle("drop")
    assert "no run is left of hyperparameter/value ['eps=0.01', 'lr=0.01']" in gone.notes[0]
    no_env = table(score=frame()["score"].where(frame()["env"] != "B")).settle("drop")
    assert "no run is left of env ['B']" in no_env.notes[0]
    with pytest.raises(NonFiniteScoreError, match="no run has a finite score"):
        table(score=np.nan).settle("drop")


def test_a_curve_does_not_outlive_its_failed_point() -> None:
    broken = curves().frame
    broken.loc[2, "score"] = np.nan
    left = from_frame(broken, step="step").settle("drop")
    assert left.values("lr") == ("0.2",)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="nonfinite must be"):
        table().settle("ignore")
    with pytest.raises(ValueError, match="missing must be"):
        table().scores("lr", over="env", agent="dqn", missing="fill")


# Arrays for ranking


def test_scores_land_in_their_cells() -> None:
    cell = table().scores("lr", over="env", agent="c51")
    assert (cell.values, cell.contexts) == (("1e-3", "0.01", "0.1"), ("A", "B", "C"))
    assert cell.scores.shape == (3, 3, 3, 1)
    for v, value in enumerate(cell.values):
        for c, env in enumerate(cell.contexts):
            runs = (
                table()
                .select(hyperparameter="lr", value=value, env=env, agent="c51")
                .frame["score"]
            )
            np.testing.assert_array_equal(cell.scores[v, :, c, 0], runs)


def test_a_product_of_axes_crosses_them_and_others_are_pooled() -> None:
    crossed = table().scores("lr", over=["env", "agent"])
    assert crossed.contexts == ("A/c51", "A/dqn", "B/c51", "B/dqn", "C/c51", "C/dqn")
    assert crossed.scores.shape == (3, 3, 6, 1)
    pooled = table().scores("lr", over="agent")
    assert pooled.contexts == ("c51", "dqn")
    assert pooled.scores.shape == (3, 3, 2, 3)
    np.testing.assert_array_equal(pooled.scores[:, :, 1, 2], crossed.scores[:, :, 5, 0])


def test_unequal_seeds_are_padded_with_nan() -> None:
    fewer = frame()[lambda f: ~((f["value"] == "0.1") & (f["env"] == "A") & (f["seed"] == 0))]
    cell = from_frame(fewer, context=CONTEXTS).scores("lr", over="env", agent="dqn")
    assert np.isnan(cell.scores).sum() == 1
    assert np.isnan(cell.scores[2, 2, 0, 0])


def test_pooled_tasks_need_the_same_runs() -> None:
    fewer = frame()[lambda f: ~((f["value"] == "0.1") & (f["env"] == "A") & (f["seed"] == 0))]
    with pytest.raises(ShapeError, match="lacks env"):
        from_frame(fewer, context=CONTEXTS).scores("lr", over="agent")


def without(value: str, env: str) -> Table:
    gap = (frame()["value"] == value) & (frame()["env"] == env)
    return from_frame(frame()[~gap], context=CONTEXTS)


def test_a_gap_is_refused_with_its_place_or_dropped_by_rule_with_a_note() -> None:
    gap = without("0.01", "B")
    where = {"over": "env", "agent": "dqn"}
    with pytest.raises(MissingContextError, match=r"'env': 'B'.* lacks value 0.01"):
        gap.scores("lr", **where)
    fewer = gap.scores("lr", missing="drop_context", **where)
    assert fewer.contexts == ("A", "C")
    assert fewer.notes == ("contexts in which a value has no run were dropped: ['B']",)
    full = table().scores("lr", **where)
    np.testing.assert_array_equal(fewer.scores, full.scores[:, :, [0, 2]])
    less = gap.scores("lr", missing="drop_value", **where)
    assert less.values == ("1e-3", "0.1")
    assert less.notes == ("values without a run in every context were dropped: ['0.01']",)
    np.testing.assert_array_equal(less.scores, full.scores[[0, 2]])


def test_gaps_are_dropped_over_products_and_pools_too() -> None:
    gap = without("0.01", "B")
    crossed = gap.scores("lr", over=["env", "agent"], missing="drop_context")
    assert crossed.contexts == ("A/c51", "A/dqn", "C/c51", "C/dqn")
    with pytest.raises(MissingContextError, match="leaves 3 values and 0 rows"):
        gap.scores("lr", over="agent", missing="drop_context")
    assert gap.scores("lr", over="agent", missing="drop_value").values == ("1e-3", "0.1")


def test_too_little_left_after_a_drop_is_refused() -> None:
    two = from_frame(frame()[lambda f: f["value"] != "0.1"], context=CONTEXTS)
    gap = from_frame(
        two.frame[~((two.frame["value"] == "0.01") & (two.frame["env"] == "B"))], context=CONTEXTS
    )
    with pytest.raises(MissingContextError, match="leaves 1 values"):
        gap.scores("lr", over="env", agent="dqn", missing="drop_value")


def test_a_single_value_is_refused() -> None:
    with pytest.raises(TooFewValuesError, match=r"'lr'.* single value \(0.1\)"):
        from_frame(frame(("0.1",)), context=CONTEXTS).scores("lr", over="env", agent="dqn")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(MissingColumnError, match="'game'; there are: 'env', 'agent'"):
        table().scores("lr", over="game")
    with pytest.raises(EmptyInputError, match="there are: 'eps', 'lr'"):
        table().scores("gamma", over="env")


def test_every_error_of_the_library_is_a_value_error() -> None:
    assert issubclass(HPReliabilityError, ValueError)
