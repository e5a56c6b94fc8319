"""Reasoners with known parameters, to hold the estimators of the gap against the truth.

A simulated reasoner solves an original question with probability ``1 - e1`` and a modified one
with ``1 - e2``. What it does in a composition follows from a few more probabilities, so that Δ, its
three terms and the taxonomy of errors are known exactly (`SimulatedReasoner.expected`).

Questions may differ in difficulty. Every row of GSM8K has a hidden uniform number u, and the
probability of solving it on its own is

    p(u) = μ·(1 − difficulty) + difficulty·[u < μ],        μ = 1 − e,

of mean μ whatever `difficulty` is: 0 makes all questions alike, 1 makes each right always or never.
With probability `coupling` the first question of an item has the hidden number of its second, so
that solving the one goes with solving the other. A row is solved alone, or not, once: items that
use it again have the same result, which is the strongest dependence that reuse can bring.

Every random number is a hash of (seed, draw, row or item): it depends on neither the order nor the
batch in which questions come, nor on the process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from gsm_compose.benchmark import Benchmark
from gsm_compose.errors import EvaluationError, StatisticsError
from gsm_compose.items import Item
from gsm_compose.outcomes import Bools, Category, Outcomes
from gsm_compose.prompts import DEFAULT_SPEC, Condition, Prompt, PromptSpec, render, style_of
from gsm_compose.replies import no_reply, reply, wrong_number
from gsm_compose.stats import Array

Numbers = tuple[int | None, int]


@dataclass(frozen=True)
class Pairing:
    """Which row is asked first and which last, item by item.

    Attributes:
        item_ids: (n,) all different.
        q1_ids: (n,) row of the first question.
        q2_ids: (n,) row of the last question. A row that is in both arrays is the same question.
    """

    item_ids: NDArray[np.str_]
    q1_ids: NDArray[np.str_]
    q2_ids: NDArray[np.str_]

    @classmethod
    def distinct(cls, n: int) -> Pairing:
        """Items that share no question."""
        return cls(_names("item", n), _names("first", n), _names("last", n))

    @classmethod
    def reused(cls, n: int, uses: int = 2, rows: int | None = None, seed: int = 0) -> Pairing:
        """Items whose last question serves `uses` times, and the first once.

        Args:
            n: number of items.
            uses: how often a last question is used (one of them less often if n is no multiple).
            rows: both roles are played by this many rows, as where compositions are built from one
                split (1,319 in GSM8K test); None takes the roles from different rows.
            seed: of the assignment.

        Raises:
            StatisticsError: fewer rows than items and one more.
        """
        rng = np.random.default_rng(seed)
        last = rng.permutation(np.arange(-(-n // uses)).repeat(uses)[:n])
        if rows is None:
            return cls(_names("item", n), _names("first", n), _names("last", n)[last])
        if rows <= n:
            raise StatisticsError(
                f"rows: expected more than n = {n} (Q1 is used once), got {rows}."
            )
        q2 = rng.permutation(rows)[last]
        q1 = rng.permutation(rows)
        # No row may follow itself: where one does, it changes places with a random other row.
        while (same := np.flatnonzero(q1[:n] == q2)).size:
            other = rng.integers(rows)
            q1[[same[0], other]] = q1[[other, same[0]]]
        names = _names("row", rows)
        return cls(_names("item", n), names[q1[:n]], names[q2])

    @classmethod
    def of(cls, benchmark: Benchmark) -> Pairing:
        """The items of a benchmark."""
        return cls(
            np.array([item.id for item in benchmark]),
            np.array([item.q1.problem for item in benchmark]),
            np.array([item.q2.problem for item in benchmark]),
        )


@dataclass(frozen=True)
class SimulatedReasoner:
    """A solver whose gap is known. All parameters but the seed are probabilities.

    Attributes:
        e1: error rate on original questions asked alone (S1, and the last question as published).
        e2: error rate on modified questions asked alone (S2).
        distraction: a first question solvable alone is lost because another one follows.
        second_hop: a last question solvable alone is lost after a right first answer.
        ignore_x: the answer to the composition is the one with the original number.
        lucky: the final answer is right after a wrong first one.
        context: a modified question solvable alone is lost after an unrelated question.
        code: a composition failed in words is solved in code.
        unparsable: an answer, under any condition, cannot be read.
        difficulty: how much questions differ; see the module.
        coupling: how much the two questions of an item share their difficulty.
        seed: of all random numbers.
    """

    e1: float = 0.1
    e2: float = 0.15
    distraction: float = 0.0
    second_hop: float = 0.0
    ignore_x: float = 0.0
    lucky: float = 0.0
    context: float = 0.0
    code: float = 0.0
    unparsable: float = 0.0
    difficulty: float = 0.0
    coupling: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for parameter in fields(self):
            value = getattr(self, parameter.name)
            if parameter.name != "seed" and not 0 <= value <= 1:
                raise StatisticsError(f"{parameter.name}: expected a probability, got {value!r}.")

    def outcomes(self, items: int | Pairing | Benchmark, draw: int = 0) -> Outcomes:
        """What the reasoner gets right, under all conditions.

        Args:
            items: who is paired with whom, or a number of items that share nothing.
            draw: number of the replication; other draws are independent.

        Raises:
            StatisticsError: `coupling` where a first question serves again: its one answer cannot
                follow several partners.
        """
        if isinstance(items, Benchmark):
            items = Pairing.of(items)
        return self._answers(Pairing.distinct(items) if isinstance(items, int) else items, draw)[0]

    def expected(self) -> dict[str, float]:
        """Expectations over rows and answers, by the names of `GapReport`.

        "leakage" is that of the difference. "relative" and what depends on b are left out where
        they are undefined.
        """
        read = 1 - self.unparsable
        s1, s2 = read * (1 - self.e1), read * (1 - self.e2)
        both = self._both_solvable()
        a = s1 * (1 - self.distraction)
        right = self.expected_taxonomy()["correct"]
        lucky = self.expected_taxonomy()["lucky"]
        s_comp = right + lucky
        found = {
            "s1": s1,
            "s2": s2,
            "s_comp": s_comp,
            "delta": s_comp - s1 * s2,
            "delta_paired": s_comp - read**2 * both,
            "c1": a,
            "distraction": a - s1,
            "distraction_term": (a - s1) * s2,
            "second_hop_term": right - a * s2,
            "lucky": lucky,
            "independent_context": -self.context * s2,
            "leakage": s1 - s2,
            "code": s_comp + (read - s_comp) * self.code,
            "code_gain": (read - s_comp) * self.code,
        }
        if s1 * s2 > 0:
            found["relative"] = s_comp / (s1 * s2) - 1
        if a > 0:
            found |= {"cf_given_c1": right / a, "second_hop": right / a - s2}
        return found

    def expected_taxonomy(self) -> dict[Category, float]:
        """Expected share of each kind of answer to the compositions; others do not occur."""
        read, heeded = 1 - self.unparsable, 1 - self.ignore_x
        first = (1 - self.e1) * (1 - self.distraction)
        right = self._both_solvable() * (1 - self.distraction) * (1 - self.second_hop)
        return {
            "correct": read * heeded * right,
            "lucky": read * heeded * (1 - first) * self.lucky,
            "wrong X": read * heeded * (1 - first) * (1 - self.lucky),
            "wrong Q2": read * heeded * (first - right),
            "X ignored": read * self.ignore_x,
            "unparsable": self.unparsable,
        }

    def generate_for(
        self, benchmark: Benchmark, spec: PromptSpec = DEFAULT_SPEC, draw: int = 0
    ) -> Callable[[Sequence[Prompt]], list[str]]:
        """A model that answers the prompts of a benchmark as `outcomes` says.

        Args:
            benchmark: items; a prompt is recognised by rendering all of them.
            spec: how they are put.
            draw: as for `outcomes`.

        Returns:
            A function from prompts to texts. It raises EvaluationError on a prompt that is not of
            this benchmark and spec.
        """
        answers: dict[str, str] = {}
        outcomes, readable = self._answers(Pairing.of(benchmark), draw)
        start = f"{self.seed}/{draw}"
        for at, item in enumerate(benchmark):
            for condition, (first, last) in _numbers(item, outcomes, at, start).items():
                linked = condition in ("compositional", "code")
                text = reply(first, last, style_of(condition, spec), linked=linked)
                if not readable[condition][at]:
                    text = no_reply(f"{start}/{item.id}/{condition}")
                # A row that serves again has the same prompt, and by construction the same answer.
                answers.setdefault(_key(render(item, condition, spec)), text)

        def generate(prompts: Sequence[Prompt]) -> list[str]:
            keys = [_key(prompt) for prompt in prompts]
            if any(key not in answers for key in keys):
                raise EvaluationError(
                    "prompts: expected those of the benchmark and spec that this reasoner was made "
                    "for, got another. Call generate_for with the same benchmark and spec."
                )
            return [answers[key] for key in keys]

        return generate

    def _answers(self, pairing: Pairing, draw: int) -> tuple[Outcomes, dict[Condition, Bools]]:
        """Outcomes, and which answers can be read."""
        self._check_coupling(pairing)
        own1 = self._uniforms("row", pairing.q1_ids, draw, 5)
        own2 = self._uniforms("row", pairing.q2_ids, draw, 5)
        item = self._uniforms("item", pairing.item_ids, draw, 10)
        p1 = self._solvable(np.where(item[0] < self.coupling, own2[0], own1[0]), self.e1)
        p2 = self._solvable(own2[0], self.e2)
        readable: dict[Condition, Bools] = {
            "original": own1[1] >= self.unparsable,
            "modified": own2[2] >= self.unparsable,
            "compositional": item[1] >= self.unparsable,
            "independent-context": item[2] >= self.unparsable,
            "code": item[3] >= self.unparsable,
            "original-q2": own2[1] >= self.unparsable,
        }
        first = item[4] < p1 * (1 - self.distraction)
        ignored = item[5] < self.ignore_x
        hop = np.where(first, p2 * (1 - self.second_hop), self.lucky)
        right = ~ignored & (item[6] < hop)
        in_code = right | (item[7] < self.code)
        original = own2[3] < self._solvable(own2[0], self.e1)
        after_another = item[8] < p2 * (1 - self.context)
        category = np.select(
            [~readable["compositional"], right & first, right, ignored, first],
            ["unparsable", "correct", "lucky", "X ignored", "wrong Q2"],
            "wrong X",
        )
        outcomes = Outcomes(
            item_ids=pairing.item_ids,
            q1_ids=pairing.q1_ids,
            q2_ids=pairing.q2_ids,
            q1=readable["original"] & (own1[3] < p1),
            q2=readable["modified"] & (own2[4] < p2),
            c1=readable["compositional"] & first,
            cf=readable["compositional"] & right,
            category=category,
            independent=readable["independent-context"] & after_another,
            original_q2=readable["original-q2"] & original,
            code=readable["code"] & in_code,
            parsable=readable["original"] & readable["modified"] & readable["compositional"],
            unparsable={name: float((~read).mean()) for name, read in readable.items()},
        )
        return outcomes, readable

    def _check_coupling(self, pairing: Pairing) -> None:
        rows = np.unique(pairing.q1_ids)
        again = len(rows) < len(pairing.q1_ids) or np.isin(rows, pairing.q2_ids).any()
        if self.coupling and again:
            raise StatisticsError(
                f"coupling: expected 0 where a first question serves again, got {self.coupling}. "
                "Its one answer cannot follow several partners."
            )

    def _both_solvable(self) -> float:
        """Chance that the two questions of an item are solved alone, if the answers are read."""
        m1, m2 = 1 - self.e1, 1 - self.e2
        return m1 * m2 + self.coupling * self.difficulty**2 * (min(m1, m2) - m1 * m2)

    def _solvable(self, u: Array, error: float) -> Array:
        easy = (u < 1 - error).astype(np.float64)
        return (1 - error) * (1 - self.difficulty) + self.difficulty * easy

    def _uniforms(self, kind: str, names: NDArray[np.str_], draw: int, count: int) -> Array:
        """Uniform numbers (count, n), the same wherever a name occurs."""
        start = f"{self.seed}/{draw}/{kind}/"
        distinct, place = np.unique(names, return_inverse=True)
        data = b"".join(
            hashlib.shake_256((start + name).encode()).digest(8 * count)
            for name in distinct.tolist()
        )
        numbers = np.frombuffer(data, "<u8").reshape(-1, count) >> np.uint64(11)
        return np.ldexp(numbers.astype(np.float64), -53)[place].T


def _numbers(item: Item, of: Outcomes, at: int, start: str) -> dict[Condition, Numbers]:
    """Answers to the first question and to the last of the item at a position, by condition."""
    apart = (item.x, item.gold, item.ignored)

    def number(name: str, gold: int, right: Bools | None) -> int:
        solved = right is not None and bool(right[at])
        return gold if solved else wrong_number(gold, apart, f"{start}/{item.id}/{name}")

    first = number("first", item.x, of.c1)
    ignored = of.category[at] == "X ignored"
    return {
        "original": (None, number("original", item.x, of.q1)),
        "modified": (None, number("modified", item.gold, of.q2)),
        "compositional": (first, item.ignored if ignored else number("last", item.gold, of.cf)),
        "independent-context": (item.x, number("apart", item.gold, of.independent)),
        "code": (first, number("code", item.gold, of.code)),
        "original-q2": (None, number("old", item.ignored, of.original_q2)),
    }


def _key(prompt: Prompt) -> str:
    """What a prompt is recognised by."""
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()


def _names(kind: str, n: int) -> NDArray[np.str_]:
    return np.array([f"{kind}-{number:06d}" for number in range(n)])
