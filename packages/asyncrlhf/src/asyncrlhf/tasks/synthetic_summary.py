"""Summaries of random symbols: a task whose true reward is known, at the size of a minute.

A prompt is ``length`` random symbols and a separator, ``"cafbb>"``; its summary is a fixed function
of them and the end-of-sequence token, ``"abbcf<eos>"``. Supervised fine-tuning sees summaries with
wrong symbols in them, so that the model it gives is as far from perfect as ``noise`` says; the gold
reward knows the right ones. A reward model trained on its labels (:mod:`asyncrlhf.reward_models`)
is the proxy that a policy can over-optimise.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from asyncrlhf.errors import InvalidInputError, MissingExtraError

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    from asyncrlhf.tasks.fine_tuning import StepDone
    from decapod.seeding import Seeds

Rule = Literal["sort", "most_frequent"]
Stream = Literal["sft", "train", "reward_model", "eval"]
IntArray = npt.NDArray[np.int64]

PAD, EOS, UNK, SEP = "<pad>", "<eos>", "<unk>", ">"
_SPECIAL: Final = (PAD, EOS, UNK, SEP)
_EVAL_SHARE: Final = 8  # one prompt in so many is kept for evaluation
_FEWEST_PROMPTS: Final = 1024  # below, too few of them are left for evaluation
_BLOCK: Final = 1024  # prompts drawn at a time; a constant, or the first n would depend on n


@dataclass(frozen=True)
class SyntheticSummary:
    """The task family; the defaults are those of the robustness experiment.

    Attributes:
        symbols: how many there are, written ``a``, ``b``, ...
        length: symbols of a prompt.
        rule: ``"sort"``: the symbols of the prompt in order; ``"most_frequent"``: each of them
            once, the most frequent first, equally frequent ones in order.
        noise: share of the symbols in the summaries of fine-tuning that are replaced by one drawn
            from all symbols (the right one among them). With little noise the fine-tuned model is
            nearly perfect, and losses cannot be told apart.
        penalty: gold score of an answer that ends too late or not at all; others have 0 to 1.

    Raises:
        InvalidInputError: a number out of its range, or an unknown rule.
    """

    symbols: int = 12
    length: int = 5
    rule: Rule = "sort"
    noise: float = 0.7
    penalty: float = -1.0

    pad_token_id: ClassVar[int] = 0
    eos_token_id: ClassVar[int] = 1
    sep_token_id: ClassVar[int] = 3

    def __post_init__(self) -> None:
        most = len(string.ascii_lowercase)
        if not 2 <= self.symbols <= most:
            raise InvalidInputError(f"symbols: expected 2 to {most}, got {self.symbols}")
        if self.length < 1 or self.symbols**self.length < _FEWEST_PROMPTS:
            raise InvalidInputError(
                f"length: expected at least {_FEWEST_PROMPTS} prompts (symbols ** length), got "
                f"{self.symbols} ** {self.length}; evaluation keeps some of them for itself"
            )
        if self.rule not in get_args(Rule):
            raise InvalidInputError(
                f"rule: expected one of {', '.join(get_args(Rule))}, got {self.rule!r}"
            )
        if not 0 <= self.noise <= 1:
            raise InvalidInputError(f"noise: expected a share from 0 to 1, got {self.noise}")
        if not self.penalty < 0:
            raise InvalidInputError(
                f"penalty: expected below 0, the score of an all wrong answer, got {self.penalty}"
            )

    @property
    def vocab_size(self) -> int:
        """The symbols, the separator, and three special tokens."""
        return len(_SPECIAL) + self.symbols

    @property
    def max_completion_length(self) -> int:
        """Tokens of the longest right answer, its end-of-sequence token among them."""
        return self.length + 1

    # --- text -------------------------------------------------------------------------------------

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A fast tokenizer with one token per symbol, padding on the left.

        ``tokenizer(prompt)["input_ids"]`` are the ``prompt_ids`` of :meth:`prompts`; texts of
        prompt and answer can be joined.
        """
        try:
            from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
            from transformers import PreTrainedTokenizerFast
        except ModuleNotFoundError as error:
            raise MissingExtraError("transformers", "train") from error
        vocabulary = {token: i for i, token in enumerate((*_SPECIAL, *self._letters))}
        built = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
        built.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        built.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=built,
            pad_token=PAD,
            eos_token=EOS,
            unk_token=UNK,
            padding_side="left",
            clean_up_tokenization_spaces=False,
        )

    @property
    def _letters(self) -> str:
        return string.ascii_lowercase[: self.symbols]

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, as the tokenizer gives them.

        Raises:
            InvalidInputError: it is no prompt of this task.
        """
        found = [self._letters.find(letter) for letter in prompt[:-1]]
        if len(prompt) != self.length + 1 or prompt[-1] != SEP or min(found) < 0:
            raise InvalidInputError(
                f"prompt: expected {self.length} letters up to {self._letters[-1]!r} and {SEP!r}, "
                f"got {prompt!r}"
            )
        return [*(len(_SPECIAL) + i for i in found), self.sep_token_id]

    # --- data -------------------------------------------------------------------------------------

    def prompts(self, n: int, seed: int = 0, stream: Stream = "train") -> list[dict[str, Any]]:
        """The first ``n`` prompts of a stream.

        No prompt of ``"eval"`` is in any other stream, whatever the seeds: one prompt in eight
        (by a hash of its symbols) belongs to evaluation. Within a stream prompts can repeat.

        Args:
            n: how many; the first m of n are those of a call for m.
            seed: of the stream.
            stream: what they are for.

        Returns:
            Rows with ``prompt`` (text) and ``prompt_ids``.

        Raises:
            InvalidInputError: an unknown stream, or ``n`` below 1.
        """
        if n < 1:
            raise InvalidInputError(f"n: expected at least 1, got {n}")
        rows = self._prompt_ids(self._draw(_seeds(seed, stream).generator(), n, stream))
        return [{"prompt": self._text(row), "prompt_ids": row} for row in rows.tolist()]

    def sft_examples(self, n: int, seed: int = 0) -> list[dict[str, Any]]:
        """Examples of fine-tuning, with noise.

        Args:
            n: how many.
            seed: of the prompts and of the noise.

        Returns:
            Rows with ``prompt``, ``completion`` (texts; without end-of-sequence token),
            ``prompt_ids`` and ``completion_ids`` (which end with it).

        Raises:
            InvalidInputError: ``n`` below 1.
        """
        if n < 1:
            raise InvalidInputError(f"n: expected at least 1, got {n}")
        prompts, completions = self._examples(_seeds(seed, "sft").generator(), n)
        rows = []
        for prompt, padded in zip(prompts.tolist(), completions.tolist(), strict=True):
            completion = padded[: padded.index(self.eos_token_id) + 1]
            rows.append(
                {
                    "prompt": self._text(prompt),
                    "completion": self._text(completion[:-1]),
                    "prompt_ids": prompt,
                    "completion_ids": completion,
                }
            )
        return rows

    def target(self, prompt_ids: Sequence[int]) -> list[int]:
        """The right answer to a prompt, with its end-of-sequence token.

        Raises:
            InvalidInputError: it is no prompt of this task.
        """
        answer = self._targets(self._parse([prompt_ids]))[0]
        return [*(answer[answer >= 0] + len(_SPECIAL)).tolist(), self.eos_token_id]

    def _text(self, ids: Sequence[int]) -> str:
        return "".join((*_SPECIAL, *self._letters)[i] for i in ids)

    def _draw(self, rng: np.random.Generator, n: int, stream: Stream) -> IntArray:
        """Symbols ``[n, length]`` of prompts that belong to the stream."""
        found: list[IntArray] = []
        while sum(map(len, found)) < n:
            block = rng.integers(self.symbols, size=(_BLOCK, self.length))
            found.append(block[_is_for_evaluation(block, self.symbols) == (stream == "eval")])
        return np.concatenate(found)[:n]

    def _examples(self, rng: np.random.Generator, n: int) -> tuple[IntArray, IntArray]:
        """Prompt ids ``[n, length + 1]`` and answer ids, padded, of the same shape."""
        drawn = self._draw(rng, n, "sft")
        answers = self._targets(drawn)
        wrong = rng.random(answers.shape) < self.noise
        noisy = np.where(wrong, rng.integers(self.symbols, size=answers.shape), answers)
        completions = np.full((n, self.length + 1), self.pad_token_id)
        completions[:, :-1] = np.where(answers >= 0, noisy + len(_SPECIAL), self.pad_token_id)
        completions[np.arange(n), (answers >= 0).sum(axis=1)] = self.eos_token_id
        return self._prompt_ids(drawn), completions

    def _prompt_ids(self, drawn: IntArray) -> IntArray:
        return np.pad(drawn + len(_SPECIAL), ((0, 0), (0, 1)), constant_values=self.sep_token_id)

    def _targets(self, drawn: IntArray) -> IntArray:
        """Symbols ``[n, length]`` of the right answers, -1 behind their ends."""
        if self.rule == "sort":
            return np.sort(drawn, axis=1)
        counts = (drawn[:, :, None] == np.arange(self.symbols)).sum(axis=1)
        order = np.argsort(-counts, axis=1, kind="stable")
        answers = np.where(np.take_along_axis(counts, order, axis=1) > 0, order, -1)
        width = min(self.length, self.symbols)
        return np.pad(answers[:, :width], ((0, 0), (0, self.length - width)), constant_values=-1)

    # --- gold reward ------------------------------------------------------------------------------

    def gold_score(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> npt.NDArray[np.float64]:
        """Share of positions of the right answer that hold the right symbol.

        What stands behind the first end-of-sequence token does not count. An answer that ends too
        early misses positions; one that ends later than the right answer, or never, scores
        ``penalty``.

        Args:
            prompt_ids: of each answer.
            completion_ids: token ids of each answer.

        Returns:
            ``[n]`` float64, from 0 to 1, or ``penalty``.

        Raises:
            InvalidInputError: the numbers of prompts and answers differ, or a prompt is none of
                this task.
        """
        n = len(completion_ids)
        if len(prompt_ids) != n:
            raise InvalidInputError(
                f"prompt_ids, completion_ids: expected one prompt per answer, got "
                f"{len(prompt_ids)} and {n}"
            )
        if n == 0:
            return np.zeros(0)
        answers = self._targets(self._parse(prompt_ids))
        sizes = (answers >= 0).sum(axis=1)
        # One column more than the longest right answer shows whether an answer ends in time.
        given = np.full((n, self.length + 1), -1)
        for row, ids in enumerate(completion_ids):
            kept = list(ids[: self.length + 1])
            given[row, : len(kept)] = kept
        stops = given == self.eos_token_id
        ends = np.where(stops.any(axis=1), stops.argmax(axis=1), self.length + 1)
        columns = np.arange(self.length)
        counts = (columns < ends[:, None]) & (columns < sizes[:, None])
        right = (given[:, :-1] == answers + len(_SPECIAL)) & counts
        return np.where(ends > sizes, self.penalty, right.sum(axis=1) / sizes)

    @property
    def gold(self) -> GoldReward:
        """The gold score as a reward function."""
        return GoldReward(self)

    def _parse(self, prompt_ids: Sequence[Sequence[int]]) -> IntArray:
        """Symbols ``[n, length]`` of prompts."""
        low, high = len(_SPECIAL), self.vocab_size
        for row, ids in enumerate(prompt_ids):
            fits = len(ids) == self.length + 1 and ids[-1] == self.sep_token_id
            if not fits or not all(low <= i < high for i in ids[:-1]):
                raise InvalidInputError(
                    f"prompt_ids[{row}]: expected {self.length} symbols (ids {low} to {high - 1}) "
                    f"and the separator ({self.sep_token_id}), got {list(ids)}"
                )
        return np.asarray([list(ids[:-1]) for ids in prompt_ids], dtype=np.int64) - low

    # --- the model to start from ------------------------------------------------------------------

    def model_config(self, width: int = 48, layers: int = 2, heads: int = 8) -> GPTNeoXConfig:
        """A small GPT-NeoX (the architecture of Pythia) without dropout.

        It departs from Pythia where that lets so small a model learn in a few hundred steps:
        attention and feed-forward one after the other, rotary positions over whole heads and of
        short wave length, and larger initial weights.

        Args:
            width: of the residual stream; an even multiple of ``heads``.
            layers: of attention and feed-forward.
            heads: of attention.

        Raises:
            InvalidInputError: the width does not divide.
        """
        if min(width, layers, heads) < 1 or width % (2 * heads):
            raise InvalidInputError(
                f"width, layers, heads: expected positive numbers and a width that is a multiple "
                f"of 2 * heads, got {width}, {layers} and {heads}"
            )
        try:
            from transformers import GPTNeoXConfig
        except ModuleNotFoundError as error:
            raise MissingExtraError("transformers", "train") from error
        return GPTNeoXConfig(
            vocab_size=self.vocab_size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=4 * (self.length + 1),
            initializer_range=0.05,
            use_parallel_residual=False,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 1.0,
            },
            attention_dropout=0.0,
            hidden_dropout=0.0,
            classifier_dropout=0.0,
            pad_token_id=self.pad_token_id,
            bos_token_id=None,
            eos_token_id=self.eos_token_id,
            dtype="float32",
        )

    def sft_model(
        self,
        seed: int = 0,
        steps: int = 500,
        *,
        batch_size: int = 96,
        learning_rate: float = 4e-3,
        width: int = 48,
        layers: int = 2,
        heads: int = 8,
        cache_dir: Path | str | None = None,
        on_step: Callable[[StepDone], None] | None = None,
    ) -> GPTNeoXForCausalLM:
        """The fine-tuned model that policies start from and are held to.

        Weights are a function of the arguments: bit for bit with one thread (on one kind of
        machine). The global random state of torch is left as it was.

        Args:
            seed: of the initial weights and of the examples.
            steps: optimizer steps.
            batch_size: fresh examples per step.
            learning_rate: of AdamW without weight decay; it falls to 0 along a line. Gradients are
                cut to norm 1.
            width: see :meth:`model_config`.
            layers: see :meth:`model_config`.
            heads: see :meth:`model_config`.
            cache_dir: a folder to keep models in; one with equal arguments (and versions of torch
                and transformers) is loaded instead of trained again.
            on_step: called after every step that is taken.

        Returns:
            The model, in float32 and evaluation mode, on the CPU.

        Raises:
            InvalidInputError: a number out of its range.
            OSError: the folder cannot be written.
        """
        from asyncrlhf.tasks.fine_tuning import cached_weights, fine_tune, new_model

        if batch_size < 1:
            raise InvalidInputError(f"batch_size: expected at least 1, got {batch_size}")
        model = new_model(self.model_config(width, layers, heads), seed)
        streams = _seeds(seed, "sft")

        def batch(step: int) -> tuple[IntArray, IntArray]:
            return self._examples(streams.generator("step", step), batch_size)

        def train(model: Any) -> None:
            fine_tune(model, batch, steps, learning_rate, self.pad_token_id, on_step)

        if cache_dir is None:
            train(model)
        else:
            identity = (self, seed, steps, batch_size, learning_rate, width, layers, heads)
            cached_weights(model, Path(cache_dir), repr(identity), train)
        return model


@dataclass(frozen=True)
class GoldReward:
    """:meth:`SyntheticSummary.gold_score` with the signature of TRL's reward functions.

    Attributes:
        task: whose gold score it is.
    """

    task: SyntheticSummary

    def __call__(
        self, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:
        """The score of each answer.

        Args:
            prompts: texts of the task's prompts.
            completion_ids: token ids of the answers.

        Raises:
            InvalidInputError: a prompt is none of the task.
        """
        prompt_ids = [self.task.encode(prompt) for prompt in prompts]
        scores: list[float] = self.task.gold_score(prompt_ids, completion_ids).tolist()
        return scores


def _seeds(seed: int, stream: Stream) -> Seeds:
    try:
        from decapod.seeding import Seeds
    except ModuleNotFoundError as error:
        raise MissingExtraError("decapod", "train") from error
    if stream not in get_args(Stream):
        raise InvalidInputError(
            f"stream: expected one of {', '.join(get_args(Stream))}, got {stream!r}"
        )
    return Seeds(seed).child("asyncrlhf.synthetic_summary", stream)


def _is_for_evaluation(drawn: IntArray, symbols: int) -> npt.NDArray[np.bool_]:
    """Whether each prompt ``[n, length]`` is among the one in eight that evaluation has."""
    code = np.zeros(len(drawn), dtype=np.uint64)
    for column in drawn.T.astype(np.uint64):
        code = code * np.uint64(symbols) + column  # wraps around; it is a hash
    # The finalizer of SplitMix64, so that no single symbol decides.
    code = (code ^ (code >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    code = (code ^ (code >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray((code ^ (code >> np.uint64(31))) % np.uint64(_EVAL_SHARE) == 0)
