"""How the process of a command ends: Ctrl-C while it imports, and a library that is missing."""

import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from tir_alp.process import EXTRAS

ROOT = Path(__file__).parents[1]
SLOW = """\
import pathlib, time
pathlib.Path("importing").touch()
try:
    for _ in range(600):  # in steps: a signal just before a long sleep would be seen after it
        time.sleep(0.1)
except BaseException as error:  # as an extension module does that imports another one
    raise ImportError("cannot import") from error
"""
COMMANDS = {
    "train": (["tir_alp.train"], "pydantic"),
    "train, after the command line": (["tir_alp.train"], "transformers"),
    "doctor": (["tir_alp.doctor"], "transformers"),
    "audit": (["tir_alp.audit", "runs/a"], "numpy"),
    "report": (["tir_alp.report", "runs/a"], "matplotlib"),
    "sandbox": (["tir_alp.sandbox", "probe"], "pydantic"),
    "envs": (["tir_alp.envs", "check", "a:B-v0"], "gymnasium"),
    "dispatcher": (["tir_alp", "train"], "pydantic"),
    "compare": (["tir_alp.studies.compare"], "pydantic"),
    "models": (["tir_alp.models", "gguf", "a.gguf", "--out", "b"], "transformers"),
    "evaluate": (["tir_alp.evaluate", "--model", "tiny"], "transformers"),
    "chat": (["tir_alp.chat", "--model", "tiny"], "transformers"),
    "sft": (["tir_alp.sft", "--data.path", "a.jsonl"], "transformers"),
    "interop": (["tir_alp.envs.interop", "install", "gem"], "argparse"),
}


def listen():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted(folder, words, module):
    """Start a command, and send Ctrl-C while it imports a module that takes a minute."""
    (folder / f"{module}.py").write_text(SLOW)
    command = [sys.executable, "-m", *words]
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen,  # pytest itself may run where Ctrl-C is ignored
    ) as process:
        deadline = time.monotonic() + 50
        while not (folder / "importing").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        return process.returncode, errors


@pytest.mark.parametrize(("words", "module"), COMMANDS.values(), ids=COMMANDS)
def test_an_interrupt_while_importing_is_one_line(tmp_path, words, module):
    assert interrupted(tmp_path, words, module) == (130, "tir_alp: interrupted\n")


def test_a_part_of_a_run_and_a_program_of_somebody_else_keep_their_own_handling(tmp_path):
    show = "import signal, sys; print(signal.getsignal(2) is signal.default_int_handler)"
    (tmp_path / "show.py").write_text(f"import tir_alp; {show}")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for words in (["-m", "show"], ["-c", f"import tir_alp; {show}"]):
        shown = subprocess.run(
            [sys.executable, *words], env=environment, capture_output=True, preexec_fn=listen
        )
        assert shown.stdout == b"True\n", shown


WITHOUT = """\
import runpy, sys
sys.modules[{module!r}] = None
sys.argv = ["-m"]
sys.orig_argv = ["python", "-m", {command!r}]
import tir_alp
sys.argv = [{command!r}, *{words!r}]
runpy.run_module({command!r}, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("module", "command", "words"),
    [
        ("simpy", "tir_alp.studies.simulate", ["--help"]),
        ("peft", "tir_alp.train", ["--trainer.lora.rank", "4", "--steps", "1"]),
        ("ray", "tir_alp.train", ["--cluster", "local", "--steps", "1"]),
        ("ray", "tir_alp.studies.drill", []),
        ("datasets", "tir_alp.train", ["--data.source", "hub", "--data.dataset", "x"]),
        ("aiohttp", "tir_alp.sandbox", ["serve"]),
    ],
)
def test_a_missing_library_is_one_line_with_the_command_that_installs_it(
    tmp_path, module, command, words
):
    program = WITHOUT.format(module=module, command=command, words=words)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TIR_ALP_DRILL_HAS_OWN_MEMORY": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True
    )
    errors = ended.stderr.decode()
    assert ended.returncode in (2, 69) and len(errors.splitlines()) == 1, errors
    assert module in errors and f"pip install 'tir_alp[{EXTRAS[module]}]'" in errors
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words", [["tir_alp"], ["tir_alp.train", "--help"], ["tir_alp.envs", "--help"]]
)
def test_a_reader_that_goes_ends_the_command_without_a_word(words, unbuffered):
    command = [sys.executable, "-m", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert ended.stderr == b""
    assert ended.returncode == 141 or words[0] == "tir_alp.envs"  # argparse drops the error itself


def test_every_extra_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*EXTRAS.values()} <= {*extras["optional-dependencies"]}


AS_COMMAND = """\
import atexit, sys
atexit.register(print, "a handler of somebody else, from before")
sys.argv, sys.orig_argv = ["-m"], ["python", "-m", {command!r}]
import tir_alp
sys.argv = ["ends"]
"""
ENDS = """\
import gc, threading, time
from tir_alp.process import run_command, torch_imports
def slowly():
    time.sleep(0.3)
    print("thread")
def main(arguments):
    with torch_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    threading.Thread(target=slowly).start()
    atexit.register(print, "exit handler")
    print("frozen" if gc.get_freeze_count() else "not frozen")
    {last}
sys.exit(run_command(main))
"""


def ended(command: str, last: str) -> tuple[int, list[str], str]:
    """Exit code, lines and errors of a program that is, or is not, one of our commands."""
    program = AS_COMMAND.format(command=command) + ENDS.format(last=last)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_a_command_ends_with_its_code_after_threads_and_handlers_and_without_the_interpreter():
    code, lines, errors = ended("tir_alp.train", "return 7")
    assert (code, errors) == (7, "")
    assert lines == ["importing torch and transformers", "frozen", "thread", "exit handler"]


@pytest.mark.parametrize(
    ("command", "last", "code"),
    [
        ("tir_alp.train", "raise SystemExit(5)", 5),
        ("tir_alp.train", "1 / 0", 1),
        ("tir_alp.train", "sys.setprofile(lambda *_: None); return 7", 7),
        ("show", "", 0),
    ],
    ids=["its own exit", "a bug", "under a profiler", "somebody else's program"],
)
def test_every_other_end_is_that_of_the_interpreter(command, last, code):
    found, lines, errors = ended(command, last)
    assert (found, lines[-1]) == (code, "a handler of somebody else, from before")
    assert ("ZeroDivisionError" in errors) == (code == 1)
    assert lines[1] == ("not frozen" if command == "show" else "frozen")
