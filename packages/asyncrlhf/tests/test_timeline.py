from __future__ import annotations

import re
from collections import Counter
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.schedule import Layout, simulate
from asyncrlhf.timeline import draw, draw_comparison

SVG = "{http://www.w3.org/2000/svg}"
FILLS = {"generate": "#2a72bd", "score": "#167f79", "train": "#b9531d", "publish": "#8a57b0"}


def blocks(root: ElementTree.Element) -> list[tuple[str, float, float]]:
    """Of every block: its tip, and where it begins and ends."""
    found = []
    for rect in root.iter(f"{SVG}rect"):
        tip = rect.find(f"{SVG}title")
        if tip is not None:
            assert tip.text is not None
            x, width = float(rect.attrib["x"]), float(rect.attrib["width"])
            found.append((tip.text, x, x + width))
    return found


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0, 1e4), min_size=6, max_size=6),
    st.floats(1e-4, 1e4),
    st.integers(0, 3),
    st.sampled_from(["learner", "process"]),
    st.integers(1, 9),
)
def test_every_timeline_gives_well_formed_svg_within_its_frame(
    g: list[float], t: float, ahead: int, stages: Layout, rounds: int
) -> None:
    timeline = simulate(g=g, r=t / 3, t=t, w=t / 9, rounds=6, ahead=ahead, stages=stages)
    root = ElementTree.fromstring(draw(timeline, rounds=rounds))
    assert root.tag == f"{SVG}svg"
    width = float(root.attrib["viewBox"].split()[2])
    for _, left, right in blocks(root):
        assert 0 < left <= right < width
    assert len([t for t in texts(root) if re.fullmatch(r"[\d.e+-]+( \w+)?", t)]) >= 2


def test_blocks_are_the_events_that_begin_before_the_last_shown_round_ends() -> None:
    timeline = simulate(g=2, r=0.7, t=0.9, w=0.3, rounds=9, ahead=2)
    root = ElementTree.fromstring(draw(timeline, rounds=4))
    end = timeline.round_ends[3]
    begun = Counter((e.kind, e.round) for e in timeline.events if e.start < end)
    drawn = Counter()
    for tip, _, _ in blocks(root):
        match = re.match(r"round (\d+): (\w+)", tip)
        assert match is not None
        drawn[match[2], int(match[1])] += 1
    assert drawn == begun
    # The actor is ahead, in the midst of a round that the learner did not reach: that is cut off.
    assert ("generate", 4) in drawn


def test_time_runs_alike_in_all_panels() -> None:
    durations = {"g": 2.0, "t": 1.0, "rounds": 5}
    sync, overlapped = simulate(ahead=0, **durations), simulate(ahead=1, **durations)
    root = ElementTree.fromstring(draw_comparison(sync, overlapped))
    lengths = {round(right - left, 1) for tip, left, right in blocks(root) if "generate" in tip}
    assert len(lengths) == 1
    ends = [right for tip, _, right in blocks(root) if "round 4: train" in tip]
    origin = min(left for _, left, _ in blocks(root))
    assert (ends[1] - origin) / (ends[0] - origin) == pytest.approx(
        overlapped.makespan / sync.makespan, abs=0.005
    )


def test_an_arrow_leads_from_each_publication_to_its_first_use() -> None:
    def arrows(ahead: int) -> int:
        timeline = simulate(g=1, t=1, w=0.2, rounds=6, ahead=ahead)
        return len(re.findall(r"<path d=\"M[\d. ]+C", draw(timeline)))

    assert [arrows(ahead) for ahead in (0, 1, 2)] == [5, 4, 3]


def test_a_picture_says_in_words_what_it_shows() -> None:
    sync = simulate(g=3, t=1, rounds=20, ahead=0)
    overlapped = simulate(g=3, t=1, rounds=20, ahead=1)
    root = ElementTree.fromstring(draw_comparison(sync, overlapped, rounds=20))
    assert root.attrib["role"] == "img"
    title, description = root.findtext(f"{SVG}title"), root.findtext(f"{SVG}desc")
    assert title == "Timeline: synchronous against asynchronous, 1 round ahead"
    assert description is not None
    assert "20 rounds in 61 s · 1.31× the speed, 24% less time" in description
    assert "the actor 0%, the learner 67%" in description
    shown = texts(root)
    assert {"actor", "learner", "67% idle", "Synchronous", "0 s"} <= set(shown)
    assert "scorer" not in shown


def test_a_gain_over_more_rounds_than_are_shown_says_so() -> None:
    sync, overlapped = (simulate(g=1, t=1, rounds=50, ahead=ahead) for ahead in (0, 1))
    picture = draw_comparison(sync, overlapped, rounds=4)
    assert "4 rounds in 5 s · all 50: 1.96× the speed, 49% less time" in picture
    assert "0.51× the speed, 96% more time" in draw_comparison(overlapped, sync, rounds=4)


def test_the_legend_has_just_what_is_drawn() -> None:
    plain = texts(ElementTree.fromstring(draw(simulate(g=1, t=1, rounds=3))))
    assert "score" not in plain
    assert "publish weights" not in plain
    whole = draw(simulate(g=1, r=1, t=1, w=1, rounds=3, stages="process"))
    assert {"generate", "score", "train", "publish weights", "scorer"} <= set(
        texts(ElementTree.fromstring(whole))
    )


def luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("kind", FILLS)
def test_colours_can_be_told_from_light_and_dark_pages_and_carry_white_numbers(kind: str) -> None:
    picture = draw(simulate(g=1, r=1, t=1, w=1, rounds=3, stages="process"))
    assert FILLS[kind] in picture
    fill = luminance(FILLS[kind]) + 0.05
    assert 1.05 / fill >= 4.5
    assert fill / (luminance("#1b1b18") + 0.05) >= 3


def test_nothing_in_a_picture_reaches_out_of_it_into_a_page() -> None:
    picture = draw(simulate(g=1, t=1, rounds=3))
    assert " id=" not in picture
    assert "<script" not in picture
    assert "href" not in picture
    style = ElementTree.fromstring(picture).findtext(f"{SVG}style")
    assert style is not None
    # In a page, the root is <html>: each rule is for `svg:root`, a file of its own.
    assert all(rule.endswith("svg:root") for rule in re.findall(r"([^{}]+)\{color", style))


def test_the_same_timeline_gives_the_same_bytes() -> None:
    pictures = {draw(simulate(g=1.7, r=0.3, t=1.1, w=0.2, rounds=12)) for _ in range(2)}
    assert len(pictures) == 1


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="rounds: expected at least 1, got 0"):
        draw(simulate(g=1, t=1, rounds=3), rounds=0)
    with pytest.raises(InvalidInputError, match="take time"):
        draw(simulate(g=0, t=0, rounds=3))
    with pytest.raises(InvalidInputError, match="as many optimizer steps"):
        draw_comparison(simulate(g=1, t=1, rounds=3), simulate(g=1, t=1, rounds=4))
