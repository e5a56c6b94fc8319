"""Bad input ends in an error that names the argument, at the first batch at the latest.

Whatever is refused when a trainer is made leaves no file. What the first batch shows leaves the
resolved settings, whole, and nothing else; no weight has moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("decapod.lm")
pytest.importorskip("transformers")

from vineppo.credit import Credit
from vineppo.episodes import Rollout
from vineppo.errors import InvalidInputError, MissingExtraError, NotFiniteError, RewardError
from vineppo.rollout import TransformersBackend

# PEFT asks models for what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


class Segments:
    """A segmenter that gives whatever it is told."""

    def __init__(self, offsets: Callable[[str], Any]) -> None:
        self.segment = offsets


def unfinished(rollouts: list[list[Rollout]]) -> list[list[Rollout]]:
    return [[replace(r, finished=False) for r in of] for of in rollouts]


def one_empty(rollouts: list[list[Rollout]]) -> list[list[Rollout]]:
    return [*rollouts[:-1], [*rollouts[-1][:-1], Rollout((), (), finished=True)]]


def refused(tiny: Any, run: Any, folder: Path, error: type[Exception], message: str) -> None:
    """Training ends so, and nothing was written or learnt."""
    before = tiny.parameters(run)
    with pytest.raises(error, match=message):
        run.train()
    after = tiny.parameters(run)
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)
    assert tiny.files(folder) == {"settings.json"}
    assert run.history == []


# --- at the first batch ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (lambda text: [0, len(text), 1], r"segmenter: Segments returned \d+ and then 1;"),
        (lambda text: [0, 0, len(text)], "segmenter: Segments returned 0 and then 0;"),
        (lambda _: [0], r"segmenter: Segments returned offsets from 0 to 0; expected"),
        (lambda text: [1, len(text)], r"segmenter: Segments returned"),
        (lambda text: [0, len(text) + 1], r"segmenter: Segments returned offsets from 0 to"),
        (lambda text: [0.0, float(len(text))], "segmenter: Segments returned 0.0 among"),
        (lambda _: None, "segmenter: Segments returned None; expected a list"),
    ],
)
def test_segmenters_that_lose_something(
    tiny: Any, tmp_path: Path, offsets: Callable[[str], Any], message: str
) -> None:
    run = tiny.recorded("VinePPO", tmp_path, extra={"segmenter": Segments(offsets)})
    refused(tiny, run, tmp_path, InvalidInputError, message)
    assert len(run.backend.calls) == 1  # no rollout was paid for


@pytest.mark.parametrize("method", ["VinePPO", "PPO", "RestEM"])
def test_an_empty_answer(tiny: Any, tmp_path: Path, method: str) -> None:
    run = tiny.recorded(method, tmp_path, tiny.changed_by(one_empty))
    message = r"rollout_backend: expected at least one token of every answer, got none for row \d"
    refused(tiny, run, tmp_path, InvalidInputError, message)


@pytest.mark.parametrize("method", ["VinePPO", "RLOO", "DPOPositive"])
def test_answers_all_cut_by_length(tiny: Any, tmp_path: Path, method: str) -> None:
    run = tiny.recorded(method, tmp_path, tiny.changed_by(unfinished))
    message = "max_response_tokens: all 8 answers of the first iteration were cut at 12 tokens"
    refused(tiny, run, tmp_path, InvalidInputError, message)


def test_scores_that_are_no_probabilities_with_an_adaptive_budget(
    tiny: Any, tmp_path: Path
) -> None:
    def double(**columns: Any) -> list[float]:
        return [2 * score for score in tiny.odd(**columns)]

    run = tiny.recorded("VinePPO", tmp_path, reward=double, num_rollouts=4, adaptive_pilot=2)
    message = "reward_funcs: expected scores from 0 to 1 with an adaptive budget, .* got 2"
    refused(tiny, run, tmp_path, InvalidInputError, message)
    assert len(run.backend.calls) == 1  # no rollout was paid for
    tiny.trainer("VinePPO", tmp_path / "constant", reward=double, iterations=1).train()


def raising(**_: Any) -> list[float]:
    raise ZeroDivisionError("division by zero")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raising, "reward_funcs: raising raised ZeroDivisionError: division by zero"),
        (lambda **_: [1.0], r"reward_funcs: expected \d numbers from <lambda>"),
        (lambda completions, **_: [float("nan")] * len(completions), "expected finite numbers"),
        (lambda odd: [float(i) for i in odd], "reward_funcs: <lambda> raised TypeError: .*prompts"),
    ],
)
@pytest.mark.parametrize("method", ["VinePPO", "GRPO", "RestEM"])
def test_reward_functions_that_fail(
    tiny: Any, tmp_path: Path, method: str, reward: Callable[..., Any], message: str
) -> None:
    refused(tiny, tiny.trainer(method, tmp_path, reward=reward), tmp_path, RewardError, message)


@pytest.mark.parametrize("method", ["VinePPO", "PPO", "RestEM", "DPOPositive"])
def test_weights_that_are_no_numbers(tiny: Any, tmp_path: Path, method: str) -> None:
    policy = tiny.model()
    with torch.no_grad():
        policy.model.norm.weight[3] = float("nan")
    run = tiny.trainer(method, tmp_path, of=policy)
    refused(tiny, run, tmp_path, NotFiniteError, "logprobs of rollouts: .* NaN .* weights")


def test_weights_that_are_no_numbers_while_another_model_samples(tiny: Any, tmp_path: Path) -> None:
    policy, sampler = tiny.model(), tiny.model()
    with torch.no_grad():
        policy.model.norm.weight[3] = float("nan")
    backend = TransformersBackend(sampler)
    backend.load_weights = lambda _: None  # type: ignore[method-assign]
    run = tiny.trainer("RLOO", tmp_path, of=policy, extra={"rollout_backend": backend})
    message = "log-probabilities of the model: expected finite numbers, got nan at response token 0"
    refused(tiny, run, tmp_path, NotFiniteError, message)


def test_advantages_that_are_no_numbers(tiny: Any, tmp_path: Path) -> None:
    def bad(batch: Any, seed: int) -> Credit:
        return Credit([torch.full((len(e.response_ids),), torch.nan) for e in batch.episodes])

    run = tiny.trainer("RLOO", tmp_path, extra={"advantage_estimator": bad})
    refused(tiny, run, tmp_path, NotFiniteError, "advantages: expected finite numbers")


def test_advantages_of_another_length(tiny: Any, tmp_path: Path) -> None:
    def short(batch: Any, seed: int) -> Credit:
        return Credit([torch.zeros(1 + len(e.response_ids)).numpy() for e in batch.episodes])

    run = tiny.trainer("RLOO", tmp_path, extra={"advantage_estimator": short})
    message = r"advantage_estimator: expected \d+ advantages for answer 0, one per token, got \d+"
    refused(tiny, run, tmp_path, InvalidInputError, message)

    def few(batch: Any, seed: int) -> Credit:
        return Credit([])

    run = tiny.trainer("RLOO", tmp_path, extra={"advantage_estimator": few})
    message = "advantage_estimator: expected advantages of 8 answers, got those of 0"
    refused(tiny, run, tmp_path, InvalidInputError, message)


def test_gradients_that_overflow(tiny: Any, tmp_path: Path) -> None:
    def huge(completions: Sequence[str], **_: Any) -> list[float]:
        return [1e200 * len(text) for text in completions]

    run = tiny.trainer("RLOO", tmp_path, reward=huge, whiten=None)
    message = "gradient: expected finite numbers in step 0, got a norm of (inf|nan)"
    refused(tiny, run, tmp_path, NotFiniteError, message)


# --- when a trainer is made -----------------------------------------------------------------------


def no_eos(tiny: Any) -> dict[str, Any]:
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    return {"processing_class": tokenizer}


def wrong_config(tiny: Any) -> dict[str, Any]:
    return {"args": tiny.settings("PPO", "nowhere")}


AT_ONCE: list[tuple[str, Callable[[Any], dict[str, Any]], str]] = [
    ("VinePPO", no_eos, "processing_class: expected a tokenizer with an EOS token, got none"),
    ("VinePPO", wrong_config, "args: expected a VinePPOConfig, got PPOConfig"),
    ("VinePPO", lambda _: {"args": {"seed": 1}}, "args: expected a VinePPOConfig, got dict"),
    ("VinePPO", lambda _: {"num_rollouts": 0}, "num_rollouts: expected a whole number of at least"),
    ("VinePPO", lambda _: {"segmenter": "lines"}, "segmenter: expected one of newline"),
    ("VinePPO", lambda _: {"extra": {"segmenter": Segments}}, "segmenter: expected a name or an o"),
    ("RLOO", lambda _: {"mini_batch_size": 0}, "mini_batch_size: expected a whole number"),
    ("RLOO", lambda _: {"micro_batch_size": 1.5}, "micro_batch_size: expected a whole number"),
    ("RLOO", lambda _: {"num_generations": 3}, "episodes_per_iteration: expected a multiple of"),
    ("RLOO", lambda _: {"rows": []}, "train_dataset: expected at least one row, got none"),
    ("RLOO", lambda _: {"rows": None}, "train_dataset: expected rows with a column prompt"),
    ("RLOO", lambda _: {"rows": [{"odd": 1}]}, r"train_dataset\[0\]: expected a text or messages"),
    (
        "RLOO",
        lambda _: {"max_response_tokens": 45},
        r"train_dataset\[0\]: its prompt of 4 tokens a",
    ),
    ("RLOO", lambda _: {"reward": None}, "reward_funcs: expected one function or several, got"),
    ("RLOO", lambda _: {"reward_weights": (1.0, 2.0)}, "reward_weights: expected 1, one for each"),
    ("RLOO", lambda _: {"eval_every": 1}, "eval_dataset: expected one, because eval_every=1"),
    ("RLOO", lambda _: {"extra": {"eval_dataset": []}}, "eval_dataset: expected at least one row"),
]


@pytest.mark.parametrize(("method", "how", "message"), AT_ONCE)
def test_what_does_not_fit_is_refused_at_once(
    tiny: Any, tmp_path: Path, method: str, how: Callable[[Any], dict[str, Any]], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=f"^{message}"):
        tiny.trainer(method, tmp_path / "output", **how(tiny))
    assert list(tmp_path.iterdir()) == []


def test_the_reference_is_not_the_model(tiny: Any, tmp_path: Path) -> None:
    import vineppo

    policy = tiny.model()
    arguments = (tiny.odd, tiny.ROWS, tiny.tokenizer(), tiny.settings("RLOO", tmp_path / "output"))
    with pytest.raises(InvalidInputError, match="ref_model: expected another object than model"):
        vineppo.RLOOTrainer(policy, policy, *arguments)
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(InvalidInputError, match="ref_model: expected another object than model"):
        vineppo.RLOOTrainer(policy, policy, *arguments, peft_config=lora)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_needs_the_extra(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r'peft is not installed.*"vineppo\[peft\]"'):
        tiny.trainer("RLOO", tmp_path / "output", extra={"peft_config": object()})


def test_there_is_nothing_to_evaluate_on(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="eval_dataset: expected one for evaluation"):
        tiny.trainer("RLOO", tmp_path).evaluate()
