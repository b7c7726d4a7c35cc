"""The texts of which `tests.fuzz.program_pieces` and `program_ends` make programs.

What they print is the same in each run of a program: no address, time or process id.
"""

STDINS = (
    b"",
    b"3\n1 2 3\nlast",
    b"\n\n",
    "é €\n😀\n".encode(),
    b"\xff\xfe bytes\r\nline\r\n",
    b"1\n" * 5000,
    b"x" * 70_000 + b"\n7\n",
)

HEADS: tuple[tuple[bytes, str, str], ...] = (
    *[(b"", "utf-8", "\n")] * 6,
    (b"\xef\xbb\xbf", "utf-8", "\n"),
    (b"# coding: latin-1\n", "latin-1", "\n"),
    (b"#!/usr/bin/env python3\n# -*- coding: utf-8 -*-\n", "utf-8", "\n"),
    (b'"""A docstring."""\n', "utf-8", "\n"),
    (b"from __future__ import annotations\n", "utf-8", "\n"),
    (b"", "utf-8", "\r\n"),
)

READERS = (
    "input()",
    "sys.stdin.readline()",
    "sys.stdin.read(5)",
    "sys.stdin.buffer.read(3)",
    "sys.stdin.buffer.readline()",
    "os.read(0, 4)",
    "next(iter(sys.stdin), None)",
    "len(sys.stdin.read())",
    "len(sys.stdin.readlines())",
    "len(open(0, 'rb', closefd=False).read())",
    "len(open('/dev/stdin', 'rb').read())",
    "sum(1 for _ in fileinput.input(encoding='latin-1'))",
    "os.fstat(0).st_size",
    "sys.stdin.isatty()",
    "sys.stdin.fileno()",
    "[*map(int, input().split())]",
    "os.fdopen(os.dup(0), 'rb').readline()",
    "sys.stdin.closed",
    "sys.stdin.encoding, sys.stdin.errors, sys.stdin.newlines",
    "sys.stdin.seekable(), sys.stdin.readable(), sys.stdin.line_buffering",
    "input('prompt? ')",
    "[*csv.reader(sys.stdin)][:2]",
    "sys.stdin.buffer.peek(2)[:2]",
    "select.select([0], [], [], 0)[0]",
)
EXPRESSIONS = (
    "6 * 7",
    "[x ** 2 for x in range(5)]",
    "{'b': 1, 'a': [None, True]}",
    "'é € 😀'",
    "'\\udcff'",
    "'a\\0b'",
    "b'\\xff'",
    "1e300 * 10, float('nan')",
    "__name__, __doc__, type(__spec__), __package__",
    "os.path.basename(__file__)",
    "os.path.samefile(sys.argv[0], __file__)",
    "len(sys.argv), sys.orig_argv[-1].endswith('main.py')",
    "os.path.samefile(sys.path[0], '.')",
    "sorted(n for n in os.listdir() if n[0] != '.')",
    "sys.getdefaultencoding(), sys.getfilesystemencoding()",
    "locale.getpreferredencoding(False)",
    "sys.stdout.encoding, sys.stdout.errors, sys.stdout.isatty()",
    "sys.stderr.encoding, sys.stderr.errors, sys.stderr.isatty()",
    "sys.stdout.line_buffering, sys.stdout.write_through",
    "sys.stdout.buffer.__class__.__name__, sys.stderr.fileno()",
    "threading.active_count(), threading.current_thread().name",
    "gc.isenabled(), sys.gettrace(), sys.getprofile()",
    "sys.exc_info(), sys.excepthook is sys.__excepthook__",
    "type(__builtins__).__name__, __loader__.name",
    "sys.modules['__main__'].__dict__ is globals()",
    "sorted(k for k in globals() if k.startswith('__'))",
    "signal.getsignal(signal.SIGINT).__name__, signal.getsignal(signal.SIGTERM)",
    "signal.getsignal(signal.SIGPIPE), signal.getsignal(signal.SIGCHLD)",
    "os.get_terminal_size",
    "sys.flags.optimize, sys.flags.dev_mode, sys.flags.utf8_mode, __debug__",
    "sys.dont_write_bytecode, sys.warnoptions, sys._xoptions",
    "hash(1.5), hash(10 ** 30), -1 % 5",
    "inspect.getsource(sys.modules[__name__])[:9]",
    "inspect.stack()[0].lineno",
    "sys._getframe().f_code.co_name",
    "traceback.extract_stack()[-1].name",
    "exit, quit",
    "copyright.__class__.__name__, 'help' in dir(__builtins__)",
    "asyncio.run(asyncio.sleep(0, 'slept'))",
    "decimal.Decimal(1) / 7, fractions.Fraction(3, 9)",
    "json.dumps({'é': '\\ud800'})",
    "10 ** 4400 % 97",
    "os.umask(0o22), os.access('.', os.W_OK)",
    "os.getcwd() == os.path.realpath('.')",
    "os.environ.get('NO_SUCH'), 'LANG' in os.environ",
    "time.strftime('%Z', time.gmtime(0)), time.tzname",
    "pathlib.Path(__file__).read_bytes()[:3]",
    "sys.getrefcount.__name__, sys.getswitchinterval()",
    "shutil.which('no-such-program')",
    "socket.gethostname.__name__",
    "random.Random(3).random(), random.seed(1), random.random()",
    "tempfile.mkdtemp().startswith(tempfile.gettempdir())",
    "importlib.util.find_spec('main').name",
    "multiprocessing.current_process().name",
    "faulthandler.is_enabled(), tracemalloc.is_tracing()",
    "contextvars.copy_context().run(lambda: 1), len(contextvars.copy_context())",
    "warnings.filters[0][0], len(warnings.filters)",
    "logging.getLogger().handlers, logging.getLogger().level",
    "resource.getrlimit.__name__",
)
EXCEPTIONS = (
    "ValueError('a')",
    "KeyError('k')",
    "KeyError('')",
    "OSError(2, 'gone', 'file')",
    "UnicodeDecodeError('utf-8', b'\\xff', 0, 1, 'why')",
    "StopIteration(1)",
    "SystemError",
    "Custom('own', 2)",
    "Custom.Inner('nested\\nlines')",
    "ExceptionGroup('group', [ValueError(1), ExceptionGroup('in', [TypeError(2)])])",
    "BaseExceptionGroup('base', [KeyboardInterrupt(), ValueError()])",
    "GeneratorExit",
    "AssertionError('é 😀')",
    "ImportError('no', name='n', path='p')",
    "SyntaxError('own', ('file.py', 1, 2, 'text', 1, 3))",
    "RuntimeError('half \\ud800')",
    "Hostile()",
    "Silent()",
    "Noted",
)
CLASSES = """\
class Custom(Exception):
    class Inner(Exception): pass
class Hostile(Exception):
    def __str__(self): raise ValueError('no str')
class Silent(BaseException):
    def __str__(self): return ''
Noted = ValueError('with notes')
Noted.add_note('first note')
Noted.add_note('')
"""
FAULTS = (
    "1 / 0",
    "[][1]",
    "{}['k']",
    "None.x",
    "undefined_name",
    "import no_such_module",
    "from os import no_such_name",
    "int('x')",
    "'a' + 1",
    "open('no such file')",
    "a, b = 1",
    "print(len(5))",
    "(lambda x: x)()",
    "b'\\xff'.decode()",
    "'\\ud800'.encode()",
    "[].no_such",
    "assert 1 == 2, 'words'",
    "exec('1 +')",
    "eval('f(')",
    "json.loads('{')",
    "re.compile('(')",
    "int('1' * 5000)",
    "compile('a b', 'x', 'exec')",
    "sys.stdout.no_such_attribute",
    "del undefined_name",
    "def f(): return f()\nf()",
    "def f():\n    yield 1\n    raise StopIteration\nlist(f())",
    "async def f(): raise ValueError('in a task')\nasyncio.run(f())",
    "class A:\n    x: int = undefined_name",
    "sum(1 / x for x in (1, 0))",
    "threading.Thread(target=lambda: 1 / 0).start(); time.sleep(0.05)",
)


def imports() -> str:
    """The line that imports every module which a piece uses."""
    names = (
        *("asyncio", "atexit", "contextvars", "csv", "decimal", "faulthandler", "fileinput"),
        *("fractions", "functools", "gc", "importlib.util", "inspect", "io", "json", "locale"),
        *("logging", "multiprocessing", "os", "pathlib", "random", "re", "resource", "select"),
        *("shutil", "signal", "socket", "sys", "tempfile", "threading", "time", "traceback"),
        *("tracemalloc", "warnings", "weakref"),
    )
    return "import " + ", ".join(names)
