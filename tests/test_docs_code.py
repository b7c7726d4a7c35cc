"""What the pages tell a reader to type is understood: commands, settings, TOML, Python, names.

Nothing is run. A command is parsed by its own parser, a block of TOML is a config, a block of
Python compiles and uses no name that it does not define, and its imports of ours exist.
"""

import ast
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import pytest
from gymnasium.envs.registration import load_env_creator

from tir_alp.__main__ import COMMANDS, module_of
from tir_alp.algorithm.section import merge
from tir_alp.config import Config, SFTConfig
from tir_alp.models.tiny import TRAIN_CONFIG
from tir_alp.run.command_line import Words, load_config, overlay, parse_as, read_config
from tir_alp.run.settings import annotations_of
from tir_alp.tools.env_settings import accepted_settings
from tir_alp.tools.sandbox.config import SandboxConfig

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "configs/README.md")),
]
OURS = re.compile(r"(?:tir-alp |(?:/\S*/)?python -m (?:tir_alp|tests)\.|python tests/)")
NEWLINE = "\n"


@dataclass(frozen=True, slots=True)
class Code:
    """Code on a page."""

    place: str
    """Page and line."""
    language: str
    """The word after the fence; empty for commands, for indented code, and for code in a line."""
    text: str
    is_inline: bool = False


def code_of(page: Path) -> Iterator[Code]:
    """Yield the fenced and the indented blocks of a page, and the code within its lines."""
    name, text = page.relative_to(ROOT), page.read_text()
    blocks = r"^ *```(?P<language>\w*)\n(?P<fenced>.*?)\n *```$|(?P<indented>(?:^    [^\n]+\n)+)"
    for found in re.finditer(blocks, text, re.MULTILINE | re.DOTALL):
        place = f"{name}:{text[: found.start()].count(NEWLINE) + 1}"
        yield Code(place, found["language"] or "", found["fenced"] or found["indented"])
    prose = re.sub(blocks, lambda it: NEWLINE * it[0].count(NEWLINE), text, flags=re.M | re.S)
    for found in re.finditer(r"(?<!`)`([^`]+)`(?!`)", prose):
        place = f"{name}:{prose[: found.start()].count(NEWLINE) + 1}"
        code = " ".join(found[1].replace("\\|", "|").split())
        yield Code(place, "", code, is_inline=True)


CODE = [code for page in PAGES for code in code_of(page)]


def commands() -> list[Code]:
    """Every command of ours on a page; words in brackets, which may be left out, are given."""
    found = []
    for code in CODE:
        if code.language not in ("", "bash"):
            continue
        for line in code.text.replace("\\\n", " ").splitlines():
            line = re.sub(r"^(\w+=\S+ )+", "", line.strip())
            line = re.sub(r"\s[#|] .*", "", line)  # a comment, or where the output goes
            line = line.replace("--help [SECTION]", "--help trainer")
            line = re.sub(r"\[(--[^\]]*)\]", r"\1", line)  # [--checkpoint best|last]
            line = re.sub(r"(\w)(\|\w+)+", r"\1", line)
            line = re.sub(r" N\b", " 3", line)  # --steps N
            line = re.sub(r" --dotted\.key VALUE| \.\.\.", "", line)
            is_named = code.is_inline and re.fullmatch(r"tir-alp [a-z ]+|[\w ./-]+ -m [\w.]+", line)
            if OURS.match(line) and not is_named and not line.endswith(("COMMAND", "-alp NAME")):
                found.append(Code(code.place, "", line, code.is_inline))
    return found


def module_and_words(command: str) -> tuple[str, list[str]]:
    """The module that a command runs, and its words."""
    words = shlex.split(command)
    if words[0] == "tir-alp":
        return module_of(words[1]), words[2:]
    if words[1] == "-m":
        return words[2], words[3:]
    return words[1].removesuffix(".py").replace("/", "."), words[2:]


def understand(module: str, words: list[str]) -> None:
    """Parse a command line by the parser of the module, and validate its settings.

    Raises:
        ValueError: A setting is unknown or wrong.
        SystemExit: argparse does not understand the words; or they ask for help.
    """
    imported = importlib.import_module(module)
    if hasattr(imported, "__path__"):
        imported = importlib.import_module(f"{module}.__main__")
    if module == "tir_alp.doctor" and words[:1] == ["memory"]:
        words = words[1:]
    command = vars(imported).get("_COMMAND")
    if command is not None:
        read = command.read(words)
        options = {"config": str(ROOT / read.options["config"])} if "config" in read.options else {}
        if not Path(options.get("config", "")).is_file():  # my.toml
            options = {}
        if command.root is SFTConfig:
            parse_as(SFTConfig, merge({"data": {"path": "FILE"}}, read.values))
        else:
            read_config(Words(options, read.values), TRAIN_CONFIG)
        return
    own, _, settings = (" ".join(words)).partition(" -- ")
    _, rest = imported.parser().parse_known_args(own.split() if settings else words)
    if rest and module not in ("tir_alp.studies.drill", "tir_alp.envs"):
        raise ValueError(f"{rest} are not understood")
    load_config([*rest, *settings.split()], {})


def unknown_words(module: str, words: list[str]) -> list[str]:
    """What a command of the tests does not have: the module itself, or an option."""
    path = ROOT / module.replace(".", "/")
    files = [path.with_suffix(".py"), *path.glob("*.py")]
    source = "".join(file.read_text() for file in files if file.exists())
    options = [word for word in words if word.startswith("--")]
    return [f"{module} has no {each}" for each in options or [""] if f'"{each}' not in source]


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """A folder with the modules that pages tell a reader to write, as Python finds them."""
    for code in CODE:
        if found := re.match(r"# (\w+\.py)\b", code.text):
            (tmp_path / found[1]).write_text(code.text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "docs/examples")


def test_every_command_is_understood(examples, capsys):
    faults = []
    ours = [(each, *module_and_words(each.text)) for each in commands()]
    for command, module, words in ours:
        if module.startswith("tests."):
            faults += [f"{command.place}: {each}" for each in unknown_words(module, words)]
            continue
        try:
            understand(module, words)
        except ValueError as error:
            faults.append(f"{command.place}: {error}")
        except SystemExit as end:
            if end.code:
                faults.append(f"{command.place}: {capsys.readouterr().err}")
    assert len(ours) > 60 and faults == [], "\n".join(faults)


def test_a_command_that_is_not_understood_is_noticed():
    with pytest.raises(ValueError, match="there is no such key"):
        understand("tir_alp.train", ["--trainer.learning_rate", "1"])
    with pytest.raises(SystemExit):
        understand("tir_alp.models", ["push", "runs/NAME", "--repository", "ID"])


def test_every_command_that_is_named_exists():
    named = {
        word for code in CODE for word in re.findall(r"^tir-alp (\w+)", code.text, re.MULTILINE)
    }
    assert {"train", "sft", "envs"} <= named <= {*COMMANDS, "COMMAND", "NAME"}


# ------------------------------------------------------------------------- settings and their TOML

SECTIONS = {*Config.model_fields, *SFTConfig.model_fields}
NOT_KEYS = {"env.reset", "env.step", "engine.generate", "engine.load_weights", "data.json"}
NOT_KEYS |= {"metrics.jsonl"}


def test_every_block_of_toml_is_a_config():
    blocks = [code for code in CODE if code.language == "toml"]
    assert len(blocks) >= 3
    for code in blocks:
        overlay({}, tomllib.loads(code.text))


def keys() -> list[tuple[str, str]]:
    """Dotted keys of the config in the lines of pages: place and key."""
    found = []
    for code in CODE:
        match = re.match(r"(?:--)?([a-z_]+(?:\.[a-z_]+)+)(?![\w.(])", code.text)
        if code.is_inline and match and match[1].partition(".")[0] in SECTIONS - {"name"}:
            found.append((code.place, match[1]))
    return [(place, key) for place, key in found if key not in NOT_KEYS]


def test_every_key_of_the_config_exists():
    unknown = [
        f"{place}: {key}"
        for place, key in keys()
        if not annotations_of(key) and not annotations_of(key, SFTConfig)
    ]
    assert len(keys()) > 100 and unknown == []


def test_every_setting_of_an_environment_exists():
    importlib.import_module("tir_alp.envs")  # registers them
    named = {key.removeprefix("env.kwargs.") for _, key in keys() if key.startswith("env.kwargs.")}
    taken: dict[str, object] = {}
    for spec in gymnasium.registry.values():
        if isinstance(spec.entry_point, str) and spec.entry_point.startswith("tir_alp."):
            taken |= accepted_settings(load_env_creator(spec.entry_point)) or {}
    sandbox = {key.removeprefix("sandbox.") for key in named if key.startswith("sandbox.")}
    assert {key.partition(".")[0] for key in named} - taken.keys() == set()
    assert sandbox and [key for key in sandbox if not annotations_of(key, SandboxConfig)] == []


# ----------------------------------------------------------------------------------------- Python


def python_blocks() -> list[Code]:
    return [code for code in CODE if code.language == "python"]


def test_every_block_of_python_compiles_and_defines_what_it_uses():
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F822", "-"]
    assert len(python_blocks()) > 10
    for code in python_blocks():
        compile(code.text, code.place, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        undefined = subprocess.run(ruff, input=code.text, capture_output=True, text=True)
        assert undefined.returncode == 0, f"{code.place}: {undefined.stdout}"


def test_every_import_of_ours_exists(examples):
    imported = [
        (code.place, str(node.module), alias.name)
        for code in python_blocks()
        for node in ast.walk(ast.parse(code.text))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tir_alp")
        for alias in node.names
    ]
    assert len(imported) > 10
    for place, module, name in imported:
        assert hasattr(importlib.import_module(module), name), f"{place}: {module}.{name}"
