"""Run by hand in an environment that holds this package alone: `python smoke.py`."""

import hpreliability as hpr
from hpreliability.published import compare, load_published, load_scores, recompute


def named_extra() -> str:
    """The remedy that a sweep names where its extra is not installed."""
    try:
        hpr.Sweep.from_yaml("sweep.yaml")
    except ImportError as error:
        return str(error).rpartition(": ")[2]
    return "none: the extra is installed"


def main() -> None:
    """Score the vendored data, and meet the error of a missing extra."""
    table = load_scores()
    cells = compare(recompute(table), load_published())
    assert len(cells) == 41
    assert cells["match"].all()
    result = hpr.thc(table.select(agent="DER", hyperparameter="gammas"), permutations=200)
    assert result.frame["p_value"].iloc[0] < 0.05
    assert named_extra() == 'pip install "hpreliability[experiments]"'
    print(f"hpreliability {hpr.__version__}: {result.frame.to_dict('records')[0]}")


if __name__ == "__main__":
    main()
