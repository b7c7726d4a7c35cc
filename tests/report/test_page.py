"""The page in a real browser: a run of the real trainer, hostile runs, and no scripts at all."""

import json
import os
import random
import re
from pathlib import Path

import pytest

from tests.inspector.browser import Watched, browser
from tests.inspector.made import rewrite, trained, trajectory, write_run
from tests.report.test_report import METRICS, make_run
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.inspector.visible import visible
from tir_alp.records.folder import RunFolder
from tir_alp.report import write_comparison, write_run_report
from tir_alp.report.read import read_run

SIZES = {"wide": {"width": 1200, "height": 900}, "phone": {"width": 420, "height": 860}}
AXE = Path(os.environ.get("TIR_ALP_AXE", "/nowhere"))
HIDDEN = "[\u202a-\u202e\u2066-\u2069\u200b-\u200f\x00-\x08\x1b\u2028\ufeff\ud800-\udfff]"


@pytest.fixture(scope="module")
def opened():
    with browser() as found:
        yield found


def growing(step, factor=1.0):
    """Metrics of a step of a run that learns."""
    changed = {"rollout/reward": 0.1 + 0.02 * factor * step, "kl_clean/rollout": 0.001}
    return (step, METRICS | changed)


@pytest.fixture(scope="module")
def pages(opened, tmp_path_factory):
    """A report of a run of the trainer, of a long run, of few steps, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    real = trained(folder, "real")
    long = make_run(folder / "long", [growing(step) for step in range(1, 31)])
    seeds = [
        make_run(
            folder / f"{name}{seed}",
            [growing(step, 1 + seed / 9) for step in range(1, 21)],
            seed=seed,
            algorithm=ALGORITHMS[name],
        )
        for name in ("alp_sequence", "grpo")
        for seed in range(3)
    ]
    return {
        "real": write_run_report(real),
        "long": write_run_report(long),
        "one step": write_run_report(make_run(folder / "one", [(1, METRICS)])),
        "no step": write_run_report(make_run(folder / "none", [])),
        "comparison": write_comparison(seeds, folder / "compared"),
    }


def watched(opened, page, **settings):
    seen = Watched(opened, **settings)
    seen.open(f"file://{page}")
    return seen


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_pages_in_both_themes_and_two_widths(opened, pages, theme, size):
    """Screenshots are left in the folder TIR_ALP_SCREENSHOTS, if it is set."""
    shots = os.environ.get("TIR_ALP_SCREENSHOTS")
    names = pages if (theme, size) == ("light", "phone") else ("real", "comparison")
    for name in names:
        file = pages[name]
        seen = watched(opened, file, viewport=SIZES[size], color_scheme=theme)
        page = seen.page
        page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true })")
        overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert overflow <= 0, (name, overflow)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(255, 255, 255)" if theme == "light" else "rgb(20, 23, 27)")
        if name != "no step":
            box = page.locator("figure .plot canvas").first.bounding_box()
            assert box["y"] + box["height"] < SIZES[size]["height"], (name, box)
        if shots:
            page.screenshot(
                path=Path(shots) / f"report_{name}_{theme}_{size}.png".replace(" ", "_")
            )
        seen.assert_sound(f"file://{file}")


@pytest.mark.skipif(not AXE.is_file(), reason="TIR_ALP_AXE names no axe.min.js")
@pytest.mark.parametrize(("theme", "size"), [("light", "phone"), ("dark", "wide")])
def test_axe_finds_no_serious_fault(opened, pages, theme, size):
    for name in ("real", "comparison"):
        seen = watched(
            opened, pages[name], viewport=SIZES[size], color_scheme=theme, bypass_csp=True
        )
        seen.page.add_script_tag(content=AXE.read_text())
        # Once with curves, and once with pictures, as the page is where no script runs.
        for remove in ("", ".live"):
            faults = seen.page.evaluate(
                "async (live) => { for (const e of live ? document.querySelectorAll(live) : [])"
                " e.classList.remove('live'); return (await axe.run()).violations"
                ".map(v => [v.id, v.impact, v.nodes[0].html]) }",
                remove,
            )
            bad = [each for each in faults if each[1] in ("serious", "critical")]
            assert bad == [], name


def test_without_scripts_the_pictures_and_all_text_remain(opened, pages):
    for size in SIZES.values():
        context = opened.new_context(java_script_enabled=False, viewport=size)
        page = context.new_page()
        page.goto(f"file://{pages['real']}")
        images = page.locator("figure img")
        assert images.count() > 8 and images.first.is_visible()
        assert not page.locator(".panels").first.is_visible()
        text = page.inner_text("main")
        assert "Learning" in text and "Provenance" in text and "Final values" in text
        box = page.locator("main").bounding_box()
        assert box is not None and box["width"] <= size["width"]
        context.close()


def rows_of(page) -> dict[str, list[str]]:
    """The cells of the table of final values, by metric."""
    found = page.evaluate(
        "[...document.querySelectorAll('#values tbody tr')].map("
        "row => [...row.children].map(cell => cell.textContent))"
    )
    return {name: rest for name, *rest in found}


def test_numbers_on_the_page_are_those_of_the_metrics(opened, pages):
    run = read_run(pages["real"].parent)
    seen = watched(opened, pages["real"], viewport=SIZES["wide"])
    rows = rows_of(seen.page)
    assert rows.keys() == run.series.keys() and len(rows) > 60
    for name, (first, last, _, step, _) in rows.items():
        series = run.series[name]
        assert float(first) == pytest.approx(series.values[0], rel=1e-3, abs=1e-12), name
        assert float(last) == pytest.approx(series.values[-1], rel=1e-3, abs=1e-12), name
        assert int(step) == series.steps[-1]
    curves = json.loads(seen.page.evaluate("document.getElementById('curves').textContent"))
    for picture, title, metric in (
        ("reward", "Reward", "rollout/reward"),
        ("entropy", "Entropy", "entropy/mean"),
    ):
        (panel,) = [each for each in curves[picture] if each["title"] == title]
        series = run.series[metric]
        assert panel["steps"] == [*series.steps]
        assert panel["lines"][0]["values"] == pytest.approx(series.values, rel=1e-6)
        shown = seen.page.locator(f'.panel[aria-label="{title}"] .legend b').inner_text()
        assert float(shown) == pytest.approx(series.values[-1], rel=1e-3)
    assert run.series["entropy/mean"].values[-1] > 0


def test_the_text_says_what_the_page_says(opened, pages):
    def words(text):
        return re.sub(r"[`*|#>\-\s]+", " ", text.replace("\\", ""))

    for name, file in pages.items():
        seen = watched(opened, file, viewport=SIZES["wide"])
        text = words((file.parent / "report.md").read_text())
        seen.page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true })")
        parts = seen.page.evaluate(
            "[...document.querySelectorAll('h1, h3, section > h2, .headline, .verdict li, td, th,"
            " .episode pre')].filter(e => !e.closest('.panel')).map(e => e.textContent)"
        )
        assert len(parts) > 10
        missing = [each for each in parts if words(each).strip() not in text]
        assert missing == [], name


def test_curves_are_hovered_hidden_zoomed_and_scaled(opened, pages):
    seen = watched(opened, pages["long"], viewport=SIZES["wide"])
    page = seen.page
    panel = page.locator('.panel[aria-label="Reward"]').first
    panel.locator(".u-over").hover(position={"x": 2, "y": 50})
    assert panel.locator(".legend .item").first.inner_text() == "step 1"
    assert float(panel.locator(".legend b").inner_text()) == pytest.approx(0.12)
    button = panel.locator("button.item")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    box = panel.locator(".u-over").bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 50, steps=4)
    page.mouse.up()
    panel.locator(".u-over").hover(position={"x": 2, "y": 50})
    first = int(panel.locator(".legend .item").first.inner_text().removeprefix("step "))
    assert 13 < first < 18
    panel.locator("text=log scale").click()
    assert panel.locator("text=log scale").get_attribute("aria-pressed") == "true"
    page.emulate_media(color_scheme="dark")
    assert panel.locator("canvas").count() == 1
    seen.assert_sound(f"file://{pages['long']}")


def test_methods_have_means_and_intervals_over_seeds(opened, pages):
    seen = watched(opened, pages["comparison"], viewport=SIZES["wide"])
    page = seen.page
    names = page.locator('.panel[aria-label="Reward"]').first.locator("button.item")
    assert [each.split(",")[0] for each in names.all_inner_texts()] == ["alp_sequence", "grpo"]
    assert "mean of 3" in names.first.inner_text()
    text = page.inner_text("#methods")
    # rewards of the last 5 steps: 0.1 + 0.36 * (1, 1.111, 1.222)
    assert "0.500 [0.401, 0.599]" in text
    assert "which seeds alone can explain" in page.inner_text(".verdict")
    assert "not told apart from" in page.inner_text(".headline")


PARTS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "</pre></main></body>",
    "<style>*{display:none}</style>",
    "\u202e\u2066\u200f",
    "\x1b[31m\x07\x00",
    "</script><!--",
    "<svg/onload=alert(5)>",
    "\u2028\u2029",
    "<iframe src=https://evil.example>",
    "```\n# heading\n![x](https://evil.example/x.png)\n",
    "\ufeff\u200b\ud800",
    "__proto__",
    "| a | b |",
    "[x](javascript:alert(6))",
    "'\"`",
)


def test_hostile_text_does_nothing(opened, tmp_path):
    """Fuzz: markup, scripts, styles, control and bidi characters, in every text of a run."""
    rng = random.Random(0)

    def text() -> str:
        return "".join(rng.choices(PARTS, k=rng.randint(1, 6)))

    steps = [
        [trajectory(10 * step + i, ("q", "a", "b", "c"), i / 4) for i in range(4)]
        for step in (0, 1)
    ]
    paths = []
    for number in range(2):
        path = write_run(tmp_path / f"<b>run{number}</b>", steps)

        def change(record):
            record["task_id"] = text()
            for turn in record["turns"]:
                turn["completion"]["text"], turn["observation"]["text"] = text(), text()
                turn["info"]["answer"] = text()

        for file in (path / "trajectories").iterdir():
            rewrite(file, change)
        (path / "advice.jsonl").write_text(json.dumps({"step": 1, "advice": text()}) + "\n")
        event = {"step": 1, "kind": text(), "reason": text()}
        (path / "events.jsonl").write_text(json.dumps(event) + "\n")
        environment = {"step": 0, "tools": {text(): text()}, "warnings": [text()]}
        (path / "environment.jsonl").write_text(json.dumps(environment) + "\n")
        (path / "objective.txt").write_text(text(), errors="replace")
        config = json.loads((path / "config.json").read_text())
        config["algorithm"]["name"] = text()
        (path / "config.json").write_text(json.dumps(config | {text(): text()}))
        (path / "provenance.json").write_text(json.dumps({"command": text(), "commit": text()}))
        folder = RunFolder(path)
        folder.go_on()
        folder.log(1, {f"rollout/{text()}": 1.0, "alp/sigma_1": 1.0})
        folder.close()
        paths.append(path)
    pages = [write_run_report(paths[0]), write_comparison(paths, tmp_path / "both")]
    for file in pages:
        seen = watched(opened, file, viewport=SIZES["wide"])
        page = seen.page
        page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true })")
        tags = "main script, main style, main iframe, main svg, main img:not([src^='data:'])"
        assert page.evaluate(f'document.querySelectorAll("{tags}").length') == 0
        assert page.evaluate("document.querySelectorAll('main a:not([href^=\"#\"])').length") == 0
        shown = page.evaluate("document.querySelector('main').textContent")
        assert not re.search(HIDDEN, shown) and "<" in shown
        assert page.is_visible("h1") and page.evaluate("({}).x === undefined")
        assert seen.faults == [] and [each for each in seen.requests if "evil" in each] == []
        text_file = (file.parent / "report.md").read_text()
        assert not re.search(HIDDEN, text_file)
        outside = re.sub(r"(?ms)^(`{3,})text$.*?^\1$", "", text_file)
        assert not re.search(r"(?m)^# heading|(?<!\\)<(script|img|iframe|svg|style)", outside)
        assert re.findall(r"(?<!\\)\]\((?!figures/)", outside) == []


def test_python_and_the_page_make_the_same_visible(opened):
    """The function of the inspector's page and its twin, on every character."""
    script = (Path(__file__).parents[2] / "tir_alp/inspector/static/dom.js").read_text()
    page = opened.new_context().new_page()
    page.add_script_tag(content=script.replace("export ", "") + ";window.shownAs = visible;")
    shown = page.evaluate(
        "() => { const found = []; for (let code = 0; code < 0x110000; code++) {"
        " const shown = shownAs(String.fromCodePoint(code));"
        " if (shown !== String.fromCodePoint(code)) found.push([code, shown]); } return found; }"
    )
    ours = [[c, visible(chr(c))] for c in range(0x110000) if visible(chr(c)) != chr(c)]
    assert shown == ours and len(ours) > 2000
