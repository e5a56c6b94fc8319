"""From a library's claims to their verdicts: found, recorded, run, concluded, decided.

Libraries register a :class:`~decapod.claims.Reproduction` under the entry-point group
``decapod.reproductions``.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from decapod import jsonl, runs
from decapod.claims import (
    PROFILES,
    Claim,
    DataTable,
    Evidence,
    Figure,
    Findings,
    Paper,
    Profile,
    Reproduction,
    Verdict,
    region,
)
from decapod.jobs import Executor, Job, JobReport, JobsFailedError, Store, run_jobs
from decapod.writing import write_text

ENTRY_POINT_GROUP = "decapod.reproductions"
SCHEMA = 1

_T = TypeVar("_T")


@dataclass(frozen=True)
class Decided:
    """A claim as it was tested, with what came of it: one entry of an :class:`Outcome`.

    ``verdict`` and ``evidence`` are None where the run failed. ``changed`` says that the claim or
    its rule is not the one recorded before the first job ran.
    """

    id: str
    statement: str
    source: str
    arms: tuple[str, ...]
    metric: str
    rule: str
    region: tuple[float, float] | None
    fingerprint: str
    changed: bool
    verdict: Verdict | None
    evidence: Evidence | None


@dataclass(frozen=True)
class Outcome:
    """What ``reproduce`` found, and all that is needed to find it again.

    ``status`` is "concluded", "failed" (``error`` says why, there are no verdicts) or "partial"
    (one shard of the jobs is done, nothing is concluded yet). ``seconds`` is the wall-clock time of
    this run, ``job_seconds`` the time inside all jobs, those reused from earlier runs included.
    """

    name: str
    profile: Profile
    paper: Paper
    status: Literal["concluded", "failed", "partial"]
    error: str
    claims: tuple[Decided, ...]
    figures: tuple[Figure, ...]
    tables: tuple[DataTable, ...]
    notes: tuple[str, ...]
    command: str
    finished: str
    seconds: float
    job_seconds: float
    jobs_done: int
    jobs_reused: int
    jobs_missing: int
    environment: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write as indented, strict JSON, to a temporary name first."""
        content = {"schema": SCHEMA, **dataclasses.asdict(self)}
        write_text(path, _pretty(content))

    @classmethod
    def load(cls, path: Path) -> Outcome:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: not an outcome, or one of another schema.
            OSError: the file cannot be read.
        """
        raw: Any = jsonl.loads(path.read_text(encoding="utf-8"))
        schema = raw.pop("schema", None) if isinstance(raw, dict) else None
        if schema != SCHEMA:
            raise ValueError(
                f"{path}: expected an outcome of schema {SCHEMA}, got {schema!r}. "
                "Run `decapod reproduce` again with this version."
            )
        try:
            return cls(
                **{
                    **raw,
                    "paper": Paper(**raw["paper"]),
                    "claims": tuple(_decided_from_json(claim) for claim in raw["claims"]),
                    "figures": tuple(Figure(**figure) for figure in raw["figures"]),
                    "tables": tuple(DataTable(**table) for table in raw["tables"]),
                    "notes": tuple(raw["notes"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: expected a complete outcome, got one with {error}."
            ) from error


def _decided_from_json(raw: dict[str, Any]) -> Decided:
    return Decided(
        **{
            **raw,
            "arms": tuple(raw["arms"]),
            "region": None if raw["region"] is None else tuple(raw["region"]),
            "evidence": None if raw["evidence"] is None else Evidence(**raw["evidence"]),
        }
    )


def discover() -> tuple[dict[str, Reproduction], dict[str, str]]:
    """All reproductions that installed libraries register, by name.

    Returns:
        The reproductions that load, and for those that do not: name to traceback or reason. A
        broken library never hides the others.
    """
    found: dict[str, Reproduction] = {}
    broken: dict[str, str] = {}
    entries = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    for entry in sorted(entries, key=lambda entry: (entry.name, entry.value)):
        if entry.name in found or entry.name in broken:
            earlier = found.pop(entry.name, None)
            if earlier is not None:
                broken[entry.name] = f"Two installed packages register the name {entry.name!r}."
            continue
        loaded, error = _guarded(entry.load)
        if error:
            broken[entry.name] = error
        elif not isinstance(loaded, Reproduction):
            broken[entry.name] = (
                f"{entry.value}: expected a decapod.claims.Reproduction, "
                f"got {type(loaded).__name__}."
            )
        elif loaded.name != entry.name:
            broken[entry.name] = (
                f"{entry.value}: registered as {entry.name!r} but calls itself {loaded.name!r}. "
                "Give both the same name."
            )
        else:
            found[entry.name] = loaded
    return found, broken


def reproduce(
    reproduction: Reproduction,
    profile: Profile,
    out: Path | str,
    executor: str | Executor = "local",
    n_jobs: int = 1,
    shard: tuple[int, int] | None = None,
    *,
    progress: bool = True,
) -> Outcome:
    """Test a paper's claims: record them, run the jobs, conclude, decide.

    Writes ``OUT/<name>/claims.json`` before the first job, the job results to ``OUT/<name>/jobs``
    (a restart runs only what is missing) and ``OUT/<name>/outcome.json`` at the end. A fault of the
    library, or of one of its jobs, gives an outcome with the error in it, not an exception.

    Args:
        reproduction: what to test.
        profile: how large; see :data:`PROFILES`.
        out: the report's folder, made if missing.
        executor: "local", "ray", or an executor of one's own.
        n_jobs: workers.
        shard: (i, k) runs only every k-th job from the i-th on (from 0) and concludes nothing. Copy
            the ``jobs`` folders of all shards together and call again without it.
        progress: show a bar on stderr.

    Raises:
        ValueError: an unknown profile.
        OSError: ``out`` cannot be written.
        KeyboardInterrupt: passed on; finished jobs are kept.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile: expected one of {list(PROFILES)}, got {profile!r}.")
    folder = Path(out) / reproduction.name
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    trial = _Trial()

    def attempt() -> Mapping[str, Any]:
        jobs = tuple(reproduction.jobs(profile))
        store = Store(folder / "jobs")
        trial.changed = _record_claims(reproduction, profile, folder, store, jobs)
        trial.jobs = run_jobs(
            jobs,
            store,
            executor=executor,
            n_jobs=n_jobs,
            shard=shard,
            progress=progress,
            title=reproduction.name,
        )
        trial.jobs.raise_if_failed()
        if shard is None:
            findings = reproduction.conclude(profile, trial.jobs.results)
            trial.verdicts = _verdicts(reproduction, findings)
            trial.findings = findings
        return runs.environment(reproduction.packages)

    environment, error = _guarded(attempt)
    if error:
        trial.findings, trial.verdicts = Findings({}), {}
        environment, _ = _guarded(runs.environment)
    outcome = Outcome(
        name=reproduction.name,
        profile=profile,
        paper=reproduction.paper,
        status="failed" if error else "partial" if shard else "concluded",
        error=error,
        claims=tuple(_decided(claim, trial) for claim in reproduction.claims),
        figures=tuple(trial.findings.figures),
        tables=tuple(trial.findings.tables),
        notes=tuple(trial.findings.notes),
        command=_command(reproduction.name, profile, executor, n_jobs),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 3),
        job_seconds=round(sum(job.seconds for job in trial.jobs.results), 3) if trial.jobs else 0.0,
        jobs_done=len(trial.jobs.results) if trial.jobs else 0,
        jobs_reused=trial.jobs.reused if trial.jobs else 0,
        jobs_missing=len(trial.jobs.missing) if trial.jobs else 0,
        environment=environment or {},
    )
    if shard is None:
        outcome.save(folder / "outcome.json")
    return outcome


@dataclass
class _Trial:
    """How far a run has come; what is here stays when a later step fails."""

    changed: frozenset[str] = frozenset()
    jobs: JobReport | None = None
    findings: Findings = field(default_factory=lambda: Findings({}))
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)


def _guarded(function: Callable[[], _T]) -> tuple[_T | None, str]:
    """The function's value and "", or None and what went wrong: the rim of other people's code."""
    try:
        return function(), ""
    except JobsFailedError as error:
        return None, str(error)
    except (Exception, SystemExit):  # noqa: BLE001 - a plug-in may raise anything
        return None, traceback.format_exc()


def _record_claims(
    reproduction: Reproduction, profile: Profile, folder: Path, store: Store, jobs: Sequence[Job]
) -> frozenset[str]:
    """Write the claims down before any result is there; later on, only compare.

    Returns:
        Ids of the claims that are not as they were recorded before the first job.
    """
    path = folder / "claims.json"
    sections: dict[str, Any] = {}
    if path.exists():
        sections = json.loads(path.read_text(encoding="utf-8"))["profiles"]
    done = store.done()
    if not any(job.key in done for job in jobs) and not _concluded(folder, profile):
        sections[profile] = {
            "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
            "claims": [_claim_record(claim) for claim in reproduction.claims],
        }
        write_text(path, _pretty({"schema": SCHEMA, "profiles": sections}))
        return frozenset()
    # Profiles may share jobs, so that one profile's record can be all there is for another.
    before = [sections[profile]] if profile in sections else list(sections.values())
    recorded = {claim["fingerprint"] for section in before for claim in section["claims"]}
    return frozenset(c.id for c in reproduction.claims if c.fingerprint not in recorded)


def _concluded(folder: Path, profile: Profile) -> bool:
    path = folder / "outcome.json"
    if not path.exists():
        return False
    earlier = Outcome.load(path)
    return earlier.profile == profile and earlier.status == "concluded"


def _claim_record(claim: Claim) -> dict[str, Any]:
    return {
        "id": claim.id,
        "statement": claim.statement,
        "source": claim.source,
        "arms": claim.arms,
        "metric": claim.metric,
        "rule": claim.rule.text,
        "fingerprint": claim.fingerprint,
    }


def _verdicts(reproduction: Reproduction, findings: Findings) -> dict[str, Verdict]:
    """Apply every claim's rule to its evidence.

    Raises:
        TypeError: the findings are not ``Findings``.
        ValueError: evidence missing, for an unknown claim or for an unknown arm, or a rule that
            gives no verdict.
    """
    if not isinstance(findings, Findings):
        raise TypeError(f"conclude: expected a Findings, got {type(findings).__name__}.")
    ids = {claim.id for claim in reproduction.claims}
    if findings.evidence.keys() != ids:
        raise ValueError(
            f"Findings.evidence: expected one entry for each of {sorted(ids)}, "
            f"got {sorted(findings.evidence)}."
        )
    verdicts: dict[str, Verdict] = {}
    for claim in reproduction.claims:
        evidence = findings.evidence[claim.id]
        unknown = sorted(set(evidence.arms) - set(claim.arms))
        if unknown:
            raise ValueError(
                f"Evidence.arms of {claim.id!r}: expected arms out of {list(claim.arms)}, "
                f"got {unknown} too."
            )
        verdict = claim.rule.decide(evidence)
        if verdict not in get_args(Verdict):
            raise ValueError(
                f"rule of {claim.id!r}: expected one of {list(get_args(Verdict))}, got {verdict!r}."
            )
        verdicts[claim.id] = verdict
    return verdicts


def _decided(claim: Claim, trial: _Trial) -> Decided:
    return Decided(
        id=claim.id,
        statement=claim.statement,
        source=claim.source,
        arms=claim.arms,
        metric=claim.metric,
        rule=claim.rule.text,
        region=region(claim.rule),
        fingerprint=claim.fingerprint,
        changed=claim.id in trial.changed,
        verdict=trial.verdicts.get(claim.id),
        evidence=trial.findings.evidence.get(claim.id),
    )


def _command(name: str, profile: Profile, executor: str | Executor, n_jobs: int) -> str:
    """The command that makes the same numbers; where it writes them is left to the reader."""
    command = f"decapod reproduce {name} --profile {profile}"
    if n_jobs != 1:
        command += f" --jobs {n_jobs}"
    return command + (" --executor ray" if executor == "ray" else "")


def _pretty(content: Mapping[str, Any]) -> str:
    # jsonl decides how numbers that JSON lacks are written; here only the layout differs.
    return json.dumps(json.loads(jsonl.dumps(content)), indent=1, ensure_ascii=False) + "\n"
