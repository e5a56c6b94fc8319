"""Run by hand in an environment that holds this package alone: `python smoke.py`."""

import tempfile
from pathlib import Path

import decapod
from decapod.jobs import Job, run_jobs
from decapod.seeding import Seeds
from decapod.stats import aggregate


def draw(seed: int) -> list[float]:
    """Ten normal numbers of a named stream."""
    return Seeds(seed).generator("smoke").standard_normal(10).tolist()


def main() -> None:
    """Draw in two worker processes, find everything again in the store, summarise."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = [Job(draw, {"seed": seed}) for seed in range(4)]
        first = run_jobs(jobs, Path(folder), n_jobs=2, progress=False)
        again = run_jobs(jobs, Path(folder), n_jobs=2, progress=False)
    assert first.complete
    assert again.reused == len(jobs)
    assert [r.value for r in first.results] == [r.value for r in again.results]
    estimate = aggregate([r.value for r in first.results], resamples=200)
    assert estimate.low <= estimate.value <= estimate.high
    print(f"decapod {decapod.__version__}: {estimate}")


if __name__ == "__main__":
    main()
