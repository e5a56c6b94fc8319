"""Run by hand in an environment that holds this package alone: `python smoke.py`."""

import gsm_compose as gc


def named_extra() -> str:
    """The remedy that an export names where its extra is not installed."""
    try:
        gc.build_benchmark(gc.load_gsm8k("test")[:60], n=2).to_hf_dataset()
    except ImportError as error:
        return str(error).rpartition(": ")[2]
    return "none: the extra is installed"


def main() -> None:
    """Build, verify, simulate, and meet the error of a missing extra."""
    rows = gc.load_gsm8k("test")[:120]
    benchmark = gc.build_benchmark(rows, n=12)
    assert gc.verify.symbolic_audit(benchmark, rows).clean
    reasoner = gc.simulate.SimulatedReasoner(e1=0.1, e2=0.1, second_hop=0.5)
    results = gc.evaluate(benchmark, reasoner.generate_for(benchmark), progress=False)
    report = results.gap()
    assert report.n == 12
    assert named_extra() == 'pip install "gsm-compose[datasets]"'
    print(f"gsm-compose {gc.__version__}\n{report.summary()}")


if __name__ == "__main__":
    main()
