"""Two hosts whose link is down for a while: `python -m tests.benchmarks.link_loss`.

Needs root, and `ip` of iproute2. The hosts are network namespaces of this machine, each with a node
of one Ray cluster, and the actors of a run of the tiny model are spread over both. After the first
step the link of the second host is taken down for `--seconds`, and then up again. The program
prints whether the run completed, whether every group and token is accounted for, and whether a
process of it is left. Other arguments go to the run, e.g. `--cluster.patience_s 10`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tests.hosts import FIRST, HOSTS, LINKS, SECOND, hosts, ip, on, processes_of
from tir_alp.studies.drill import account_of

RUN = (
    *("--cluster", "auto", "--cluster.spread", "true"),
    *("--cluster.engines.count", "2", "--cluster.environments.count", "2"),
    *("--rollout.groups_per_step", "4", "--rollout.group_size", "4"),
    *("--rollout.max_staleness", "1", "--rollout.on_update", "keep"),
    *("--eval.num_tasks", "8", "--checkpoint.every", "1", "--name", "linked"),
)
_START_S, _RUN_S, _END_S = 120.0, 900.0, 30.0


def within(host: str, *words: str, **settings: object) -> subprocess.Popen[bytes]:
    """Start a program of this virtual environment on a host."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    environment["RAY_ADDRESS"] = f"{HOSTS[FIRST]}:6379"
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH") or os.getcwd()
    command = on(host, sys.executable, *words)
    return subprocess.Popen(command, env=environment, **settings)  # type: ignore[call-overload]


@contextlib.contextmanager
def ray_nodes(folder: Path, cpus: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run a Ray node on each host."""
    ray = "from ray.scripts.scripts import main; main()"
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for host, address in HOSTS.items():
            head = ["--head", "--port", "6379", "--include-dashboard", "false"]
            words = head if host == FIRST else ["--address", f"{HOSTS[FIRST]}:6379"]
            words += ["--node-ip-address", address, "--num-cpus", str(cpus), "--block"]
            words += ["--temp-dir", str(folder / host)]
            log = folder / f"{host}.log"
            with log.open("wb") as file:
                nodes.append(within(host, "-c", ray, "start", *words, stdout=file, stderr=file))
            until(lambda log=log: "Ray runtime started" in log.read_text(), _START_S)
        yield nodes
    finally:
        for node in nodes:
            node.terminate()
        for node in nodes:
            node.wait(60)


def until(holds: Callable[[], object], seconds: float) -> bool:
    """Wait until a condition holds; return whether it did in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def actors_left() -> list[str]:
    """Return the names of actor processes that are alive on either host, as Ray names them."""
    names = [name for host in HOSTS for name in processes_of(host).values()]
    return [name for name in names if re.match(r"ray::\w+Host", name)]


def main(words: Sequence[str]) -> int:
    """Run the command; return 0 if the run completed and nothing was lost, repeated or left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds without the link")
    parser.add_argument("--steps", type=int, default=20, help="training steps of the run")
    parser.add_argument("--cpus", type=int, default=3, help="CPUs that each Ray node declares")
    parser.add_argument("--log", type=Path, help="file for the output of the run")
    options, more = parser.parse_known_args(words)
    with (
        tempfile.TemporaryDirectory(prefix="tal") as name,
        hosts(),
        ray_nodes(Path(name), options.cpus) as nodes,
    ):
        folder, run = Path(name), Path(name) / "runs" / "linked"
        command = ["-m", "tir_alp.train", *RUN, "--steps", str(options.steps), *more]
        with (folder / "train.log").open("wb") as log:
            training = within(FIRST, *command, cwd=folder, stdout=log, stderr=log)

        def steps() -> int:
            return len([*(run / "trajectories").glob("step_*.jsonl")])

        until(lambda: steps() or training.poll() is not None, _START_S)
        ip("-n", SECOND, "link", "set", LINKS[1], "down")
        print(f"the link is down for {options.seconds:g} s", flush=True)
        before = steps()
        time.sleep(options.seconds)
        meanwhile = steps() - before
        was_over = training.poll() is not None
        ip("-n", SECOND, "link", "set", LINKS[1], "up")
        try:
            training.wait(_RUN_S)
        except subprocess.TimeoutExpired:
            training.kill()
        printed = (folder / "train.log").read_text()
        if options.log:
            options.log.write_text(printed)
        audit = within(
            *(FIRST, "-m", "tir_alp.audit", "runs/linked"), cwd=folder, stdout=subprocess.DEVNULL
        ).wait(300)
        until(lambda: not actors_left(), _END_S)
        account = asdict(account_of(run))
        result = {
            "actors": re.findall(r"^on .*", printed, re.MULTILINE),
            "was over before the link was back": was_over,
            "steps before": before,
            "steps during": meanwhile,
            "steps": steps(),
            "lost": sorted(
                set(re.findall(r"^(\S+) (?:is replaced|was lost)", printed, re.MULTILINE))
            ),
            "resumed": printed.count("the run goes on from step"),
            "second node lives": nodes[1].poll() is None,
            **account,
            "exit": training.returncode,
            "audit": audit,
            "left": actors_left(),
        }
    is_well = not (training.returncode or audit or result["left"] or account["unaccounted"])
    is_well = is_well and result["steps"] == options.steps
    if result["second node lives"]:  # otherwise the run may have completed on the first node
        is_well = is_well and not was_over
    print(json.dumps(result, indent=2))
    print("clean" if is_well else f"NOT clean; the run printed:\n{printed[-3000:]}")
    return int(not is_well)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
