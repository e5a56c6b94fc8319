from __future__ import annotations

import asyncio
import functools
import pickle
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncrlhf.errors import InvalidInputError, RewardError
from asyncrlhf.reward_models import score_ids
from asyncrlhf.rewards import RewardSuite, check_picklable
from asyncrlhf.tasks import SyntheticSummary

TASK = SyntheticSummary()
EOS = TASK.eos_token_id


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return TASK.tokenizer()


@pytest.fixture(scope="module")
def four() -> dict[str, Any]:
    """Four completions, the last of which did not end."""
    rows = TASK.prompts(4)
    return {
        "prompts": [row["prompt"] for row in rows],
        "prompt_ids": [row["prompt_ids"] for row in rows],
        "completion_ids": [[4, 5, EOS], [EOS], [6, 7, 8, 9, EOS], [4, 4, 4, 4, 4, 4]],
        "columns": {"length": [1, 2, 3, 4], "prompt": ["hidden"] * 4},
    }


def reward_model(seed: int = 0, vocab_size: int = TASK.vocab_size, labels: int = 1) -> Any:
    from transformers import AutoModelForSequenceClassification

    config = TASK.model_config(width=16, layers=1, heads=2)
    config.vocab_size, config.num_labels = vocab_size, labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(seed))
    return model


# Reward functions of a module, as TRL's users write them.


def by_length(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def by_column(prompts: list[str], completions: list[str], length: list[int], **_: Any) -> list[int]:
    return [10 * value for value in length]


def for_even_rows(completions: list[str], **_: Any) -> list[float | None]:
    return [1.0 if row % 2 == 0 else None for row in range(len(completions))]


# --- the convention -------------------------------------------------------------------------------


def test_functions_get_what_trl_gives_them(tokenizer: Any, four: dict[str, Any]) -> None:
    seen: dict[str, Any] = {}

    def spy(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **rest: Any
    ) -> list[float]:
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **rest)
        return [0.0] * len(prompts)

    state = object()
    RewardSuite(spy, tokenizer=tokenizer)(**four, trainer_state=state)
    assert seen["prompts"] == four["prompts"]
    assert seen["completions"] == ["ab", "", "cdef", "aaaaaa"]
    assert seen["completion_ids"] == four["completion_ids"]
    assert seen["length"] == [1, 2, 3, 4]
    assert seen["trainer_state"] is state
    assert "prompt" not in seen
    assert callable(seen["log_extra"])
    assert callable(seen["log_metric"])


def test_chats_are_answered_by_messages(tokenizer: Any, four: dict[str, Any]) -> None:
    seen: list[Any] = []

    def spy(completions: list[Any], **_: Any) -> list[float]:
        seen.extend(completions)
        return [0.0] * len(completions)

    chats = [[{"role": "user", "content": prompt}] for prompt in four["prompts"]]
    RewardSuite(spy, tokenizer=tokenizer)(**{**four, "prompts": chats})
    assert seen[0] == [{"role": "assistant", "content": "ab"}]


def test_scores_are_the_weighted_sum_of_what_applies(tokenizer: Any, four: dict[str, Any]) -> None:
    suite = RewardSuite(
        [by_length, by_column, for_even_rows],
        weights=[1.0, 0.5, 100.0],
        tokenizer=tokenizer,
        missing_eos_score=None,
    )
    found = suite(**four)
    assert found.scores.tolist() == [3 + 5 + 100, 1 + 10, 5 + 15 + 100, 6 + 20]
    assert found.valid.all()
    assert list(found.table) == ["by_length", "by_column", "for_even_rows"]
    assert found.table["by_column"].tolist() == [10, 20, 30, 40]
    assert np.isnan(found.table["for_even_rows"]).tolist() == [False, True, False, True]
    assert set(found.seconds) == set(found.table)
    assert min(found.seconds.values()) >= 0


def test_completions_without_an_end_get_the_constant(tokenizer: Any, four: dict[str, Any]) -> None:
    assert RewardSuite(by_length, tokenizer=tokenizer)(**four).scores.tolist() == [3, 1, 5, -1]
    suite = RewardSuite(by_length, tokenizer=tokenizer, missing_eos_score=-7.0)
    assert suite(**four, has_eos=[True, False, True, True]).scores.tolist() == [3, -7, 5, 6]
    # Whatever a function thinks of them.
    suite = RewardSuite(for_even_rows, tokenizer=tokenizer)
    found = suite(**four, has_eos=[True, False, True, False])
    assert found.scores.tolist() == [1, -1, 1, -1]
    assert found.valid.all()


def test_asynchronous_functions_run_together_even_inside_a_loop(
    tokenizer: Any, four: dict[str, Any]
) -> None:
    gate = threading.Barrier(2, timeout=30)

    async def one(completions: list[str], **_: Any) -> list[float]:
        # Passes only when the other one has been started, too.
        await asyncio.get_running_loop().run_in_executor(None, gate.wait)
        return [1.0] * len(completions)

    class Other:
        async def __call__(self, completions: list[str], **_: Any) -> list[float]:
            await asyncio.get_running_loop().run_in_executor(None, gate.wait)
            return [2.0] * len(completions)

    suite = RewardSuite([one, by_length, Other()], tokenizer=tokenizer)

    async def notebook() -> Any:
        return suite(**four)

    for found in (suite(**four), asyncio.run(notebook())):
        assert found.scores.tolist() == [6, 4, 8, -1]
        assert list(found.table) == ["one", "by_length", "Other"]


def test_an_asynchronous_function_that_never_answers_is_given_up(
    tokenizer: Any, four: dict[str, Any]
) -> None:
    async def forever(completions: list[str], **_: Any) -> list[float]:
        await asyncio.Event().wait()
        return []

    suite = RewardSuite(forever, tokenizer=tokenizer, timeout=0.05)
    with pytest.raises(RewardError, match=r"forever raised TimeoutError: no answer within 0.05 s"):
        suite(**four)


def test_what_functions_log_is_kept(tokenizer: Any, four: dict[str, Any]) -> None:
    def chatty(completions: list[str], log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        log_extra("seen", completions)
        log_metric("share", 0.5)
        log_metric("share", 1.0)
        return [0.0] * len(completions)

    found = RewardSuite(chatty, tokenizer=tokenizer)(**four)
    assert found.extra == {"seen": ["ab", "", "cdef", "aaaaaa"]}
    assert found.metrics == {"share": 0.75}


def test_a_function_cannot_change_what_the_next_one_sees(
    tokenizer: Any, four: dict[str, Any]
) -> None:
    def vandal(
        prompts: list[str], completion_ids: list[list[int]], length: list[int], **_: Any
    ) -> list[float]:
        completion_ids[0].clear()
        length.clear()
        return [0.0] * len(prompts)

    found = RewardSuite([vandal, by_length, by_column], tokenizer=tokenizer)(**four)
    assert found.scores.tolist() == [3 + 10, 1 + 20, 5 + 30, -1]


@pytest.mark.parametrize(
    "given",
    [
        [1, 2.0, True, np.float32(4)],
        (1, 2, 1, 4),
        np.array([1, 2, 1, 4]),
        torch.tensor([1.0, 2.0, 1.0, 4.0], requires_grad=True),
        [torch.tensor(1), torch.tensor(2.0, requires_grad=True), np.int64(1), np.bool_(1)],
    ],
)
def test_all_usual_kinds_of_numbers_are_scores(
    given: Any, tokenizer: Any, four: dict[str, Any]
) -> None:
    found = RewardSuite(lambda **_: given, tokenizer=tokenizer)(**four)
    assert found.scores[:3].tolist() == [1, 2, 1]


# --- bad rewards ----------------------------------------------------------------------------------


def raising(**_: Any) -> list[float]:
    raise KeyError("api key")


BAD: list[tuple[str, Callable[..., Any], str, list[int]]] = [
    ("raises", raising, r"reward function raising raised KeyError: 'api key'", [0, 1, 2]),
    ("nan", lambda **_: [1, float("nan"), 1, 1], r"number or None for row 1, got nan", [1]),
    ("infinite", lambda **_: [1, 1, -np.inf, 1], r"for row 2, got -inf \(prompt '.*>'", [2]),
    ("text", lambda **_: [1, 1, 1, "1"], r"for row 3, got '1'", []),
    ("nested", lambda **_: np.zeros((4, 2)), r"for row 0, got \[0.0, 0.0\]", [0, 1, 2]),
    ("short", lambda **_: [1.0], r"a list of 4 numbers, one per completion, got 1$", [0, 1, 2]),
    ("nothing", lambda **_: None, r"a list of 4 numbers.*got a NoneType", [0, 1, 2]),
    ("a number", lambda **_: 1.0, r"a list of 4 numbers.*got a float", [0, 1, 2]),
    ("a generator", lambda **_: (i for i in range(4)), r"got a generator", [0, 1, 2]),
    ("lacking", lambda solution, **_: solution, r"with .*length: take the rest", [0, 1, 2]),
    ("inapplicable", lambda **_: [1, None, 1, 1], r"all of them answered None for row 1", [1]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "message", "rows"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_a_bad_reward_is_an_error_or_drops_its_completions(
    function: Any, message: str, rows: list[int], tokenizer: Any, four: dict[str, Any]
) -> None:
    with pytest.raises(RewardError, match=message):
        RewardSuite(function, tokenizer=tokenizer)(**four)
    suite = RewardSuite(function, tokenizer=tokenizer, on_error="drop")
    found = suite(**four)
    # The fourth did not end: its score is the constant, whatever failed.
    assert np.flatnonzero(~found.valid).tolist() == rows
    assert np.isnan(found.scores[rows]).all()
    assert np.isfinite(found.scores[found.valid]).all()
    assert len(found.problems) >= 1
    torch.testing.assert_close(torch.tensor(found.scores[3]), torch.tensor(-1.0).double())


def test_one_failure_makes_the_sum_invalid(tokenizer: Any, four: dict[str, Any]) -> None:
    found = RewardSuite([by_length, raising], tokenizer=tokenizer, on_error="drop")(**four)
    assert found.valid.tolist() == [False, False, False, True]
    assert found.table["by_length"].tolist() == [3, 1, 5, 6]


def test_the_error_of_a_function_keeps_its_cause_and_can_be_pickled(
    tokenizer: Any, four: dict[str, Any]
) -> None:
    with pytest.raises(RewardError) as caught:
        RewardSuite(raising, tokenizer=tokenizer)(**four)
    assert isinstance(caught.value.__cause__, KeyError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward_funcs": []}, "reward_funcs: expected at least one"),
        ({"reward_funcs": [by_length, 3]}, r"reward_funcs\[1\]: expected a function"),
        ({"weights": [1.0, 2.0]}, "reward_weights: expected one for each of 1"),
        ({"weights": [np.inf]}, "reward_weights: expected finite"),
        ({"reward_tokenizers": [None, None]}, "reward_tokenizers: expected one for each"),
        ({"on_error": "ignore"}, "on_error: expected one of raise, drop"),
        ({"missing_eos_score": np.nan}, "missing_eos_score"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_suites_that_make_no_sense_are_refused(
    arguments: dict[str, Any], message: str, tokenizer: Any
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        RewardSuite(**{"reward_funcs": by_length, "tokenizer": tokenizer, **arguments})


def test_rows_that_do_not_belong_together_are_refused(tokenizer: Any, four: dict[str, Any]) -> None:
    suite = RewardSuite(by_length, tokenizer=tokenizer)
    for name, value in (
        ("prompt_ids", four["prompt_ids"][:3]),
        ("completion_ids", [[EOS]] * 5),
        ("has_eos", [True]),
        ("columns", {"length": [1]}),
        ("columns", {"completions": ["", "", "", ""]}),
    ):
        with pytest.raises(InvalidInputError, match=name):
            suite(**{**four, name: value})
    with pytest.raises(InvalidInputError, match="at least one"):
        suite(prompts=[], prompt_ids=[], completion_ids=[])


def test_equal_names_are_told_apart(tokenizer: Any) -> None:
    suite = RewardSuite(
        [by_length, functools.partial(by_length), TASK.gold, TASK.gold], tokenizer=tokenizer
    )
    assert suite.names == ["by_length", "by_length_2", "GoldReward", "GoldReward_2"]


def test_a_probe_finds_errors_before_work_starts(tokenizer: Any, four: dict[str, Any]) -> None:
    suite = RewardSuite([TASK.gold, by_column], tokenizer=tokenizer, on_error="drop")
    suite.probe(four["prompts"][0], four["prompt_ids"][0], {"length": 3})
    with pytest.raises(RewardError, match="by_column"):
        suite.probe(four["prompts"][0], four["prompt_ids"][0], {})
    assert suite.on_error == "drop"


# --- other processes ------------------------------------------------------------------------------


def test_functions_that_cannot_travel_are_named(tokenizer: Any) -> None:
    lock = threading.Lock()

    def locked(completions: list[str], **_: Any) -> list[float]:
        with lock:
            return [0.0] * len(completions)

    check_picklable(RewardSuite([by_length, lambda **_: [], TASK.gold], tokenizer=tokenizer))
    with pytest.raises(InvalidInputError, match="reward_funcs: locked"):
        check_picklable(RewardSuite([by_length, locked], tokenizer=tokenizer))


def test_a_suite_works_the_same_after_its_travel(tokenizer: Any, four: dict[str, Any]) -> None:
    suite = RewardSuite([TASK.gold, reward_model()], weights=[2.0, 1.0], tokenizer=tokenizer)
    before = suite(**four)
    after = pickle.loads(pickle.dumps(suite))(**four)
    assert before.scores.tolist() == after.scores.tolist()
    swapped = suite.with_functions([by_length, by_length])
    assert swapped.names == suite.names
    assert swapped(**four).scores[:3].tolist() == [9, 3, 15]
    assert suite(**four).scores.tolist() == before.scores.tolist()


# --- reward models --------------------------------------------------------------------------------


def test_a_reward_model_scores_each_completion_as_if_it_were_alone(
    tokenizer: Any, four: dict[str, Any]
) -> None:
    model = reward_model().train()
    found = RewardSuite(model, tokenizer=tokenizer, batch_size=3)(**four)
    for row in range(3):
        ids = torch.tensor([[*four["prompt_ids"][row], *four["completion_ids"][row]]])
        with torch.no_grad():
            alone = float(model.eval()(input_ids=ids).logits[0, 0])
        assert found.scores[row] == pytest.approx(alone, abs=1e-5)
    assert len(set(found.table["GPTNeoXForSequenceClassification"].round(4).tolist())) == 4


def test_a_reward_model_with_another_vocabulary_reads_the_text(
    tokenizer: Any, four: dict[str, Any]
) -> None:
    from decapod.lm import build_tokenizer

    own = build_tokenizer(["abcdefghijkl>"])
    model = reward_model(vocab_size=len(own))
    suite = RewardSuite(model, tokenizer=tokenizer, reward_tokenizers=own)
    texts = [f"{prompt}{text}" for prompt, text in
             zip(four["prompts"], ["ab", "", "cdef"], strict=False)]  # fmt: skip
    wanted = score_ids(model, own(texts)["input_ids"])
    np.testing.assert_allclose(suite(**four).scores[:3], wanted, atol=1e-6)


def test_reward_models_are_loaded_from_folders(
    tokenizer: Any, four: dict[str, Any], tmp_path: Path
) -> None:
    model = reward_model(3)
    wanted = RewardSuite(model, tokenizer=tokenizer)(**four)
    folder = tmp_path / "proxy"
    model.save_pretrained(folder)
    suite = RewardSuite(str(folder), tokenizer=tokenizer)
    assert suite.names == ["proxy"]
    np.testing.assert_allclose(suite(**four).scores, wanted.scores, atol=1e-6)
    # Neither the loaded model nor anything else large is sent along.
    assert len(pickle.dumps(suite)) < len(pickle.dumps(model))
    tokenizer.save_pretrained(folder)
    again = RewardSuite(folder, tokenizer=tokenizer)
    np.testing.assert_allclose(again(**four).scores, wanted.scores, atol=1e-6)


def test_models_that_are_no_reward_models_are_refused(
    tokenizer: Any, four: dict[str, Any], tmp_path: Path
) -> None:
    from decapod.lm import build_model

    build_model(TASK.vocab_size, 16, 1, 2).save_pretrained(tmp_path / "causal")
    for model, message in (
        (reward_model(labels=2), "one label"),
        (reward_model(vocab_size=8), "it knows 8 tokens"),
        (str(tmp_path / "absent" / "model"), "expected the folder of a reward model"),
        (str(tmp_path / "causal"), "has no weights score.weight"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            RewardSuite(model, tokenizer=tokenizer)(**four)
