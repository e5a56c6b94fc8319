"""Small causal language models and tokenizers made on the spot, from a seed and from texts.

Nothing is downloaded. The models are ordinary transformers models and the tokenizers ordinary fast
tokenizers, so whatever takes a path or an object of these kinds (vLLM, TRL, evaluation harnesses)
takes them too: ``model.save_pretrained(folder)`` and ``tokenizer.save_pretrained(folder)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Kind = Literal["char", "bpe", "word"]
PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
ROLES = ("<system>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
_PATTERN = {
    "char": r"[\s\S]",
    # A word with the space before it, one digit, one white space, or one mark: nothing is lost, and
    # numbers are written digit by digit.
    "word": r" ?[^\W\d_]+|\d|\s|[^\w\s]|_",
}


def build_tokenizer(
    texts: Iterable[str],
    kind: Kind = "char",
    vocab_size: int | None = None,
    *,
    chat: bool = False,
    add_bos: bool = False,
) -> PreTrainedTokenizerFast:
    """Tokenizer whose vocabulary comes from texts; decoding gives back a text of known tokens.

    The special tokens have fixed ids: ``<pad>`` 0, ``<bos>`` 1, ``<eos>`` 2, ``<unk>`` 3, then with
    ``chat`` ``<system>`` 4, ``<user>`` 5, ``<assistant>`` 6. Padding is on the left.

    Args:
        texts: what the vocabulary is taken from; the result depends on nothing else.
        kind: ``"char"``, one token per character; ``"word"``, one per word with the space before
            it, per digit and per mark; ``"bpe"``, byte-level pair encoding, which knows every text.
        vocab_size: the largest vocabulary, special tokens included; the most frequent are kept.
            None keeps all characters or words, and means 512 for ``"bpe"``, which needs at least
            256 beside the special tokens.
        chat: give it a chat template, ``<role>content<eos>`` per message.
        add_bos: begin every encoded text with ``<bos>`` (``add_special_tokens=False`` leaves it
            out); the chat template does not.

    Raises:
        ValueError: unknown ``kind``, no text, or a ``vocab_size`` too small.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}, got {kind!r}")
    if isinstance(texts, str):
        raise ValueError("texts: expected several texts, got one string; put it in a list")
    found = [text for text in texts if text]
    if not found:
        raise ValueError("texts: expected at least one that is not empty, got none")
    special = [PAD, BOS, EOS, UNK, *(ROLES if chat else ())]
    least = len(special) + (256 if kind == "bpe" else 1)
    if vocab_size is not None and vocab_size < least:
        raise ValueError(
            f"vocab_size: expected at least {least} for kind={kind!r} with {len(special)} special "
            f"tokens, got {vocab_size}"
        )
    trainer: trainers.BpeTrainer | trainers.WordLevelTrainer
    if kind == "bpe":
        built = Tokenizer(models.BPE())
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        built.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size or 512,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
    else:
        built = Tokenizer(models.WordLevel(unk_token=UNK))
        built.pre_tokenizer = pre_tokenizers.Split(Regex(_PATTERN[kind]), "isolated")
        built.decoder = decoders.Fuse()
        trainer = trainers.WordLevelTrainer(
            vocab_size=vocab_size or 2**31, special_tokens=special, show_progress=False
        )
    built.train_from_iterator(found, trainer)
    if add_bos:
        built.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A {BOS} $B",
            special_tokens=[(BOS, special.index(BOS))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=list(ROLES) if chat else [],
        chat_template=CHAT_TEMPLATE if chat else None,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(
    vocab_size: int,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 4,
    intermediate: int | None = None,
    max_positions: int = 512,
    seed: int = 0,
    *,
    init_std: float = 0.02,
    tie_embeddings: bool = False,
) -> LlamaForCausalLM:
    """Llama model with random weights in float32, in evaluation mode on the CPU.

    Pad, BOS and EOS have the ids that :func:`build_tokenizer` gives them: 0, 1 and 2. The global
    random state of torch is left as it was.

    Args:
        vocab_size: ``len(tokenizer)``.
        hidden_size: width; a multiple of ``heads``, with an even number per head.
        layers: decoder layers.
        heads: attention heads, all with keys and values of their own.
        intermediate: width of the feed-forward part; None means four times ``hidden_size``.
        max_positions: the longest sequence, prompt and answer together.
        seed: of the weights.
        init_std: standard deviation of the weights; the default of 0.02 makes next-token
            distributions of an untrained model nearly uniform, 0.2 makes them uneven.
        tie_embeddings: share the weights of the input and output embeddings.

    Raises:
        ValueError: a size is not positive or ``hidden_size`` does not divide.
    """
    intermediate = 4 * hidden_size if intermediate is None else intermediate
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "layers": layers,
        "heads": heads,
        "intermediate": intermediate,
        "max_positions": max_positions,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if hidden_size % (2 * heads):
        raise ValueError(
            f"hidden_size: expected a multiple of 2 * heads = {2 * heads}, got {hidden_size}"
        )
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_positions,
        initializer_range=init_std,
        tie_word_embeddings=tie_embeddings,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float().eval()
