"""The learning rate over the progress of a run."""

from __future__ import annotations

import math

from vineppo.config import Schedule


def rate_factor(progress: float, schedule: Schedule, warmup: float) -> float:
    """What the peak learning rate is multiplied with.

    Progress, not steps: how many optimizer steps an iteration takes may depend on what was sampled.

    Args:
        progress: share of the run that is done, from 0 to 1.
        schedule: after the warm-up: linear or cosine to 0, or constant.
        warmup: share of the run in which the rate rises linearly from 0.
    """
    if progress < warmup:
        return progress / warmup
    if schedule == "constant" or warmup >= 1:
        return 1.0
    left = (1 - progress) / (1 - warmup)
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
