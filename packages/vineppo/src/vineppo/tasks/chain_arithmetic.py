"""Chain arithmetic: sums worked out line by line, with a verifier of every line.

A prompt is an expression, ``"7+5*2-3=?\\n"``; its answer has one operation per line and the result
on the last::

    7+5=2
    2*2=4
    4-3=1
    #### 1

Evaluation runs strictly from left to right, without precedence, and every result is taken modulo
``modulus``. So each line holds one operation on two numbers of a small, fixed range: the lines are
equally hard, each can go wrong by itself, and a wrong one spoils those behind it. That makes credit
visible: the step that lost the answer can be named (:meth:`ChainArithmetic.first_wrong_step`).
A wrong line can also be forgiven, as by a later ``*0``; the reward sees final answers only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np

from vineppo.errors import InvalidInputError, MissingExtraError, at_least, one_of, positive

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from vineppo.tasks.fine_tuning import Batch, StepDone

Split = Literal["train", "validation", "test"]

MARK: Final = "#### "
_ALPHABET: Final = "\n #*+-0123456789=?"  # in order, as the tokenizer numbers it
_PAD, _BOS, _EOS, _FIRST = 0, 1, 2, 4  # ids that decapod's tokenizers give
_SHARES: Final = 8  # of the hashes, one is for validation and one for test
_FEWEST: Final = 256  # prompts; with so many, none of the splits is empty
_BLOCK: Final = 256  # expressions drawn at a time; a constant, or the first n would depend on n
_INIT: Final = 0.06  # of weights; with the usual 0.02 so small a model learns several times slower
_SFT_STREAM: Final = len(get_args(Split))


@dataclass(frozen=True)
class ChainArithmetic:
    """The task family; the defaults are those of the learning bench.

    Attributes:
        operands: numbers of an expression; it has one operation less, and so many steps.
        modulus: numbers are from 0 to ``modulus - 1``, results are taken modulo it.
        operations: those to draw from, some of ``+``, ``-`` and ``*``.

    Raises:
        InvalidInputError: a number out of its range, an unknown operation, or a task with fewer
            than 256 prompts.
    """

    operands: int = 8
    modulus: int = 10
    operations: str = "+-*"

    def __post_init__(self) -> None:
        at_least("operands", self.operands, 2)
        at_least("modulus", self.modulus, 2)
        drawn = set(self.operations)
        if not drawn or len(drawn) != len(self.operations) or not drawn <= set("+-*"):
            raise InvalidInputError(
                "operations: expected one or more of '+', '-' and '*', each once, got "
                f"{self.operations!r}"
            )
        prompts = self.modulus**self.operands * len(drawn) ** self.steps
        if prompts < _FEWEST:
            raise InvalidInputError(
                f"operands, modulus, operations: expected at least {_FEWEST} expressions, of which "
                f"some are kept for validation and test, got {prompts}; raise one of them"
            )

    @property
    def steps(self) -> int:
        """Operations of an expression. The last line, which states the result, is one more."""
        return self.operands - 1

    @property
    def max_response_tokens(self) -> int:
        """Tokens of the longest right answer, its end-of-sequence token among them."""
        digits = len(str(self.modulus - 1))
        return self.steps * (3 * digits + 3) + len(MARK) + digits + 1

    # --- examples ---------------------------------------------------------------------------------

    def examples(self, n: int, seed: int = 0, split: Split = "train") -> list[dict[str, Any]]:
        """The first ``n`` examples of a stream.

        A hash of the expression decides its split (6 of 8 are for training, 1 for validation, 1
        for test), so that no prompt is ever in two, whatever the seeds. Within a split prompts may
        repeat.

        Args:
            n: how many; the first m of n are those of a call for m.
            seed: of the stream, at least 0.
            split: ``"train"``, ``"validation"`` or ``"test"``.

        Returns:
            Rows with ``prompt``, ``answer`` (the number), ``solution`` (the whole right answer,
            without end-of-sequence token) and ``prompt_ids`` (``<bos>`` and the prompt).

        Raises:
            InvalidInputError: an unknown split, ``n`` below 1, or ``seed`` below 0.
        """
        at_least("n", n, 1)
        at_least("seed", seed, 0)
        one_of("split", split, get_args(Split))
        stream = get_args(Split).index(split)
        return [self._row(expression) for expression in self._draw(n, split, seed, stream)]

    def solution(self, prompt: str) -> str:
        """The right answer to a prompt, line by line.

        Args:
            prompt: an expression of any length with numbers below ``modulus``, then ``"=?\\n"``.

        Raises:
            InvalidInputError: it is no prompt of this task.
        """
        numbers, signs = self._parse(prompt)
        value, lines = numbers[0], []
        for sign, number in zip(signs, numbers[1:], strict=True):
            result = self._apply(value, sign, number)
            lines.append(f"{value}{sign}{number}={result}\n")
            value = result
        return "".join(lines) + f"{MARK}{value}"

    def _apply(self, left: int, sign: str, right: int) -> int:
        result = {"+": left + right, "-": left - right, "*": left * right}[sign]
        return result % self.modulus

    def _parse(self, prompt: str) -> tuple[list[int], list[str]]:
        found = re.fullmatch(r"(\d+(?:[-+*]\d+)+)=\?\n", prompt, re.ASCII)
        numbers = [] if found is None else [int(i) for i in re.findall(r"\d+", found[1])]
        if found is None or max(numbers) >= self.modulus:
            raise InvalidInputError(
                f"prompt: expected an expression with numbers from 0 to {self.modulus - 1} and "
                f"'=?\\n' behind it, got {prompt!r}"
            )
        return numbers, re.findall(r"[-+*]", found[1])

    def _row(self, expression: str) -> dict[str, Any]:
        prompt = f"{expression}=?\n"
        solution = self.solution(prompt)
        return {
            "prompt": prompt,
            "answer": solution.rpartition(MARK)[2],
            "solution": solution,
            "prompt_ids": [_BOS, *_encode(prompt)],
        }

    def _draw(self, n: int, split: Split, seed: int, *stream: int) -> list[str]:
        """Expressions that belong to the split, from a random stream of their own."""
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))
        found: list[str] = []
        while len(found) < n:
            numbers = rng.integers(self.modulus, size=(_BLOCK, self.operands)).tolist()
            signs = rng.integers(len(self.operations), size=(_BLOCK, self.steps)).tolist()
            for row, chosen in zip(numbers, signs, strict=True):
                rest = zip(chosen, row[1:], strict=True)
                text = f"{row[0]}" + "".join(f"{self.operations[s]}{i}" for s, i in rest)
                if _split(text) == split:
                    found.append(text)
        return found[:n]

    # --- verification -----------------------------------------------------------------------------

    def reward(
        self,
        prompts: Sequence[Any],  # noqa: ARG002
        completions: Sequence[Any],
        answer: Sequence[str],
        **_: Any,
    ) -> list[float]:
        """1 where the last line is ``#### `` and the answer with nothing behind, 0 elsewhere.

        A reward function of TRL. What the lines before say does not matter.

        Args:
            prompts: not used.
            completions: texts without special tokens, or messages, of which the last counts.
            answer: the column of the examples.
        """
        scores = []
        for completion, wanted in zip(completions, answer, strict=True):
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            scores.append(float(text.rpartition("\n")[2] == f"{MARK}{wanted}"))
        return scores

    def first_wrong_step(self, prompt: str, completion: str) -> int | None:
        """Where an answer leaves the right one.

        Args:
            prompt: of this task.
            completion: text without special tokens.

        Returns:
            The number of the first line, from 0, that is not the right one, is missing, or is too
            many; the line of the result is the last. None for the right answer.

        Raises:
            InvalidInputError: the prompt is none of this task.
        """
        right, given = self.solution(prompt).split("\n"), completion.split("\n")
        for step, (wanted, got) in enumerate(zip(right, given, strict=False)):
            if wanted != got:
                return step
        return None if len(right) == len(given) else min(len(right), len(given))

    # --- tokens and the model to start from -------------------------------------------------------

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A fast tokenizer with one token per character, which begins texts with ``<bos>``.

        It is the same for all settings of the task. ``tokenizer(prompt)["input_ids"]`` are the
        ``prompt_ids`` of :meth:`examples`.

        Raises:
            MissingExtraError: decapod or transformers is not installed.
        """
        try:
            from decapod.lm import build_tokenizer
        except ImportError as error:
            raise MissingExtraError(error.name or "decapod", "train") from error
        return build_tokenizer(list(_ALPHABET), "char", add_bos=True)

    def sft_model(
        self,
        seed: int = 0,
        steps: int = 600,
        *,
        batch_size: int = 16,
        learning_rate: float = 3e-3,
        until_loss: float = 0.08,
        width: int = 64,
        layers: int = 2,
        heads: int = 2,
        cache_dir: Path | str | None = None,
        on_step: Callable[[StepDone], None] | None = None,
    ) -> LlamaForCausalLM:
        """A tiny Llama, fine-tuned on right answers to prompts for training, and stopped early.

        Its faults are then those of a model that has not learnt enough yet, which reinforcement
        learning can mend. Weights are a function of the arguments: bit for bit with one thread, on
        one kind of machine. The global random state of torch is left as it was.

        Args:
            seed: of the initial weights and of the examples.
            steps: most optimizer steps.
            batch_size: fresh examples per step.
            learning_rate: see :func:`vineppo.tasks.fine_tuning.fine_tune`.
            until_loss: when to stop, in nats per token; see there. It holds accuracy closer
                together across seeds than a number of steps does. What errors are left, of
                arithmetic or of which operand comes next, still depends on the seed.
            width: of the model; an even multiple of ``heads``.
            layers: of attention and feed-forward.
            heads: of attention. Few and wide ones tend to find the operand of a line sooner, so
                that what is left to learn is the arithmetic.
            cache_dir: a folder to keep models in; one with equal arguments and versions is loaded
                instead of trained again.
            on_step: called after every step that is taken.

        Returns:
            The model, in float32 and evaluation mode, on the CPU.

        Raises:
            InvalidInputError: a number out of its range.
            MissingExtraError: decapod or transformers is not installed.
            OSError: the folder cannot be written.
        """
        from vineppo.tasks.fine_tuning import fine_tune, kept_or_trained

        at_least("seed", seed, 0)
        at_least("steps", steps, 1)
        at_least("batch_size", batch_size, 1)
        positive("learning_rate", learning_rate)
        at_least("until_loss", until_loss, 0)
        if min(width, layers, heads) < 1 or width % (2 * heads):
            raise InvalidInputError(
                "width, layers, heads: expected positive numbers and a width that is a multiple "
                f"of 2 * heads, got {width}, {layers} and {heads}"
            )
        try:
            from decapod.lm import build_model
        except ImportError as error:
            raise MissingExtraError(error.name or "decapod", "train") from error
        model = build_model(
            _FIRST + len(_ALPHABET),
            width,
            layers,
            heads,
            max_positions=self._positions,
            seed=seed,
            init_std=_INIT,
        )

        def batch(step: int) -> Batch:
            drawn = self._draw(batch_size, "train", seed, _SFT_STREAM, step)
            return self._demonstrations([self._row(expression) for expression in drawn])

        def train(model: Any) -> None:
            fine_tune(model, batch, steps, learning_rate, until_loss, on_step)

        if cache_dir is None:
            train(model)
        else:
            training = (seed, steps, batch_size, learning_rate, until_loss)
            settings = repr((self, training, width, layers, heads))
            kept_or_trained(model, Path(cache_dir), settings, train)
        return model

    @property
    def _positions(self) -> int:
        """Room for the longest prompt and twice the longest right answer."""
        digits = len(str(self.modulus - 1))
        prompt = 1 + self.operands * digits + self.steps + len("=?\n")
        return prompt + 2 * self.max_response_tokens

    def _demonstrations(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Prompts and right answers, which end with end-of-sequence tokens, padded on the right."""
        answers = [[*_encode(row["solution"]), _EOS] for row in rows]
        prompts = [row["prompt_ids"] for row in rows]
        from vineppo.tasks.fine_tuning import Batch

        longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = np.full((len(rows), longest), _PAD, dtype=np.int64)
        learnt = np.zeros(ids.shape, dtype=np.bool_)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            ids[i, :end] = [*prompt, *answer]
            learnt[i, len(prompt) : end] = True
        return Batch(ids, learnt)


def _encode(text: str) -> list[int]:
    """Token ids of a text, as the tokenizer gives them, without ``<bos>``."""
    return [_FIRST + _ALPHABET.index(character) for character in text]


def _split(expression: str) -> Split:
    """The split that an expression belongs to."""
    share = hashlib.sha256(expression.encode()).digest()[0] % _SHARES
    if share == 0:
        return "test"
    return "validation" if share == 1 else "train"
