"""Three items written by hand, so that tests of prompts, parsing and statistics need no engine."""

from __future__ import annotations

from gsm_compose.benchmark import Benchmark
from gsm_compose.items import Hop, Item, Link


def _plain(problem: str, text: str, answer: int, solution: str, program: str | None) -> Hop:
    return Hop(problem, text, text, text, (), answer, answer, solution, program)


def _linked(
    problem: str, text: str, old: str, new: int, answers: tuple[int, int], solution: str, body: str
) -> Hop:
    start = text.index(old)
    end = start + len(old)
    link = Link(0, start, end, old, int(old))
    return Hop(
        problem,
        text,
        text[:start] + str(new) + text[end:],
        text[:start] + "X" + text[end:],
        (link,),
        answers[1],
        answers[0],
        solution,
        f"def solution(x):\n    return {body}\n",
    )


UNICORNS = _plain(
    "gsm8k/test/136",
    "There are 27 unicorns left in the world.  One third of them are in the Scottish Highlands.  "
    "Two thirds of the Scottish unicorns are female.  How many female Scottish unicorns are there?",
    6,
    "Scottish Unicorns:27(1/3)=9\nFemale:9(2/3)=6 unicorns",
    None,
)
LOCKERS = _linked(
    "gsm8k/test/418",
    "Zack's locker is half as big as Timothy's locker. Peter's locker is 1/4 as big as Zack's "
    "locker. If Peter's locker is 5 cubic inches, how big is Timothy's locker in cubic inches?",
    "5",
    6,
    (40, 48),
    "Zack's locker is 6*4=<<6*4=24>>24 cubic inches.\n"
    "Timothy's locker is 24*2=<<24*2=48>>48 cubic inches.",
    "x * 4 * 2",
)
APPLES = _plain(
    "gsm8k/test/9001",
    "Ana has 3 boxes of 4 apples. How many apples has she?",
    12,
    "Ana has 3*4=<<3*4=12>>12 apples.",
    "def solution():\n    return 3 * 4\n",
)
ROPES = _linked(
    "gsm8k/test/9002",
    "A rope of 20 feet is cut into pieces of 2 feet. How many pieces are there?",
    "20",
    12,
    (10, 6),
    "There are 12/2=<<12/2=6>>6 pieces.",
    "x // 2",
)
BIRDS = _plain(
    "gsm8k/test/9003",
    "There are 15 birds and 5 fly away. How many stay?",
    10,
    "15-5=<<15-5=10>>10 birds stay.",
    "def solution():\n    return 15 - 5\n",
)
CARDS = _linked(
    "gsm8k/test/9004",
    "Tom buys 8 cards for $3 each and gives $1 to his sister. How many dollars are gone?",
    "8",
    10,
    (25, 31),
    "The cards cost 10*3=$<<10*3=30>>30.\nIn all $30+$1=$<<30+1=31>>31 are gone.",
    "x * 3 + 1",
)

ITEMS = (
    Item("test", "chain", (UNICORNS, LOCKERS), (0, 1)),
    Item("test", "chain", (APPLES, ROPES), (0, 1)),
    Item("test", "chain", (BIRDS, CARDS), (1, 0)),
)
BENCHMARK = Benchmark(ITEMS, {"source": "written by hand"})
