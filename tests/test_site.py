"""The documentation as a site: `make docs` builds it, and a broken link ends the build."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")

ROOT = Path(__file__).parents[1]


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)]
    return subprocess.run(
        [*command, "--config-file", str(config)],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=config.parent,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", made)
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.slow
def test_every_page_is_there_and_can_be_searched(site: Path):
    index = json.loads((site / "search/search_index.json").read_text())["docs"]
    found = {each["location"].partition("#")[0] for each in index}
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert {f"{page}/" for page in pages} <= found
    words = " ".join(each["text"] for each in index)
    assert "rollout.group_size" in words and "num_loss_tokens" in words


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: Path):
    loaded = re.compile(r"""<(?:script|img|iframe|link rel="?stylesheet"?)[^>]*https?://""")
    pages = [*site.rglob("*.html")]
    assert len(pages) > 35
    assert [str(page) for page in pages if loaded.search(page.read_text())] == []


@pytest.mark.slow
def test_a_broken_link_ends_the_build(tmp_path: Path):
    (tmp_path / "docs").mkdir()
    settings = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(settings[: settings.index("\nnav:")])
    shutil.copy(ROOT / "docs/faq.md", tmp_path / "docs/index.md")  # without the pages it links to
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0 and "quickstart.md" in done.stderr
