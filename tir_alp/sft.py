"""Teaches a model by demonstration: `python -m tir_alp.sft --data.path FILE [--dotted.key VALUE]`.

Supervised fine-tuning on conversations, before reinforcement learning: the same renderer, masks,
packing, trainer, checkpoints and records as `tir_alp.train`. A conversation is the trajectory that
a rollout would have made of it, and the loss is the mean of -log pi over the assistant's tokens.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tir_alp.config import Config, SFTConfig
from tir_alp.process import run_command, torch_imports
from tir_alp.records.folder import RunFolder, read_run_config
from tir_alp.roles import RoleLost
from tir_alp.run.command_line import Command, lay_over, parse_as, read_toml
from tir_alp.run.interrupt import Interrupted
from tir_alp.run.loop import due, keep_if_best, with_trainer
from tir_alp.training.checkpoint_folder import Position
from tir_alp.types import Sample, TrajectoryGroup

if TYPE_CHECKING:
    from tir_alp.run.open_sft import PreparedSFT, SFTRun
    from tir_alp.run.supervise import Services

CHANGEABLE = (
    *("steps", "epochs", "trackers", "eval", "checkpoint", "records", "doctor"),
    "cluster",
)
"""Settings that may differ when a run is resumed."""

_COMMAND = Command(
    """\
usage: python -m tir_alp.sft --data.path FILE [--config FILE] [--dotted.key VALUE ...]
       python -m tir_alp.sft --from-run RUN [--min-reward 1] [--dotted.key VALUE ...]
       python -m tir_alp.sft --resume RUN [--steps N]

Teach a model by demonstration: conversations in a file, or the trajectories of a run or an
evaluation that earned enough reward.""",
    {
        "config FILE": "TOML file with settings",
        "from-run RUN": "learn from the trajectories in this folder of a run or an evaluation",
        "min-reward NUMBER": "only from those with at least this reward (default: 1)",
        "resume RUN": f"go on with the run in this folder; may change {', '.join(CHANGEABLE)}",
        "cluster ADDRESS": "where processes live: none, local, auto or ray://HOST:PORT",
    },
    SFTConfig,
)

_KEPT = ("loss/value", "train/", "tokens/", "entropy/", "grad_norm/")
"""Metrics of the trainer that mean something without rollouts."""


async def train(run: SFTRun) -> None:
    """Train from the run's position to its last step, measuring the held-out loss on the way.

    Raises:
        Interrupted: The run ended early, and was saved.
    """
    config, step = run.config, run.position.step
    steps = config.steps or 0
    with run.console.training(step, steps):
        try:
            if step == 0:
                await measure(run, 0)
            while step < steps:
                run.interrupt.check()
                await learn(run, step)
                step += 1
                if due(step, config.eval.every) and step < steps:
                    await measure(run, step)
                if due(step, config.checkpoint.every) or step == steps:
                    await save(run, step)
            if step > 0:
                await measure(run, step)
        except Interrupted:
            with suppress(RoleLost):  # then the checkpoint before it has to do
                await save(run, step)
            raise


async def learn(run: SFTRun, step: int) -> None:
    """Make the update of a step, record it and log it."""
    began = time.monotonic()
    samples = await asyncio.to_thread(run.samples, step)
    packed_at = time.monotonic()
    report = await with_trainer(run, run.trainer.step, samples, step)
    ended = time.monotonic()
    run.ledger.updated(report.updates)
    run.folder.record_values(step + 1, report.values)
    groups = groups_of(samples)
    run.folder.record(step + 1, groups, (), run.ledger.take(groups, (), ()))
    metrics = {name: value for name, value in report.metrics.items() if name.startswith(_KEPT)}
    metrics["time/train"], metrics["time/read"] = ended - packed_at, packed_at - began
    num_tokens = sum(len(each.trajectory.token_ids) for traces in samples for each in traces)
    metrics["tokens/per_second"] = num_tokens / (ended - began)
    metrics["epoch"] = (step + 1) * len(samples) / len(run.demonstrations.trained)
    run.folder.log(step + 1, metrics)
    run.console.step(step + 1, metrics)


async def measure(run: SFTRun, step: int) -> None:
    """Compute the loss on held-out conversations, log it, and save the weights if it is lowest."""
    held_out = await asyncio.to_thread(run.held_out)
    if not held_out:
        return
    loss = await with_trainer(run, run.trainer.mean_loss, held_out)
    run.folder.log(step, {"eval/loss": loss})
    run.console.print(
        f"step {step}: loss {loss:.4f} on {len(run.demonstrations.held_out)} held-out conversations"
    )
    if run.config.checkpoint.best:
        await keep_if_best(run.folder.checkpoints, step, -loss, lambda: save(run, step))


async def save(run: SFTRun, step: int) -> None:
    """Write a checkpoint of the run after `step` steps."""
    position = Position(step=step, group=step * run.config.sequences_per_step)
    folder, keep = run.folder.checkpoints, run.config.checkpoint.keep
    ends = run.renderer.stop_token_ids
    await with_trainer(run, run.trainer.save, folder, position, {}, keep, ends)


def groups_of(samples: Sequence[Sequence[Sample]]) -> list[TrajectoryGroup]:
    """Return each conversation as a group of its own, as records have them."""
    trajectories = [traces[0].trajectory for traces in samples]  # the others are its branches
    return [TrajectoryGroup(each.task_id, each.group_id, (each,)) for each in trajectories]


def read_arguments(arguments: Sequence[str]) -> tuple[SFTConfig, Path | None]:
    """Build the config of a new run, or of one to go on with by `--resume FOLDER`.

    Raises:
        ValueError: With one line for each mistake.
    """
    words = _COMMAND.read(arguments)
    values, options = dict(words.values), words.options
    if "resume" in options:
        folder = Path(options["resume"])
        saved = read_run_config(folder)
        below = dict(saved)
        if "epochs" in values:  # a saved config has the number of steps that its epochs made
            below["steps"] = None
        config = parse_as(SFTConfig, lay_over(values, below))
        for name, value in parse_as(SFTConfig, saved):
            if name not in CHANGEABLE and getattr(config, name) != value:
                raise ValueError(
                    f"{name} cannot change in the middle of a run; with --resume only "
                    f"{', '.join(CHANGEABLE)} can"
                )
        return config, folder
    if "from-run" in options:
        data = {"source": "run", "path": options["from-run"], **values.get("data", {})}
        values["data"] = data
    if "min-reward" in options:
        values["data"] = {**values.get("data", {}), "min_reward": options["min-reward"]}
    below = read_toml(Path(options["config"])) if "config" in options else {}
    if "from-run" in options:
        below.pop("data", None)
    if "data" not in values and "data" not in below:
        raise ValueError("there is nothing to learn from: give --data.path FILE or --from-run RUN")
    return parse_as(SFTConfig, lay_over(values, below)), None


def services(config: SFTConfig, prepared: PreparedSFT) -> Services[SFTRun]:
    """What a run uses of the layers above it. Imported when a run starts, since it needs torch.

    Args:
        config: Config of the run.
        prepared: Its inputs, for the first time that it is opened.
    """
    from tir_alp.cluster import open_cluster
    from tir_alp.doctor.start import Doctor
    from tir_alp.run.describe import describe_sft_end, describe_sft_start
    from tir_alp.run.open_sft import open_sft, prepare_sft
    from tir_alp.run.supervise import Services
    from tir_alp.train import draw_report

    return Services(
        open=lambda _, placement, resume, interrupt, examined: open_sft(
            lambda log: prepared if examined is None else prepare_sft(config, resume, log),
            placement,
            Doctor(),
            interrupt=interrupt,
            examined=examined,
        ),
        train=train,
        describe_start=lambda run: describe_sft_start(
            run.config,
            len(run.demonstrations.trained),
            run.demonstrations.num_tokens,
            run.folder.path,
        ),
        describe_end=lambda run: describe_sft_end(run.folder.path, run.config.steps or 0),
        open_cluster=open_cluster,
        draw_report=draw_report,
        command="sft",
    )


def play_held_out(config: SFTConfig, run: Path) -> None:
    """Play the tasks of `eval.data` with the last checkpoint, as `tir_alp.evaluate` does.

    Raises:
        ValueError: For what a user can fix.
    """
    from tir_alp.evaluate import evaluate, show
    from tir_alp.records.evaluation_folder import write_result
    from tir_alp.run.model_choice import checkpoint_of

    model = checkpoint_of(run, str(config.steps))
    settings = config.as_run()
    found = settings.model.model_copy(update={"path": model.path})
    settings = settings.model_copy(update={"model": found, "name": None})
    label = "-".join(each.label for each in config.eval.data)
    out = run / "evaluations" / f"{label}-k{config.eval.samples}-step{model.version}"
    result = asyncio.run(evaluate(settings, model, out))
    print(f"result: {write_result(out, result)}")
    show(result)


def for_trainer(config: SFTConfig) -> Config:
    """The config of the trainer: it learns the distribution at temperature 1."""
    run = config.as_run()
    rollout = run.rollout.model_copy(update={"temperature": 1.0})
    return run.model_copy(update={"rollout": rollout})


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code: 2 for what the user has to fix."""
    try:
        config, resume = read_arguments(arguments)
        if resume is None and config.name is not None:
            RunFolder(Path("runs") / config.name).check_is_new()
    except ValueError as error:
        print(f"tir_alp.sft: {error}", file=sys.stderr)
        return 2
    # Imported here because it needs torch, and a mistake in the command line is answered at once.
    with torch_imports():
        from tir_alp.run.finish import finish
        from tir_alp.run.open_sft import prepare_sft
        from tir_alp.run.supervise import train_from

    def work() -> None:
        print(f"reading the model {config.model.path!r} and the conversations", flush=True)
        prepared = prepare_sft(config, resume, lambda line: print(line, flush=True))
        services_of = services(config, prepared)
        asyncio.run(train_from(for_trainer(prepared.config), resume, services_of))
        if prepared.config.eval.data and prepared.config.steps:
            play_held_out(prepared.config, prepared.folder.path)

    return finish("sft", work)


if __name__ == "__main__":
    sys.exit(run_command(main, imports=True))
