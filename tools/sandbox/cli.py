"""`python -m tir_alp.sandbox`: probes this machine, runs one program, serves over HTTP."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from tir_alp.tools.sandbox.config import TOKEN_VARIABLE, Limits, SandboxConfig
from tir_alp.tools.sandbox.create import AUTOMATIC, BACKENDS, create_sandbox, examine
from tir_alp.tools.sandbox.result import SandboxError, SandboxRefused
from tir_alp.tools.sandbox.script import Script

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_WRONG = 2
"""A mistake in the command line, as of argparse."""
_UNAVAILABLE = 69
"""EX_UNAVAILABLE: there is no sandbox."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and carry it out; return the exit status."""
    arguments = parser().parse_args(argv)
    try:
        config = SandboxConfig(
            backend=arguments.backend,
            preload=tuple(filter(None, arguments.preload.split(","))),
            memory_mb=arguments.memory_mb,
        )
        return asyncio.run(arguments.do(config, arguments))
    except SandboxError as error:
        print(f"error: {error}", file=sys.stderr)
        return _UNAVAILABLE
    except ValidationError as error:
        for each in error.errors():
            option = "--" + "-".join(map(str, each["loc"])).replace("_", "-")
            print(f"error: {option} {each['input']}: {each['msg']}", file=sys.stderr)
        return _WRONG
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser("python -m tir_alp.sandbox", description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    defaults = SandboxConfig()
    common.add_argument("--backend", default="auto", choices=("auto", *BACKENDS))
    common.add_argument(
        "--preload", default=",".join(defaults.preload), help="modules, separated by commas"
    )
    common.add_argument("--memory-mb", type=int, default=defaults.memory_mb)
    verbs = found.add_subparsers(required=True)

    probe = verbs.add_parser("probe", parents=[common], help="what is enforced here, and by what")
    probe.set_defaults(do=_probe, preload="")

    run = verbs.add_parser("run", parents=[common], help="execute one file ('-': stdin)")
    run.add_argument("file")
    run.add_argument("--wall-s", type=float, default=defaults.limits.wall_s)
    run.set_defaults(do=_run)

    serve = verbs.add_parser("serve", parents=[common], help="the HTTP service")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=_port, default=8080, help="0: any free port")
    serve.add_argument("--no-token", action="store_true", help="let every local process in")
    serve.add_argument("--max-sessions", type=int, default=defaults.max_sessions)
    serve.set_defaults(do=_serve)
    return found


def _port(text: str) -> int:
    """A port of TCP. Raises ValueError, which argparse reports."""
    if not 0 <= (port := int(text)) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{port} is not a port: ports go from 0 to 65535")
    return port


async def _probe(config: SandboxConfig, arguments: argparse.Namespace) -> int:
    """Print one table per backend; return 1 if no backend can be used."""
    console = Console()
    names = AUTOMATIC if config.backend == "auto" else (config.backend,)
    usable = []
    for name in names:
        table = Table("protection", "enforced", "by", title=f"backend {name}", title_justify="left")
        try:
            results = await examine(name, config)
        except SandboxRefused as refusal:
            console.print(f"backend {name}: [red]cannot be used[/red]: {refusal}", soft_wrap=True)
            continue
        for result in results:
            enforced = f"[red]NO: {result.failure}" if result.failure else "yes"
            enforced = enforced if result.promised else "not promised"
            table.add_row(result.promise, enforced, result.mechanism)
        console.print(table)
        if not any(result.failure for result in results):
            usable.append(name)
    console.print(f"usable: {', '.join(usable) or 'none'}")
    return 0 if usable else 1


async def _run(config: SandboxConfig, arguments: argparse.Namespace) -> int:
    """Print what a program prints; return its exit status, or one that stands for its outcome."""
    file, limits = arguments.file, Limits(wall_s=arguments.wall_s)
    try:
        code = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        print(f"error: cannot read the program {file}: {error.strerror}", file=sys.stderr)
        return _WRONG
    stdin = b"" if file == "-" or sys.stdin.isatty() else sys.stdin.buffer.read()
    async with create_sandbox(config) as sandbox, sandbox.session() as session:
        ended = await session.run_script(Script(code=code, stdin=stdin), limits)
    sys.stdout.write(ended.result.stdout)
    sys.stderr.write(ended.result.stderr)
    return ended.exit_status


async def _serve(config: SandboxConfig, arguments: argparse.Namespace) -> int:
    """Serve until interrupted."""
    try:
        from tir_alp.tools.sandbox.service.server import Service, ServiceConfig, serve
    except ImportError as error:
        raise SandboxError(f"{error}; the service needs: pip install 'tir_alp[service]'") from error
    if arguments.no_token and arguments.host not in _LOOPBACK:
        raise SandboxError("--no-token is for clients on this machine only: drop it, or --host")
    token = None
    if not arguments.no_token and (token := os.environ.get(TOKEN_VARIABLE)) is None:
        token = secrets.token_urlsafe(24)
        print(f"{TOKEN_VARIABLE}={token}", file=sys.stderr)
    config = config.model_copy(update={"max_sessions": arguments.max_sessions})
    async with create_sandbox(config) as sandbox:
        service = Service(sandbox, ServiceConfig(token=token))
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)

        def announce(address: str) -> None:
            print(f"sandbox backend {sandbox.report.backend} at {address}", file=sys.stderr)

        await serve(service.application(), arguments.host, arguments.port, stop, announce)
    return 0
