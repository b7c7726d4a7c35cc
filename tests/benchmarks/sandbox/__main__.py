"""The sandbox beside other ways to run Python, in one run and one table.

    python -m tests.benchmarks.sandbox [--seconds 4] [--engine] [NAME ...]

Run it from the top of a checkout. With a NAME, only rows whose name contains it are measured.
`--engine` starts a Docker engine of its own (as root) for the rows that need one; otherwise they
use the engine at DOCKER_HOST and its image `tir-alp-sandbox`. `pip install ipykernel` and
`apt-get install firejail` add their rows. Missing rows are listed with the reason.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import sys
from collections.abc import Awaitable, Callable

from tests.benchmarks.sandbox import measure
from tests.benchmarks.sandbox.container_engine import engine_with_image
from tests.benchmarks.sandbox.measure import Times
from tests.benchmarks.sandbox.notebook import start_kernels
from tests.benchmarks.sandbox.ours import start_ours
from tests.benchmarks.sandbox.process_per_call import Bubblewrap, Container, Firejail, Python
from tests.benchmarks.sandbox.rival import CannotFork, Host, Missing, Rival

CLIENTS = (1, 8)
_NO_STATE = "no state, no fork"

RIVALS = (
    Rival("ours, namespaces", "", True, lambda: start_ours(backend="namespaces")),
    Rival(
        "ours, namespaces, nothing preloaded",
        "",
        True,
        lambda: start_ours(backend="namespaces", preload=()),
    ),
    Rival("ours, landlock", "", True, lambda: start_ours(backend="landlock")),
    Rival(
        "ours, docker, all in one container",
        "",
        True,
        lambda: start_ours(backend="docker"),
    ),
    Rival(
        "ours, docker, one container per session",
        "",
        True,
        lambda: start_ours(backend="docker", docker={"container_per": "session"}),
    ),
    Rival(
        "ours, docker, gVisor",
        "",
        True,
        lambda: start_ours(
            backend="docker", docker={"container_per": "session", "runtime": "runsc"}
        ),
    ),
    Rival("python -I -c", f"no isolation, no limits, {_NO_STATE}", False, Python.start),
    Rival(
        "bubblewrap, python -I -c",
        f"host files readable, no limits, no filter, {_NO_STATE}",
        False,
        Bubblewrap.start,
    ),
    Rival("ipykernel", "no isolation, no limits, no fork", True, start_kernels),
    Rival("container per call", _NO_STATE, False, Container.start),
    Rival(
        "firejail, as the first ALP release",
        f"home hidden, other host files readable, set-uid root, {_NO_STATE}",
        False,
        Firejail.start,
    ),
)

Work = Callable[[Host, int, float], Awaitable[Times]]

STATEFUL: dict[str, Work] = {
    "print, live": measure.prints,
    "sympy, live": measure.sympy_calls,
    "new session, print": measure.new_sessions,
    "live fork, print": measure.forks,
}
STATELESS: dict[str, Work] = {
    "print, new process": measure.new_sessions,
    "sympy, new process": measure.imports_and_sympy_calls,
}

_HEADER = (
    "| | work | 1 client: p50 / p95 / p99 ms | per second | 8 clients: p50 / p95 / p99 ms "
    "| per second | load |\n|---|---|---|---|---|---|---|"
)


def machine() -> str:
    """What the figures depend on, in addition to the code."""
    cpus = len(os.sched_getaffinity(0))
    user = "root" if os.geteuid() == 0 else "an ordinary user"
    return (
        f"{cpus} processors, {platform.system()} {platform.release()} {platform.machine()}, "
        f"Python {platform.python_version()}, as {user}"
    )


def load() -> str:
    """The load averages of this machine, this benchmark's own share included."""
    return "load average {:.1f} {:.1f} {:.1f}".format(*os.getloadavg())


def row(name: str, work: str, times: list[Times]) -> str:
    """One row of the table, in Markdown."""
    cells = [
        cell
        for t in times
        for cell in (
            f"{short(t.p50_ms)} / {short(t.p95_ms)} / {short(t.p99_ms)} ({t.num_rounds}"
            + (f", {t.num_failed} failed)" if t.num_failed else ")"),
            short(t.per_s),
        )
    ]
    return f"| {name} | {work} | {' | '.join(cells)} | {os.getloadavg()[0]:.1f} |"


def short(number: float) -> str:
    """At most three significant digits."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


async def compete(rival: Rival, seconds: float) -> None:
    """Measure everything that a rival can do, and print one row for each kind of work."""
    async with rival.start() as host:
        for name, work in (STATEFUL if rival.is_stateful else STATELESS).items():
            try:
                times = [await work(host, clients, seconds) for clients in CLIENTS]
            except CannotFork:
                continue
            except RuntimeError as error:
                reason = " ".join(str(error).split())[-200:]
                print(f"| {rival.name} | {name} | failed: {reason} | | | | |")
                continue
            print(row(rival.name, name, times), flush=True)


async def main(seconds: float, names: list[str], without_engine: str) -> None:
    """Print the machine, the table, what each rival lacks, and which ones are missing."""
    chosen = [r for r in RIVALS if not names or any(name in r.name for name in names)]
    print(f"{machine()}\nat the start: {load()}\n")
    print(_HEADER)
    missing: dict[str, str] = {}
    for rival in chosen:
        try:
            await compete(rival, seconds)
        except Missing as reason:
            missing[rival.name] = " ".join(str(reason).split())
            print(f"| {rival.name} | missing | | | | | |", flush=True)
    print("\nIn brackets: number of rounds. Load: average of the last minute of the row.")
    for rival in chosen:
        if rival.lacks:
            print(f"- {rival.name}: {rival.lacks}")
    for name, reason in missing.items():
        print(f"- missing: {name}: {reason}")
    if without_engine:
        print(f"- {without_engine}")
    print(f"\nat the end: {load()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m tests.benchmarks.sandbox", description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each figure")
    parser.add_argument("--engine", action="store_true")
    options = parser.parse_args()
    with engine_with_image() if options.engine else contextlib.nullcontext("") as problem:
        asyncio.run(main(options.seconds, options.names, problem))
    sys.exit(0)
