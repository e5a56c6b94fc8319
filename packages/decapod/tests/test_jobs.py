"""What a job is, the store, shards and the report; executors have test_jobs_executors.py."""

import functools
import hashlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decapod.jobs import (
    Job,
    JobResult,
    JobsFailedError,
    LocalExecutor,
    Store,
    make_executor,
    run_jobs,
    shard,
)
from decapod.jobs.job import result_of
from decapod.jobs.progress import clock, make_progress
from decapod.jsonl import CorruptLineError, FileInUseError

keys = st.text(max_size=5).filter(lambda key: key != "__float__")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


def echo(**arguments: Any) -> Any:
    return arguments


def double(i: int) -> int:
    return 2 * i


class InThisProcess:
    """The smallest executor: what run_jobs does must not depend on where jobs run."""

    def __init__(self) -> None:
        self.ran: list[Job] = []

    def run(self, jobs: Sequence[Job]) -> Iterator[JobResult]:
        for job in reversed(jobs):
            self.ran.append(job)
            yield result_of(job, ("done", job.function(**job.arguments), None, 0.5))


def result(
    job: Job, status: Any = "done", value: Any = None, error: str | None = None
) -> JobResult:
    return JobResult(job.key, job.label, job.arguments, status, value, error, 1.0)


# --- what a job is


def test_keys_never_change() -> None:
    # A change here throws away every stored result of every user.
    job = Job(json.dumps, {"b": [1, 2.5, None], "a": {"x": float("inf")}}, version="2")
    text = (
        '{"arguments":{"a":{"x":{"__float__":"inf"}},"b":[1,2.5,null]},'
        '"function":"json:dumps","version":"2"}'
    )
    assert job.key == hashlib.sha256(text.encode()).hexdigest()[:32]
    assert job.key == "9f7b1353f4b0e5d340e8328ebe9c0a26"


@settings(deadline=None)
@given(st.dictionaries(keys, values, max_size=4))
def test_the_key_does_not_depend_on_order_or_label(arguments: dict[str, Any]) -> None:
    backwards = dict(reversed(arguments.items()))
    assert Job(echo, arguments).key == Job(echo, backwards, label="other").key


@settings(deadline=None)
@given(st.dictionaries(keys, values, max_size=3), st.dictionaries(keys, values, max_size=3))
def test_different_arguments_have_different_keys(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    def canonical(value: Any) -> Any:
        if isinstance(value, dict):
            return "object", sorted((key, canonical(item)) for key, item in value.items())
        if isinstance(value, list):
            return "array", [canonical(item) for item in value]
        return repr(value)

    equal = canonical(first) == canonical(second)
    assert (Job(echo, first).key == Job(echo, second).key) == equal


def test_function_and_version_are_part_of_the_key() -> None:
    known = {
        Job(echo, {"i": 1}).key,
        Job(double, {"i": 1}).key,
        Job(echo, {"i": 1}, version="2").key,
        Job(echo, {"i": 1.0}).key,
        Job(echo, {"i": True}).key,
    }
    assert len(known) == 5


def test_the_key_does_not_change_under_the_job() -> None:
    arguments: dict[str, Any] = {"layers": [1, 2]}
    job = Job(echo, arguments)
    arguments["layers"].append(3)
    assert job.arguments == {"layers": [1, 2]}
    assert job.key == Job(echo, {"layers": [1, 2]}).key


def test_tuples_and_numpy_numbers_are_the_plain_values_they_stand_for() -> None:
    job = Job(echo, {"a": (1, np.int64(2)), "b": np.float64(0.5)})
    assert job.key == Job(echo, {"a": [1, 2], "b": 0.5}).key


def test_a_script_names_its_functions_the_same_however_it_is_started(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "from decapod.jobs import Job\n"
        "def run(i): return i\n"
        "def key(): return Job(run, {'i': 1}).key\n"
        "if __name__ == '__main__': print(key())\n"
    )
    ways = (["train.py"], ["-m", "train"], ["-c", "import train; print(train.key())"])
    answers = {
        subprocess.run(
            [sys.executable, *way], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        for way in ways
    }
    assert len(answers) == 1


class Callable:
    def __call__(self, i: int) -> int:
        return i


@pytest.mark.parametrize("function", [functools.partial(double, 1), Callable(), "double", None])
def test_a_callable_without_a_name_is_refused(function: Any) -> None:
    with pytest.raises(TypeError, match="expected a function with a name"):
        Job(function, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": {"b": [0, {1}]}}, r"arguments\['a'\]\['b'\]\[1\]"),
        ({"x": np.zeros(2)}, r"arguments\['x'\].*tolist"),
        ([1], "arguments: expected a mapping"),
    ],
)
def test_arguments_that_are_not_json_are_refused_with_their_path(
    arguments: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        Job(echo, arguments)


# --- the store


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 9), values), max_size=8), st.integers(1, 4))
def test_files_of_all_writers_together_are_the_store(
    rows: list[tuple[int, Any]], writers: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        expected: dict[str, str] = {}
        for writer in range(writers):
            with Store(folder, f"{writer}of{writers}") as store:
                for i, value in rows[writer::writers]:
                    job = Job(echo, {"i": i})
                    store.append(result(job, value=value))
                    expected.setdefault(job.key, repr(value))
        done = Store(folder).done()
        assert {key: repr(found.value) for key, found in done.items()} == expected


def test_a_failure_is_forgotten_once_the_job_is_done(tmp_path: Path) -> None:
    job, other = Job(echo, {"i": 1}), Job(echo, {"i": 2})
    with Store(tmp_path) as store:
        store.append(result(job, "failed", error="first"))
        store.append(result(job, "killed", error="second"))
        store.append(result(other, "failed", error="other"))
        assert [found.error for found in store.failures().values()] == ["second", "other"]
        assert store.done() == {}
        store.append(result(job, value=7))
        assert store.done()[job.key].value == 7
        assert list(store.failures()) == [other.key]


def test_a_torn_last_line_costs_only_its_own_job(tmp_path: Path) -> None:
    jobs = [Job(double, {"i": i}) for i in range(5)]
    whole = run_jobs(jobs, tmp_path, executor=InThisProcess(), progress=False)
    path = Store(tmp_path).path
    path.write_bytes(path.read_bytes()[:-3])
    executor = InThisProcess()
    again = run_jobs(jobs, tmp_path, executor=executor, progress=False)
    assert again.results == whole.results
    assert len(executor.ran) == 1


@pytest.mark.parametrize("line", ["7", '{"key": "a"}', '{"status": "odd"}'])
def test_a_line_that_is_no_result_is_an_error_with_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "jobs-0of1.jsonl").write_text(line + "\n")
    with pytest.raises(CorruptLineError, match=r"jobs-0of1\.jsonl, line 1: expected a job result"):
        Store(tmp_path).done()


@pytest.mark.parametrize("writer", ["", "a/b", "../x", ".hidden", "a b"])
def test_a_writer_that_is_no_file_name_is_refused(tmp_path: Path, writer: str) -> None:
    with pytest.raises(ValueError, match="writer: expected letters"):
        Store(tmp_path, writer)


def test_a_store_that_does_not_exist_yet_is_empty_and_is_not_made_by_reading(
    tmp_path: Path,
) -> None:
    assert Store(tmp_path / "new").done() == {}
    assert not (tmp_path / "new").exists()


# --- running a list


def test_a_restart_runs_only_what_is_missing(tmp_path: Path) -> None:
    first, second = InThisProcess(), InThisProcess()
    jobs = [Job(double, {"i": i}) for i in range(6)]
    run_jobs(jobs[:4], tmp_path, executor=first, progress=False)
    report = run_jobs(jobs, tmp_path, executor=second, progress=False)
    assert {job.key for job in second.ran} == {job.key for job in jobs[4:]}
    assert [found.value for found in report.results] == [0, 2, 4, 6, 8, 10]
    assert report.reused == 4
    assert report.complete


def test_results_from_the_store_equal_results_just_made(tmp_path: Path) -> None:
    jobs = [Job(echo, {"x": 0.1 * i, "t": [None, "ü", float("inf")]}) for i in range(4)]
    fresh = run_jobs(jobs, tmp_path, executor=InThisProcess(), progress=False)
    stored = run_jobs(jobs, tmp_path, executor=InThisProcess(), progress=False)
    assert fresh.results == stored.results
    assert repr([r.value for r in fresh.results]) == repr([r.value for r in stored.results])


def test_two_equal_jobs_are_refused_before_anything_runs(tmp_path: Path) -> None:
    executor = InThisProcess()
    jobs = [Job(double, {"i": 1}, "a"), Job(double, {"i": 2}), Job(double, {"i": 1}, "b")]
    with pytest.raises(ValueError, match=r"jobs\[0\] \('a'\) and jobs\[2\] \('b'\)"):
        run_jobs(jobs, tmp_path / "store", executor=executor, progress=False)
    assert executor.ran == []
    assert not (tmp_path / "store").exists()


def test_two_runs_into_one_file_are_refused(tmp_path: Path) -> None:
    executor = InThisProcess()
    with Store(tmp_path), pytest.raises(FileInUseError):
        run_jobs([Job(double, {"i": 1})], tmp_path, executor=executor, progress=False)
    assert executor.ran == []


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 7))
def test_shards_are_disjoint_and_together_are_the_list(n: int, count: int) -> None:
    jobs = [Job(double, {"i": i}) for i in range(n)]
    parts = [shard(jobs, index, count) for index in range(count)]
    together = [job.arguments["i"] for part in parts for job in part]
    assert sorted(together) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_that_does_not_exist_is_refused(index: int, count: int) -> None:
    with pytest.raises(ValueError, match="0 <= index < count"):
        shard([], index, count)


def test_shards_made_apart_are_merged_by_copying_their_files(tmp_path: Path) -> None:
    jobs = [Job(double, {"i": i}) for i in range(7)]
    whole = run_jobs(jobs, tmp_path / "whole", executor=InThisProcess(), progress=False)
    (tmp_path / "merged").mkdir()
    for index in range(3):
        part = run_jobs(
            jobs, tmp_path / str(index), executor=InThisProcess(), shard=(index, 3), progress=False
        )
        assert not part.complete
        assert len(part.results) + len(part.missing) == 7
        part.raise_if_failed()  # the jobs of other shards are no failure
        for file in (tmp_path / str(index)).glob("*.jsonl"):
            (tmp_path / "merged" / file.name).write_bytes(file.read_bytes())
    executor = InThisProcess()
    merged = run_jobs(jobs, tmp_path / "merged", executor=executor, progress=False)
    assert executor.ran == []
    assert merged.results == whole.results


def test_the_report_raises_with_the_first_traceback(tmp_path: Path) -> None:
    def failing(i: int) -> int:
        raise ArithmeticError(f"no {i}")

    jobs = [Job(double, {"i": 1}), Job(failing, {"i": 2}, label="arm b")]
    report = run_jobs(jobs, tmp_path, executor=LocalExecutor(1), progress=False)
    with pytest.raises(JobsFailedError, match=r"(?s)1 of 2 jobs failed.*arm b.*no 2"):
        report.raise_if_failed()
    assert [found.value for found in report.results] == [2]


def test_an_empty_list_is_complete(tmp_path: Path) -> None:
    report = run_jobs([], tmp_path, progress=False)
    assert report.complete
    assert report.results == ()


@pytest.mark.parametrize("n_jobs", [0, -1, 1.5, True])
def test_a_number_of_workers_that_is_none_is_refused(n_jobs: Any) -> None:
    with pytest.raises(ValueError, match="n_jobs: expected a whole number"):
        LocalExecutor(n_jobs)


def test_an_unknown_executor_and_a_timeout_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 'local' or 'ray', got 'slurm'"):
        make_executor("slurm", 1)
    with pytest.raises(ValueError, match="timeout: expected seconds"):
        LocalExecutor(1, timeout=0)


def test_without_ray_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from decapod.jobs import make_executor\n"
        "try: make_executor('ray', 1)\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "decapod[ray]" in done.stdout


# --- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_on_a_terminal_counts_and_names_failures() -> None:
    stream = Terminal()
    with make_progress("sweep", 3, shown=True, stream=stream) as bar:
        for failed in (False, True, False):
            bar.advance(failed=failed)
    text = stream.getvalue()
    for part in ("sweep", "3/3", "1 failed", "elapsed", "left"):
        assert part in text


def test_without_a_terminal_a_short_list_says_one_line_at_its_end() -> None:
    stream = io.StringIO()
    with make_progress("sweep", 50, shown=True, stream=stream) as bar:
        for i in range(50):
            bar.advance(failed=i == 3)
    assert stream.getvalue() == "sweep: 50/50, 0:00:00 elapsed, 1 failed\n"


def test_silence_is_silent() -> None:
    stream = Terminal()
    with make_progress("sweep", 1, shown=False, stream=stream) as bar:
        bar.advance(failed=True)
    assert stream.getvalue() == ""


def test_the_clock_counts_hours_minutes_seconds() -> None:
    assert [clock(s) for s in (0, 59.6, 3599, 36061)] == [
        "0:00:00",
        "0:01:00",
        "0:59:59",
        "10:01:01",
    ]


def test_importing_jobs_imports_nothing_heavy() -> None:
    heavy = ("torch", "ray", "pandas", "matplotlib", "rich", "scipy")
    code = (
        f"import sys, decapod.jobs; sys.exit(str([m for m in {heavy} if m in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
