"""Run by hand in an environment that holds this package alone: `python smoke.py`."""

import torch

import asyncrlhf
from asyncrlhf import losses, schedule, transport


def named_extra(name: str) -> str:
    """The remedy that a public name gives where its extra is not installed."""
    try:
        getattr(asyncrlhf, name)
    except asyncrlhf.MissingExtraError as error:
        return str(error).rpartition(": ")[2]
    return "none: the extra is installed"


def main() -> None:
    """Predict, admit, publish, differentiate, and meet the error of a missing extra."""
    ahead, synchronous = (schedule.simulate(g=2, t=2, rounds=50, ahead=d) for d in (1, 0))
    gain = ahead.speedup_over(synchronous)
    assert ahead.makespan == 2 + 49 * 2 + 2
    assert schedule.RoundSchedule(minibatches=4, epochs=2, ahead=1).max_staleness == 15

    gate = asyncrlhf.StalenessGate(batch_size=2, max_staleness=0)
    assert [gate.try_admit() for _ in range(3)] == [True, True, False]

    weight = torch.nn.Parameter(torch.ones(3))
    with transport.SharedMemory() as medium:
        snapshot = medium.publish([("weight", weight)], 0)
        with torch.no_grad():
            weight.mul_(2)
        assert [value.tolist() for _, value in snapshot] == [[1.0, 1.0, 1.0]]

    logps = torch.zeros(4, requires_grad=True)
    groups, scores = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    losses.online_dpo(logps, torch.zeros(4), scores, groups).loss.backward()
    assert torch.allclose(logps.grad, torch.tensor([-1.0, 1.0, 1.0, -1.0]) * 0.05 / 2)

    assert named_extra("AsyncRLHFTrainer") == 'pip install "asyncrlhf[train]"'
    print(f"asyncrlhf {asyncrlhf.__version__}: {gain.ratio:.2f} times the speed, one round ahead")


if __name__ == "__main__":
    main()
