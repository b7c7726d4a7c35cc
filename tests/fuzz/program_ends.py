"""The ends of the programs of `tests.fuzz.programs`: an exit, an exception, a signal or nothing."""

from __future__ import annotations

import random

from tests.fuzz.program_texts import CLASSES, EXCEPTIONS, FAULTS, imports


def _exit(rng: random.Random) -> str:
    status = rng.choice(
        ("0", "3", "255", "256", "-1", "None", "'words'", "'é \\ud800'", "1.5", "[1]", "True")
    )
    call = rng.choice(("sys.exit", "exit", "quit", "raise SystemExit", "raise SystemExit"))
    return f"import sys\n{call}({status})"


def _hard_exit(rng: random.Random) -> str:
    return rng.choice(
        (
            "import os; os._exit(7)",
            "import os; os._exit(0)",
            "import os, threading\nthreading.Thread(target=os._exit, args=(9,)).start()\n"
            "import time; time.sleep(5)",
            "import os; os.abort()",
            "import ctypes; ctypes.string_at(0)",
            "import signal, time; signal.alarm(1); time.sleep(9)",
        )
    )


def _fault(rng: random.Random) -> str:
    return f"{imports()}\n{rng.choice(FAULTS)}"


def _raise(rng: random.Random) -> str:
    first, second = rng.choice(EXCEPTIONS), rng.choice(EXCEPTIONS)
    chain = rng.choice(
        (
            f"raise {first}",
            f"try: raise {first}\nexcept BaseException: raise {second}",
            f"try: raise {first}\nexcept BaseException as e: raise {second} from e",
            f"try: raise {first}\nexcept BaseException: raise {second} from None",
            f"try: raise {first}\nfinally: print('finally')",
            f"def f(n):\n    if n: return f(n - 1)\n    raise {first}\nf({rng.choice((1, 3, 30))})",
            f"async def f(): raise {first}\nimport asyncio\nasyncio.run(f())",
            f"def g():\n    yield\n    raise {first}\nlist(g())",
        )
    )
    return f"{CLASSES}{chain}"


def _syntax(rng: random.Random) -> str:
    return rng.choice(
        (
            "print('never')\nx = (",
            "if True:\nprint(1)",
            "def f():\n\tx = 1\n        y = 2",
            "int a = 1",
            "'unterminated",
            "print 'python 2'",
            "return 1",
            "x = 1 +",
            "a = b = c = 0xZ",
            "from __future__ import braces",
            "nonlocal x",
            "f'{'",
            "break",
            "é = 1; € = 2",
            "await f()",
            "def f(a, a): pass",
            "x = yield",
            "\x0c  x = 1",
            "del f()",
        )
    )


def _nothing(rng: random.Random) -> str:
    return rng.choice(("", "pass", "# comment without a line end", "6 * 7", "print('end')\n\n"))


ENDS = (
    *[_nothing] * 4,
    *[_exit] * 3,
    *[_fault] * 3,
    *[_raise] * 3,
    _hard_exit,
    _syntax,
)
