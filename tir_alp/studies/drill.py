"""A fault drill: `python -m tir_alp.studies.drill [--faults N] [--dotted.key VALUE ...]`.

Trains the tiny model on a local cluster while processes of it are killed (SIGKILL) and frozen
(SIGSTOP) at random, then ends the run as Ctrl-C does, and checks what is left:

* Every group that was started was trained on, dropped with a reason, or is pending, exactly once.
* Rewards equal those of an undisturbed run on the same groups. The weights hardly move in a drill,
  and samples are functions of run seed and sequence, so trajectories can be compared one by one.
* No process, file descriptor or shared memory of the drill is left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tir_alp.cluster.placement import ClusterPlacement, open_cluster
from tir_alp.cluster.reservation import KINDS
from tir_alp.cluster.watched_actor import WatchedActor
from tir_alp.config import Config
from tir_alp.models.tiny import TRAIN_CONFIG
from tir_alp.process import run_command
from tir_alp.records.trajectories import from_record, state_from_record
from tir_alp.rollouts.queue import QueueState
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.run.interrupt import Interrupted
from tir_alp.run.supervise import train_from, train_stubbornly
from tir_alp.train import services
from tir_alp.training import checkpoint_folder
from tir_alp.types import Trajectory

DEFAULTS = {
    "rollout.groups_per_step": "4",
    "rollout.group_size": "4",
    "rollout.max_staleness": "1",
    "rollout.on_update": "keep",
    "rollout.env_timeout_s": "300",
    "trainer.lr": "1e-12",
    "eval.num_tasks": "1",
    "checkpoint.every": "1",
    "cluster.engines.count": "2",
    "cluster.environments.count": "2",
    "cluster.sandboxes.count": "2",
    "cluster.heartbeat_s": "1",
    "cluster.patience_s": "20",
}
"""Settings of a small run whose weights hardly move; two actors of each kind but the trainer."""

_MOUNT = 'mount -t tmpfs -o size=50% tmpfs /dev/shm && exec "$@"'
_HAS_OWN_MEMORY = "TIR_ALP_DRILL_HAS_OWN_MEMORY"
_PR_SET_CHILD_SUBREAPER = 36
_ENDLESS = 1_000_000  # steps; the drill ends the run
_END_TIMEOUT_S = 30.0
_STANDSTILL_S = 600.0
_SOCKETS_OF_RAY = 2


@dataclass(frozen=True, slots=True)
class Account:
    """What became of the groups of a run."""

    groups: int
    """Number of groups that were started."""
    trained: int
    """Number of groups that were trained on."""
    dropped: int
    """Number of groups that were replaced or lost."""
    pending: int
    """Number of groups that are pending in the newest checkpoint."""
    unaccounted: list[int]
    """Ids of the groups that are in none of the three, or in more than one."""
    last_trained: int
    """The highest id of a group that was trained on; -1 if none was."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a drill found."""

    faults: dict[str, int]
    """Number of faults of each kind, e.g. "engine SIGSTOP"."""
    seconds: float
    """Duration of the disturbed run."""
    steps: int
    """Number of training steps of the disturbed run."""
    account: Account
    """What became of the groups of the disturbed run."""
    compared: int
    """Number of trajectories that both runs have."""
    equal: int
    """Number of these that have the same tokens."""
    reward_difference: float
    """Mean reward of disturbed minus undisturbed, over the trajectories that both runs have."""
    reward_difference_error: float
    """Standard error of this mean."""
    orphans: list[str]
    """Processes that outlived the drill."""
    descriptors: list[str]
    """Files that this process has open and did not have open before. Not counted are those that Ray
    and matplotlib keep open until a process ends: a session's logs, event loops, fonts."""
    shared_memory: list[str]
    """Names below /dev/shm that no process has open and that did not exist before."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing was lost, repeated or left, and rewards are not biased.

        Ray leaves one or two sockets, on which it listened; 40 faults leave no more than 8.
        """
        is_over = len(self.descriptors) > _SOCKETS_OF_RAY
        left = self.account.unaccounted or self.orphans or self.shared_memory or is_over
        return not left and abs(self.reward_difference) <= 3 * self.reward_difference_error + 1e-9

    def to_record(self) -> dict[str, Any]:
        """Return the report as one flat JSON object."""
        fields = asdict(self)
        return fields.pop("account") | fields


async def drill(config: Config, faults: int, seed: int) -> Counter[str]:
    """Train on a cluster, cause faults, and end the run; return the number of faults by kind.

    Args:
        config: Config of the run.
        faults: Number of faults to cause.
        seed: Seed of the choice of faults.
    """
    done: Counter[str] = Counter()
    made = Path("runs", config.name or "", "trajectories")
    async with open_cluster(config) as cluster, asyncio.TaskGroup() as tasks:
        disturbing = tasks.create_task(disturb(cluster, made, faults, random.Random(seed), done))
        with contextlib.suppress(Interrupted):
            await train_stubbornly(cluster, config, None, services())
        disturbing.cancel()
    return done


async def disturb(
    cluster: ClusterPlacement, made: Path, faults: int, rng: random.Random, done: Counter[str]
) -> None:
    """Kill or freeze random actors; then, when all are running again, send SIGINT.

    Faults start after the first training step, and SIGINT is sent after one more step. The trainer
    is spared until a step has been made since it was last hit: a run that keeps losing its trainer
    without making a step gives up, as it should.

    Args:
        cluster: The cluster that the run is on.
        made: Folder with one file per step that the run has made.
        faults: Number of faults to cause.
        rng: Chooses actors, signals and pauses.
        done: Counts the faults by kind.

    Raises:
        TimeoutError: The run stands still, or does not end; the message says where.
    """

    def last_step() -> int:
        return max((int(each.stem[-6:]) for each in made.glob("step_*.jsonl")), default=0)

    async def wait_for(what: str, is_reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _STANDSTILL_S
        while not is_reached():
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"no {what} for {_STANDSTILL_S:g} s: step {last_step()}, {done.total()} faults,"
                    f" actors that are not running: {', '.join(absent(cluster)) or 'none'}"
                )
            await asyncio.sleep(0.2)

    async def wait_beyond(step: int) -> None:
        await wait_for(f"step after step {step}", lambda: last_step() > step)

    await wait_beyond(0)
    step_of_hit = 0
    while done.total() < faults:
        await asyncio.sleep(rng.uniform(0.2, 2.0))
        kind = rng.choice([*KINDS])
        running = [each for each in cluster.actors[kind] if each.actor is not None]
        how = rng.choice([signal.SIGKILL, signal.SIGSTOP])
        if kind == "trainer" and last_step() <= step_of_hit:
            continue
        if running and hit(rng.choice(running), how):
            step_of_hit = last_step() if kind == "trainer" else step_of_hit
            done[f"{KINDS[kind]} {how.name}"] += 1
            print(f"fault {done.total()}: {how.name} to an actor ({KINDS[kind]})", file=sys.stderr)
    await wait_beyond(last_step())
    await wait_for("replacement of every actor", lambda: not absent(cluster))
    os.kill(os.getpid(), signal.SIGINT)
    await wait_for("end of the run", lambda: False)


def absent(cluster: ClusterPlacement) -> list[str]:
    """Return the names of the actors that are not running."""
    everyone = (each for actors in cluster.actors.values() for each in actors)
    return [each.name for each in everyone if each.actor is None]


def hit(watched: WatchedActor, how: signal.Signals) -> bool:
    """Send a signal to the process of an actor; return whether there was such a process."""
    with contextlib.suppress(OSError, KeyError):
        pid = watched.health["pid"]
        if Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::"):  # the id was not reused
            os.kill(pid, how)
            return True
    return False


def measure(
    config: Config, faults: int, seed: int, folder: Path, twin_steps: int | None = None
) -> Report:
    """Make a drill and an undisturbed twin of its run, and compare them.

    Args:
        config: Config of both runs.
        faults: Number of faults to cause.
        seed: Seed of the choice of faults.
        folder: Folder for the runs, which becomes the working directory.
        twin_steps: The most steps that the twin makes; None: as many as the drill.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # this process adopts orphans
    os.chdir(folder)
    memory_before, files_before = set(os.listdir("/dev/shm")), open_files()
    start = time.monotonic()
    disturbed = config.model_copy(update={"name": "disturbed", "steps": _ENDLESS})
    done = asyncio.run(drill(disturbed, faults, seed))
    seconds = time.monotonic() - start
    orphans = left_over_processes()
    left_open = left_open_files(files_before)
    shared = sorted(set(os.listdir("/dev/shm")) - memory_before - shared_memory_in_use())

    account = account_of(folder / "runs" / "disturbed")
    _, found = trajectories(folder / "runs" / "disturbed")
    steps = math.ceil((account.last_trained + 1) / config.rollout.groups_per_step)
    twin = config.model_copy(
        update={
            "name": "undisturbed",
            "steps": max(min(steps, twin_steps or steps), 1),
            "cluster": config.cluster.model_copy(update={"address": "none"}),
        }
    )
    asyncio.run(train_from(twin, None, services()))
    _, twins = trajectories(folder / "runs" / "undisturbed")
    both = sorted(found.keys() & twins.keys())
    differences = [found[uid].reward - twins[uid].reward for uid in both]
    mean = sum(differences) / max(len(both), 1)
    variance = sum((each - mean) ** 2 for each in differences) / max(len(both) - 1, 1)
    return Report(
        faults=dict(sorted(done.items())),
        seconds=round(seconds, 1),
        steps=len(list((folder / "runs" / "disturbed" / "trajectories").iterdir())),
        account=account,
        compared=len(both),
        equal=sum(found[uid].token_ids == twins[uid].token_ids for uid in both),
        reward_difference=mean,
        reward_difference_error=math.sqrt(variance / max(len(both), 1)),
        orphans=orphans,
        descriptors=left_open,
        shared_memory=shared,
    )


def account_of(run: Path) -> Account:
    """Count the groups that a run folder records as trained, dropped and pending."""
    trained, _ = trajectories(run)
    dropped, queue = untrained(run)
    times = Counter([*trained, *dropped, *queue.pending])
    unaccounted = [each for each in range(queue.next_group) if times.pop(each, 0) != 1]
    return Account(
        groups=queue.next_group,
        trained=len(trained),
        dropped=len(dropped),
        pending=len(queue.pending),
        unaccounted=[*unaccounted, *times],
        last_trained=max(trained, default=-1),
    )


def trajectories(run: Path) -> tuple[list[int], dict[int, Trajectory]]:
    """Return the ids of the groups that a run trained on, and its trajectories by sequence uid.

    A group that two steps trained on is listed twice.
    """
    groups: list[int] = []
    found: dict[int, Trajectory] = {}
    for file in sorted((run / "trajectories").iterdir()):
        of_step = [from_record(json.loads(line)) for line in file.read_text().splitlines()]
        groups += {each.group_id for each in of_step}
        found |= {each.sequence_uid: each for each in of_step}
    return groups, found


def untrained(run: Path) -> tuple[list[int], QueueState]:
    """Return the ids of the groups that a run dropped, and the queue of its newest checkpoint."""
    records = [
        json.loads(line)
        for file in sorted((run / "ledger").iterdir())
        for line in file.read_text().splitlines()
    ]
    dropped = [each for each in records if each["kind"] == "group" and each["fate"] != "trained"]
    path, _, _ = checkpoint_folder.newest(run / "checkpoints")
    queue = state_from_record(checkpoint_folder.load_rollouts(path)["queue"])
    return [each["group_id"] for each in dropped], queue


def left_over_processes() -> list[str]:
    """Kill the descendants of this process that do not end in time; return their command lines."""
    deadline = time.monotonic() + _END_TIMEOUT_S
    while children := children_of(os.getpid()):
        for pid in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    names = []
    for pid in children:
        with contextlib.suppress(OSError):
            names.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip())
            os.kill(pid, signal.SIGKILL)
    return names


def children_of(pid: int) -> list[int]:
    """Return the process ids of all descendants of a process."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, file.read_text().split())
    return found + [each for child in found for each in children_of(child)]


def left_open_files(before: set[str]) -> list[str]:
    """Return what is open and was not before, after Ray has closed connections to lost actors."""
    deadline = time.monotonic() + _END_TIMEOUT_S
    while len(left := open_files() - before) > _SOCKETS_OF_RAY and time.monotonic() < deadline:
        time.sleep(0.2)
    return sorted(left)


def open_files() -> set[str]:
    """Return the open files of this process as texts "number name"."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of this listing is closed by now
            name = os.readlink(link)
            if not name.startswith(("anon_inode:", "/tmp/ray/")) and not name.endswith(".ttf"):
                found.add(f"{link.name} {name}")
    return found


def shared_memory_in_use() -> set[str]:
    """Return the names below /dev/shm that some process has mapped or open."""
    used = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            lines = (process / "maps").read_text().splitlines()
            used |= {line.rpartition("/dev/shm/")[2] for line in lines if "/dev/shm/" in line}
        with contextlib.suppress(OSError):
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    used.add(os.readlink(link).rpartition("/dev/shm/")[2])
    return used


def take_own_memory(arguments: Sequence[str]) -> None:
    """Restart this program with its own /dev/shm, if it runs as root.

    Without this, what other programs leave in /dev/shm during the drill would be counted.
    """
    own = ["unshare", "--mount", "sh", "-c", _MOUNT, "sh"]
    is_possible = (
        os.geteuid() == 0 and _HAS_OWN_MEMORY not in os.environ and shutil.which("unshare")
    )
    if is_possible and subprocess.run([*own, "true"], capture_output=True).returncode == 0:
        os.environ[_HAS_OWN_MEMORY] = "1"
        os.execvp(own[0], [*own, sys.executable, "-m", "tir_alp.studies.drill", *arguments])


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser("python -m tir_alp.studies.drill", description=__doc__)
    found.add_argument("--faults", type=int, default=200, help="number of faults")
    found.add_argument("--drill-seed", type=int, default=0, help="seed of the choice of faults")
    found.add_argument(
        "--twin-steps", type=int, help="the most steps of the undisturbed run; default: all"
    )
    found.add_argument(
        "--folder", type=Path, help="folder to keep the runs in; default: a temporary one"
    )
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the command; return 0 if nothing was lost, repeated or left."""
    options, words = parser().parse_known_args(arguments)
    defaults = [word for key, value in DEFAULTS.items() for word in (f"--{key}", value)]
    try:
        config = load_config([*defaults, "--cluster", "local", *words], read_toml(TRAIN_CONFIG))
    except ValueError as error:
        print(f"tir_alp.studies.drill: {error}", file=sys.stderr)
        return 2
    take_own_memory(arguments)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        report = measure(
            config, options.faults, options.drill_seed, folder.resolve(), options.twin_steps
        )
    print(json.dumps(report.to_record(), indent=2))
    print("clean" if report.is_clean else "NOT clean")
    return 0 if report.is_clean else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
