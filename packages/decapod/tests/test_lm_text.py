"""Tokenizers and models made on the spot, and texts at the rim of an engine."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from decapod.lm import (
    RequestError,
    SamplingParams,
    TextGenerator,
    TransformersEngine,
    build_model,
    build_tokenizer,
)
from decapod.lm.text import cut, prompt_seeds

TEXTS = ["What is 12+34?  It's 46.\n", "Anna has 4 apples; Bob 17.", "user assistant system"]
KINDS = ["char", "word", "bpe"]


# --- tokenizers and models ------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_known_texts_come_back_unchanged(kind, chat) -> None:
    tokenizer = build_tokenizer(TEXTS, kind, chat=chat)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@given(st.text())
@settings(max_examples=50, deadline=None)
def test_byte_level_pairs_know_every_text(text: str) -> None:
    assert BPE.decode(BPE(text)["input_ids"]) == text


BPE = build_tokenizer(TEXTS, "bpe")


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_fixed_ids(kind) -> None:
    tokenizer = build_tokenizer(TEXTS, kind, chat=True)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id) == (0, 1)
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id) == (2, 3)
    roles = ["<system>", "<user>", "<assistant>"]
    assert tokenizer.convert_tokens_to_ids(roles) == [4, 5, 6]
    assert tokenizer.padding_side == "left"


def test_unknown_characters_and_words_become_the_unknown_token() -> None:
    assert build_tokenizer(["abc"], "char")("aXc")["input_ids"].count(3) == 1
    assert build_tokenizer(["one two"], "word")("one three")["input_ids"].count(3) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_bos_begins_a_text_only_if_asked_for(kind) -> None:
    plain = build_tokenizer(TEXTS, kind)(TEXTS[0])["input_ids"]
    with_bos = build_tokenizer(TEXTS, kind, add_bos=True)
    assert with_bos(TEXTS[0])["input_ids"] == [1, *plain]
    assert with_bos(TEXTS[0], add_special_tokens=False)["input_ids"] == plain


def test_vocabularies_are_the_same_in_every_process() -> None:
    code = (
        "from decapod.lm import build_tokenizer\n"
        f"for kind in {KINDS!r}:\n"
        f"    print(sorted(build_tokenizer({TEXTS!r}, kind).get_vocab().items()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = [sorted(build_tokenizer(TEXTS, kind).get_vocab().items()) for kind in KINDS]
    assert done.stdout.splitlines() == [repr(vocabulary) for vocabulary in own]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_reads_and_writes_the_same(kind, tmp_path) -> None:
    tokenizer = build_tokenizer(TEXTS, kind, chat=True)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]
    assert again.decode(again(TEXTS[0])["input_ids"]) == TEXTS[0]
    assert again.chat_template == tokenizer.chat_template


def test_a_small_vocabulary_keeps_the_most_frequent() -> None:
    tokenizer = build_tokenizer(["aaabbc"], "char", vocab_size=6)
    assert set(tokenizer.get_vocab()) == {"<pad>", "<bos>", "<eos>", "<unk>", "a", "b"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"texts": TEXTS, "kind": "letters"}, "kind: expected one of char, bpe, word"),
        ({"texts": "one text"}, "put it in a list"),
        ({"texts": ["", ""]}, "texts: expected at least one"),
        ({"texts": TEXTS, "kind": "bpe", "vocab_size": 200}, "vocab_size: expected at least 260"),
        ({"texts": TEXTS, "vocab_size": 4}, "vocab_size: expected at least 5"),
    ],
)
def test_bad_input_for_a_tokenizer_is_refused(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        build_tokenizer(**arguments)


def test_a_seed_decides_the_weights_and_the_global_random_state_stays() -> None:
    state = torch.get_rng_state()
    first, again, other = build_model(30), build_model(30), build_model(30, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert not first.training


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"vocab_size": 0}, "vocab_size: expected at least 1"),
        ({"vocab_size": 9, "layers": 0}, "layers: expected at least 1"),
        ({"vocab_size": 9, "hidden_size": 60, "heads": 8}, "multiple of 2 \\* heads = 16, got 60"),
    ],
)
def test_bad_sizes_of_a_model_are_refused(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        build_model(**arguments)


# --- texts ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEXTS, chat=True, add_bos=True)


@pytest.fixture(scope="module")
def engine(tokenizer) -> TransformersEngine:
    return TransformersEngine(build_model(len(tokenizer), init_std=0.1), tokenizer)


def test_texts_and_chats_get_answers_without_special_tokens(engine, tokenizer) -> None:
    generate = TextGenerator(engine, tokenizer, SamplingParams(30))
    prompts = ["What is 12", "", [{"role": "user", "content": "Anna"}]]
    answers = generate(prompts)
    assert len(answers) == 3
    for answer in answers:
        assert answer
        assert not any(token in answer for token in tokenizer.all_special_tokens)


def test_a_chat_is_encoded_by_the_template_alone(engine, tokenizer) -> None:
    seen = []

    class Spy:
        def generate(self, requests):
            seen.extend(requests)
            return engine.generate(requests)

    TextGenerator(Spy(), tokenizer, SamplingParams(2))(["A", [{"role": "user", "content": "A"}]])
    letter = tokenizer.convert_tokens_to_ids("A")
    assert seen[0].prompt == (1, letter)
    assert seen[1].prompt == (5, letter, 2, 6)


def test_answers_end_before_the_first_stop_text(engine, tokenizer) -> None:
    prompts = [f"What is {i}" for i in range(12)]
    whole = TextGenerator(engine, tokenizer, SamplingParams(40))(prompts)
    stops = ("a", "pp", "3")
    cut_short = TextGenerator(engine, tokenizer, SamplingParams(40, stop=stops))(prompts)
    assert cut_short == [cut(text, stops) for text in whole]
    assert any(len(a) < len(b) for a, b in zip(cut_short, whole, strict=True))


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_a_cut_text_holds_no_stop_and_begins_the_text(text, stops) -> None:
    found = cut(text, stops)
    assert text.startswith(found)
    assert not any(stop in found for stop in stops)
    assert found == text or any(text[len(found) :].startswith(stop) for stop in stops)


def test_cutting_the_list_of_prompts_into_calls_changes_no_answer(engine, tokenizer) -> None:
    prompts = [f"Anna has {i}" for i in range(9)]
    generate = TextGenerator(engine, tokenizer, SamplingParams(12), seed=4)
    parts = [text for start in range(0, 9, 2) for text in generate(prompts[start : start + 2])]
    assert generate(prompts) == parts
    assert TextGenerator(engine, tokenizer, SamplingParams(12), seed=5)(prompts) != parts


def test_equal_prompts_of_one_call_get_different_seeds() -> None:
    chat = [{"role": "user", "content": "A"}]
    prompts = ["A", "A", chat, "B", [{"content": "A", "role": "user"}]]
    seeds = prompt_seeds(prompts, 0)
    assert len(set(seeds)) == 5
    assert prompt_seeds(prompts[1:], 0)[0] == seeds[0]
    assert prompt_seeds(prompts, 1) != seeds


def test_a_prompt_that_is_too_long_is_named_by_its_place(engine, tokenizer) -> None:
    generate = TextGenerator(engine, tokenizer, SamplingParams(30))
    with pytest.raises(RequestError, match="512 positions") as caught:
        generate(["A", "A" * 500])
    assert caught.value.index == 1


def test_a_text_of_no_tokens_is_refused() -> None:
    bare = build_tokenizer(TEXTS)
    engine = TransformersEngine(build_model(len(bare)))
    with pytest.raises(RequestError, match="at least one token"):
        TextGenerator(engine, bare)([""])


def test_a_chat_without_a_template_is_refused(engine) -> None:
    with pytest.raises(ValueError, match="chat_template"):
        TextGenerator(engine, build_tokenizer(TEXTS))([[{"role": "user", "content": "A"}]])
