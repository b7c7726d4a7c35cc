"""A fault drill: `python -m tir_alp.studies.drill [--faults N] [--dotted.key VALUE ...]`.

Trains the tiny model on a cluster on this machine while parts of it are killed (SIGKILL) and frozen
(SIGSTOP) at random, then ends the run as Ctrl-C does, and looks at what is left:

* every group that was begun was trained on, dropped with a reason, or is pending, exactly once;
* rewards are those of a run that nothing disturbs, of the same groups: the weights hardly move in a
  drill, and draws are functions of run seed and sequence, so that trajectories can be compared one
  by one;
* no process, no file descriptor and no shared memory of the drill is left.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tir_alp.cluster.placement import ClusterPlacement, open_cluster
from tir_alp.cluster.reservation import KINDS
from tir_alp.cluster.watched_actor import WatchedActor
from tir_alp.config import Config, load_config, read_toml
from tir_alp.models.tiny import TRAIN_CONFIG
from tir_alp.records.trajectories import from_row, state_from_row
from tir_alp.rollouts.queue import QueueState
from tir_alp.run.interrupt import Interrupted
from tir_alp.run.supervise import train_from, train_stubbornly
from tir_alp.train import train
from tir_alp.training import checkpoint
from tir_alp.types import Trajectory

DEFAULTS = (
    *("--rollout.groups_per_step", "4", "--rollout.group_size", "4"),
    *("--rollout.max_staleness", "1", "--rollout.on_update", "keep"),
    *("--rollout.env_timeout_s", "300", "--trainer.lr", "1e-12"),
    *("--eval.num_tasks", "1", "--checkpoint.every", "1"),
    *("--cluster.engines.count", "2", "--cluster.environments.count", "2"),
    *("--cluster.sandboxes.count", "2", "--cluster.heartbeat_s", "1", "--cluster.patience_s", "20"),
)
"""A small run whose weights hardly move, on two parts of each kind but the trainer."""

_MOUNT = 'mount -t tmpfs -o size=50% tmpfs /dev/shm && exec "$@"'
_IS_OWN = "TIR_ALP_DRILL_HAS_OWN_MEMORY"
_PR_SET_CHILD_SUBREAPER = 36
_LONG = 1_000_000  # steps; the drill ends the run
_ENDING_S = 30.0
_SOCKETS_OF_RAY = 2


@dataclass(frozen=True, slots=True)
class Account:
    """What became of the groups of a run."""

    groups: int
    """Groups that were begun."""
    trained: int
    dropped: int
    pending: int
    unaccounted: list[int]
    """Groups that are in none of the three, or in more than one."""
    last_trained: int
    """The highest number among the trained; -1: none."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a drill found."""

    faults: dict[str, int]
    """How many of each kind, e.g. "engine SIGSTOP"."""
    seconds: float
    steps: int
    groups: int
    """This and the next four: see `Account`."""
    trained: int
    dropped: int
    pending: int
    unaccounted: list[int]
    compared: int
    """Trajectories that both runs have."""
    equal: int
    """Of these, with the same tokens."""
    reward_difference: float
    """Mean of drill minus undisturbed, over trajectories that both have."""
    reward_difference_error: float
    """Its standard error."""
    orphans: list[str]
    """Processes that outlived the drill."""
    descriptors: list[str]
    """Open files of this process that were not open before, without those that Ray and matplotlib
    leave open to the end of a process: a session's logs and event loops, fonts."""
    shared_memory: list[str]
    """Names below /dev/shm that nobody has open, and that were not there before."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing was lost, repeated or left behind, and the reward is not biased.

        Ray leaves one or two sockets, on which it listened; 40 faults leave no more than 8.
        """
        few = len(self.descriptors) <= _SOCKETS_OF_RAY
        left = self.unaccounted or self.orphans or self.shared_memory or not few
        return not left and abs(self.reward_difference) <= 3 * self.reward_difference_error + 1e-9


async def drill(config: Config, faults: int, seed: int) -> Counter[str]:
    """Train on a cluster, disturb it so many times, and end the run; returns the faults."""
    done: Counter[str] = Counter()
    made = Path("runs", config.name or "", "trajectories")
    async with open_cluster(config) as cluster:
        disturbing = asyncio.create_task(disturb(cluster, made, faults, random.Random(seed), done))
        try:
            with contextlib.suppress(Interrupted):
                await train_stubbornly(cluster, config, None, train)
        finally:
            disturbing.cancel()
            results = await asyncio.gather(disturbing, return_exceptions=True)
        errors = [each for each in results if isinstance(each, Exception)]
        if errors:
            raise errors[0]
    return done


async def disturb(
    cluster: ClusterPlacement, made: Path, faults: int, rng: random.Random, done: Counter[str]
) -> None:
    """Kill or freeze a random part again and again; then, when all are well, ask for the end.

    It begins behind the first step, a file of which is in `made`, and ends behind another one. The
    trainer is left alone until there is a step since it was last hit: a run that loses it again and
    again without a step gives up, as it should.
    """

    def last() -> int:
        return max((int(each.stem[-6:]) for each in made.glob("step_*.jsonl")), default=0)

    async def until_behind(step: int) -> None:
        while last() <= step:
            await asyncio.sleep(0.2)

    await until_behind(0)
    at_trainer = 0
    while done.total() < faults:
        await asyncio.sleep(rng.uniform(0.2, 2.0))
        kind = rng.choice([*KINDS])
        there = [each for each in cluster.actors[kind] if each.actor is not None]
        how = rng.choice([signal.SIGKILL, signal.SIGSTOP])
        if kind == "trainer" and last() <= at_trainer:
            continue
        if there and hit(rng.choice(there), how):
            at_trainer = last() if kind == "trainer" else at_trainer
            done[f"{KINDS[kind]} {how.name}"] += 1
            print(f"fault {done.total()}: {how.name} to an actor of kind {kind}", file=sys.stderr)
    await until_behind(last())
    while not all(each.actor for actors in cluster.actors.values() for each in actors):
        await asyncio.sleep(0.2)
    os.kill(os.getpid(), signal.SIGINT)


def hit(slot: WatchedActor, how: signal.Signals) -> bool:
    """Send a signal to the process of an actor, if its id is known."""
    with contextlib.suppress(OSError, KeyError):
        pid = slot.health["pid"]
        if Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::"):  # and no other since
            os.kill(pid, how)
            return True
    return False


def measure(config: Config, faults: int, seed: int, folder: Path) -> Report:
    """Make a drill and its undisturbed twin in `folder`, and compare what they left."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans come to this process
    os.chdir(folder)
    before = set(os.listdir("/dev/shm")), open_files()
    began = time.monotonic()
    disturbed = config.model_copy(update={"name": "disturbed", "steps": _LONG})
    done = asyncio.run(drill(disturbed, faults, seed))
    seconds = time.monotonic() - began
    orphans = left_over_processes()
    left_open = left_open_files(before[1])
    shared = sorted(set(os.listdir("/dev/shm")) - before[0] - shared_memory_in_use())

    account = account_of(folder / "runs" / "disturbed")
    _, rows = trajectories(folder / "runs" / "disturbed")
    steps = math.ceil((account.last_trained + 1) / config.rollout.groups_per_step)
    twin = config.model_copy(
        update={
            "name": "undisturbed",
            "steps": max(steps, 1),
            "cluster": config.cluster.model_copy(update={"address": "none"}),
        }
    )
    asyncio.run(train_from(twin, None, train))
    _, twins = trajectories(folder / "runs" / "undisturbed")
    both = sorted(rows.keys() & twins.keys())
    differences = [rows[uid].reward - twins[uid].reward for uid in both]
    mean = sum(differences) / max(len(both), 1)
    variance = sum((each - mean) ** 2 for each in differences) / max(len(both) - 1, 1)
    return Report(
        faults=dict(sorted(done.items())),
        seconds=round(seconds, 1),
        steps=len(list((folder / "runs" / "disturbed" / "trajectories").iterdir())),
        groups=account.groups,
        trained=account.trained,
        dropped=account.dropped,
        pending=account.pending,
        unaccounted=account.unaccounted,
        compared=len(both),
        equal=sum(rows[uid].token_ids == twins[uid].token_ids for uid in both),
        reward_difference=mean,
        reward_difference_error=math.sqrt(variance / max(len(both), 1)),
        orphans=orphans,
        descriptors=left_open,
        shared_memory=shared,
    )


def account_of(run: Path) -> Account:
    """Count what a run's folder has as trained, dropped and pending."""
    trained, _ = trajectories(run)
    dropped, queue = others(run)
    every = Counter([*trained, *dropped, *queue.pending])
    unaccounted = [each for each in range(queue.next_group) if every.pop(each, 0) != 1]
    return Account(
        groups=queue.next_group,
        trained=len(trained),
        dropped=len(dropped),
        pending=len(queue.pending),
        unaccounted=[*unaccounted, *every],
        last_trained=max(trained, default=-1),
    )


def trajectories(run: Path) -> tuple[list[int], dict[int, Trajectory]]:
    """Ids of the groups that a run trained on, a step's once, and its trajectories by uid."""
    groups: list[int] = []
    found: dict[int, Trajectory] = {}
    for file in sorted((run / "trajectories").iterdir()):
        rows = [from_row(json.loads(line)) for line in file.read_text().splitlines()]
        groups += {row.group_id for row in rows}
        found |= {row.sequence_uid: row for row in rows}
    return groups, found


def others(run: Path) -> tuple[list[int], QueueState]:
    """Ids of the groups that a run dropped, and what is pending in its newest checkpoint."""
    rows = [
        json.loads(line)
        for file in sorted((run / "ledger").iterdir())
        for line in file.read_text().splitlines()
    ]
    groups = [row for row in rows if row["kind"] == "group" and row["fate"] != "trained"]
    path, _, _ = checkpoint.newest(run / "checkpoints")
    queue = state_from_row(checkpoint.load_rollouts(path)["queue"])
    return [row["group_id"] for row in groups], queue


def left_over_processes() -> list[str]:
    """Descendants of this process that do not end by themselves; they are killed then."""
    deadline = time.monotonic() + _ENDING_S
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
    """Process ids below one, direct children and others."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, file.read_text().split())
    return found + [each for child in found for each in children_of(child)]


def left_open_files(before: set[str]) -> list[str]:
    """What is open and was not before. Ray's connections to parts that are gone take a moment."""
    deadline = time.monotonic() + _ENDING_S
    while len(left := open_files() - before) > _SOCKETS_OF_RAY and time.monotonic() < deadline:
        time.sleep(0.2)
    return sorted(left)


def open_files() -> set[str]:
    """What this process has open, by number and name."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of this very folder
            name = os.readlink(link)
            if not name.startswith(("anon_inode:", "/tmp/ray/")) and not name.endswith(".ttf"):
                found.add(f"{link.name} {name}")
    return found


def shared_memory_in_use() -> set[str]:
    """Names below /dev/shm that some process has mapped or open."""
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
    """Start again with a /dev/shm of its own, where root may have one.

    Otherwise, what other programs leave in it meanwhile would count as the drill's.
    """
    own = ["unshare", "--mount", "sh", "-c", _MOUNT, "sh"]
    may = os.geteuid() == 0 and _IS_OWN not in os.environ and shutil.which("unshare")
    if may and subprocess.run([*own, "true"], capture_output=True).returncode == 0:
        os.environ[_IS_OWN] = "1"
        os.execvp(own[0], [*own, sys.executable, "-m", "tir_alp.studies.drill", *arguments])


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns 0 if nothing was lost, repeated or left behind."""
    take_own_memory(arguments)
    parser = argparse.ArgumentParser("tir_alp.studies.drill", description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--drill-seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs are kept; default: nowhere")
    options, words = parser.parse_known_args(arguments)
    config = load_config([*DEFAULTS, "--cluster", "local", *words], read_toml(TRAIN_CONFIG))
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        report = measure(config, options.faults, options.drill_seed, folder.resolve())
    print(json.dumps(asdict(report), indent=2))
    print("clean" if report.is_clean else "NOT clean")
    return 0 if report.is_clean else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
