"""The words of code have hues that can be read in both themes, and the strip tells times apart."""

import colorsys
from itertools import combinations

import pytest

from tests.inspector.browser import Watched, browser
from tests.inspector.made import served, trajectory, write_run

CODE = "```python\n# a comment\ndef count(word):\n    return len(word) + 2\nprint('x')\n```"
KINDS = {f"k-{each}" for each in ("keyword", "string", "number", "comment", "builtin", "function")}
TOKENS = "#tokens?run=0&kind=trajectories&step=1&line=1"
PAINTED = """() => {
  const canvas = document.createElement("canvas").getContext("2d");
  const painted = (...colours) => {
    for (const each of colours) { canvas.fillStyle = each; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const probe = document.body.appendChild(document.createElement("p"));
  probe.style.backgroundColor = "color-mix(in srgb, var(--faint) 14%, transparent)";
  const ground = getComputedStyle(document.body).backgroundColor;
  const stripes = painted(ground, getComputedStyle(probe).backgroundColor);
  probe.remove();
  return [...document.querySelectorAll(".t > span")].map((word) => {
    const box = word.closest(".tokens");
    const below = painted(ground, getComputedStyle(box).backgroundColor);
    return [word.className, painted(getComputedStyle(word).color), [below, stripes]];
  });
}"""
"""The class of each word of code, its colour, and the grounds that it can have, as drawn."""


@pytest.fixture(scope="module")
def opened():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    texts = ("count", CODE, "5\n", "It is 5.")
    return write_run(tmp_path_factory.mktemp("words") / "run", [[trajectory(0, texts, 1.0)]])


def contrast(one: list[int], other: list[int]) -> float:
    """The contrast of two colours in sRGB, as WCAG defines it."""

    def luminance(colour: list[int]) -> float:
        parts = [each / 255 for each in colour]
        red, green, blue = (
            each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_of_code_differ_in_hue_and_can_be_read(opened, run, theme):
    with served(run) as address:
        seen = Watched(opened, color_scheme=theme)
        page = seen.open(address + TOKENS)
        words = page.evaluate(PAINTED)
        colours = {name: colour for name, colour, _ in words}
        assert colours.keys() == KINDS
        for name, colour, grounds in words:
            assert all(contrast(colour, each) >= 4.5 for each in grounds), (name, colour, grounds)
        hues = {
            name: colorsys.rgb_to_hsv(*(each / 255 for each in colour))[0] * 360
            for name, colour in colours.items()
            if name != "k-comment"  # is grey
        }
        for one, other in combinations(hues, 2):
            apart = abs(hues[one] - hues[other])
            assert min(apart, 360 - apart) > 20, (one, other)
        seen.assert_sound(address)


def test_words_have_no_hue_where_the_ground_shows_numbers(opened, run):
    with served(run) as address:
        seen = Watched(opened)
        page = seen.open(f"{address}{TOKENS}&colour=rollout")
        words = page.evaluate(PAINTED)
        assert {name for name, *_ in words} == KINDS
        assert len({tuple(colour) for _, colour, _ in words}) == 1
        seen.assert_sound(address)


def test_the_strip_shows_the_queue_apart(opened, run):
    with served(run) as address:
        seen = Watched(opened)
        page = seen.open(address + TOKENS)
        titles = page.eval_on_selector_all(".strip .time", "all => all.map(each => each.title)")
        assert titles == [
            "turn 0, queue: 0.05 s",
            "turn 0, generate: 0.15 s",
            "turn 0, tool: 0.1 s",
            "turn 1, queue: 0.05 s",
            "turn 1, generate: 0.15 s",
        ]
        parts = page.eval_on_selector_all(
            ".strip .time", "all => all.map(each => each.getBoundingClientRect().width)"
        )
        assert parts[1] == pytest.approx(3 * parts[0], rel=0.1)
        assert "0.5 s in all" in page.inner_text('[aria-label="times"]')
        seen.assert_sound(address)
