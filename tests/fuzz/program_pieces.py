"""The pieces of which `tests.fuzz.programs` makes programs, and what may be put around a piece.

A piece is a function of a random generator and a number that makes its names unique.
"""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable

from tests.fuzz.program_texts import CLASSES, EXCEPTIONS, EXPRESSIONS, FAULTS, READERS, imports

Piece = Callable[[random.Random, int], str]


def _value(rng: random.Random, number: int) -> str:
    return f"{imports()}\nprint({rng.choice(EXPRESSIONS)})"


def _read(rng: random.Random, number: int) -> str:
    readers = rng.sample(READERS, rng.randint(1, 3))
    lines = [imports()]
    for reader in readers:
        lines.append(f"try: print(ascii(({reader})))")
        lines.append("except (EOFError, ValueError, OSError) as e: print(type(e).__name__)")
    return "\n".join(lines)


def _caught(rng: random.Random, number: int) -> str:
    raised = rng.choice(EXCEPTIONS)
    return (
        f"{imports()}\n{CLASSES}try: raise {raised}\n"
        "except BaseException as e: print(ascii(e.args), type(e).__qualname__)\n"
        "else: print('nothing')\nfinally: print('finally', sys.exc_info()[0])"
    )


def _shown(rng: random.Random, number: int) -> str:
    fault = textwrap.indent(rng.choice(FAULTS), "    ")
    return (
        f"{imports()}\ntry:\n{fault}\n"
        "except Exception as e:\n"
        "    print(traceback.format_exc().replace(os.getcwd(), '.').encode('ascii', 'replace')\n"
        "          if not isinstance(e, (RecursionError, ImportError)) else type(e))"
    )


def _output(rng: random.Random, number: int) -> str:
    return imports() + "\n" + rng.choice(
        (
            "for n in range(2000): print(n, end=' ')",
            "print('x' * 100_000)",
            "sys.stdout.write('no line end')",
            "sys.stdout.buffer.write(b'\\xff\\xfe\\n'); sys.stdout.flush()",
            "print('out'); print('err', file=sys.stderr); print('out 2')",
            "os.write(1, b'raw\\n'); print('after')",
            "os.write(2, b'raw error\\n')",
            "print('a', flush=True); sys.stdout.flush()",
            "sys.stdout.writelines(['a\\n', 'b\\n'])",
            "print(*range(5), sep='\\r\\n')",
            "import contextlib\nwith contextlib.redirect_stdout(io.StringIO()) as s: print('in')\n"
            "print(repr(s.getvalue()))",
            "saved, sys.stdout = sys.stdout, io.StringIO()\nprint(1)\nsys.stdout = saved",
            "sys.stdout.reconfigure(encoding='latin-1', errors='replace'); print('é €')",
            "sys.stdout.reconfigure(line_buffering=True); print('line')",
            "sys.stdout = io.TextIOWrapper(sys.stdout.detach(), 'utf-8'); print('wrapped')",
            "fd = os.dup(1); os.write(fd, b'dup\\n'); os.close(fd)",
            "r, w = os.pipe(); os.write(w, b'piped'); print(os.read(r, 9))",
            "f = open('t', 'w'); fd = os.dup(1); os.dup2(f.fileno(), 1)\n"
            "os.write(1, b'to the file'); os.dup2(fd, 1)\nprint(open('t').read())",
            "warnings.warn('careful'); print('warned')",
            "logging.warning('logged'); print('logged')",
            "logging.basicConfig(stream=sys.stdout); logging.error('to stdout')",
            "sys.displayhook({'a': 1})",
            "import pprint; pprint.pprint([['x' * 30] * 4])",
            "print('\\N{BELL}\\x1b[31mred\\x1b[0m\\b')",
            "with open(1, 'w', closefd=False) as f: f.write('by number\\n')",
        )
    )  # fmt: skip


def _files(rng: random.Random, number: int) -> str:
    name = f"m{number}"
    return imports() + "\n" + rng.choice(
        (
            f"open('{name}.py', 'w').write('print(__name__, __file__[-6:]); x = 1')\n"
            f"import {name}\nprint({name}.x, {name}.__spec__.name)",
            f"open('{name}.py', 'w').write('1 / 0')\ntry: import {name}\n"
            "except ArithmeticError: print('raised in the module')",
            f"open('{name}.py', 'w').write('def f(:')\ntry: import {name}\n"
            "except SyntaxError as e: print(e.lineno, e.msg)",
            f"os.makedirs('{name}/sub')\nopen('{name}/__init__.py', 'w').close()\n"
            f"open('{name}/sub/leaf.py', 'w').write('from .. import sub; y = 2')\n"
            f"from {name}.sub import leaf\nprint(leaf.y, leaf.__package__)",
            f"open('{name}.txt', 'w', encoding='utf-16').write('é')\n"
            f"print(open('{name}.txt', 'rb').read(2))",
            f"os.mkdir('d{number}'); os.chdir('d{number}'); print(os.listdir()); os.chdir('..')",
            f"p = pathlib.Path('p{number}'); p.write_text('a\\r\\nb'); print(p.read_bytes())\n"
            "p.rename('q'); print(p.exists()); os.remove('q')",
            "with tempfile.NamedTemporaryFile('w+') as f:\n"
            "    f.write('x'); f.seek(0); print(f.read())",
            "import sqlite3\nprint(sqlite3.connect(':memory:').execute('select 6 * 7').fetchone())",
            "import pickle\nclass P: pass\nprint(type(pickle.loads(pickle.dumps(P()))).__module__)",
            f"open('{name}.py', 'w').write('import sys; print(sys.argv[1:], __name__)')\n"
            f"import runpy; runpy.run_path('{name}.py', run_name='__main__')",
            f"importlib.invalidate_caches()\nopen('{name}.py', 'w').write('import __main__\\n"
            f"print(hasattr(__main__, \"os\"))')\nimport {name}",
            f"import zipfile\nzipfile.ZipFile('{name}.zip', 'w').writestr('z{number}.py', 'z = 3')"
            f"\nsys.path.insert(0, '{name}.zip')\nimport z{number}; print(z{number}.z)",
            "import shelve, mmap\nf = open('mm', 'w+b'); f.write(b'abc'); f.flush()\n"
            "print(mmap.mmap(f.fileno(), 0)[:])",
            f"os.symlink('main.py', 'l{number}'); print(os.readlink('l{number}'))",
            "print(sorted(p.name for p in pathlib.Path('.').glob('*.py')))",
        )
    )  # fmt: skip


def _concurrent(rng: random.Random, number: int) -> str:
    return imports() + "\n" + rng.choice(
        (
            "from concurrent.futures import ThreadPoolExecutor\n"
            "with ThreadPoolExecutor(3) as pool: print(list(pool.map(len, ['a', 'bb'])))",
            "t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join(); print('joined')",
            "t = threading.Thread(target=lambda: sys.exit(3)); t.start(); t.join()",
            "threading.Timer(0.05, sys.stdout.write, ['timer\\n']).start()",
            "def late(): time.sleep(0.1); sys.stdout.write('late\\n')\n"
            "threading.Thread(target=late).start()",
            "threading.excepthook = lambda a: print('hook', a.exc_type.__name__)\n"
            "t = threading.Thread(target=lambda: [][1]); t.start(); t.join()",
            "import queue\nq = queue.Queue()\nt = threading.Thread(target=lambda: q.put(1))\n"
            "t.start(); print(q.get(timeout=5))",
            "async def work(n): await asyncio.sleep(0.01 * n); print('task', n); return n\n"
            "async def both(): return await asyncio.gather(work(2), work(1))\n"
            "print(asyncio.run(both()))",
            "async def main():\n    async with asyncio.TaskGroup() as g:\n"
            "        g.create_task(asyncio.sleep(0))\n        raise ValueError('in the group')\n"
            "try: asyncio.run(main())\nexcept* ValueError as e: print(e.exceptions)",
            "local = threading.local(); local.x = 1\n"
            "t = threading.Thread(target=lambda: print(hasattr(local, 'x'))); t.start(); t.join()",
            "signal.signal(signal.SIGALRM, lambda *a: print('alarm'))\n"
            "signal.setitimer(signal.ITIMER_REAL, 0.02); time.sleep(0.1)",
            "def handler(*a): raise TimeoutError('late')\nsignal.signal(signal.SIGALRM, handler)\n"
            "signal.setitimer(signal.ITIMER_REAL, 0.02)\ntry: time.sleep(5)\n"
            "except TimeoutError as e: print(e)",
            "async def f():\n    try: await asyncio.wait_for(asyncio.sleep(9), 0.02)\n"
            "    except TimeoutError: print('timeout')\nasyncio.run(f())",
            "async def f(): return await asyncio.to_thread(threading.current_thread)\n"
            "print(asyncio.run(f()).name.startswith('asyncio'))",
        )
    )  # fmt: skip


def _late(rng: random.Random, number: int) -> str:
    return imports() + "\n" + rng.choice(
        (
            f"atexit.register(print, 'handler {number}')",
            "@atexit.register\ndef ending(): print(threading.current_thread().name, __name__)",
            "atexit.register(lambda: 1 / 0)",
            "atexit.register(sys.exit, 5)",
            f"class D{number}:\n    def __del__(self): print('deleted {number}')\nd{number} = "
            f"D{number}()",
            f"class C{number}:\n    def __del__(self): print('cycle {number}')\n"
            f"c{number} = C{number}(); c{number}.me = c{number}; del c{number}; gc.collect()",
            f"class E{number}:\n    def __del__(self): 1 / 0\ne{number} = E{number}()",
            f"class W{number}: pass\nw{number} = W{number}()\n"
            f"weakref.finalize(w{number}, print, 'finalized {number}')",
            f"def g{number}():\n    try: yield 1\n    finally: print('closed {number}')\n"
            f"i{number} = g{number}(); print(next(i{number}))",
            f"f{number} = open('late', 'w'); f{number}.write('not flushed')",
            "sys.excepthook = lambda kind, error, trace: print('hook', kind.__name__)",
            "sys.unraisablehook = lambda u: print('unraisable', u.exc_type.__name__)",
            "import contextlib\nstack = contextlib.ExitStack(); stack.callback(print, 'unwound')",
            f"@functools.lru_cache\ndef cached{number}(n): print('computed'); return n\n"
            f"cached{number}(1); cached{number}(1)",
            "gc.collect(); gc.disable()",
            "sys.setrecursionlimit(3000)",
            "os.environ['X'] = '1'; print(os.environ['X'])",
            f"class H{number}:\n    def __del__(self): print('kept {number}')\nkept = H{number}()\n"
            "def keep(*a): pass\n"
            + rng.choice(
                (
                    "signal.signal(signal.SIGUSR1, keep)",
                    "json.keep = keep",
                    "import builtins; builtins.keep = kept",
                    "sys.excepthook = keep",
                    "sys.modules['keep'] = keep",
                    "threading.excepthook = keep",
                )
            ),
            f"class M(type):\n    def __del__(cls): print('cycle {number}')\n"
            f"class K{number}(metaclass=M): pass",
        )
    )  # fmt: skip


def _language(rng: random.Random, number: int) -> str:
    return imports() + "\n" + rng.choice(
        (
            "match {'k': [1, 2]}:\n    case {'k': [a, *rest]}: print(a, rest)",
            "print(f'{1 + 1=} {\"é\"!a:>8} {3.14159:.2f}')",
            "from dataclasses import dataclass, field\n@dataclass(order=True)\nclass P:\n"
            "    x: int\n    y: list = field(default_factory=list)\nprint(sorted([P(2), P(1)]))",
            "import enum\nclass Color(enum.Enum): RED = 1\nprint(Color.RED, repr(Color(1)))",
            "import typing\ndef f(x: int, y: 'str' = '') -> None: pass\n"
            "print(typing.get_type_hints(f)['y'])",
            "def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\nprint(fib(15))",
            "def deep(n): return 0 if n == 0 else 1 + deep(n - 1)\nprint(deep(900))",
            "import unittest\nclass T(unittest.TestCase):\n    def test_a(self): print('test')\n"
            "unittest.main(exit=False, argv=['x'])",
            "from collections import namedtuple, Counter\nprint(Counter('abca').most_common(1))",
            "class A:\n    def __repr__(self): return 'é'\nprint([A()], ascii(A()))",
            "x: int = 1\nprint(__annotations__ if sys.version_info < (3, 14) else x)",
            "print([*zip('ab', range(2), strict=True)], (y := 5), y)",
            "global z\nz = 4\nprint(z, 'z' in globals(), locals() is globals())",
            "exec('w = 1'); print(eval('w + 1'), w)",
            "import __main__; __main__.q = 9; print(q)",
            "with open(__file__, 'rb') as f: print(len(f.read()) > 0)",
            "print(inspect.getsourcefile(lambda: 0).endswith('main.py'))",
            "try: eval('(' * 150 + ')' * 150)\n"
            "except (SyntaxError, MemoryError) as e: print(type(e).__name__)",
            "print(sys.intern('a') is sys.intern('a'), 10 ** 20, 0.1 + 0.2)",
            "import doctest; print(doctest.testmod())",
        )
    )  # fmt: skip


def _odd(rng: random.Random, number: int) -> str:
    """What changes the interpreter under the rest of the program."""
    return imports() + "\n" + rng.choice(
        (
            "sys.stdout.close()",
            "sys.stderr.close()",
            "sys.stdin.close()",
            "os.close(0)",
            "os.close(2)",
            "sys.stdout = None",
            "sys.stderr = None",
            "sys.stdin = io.StringIO('given\\nlines'); print(input())",
            "sys.stderr = sys.stdout; print('to stdout', file=sys.stderr)",
            "sys.stderr = io.StringIO()",
            "del sys.excepthook",
            "sys.excepthook = None",
            "sys.excepthook = lambda *a: 1 / 0",
            "sys.excepthook = lambda *a: traceback.print_exception(*a, file=sys.stdout)",
            "sys.displayhook = None",
            "threading.excepthook = None",
            "builtins_print = print\nimport builtins\nbuiltins.print = lambda *a, **k: "
            "builtins_print('patched', *a, **k)",
            "import builtins; builtins.open = None",
            "import builtins; builtins.len = lambda x: 0",
            "del os.write",
            "import io as io2; io2.TextIOWrapper = None",
            "os.remove(__file__)",
            "os.makedirs('sub', exist_ok=True); os.chdir('sub')",
            "os.rename(__file__, 'moved.py')",
            "open(__file__, 'a').write('\\nprint(1)')",
            "sys.path.clear()",
            "sys.argv = ['x', 'y']; print(sys.argv)",
            "del sys.modules['__main__']",
            "sys.modules.pop('json'); import json; print(json.dumps(1))",
            "warnings.simplefilter('error'); print('strict')",
            "warnings.warn('shown', DeprecationWarning)",
            "sys.settrace(lambda *a: None)",
            "sys.setprofile(lambda *a: None)",
            "faulthandler.enable()",
            "tracemalloc.start(); print(tracemalloc.is_tracing())",
            "locale.setlocale(locale.LC_ALL, 'C')",
            "threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
            "threading.stack_size(1 << 20)",
            "os.environ.clear(); print(dict(os.environ))",
            "breakpoint()",
            "import pdb; pdb.set_trace()",
            "import code; code.interact(banner='banner', exitmsg='bye')",
            "import builtins; builtins.__import__ = lambda *a, **k: 1 / 0",
            "sys.set_int_max_str_digits(0); print(len(str(10 ** 5000)))",
            "gc.set_debug(0); gc.freeze(); print(gc.isenabled())",
            "sys.stdin.reconfigure(encoding='latin-1')",
            "sys.stdout.reconfigure(encoding='ascii', errors='strict')",
            "sys.stdout.reconfigure(newline='\\r\\n'); print('crlf')",
            "signal.signal(signal.SIGINT, signal.SIG_IGN)",
            "signal.signal(signal.SIGALRM, signal.SIG_IGN)",
            "raise_later = threading.Timer(0.02, lambda: 1 / 0); raise_later.start()",
            "sys.tracebacklimit = 1",
            "sys.tracebacklimit = 0",
            "sys.dont_write_bytecode = True",
            "__name__ = 'other'; print(__name__)",
            "__file__ = 'other.py'",
            "__builtins__ = {}",
            "del __builtins__",
            "globals().clear()",
            "import decimal; decimal.getcontext().prec = 5; print(decimal.Decimal(1) / 3)",
            "os.dup2(2, 1)",
            "os.dup2(1, 2)",
            "atexit._clear()",
            "atexit._run_exitfuncs(); print('run early')",
            "threading._shutdown()",
            "asyncio.set_event_loop(asyncio.new_event_loop())",
            "import contextlib; print(contextlib.chdir.__name__)",
            "try: help('no_such_topic_at_all')\nexcept Exception as e: print(type(e))",
        )
    )  # fmt: skip


PIECES: tuple[Piece, ...] = (
    *[_value] * 3,
    *[_read] * 3,
    *[_caught] * 2,
    *[_shown] * 2,
    *[_output] * 2,
    *[_files] * 2,
    *[_concurrent] * 2,
    *[_late] * 2,
    _language,
    _odd,
)


def _in_function(piece: str, number: int) -> str:
    if "global z" in piece or "from __future__" in piece:
        return piece
    return f"def work{number}():\n{_indented(piece)}\nwork{number}()"


def _in_thread(piece: str, number: int) -> str:
    if "global z" in piece:
        return piece
    return (
        f"def job{number}():\n{_indented(piece)}\nimport threading\n"
        f"t{number} = threading.Thread(target=job{number})\nt{number}.start()\nt{number}.join()"
    )


def _at_exit(piece: str, number: int) -> str:
    if "global z" in piece or "Thread" in piece or "asyncio" in piece:
        return piece
    return f"import atexit\n@atexit.register\ndef end{number}():\n{_indented(piece)}"


def _in_module(piece: str, number: int) -> str:
    return f"open('mod{number}.py', 'w').write({piece!r})\nimport mod{number}"


def _if_main(piece: str, number: int) -> str:
    return f"if __name__ == '__main__':\n{_indented(piece)}"


def _in_exec(piece: str, number: int) -> str:
    return f"exec(compile({piece!r}, 'exec{number}.py', 'exec'))"


def _indented(piece: str) -> str:
    return textwrap.indent(piece, "    ")


WRAPPERS = (_in_function, _in_thread, _at_exit, _in_module, _if_main, _in_exec)
