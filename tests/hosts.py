"""Two hosts on one machine: network namespaces with a cable. Needs root and iproute2."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

HOSTS = {"tir-alp-a": "10.97.0.1", "tir-alp-b": "10.97.0.2"}
FIRST, SECOND = HOSTS
LINKS = "tir-alp-0", "tir-alp-1"
# Other things that hosts do not share: their name, shared memory, the files of Ray.
_PREPARE = """
hostname {host}
mount -t tmpfs -o mode=1777 none /dev/shm
mkdir -p /tmp/ray
mount -t tmpfs none /tmp/ray
"""


def ip(*words: str) -> None:
    """Run the command `ip`."""
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def hosts() -> Iterator[None]:
    """Make `HOSTS`, and remove them when the block ends."""
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        first = ("link", "add", "name", LINKS[0], "netns", FIRST, "type", "veth")
        ip(*first, "peer", "name", LINKS[1], "netns", SECOND)
        for (host, address), link in zip(HOSTS.items(), LINKS, strict=True):
            ip("-n", host, "address", "add", f"{address}/24", "dev", link)
            for each in (link, "lo"):
                ip("-n", host, "link", "set", each, "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], check=False)


def processes_of(host: str) -> dict[int, str]:
    """Command lines of the processes on a host, by pid."""
    listed = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True)
    found = {}
    for pid in listed.stdout.split():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            found[int(pid)] = words.strip()
    return found


def on(host: str, *words: str) -> list[str]:
    """A command that runs another command in a host's network."""
    return ["ip", "netns", "exec", host, *words]


def apart(host: str, script: str) -> list[str]:
    """A command that runs a shell script on a host, with everything of `_PREPARE` its own."""
    shell = ("sh", "-ec", _PREPARE.format(host=host) + script)
    return on(host, "unshare", "--uts", "--mount", *shell)


def end_processes_of(host: str) -> None:
    """Kill the processes on a host."""
    for pid in processes_of(host):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
