import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decapod.seeding import Seeds

names = st.lists(st.text(max_size=8) | st.integers(-(2**70), 2**70), max_size=4)


def test_streams_never_change() -> None:
    # Values of the first release, made with numpy 2.4; numpy promises that SeedSequence and the
    # raw words of PCG64 stay the same. A change here makes every recorded seed worthless.
    assert Seeds(0).integer() == 2968811710
    assert Seeds(0).integer() == np.random.SeedSequence(0).generate_state(1)[0]
    assert Seeds(0).integer("arm", 3) == 355938679
    assert Seeds(2**80 + 1).integer("größe") == 3153547509
    words = Seeds(7).generator("data").bit_generator.random_raw(2)
    assert words.tolist() == [6459261520366253330, 902748143386774796]


@settings(deadline=None)
@given(st.integers(0, 2**130), names, names)
def test_a_path_leads_to_the_same_stream_however_it_is_walked(
    root: int, first: list[str | int], second: list[str | int]
) -> None:
    walked = Seeds(root).child(*first).child(*second)
    assert walked == Seeds(root).child(*first, *second)
    assert walked.integer() == Seeds(root).integer(*first, *second)
    assert (
        walked.generator().random(3).tolist()
        == Seeds(root).child(*first).generator(*second).random(3).tolist()
    )


@settings(deadline=None)
@given(names, names)
def test_different_names_give_different_streams(
    first: list[str | int], second: list[str | int]
) -> None:
    left = Seeds(5).sequence(*first).generate_state(4, np.uint64).tolist()
    right = Seeds(5).sequence(*second).generate_state(4, np.uint64).tolist()
    assert (left == right) == (tuple(map(repr, first)) == tuple(map(repr, second)))


def test_streams_of_neighbouring_names_are_uncorrelated() -> None:
    draws = np.array([Seeds(1).generator("arm", i).standard_normal(4000) for i in range(20)])
    correlations = np.corrcoef(draws)[np.triu_indices(20, k=1)]
    # 190 correlations with standard error 1/sqrt(4000): the largest stays below 5 errors.
    assert np.abs(correlations).max() < 5 / np.sqrt(4000)


def test_another_process_with_another_hash_seed_draws_the_same() -> None:
    code = "from decapod.seeding import Seeds; print(Seeds(3).integer('a', 1, 'b'))"
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert answers == {str(Seeds(3).integer("a", 1, "b"))}


def test_the_text_and_the_number_are_different_names() -> None:
    assert Seeds(0).integer("1") != Seeds(0).integer(1)
    assert Seeds(0).integer(np.int64(1)) == Seeds(0).integer(1)


def test_the_integer_fits_32_bits() -> None:
    assert all(0 <= Seeds(i).integer() < 2**32 for i in range(100))


@pytest.mark.parametrize("root", [-1, 1.0, "7", True, None])
def test_a_root_that_is_no_seed_is_refused(root: object) -> None:
    with pytest.raises((TypeError, ValueError), match="root: expected"):
        Seeds(root)  # type: ignore[arg-type]  # the point of the test


@pytest.mark.parametrize("name", [1.5, None, True, ("a",)])
def test_a_name_that_is_no_name_is_refused(name: object) -> None:
    with pytest.raises(TypeError, match="names: expected"):
        Seeds(0).child(name)  # type: ignore[arg-type]  # the point of the test


def test_torch_draws_the_same_from_the_same_stream() -> None:
    torch = pytest.importorskip("torch")
    first = torch.rand(3, generator=Seeds(1).torch_generator("weights"))
    again = torch.rand(3, generator=Seeds(1).torch_generator("weights"))
    other = torch.rand(3, generator=Seeds(1).torch_generator("data"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_torch_the_error_names_the_remedy() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from decapod.seeding import Seeds\n"
        "try: Seeds(0).torch_generator('a')\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "decapod[torch]" in done.stdout


def test_seeding_imports_no_torch() -> None:
    code = "import sys, decapod.seeding; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
