"""Processes of a run in containers: `test_image.py` starts this as an ordinary user who has podman.

    python -m tests.cluster.image_actors IMAGE OLD_IMAGE

OLD_IMAGE has other code of tir_alp. It prints one line of JSON with its observations.
"""

import asyncio
import json
import os
import signal
import sys

import ray

from tir_alp.cluster.placement import open_cluster
from tir_alp.cluster.reservation import KINDS, connect
from tir_alp.models.tiny import TRAIN_CONFIG
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.run.supervise import train_from
from tir_alp.train import services

SMALL = (
    *("--cluster", "local", "--steps", "1", "--eval.num_tasks", "4", "--name", "run"),
    *("--rollout.groups_per_step", "2", "--rollout.group_size", "2"),
    *("--cluster.trainer.cpus", "0.5", "--cluster.engines.cpus", "0.5"),
    *("--cluster.environments.cpus", "0.5", "--cluster.sandboxes.cpus", "0.5"),
    *("--cluster.start_timeout_s", "120", "--cluster.heartbeat_s", "0.5"),
)


def config_of(images, *words):
    chosen = [word for kind, image in images.items() for word in (f"--cluster.{kind}.image", image)]
    return load_config([*SMALL, *chosen, *words], read_toml(TRAIN_CONFIG))


async def refusal(image):
    try:
        async with open_cluster(config_of({"environments": image})):
            return "nothing"
    except ValueError as error:
        return str(error)


def is_contained(pid):
    own, other = (os.stat(f"/proc/{each}/ns/mnt").st_ino for each in ("self", pid))
    return own != other


async def replacement(image):
    """Whether an actor that is killed is in a container, and so is the one that replaces it."""
    async with open_cluster(config_of({"environments": image})) as cluster:
        (host,) = cluster.actors["environments"]
        seen = []
        for number in range(2):
            while host.actor is None or not host.health or host.generation != number:
                await asyncio.sleep(0.05)
            seen.append(is_contained(host.health["pid"]))
            if number == 0:
                os.kill(host.health["pid"], signal.SIGKILL)
        return seen


async def main(image, old):
    async with asyncio.timeout(500):
        every = config_of(dict.fromkeys(KINDS, image), "--cluster.sandboxes.count", "1")
        connect(every.cluster, print)
        await train_from(every, None, services())
        found = {
            "missing": await refusal("localhost/nothing:there"),
            "old": await refusal(old),
            "replaced": await replacement(image),
        }
    ray.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
