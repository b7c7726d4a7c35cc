"""The page as one file: nothing comes from elsewhere, and only its own scripts run."""

import base64
import hashlib
import re
import shutil
import subprocess

import pytest

from tests.inspector.made import trajectory, write_run
from tir_alp.inspect import main
from tir_alp.inspector.assets import static_files, static_text
from tir_alp.inspector.export import MODULES, bundle, page_of

HOSTILE = "</script><script>alert(1)</script><!-- \u202e"


def test_the_file_holds_scripts_styles_and_data(tmp_path, capsys):
    steps = [
        [trajectory(step * 10 + i, ("q", HOSTILE), float(i)) for i in range(10)]
        for step in range(3)
    ]
    file = tmp_path / "page.html"
    assert main([str(write_run(tmp_path / "run", steps)), "--export", str(file), "-n", "9"]) == 0
    assert "tokens of 9 trajectories" in capsys.readouterr().out
    page = file.read_text()
    scripts = re.findall(
        r"<script>(.*?)</script>|<script type=\"module\">(.*?)</script>", page, re.DOTALL
    )
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None and len(scripts) == 2
    for plain, module in scripts:
        digest = hashlib.sha256((plain or module).encode()).digest()
        assert f"'sha256-{base64.b64encode(digest).decode()}'" in policy[1]
    assert "unsafe" not in policy[1] and "connect-src" not in policy[1]
    assert "alert(1)</script>" not in page
    assert re.findall(r"(?:src|href)=\"(?!data:)[^\"]*\"", page) == []


def test_all_modules_are_in_the_bundle_and_it_imports_nothing():
    assert {*MODULES} == {each for each in static_files() if each.endswith(".js")} - {"uplot.js"}
    text = bundle()
    assert not re.search(r"^(import|export)\b", text, re.MULTILINE)
    names = re.findall(r"^(?:async function|function|const|let|class) (\w+)", text, re.MULTILINE)
    assert len(names) == len({*names}), "two modules define the same name"


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("name", [*MODULES, "bundle"])
def test_scripts_are_well_formed(name):
    text = bundle() if name == "bundle" else static_text(name)
    command = ["node", "--check", "--input-type=module"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_stay_short():
    for name in static_files():
        if name != "uplot.js":
            assert len(static_text(name).splitlines()) <= 500


def test_text_reaches_the_page_through_one_place_alone():
    """No way of writing markup is used, and text nodes are made in one module."""
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function"
    for name in MODULES:
        assert not re.search(ways, static_text(name)), name
        for line in static_text(name).splitlines():
            if "textContent =" in line:
                assert "visible(" in line, (name, line)
    assert "http" not in re.sub(
        r"//.*", "", page_of({"runs": []}).split("<body>")[1].split("<script")[0]
    )
