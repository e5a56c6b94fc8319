from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vineppo.errors import InvalidInputError
from vineppo.exact_vines import enumerate_vine
from vineppo.experiments.exact import (
    BUDGET_GROUPS,
    CRITIC_ERROR,
    FAMILIES,
    NAMES,
    MarkSegmenter,
    break_even,
    cells,
    make_arms,
    make_tree,
    ratios,
    sampled_gradients,
    squared_error,
    tree_cell,
)
from vineppo.tasks.token_tree import TokenTree

BIASED = ("grpo", "ppo_0", "ppo_95", "vine_before_9")
Result = dict[str, Any]


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return [tree_cell(seed, family, batches=40) for family in ("short", "ending", "first action")
            for seed in range(2)]  # fmt: skip


# --- the cell ------------------------------------------------------------------------------------


def test_a_cell_is_a_job_with_json_in_and_out(results: list[Result]) -> None:
    assert pickle.loads(pickle.dumps(tree_cell)) is tree_cell
    assert json.loads(json.dumps(results)) == results
    assert json.loads(json.dumps(cells(3))) == cells(3)
    assert len(cells(3)) == 3 * len(FAMILIES) >= 20
    assert results[0] == tree_cell(**{**cells(1)[0], "batches": 40})


def test_every_estimator_is_measured_on_every_tree(results: list[Result]) -> None:
    for result in results:
        assert list(result["arms"]) == list(NAMES)


def test_vines_and_their_limits_are_unbiased_and_what_should_be_biased_is(
    results: list[Result],
) -> None:
    for result in results:
        for name, row in result["arms"].items():
            assert (row["bias"] > 1e-3) == (name in BIASED), name
        assert result["arms"]["grpo"]["direction"] == pytest.approx(1, abs=1e-9)
        assert result["arms"]["ppo_0"]["bias"] > result["arms"]["ppo_95"]["bias"]


def test_more_rollouts_cost_tokens_and_save_variance(results: list[Result]) -> None:
    for result in results:
        for kind in ("token", "step"):
            rows = [result["arms"][f"vine_{kind}_{k}"] for k in (1, 3, 9)]
            variances = [row["variance"] for row in rows]
            assert variances == sorted(variances, reverse=True)
            assert variances[-1] > result["arms"]["exact"]["variance"]
            rollouts = np.array([row["tokens"] for row in rows]) - result["tokens"]
            np.testing.assert_allclose(rollouts / rollouts[0], [1, 3, 9], rtol=1e-9)
        assert result["arms"]["vine_step_9"]["tokens"] < result["arms"]["vine_token_9"]["tokens"]
        assert result["arms"]["rloo"]["tokens"] == result["tokens"]


def test_at_equal_tokens_all_estimators_use_about_the_same_budget(results: list[Result]) -> None:
    for result in results:
        most = max(row["tokens"] for row in result["arms"].values())
        assert result["budget"] == BUDGET_GROUPS * most
        for row in result["arms"].values():
            assert row["groups"] * row["tokens"] == pytest.approx(result["budget"], rel=0.125)


def test_the_critic_is_off_by_what_is_said() -> None:
    tree = TokenTree.random(3, 6, success=0.3)
    arms = make_arms(tree, 8, np.random.default_rng(0))
    leaves = np.arange(tree.shape.leaves)[None]
    # At λ = 0 the last token has the reward less what the critic says of the last state.
    last = arms["ppo_0"].draw(np.random.default_rng(0), leaves)[0, :, -1]
    errors = tree.rewards - last - tree.values[tree.shape.paths[:, -2]]
    assert np.abs(errors).mean() == pytest.approx(CRITIC_ERROR, rel=0.15)
    assert np.abs(errors.mean()) < 0.03


@pytest.mark.parametrize("family", ["short", "ending"])
def test_samples_have_the_exact_moments(family: str) -> None:
    """Which also says that the cosines are of the estimators whose moments are reported."""
    tree = make_tree(family, 1)
    count = 3000
    for name, arm in make_arms(tree, 4, np.random.default_rng(1)).items():
        found = sampled_gradients(tree, arm, 4, 2, count, np.random.default_rng(7))
        moments = arm.moments
        error = np.linalg.norm(found.mean(axis=0) - moments.mean)
        assert error < 3 * math.sqrt(moments.variance / 2 / count), name
        variance = found.reshape(count, -1).var(axis=0, ddof=1).sum()
        assert variance == pytest.approx(moments.variance / 2, rel=0.12), name


def test_cosine_of_a_mean_of_more_groups_is_larger(results: list[Result]) -> None:
    for result in results:
        for row in result["arms"].values():
            if row["groups"] >= 2 * BUDGET_GROUPS:
                assert row["cosine"]["tokens"][0] > row["cosine"]["responses"][0]


def test_a_mark_is_cut_before_or_after_and_never_into_an_empty_step() -> None:
    ids = [0, 1, 0, 0, 2, 0]
    assert MarkSegmenter().segment_ids(ids) == [0, 1, 3, 4, 6]
    assert MarkSegmenter(before=True).segment_ids(ids) == [0, 2, 3, 5, 6]
    tree = TokenTree.random(3, 3, 1, success=0.4)
    assert enumerate_vine(tree, MarkSegmenter()).bias(tree.gradient) < 1e-10
    assert enumerate_vine(tree, MarkSegmenter(before=True)).bias(tree.gradient) > 0.05


def test_unknown_families_and_graded_rewards_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="family"):
        tree_cell(0, "tall")
    graded = replace(make_tree("short", 0), rewards=np.linspace(0, 1, 81))
    with pytest.raises(InvalidInputError, match="rewards"):
        make_arms(graded, 8, np.random.default_rng(0))


# --- what is made of the cells -------------------------------------------------------------------


def test_squared_error_is_squared_bias_and_the_variance_that_the_budget_leaves() -> None:
    result = {"budget": 40.0, "arms": {"grpo": {"bias": 0.5, "variance": 2.0, "tokens": 10.0}}}
    assert squared_error(result, "grpo", "responses") == 2.25
    assert squared_error(result, "grpo", "tokens") == 0.75


def test_at_the_break_even_cost_both_estimators_have_the_same_variance_times_cost(
    results: list[Result],
) -> None:
    seen = 0
    for result in results:
        for name in ("vine_token_1", "vine_token_9", "vine_step_9"):
            cost = break_even(result, name)
            row, other = result["arms"][name], result["arms"]["rloo"]
            if not math.isfinite(cost):
                assert row["variance"] >= other["variance"]
                continue
            trained = cost * result["tokens"]
            ours = row["variance"] * (row["tokens"] + trained)
            theirs = other["variance"] * (other["tokens"] + trained)
            if cost > 0:
                seen += 1
                assert ours == pytest.approx(theirs, rel=1e-9)
            else:
                assert ours <= theirs
    assert seen > 3


def test_vines_beat_rloo_per_response_and_lose_per_token_but_for_an_early_decision(
    results: list[Result],
) -> None:
    early = [result for result in results if result["family"] == "first action"]
    other = [result for result in results if result["family"] != "first action"]
    assert max(ratios(results, "vine_token_9", "rloo", "responses")) < 0.6
    assert min(ratios(other, "vine_token_9", "rloo", "tokens")) > 1.5
    assert min(ratios(other, "vine_token_1", "rloo", "responses")) > 1
    assert max(ratios(early, "vine_token_1", "rloo", "tokens")) < 1


def test_figures_and_tables_say_what_the_cells_say(results: list[Result]) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("decapod.report")
    from vineppo.experiments.exact_exhibits import figures, tables

    drawn = figures(results)
    assert len({figure.title for figure in drawn}) == len(drawn) == 4
    for figure in drawn:
        assert figure.svg.lstrip().startswith(("<svg", "<?xml"))
        assert figure.alt
        assert figure.caption
    assert "Vines win on: first action." in drawn[3].caption
    summary, where = tables(results)
    biases = {row[0]: row[1] for row in summary.rows}
    assert {name for name, label in NAMES.items() if biases[label] != "0"} == set(BIASED)
    assert len(where.rows) == 3 * 6
    short = next(row for row in where.rows if row[:3] == ["short", "token", 1])
    assert short[-1] == "never"
    of_short = [result for result in results if result["family"] == "short"]
    want = np.mean(ratios(of_short, "vine_token_1", "rloo", "tokens"))
    assert short[4] == round(float(want), 2)
