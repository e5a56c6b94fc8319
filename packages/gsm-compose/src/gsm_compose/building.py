"""From rows of GSM8K to a benchmark.

Chains are built hop by hop. What is already there, at first single questions, stands on the left of
a bipartite graph; questions with slots stand on the right; an edge means that the answer on the
left may take the place of some number on the right. A maximum matching extends as many chains as
can be. Chains and edges are drawn lazily, some at first and more while these are too few, so time
grows with the number of items and not with the split; only when everything has been drawn and is
still too few is the number that was asked for refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

from gsm_compose.balancing import rebalance
from gsm_compose.benchmark import Benchmark
from gsm_compose.engine.doubtful import doubtful_rows
from gsm_compose.engine.problems import Problem
from gsm_compose.engine.slots import Slot, explain, find_slots
from gsm_compose.engine.substitution import linked_hop, plain_hop
from gsm_compose.engine.value_rules import attempt, reject_values
from gsm_compose.errors import GSMComposeError, RejectedCompositionError, TooFewPairsError
from gsm_compose.exemplars import exemplar_problems
from gsm_compose.items import SYMBOLS, Hop, Item, Shape
from gsm_compose.matching import draw, maximum_matching, shuffled

_FIRST_EDGES: Final = 50
_MOST_REUSE: Final = 16


@dataclass(frozen=True)
class _Chain:
    """Hops so far, by problem; `slots[i]` is the slot of hop i + 1."""

    problems: tuple[Problem, ...]
    slots: tuple[Slot, ...]
    answer: int

    @property
    def name(self) -> str:
        return "→".join(problem.id for problem in self.problems)


def compose(q1: Problem, q2: Problem, slot: Slot, ratio: Fraction | int = 3) -> Item:
    """The two-hop item in which the answer of `q1` replaces `slot` in `q2`.

    Raises:
        RejectedCompositionError: the questions are the same or of different splits, a rule rejects
            the slot or the value, or `q1` has no positive whole answer. The message names the
            rule.
    """
    if q1.id == q2.id or slot.problem != q2:
        raise RejectedCompositionError(
            f"expected two questions and a slot of the second, got {q1.id}, {q2.id} and a slot of "
            f"{slot.problem.id}."
        )
    if q1.split != q2.split:
        raise RejectedCompositionError(f"{q1.id} and {q2.id} are of different splits.")
    reasons = explain(slot)
    if reasons:
        raise RejectedCompositionError(f"{q2.id}, {slot.text!r}: {'; '.join(reasons)}")
    first = plain_hop(q1)
    reason = reject_values([slot], [first.answer], Fraction(ratio))
    if reason is not None:
        raise RejectedCompositionError(f"{q2.id}, {slot.text!r} → {first.answer}: {reason}")
    return Item(q1.split, "chain", (first, linked_hop([slot], [0], [first.answer])), (0, 1))


def build_benchmark(
    problems: Sequence[Problem],
    n: int = 1200,
    hops: int = 2,
    ratio: Fraction | int = 3,
    max_reuse: int | None = None,
    seed: int = 0,
    *,
    shape: Shape = "chain",
    reverse: bool = False,
    exclude: Collection[str] = (),
) -> Benchmark:
    """Build `n` compositions.

    Args:
        problems: rows of one split.
        n: how many items.
        hops: questions an item, 2 to 4; a fan-in has 3.
        ratio: largest factor between the new and the published answer of a question, up or down.
        max_reuse: how often a question may occur in other places than the first. A question stands
            first at most once. None: the least that is enough for `n`; 3 for 1200 two-hop items of
            the test split. The benchmark's settings say which it was.
        seed: same seed and problems, same benchmark, byte for byte.
        shape: ``"chain"``, or ``"fan_in"``: two answers into one question.
        reverse: present the questions in reverse order, the dependent one first.
        exclude: ids of problems to leave out besides the rows of `gsm_compose.engine.doubtful` and
            those that the prompts show as examples.

    Raises:
        TooFewPairsError: there are not `n` such items; the message has the number found, which for
            two-hop chains is the largest there is.
        GSMComposeError: an argument is out of range, or an excluded id is not there.
    """
    _check(problems, n, hops, ratio, max_reuse, shape, exclude)
    # The prompts show worked train rows, which must not be asked.
    left_out = set(exclude) | set(doubtful_rows()) | set(exemplar_problems())
    usable = [problem for problem in problems if problem.id not in left_out]
    builder = _Builder(usable, Fraction(ratio), seed)
    reuses = range(1, _MOST_REUSE + 1) if max_reuse is None else [max_reuse]
    most, found = 0, list[Item]()
    for reuse in reuses:
        if max_reuse is None and reuse * len(builder.seconds) < n:
            continue
        chain = shape == "chain"
        found = builder.chains(hops, n, reuse) if chain else builder.fan_ins(n, reuse)
        grown, most = len(found) > most, max(most, len(found))
        if len(found) >= n or (most and not grown):
            break
    if len(found) < n:
        raise TooFewPairsError(
            f"n: asked for {n} items with {hops if shape == 'chain' else 3} hops, "
            f"{'at most' if hops == 2 and shape == 'chain' else 'found'} {most} with "
            f"max_reuse={reuse}. Ask for fewer, allow more reuse, or widen the ratio."
        )
    order = tuple(range(len(found[0].hops)))
    items = tuple(
        Item(item.split, shape, item.hops, order[::-1] if reverse else order) for item in found[:n]
    )
    settings: dict[str, Any] = {
        "n": n,
        "hops": len(order),
        "ratio": str(Fraction(ratio)),
        "max_reuse": reuse,
        "seed": seed,
        "shape": shape,
        "reverse": reverse,
        "exclude": sorted(exclude),
        "problems": len(problems),
    }
    return Benchmark(items, settings)


def _check(
    problems: Sequence[Problem],
    n: int,
    hops: int,
    ratio: Fraction | int,
    max_reuse: int | None,
    shape: Shape,
    exclude: Collection[str],
) -> None:
    if not problems or len({problem.split for problem in problems}) != 1:
        raise GSMComposeError("problems: expected rows of one split, train or test, at least one.")
    ids = {problem.id for problem in problems}
    if len(ids) < len(problems):
        raise GSMComposeError("problems: expected every row once, some ids occur twice.")
    if n < 1:
        raise GSMComposeError(f"n: expected at least 1, got {n}.")
    if not 2 <= hops <= len(SYMBOLS):
        raise GSMComposeError(f"hops: expected 2 to {len(SYMBOLS)}, got {hops}.")
    if shape not in ("chain", "fan_in"):
        raise GSMComposeError(f"shape: expected 'chain' or 'fan_in', got {shape!r}.")
    if ratio < 1:
        raise GSMComposeError(f"ratio: expected at least 1, got {ratio}.")
    if max_reuse is not None and max_reuse < 1:
        raise GSMComposeError(f"max_reuse: expected at least 1, got {max_reuse}.")
    unknown = sorted(set(exclude) - ids)
    if unknown:
        raise GSMComposeError(f"exclude: no problem has the id {unknown[0]!r}.")


def _known(second: int | None) -> int:
    """The partner of a chain that has one."""
    if second is None:
        raise AssertionError("a chain without a partner was kept")
    return second


class _Builder:
    """The rows of one split, with the slots of each and what has been found out about them."""

    def __init__(self, problems: Sequence[Problem], ratio: Fraction, seed: int) -> None:
        self.ratio = ratio
        self.seed = seed
        firsts = [p for p in problems if p.final.denominator == 1 and p.final > 0]
        self.originals = [int(p.final) for p in firsts]
        self.firsts = [firsts[i] for i in shuffled([p.id for p in firsts], seed, "firsts")]
        slotted = [(p, slots) for p in problems if (slots := find_slots(p))]
        order = shuffled([p.id for p, _ in slotted], seed, "seconds")
        self.seconds = [slotted[i][0] for i in order]
        self.slots = [slotted[i][1] for i in order]
        self.fits: dict[tuple[int, int], list[tuple[Slot, int]]] = {}

    def fitting(self, answer: int, second: int) -> list[tuple[Slot, int]]:
        """Slots of a question that may take an answer, with the answers they lead to."""
        key = (answer, second)
        if key not in self.fits:
            runs = ((slot, attempt([slot], [answer], self.ratio)) for slot in self.slots[second])
            self.fits[key] = [
                (slot, int(run.answer)) for slot, run in runs if not isinstance(run, str)
            ]
        return self.fits[key]

    def walk(self, name: str, purpose: str) -> Iterator[int]:
        """All questions with slots, in an order of their own for each `name`."""
        count = len(self.seconds)
        if count == 0:
            return
        stride = 1 + draw(self.seed, f"{purpose} stride", name, max(count - 1, 1))
        while math.gcd(stride, count) != 1:
            stride += 1
        position = draw(self.seed, purpose, name, count)
        for _ in range(count):
            yield position
            position = (position + stride) % count

    def chains(self, hops: int, n: int, reuse: int) -> list[Item]:
        """Chains of `hops` questions; at least `n` where so many exist."""
        chains = [_Chain((p,), (), int(p.final)) for p in self.firsts]
        left = [reuse] * len(self.seconds)
        for hop in range(1, hops):
            # A later hop loses some chains; taking all would leave it no questions.
            share = min(n + n // 2 + 20, sum(left) // (hops - hop))
            chains = self._extend(chains, left, hop, n if hop == hops - 1 else share)
        return [self._item(chain) for chain in chains[:n]]

    def _extend(self, chains: list[_Chain], left: list[int], hop: int, n: int) -> list[_Chain]:
        """One hop more for as many chains as possible; takes the questions used out of `left`.

        Chains beyond `n` are left out before the answers are balanced.
        """
        limit, pool = _FIRST_EDGES, chains[: 2 * n]
        while True:
            edges, everything = self._edges(pool, left, hop, limit)
            partners = maximum_matching(edges, left)
            if sum(partner is not None for partner in partners) >= n:
                break
            if len(pool) < len(chains):
                pool = chains
            elif everything:
                break
            else:
                limit *= 4
        chains = pool
        matched = [i for i, partner in enumerate(partners) if partner is not None][:n]
        for i in matched:
            left[_known(partners[i])] -= 1
        options = [
            [
                (second, *fit)
                for second in edges[i]
                for fit in self.fitting(chains[i].answer, second)
            ]
            for i in matched
        ]
        chosen = rebalance(
            [[answer for _, _, answer in ways] for ways in options],
            [[second for second, _, _ in ways] for ways in options],
            [
                next(k for k, way in enumerate(ways) if way[0] == partners[i])
                for i, ways in zip(matched, options, strict=True)
            ],
            left,
            self.originals,
        )
        found = []
        for i, ways, choice in zip(matched, options, chosen, strict=True):
            second, slot, answer = ways[choice]
            left[_known(partners[i])] += 1
            left[second] -= 1
            chain = chains[i]
            found.append(_Chain((*chain.problems, slot.problem), (*chain.slots, slot), answer))
        return found

    def _edges(
        self, chains: list[_Chain], left: list[int], hop: int, limit: int
    ) -> tuple[list[list[int]], bool]:
        """Up to `limit` questions for each chain, and whether these are all there are."""
        edges: list[list[int]] = []
        everything = True
        for chain in chains:
            fits: list[int] = []
            for second in self.walk(chain.name, f"hop {hop}"):
                if left[second] == 0 or self.seconds[second] in chain.problems:
                    continue
                if self.fitting(chain.answer, second):
                    if len(fits) == limit:
                        everything = False
                        break
                    fits.append(second)
            edges.append(fits)
        return edges, everything

    def _item(self, chain: _Chain) -> Item:
        hops: list[Hop] = [plain_hop(chain.problems[0])]
        for position, slot in enumerate(chain.slots):
            hops.append(linked_hop([slot], [position], [hops[-1].answer]))
        return Item(chain.problems[0].split, "chain", tuple(hops), tuple(range(len(hops))))

    def fan_ins(self, n: int, reuse: int) -> list[Item]:
        """Items in which two answers go into one question, found greedily."""
        items: list[Item] = []
        used: set[str] = set()
        for round_ in range(reuse):
            for second in self.walk("all", f"fan-in {round_}"):
                if len(items) == n:
                    return items
                item = self._fan_in(second, used, round_)
                if item is not None:
                    used |= {hop.problem for hop in item.hops[:2]}
                    items.append(item)
        return items

    def _fan_in(self, second: int, used: set[str], round_: int) -> Item | None:
        slots = self.slots[second]
        if len(slots) < 2:
            return None
        problem = self.seconds[second]
        start = draw(self.seed, f"pair {round_}", problem.id, len(slots))
        pair = sorted((slots[start], slots[(start + 1) % len(slots)]), key=lambda s: s.start)
        begin = draw(self.seed, f"firsts {round_}", problem.id, len(self.firsts))
        free = [
            first
            for first in (*self.firsts[begin:], *self.firsts[:begin])
            if first.id not in used and first.id != problem.id
        ]
        x = [p for p in free if reject_values([pair[0]], [int(p.final)], self.ratio * 3) is None]
        y = [p for p in free if reject_values([pair[1]], [int(p.final)], self.ratio * 3) is None]
        for one in x[:_FIRST_EDGES]:
            for other in y[:_FIRST_EDGES]:
                values = [int(one.final), int(other.final)]
                if one.id == other.id or reject_values(pair, values, self.ratio) is not None:
                    continue
                try:
                    last = linked_hop(pair, [0, 1], values)
                except RejectedCompositionError:
                    continue
                hops = (plain_hop(one), plain_hop(other), last)
                return Item(problem.split, "fan_in", hops, (0, 1, 2))
        return None
