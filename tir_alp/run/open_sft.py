"""Opens a run of supervised fine-tuning, in the stages of `open_run`, and closes it again."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gymnasium

from tir_alp.config import Config, SFTConfig
from tir_alp.records.folder import RunFolder
from tir_alp.records.ledger import Ledger
from tir_alp.records.readable import reading
from tir_alp.records.trackers import check_trackers
from tir_alp.roles import Node, Placement, TrainerRole
from tir_alp.rollouts.data import Shuffled, load_eval_sets
from tir_alp.rollouts.demonstration import Demonstrator
from tir_alp.rollouts.environment import make_environment
from tir_alp.rollouts.renderer import Renderer, make_renderer
from tir_alp.run.beginning import beginning, check_files, check_steps, first_weights, run_name
from tir_alp.run.console import RunConsole
from tir_alp.run.data_fingerprint import Fingerprints, fingerprints, write_fingerprints
from tir_alp.run.demonstrations import (
    Demonstrations,
    describe,
    files_of,
    open_demonstrations,
)
from tir_alp.run.interrupt import Interrupt
from tir_alp.run.open_run import Examined
from tir_alp.run.prepare import describe_left_out
from tir_alp.training.checkpoint_folder import Position
from tir_alp.types import Origin, Sample

OBJECTIVE = "sft: minimise the mean of -log pi(y_t) over the assistant's tokens"

COLUMNS = {
    "loss": ("loss/value", ".4f"),
    "norm": ("grad_norm/policy", ".3f"),
    "entropy": ("entropy/mean", ".3f"),
    "tokens": ("tokens/loss", ".0f"),
    "tok/s": ("tokens/per_second", ".0f"),
    "train s": ("time/train", ".2f"),
}
"""What the console shows of a step: heading -> metric, format."""
LEGEND = (
    "columns: loss, nats per token of the assistant; norm, of the gradient before clipping; "
    "entropy, nats per token; tokens, of the assistant in the step; tok/s, of all tokens; seconds "
    "of training"
)


@dataclass(frozen=True, slots=True)
class PreparedSFT:
    """A run of supervised fine-tuning whose inputs are all there."""

    config: SFTConfig
    """With the number of steps that its epochs make."""
    folder: RunFolder
    position: Position
    checkpoint: Path | None
    initial_model: str
    origin: Origin
    tokenizer: Any
    renderer: Renderer
    demonstrations: Demonstrations
    files: Fingerprints

    @property
    def model_path(self) -> str:
        """Folder or id of the weights that the run goes on with."""
        return self.initial_model if self.checkpoint is None else str(self.checkpoint)


class SFTChecks(Protocol):
    """Examines a run of supervised fine-tuning before it begins."""

    def before_sft(
        self, prepared: PreparedSFT, env: gymnasium.Env[str, str], nodes: Sequence[Node]
    ) -> Sequence[str]:
        """Check what needs no weights; returns warnings. Raises ValueError."""
        ...


@dataclass(frozen=True, slots=True)
class SFTRun:
    """A run of supervised fine-tuning, ready to go."""

    config: SFTConfig
    position: Position
    examined: Examined
    console: RunConsole
    folder: RunFolder
    trainer: TrainerRole
    trainer_thread: ThreadPoolExecutor
    """The one thread in which the trainer computes."""
    interrupt: Interrupt
    ledger: Ledger
    renderer: Renderer
    demonstrations: Demonstrations
    order: Shuffled

    def samples(self, step: int) -> list[list[Sample]]:
        """The traces of each conversation of a step; a function of the seed and the step."""
        size = self.config.sequences_per_step
        found = self.demonstrations
        uids = range(step * size, (step + 1) * size)
        return [found.samples(found.trained[self.order[uid]], uid) for uid in uids]

    def held_out(self) -> list[Sample]:
        """The traces of the conversations that are not trained on."""
        found = self.demonstrations
        rows = enumerate(found.held_out)
        return [each for index, row in rows for each in found.samples(row, index)]


@asynccontextmanager
async def open_sft(
    prepare: Callable[[Callable[[str], None]], PreparedSFT],
    placement: Placement,
    checks: SFTChecks,
    *,
    interrupt: Interrupt | None = None,
    examined: Examined | None = None,
) -> AsyncIterator[SFTRun]:
    """Open a run of supervised fine-tuning, new or from its newest whole checkpoint.

    Args:
        prepare: Reads the inputs, as `prepare_sft`, given a function that prints; it may block.
        placement: Where its trainer lives.
        checks: Made before the run begins.
        interrupt: Shared with the run before it.
        examined: From the same run when it was open before: it is not examined again.

    Raises:
        ValueError: For what a user can fix; nothing has been written then.
    """
    console = RunConsole(COLUMNS, LEGEND)
    prepared = await asyncio.to_thread(prepare, console.print)
    if examined is None:
        console.print("checking this machine and the chat template")
        nodes = placement.nodes()
        with closing(placement.make_env()) as env:
            warnings = await asyncio.to_thread(checks.before_sft, prepared, env, nodes)
        examined = Examined({}, warnings)
        for each in warnings:
            console.print(f"warning: {each}")
    async with AsyncExitStack() as stack:
        console.print("starting the trainer")
        trainer = await placement.trainer(
            prepared.folder.path, prepared.initial_model, prepared.checkpoint
        )
        stack.callback(trainer.close)
        thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="trainer"))
        _open_folder(prepared, console.print)
        stack.enter_context(closing(prepared.folder))
        config = prepared.config
        yield SFTRun(
            config=config,
            position=prepared.position,
            examined=examined,
            console=console,
            folder=prepared.folder,
            trainer=trainer,
            trainer_thread=thread,
            interrupt=interrupt or Interrupt(),
            ledger=Ledger(1),
            renderer=prepared.renderer,
            demonstrations=prepared.demonstrations,
            order=Shuffled(len(prepared.demonstrations.trained), config.seed),
        )


def prepare_sft(config: SFTConfig, resume: Path | None, log: Callable[[str], None]) -> PreparedSFT:
    """Read all inputs of a run; it blocks, and reads every conversation.

    Args:
        config: Config of the run.
        resume: Folder of a run to go on with; None: a new run.
        log: Called with a line for people.

    Raises:
        ValueError: For what a user can fix.
    """
    check_trackers(config.trackers)
    begin = beginning(run_name(config.name, "sft", config.seed), resume, log)
    weights = first_weights(config.model.path, begin, log)
    renderer, demonstrator = encoders(config.as_run(), weights.tokenizer, weights.origin)
    files = fingerprints(files_of(config.data))
    check_files(begin, files)
    demonstrations = open_demonstrations(
        config.data, demonstrator, weights.tokenizer, config.rollout.max_context_tokens, log
    )
    if not files:  # a data set of the hub
        num_rows = len(demonstrations.trained) + len(demonstrations.held_out)
        files = {describe(config.data): {"rows": num_rows, "sha256": demonstrations.sha256}}
        check_files(begin, files)
    if demonstrations.left_out:
        log(describe_left_out(demonstrations.left_out))
    load_eval_sets(None, config.eval)  # a fault is found now, and not after the training
    steps = config.steps
    if steps is None:
        per_epoch = len(demonstrations.trained) / config.sequences_per_step
        steps = max(1, math.ceil(config.epochs * per_epoch))
    check_steps(begin, steps)
    return PreparedSFT(
        config=config.model_copy(update={"steps": steps}),
        folder=begin.folder,
        position=begin.position,
        checkpoint=begin.checkpoint,
        initial_model=weights.initial,
        origin=weights.origin,
        tokenizer=weights.tokenizer,
        renderer=renderer,
        demonstrations=demonstrations,
        files=files,
    )


def encoders(config: Config, tokenizer: Any, origin: Origin) -> tuple[Renderer, Demonstrator]:
    """Make the renderer of rollouts, and what encodes conversations in the same way.

    Raises:
        ValueError: Tokenizer and environment do not fit together.
    """
    with closing(make_environment(config)) as env:
        renderer = make_renderer(config, tokenizer, env, origin)

        def renderer_for(system: str, tools: Sequence[Mapping[str, Any]]) -> Renderer:
            if not system and not tools:
                return renderer
            return make_renderer(config, tokenizer, env, origin, system=system, tools=tools)

        return renderer, Demonstrator(renderer_for)


def _open_folder(prepared: PreparedSFT, say: Callable[[str], None]) -> None:
    config, folder = prepared.config, prepared.folder
    folder.reading = reading(prepared.tokenizer, config.records.max_text_chars)
    is_new = prepared.checkpoint is None
    if is_new:
        folder.check_is_new()
    try:
        if is_new:
            folder.create(config, prepared.origin, say, objective=OBJECTIVE, command="sft")
            write_fingerprints(folder.path, prepared.files)
        else:
            folder.reopen(prepared.position.step, config.trackers, say)
        folder.note_left_out(prepared.demonstrations.left_out)
    except OSError:
        if is_new:
            folder.discard()
        raise
