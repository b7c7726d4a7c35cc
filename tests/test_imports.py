"""Who may import whom: dependencies point one way, and the pure modules stay pure."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PURE = [
    *("types", "config", "audit", "rollouts.renderer", "training.batch"),
    *("algorithm.advantage", "algorithm.loss", "algorithm.metrics", "algorithm.ratio_summary"),
    *("envs.grading", "envs.parsing", "tools"),
]
OPTIONAL = ["ray", "sglang", "peft", "wandb", "tensorboard", "trackio"]
"""Packages that only modules at the edges may import."""

IMPORT_ALONE = """
import importlib, sys
for name in {blocked}:
    sys.modules[name] = None  # to import it is an ImportError
for name in {modules}:
    importlib.import_module("tir_alp." + name)
"""


def python_files(folder: str) -> list[Path]:
    """Modules at their real place: the links in tir_alp/ are left to envs/ and tools/."""
    files = (ROOT / folder).rglob("*.py")
    return sorted(file for file in files if not linked(file))


def linked(file: Path) -> bool:
    return any((ROOT / parent).is_symlink() for parent in file.relative_to(ROOT).parents)


def imports(file: Path) -> set[str]:
    """Dotted names of all that a file imports, at whatever depth; relative ones resolved."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def importers_of(package: str, folder: str = "tir_alp") -> set[str]:
    """Files below a folder that import a package or something in it."""
    return {
        str(file.relative_to(ROOT))
        for file in python_files(folder)
        if any(name == package or name.startswith(f"{package}.") for name in imports(file))
    }


def test_pure_modules_import_without_any_optional_package():
    program = IMPORT_ALONE.format(blocked=OPTIONAL, modules=PURE)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_block_does_block():
    program = IMPORT_ALONE.format(blocked=["torch"], modules=["algorithm.loss"])
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "import of torch halted" in done.stderr


@pytest.mark.parametrize("package", ["torch", "transformers", "gymnasium"])
def test_tools_need_no_heavy_package(package):
    program = IMPORT_ALONE.format(blocked=[package], modules=["tools", "tools.sandbox"])
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("call", ["train.services()", "sft.services(None, None)"])
def test_a_run_starts_without_what_draws_its_report(call):
    program = f"""
import sys, tir_alp.sft, tir_alp.train
tir_alp.{call}
print([each for each in ("torch", "matplotlib") if each in sys.modules])
"""
    shown = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert shown.stdout == "['torch']\n", shown.stderr


def test_tools_import_nothing_of_ours_but_tools():
    ours = {name for file in python_files("tools") for name in imports(file)}
    ours = {name for name in ours if name.startswith("tir_alp")}
    assert ours and all(name.startswith("tir_alp.tools") for name in ours)


def test_environments_import_nothing_of_ours_but_environments_and_tools():
    ours = {name for file in python_files("envs") for name in imports(file)}
    ours = {name for name in ours if name.startswith("tir_alp")}
    assert ours and all(name.startswith(("tir_alp.envs", "tir_alp.tools")) for name in ours)


def test_environments_and_tools_never_see_a_tensor():
    assert importers_of("torch", "envs") == importers_of("torch", "tools") == set()
    assert importers_of("transformers", "envs") == importers_of("transformers", "tools") == set()


def test_the_trainer_reaches_environments_through_gymnasium():
    found = importers_of("tir_alp.envs")
    assert {name for name in found if not name.startswith("tir_alp/models/")} == set()
    assert found  # the search does find imports


def test_distributed_packages_stay_at_their_edge():
    assert all(name.startswith("tir_alp/cluster/") for name in importers_of("ray"))
    assert importers_of("sglang") <= {"tir_alp/engines/servers/sglang_main.py"}
    assert importers_of("peft") == {"tir_alp/training/lora.py"}


def test_nobody_imports_the_folders_by_their_bare_names():
    for folder in ("tir_alp", "envs", "tools", "tests"):
        assert importers_of("envs", folder) == importers_of("tools", folder) == set()
