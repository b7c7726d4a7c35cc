"""One rank under NCCL (on a CPU: gloo): the trainer's collective calls, and updates through them.

The rank joins as `torch.distributed.run` would start it. Its updates are compared with those that
the same trainer makes on the CPU.
"""

from __future__ import annotations

import os
import socket
import sys

import torch
import torch.distributed as dist
from torch.cuda import nccl

from tests.gpu.part import Task, perform, seconds_of
from tests.training.harness import make_groups, model, noisy, trainer, weights_of
from tir_alp.training.ranks import Ranks, alone, join


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def updates(ranks: Ranks) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Make two updates of the tests' model; return their losses and the weights after them."""
    made = trainer(noisy(), model(), ranks=ranks)
    groups = make_groups(2)
    losses = [made.step(groups, step).metrics["loss/value"] for step in range(2)]
    return losses, {name: each.cpu() for name, each in weights_of(made).items()}


def work(task: Task) -> None:
    """Join, sum, gather and train."""
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ |= here | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with join(60.0, task.device) as ranks:
        report = task.report
        report.add("backend", str(dist.get_backend_config()))
        version = "not used"
        if task.device.type == "cuda":
            version = ".".join(map(str, nccl.version()))
        report.add("nccl", version)
        report.add("ranks", ranks.size)
        values = torch.arange(task.scale.reduced_bytes // 4, device=task.device).float()
        assert torch.equal(ranks.sum(values), values) and ranks.gather("x") == ["x"]
        seconds = seconds_of(lambda: ranks.sum(values), task.device, 2, 5)
        report.add("sum", {"bytes": task.scale.reduced_bytes, "seconds": seconds})
        losses, weights = updates(ranks)
        expected, others = updates(alone("cpu"))
        report.add("losses", {"here": losses, "cpu": expected})
        # Where a gradient is near 0, Adam makes of its rounding a step of the learning rate.
        mean = max((weights[name] - others[name]).abs().mean().item() for name in others)
        report.add("mean_difference_of_weights", mean)
        if mean > 1e-5 or any(abs(a - b) > 1e-2 for a, b in zip(losses, expected, strict=True)):
            raise ValueError(f"updates differ from those of the CPU: {losses} and {expected}")


if __name__ == "__main__":
    sys.exit(perform(work))
