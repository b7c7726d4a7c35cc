"""The pages hold together: links, anchors, files, metrics, extras and dependencies exist.

`test_docs_code.py` is about what the pages tell a reader to type.
"""

import re
import tomllib
from pathlib import Path

from tir_alp.records.meanings import meaning
from tir_alp.tools.outcome import Outcome

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), ROOT / "configs/README.md"]


def test_every_relative_link_leads_somewhere():
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
        if not target.startswith("http") and not (page.parent / target).exists()
    ]
    assert len(PAGES) > 20 and broken == []


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text())
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def test_every_anchor_is_a_heading():
    broken = [
        f"{page.relative_to(ROOT)}: {target}#{anchor}"
        for page in PAGES
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text())
        if not target.startswith("http")
        and anchor not in anchors_of(page.parent / target if target else page)
    ]
    assert broken == []


def test_every_file_of_ours_that_is_named_exists():
    folders = "tir_alp|envs|tools|tests|docs|configs|docker"
    named = {
        name
        for page in PAGES
        for name in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]+\.\w+", page.read_text())
    }
    made = {"docs/figures/mismatch_engine.png", "configs/NAME.toml"}
    missing = [name for name in named - made if "NAME" not in name and not (ROOT / name).exists()]
    assert len(named) > 50 and missing == []


def test_every_page_is_listed_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    pages = [page.name for page in (ROOT / "docs").glob("*.md")]
    assert [name for name in pages if f"docs/{name}" not in readme] == []


def test_the_loops_of_the_architecture_are_where_it_says():
    text = (ROOT / "docs/architecture.md").read_text()
    named = re.findall(r"`(\w+)\.(\w+)`(?:, `\w+`)? \(`([\w/]+\.py)`\)", text)
    assert len(named) >= 6
    for owner, method, file in named:
        source = (ROOT / "tir_alp" / file).read_text()
        assert f"class {owner}" in source and f"def {method}(" in source, (owner, method, file)


def documented_metrics() -> list[str]:
    """Patterns of the names in docs/metrics.md; a slice is an area with the keys of its table."""
    cells = re.findall(r"(?m)^\| (`[^|]+) \|", (ROOT / "docs/metrics.md").read_text())
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    return [re.sub(r"<\w+>", r"[a-z0-9_]+", name) for name in names]


AREAS = (
    "rollout|eval|ratio|kl|loss|alp|entropy|staleness|time|outcome|tokens|difficulty|mismatch"
    "|perplexity|grad_norm|train|reward|engine|lag"
)


def test_every_metric_that_is_named_is_documented():
    metric = re.compile(rf"`((?:{AREAS}|ratio_\w+)/[a-z0-9_]+)`")
    named = [
        (page.name, name)
        for page in PAGES
        if page.name not in ("CHANGELOG.md", "metrics.md")
        for name in metric.findall(page.read_text())
    ]
    outcomes = {f"outcome/{each.value}" for each in Outcome}
    patterns = documented_metrics()
    unknown = [
        f"{page}: {name}"
        for page, name in named
        if not any(re.fullmatch(pattern, name) for pattern in patterns)
        or (name.startswith("outcome/") and name not in outcomes)
    ]
    assert len(named) > 30 and unknown == []


def test_every_documented_metric_has_a_meaning_in_the_report():
    """A report explains what docs/metrics.md lists: whole names, and the keys of a slice."""
    cells = re.findall(r"(?m)^\| (`[^|]+) \|", (ROOT / "docs/metrics.md").read_text())
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    examples = {"<side>": "low", "<component>": "answer", "<figure>": "running", "...": "accuracy"}
    areas = [name for name in names if re.match("turn_|positive|negative|after_tool", name)]
    keys = names[names.index(areas[-1]) + 1 : names.index("loss/value")]
    whole = [name for name in names if "/" in name]
    whole += [f"{area}/{key}" for area in areas for key in keys]
    for pattern, example in examples.items():
        whole = [name.replace(pattern, example) for name in whole]
    unknown = [name for name in whole if not meaning(re.sub("<(n|layer)>", "2", name))[0]]
    assert len(areas) == 5 and len(keys) == 12 and unknown == []


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_extra_that_is_named_exists_and_is_described():
    extras = PROJECT["optional-dependencies"].keys()
    named = {
        name
        for page in PAGES
        for name in re.findall(r"(?:tir_alp|'\.)\[([a-z]+)\]", page.read_text())
    }
    page = (ROOT / "docs/dependencies.md").read_text()
    assert named and named <= extras
    assert [name for name in extras - {"dev"} if f"`{name}`" not in page] == []


def test_every_required_package_is_explained_and_no_other():
    page = (ROOT / "docs/dependencies.md").read_text()
    table = page[page.index("## Required") : page.index("## Extras")]
    cells = re.findall(r"(?m)^\| ([\w, -]+) \|", table)[1:]
    explained = {name.strip() for cell in cells for name in cell.split(",")}
    required = {re.split(r"[<>=]", each)[0] for each in PROJECT["dependencies"]}
    assert explained == required


def test_every_variable_of_ours_is_read_somewhere():
    pages = "".join(page.read_text() for page in PAGES)
    files = [
        file
        for folder in ("tir_alp", "envs", "tools", "tests")
        for file in (ROOT / folder).rglob("*.py")
        if file != Path(__file__)
    ]
    sources = "".join(file.read_text() for file in files)
    named = set(re.findall(r"\bTIR_ALP_\w+", pages))
    assert len(named) > 3 and [name for name in named if name not in sources] == []
