"""The pages hold together: every link leads somewhere, and architecture.md names what exists."""

import re
from pathlib import Path

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
