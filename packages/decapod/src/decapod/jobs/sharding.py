"""One list of jobs over machines that share nothing."""

from __future__ import annotations

from collections.abc import Sequence

from decapod.jobs.job import Job


def shard(jobs: Sequence[Job], index: int, count: int) -> list[Job]:
    """Every ``count``-th job, from position ``index`` (0-based) on.

    The shards of one list are disjoint and together are the list, and neighbours in the list
    (often the same arm, of similar length) go to different machines.

    Raises:
        ValueError: not ``0 <= index < count``.
    """
    if count < 1 or not 0 <= index < count:
        raise ValueError(
            f"shard: expected index/count with 0 <= index < count, got {index}/{count}; "
            "the first of four shards is 0/4"
        )
    return list(jobs[index::count])
