"""Two hosts that lose sight of one another for a while: `python -m tests.benchmarks.link_loss`.

Needs root, and `ip` of iproute2. The hosts are network namespaces of this machine, each with a node
of one Ray cluster; parts of a run of the tiny model are spread over both. Behind its first step the
link of the second host is taken down for `--seconds`, and put up again. What is printed: whether
the run came to its end, and whether every token of it is accounted for.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

HOSTS = {"tir-alp-a": "10.97.0.1", "tir-alp-b": "10.97.0.2"}
FIRST, SECOND = HOSTS
STEPS = 6
RUN = (
    *("--cluster", "auto", "--cluster.spread", "true", "--cluster.patience_s", "60"),
    *("--cluster.engines.count", "2", "--cluster.environments.count", "2"),
    *(
        "--rollout.groups_per_step",
        "4",
        "--rollout.group_size",
        "4",
        "--rollout.max_staleness",
        "1",
    ),
    *("--rollout.max_staleness", "1", "--rollout.on_update", "keep"),
    *("--eval.num_tasks", "8", "--checkpoint.every", "1"),
    *("--steps", str(STEPS), "--name", "linked"),
)
_DEADLINE_S = 900.0


def ip(*words: str) -> None:
    """Call the tool of that name."""
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def hosts() -> Iterator[None]:
    """Two network namespaces with a cable between them."""
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", "a", "netns", FIRST, "type", "veth", "peer", "name", "b", "netns", SECOND)
        for (host, address), link in zip(HOSTS.items(), "ab", strict=True):
            ip("-n", host, "address", "add", f"{address}/24", "dev", link)
            for each in (link, "lo"):
                ip("-n", host, "link", "set", each, "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], check=False)


def within(host: str, *words: str, **settings: object) -> subprocess.Popen[bytes]:
    """Start a program of this virtual environment on a host."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    environment["RAY_ADDRESS"] = f"{HOSTS[FIRST]}:6379"
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH") or os.getcwd()
    command = ["ip", "netns", "exec", host, sys.executable, *words]
    return subprocess.Popen(command, env=environment, **settings)  # type: ignore[call-overload]


@contextlib.contextmanager
def ray_nodes(folder: Path) -> Iterator[None]:
    """One on each host."""
    ray = "from ray.scripts.scripts import main; main()"
    nodes = []
    try:
        for host, address in HOSTS.items():
            joins = ["--address", f"{HOSTS[FIRST]}:6379"]
            words = ["--head", "--port", "6379"] if host == FIRST else joins
            words += ["--node-ip-address", address, "--num-cpus", "3", "--block"]
            words += ["--include-dashboard", "false"] if host == FIRST else []
            words += ["--temp-dir", str(folder / host)]
            with (folder / f"{host}.log").open("wb") as log:
                nodes.append(within(host, "-c", ray, "start", *words, stdout=log, stderr=log))
            time.sleep(10)  # the head has to be there first
        yield
    finally:
        for node in nodes:
            node.terminate()
        for node in nodes:
            node.wait(60)


def main(words: Sequence[str]) -> int:
    """Run the command; 0 if the run came to its end with every token accounted for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="tal") as name, hosts(), ray_nodes(Path(name)):
        folder = Path(name)
        with (folder / "train.log").open("wb") as log:
            training = within(
                *(FIRST, "-m", "tir_alp.train", *RUN), cwd=folder, stdout=log, stderr=log
            )
        deadline = time.monotonic() + _DEADLINE_S
        first = folder / "runs" / "linked" / "trajectories" / "step_000001.jsonl"
        while not first.exists() and training.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        ip("-n", SECOND, "link", "set", "b", "down")
        print(f"the link is down for {options.seconds:g} s", flush=True)
        time.sleep(options.seconds)
        ip("-n", SECOND, "link", "set", "b", "up")
        try:
            training.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            training.kill()
        print((folder / "train.log").read_text()[-3000:])
        audit = within(FIRST, "-m", "tir_alp.audit", "runs/linked", cwd=folder).wait(300)
    print(f"the run ended with {training.returncode}, its audit with {audit}")
    return int(bool(training.returncode or audit))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
