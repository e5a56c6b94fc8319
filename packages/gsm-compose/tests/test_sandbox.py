"""What a program may do and what comes back, under every isolation that this machine has."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsm_compose.errors import IsolationError
from gsm_compose.sandbox import (
    CodeResult,
    IsolationWarning,
    Layer,
    Limits,
    Sandbox,
    run_code,
    run_many,
    strongest,
    works,
)
from gsm_compose.sandbox.running import _why_not

TIGHT = Limits(wall_seconds=1.5, cpu_seconds=1, memory_bytes=256 * 2**20, output_bytes=100_000)
LAYERS: tuple[Layer, ...] = ("namespaces", "seccomp", "restricted", "none")


@pytest.fixture(scope="module", params=LAYERS)
def box(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    layer: Layer = request.param
    if not works(layer):
        pytest.skip(f"this machine has no {layer}: {_why_not(layer)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IsolationWarning)
        with Sandbox(layer) as sandbox:
            yield sandbox


def value(result: CodeResult) -> Fraction | None:
    assert (result.error is None) == (result.values["solution"] is not None), result
    return result.values["solution"]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("48", Fraction(48)),
        ("-7", Fraction(-7)),
        ("0.1", Fraction(1, 10)),
        ("3.0", Fraction(3)),
        ("1 / 3", Fraction("0.3333333333333333")),
        ("Fraction(3, 4)", Fraction(3, 4)),
        ("Decimal('2.50')", Fraction(5, 2)),
        ("'$1,234.00'", Fraction(1234)),
        ("10 ** 599", Fraction(10**599)),
        ("1e300", Fraction(10**300)),
    ],
)
def test_a_returned_number_comes_back_exactly(
    box: Sandbox, returned: str, expected: Fraction
) -> None:
    imports = "from fractions import Fraction\nfrom decimal import Decimal\n"
    assert value(box.run(f"{imports}def solution():\n    return {returned}\n")) == expected


@pytest.mark.parametrize(
    "returned",
    [
        "None",
        "True",
        "'eighteen'",
        "float('nan')",
        "float('inf')",
        "Decimal('Infinity')",
        "Decimal('1e999999')",
        "10 ** 600",
        "Fraction(1, 10 ** 600)",
        "[18]",
        "1j",
        "'18' * 1000",
    ],
)
def test_what_is_no_usable_number_is_a_bad_value(box: Sandbox, returned: str) -> None:
    imports = "from fractions import Fraction\nfrom decimal import Decimal\n"
    result = box.run(f"{imports}def solution():\n    return {returned}\n")
    assert (value(result), result.error) == (None, "bad value")


def test_a_later_failure_leaves_earlier_values(box: Sandbox) -> None:
    source = "def solve_q1():\n    return 6\ndef solution():\n    {}\n"
    for body, error in (
        ("return 1 / 0", "exception"),
        ("while True: pass", "timeout"),
        ("return None", "bad value"),
    ):
        result = box.run(source.format(body), ("solve_q1", "solution"), TIGHT)
        assert (result.values, result.error) == ({"solve_q1": 6, "solution": None}, error)
        assert result.detail


def test_the_first_of_several_errors_is_reported_and_later_functions_still_run(
    box: Sandbox,
) -> None:
    result = box.run("def solution():\n    return 48\n", ("solve_q1", "solution"))
    assert result.values == {"solve_q1": None, "solution": 48}
    assert (result.error, result.detail) == ("no function", "solve_q1")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("", "no function"),
        ("solution = 18\n", "no function"),
        ("def solution(: return 1", "exception"),
        ("a\0b", "exception"),
        ("def solution(x):\n    return x\n", "exception"),
        ("def solution():\n    return input()\n", {"exception", "refused"}),
        ("raise ValueError('x' * 10 ** 6)\n", "exception"),
        ("x = " + "(" * 100_000, "exception"),
        ("x = " + "-" * 100_000 + "1", {"exception", "memory", "killed", "refused"}),
        ("#" * 2**20 + "\ndef solution():\n    return 1\n", "refused"),
        ("def solution():\n    while True: pass\n", "timeout"),
        ("while True:\n    try:\n        while True: pass\n    except Exception: pass", "timeout"),
        ("def solution():\n    return 10 ** 10 ** 8\n", "timeout"),
        ("def solution():\n    return [0] * 10 ** 10\n", "memory"),
        ("def solution():\n    return 'x' * 10 ** 9\n", "memory"),
        ("def solution():\n    x = ['y' * 100]\n    while True: x += x\n", "memory"),
        ("def f(n):\n    return f(n + 1)\ndef solution():\n    return f(0)\n", "exception"),
        ("for i in range(1000):\n    print('x' * 10 ** 6)\n", "output"),
    ],
)
def test_programs_that_fail_are_reported_and_the_next_one_runs(
    box: Sandbox, source: str, error: str | set[str]
) -> None:
    result = box.run(source, limits=TIGHT)
    assert result.values == {"solution": None}
    assert result.error in (error if isinstance(error, set) else {error}), result
    assert len(result.detail) < 1000
    assert result.detail.isprintable()
    assert value(box.run("def solution():\n    return 6 * 8\n")) == 48


def test_both_clocks_are_kept(box: Sandbox) -> None:
    spin = "def solution():\n    while True: pass\n"
    busy = box.run(spin, limits=Limits(wall_seconds=60, cpu_seconds=1))
    assert (busy.error, busy.detail) == ("timeout", "more than 1 s of processor time were used")
    late = box.run(spin, limits=Limits(wall_seconds=0.2, cpu_seconds=60))
    assert (late.error, late.detail) == ("timeout", "more than 0.2 s passed")


def test_a_little_output_is_allowed_and_dropped(
    box: Sandbox, capfd: pytest.CaptureFixture[str]
) -> None:
    source = "print('working')\ndef solution():\n    print('x' * 1000)\n    return 5\n"
    assert value(box.run(source)) == 5
    assert capfd.readouterr() == ("", "")


def test_nothing_carries_over_from_one_program_to_the_next(box: Sandbox) -> None:
    box.run("import math\nleft = 5\ndef solution():\n    return left\n")
    assert box.run("def solution():\n    return left\n").error == "exception"


def test_sets_of_texts_are_gone_through_in_the_same_order_every_time(box: Sandbox) -> None:
    source = "def solution():\n    return int(''.join(list(set('123456789'))))\n"
    with Sandbox(strongest()) as other:
        assert value(box.run(source)) == value(other.run(source))


def test_a_forger_can_claim_a_number_for_itself_and_nothing_else() -> None:
    layer = next((name for name in ("namespaces", "seccomp") if works(name)), None)
    if layer is None:
        pytest.skip("needs a program that may import os and is confined")
    start = "import os\ndef solution():\n    return 1\n"
    with Sandbox(layer) as box:
        claim = box.run(start + "os.write(3, b'value\\tsolution\\t18/1\\nend\\n')\nos._exit(0)\n")
        assert (claim.values, claim.error) == ({"solution": 18}, None)
        for junk in (
            b"value\tsolution\t1/0\nend\n",
            b"value\tanother\t18/1\nend\n",
            b"value\tsolution\t" + b"9" * 700 + b"/1\nend\n",
            b"error\tcorrect\tsolution\tx\nend\n",
            b"text\tsolution\t\xff\x00\x1b[31m\nend\n",
            b"end\n" * 1000,
            b"\n" * 10,
        ):
            result = box.run(start + f"os.write(3, {junk!r})\nos._exit(0)\n")
            assert result.values == {"solution": None}
            assert result.error in ("bad value", "killed")
            assert result.detail.isprintable()
        flood = box.run(start + "while True:\n    os.write(3, b'x' * 60000)\n", limits=TIGHT)
        assert flood.error == "output"


def test_modules_that_compute_can_be_imported_under_every_isolation(box: Sandbox) -> None:
    source = """\
import math
import itertools as it
from collections import Counter, defaultdict
from datetime import date, timedelta
from fractions import Fraction as F
from statistics import mean

def helper(values: list, *, scale: float = 1.0) -> float:
    total = 0
    for index, value in enumerate(values):
        if value % 2 == 0:
            continue
        total += value * scale
    return total

def solution():
    '''A program as models write them.'''
    days = (date(2024, 3, 1) - date(2024, 2, 1)).days
    counts = Counter("banana")
    table = defaultdict(int)
    table["x"] += days
    squares = [n ** 2 for n in range(4)]
    squares.append(math.floor(2.7))
    try:
        squares.append(1 // 0)
    except ZeroDivisionError as error:
        print(f"caught {error!r}")
    best, *rest = sorted(squares, key=lambda n: -n)
    assert best == 9, "no"
    half = F(1, 2)
    total = helper([1, 2, 3], scale=2.0) + counts["a"] + table["x"] + sum(rest) + mean([1, 3])
    return total + half.numerator + len(list(it.permutations([1, 2, 3])))
"""
    assert value(box.run(source)) == 8 + 3 + 29 + 7 + 2 + 1 + 6


def test_results_of_many_come_in_order_and_one_bad_program_spoils_no_other() -> None:
    sources = [f"def solution():\n    return {n} * 2\n" for n in range(40)]
    sources[7] = "import os\nos._exit(0)\n"
    sources[20] = "def solution():\n    return 1 / 0\n"
    results = run_many(sources, workers=3)
    assert [r.values["solution"] for r in results] == [
        None if n in (7, 20) else 2 * n for n in range(40)
    ]
    assert results[7].error in ("killed", "refused")
    assert results[20].error == "exception"
    assert run_many([]) == []


def test_programs_can_be_run_from_a_thread() -> None:
    results: list[CodeResult] = []
    source = "def solution():\n    return 1\n"
    thread = threading.Thread(target=lambda: results.append(run_code(source)))
    thread.start()
    thread.join()
    assert [value(result) for result in results] == [1]


def test_auto_is_the_strongest_isolation_that_works() -> None:
    result = run_code("def solution():\n    return 2\n")
    assert result.isolation == strongest()
    assert result.isolation == next(layer for layer in LAYERS if works(layer))
    assert works("restricted")  # on every system that has fork


def test_running_without_isolation_is_never_silent() -> None:
    with pytest.warns(IsolationWarning, match="WITHOUT ISOLATION"):
        result = run_code("def solution():\n    return 2\n", isolation="none")
    assert (value(result), result.isolation) == (2, "none")


def test_an_interpreter_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(IsolationError, match="did not start"):
        run_code("def solution():\n    return 2\n", isolation="restricted")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"wall_seconds": 0.0}, "wall"),
        ({"wall_seconds": float("nan")}, "wall"),
        ({"cpu_seconds": 0}, "cpu"),
        ({"cpu_seconds": 1.5}, "cpu"),
        ({"memory_bytes": 1}, "memory"),
        ({"output_bytes": -1}, "output"),
    ],
)
def test_limits_that_mean_nothing_are_refused(settings: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Limits(**settings)  # type: ignore[arg-type]  # wrong values on purpose


def test_arguments_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="isolation"):
        run_code("", isolation="jail")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="call"):
        run_code("", ())
    with pytest.raises(ValueError, match="call"):
        run_code("", ("solution\tx",))
    with pytest.raises(ValueError, match="workers"):
        run_many([""], workers=0)


@pytest.fixture(scope="module")
def quick_box() -> Iterator[Sandbox]:
    with Sandbox() as box:
        yield box


@given(number=st.fractions())
def test_every_fraction_survives_the_way_back(quick_box: Sandbox, number: Fraction) -> None:
    source = f"from fractions import Fraction\ndef solution():\n    return {number!r}\n"
    assert value(quick_box.run(source)) == number


@given(source=st.text())
def test_no_text_breaks_the_sandbox(quick_box: Sandbox, source: str) -> None:
    assert quick_box.run(source).error in ("exception", "no function", "refused")
    assert quick_box._process is not None
    assert quick_box._process.poll() is None


def test_the_descriptors_of_the_parent_are_as_before() -> None:
    handles = Path("/proc/self/fd")
    if not handles.is_dir():
        pytest.skip("needs /proc to count open files")
    run_code("def solution():\n    return 1\n")
    before = sorted(handles.iterdir())
    run_many(["def solution():\n    return 1\n", "while True: pass"], limits=TIGHT)
    assert sorted(handles.iterdir()) == before
