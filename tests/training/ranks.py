"""The program of the ranks of `test_ranks.py`.

`python -m torch.distributed.run --nproc-per-node N tests/training/ranks.py TASK FOLDER`
"""

import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.training.harness import (
    Groups,
    gradients,
    make_groups,
    noisy,
    trainer,
    weights_of,
    with_advantage,
)
from tir_alp.algorithm.presets import (
    ALGORITHMS,
    NEGATIVE_LOG_LIKELIHOOD,
    AcceptanceConfig,
    AlgorithmConfig,
    CorrectionConfig,
    KLConfig,
    SelectionConfig,
)
from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.training import checkpoint
from tir_alp.training.checkpoint_folder import Position
from tir_alp.training.policy import compute_device
from tir_alp.training.ranks import RankFailed, Ranks, join
from tir_alp.training.trainer import Trainer

DEVICE = compute_device("auto")
KEPT = CorrectionConfig(type="mis", low=0.995, high=1.005, normalise="kept")
UNDONE = "updates that are undone"
CASES: dict[str, tuple[AlgorithmConfig, dict[str, Any]]] = {
    "some sequences at a time": (noisy(), {"micro_batch_tokens": 50}),
    "noise on the logits": (noisy(site="logits", draws=2), {"gradient_checkpointing": True}),
    "denominators that are only known after a forward": (
        ALGORITHMS["mis_token"].model_copy(
            update={"correction": KEPT, "kl": KLConfig(coefficient=0.1)}
        ),
        {"micro_batch_tokens": 50},
    ),
    "offloaded and computed twice": (noisy(), {"offload": True, "gradient_checkpointing": True}),
    # Adam enlarges rounding by the learning rate where a gradient is near 0.
    "adapters": (noisy(), {"lora": {"rank": 4, "alpha": 8.0}, "lr": 1e-3}),
    "supervised fine-tuning": (NEGATIVE_LOG_LIKELIHOOD, {"micro_batch_tokens": 50}),
    "what is read of all tokens of an update, and of versions": (
        ALGORITHMS["tir_otb"].model_copy(
            update={
                "selection": SelectionConfig(type="top_entropy", share=0.5),
                "proximal": "rollout_version",
                "step_scale": "ess",
            }
        ),
        {"micro_batch_tokens": 50, "num_kept_versions": 1, "clean_every": 1},
    ),
    "a baseline by gradients of single sequences": (
        ALGORITHMS["vcpo"],
        {"micro_batch_tokens": 50, "lr": 3e-5},  # as with adapters
    ),
    UNDONE: (
        ALGORITHMS["mipu"].model_copy(
            update={"acceptance": AcceptanceConfig(tolerance=0.0, last_tolerance=0.0)}
        ),
        {"micro_batch_tokens": 50},
    ),
    "bfloat16": (noisy(init_std=0.01), {"dtype": "bfloat16", "gradient_checkpointing": True}),
}
"""Kinds of training that must not depend on the number of ranks."""

Result = tuple[list[dict[str, float]], dict[str, Tensor], dict[str, Tensor]]


def train(ranks: Ranks, case: str, folder: Path | None = None) -> Result:
    """Make two steps; return their metrics, the gradients of the first, and the final weights.

    With a folder, a checkpoint is saved there between the steps.
    """
    algorithm, own = CASES[case]
    settings: dict[str, Any] = {"max_grad_norm": 0.5} | own
    one = trainer(algorithm, ranks=ranks, **settings)
    reports = [one.step(make_groups(), 0).metrics]
    found = gradients(one)
    if folder is not None:
        checkpoint.save(folder, one, make_tokenizer(), Position(1, 4), {}, keep=1)
    reports.append(one.step(make_groups(), 1).metrics)
    return reports, found, weights_of(one)


def go_on(ranks: Ranks, case: str, folder: Path) -> Result:
    """Make the second of these steps, from the checkpoint."""
    algorithm, own = CASES[case]
    settings: dict[str, Any] = {"max_grad_norm": 0.5} | own
    one = trainer(algorithm, ranks=ranks, **settings)
    checkpoint.load(folder / "step_1", one)
    return [one.step(make_groups(), 1).metrics], gradients(one), weights_of(one)


def overflow(ranks: Ranks) -> list[tuple[float | None, bool, bool]]:
    """Train in float16 while gradients overflow, also where only one rank has the infinity.

    Returns:
        For each update: the loss scale after it, whether it was made, and whether norms are finite.
    """
    one = trainer(noisy(init_std=0.01), ranks=ranks, dtype="float16")
    optimizer, found = one._optimizer, []
    state = {"loss_scale": torch.tensor([2.0**22, 0], dtype=torch.float64)}
    optimizer.finish_loading(state)
    for step in range(8):
        metrics = one.step(make_groups(), step).metrics
        found.append((optimizer.loss_scale, metrics["train/skipped_updates"] == 0, True))
    one.step(make_groups(), 8)
    weight = next(each for each in one.model.parameters() if each.grad is not None)
    if ranks.rank == ranks.size - 1:
        weight.grad.to_local().flatten()[0] = torch.inf  # type: ignore[union-attr]
    norms = optimizer.clip_gradients()
    only_scale = optimizer.skip(is_loss_finite=True)
    found.append((optimizer.loss_scale, not only_scale, math.isfinite(max(norms.values()))))
    return found


def fail(ranks: Ranks) -> str:
    """Make a step in which only the last rank fails; return the error of this one."""

    def full(update: int, _: Any) -> None:
        if ranks.rank == ranks.size - 1:
            raise OSError("the disk is full")

    return said_in(trainer(noisy(), ranks=ranks, bad=full), with_advantage(make_groups(), math.nan))


def die(ranks: Ranks) -> str:
    """Make a step before which the last rank is killed; return the error of this one."""
    one = trainer(noisy(), ranks=ranks)
    if ranks.rank == ranks.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher sends it when it sees a rank die
    return said_in(one, make_groups())


def said_in(one: Trainer, groups: Groups) -> str:
    try:
        one.step(groups, 0)
    except (RankFailed, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing failed"


def failures(folder: Path) -> None:
    """Let a rank fail but stay alive; then, in another group, kill a rank."""
    with join(10, DEVICE) as ranks:
        said = folder / f"fail_{ranks.rank}"
        said.write_text(fail(ranks))
        while not (folder / "fail_0").exists():  # till then no closed connection reveals it
            time.sleep(0.05)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, rank=ranks.rank, world_size=ranks.size)
    with join(10, DEVICE) as ranks:
        (folder / f"die_{ranks.rank}").write_text(die(ranks))


def main(task: str, folder: Path) -> None:
    """Train, then resume from the checkpoints in `one/`; or fail. Results go into the folder."""
    torch.set_num_threads(1)
    if task == "failures":
        return failures(folder)
    with join(120, DEVICE) as ranks:
        found = {case: train(ranks, case, folder / case) for case in CASES}
        torch.save(found, folder / f"train_{ranks.rank}.pt")
        torch.save(overflow(ranks), folder / f"overflow_{ranks.rank}.pt")
        others = {case: folder / "one" / case for case in CASES}
        gone_on = {case: go_on(ranks, case, path) for case, path in others.items() if path.exists()}
        torch.save(gone_on, folder / f"go_on_{ranks.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
