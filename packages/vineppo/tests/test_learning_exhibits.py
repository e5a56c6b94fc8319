from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("decapod.report")
pytest.importorskip("scipy")

from scipy import stats

import decapod.report
from decapod.claims import Figure
from vineppo.diagnostics import Candidates, GroundTruth, evaluate_values
from vineppo.diagnostics.state_samples import Alternatives
from vineppo.episodes import State
from vineppo.errors import InvalidInputError
from vineppo.experiments.learning import METHODS
from vineppo.experiments.learning_exhibits import figures, tables
from vineppo.experiments.learning_findings import (
    by_method,
    errors_by_position,
    judged_values,
    train_and_test,
)

Run = dict[str, Any]


def _run(
    method: str = "PPO",
    seed: int = 0,
    end: float = 0.9,
    rate: float = 3e-4,
    iterations: Sequence[int] = (0, 10, 20),
) -> Run:
    """Accuracy rises evenly from 0.5; 4 steps, 1500 tokens and 2 seconds an iteration."""
    curve: list[dict[str, float]] = []
    for n in iterations:
        row = {
            "iteration": n,
            "steps": 4.0 * n,
            "tokens": 1500.0 * n,
            "seconds": 2.0 * n,
            "accuracy": 0.5 + (end - 0.5) * n / iterations[-1],
        }
        curve.append({**row, "train": row["accuracy"] - 0.1, "divergence": 1.0} if n else row)
    return {
        "method": method, "rate": rate, "seed": seed, "curve": curve,
        "end": {"greedy": end, "sampled": end - 0.2, "divergence": 1.5 + seed},
    }  # fmt: skip


def _interval(value: float | None) -> dict[str, Any]:
    return {"value": value, "low": None, "high": None, "n": 9, "clusters": 3}


def _report(mae: float | None, top1: float | None = 0.7, bins: Sequence[float] = (0.1, 0.2)) -> Any:
    width = 1 / len(bins)
    return {
        "tolerance": 0.05, "rollouts": 256.0, "mae_floor": 0.011, "chance": 0.4,
        "mae": _interval(mae), "within": _interval(0.25), "top1": _interval(top1),
        "pairwise": _interval(0.8),
        "by_position": [
            {"low": i * width, "high": (i + 1) * width, "error": _interval(x)}
            for i, x in enumerate(bins)
        ],
    }  # fmt: skip


def _judged(seed: int) -> Run:
    """Rollouts come first, as they do from the bench."""
    values = {
        "rollouts, K=1": _report(0.2),
        "rollouts, K=9": _report(0.05, 0.9, (0.06, 0.04)),
        "group mean": _report(0.15),
        "critic": _report(0.2 + 0.02 * seed, 0.5, (0.1 + 0.1 * seed, 0.3)),
    }
    return {**_run(seed=seed), "values": values}


@pytest.fixture(scope="module")
def several() -> list[Figure]:
    """Of two seeds with values, and a method of one round."""
    return figures([_judged(0), _judged(1), _run("DPO+", end=0.6, iterations=(0, 1))])


@pytest.fixture(scope="module")
def alone() -> tuple[list[Figure], list[Any]]:
    """Of one seed of every method: figures, and the canvases behind them."""
    kept: list[Any] = []
    real = decapod.report.svg_from_matplotlib

    def keep(canvas: Any) -> str:
        kept.append(canvas)
        return real(canvas)

    runs = [_judged(0), *(_run(method) for method in METHODS if method not in ("PPO", "DPO+"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decapod.report, "svg_from_matplotlib", keep)
        return figures([*runs, _run("DPO+", iterations=(0, 1))]), kept


# --- tables --------------------------------------------------------------------------------------


def test_a_row_holds_the_means_over_seeds_of_its_method() -> None:
    ends = (0.86, 0.9, 0.91)
    runs = [_run("RLOO", seed, end) for seed, end in enumerate(ends)]
    runs += [_run("PPO", seed, 0.8, rate=1e-3) for seed in range(3)]
    (table,) = tables(runs)
    cells = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert cells[0] == {
        "Method": "PPO", "Rate": 1e-3, "Seeds": 3, "Start": 0.5,
        "Greedy": "0.800 [0.800, 0.800]", "Sampled": 0.6, "Divergence": 2.5, "Steps": 80,
        "Tokens, k": 30, "Seconds": 40,
    }  # fmt: skip
    assert (cells[1]["Method"], cells[1]["Sampled"]) == ("RLOO", 0.69)
    parts = re.fullmatch(r"([\d.]+) \[([\d.]+), ([\d.]+)\]", str(cells[1]["Greedy"]))
    assert parts
    mean, low, high = map(float, parts.groups())
    half = stats.t.isf(0.025, 2) * np.std(ends, ddof=1) / np.sqrt(3)
    assert mean == 0.89
    assert high - mean == pytest.approx(half, rel=0.05)
    assert mean - low == pytest.approx(half, rel=0.05)


def test_an_interval_of_shares_ends_at_one() -> None:
    (table,) = tables([_run(seed=seed, end=end) for seed, end in enumerate((0.8, 0.99, 0.99))])
    assert str(table.rows[0][4]).endswith(", 1.000]")


def test_methods_stand_in_the_order_of_the_bench() -> None:
    (table,) = tables([_run(method) for method in reversed(METHODS)])
    assert [row[0] for row in table.rows] == list(METHODS)


def test_values_are_means_over_the_seeds_that_have_them() -> None:
    runs = [_judged(0), _judged(1), _run(seed=2)]
    runs[0]["values"]["group mean"]["top1"] = None
    runs[1]["values"]["group mean"] = {**_report(0.25, None), "pairwise": None}
    found = tables(runs)[1]
    assert found.columns[4] == "Within 0.05"
    assert found.rows == [
        ["PPO", "critic", 2, 0.21, 0.25, 0.5, 0.4, 0.8],
        ["PPO", "group mean", 2, 0.2, 0.25, None, 0.4, 0.8],
        ["PPO", "rollouts, K=1", 2, 0.2, 0.25, 0.7, 0.4, 0.8],
        ["PPO", "rollouts, K=9", 2, 0.05, 0.25, 0.9, 0.4, 0.8],
    ]
    assert "256 rollouts" in found.caption
    assert "0.011 on that of PPO" in found.caption


# --- figures -------------------------------------------------------------------------------------


def test_alternative_texts_hold_the_numbers(several: list[Figure]) -> None:
    accuracy, price, values, positions = several
    for figure in several:
        assert figure.svg.lstrip().startswith("<svg")
        assert figure.caption
    assert accuracy.alt.startswith("Mean accuracy: 0.500 at the start.")
    assert (
        "PPO: 0.900 after 80 gradient steps, 30,000 generated tokens, 40 processor seconds"
        in accuracy.alt
    )
    assert "PPO: accuracy 0.900 at 2.00 nats, test 0.900 at training 0.800" in price.alt
    assert "DPO+: accuracy 0.600 at 1.50 nats" in price.alt
    assert "Chance of top-1: 0.400 on PPO's policy." in values.alt
    assert "PPO's policy, critic: error 0.210, top-1 0.500, pairs 0.800" in values.alt
    assert "critic: 0.150 at 25%, 0.300 at 75%; rollouts, K=9: 0.060 at 25%" in positions.alt


def test_one_seed_has_no_bands_and_several_have(
    alone: tuple[list[Figure], list[Any]], several: list[Figure]
) -> None:
    assert ["FillBetween" in figure.svg for figure in alone[0]] == [False] * 4
    assert ["FillBetween" in figure.svg for figure in several] == [True, False, False, True]
    (table,) = tables([_run()])
    assert table.rows[0][4] == "0.900"


def test_runs_without_values_have_figures_and_a_table_without_them() -> None:
    runs = [_run("RLOO"), {**_run("GRPO"), "values": None}]
    assert len(figures(runs)) == 2
    assert len(tables(runs)) == 1


def test_errors_by_position_need_both_predictors_on_the_policy_of_ppo() -> None:
    run = _judged(0)
    del run["values"]["critic"]
    assert len(figures([run, {**_judged(0), "method": "VinePPO K=9"}])) == 3


def test_all_methods_can_be_told_apart_without_colour(
    alone: tuple[list[Figure], list[Any]],
) -> None:
    lines = {line.get_label(): line for line in alone[1][0].axes[0].lines}
    assert set(METHODS) <= set(lines)
    looks = {
        (lines[m].get_marker(), lines[m].get_linestyle(), lines[m].get_fillstyle()) for m in METHODS
    }
    assert len(looks) == len(METHODS)
    assert len({lines[f"VinePPO K={k}"].get_color() for k in (1, 3, 9)}) == 1


def test_the_start_is_drawn_only_where_the_axis_begins_at_zero(
    alone: tuple[list[Figure], list[Any]],
) -> None:
    steps, tokens, seconds = alone[1][0].axes
    assert steps.get_xscale() == "linear"
    assert tokens.get_xscale() == seconds.get_xscale() == "log"
    for axes, each in ((steps, 4.0), (tokens, 1500.0), (seconds, 2.0)):
        for method, later in (("PPO", (10, 20)), ("DPO+", (1,))):
            line = next(line for line in axes.lines if line.get_label() == method)
            want = [each * n for n in ((0, *later) if axes is steps else later)]
            np.testing.assert_allclose(line.get_xdata(), want)


def test_the_reports_of_the_diagnostics_can_be_drawn() -> None:
    rng = np.random.default_rng(0)
    states = [State(row, (1,), (2,) * depth) for row in range(6) for depth in range(4)]
    truth = GroundTruth.exact(rng.random(len(states)))
    sets = [
        Alternatives(State(row, (1,)), tuple(State(row, (1,), (3, last)) for last in range(4)))
        for row in range(6)
    ]
    noise = {"critic": 0.3, "rollouts, K=9": 0.05}
    reports = evaluate_values(
        {
            name: lambda some, spread=spread: truth.values + spread * rng.normal(size=len(some))
            for name, spread in noise.items()
        },
        states,
        truth,
        np.tile(np.arange(4) / 4, 6),
        candidates=Candidates(sets, truth),
        bins=5,
        resamples=100,
    )  # fmt: skip
    values = {name: report.to_json() for name, report in reports.items()}
    runs = json.loads(json.dumps([{**_run(), "values": values}]))
    drawn = figures(runs)
    assert len(drawn) == 4
    for name, report in reports.items():
        assert f"{name}: error {report.mae.value:.3f}" in drawn[2].alt
        assert f"{name}: {report.by_position[0].error.value:.3f} at 10%" in drawn[3].alt


# --- what they are made of -----------------------------------------------------------------------


def test_training_accuracy_stands_beside_the_test_accuracy_of_the_policy_that_sampled() -> None:
    """A round trains on answers of the round before."""
    train, test = train_and_test([_run("RestEM", iterations=(0, 1, 2, 3), end=0.8)])
    np.testing.assert_allclose(train, [[0.6, 0.7]])  # of rounds 2 and 3
    np.testing.assert_allclose(test, [[0.6, 0.7]])  # after rounds 1 and 2
    train, test = train_and_test([_run("PPO")])
    np.testing.assert_allclose(test, [[0.7, 0.9]])
    np.testing.assert_allclose(train, [[0.6, 0.8]])


def test_a_method_of_one_round_has_no_training_accuracy_and_the_caption_says_so(
    several: list[Figure],
) -> None:
    assert train_and_test([_run("DPO+", iterations=(0, 1))])[0].size == 0
    assert several[1].caption.endswith("DPO+ sampled from the start only.")


def test_a_bin_averages_the_seeds_that_have_states_in_it() -> None:
    gone = _report(0.1, bins=(0.3, 0.5))
    gone["by_position"][1]["error"]["value"] = None
    found = errors_by_position([_report(0.1, bins=(0.1, 0.2)), gone])
    assert {middle: x.tolist() for middle, x in found.items()} == {0.25: [0.1, 0.3], 0.75: [0.2]}


def test_predictors_stand_in_one_order_whatever_order_the_bench_gave() -> None:
    found = judged_values(by_method([_judged(0), _judged(1)]))
    assert list(found["PPO"]) == ["critic", "group mean", "rollouts, K=1", "rollouts, K=9"]


@pytest.mark.parametrize("made", [figures, tables])
@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "runs: expected at least one run"),
        ([_run("A2C")], "method: expected one of PPO, .*, got 'A2C'"),
        ([_run(seed=0), _run(seed=1, rate=1e-4)], "one learning rate for PPO, got .0.0001, 0.0003"),
        ([_run(seed=1), _run(seed=1)], "different seeds for PPO, got .1, 1."),
        ([_run(seed=0), _run(seed=1, iterations=(0, 20))], "same iterations"),
    ],
)
def test_runs_that_do_not_fit_are_refused(
    made: Callable[[list[Run]], Any], runs: list[Run], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        made(runs)
