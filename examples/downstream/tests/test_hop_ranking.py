"""What is known of the simulated reasoners is found again."""

from hop_ranking import REASONERS, consistency, scores, simulated

from gsm_compose.simulate import SimulatedReasoner


def test_a_ranking_that_compositions_turn_over_is_told_from_chance() -> None:
    frame = scores(simulated(REASONERS), runs=4)
    best = frame.groupby(["condition", "model"])["accuracy"].mean().groupby("condition").idxmax()
    assert best["original"] == ("original", "sharp")
    assert best["compositional"] != ("compositional", "sharp")
    found = consistency(frame)
    assert found.score > found.null_mean
    assert found.p_value < 0.05


def test_a_ranking_that_stays_is_not() -> None:
    alike = {
        name: SimulatedReasoner(e1=error, e2=error)
        for name, error in {"a": 0.05, "b": 0.2, "c": 0.4}.items()
    }
    assert consistency(scores(simulated(alike), runs=4)).p_value > 0.05
