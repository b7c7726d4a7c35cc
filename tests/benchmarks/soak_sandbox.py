"""Does a sandbox leak? Makes calls of every kind for a long time, and measures what is left.

    unshare --mount python -m tests.benchmarks.soak_sandbox [--calls 100000] [--backend landlock]
    python -m tests.benchmarks.soak_sandbox --open 500

The first command prints what the host process and the fork server hold before and after. It exits
with status 1 if anything grew, or if a call ended otherwise than it should. The mount namespace of
its own keeps it from counting the mounts of others. The second command opens many sessions at once,
calls each, and prints what one costs. Both need root, who may look at everything.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.tools.sandbox.processes import Process, descendants
from tir_alp.tools.sandbox import Limits, Outcome, RunResult, SandboxConfig, Session, create_sandbox
from tir_alp.tools.sandbox.backends.jail_protocol import Jail
from tir_alp.tools.sandbox.backends.landlock import PlainJail
from tir_alp.tools.sandbox.sessions.local_sandbox import LocalSandbox

NUM_OF_JAIL = {"namespaces": 3, "landlock": 1}
"""Processes of a jail without sessions; the last of them is the fork server."""
SETTLE_S = 60.0
LATE_S = 30.0
"""Seconds beyond its limit that a call may take on a loaded machine before it counts as hung."""
TOLERANCE_MB = {"host memory, MB": 40.0, "fork server memory, MB": 8.0}
"""Memory that an allocator keeps, whatever the number of calls."""

COUNT = "x = globals().get('x', 0) + 1\nx"
SWARM = """
import threading
threads = [threading.Thread(target=print, args=('thread',)) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
"""
FILES = "for i in range(20): open(f'file{i}', 'wb').write(bytes(10_000))"


DEFAULTS = Limits()


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of call, and how it may end."""

    weight: float
    code: str
    outcome: Outcome
    limits: Limits = DEFAULTS
    ends_interpreter: bool = False


KINDS = {
    "count": Kind(60, COUNT, Outcome.OK),
    "print": Kind(8, "print('line\\n' * 100)", Outcome.OK),
    "error": Kind(5, "1 / 0", Outcome.TOOL_ERROR),
    "threads": Kind(2, SWARM, Outcome.OK),
    "files": Kind(2, FILES, Outcome.OK),
    "memory": Kind(3, "y = bytearray(1 << 40)", Outcome.RESOURCE_LIMIT),
    "hoard": Kind(1, "y = bytearray(20 << 20)", Outcome.OK),
    "crash": Kind(2, "import os; os.abort()", Outcome.TOOL_ERROR, DEFAULTS, True),
    "exit": Kind(1, "import os; os._exit(3)", Outcome.TOOL_ERROR, DEFAULTS, True),
    "forged": Kind(1, "import os; os.write(3, b'x' * 99)", Outcome.TOOL_ERROR, DEFAULTS, True),
    "flood": Kind(
        2,
        "while True: print('flood' * 1000)",
        Outcome.RESOURCE_LIMIT,
        Limits(output_bytes=200_000),
        True,
    ),
    "spin": Kind(2, "while True: pass", Outcome.TOOL_TIMEOUT, Limits(wall_s=0.03), True),
    "sleep": Kind(
        2, "import time; time.sleep(60)", Outcome.TOOL_TIMEOUT, Limits(wall_s=0.05), True
    ),
}
FORK, TURN_OVER, CANCEL = 4.0, 4.0, 1.0
"""Weights of what is more than a call: a branch, another session, a caller who gives up."""


class Client:
    """Makes one call after the other and checks how each ends."""

    def __init__(self, sandbox: LocalSandbox, seed: int, tally: collections.Counter[str]) -> None:
        self._sandbox = sandbox
        self._random = random.Random(seed)
        self._tally = tally
        self._count = 0
        self._session: Session | None = None

    async def work(self, calls: int) -> None:
        """Make this many calls."""
        names = [*KINDS, "fork", "turn over", "cancel"]
        weights = [*(kind.weight for kind in KINDS.values()), FORK, TURN_OVER, CANCEL]
        for name in self._random.choices(names, weights, k=calls):
            session = self._session = self._session or await self._sandbox.open_session()
            self._tally[name] += 1
            if name == "fork":
                async with await self._live(session) as branch:
                    await self._check(branch, "count")
                self._count -= 1  # that count was the branch's own
            elif name == "turn over":
                await self.close()
            elif name == "cancel":
                await self._cancel(session)
            else:
                await self._check(session, name)

    async def close(self) -> None:
        """Close the session, if there is one."""
        if self._session is not None:
            await self._session.close()
        self._session, self._count = None, 0

    async def _live(self, session: Session) -> Session:
        """A branch. The call before it makes sure that there is a live interpreter to copy."""
        await self._check(session, "count")
        return await session.fork()

    async def _cancel(self, session: Session) -> None:
        call = asyncio.create_task(session.run("import time; time.sleep(60)"))
        await asyncio.sleep(0.01)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        self._count = 0

    async def _check(self, session: Session, name: str) -> None:
        kind = KINDS[name]
        started = time.monotonic()
        result = await session.run(kind.code, kind.limits)
        late_s = time.monotonic() - started - kind.limits.wall_s
        if result.outcome is not kind.outcome or late_s > LATE_S:
            self._tally[f"WRONG: {name} gave {result.outcome} {result.stderr[-200:]}"] += 1
        if result.note:
            self._count = 0
        if name == "count":
            self._count += 1
            if result.value != str(self._count):
                self._tally[f"WRONG: counted {result.value}, not {self._count}"] += 1
        if kind.ends_interpreter:
            self._count = 0


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the host process and the fork server hold while no session is open."""

    figures: dict[str, float]

    @classmethod
    async def take(
        cls,
        sandbox: LocalSandbox,
        config: SandboxConfig,
        files: Path,
        before: Footprint | None = None,
    ) -> Footprint:
        """Wait until all is quiet, and measure; after the deadline, measure anyway.

        Args:
            sandbox: A sandbox without an open session.
            config: Config of the sandbox.
            files: Folder of its temporary files.
            before: An earlier footprint. Whatever has grown since may still shrink: a retired fork
                server gives its descriptors back only when its keepers have ended.
        """
        num_jail = NUM_OF_JAIL[config.backend]
        num_expected = num_jail + 2 * config.ready_sessions
        deadline = time.monotonic() + SETTLE_S
        while True:
            processes = descendants(os.getpid())
            is_quiet = (
                sandbox.num_ready_sessions == config.ready_sessions
                and len(processes) == num_expected
            )
            if is_quiet or time.monotonic() >= deadline:
                seen = cls._look(processes, processes[num_jail - 1].pid, files)
                if before is None or not seen.grown(before) or time.monotonic() >= deadline:
                    return seen
            await asyncio.sleep(0.05)

    @classmethod
    def _look(cls, processes: list[Process], server: int, files: Path) -> Footprint:
        figures: dict[str, float] = {
            "processes": len(processes),
            "descriptors of the host": len(os.listdir("/proc/self/fd")),
            "mounts of the host": len(Path("/proc/self/mountinfo").read_bytes().splitlines()),
            # `os.walk` goes on if a folder is removed meanwhile, as those of sessions are.
            "temporary files": sum(len(dirs) + len(names) for _, dirs, names in os.walk(files)),
            "host memory, MB": _resident_mb(os.getpid()),
            "fork server memory, MB": _resident_mb(server),
        }
        with contextlib.suppress(PermissionError):  # only root may look
            figures["descriptors of the fork server"] = len(os.listdir(f"/proc/{server}/fd"))
            mounts = Path(f"/proc/{server}/mountinfo").read_bytes().splitlines()
            figures["mounts of the fork server"] = len(mounts)
        return cls(figures)

    def grown(self, before: Footprint) -> set[str]:
        """Names of the figures that are larger than before, memory by more than allowed."""
        return {
            name
            for name, held in before.figures.items()
            if self.figures[name] > held + TOLERANCE_MB.get(name, 0.0)
        }


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def soak(config: SandboxConfig, calls: int, num_clients: int, seed: int) -> bool:
    """Make the calls; return whether nothing grew and every call ended as it should."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        os.chmod(folder, 0o1777)  # root's fork server is `nobody`

        def with_own_folder(jail: Jail) -> Jail:
            if isinstance(jail, PlainJail):
                environment = jail.environment | {"TMPDIR": folder}
                return dataclasses.replace(jail, environment=environment)
            return jail

        async with create_sandbox(config, alter_jail=with_own_folder) as sandbox:
            assert isinstance(sandbox, LocalSandbox)
            tally: collections.Counter[str] = collections.Counter()
            clients = [Client(sandbox, seed + i, tally) for i in range(num_clients)]

            async def work(calls_each: int) -> None:
                await asyncio.gather(*(client.work(calls_each) for client in clients))
                await asyncio.gather(*(client.close() for client in clients))

            await work(100)  # whatever is allocated only once is allocated now
            before = await Footprint.take(sandbox, config, Path(folder))
            tally.clear()
            started = time.monotonic()
            await work(-(-calls // num_clients))
            elapsed_s = time.monotonic() - started
            after = await Footprint.take(sandbox, config, Path(folder), before)
    print(f"{config.backend}: {tally.total()} calls of {num_clients} clients in {elapsed_s:.0f} s")
    for name, count in sorted(tally.items()):
        print(f"  {name:32} {count:8}")
    grown = after.grown(before)
    for name, held in before.figures.items():
        remark = "  GREW" if name in grown else ""
        print(f"  {name:32} {held:8.6g} before {after.figures[name]:8.6g} after{remark}")
    return not grown and not any(name.startswith("WRONG") for name in tally)


async def open_many(config: SandboxConfig, count: int) -> bool:
    """Open this many sessions; return whether all answer while all are open."""
    async with create_sandbox(config) as sandbox:
        server = descendants(os.getpid())[NUM_OF_JAIL[config.backend] - 1].pid
        started = time.monotonic()
        sessions = await asyncio.gather(*(sandbox.open_session() for _ in range(count)))
        print(f"{config.backend}, preload={config.preload}")
        print(f"  {count} sessions opened in {time.monotonic() - started:.1f} s")
        is_sound = True
        factor = "import sympy; sympy.factor('x**6 - 1') is not None"
        for name, code, value in (
            ("one call", "6 * 7", "42"),
            ("a call of sympy", factor, "True"),
        ):
            started = time.monotonic()
            results: list[RunResult] = await asyncio.gather(*(s.run(code) for s in sessions))
            elapsed_s = time.monotonic() - started
            is_sound &= all(result.value == value for result in results)
            inside = descendants(server)
            pss_mb = sum(_proportional_mb(process.pid) for process in inside) / count
            print(
                f"  after {name} each, in {elapsed_s:.1f} s: {pss_mb:.2f} MB (PSS) per session,",
                end="",
            )
            print(f" {len(inside)} processes, {len(os.listdir('/proc/self/fd'))} descriptors")
        return is_sound


def _proportional_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.partition("\nPss:")[2].split(None, 1)[0]) / 1024


def main() -> int:
    """Parse the command line and run; return 0 if all is well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--backend", default="namespaces", choices=NUM_OF_JAIL)
    parser.add_argument("--preload", default="numpy,sympy", help="modules, separated by commas")
    parser.add_argument("--recycle", type=int, help="sessions of one fork server; default: endless")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--open", type=int, default=0, help="open this many sessions instead")
    arguments = parser.parse_args()
    config = SandboxConfig.model_validate(
        {
            "backend": arguments.backend,
            "preload": tuple(filter(None, arguments.preload.split(","))),
            "max_sessions": max(256, arguments.open),
            "fork_server_lifetime": {"max_uses": arguments.recycle},
        }
    )
    if arguments.open:
        return 0 if asyncio.run(open_many(config, arguments.open)) else 1
    work = soak(config, arguments.calls, arguments.clients, arguments.seed)
    return 0 if asyncio.run(work) else 1


if __name__ == "__main__":
    sys.exit(main())
