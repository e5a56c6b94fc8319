"""Many independent jobs, on this machine or many, over as many attempts as it takes."""

from decapod.jobs.job import Job, JobResult, function_name
from decapod.jobs.local import LocalExecutor
from decapod.jobs.running import Executor, JobReport, JobsFailedError, make_executor, run_jobs
from decapod.jobs.sharding import shard
from decapod.jobs.store import Store
from decapod.jsonl import JSON

__all__ = [
    "JSON",
    "Executor",
    "Job",
    "JobReport",
    "JobResult",
    "JobsFailedError",
    "LocalExecutor",
    "Store",
    "function_name",
    "make_executor",
    "run_jobs",
    "shard",
]
