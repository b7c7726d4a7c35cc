"""The page in a real browser, on runs of the real trainer and on hostile ones."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest

from tests.inspector.browser import Watched, browser
from tests.inspector.made import add_step, ids, rewrite, served, trained, trajectory, write_run
from tir_alp.inspect import main
from tir_alp.inspector.source import RunSource
from tir_alp.records.folder import RunFolder

VIEWS = {
    "runs": "#runs",
    "trajectories": "#trajectories?run=0&sort=-reward",
    "tokens": "#tokens?run=0&kind=trajectories&step=1&line=1&colour=logprob",
    "group": "#group?run=0&step=1&group=0",
}
SIZES = {"wide": {"width": 1280, "height": 900}, "phone": {"width": 420, "height": 860}}
AXE = Path(os.environ.get("TIR_ALP_AXE", "/nowhere"))
"""`axe.min.js` of the npm package axe-core."""


@pytest.fixture(scope="module")
def opened():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def real(opened, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("seen"), "real")


def text_of(page, selector: str) -> str:
    return page.inner_text(selector)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_view_in_both_themes_and_two_widths(opened, real, tmp_path, theme, size):
    """Screenshots are left in the folder TIR_ALP_SCREENSHOTS, if it is set."""
    shots = Path(os.environ.get("TIR_ALP_SCREENSHOTS") or tmp_path)
    with served(real) as address:
        seen = Watched(opened, viewport=SIZES[size], color_scheme=theme)
        for name, place in VIEWS.items():
            page = seen.open(address + place)
            page.wait_for_timeout(300)
            page.screenshot(path=shots / f"{name}_{theme}_{size}.png")
            overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert overflow <= 0, (name, overflow)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(255, 255, 255)" if theme == "light" else "rgb(20, 23, 27)")
        seen.assert_sound(address)


@pytest.mark.skipif(not AXE.is_file(), reason="TIR_ALP_AXE names no axe.min.js")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_no_serious_fault(opened, real, theme, size):
    with served(real) as address:
        seen = Watched(opened, viewport=SIZES[size], color_scheme=theme, bypass_csp=True)
        for name, place in VIEWS.items():
            page = seen.open(address + place)
            page.add_script_tag(content=AXE.read_text())
            faults = page.evaluate(
                "async () => (await axe.run()).violations"
                ".map(v => [v.id, v.impact, v.nodes[0].html])"
            )
            bad = [each for each in faults if each[1] in ("serious", "critical")]
            assert bad == [], name


def test_hover_shows_the_numbers_of_the_loss(opened, real):
    source = RunSource(real)
    source.index.refresh()
    with served(real) as address:
        seen = Watched(opened, viewport=SIZES["wide"])
        page = seen.open(address + VIEWS["tokens"])
        episode = source.trajectory("trajectories", 1, 1)
        columns = episode["columns"]
        index = columns["mask"].index(1)
        page.hover(f'[data-i="{index}"]')
        for name, column in (
            ("perturbed logprob", "logprob"),
            ("entropy", "entropy"),
            ("log ratio", "log_ratio"),
            ("rollout logprob", "rollout"),
        ):
            shown = float(text_of(page, f'[data-fact="{name}"]'))
            assert shown == pytest.approx(columns[column][index], rel=1e-6), name
        assert text_of(page, '[data-fact="in the loss"]') == "yes"
        page.keyboard.press("ArrowRight")
        assert text_of(page, '[data-fact="token"]').startswith("0, id ")
        page.keyboard.press("ArrowRight")
        assert text_of(page, '[data-fact="token"]').startswith("1, id ")
        seen.assert_sound(address)


def test_curves_are_overlaid_smoothed_grouped_and_saved(opened, tmp_path):
    runs = []
    for seed in range(3):
        path = write_run(tmp_path / f"seed{seed}", [], x=0)
        config = json.loads((path / "config.json").read_text()) | {"seed": seed}
        (path / "config.json").write_text(json.dumps(config))
        folder = RunFolder(path)
        folder.go_on()
        for step in range(1, 30):
            folder.log(step, {"rollout/reward": step + seed, "kl/rollout": 10.0**-step})
        folder.close()
        runs.append(path)
    with served(*runs) as address:
        seen = Watched(opened, viewport=SIZES["wide"])
        page = seen.open(address + "#runs")
        card = '[data-metric="rollout/reward"]'
        page.wait_for_selector(f"{card} canvas")
        assert [*map(float, re.findall(r"seed\d (\S+)", text_of(page, f"{card} .legend")))] == [
            29,
            30,
            31,
        ]
        page.hover(f"{card} .u-over", position={"x": 5, "y": 50})
        assert "step 1\n" in text_of(page, f"{card} .legend") + "\n"
        page.check("text=group seeds")
        page.wait_for_selector(f"{card} canvas")
        assert "3 seeds 30" in text_of(page, f"{card} .legend")
        with page.expect_download() as download:
            page.click(f"{card} >> text=CSV")
        lines = Path(download.value.path()).read_text().splitlines()
        mean, high, low = map(float, lines[-1].split(",")[1:])
        assert mean == 30 and high - mean == pytest.approx(4.30 / 3**0.5, rel=1e-6) == mean - low
        with page.expect_download() as download:
            page.click(f"{card} >> text=PNG")
        assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")
        page.uncheck("text=group seeds")
        page.fill('[aria-label="find a metric"]', "kl/")
        page.check("text=log scale")
        page.wait_for_selector('[data-metric="kl/rollout"] canvas')
        seen.assert_sound(address)


def test_a_run_that_goes_on_is_followed(opened, tmp_path):
    path = write_run(tmp_path / "run", [[trajectory(0, ("q", "a"), 1.0)]])
    folder = RunFolder(path)
    folder.go_on()
    with served(path) as address:
        seen = Watched(opened, viewport=SIZES["wide"])
        page = seen.open(address + "#runs")
        page.wait_for_selector("text=1 trajectories")
        add_step(folder, 2, [trajectory(1, ("q", "b"), 0.0), trajectory(2, ("q", "c"), 0.0)])
        page.wait_for_selector("text=of 3 trajectories is 0.3333")
        page.wait_for_selector('[data-metric="rollout/reward"] .legend:has-text("step 2")')
        page.click("nav >> text=Trajectories")
        page.wait_for_selector("text=3 trajectories")
        add_step(folder, 3, [trajectory(3, ("q", "d"), 0.0)])
        page.wait_for_selector("text=4 trajectories")
        seen.assert_sound(address)
    folder.close()


def test_filters_and_order_and_keys(opened, tmp_path):
    steps = [
        [
            trajectory(4 * step + i, ("q", *("call", "out") * (i % 2), f"a{i}"), i / 4)
            for i in range(4)
        ]
        for step in range(50)
    ]
    with served(write_run(tmp_path / "run", steps)) as address:
        seen = Watched(opened, viewport=SIZES["wide"])
        page = seen.open(address + "#trajectories")
        page.wait_for_selector("text=200 trajectories")
        assert page.locator("tr.row").count() < 80  # only those that can be seen
        page.check("text=tool never called")
        page.wait_for_selector("#count >> text=100 trajectories")
        page.click("text=clear")
        page.click("th >> text=reward")
        page.wait_for_selector('th[aria-sort="descending"] >> text=reward')
        assert page.locator("tr.row").first.locator("td").nth(3).inner_text() == "0.75"
        page.click("summary >> text=filters")
        page.fill('[aria-label="reward at most"]', "0.25")
        page.keyboard.press("Tab")
        page.wait_for_selector("#count >> text=100 trajectories")
        page.keyboard.press("Escape")
        page.locator("main").focus()
        page.keyboard.press("j")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=its group side by side")
        page.keyboard.press("g")
        page.keyboard.press("t")
        page.wait_for_selector("#count")
        seen.assert_sound(address)


def test_hostile_text_does_nothing(opened, tmp_path):
    """Fuzz: markup, scripts, styles, control and bidi characters, in every text of a run."""
    rng = random.Random(0)
    parts = [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(2)>",
        "</pre></main></body>",
        "<style>*{display:none}</style>",
        "javascript:alert(3)",
        "\u202e\u2066\u200f",
        "\x1b[31m\x07\x00",
        "{{constructor}}",
        "${alert(4)}",
        "]]>",
        "<svg/onload=alert(5)>",
        "&lt;b&gt;",
        "\u2028\u2029",
        "<iframe src=https://evil.example>",
        "```python\nprint('</script>')\n```",
        "\ufeff\u200b",
        "__proto__",
        "<a href='https://evil.example' autofocus onfocus=alert(6)>",
        "\U0001d4b3🙂",
        "'\"`",
    ]

    def text() -> str:
        return "".join(rng.choices(parts, k=rng.randint(1, 6)))

    evil = [
        trajectory(i, (text(), text(), text(), text()), i / 8, answer=text(), odd={text(): text()})
        for i in range(8)
    ]
    path = write_run(tmp_path / "<b>run</b>", [evil])
    rewrite(path / "trajectories/step_000001.jsonl", lambda record: record.update(task_id=text()))
    (path / "advice.jsonl").write_text(json.dumps({"step": 1, "advice": text()}) + "\n")
    (path / "events.jsonl").write_text(
        json.dumps({"step": 1, "kind": text(), "reason": text()}) + "\n"
    )
    (path / "objective.txt").write_text(text())
    config = json.loads((path / "config.json").read_text())
    config["algorithm"]["name"] = text()
    (path / "config.json").write_text(json.dumps(config | {text(): text()}))
    folder = RunFolder(path)
    folder.go_on()
    folder.log(1, {f"rollout/{text()}": 1.0})
    folder.close()
    file = tmp_path / "page.html"
    assert main([str(path), "--export", str(file)]) == 0
    with served(path) as address:
        for start in (address, f"file://{file}"):
            seen = Watched(opened, viewport=SIZES["wide"])
            places = [
                *VIEWS.values(),
                *(f"#tokens?run=0&kind=trajectories&step=1&line={i}" for i in range(2, 9)),
            ]
            for place in [*places, "#<script>alert(7)</script>", "#tokens?run=<b>&kind=__proto__"]:
                seen.page.goto("about:blank")
                seen.page.goto(start + place)
                seen.page.wait_for_selector("main[data-ready] h1")
                seen.page.wait_for_timeout(100)
                for button in ("details > summary",):
                    for each in seen.page.locator(button).all():
                        each.click()
                tags = seen.page.evaluate(
                    "document.querySelectorAll('main script, main style, main iframe, main img,"
                    " main svg').length"
                )
                assert tags == 0
                shown = seen.page.evaluate("document.querySelector('main').textContent")
                assert not re.search(
                    "[\u202a-\u202e\u2066-\u2069\u200b-\u200f\x00-\x08\x1b\u2028\ufeff]", shown
                )
                assert seen.page.is_visible("#top")
            faults = [each for each in seen.faults if "404" not in each]
            assert faults == []
            elsewhere = [each for each in seen.requests if "evil" in each]
            assert elsewhere == []
            text_shown = seen.open(start + VIEWS["trajectories"]).inner_text("main")
            assert "<" in text_shown


def test_the_exported_file_shows_the_same(opened, real, tmp_path):
    file = tmp_path / "page.html"
    assert main([str(real), "--export", str(file)]) == 0
    with served(real) as address:
        for name, place in VIEWS.items():
            texts = []
            for start in (address, f"file://{file}"):
                seen = Watched(opened, viewport=SIZES["wide"])
                page = seen.open(start + place)
                page.wait_for_timeout(300)
                texts.append(page.inner_text("main").replace("audit this run", "").split())
                assert seen.faults == []
            assert texts[0] == texts[1], name


def test_a_long_trajectory_scrolls_smoothly_and_is_whole(opened, tmp_path):
    """1,000 turns and 32,000 tokens: blocks far away are plain text, and nothing is lost."""
    texts = ["q"]
    for turn in range(999):
        texts += [f"step {turn:04d} of it", f"<out {turn:04d} ok>\n"]
    path = write_run(tmp_path / "run", [[trajectory(0, (*texts, "the end of it"))]])
    with served(path) as address:
        seen = Watched(opened, viewport=SIZES["wide"])
        page = seen.open(address + "#tokens?run=0&kind=trajectories&step=1&line=1")
        assert page.evaluate("document.querySelectorAll('.span').length") == 2000
        assert page.evaluate("document.querySelectorAll('.t').length") < 6000
        whole = page.evaluate(
            "[...document.querySelectorAll('.tokens')].map(e => e.textContent).join('')"
        )
        assert whole == "".join([*texts, "the end of it"])
        assert len(ids(whole)) > 25_000
        page.evaluate("scrollTo(0, 1e9)")
        page.wait_for_selector(".span:last-child .t", state="attached")
        assert page.evaluate("document.querySelectorAll('.t').length") < 6000
        page.fill('[aria-label="go to turn"]', "900")
        page.keyboard.press("Enter")
        page.wait_for_selector(".t.current", state="attached")
        assert text_of(page, '[data-fact="turn"]') == "900"
        seen.assert_sound(address)


def test_findings_of_the_audit_are_in_place(opened, real, tmp_path):
    path = Path(shutil.copytree(real, tmp_path / "copy"))

    def change(record):
        record["turns"][0]["completion"]["rollout_logprobs"][2] -= 1.0

    rewrite(path / "trajectories/step_000001.jsonl", change)
    with served(path) as address:
        seen = Watched(opened, viewport=SIZES["wide"])
        page = seen.open(address + VIEWS["tokens"])
        page.click("text=audit this run")
        page.wait_for_selector(".t.finding", timeout=240_000)
        page.click(".audit li button >> text=logprobs")
        assert "the trajectory has" in text_of(page, '[data-fact="audit"]')
        seen.assert_sound(address)


def test_a_newcomer_finds_out_why_a_run_does_not_learn(opened, tmp_path):
    """A run whose environment reads answers in another form than the model writes."""
    settings = ("--env.id", "tests.inspector.wrong_format:WrongFormat-v0")
    settings += ("--env.kwargs", json.dumps({"instruction": "", "max_turns": 3}))
    path = trained(tmp_path, "broken", *settings)
    with served(path) as address:
        seen = Watched(opened, viewport=SIZES["wide"])
        page = seen.open(address)
        words = text_of(page, ".verdicts")
        assert "have the reward 0" in words and "nothing is learnt" in words
        assert "the grader found no answer" in words
        page.click("text=see what was written")
        page.wait_for_selector("tr.row")
        page.locator("tr.row a").first.click()
        page.wait_for_selector(".episode")
        written = text_of(page, ".episode")
        assert "\\boxed{" in written
        assert re.search(r"answer\s+none", text_of(page, ".told"))
        seen.assert_sound(address)
