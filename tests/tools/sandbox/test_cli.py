import io
import subprocess
import sys
from pathlib import Path

import pytest

from tir_alp.tools.sandbox import cli

pytestmark = pytest.mark.sandbox


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "status"),
    [
        ("print(6 * 7)", "42\n", "", 0),
        ("print(input())", "typed\n", "", 0),
        ("import sys\nprint(1)\nsys.exit()", "1\n", "", 0),
        ("raise SystemExit(3)", "", "", 3),
        ("import sys\nsys.exit('no luck')", "", "no luck\n", 1),
        ("while True: pass", "", "[the interpreter was killed: it hit the time limit", 124),
        ("x = bytearray(1 << 40)", "", "Traceback", 137),
    ],
)
def test_run(tmp_path: Path, capsys, monkeypatch, code: str, stdout: str, stderr: str, status: int):
    file = tmp_path / "program.py"
    file.write_text(code)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"typed\n")))
    assert cli.main(["run", "--preload", "", "--wall-s", "1", str(file)]) == status
    printed = capsys.readouterr()
    assert printed.out == stdout and printed.err.startswith(stderr)


def test_probe_prints_a_table_of_each_backend():
    command = [sys.executable, "-m", "tir_alp.sandbox", "probe"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "backend namespaces" in result.stdout and "backend landlock" in result.stdout
    assert "NO:" not in result.stdout
    assert result.stdout.splitlines()[-1] == "usable: namespaces, landlock"


def test_probe_fails_where_no_backend_holds(monkeypatch, capsys):
    monkeypatch.setattr("tir_alp.tools.sandbox.jail.landlock.abi", lambda: 0)
    assert cli.main(["probe", "--backend", "landlock"]) == 1
    assert "Landlock ABI 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "nowhere.py"], "cannot read the program nowhere.py: No such file"),
        (["run", "."], "cannot read the program .: Is a directory"),
        (["run", "--wall-s", "-1", __file__], "--wall-s -1.0: Input should be greater than 0"),
        (["probe", "--memory-mb", "1"], "--memory-mb 1: Input should be greater than or equal"),
    ],
)
def test_a_mistake_is_one_line(words, said, capsys):
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


def test_a_port_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", "--port", "99999"])
    assert end.value.code == 2 and "99999 is not a port" in capsys.readouterr().err
