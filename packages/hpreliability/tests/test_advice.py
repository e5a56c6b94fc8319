import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpreliability.advice import effect_size, recommend, recommend_values, tune_first
from hpreliability.errors import NonFiniteScoreError, ShapeError
from hpreliability.table import from_frame

VALUES, CONTEXTS = ("0.1", "0.01", "0.001"), ("Pong", "Hero", "Alien", "Qbert")
MEANS = np.array([[0.0, 0.0, 0.0, 9.0], [5.0, 4.0, 3.0, 8.0], [1.0, 4.0, 9.0, 0.0]])


def runs(means, noise=0.01, n_runs=4, seed=0):
    rng = np.random.default_rng(seed)
    shape = (means.shape[0], n_runs, means.shape[1], 1)
    return means[:, None, :, None] + noise * rng.normal(size=shape)


def test_regret_is_the_distance_to_the_best_mean():
    scores = runs(MEANS)
    means = scores.mean(axis=(1, 3))
    advice = recommend_values(scores, VALUES, CONTEXTS, default="0.1")
    np.testing.assert_allclose(advice.regret, means.max(axis=0) - means)
    np.testing.assert_array_equal(advice.default_regret, advice.regret[0])
    assert (advice.regret.min(axis=0) == 0).all()
    assert (advice.relative_regret.max(axis=0) == 1).all()


def test_best_per_context_has_no_regret():
    advice = recommend_values(runs(MEANS), VALUES, CONTEXTS)
    assert advice.best_per_context[0] == "0.01"
    assert advice.best_per_context[2:] == ("0.001", "0.1")
    assert advice.best == "0.01"
    assert advice.default_regret is None


def test_safe_set_holds_values_not_separated_from_the_best_often_enough():
    means = np.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    scores = means[:, None, :, None] + 0.1 * np.array([-1.0, 1.0])[:, None, None]
    advice = recommend_values(scores, VALUES, CONTEXTS, share=0.75)
    np.testing.assert_array_equal(advice.safe_share, [1, 0.75, 0.25])
    assert advice.safe == ("0.1", "0.01")
    assert recommend_values(scores, VALUES, CONTEXTS, share=1.0).safe == ("0.1",)


@given(seed=st.integers(0, 300), scale=st.floats(0.01, 100))
def test_advice_does_not_depend_on_the_scale_of_a_context(seed, scale):
    scores = runs(MEANS, noise=2, seed=seed)
    scaled = scores.copy()
    scaled[:, :, 1] *= scale
    before, after = (recommend_values(s, VALUES, CONTEXTS) for s in (scores, scaled))
    assert (before.best, before.safe) == (after.best, after.safe)
    np.testing.assert_allclose(before.relative_regret, after.relative_regret)


def test_contexts_without_any_difference_have_no_relative_regret():
    advice = recommend_values(np.ones((3, 2, 4, 1)), VALUES, CONTEXTS)
    assert (advice.relative_regret == 0).all()
    assert advice.safe == VALUES


def test_absent_runs_change_nothing():
    scores = runs(MEANS, noise=1)
    padded = np.concatenate([scores, np.full((3, 2, 4, 1), np.nan)], axis=1)
    plain, with_gaps = (recommend_values(s, VALUES, CONTEXTS) for s in (scores, padded))
    np.testing.assert_allclose(plain.regret, with_gaps.regret)
    assert (plain.best, plain.safe) == (with_gaps.best, with_gaps.safe)
    assert effect_size(padded) == pytest.approx(effect_size(scores))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"values": VALUES[:2]}, ShapeError, "labels"),
        ({"values": ("a", "a", "b")}, ValueError, "distinct"),
        ({"default": "1"}, ValueError, "'1'"),
        ({"share": 0.0}, ValueError, "share"),
    ],
)
def test_unusable_input_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        recommend_values(runs(MEANS), **({"values": VALUES, "contexts": CONTEXTS} | options))


def table(scores):
    rows = [
        {
            "hyperparameter": "lr",
            "value": v,
            "env": c,
            "agent": agent,
            "seed": r,
            "score": scores[i, r, j, 0],
        }
        for agent in ("A", "B")
        for i, v in enumerate(VALUES)
        for j, c in enumerate(CONTEXTS)
        for r in range(scores.shape[1])
    ]
    return pd.DataFrame(rows)


def test_advice_on_a_table_is_that_on_its_array():
    scores = runs(MEANS, noise=1)
    frame = table(scores).sample(frac=1, random_state=0)
    advice = recommend(
        from_frame(frame, context=("env", "agent")), hyperparameter="lr", default=0.1, agent="A"
    )
    plain = recommend_values(scores, VALUES, CONTEXTS, default="0.1")
    rows = [VALUES.index(v) for v in advice.values]
    columns = [CONTEXTS.index(c) for c in advice.contexts]
    np.testing.assert_allclose(advice.regret, plain.regret[np.ix_(rows, columns)])
    np.testing.assert_allclose(advice.default_regret, plain.default_regret[columns])
    assert (advice.best, set(advice.safe)) == (plain.best, set(plain.safe))


def test_failed_runs_need_a_rule_and_leave_a_note():
    frame = table(runs(MEANS))
    frame.loc[0, "score"] = np.nan
    data = from_frame(frame, context=("env", "agent"))
    with pytest.raises(NonFiniteScoreError):
        recommend(data, hyperparameter="lr", agent="A")
    advice = recommend(data, hyperparameter="lr", agent="A", nonfinite="drop")
    assert "1 of 48" in advice.notes[0]
    assert recommend(data, hyperparameter="lr", agent="B").notes == ()


def test_effect_size_is_0_on_average_for_noise_and_1_for_separated_values():
    rng = np.random.default_rng(0)
    assert effect_size(rng.normal(size=(5, 5, 400, 1))) < 0.1
    assert effect_size(runs(MEANS, noise=1e-6)) == pytest.approx(1)


def test_effect_size_is_the_textbook_omega_squared():
    # Two groups of two: SSB = 4, SSW = 1, MSW = 1/2; (4 - 1/2) / (5 + 1/2).
    scores = np.array([[0.0, 1.0], [2.0, 3.0]])[:, :, None, None]
    assert effect_size(scores) == pytest.approx(3.5 / 5.5)


@given(seed=st.integers(0, 300))
def test_effect_size_ignores_scale_and_offset(seed):
    scores = runs(MEANS, noise=3, seed=seed)
    assert effect_size(7 * scores - 3) == pytest.approx(effect_size(scores))
    assert 0 <= effect_size(scores) <= 1


def test_effect_size_of_constant_scores_is_0():
    assert effect_size(np.ones((3, 2, 4, 1))) == 0


def test_effect_size_needs_two_runs_somewhere():
    with pytest.raises(ShapeError):
        effect_size(np.ones((3, 1, 4, 1)))


def test_tune_first_wants_both_an_effect_and_an_unsteady_ranking():
    order = tune_first(
        {"lr": 0.5, "width": 0.6, "seedlike": -0.1, "steady": 0.0},
        {"lr": 0.9, "width": 0.1, "seedlike": 0.9, "steady": 1.0},
    )
    assert [name for name, _ in order] == ["lr", "width", "seedlike", "steady"]
    assert dict(order) == pytest.approx({"lr": 0.45, "width": 0.06, "seedlike": 0, "steady": 0})


def test_tune_first_refuses_different_names():
    with pytest.raises(ValueError, match="width"):
        tune_first({"lr": 0.5}, {"lr": 0.5, "width": 1.0})
