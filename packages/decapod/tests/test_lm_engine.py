"""Requests, parameters and seeds, and what importing the package costs."""

import subprocess
import sys

import pytest

from decapod.lm import Request, SamplingParams, sample_requests


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("max_new_tokens", 0, "at least 1, got 0"),
        ("temperature", -0.1, "at least 0, got -0.1"),
        ("temperature", float("nan"), "finite"),
        ("temperature", float("inf"), "finite"),
        ("top_p", 0.0, r"\(0, 1\], got 0"),
        ("top_p", 1.5, r"\(0, 1\], got 1.5"),
        ("top_k", -1, "at least 0"),
        ("stop", "Question:", r"write \('Question:',\)"),
        ("stop", ("",), "empty"),
        ("stop_token_ids", (-3,), "at least 0"),
        ("logprobs_of", "raw", "'model' or 'sampler', got 'raw'"),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(field: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: .*{words}"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed: .*got {seed}"):
        Request((1,), SamplingParams(), seed)


def test_samples_of_all_prompts_have_seeds_of_their_own_and_their_place_as_id() -> None:
    requests = sample_requests([[5], [6], [5]], SamplingParams(), seed=1, n=40)
    assert [request.id for request in requests] == list(range(120))
    assert len({request.seed for request in requests}) == 120
    assert [request.prompt for request in requests[::40]] == [(5,), (6,), (5,)]


def test_more_samples_or_prompts_leave_the_seeds_of_the_first_alone() -> None:
    few = sample_requests([[5], [6]], SamplingParams(), seed=1, n=2)
    many = sample_requests([[5], [6], [7]], SamplingParams(), seed=1, n=5)
    assert [few[0].seed, few[1].seed, few[2].seed, few[3].seed] == [
        many[0].seed,
        many[1].seed,
        many[5].seed,
        many[6].seed,
    ]
    assert sample_requests([[5]], SamplingParams(), seed=2)[0].seed != few[0].seed


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        sample_requests([[1]], SamplingParams(), n=0)


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "tokenizers", "httpx", "vllm")
    code = (
        "import sys, decapod, decapod.lm\n"
        "decapod.lm.SamplingParams(), decapod.lm.sample_requests\n"
        f"sys.exit(' '.join(m for m in {heavy!r} if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("TransformersEngine", "torch", "lm"),
        ("build_tokenizer", "torch", "lm"),
        ("ServerEngine", "httpx", "lm"),
        ("VLLMEngine", "vllm", "vllm"),
    ],
)
def test_a_missing_dependency_is_an_error_that_names_the_extra(
    name: str, module: str, extra: str
) -> None:
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import decapod.lm\n"
        "try:\n"
        f"    decapod.lm.{name}\n"
        "except ImportError as error:\n"
        "    sys.exit(0 if sys.argv[1] in str(error) else str(error))\n"
        "sys.exit('no error')"
    )
    words = f'pip install "decapod[{extra}]"'
    done = subprocess.run([sys.executable, "-c", code, words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
