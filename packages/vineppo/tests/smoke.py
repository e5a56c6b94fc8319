"""Run by hand in an environment that holds this package alone: `python smoke.py`."""

import numpy as np
import torch

import vineppo
from vineppo import advantages, diagnostics, losses, segmenters, tasks, values
from vineppo.exact_vines import enumerate_vine


def named_extra(name: str) -> str:
    """The remedy that a public name gives where its extra is not installed."""
    try:
        getattr(vineppo, name)
    except vineppo.MissingExtraError as error:
        return str(error).rpartition(": ")[2]
    return "none: the extra is installed"


def main() -> None:
    """Cut, value, credit, judge, differentiate, and meet the error of a missing extra."""
    assert segmenters.NewlineSegmenter().segment("7+5=2\n#### 2") == [0, 6, 12]

    tree = tasks.TokenTree.random(vocabulary=3, horizon=3, seed=1)
    found = enumerate_vine(tree, segmenters.TokenSegmenter())
    assert np.abs(found.mean - tree.gradient).max() < 1e-10

    states = [tree.state(node) for node in range(tree.shape.internal)]
    exact = values.ExactValueEstimator(tree)(states).values
    truth = diagnostics.GroundTruth.exact(tree.values[: len(states)])
    reports = diagnostics.evaluate_values(
        {"exact": values.ExactValueEstimator(tree), "half": values.ConstantValueEstimator()},
        states, truth, clusters=range(len(states)),
    )  # fmt: skip
    assert reports["exact"].mae.value < 1e-12 < reports["half"].mae.value

    steps = advantages.step_advantages(exact[:3], advantages.step_rewards(1.0, 3))
    assert abs(steps.sum() - (1 - exact[0])) < 1e-12
    tokens = torch.from_numpy(advantages.to_token_advantages(steps, [0, 1, 2, 3]))[None]

    logprobs = torch.full((1, 3), -1.0, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    losses.ppo_clip_loss(logprobs, logprobs.detach(), tokens, mask).loss.backward()
    assert torch.allclose(logprobs.grad, -tokens / 3)

    assert named_extra("VinePPOTrainer") == 'pip install "vineppo[train]"'
    print(f"vineppo {vineppo.__version__}: bias {found.bias(tree.gradient):.0e} with one rollout")


if __name__ == "__main__":
    main()
