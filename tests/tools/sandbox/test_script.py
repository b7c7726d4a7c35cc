"""A whole program prints what it prints with `python FILE`, and has the same exit status."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tir_alp.tools.sandbox import Limits, Outcome, SandboxConfig, create_sandbox
from tir_alp.tools.sandbox.script import Script, ScriptResult

pytestmark = pytest.mark.sandbox

STDIN = "3\n1 2 3\nlast line é".encode() + b"\xff\n"
Ended = tuple[str, int]

PROGRAMS: dict[str, str | bytes] = {
    "nothing": "",
    "a value is not printed": "6 * 7",
    "print": "print('a', 1, sep='-', end='!\\n')",
    "input": "n = int(input())\nprint(sum(map(int, input().split())))\nprint(n)",
    "input at the end": "import sys\nsys.stdin.buffer.read()\ninput()",
    "open(0)": "print(open(0, errors='replace').read())",
    "open(0, rb)": "print(open(0, 'rb').read())",
    "os.read": "import os\nprint(os.read(0, 4))\nprint(os.read(0, 100))\nprint(os.read(0, 1))",
    "/dev/stdin": "print(open('/dev/stdin', 'rb').readline())",
    "fileno": "import sys\nprint(sys.stdin.fileno(), sys.stdout.fileno(), sys.stderr.fileno())",
    "fdopen": "import os, sys\nprint(list(os.fdopen(sys.stdin.fileno(), 'rb')))",
    "FastIO": "import io, os\nprint(io.BytesIO(os.read(0, os.fstat(0).st_size or 99)).read())",
    "stdin.buffer": "import sys\nprint(sys.stdin.buffer.readlines())",
    "stdin iterated": "import sys\nfor line in sys.stdin: print(ascii(line))",
    "stdin's names": "import sys\nprint(sys.stdin.name, sys.stdin.mode, sys.__stdin__.name)",
    "stdin's bytes printed": "import sys\nprint(sys.stdin.read())",
    "fileinput": "import fileinput\nprint(sum(1 for _ in fileinput.input(encoding='latin-1')))",
    "stdin in a thread": """
import threading
thread = threading.Thread(target=lambda: print(input()))
thread.start()
thread.join()
""",
    "threads are joined": """
import threading, time
def work():
    time.sleep(0.1)
    print("worked")
threading.Thread(target=work).start()
print("main ends")
""",
    "threads start threads": """
import threading, time
def work(n):
    time.sleep(0.02)
    print(n)
    if n: threading.Thread(target=work, args=(n - 1,)).start()
work(3)
""",
    "daemons are not joined": """
import threading, time
def work():
    time.sleep(5)
    print("never")
threading.Thread(target=work, daemon=True).start()
print("main ends")
""",
    "executors are shut down": """
import time
from concurrent.futures import ThreadPoolExecutor
ThreadPoolExecutor(2).submit(lambda: (time.sleep(0.1), print("done")))
""",
    "a thread raises": "import threading\nthreading.Thread(target=lambda: 1 / 0).start()",
    "a thread exits": "import sys, threading\nthreading.Thread(target=sys.exit, args=(5,)).start()",
    "atexit": """
import atexit
atexit.register(print, "first registered")
@atexit.register
def last(): print("last registered", __name__)
print("main ends")
""",
    "atexit after an exception": "import atexit\natexit.register(print, 'end')\n1 / 0",
    "atexit raises": "import atexit\natexit.register(lambda: 1 / 0)\natexit.register(print, 2)",
    "atexit after threads": """
import atexit, threading, time
atexit.register(print, "handler")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
""",
    "__del__": """
class A:
    def __init__(self, name): self.name = name
    def __del__(self): print("deleted", self.name)
a, b = A("a"), A("b")
print("main ends")
""",
    "__del__ of what a signal handler, a module or builtins keep": """
import builtins, json, signal, sys
class D:
    def __init__(self, name): self.name = name
    def __del__(self): print("deleted", self.name)
d = D("d")
def keep(*arguments): pass
signal.signal(signal.SIGALRM, keep)
json.keep, builtins.keep, sys.modules["keep"] = keep, keep, keep
""",
    "__del__ of what excepthook keeps is too late to print": """
import sys
class D:
    def __del__(self): print("deleted")
d = D()
sys.excepthook = lambda *error: d
""",
    "a tracer that fails at the end": "import sys\nsys.settrace(lambda *a: 5)\nprint(1)",
    "the names of a module": "print(vars().keys())",
    "no sys.stdout": "import sys\ndel sys.stdout\nprint(1)",
    "no sys.stderr": "import sys\nprint(1)\ndel sys.stderr",
    "a message without sys.stderr": "import sys\nsys.stderr = None\nsys.exit('message')",
    "__del__ in a cycle": """
class A:
    def __del__(self): print("deleted")
a = A()
a.me = a
def f(): return a
""",
    "weakref.finalize": """
import weakref
class A: pass
a = A()
weakref.finalize(a, print, "finalized")
""",
    "an unclosed file": "f = open('out', 'w')\nf.write('x')\nprint(open('out').read() == '')",
    "exit status": "raise SystemExit(3)",
    "exit": "exit()",
    "quit": "print(1)\nquit(4)",
    "exit with None": "import sys\nsys.exit(None)",
    "exit with True": "import sys\nsys.exit(True)",
    "exit with 256": "import sys\nsys.exit(256)",
    "exit with -1": "import sys\nsys.exit(-1)",
    "exit with a large number": "import sys\nsys.exit(1 << 70)",
    "exit with a message": "import sys\nsys.exit('no luck')",
    "exit with a float": "import sys\nsys.exit(2.0)",
    "exit in a function": "def f(n):\n    return f(n - 1) if n else exit(9)\nf(20)",
    "exit while handling": "import sys\ntry:\n    1 / 0\nexcept ArithmeticError:\n    sys.exit(6)",
    "exit text printed": "import sys\nprint('SystemExit: 5', file=sys.stderr)\nraise ValueError",
    "os._exit": "import os\nos._exit(7)",
    "os._exit with success": "import os\nos._exit(0)",
    "os._exit in a thread": """
import os, threading
threading.Thread(target=os._exit, args=(8,)).start()
while True: pass
""",
    "os._exit skips handlers": "import atexit, os\natexit.register(print, 1)\nos._exit(2)",
    "os.abort": "import os\nos.abort()",
    "SIGSEGV": "import ctypes\nctypes.string_at(0)",
    "SIGALRM": "import signal, time\nsignal.alarm(1)\ntime.sleep(9)",
    "SIGALRM handled": """
import signal, time
def handler(number, frame): raise TimeoutError
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.05)
try: time.sleep(9)
except TimeoutError: print("late")
""",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "an exception": "print(1)\n1 / 0",
    "a hostile exception": "class E(Exception):\n    def __str__(self): 1 / 0\nraise E",
    "BaseException": "class E(BaseException): pass\nraise E",
    "a syntax error": "print(1)\nprint(",
    "an indentation error": "if True:\nprint(1)",
    "a NUL": "print(1)\0",
    "recursion": "def f(n): return 1 + f(n - 1) if n else 0\nprint(f(980))",
    "recursion too deep": "def f(n): return f(n + 1)\nf(0)",
    "excepthook": "import sys\nsys.excepthook = lambda *error: print(error[0].__name__)\n1 / 0",
    "excepthook raises": "import sys\nsys.excepthook = lambda *error: 1 / 0\nraise ValueError",
    "excepthook exits": "import sys\nsys.excepthook = lambda *error: sys.exit(11)\n1 / 0",
    "traceback": "import traceback\ntry: 1 / 0\nexcept Exception: print(\n"
    "    len(traceback.format_exc().splitlines()))",
    "a stack": "import traceback\nprint(traceback.extract_stack()[-1].lineno)",
    "names": "print(sorted(globals()), __name__, __doc__, __spec__, __package__, __cached__)",
    "docstring": '"""Of the program."""\nprint(__doc__)',
    "__main__": "import __main__\nx = 1\nprint(__main__.x, __name__ == '__main__')",
    "__file__": "import os\nprint(os.path.samefile(os.path.dirname(__file__), os.getcwd()))",
    "own source": "print(open(__file__).read())",
    "argv": "import os, sys\nprint(len(sys.argv), os.path.samefile(sys.argv[0], __file__))",
    "path[0]": "import os, sys\nprint(os.path.samefile(sys.path[0], os.path.dirname(__file__)))",
    "inspect": "import inspect\ndef f(): pass\nprint(inspect.getsource(f))",
    "linecache": "import linecache\nprint(linecache.getline(__file__, 1))",
    "loader": "print(type(__loader__).__name__, __loader__.name)",
    "annotations": "def f(x: int): pass\ny: int = 1\nprint(f.__annotations__, __annotations__)",
    "postponed annotations": "from __future__ import annotations\ndef f(x: int): pass\n"
    "print(f.__annotations__)",
    "pickle": "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is A)",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nprint(A(1))",
    "a module that it writes": "open('mod.py', 'w').write('x = 5')\nimport mod\nprint(mod.x)",
    "a package that it writes": """
import os
os.mkdir("package")
open("package/__init__.py", "w").write("from .inner import x")
open("package/inner.py", "w").write("x = 6")
from package import x
print(x)
""",
    "a module's objects": """
open("mod.py", "w").write('''
class A:
    def __del__(self): print("deleted")
a = A()
''')
import mod
print("main ends")
""",
    "objects of a program that is debugged": """
class A:
    def __del__(self): print("deleted")
a = A()
import io, pdb
pdb.Pdb(stdin=io.StringIO("quit\\n"), stdout=io.StringIO()).set_trace()
print("never")
""",
    "runpy": "import runpy\nopen('m.py', 'w').write('x = 7')\nprint(runpy.run_path('m.py')['x'])",
    "a byte order mark": b"\xef\xbb\xbfprint('\xc3\xa9')",
    "coding: latin-1": b"# coding: latin-1\nprint('\xe9')",
    "coding on the second line": b"#!/usr/bin/python\n# -*- coding: cp1252 -*-\nprint('\x80')",
    "coding: unknown": b"# coding: no-such\nprint(1)",
    "not UTF-8": b"print('\xe9')",
    "CRLF": b"if True:\r\n    print('''a\r\nb''')\r\n",
    "form feed": "\fprint(1)\n\x0c\nprint(2)",
    "no final line end": "if True:\n    print(1)\n    # comment",
    "unicode": "print('é € 😀')",
    "a lone surrogate": "print('a')\nprint('\\ud800')",
    "an escaped byte": "print('\\udcff')",
    "a lone surrogate on stderr": "import sys\nprint('\\ud800', file=sys.stderr)\nprint(1)",
    "stdout.buffer": "import sys\nsys.stdout.buffer.write(b'\\xff\\n')\nsys.stdout.flush()",
    "stdout's names": "import sys\nprint(sys.stdout.name, sys.stdout.mode, sys.stdout.encoding)",
    "stdout replaced": "import io, sys\nsys.stdout = io.StringIO()\nprint(1)",
    "stdout wrapped": """
import io, sys
sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), encoding="utf-8")
print("é")
""",
    "stdout reopened": "import os, sys\nsys.stdout = os.fdopen(1, 'w')\nprint(1)",
    "stdout closed": "import sys\nprint(1)\nsys.stdout.close()",
    "stdout that cannot be flushed": """
import sys
class Broken:
    def write(self, text): pass
    def flush(self): raise OSError
sys.stdout = Broken()
""",
    "a flush by hand": "import sys\nsys.stdout.write('x')\nsys.stdout.flush()\nprint()",
    "much output": "for number in range(3000): print(number)",
    "asyncio": "import asyncio\nasync def f(): print(1)\nasyncio.run(f())",
    "logging": "import logging, sys\nlogging.basicConfig(stream=sys.stdout)\nlogging.error('x')",
    "warnings": "import warnings\nwarnings.warn('x')\nprint(1)",
    "an assertion": "assert 1 == 2",
    "unittest": "import unittest\nclass T(unittest.TestCase):\n    def test(self): print(1)\n"
    "unittest.main()",
    "doctest": '"""\n>>> 1 + 1\n2\n"""\nimport doctest\nprint(doctest.testmod())',
    "argparse": "import argparse\nargparse.ArgumentParser().parse_args()\nprint(1)",
    "many digits": "print(10 ** 5000)",
    "an open generator": "def g():\n    try: yield\n    finally: print('closed')\ni = g()\nnext(i)",
    "temporary files": "import tempfile\nwith tempfile.TemporaryFile() as f: print(f.write(b'x'))",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Ended]:
    """What `python FILE` makes of the programs."""
    ended = {}
    environment = {"LANG": "C.UTF-8", "PATH": os.environ["PATH"]}
    for name, code in PROGRAMS.items():
        file: Path = tmp_path_factory.mktemp("plain") / "main.py"
        file.write_bytes(encoded(code))
        process = subprocess.run(
            [sys.executable, str(file)],
            input=STDIN,
            capture_output=True,
            cwd=file.parent,
            env=environment,
            timeout=30,
        )
        status = process.returncode if process.returncode >= 0 else 128 - process.returncode
        ended[name] = process.stdout.decode("utf-8", "backslashreplace"), status
    return ended


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def confined(request) -> dict[str, ScriptResult]:
    """What the sandbox makes of them."""
    return run(request.param, {name: encoded(code) for name, code in PROGRAMS.items()})


def run(backend: str, programs: dict[str, bytes], wall_s: float = 20.0) -> dict[str, ScriptResult]:
    async def scenario() -> dict[str, ScriptResult]:
        config = SandboxConfig.model_validate(
            {"backend": backend, "preload": (), "memory_mb": 512, "limits": Limits(wall_s=wall_s)}
        )
        ended = {}
        async with create_sandbox(config) as sandbox:
            for name, code in programs.items():
                async with sandbox.session() as session:
                    ended[name] = await session.run_script(Script(code=code, stdin=STDIN))
        return ended

    return asyncio.run(scenario())


def encoded(code: str | bytes) -> bytes:
    return code if isinstance(code, bytes) else code.encode()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_ends_as_with_plain_python(name: str, plain, confined):
    script = confined[name]
    assert (script.result.stdout, script.exit_status) == plain[name], script.result.stderr
    assert (script.result.outcome is Outcome.OK) == (script.exit_status == 0)


def test_limits_and_what_was_printed_before():
    programs = {
        "time": b"print('before')\nwhile True: pass",
        "memory": b"print('before')\nbytearray(1 << 40)",
        "flood": b"while True: print('x' * 1000)",
        "a joined thread": b"import threading, time\n"
        b"threading.Thread(target=time.sleep, args=(60,)).start()\nprint('before')",
        "an exit handler": b"import atexit, time\natexit.register(time.sleep, 60)\nprint('before')",
        "a killed process": b"import os\nprint('before')\nos._exit(3)",
    }
    ended = run("namespaces", programs, wall_s=1.0)
    assert {
        name: (script.result.outcome, script.exit_status) for name, script in ended.items()
    } == {
        "time": (Outcome.TOOL_TIMEOUT, 124),
        "memory": (Outcome.RESOURCE_LIMIT, 137),
        "flood": (Outcome.RESOURCE_LIMIT, 137),
        "a joined thread": (Outcome.TOOL_TIMEOUT, 124),
        "an exit handler": (Outcome.TOOL_TIMEOUT, 124),
        "a killed process": (Outcome.TOOL_ERROR, 3),
    }
    assert all(s.result.stdout == "before\n" for name, s in ended.items() if name != "flood")
    assert ended["a killed process"].result.stderr == ""
    assert "time limit" in ended["an exit handler"].result.stderr


def test_a_traceback_shows_the_program_alone():
    code = b"def f():\n    return 1 / 0\ntry:\n    f()\nexcept ArithmeticError:\n    f()\n"
    stderr = run("namespaces", {"": code})[""].result.stderr
    assert stderr.count("Traceback") == 2 and "script.py" not in stderr and "jail" not in stderr
    assert stderr.count("main.py") == 4 and "    return 1 / 0\n" in stderr


def test_a_program_leaves_its_files_and_nothing_else():
    code = b"import atexit\nx = 1\natexit.register(lambda: open('left', 'w').write('late'))"

    async def scenario():
        config = SandboxConfig(backend="namespaces", preload=(), memory_mb=512)
        async with create_sandbox(config) as sandbox, sandbox.session() as session:
            assert (await session.run_script(Script(code=code))).exit_status == 0
            assert (await session.run("open('left').read()")).value == "'late'"
            assert "NameError" in (await session.run("x")).stderr

    asyncio.run(scenario())


def test_a_reply_with_a_forged_status_ends_the_interpreter():
    code = (
        b"import json, os, struct, sys\n"
        b"frame = sys._getframe()\n"
        b"while 'message' not in frame.f_locals: frame = frame.f_back\n"
        b"reply = {'id': frame.f_locals['message']['id'], 'ok': True, 'value': None, 'limit': '',\n"
        b"         'status': STATUS}\n"
        b"body = json.dumps(reply).encode()\n"
        b"os.write(3, struct.pack('>I', len(body)) + body)\n"
        b"while True: pass\n"
    )
    statuses = {repr(status): status for status in (0, 5, 1000, -1, "1", [0])}
    programs = {
        name: code.replace(b"STATUS", repr(status).encode()) for name, status in statuses.items()
    }
    ended = run("namespaces", programs, wall_s=5.0)
    found = {name: (s.result.outcome.value, s.exit_status) for name, s in ended.items()}
    assert found == {"0": ("ok", 0), "5": ("tool_error", 5)} | {
        name: ("tool_error", 1) for name in ("1000", "-1", "'1'", "[0]")
    }
    assert "channel" in ended["1000"].result.stderr
