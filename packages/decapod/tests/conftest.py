import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """A shell starts what runs in the background with Ctrl-C ignored, which children inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The address of a real Ray cluster of two nodes with one CPU each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    yield nodes.address
    nodes.shutdown()


TOY = """
from decapod.claims import Above, Claim, Evidence, Findings, Paper, Reproduction
from decapod.jobs import Job

def measure(seed):
    return 1.0 + 0.1 * seed

def jobs(profile):
    return [Job(measure, {"seed": s}, label=f"seed {s}") for s in range(4)]

def conclude(profile, results):
    values = [r.value for r in results]
    evidence = Evidence(sum(values) / len(values), min(values), max(values), len(values), "seeds")
    return Findings({"gain": evidence}, notes=(f"{profile} notes",))

def reproduction(name, jobs=jobs, conclude=conclude):
    return Reproduction(
        name,
        Paper("On toys", "A. Author", "Venue", 2024, "https://example.org/toys"),
        (Claim("gain", "Toys gain", "Table 1", ("toy",), "gain", Above(0)),),
        jobs,
        conclude,
    )

def raising(profile, results):
    raise RuntimeError("the toy broke")

TOY = reproduction("toy")
RAISING = reproduction("raising", conclude=raising)
MISNAMED = reproduction("other")
NOT_ONE = 7
"""


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., Path]:
    """Writes a real distribution, with metadata and entry points; returns its site folder."""

    def install(entries: dict[str, str], distribution: str = "toys", code: str = TOY) -> Path:
        site = tmp_path / "site"
        info = site / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0")
        lines = "".join(f"{name} = {target}\n" for name, target in entries.items())
        (info / "entry_points.txt").write_text(f"[decapod.reproductions]\n{lines}")
        (site / f"{distribution}_module.py").write_text(code)
        return site

    return install
