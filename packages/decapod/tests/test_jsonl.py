import enum
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decapod.jsonl import Appender, CorruptLineError, FileInUseError, dumps, loads, read, to_json

keys = st.text(max_size=5).filter(lambda key: key != "__float__")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


def identical(left: object, right: object) -> bool:
    """Equal in value and in type, with NaN equal to NaN and 0.0 different from -0.0."""
    return repr(left) == repr(right)


@settings(deadline=None)
@given(values)
def test_every_json_value_comes_back_as_it_was(value: object) -> None:
    assert identical(loads(dumps(value)), value)


@settings(deadline=None)
@given(values)
def test_a_line_is_strict_json_in_one_line_of_ascii(value: object) -> None:
    line = dumps(value)
    assert line.isascii()
    assert "\n" not in line
    for word in ("NaN", "Infinity"):
        with pytest.raises(ValueError, match="not JSON"):
            loads(word)


@given(st.lists(values, max_size=5), st.data())
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50
)
def test_cutting_the_file_anywhere_loses_no_finished_record(
    tmp_path: Path, records: list[object], data: st.DataObject
) -> None:
    path = tmp_path / "log.jsonl"
    path.unlink(missing_ok=True)  # the folder is shared by all examples
    ends = [0]
    with Appender(path) as appender:
        for record in records:
            appender.append(record)
            ends.append(path.stat().st_size)
    cut = data.draw(st.integers(0, ends[-1]))
    with path.open("r+b") as stream:
        stream.truncate(cut)
    finished = sum(end <= cut for end in ends) - 1

    assert identical(read(path), records[:finished])
    with Appender(path) as appender:
        appender.append("after")
    assert identical(read(path), [*records[:finished], "after"])


def test_a_torn_line_longer_than_a_block_is_cut_away(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a":1}\n' + b'"' + b"x" * 200_000)
    with Appender(path) as appender:
        appender.append(2)
    assert read(path) == [{"a": 1}, 2]


def test_a_damaged_earlier_line_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('1\n{"broken\n3\n')
    with pytest.raises(CorruptLineError, match=r"log\.jsonl, line 2: expected one JSON value"):
        read(path)


def test_an_absent_file_has_no_records(tmp_path: Path) -> None:
    assert read(tmp_path / "absent.jsonl") == []


def test_a_second_writer_is_refused_until_the_first_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Appender(path) as first:
        first.append(1)
        with pytest.raises(FileInUseError, match="only writer"):
            Appender(path)
    with Appender(path) as second:
        second.append(2)
    assert read(path) == [1, 2]


def test_a_writer_in_another_process_is_refused_and_its_death_frees_the_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log.jsonl"
    code = (
        "import sys, time; from decapod.jsonl import Appender\n"
        "appender = Appender(sys.argv[1]); appender.append(1); print('open', flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == b"open"
        with pytest.raises(FileInUseError):
            Appender(path)
        other.kill()
    with Appender(path) as appender:
        appender.append(2)
    assert read(path) == [1, 2]


def test_a_refused_record_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Appender(path) as appender:
        appender.append(1)
        with pytest.raises(TypeError, match=r"record\['a'\]\[1\]"):
            appender.append({"a": [1, {2}]})
    assert read(path) == [1]


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits there")
def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    # A file size limit makes the system write the first part of a line only, as a full disk does.
    code = (
        "import resource, signal, sys; from decapod.jsonl import Appender\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "appender = Appender(sys.argv[1]); appender.append('x' * 100)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))\n"
        "try: appender.append('y' * 200)\n"
        "except OSError: pass\n"
        "else: sys.exit('the write went through')\n"
        "appender.append('z')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert read(path) == ["x" * 100, "z"]


def test_a_closed_writer_refuses(tmp_path: Path) -> None:
    appender = Appender(tmp_path / "log.jsonl")
    appender.close()
    appender.close()
    with pytest.raises(ValueError, match="closed"):
        appender.append(1)


class Colour(enum.IntEnum):
    RED = 3


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float64(0.5), 0.5),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.int64(7), 7),
        (np.bool_(1), True),
        ((1, (2,)), [1, [2]]),
        (Colour.RED, 3),
    ],
)
def test_numbers_of_other_kinds_and_tuples_become_plain_json(value: object, plain: object) -> None:
    assert identical(to_json(value), plain)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [np.zeros(2)]}, r"value\['a'\]\[0\]: expected a JSON value.*\.tolist\(\)"),
        ({1: 2}, "expected text keys, got 1 of type int"),
        ({"a": {3}}, r"value\['a'\]: expected a JSON value, got builtins\.set"),
        (b"x", "got builtins.bytes"),
        (1 + 2j, "got builtins.complex"),
    ],
)
def test_what_json_cannot_carry_is_refused_with_its_path(value: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        to_json(value)


def test_the_reserved_key_and_endless_structures_are_refused() -> None:
    with pytest.raises(ValueError, match="reserved"):
        dumps({"__float__": 1})
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="contains itself"):
        dumps(endless)
    shared = [1]
    assert dumps([shared, shared]) == "[[1], [1]]"


def test_non_finite_numbers_have_the_documented_form() -> None:
    assert dumps([math.nan, math.inf, -math.inf]) == (
        '[{"__float__": "nan"}, {"__float__": "inf"}, {"__float__": "-inf"}]'
    )
    with pytest.raises(ValueError, match="expected one of"):
        loads('{"__float__": "huge"}')


def test_reading_while_another_writes_sees_finished_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Appender(path) as appender:
        appender.append({"a": 1})
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, b'{"a": 2')
        os.close(descriptor)
        assert read(path) == [{"a": 1}]
