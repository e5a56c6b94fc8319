"""Cores and numeric threads, shared between learner and actor on one machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from asyncrlhf.config import AsyncRLHFConfig


@contextmanager
def processor_share(args: AsyncRLHFConfig, engine: Any) -> Iterator[None]:
    """Threads and cores of the learner during the run; two pools of threads on the same cores wait
    for one another most of the time.
    """
    threads, cores = torch.get_num_threads(), None
    wanted = args.learner_threads
    shares = getattr(engine, "placement", None) == "process" and args.device.type == "cpu"
    if wanted is None and shares:
        wanted = min(threads, max(1, (os.cpu_count() or 1) // 2))
    if args.learner_cores is not None:
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, args.learner_cores)
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores is not None:
            os.sched_setaffinity(0, cores)
