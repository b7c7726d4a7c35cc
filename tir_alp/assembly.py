"""Puts the parts of a run together from its config, and takes them apart again.

Everything that a user can get wrong is found here, before the run's folder is made: model,
tokenizer, tasks, environment, prompt. Each is a ValueError that says what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tir_alp import checkpoint, doctor
from tir_alp.advantage import group_advantages, has_signal
from tir_alp.checkpoint import Position
from tir_alp.config import AlgorithmConfig, Config, ServersConfig, SGLangConfig, VLLMConfig
from tir_alp.console import RunConsole
from tir_alp.data import Task, left_out, load_held_out, load_order
from tir_alp.engines.base import Engine
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.environments import make_environment, make_renderer
from tir_alp.ledger import Ledger
from tir_alp.logical_order import LogicalOrder
from tir_alp.parallel import join
from tir_alp.policy import compute_device, end_token_ids, load_outline, load_policy, load_tokenizer
from tir_alp.renderer import Renderer
from tir_alp.rollout import EpisodeRunner, Watch
from tir_alp.rollout_queue import RolloutQueue
from tir_alp.run_folder import RunFolder
from tir_alp.tiny import SHIPPED
from tir_alp.tools.outcome import Outcome
from tir_alp.trainer import Trainer

_EVALUATION = 1 << 32  # evaluation draws from seeds of its own
_NUM_CHECKED = 256  # tasks whose prompts are measured before a run begins
_NUM_NAMED = 20  # rows that were left out
_HARMLESS = ("```python\nprint(1)\n```",)  # for an environment that does not say what is


@dataclass(frozen=True, slots=True)
class Run:
    """A run, ready to go."""

    config: Config
    position: Position
    environment: dict[str, Any]
    """What the environment says that it runs in; see `check_environment`."""
    console: RunConsole
    folder: RunFolder
    tokenizer: Any
    engine: Engine
    trainer: Trainer
    rollouts: RolloutQueue
    ledger: Ledger
    evaluation: EpisodeRunner
    held_out: Sequence[Task]
    trainer_thread: ThreadPoolExecutor
    """Where the trainer computes, so that the event loop goes on meanwhile."""


@asynccontextmanager
async def open_run(config: Config, resume: Path | None = None) -> AsyncIterator[Run]:
    """Build a run, new or from the newest whole checkpoint of the folder `resume`.

    Raises:
        ValueError: For what a user can mend; nothing has been written then.
    """
    async with AsyncExitStack() as stack:
        console = RunConsole()
        device = compute_device(config.trainer.device)
        initial = str(SHIPPED.get(config.model.path, config.model.path))
        path, position, found = initial, Position(0, 0, 0), None
        if resume is not None:
            found, position, refused = checkpoint.newest(resume / "checkpoints")
            path = str(found)
            console.print("".join(f"refused: {reason}\n" for reason in refused) + f"from {found}")
            if position.step >= config.steps:
                raise ValueError(
                    f"{resume} has made its {position.step} steps: give --steps more to go on"
                )

        ranks = stack.enter_context(join(config.trainer.rank_timeout_s, device))
        if ranks.size > 1:
            raise ValueError(
                f"a run is one process, but this is one of {ranks.size} ranks: start it without "
                "torch.distributed.run"
            )
        tokenizer = load_tokenizer(path)
        with closing(make_environment(config)) as env:
            renderer = make_renderer(config, tokenizer, env)
        tasks = load_order(config.data, config.seed)
        held_out = load_held_out(config.data, config.eval.num_tasks)
        not_taken = left_out(config.data)
        if not_taken:
            console.print(describe_left_out(not_taken))
        soon = [tasks[position.group + offset] for offset in range(_NUM_CHECKED)]
        environment = check_environment(config, renderer, [*soon, *held_out])

        with closing(make_environment(config)) as env:
            findings = doctor.examine_config(config, path, tokenizer, renderer, env, soon[0])
            prompts = [env.reset(seed=task.seed, options=task.to_options())[0] for task in soon[:2]]
        ignored = doctor.demand(findings, config.doctor.ignore)

        rollout = config.rollout
        num_episodes = (rollout.max_staleness + 1) * rollout.groups_per_step * rollout.group_size
        env_threads = ThreadPoolExecutor(num_episodes, thread_name_prefix="env")
        stack.callback(env_threads.shutdown, wait=False, cancel_futures=True)
        slots = asyncio.Semaphore(num_episodes)
        trainer_thread = ThreadPoolExecutor(1, thread_name_prefix="trainer")
        stack.callback(trainer_thread.shutdown)

        folder = RunFolder(resume or Path("runs") / run_name(config))
        ledger = Ledger(rollout.group_size, config.seed)
        trainer = Trainer(
            load_policy(path if config.trainer.lora is None else initial),
            config.trainer,
            with_run_seed(config),
            ranks=ranks,
            reference=load_policy(initial) if config.algorithm.needs_reference else None,
            temperature=rollout.temperature,
            on_bad_update=folder.dump_bad_update,
            on_update=ledger.updated,
        )
        if found is not None:
            checkpoint.load(found, trainer)
        engine = await stack.enter_async_context(
            open_engine(config, path, position.policy_version, trainer, trainer_thread, console)
        )
        findings = await doctor.examine_engine(
            *(config, engine, load_outline(path), trainer, lambda: dict(trainer.weights())),
            *(position.policy_version, tokenizer, renderer, prompts),
        )
        ignored += doctor.demand(findings, config.doctor.ignore)
        for each in ignored:
            console.print(f"warning: {each}")
        if resume is not None:
            folder.reopen(position.step)
        else:
            folder.create(config)
        stack.enter_context(closing(folder))
        folder.note_left_out(not_taken)
        folder.note_environment(position.step, environment)

        generate = ledger.engine(engine.generate)
        order = LogicalOrder(generate) if config.deterministic else None

        def runner(seed: int, watch: Watch = lambda env, uid: env) -> EpisodeRunner:
            return EpisodeRunner(
                make_env=lambda: make_environment(config),
                generate=generate if order is None else order.generate,
                renderer=renderer,
                limits=rollout,
                threads=env_threads,
                slots=slots,
                seed=seed,
                on_failure=lambda failure: console.print(f"episode failed: {failure}"),
                admission=contextlib.nullcontext if order is None else order.episode,
                watch=watch,
            )

        rollouts = RolloutQueue(
            runner(config.seed, ledger.watch).run_group,
            tasks.__getitem__,
            groups_per_step=rollout.groups_per_step,
            max_staleness=rollout.max_staleness,
            hold=rollout.hold,
            next_group=position.group,
            has_signal=lambda group: has_signal(
                group, group_advantages(group, config.algorithm, rollout)
            ),
            max_refills=rollout.max_refills,
        )
        stack.push_async_callback(rollouts.close)
        yield Run(
            config=config,
            position=position,
            environment=environment,
            console=console,
            folder=folder,
            tokenizer=tokenizer,
            engine=engine,
            trainer=trainer,
            rollouts=rollouts,
            ledger=ledger,
            evaluation=runner(config.seed + _EVALUATION),
            held_out=held_out,
            trainer_thread=trainer_thread,
        )


@asynccontextmanager
async def open_engine(
    config: Config,
    path: str,
    version: int,
    trainer: Trainer,
    trainer_thread: ThreadPoolExecutor,
    console: RunConsole,
) -> AsyncIterator[Engine]:
    """Open the engine that the config names, with the weights of a folder.

    Raises:
        ValueError: If it cannot start.
    """
    settings, outline = config.engine, load_outline(path)
    loop = asyncio.get_running_loop()

    async def reference(token_ids: tuple[int, ...]) -> Sequence[float]:
        call = (trainer.completion_logprobs, token_ids[:1], token_ids[1:])
        return await loop.run_in_executor(trainer_thread, *call)

    if isinstance(settings, ServersConfig):
        try:
            from tir_alp.engines.sglang import open_sglang
            from tir_alp.engines.vllm import open_vllm
        except ImportError as error:
            raise ValueError(
                f'engine.type = "{settings.type}" needs aiohttp: install it as docs/sglang.md says'
            ) from error
    if isinstance(settings, VLLMConfig):
        async with open_vllm(
            settings,
            outline,
            dict(trainer.weights()),
            version=version,
            seed=config.seed,
            reference=reference,
            say=console.print,
        ) as engine:
            yield engine
        return
    if isinstance(settings, SGLangConfig):
        async with open_sglang(
            settings,
            model_path=path,
            version=version,
            vocab_size=outline.config.get_text_config().vocab_size,
            end_token_ids=end_token_ids(outline),
            seed=config.seed,
            reference=reference,
            say=console.print,
        ) as engine:
            yield engine
        return
    engine = TransformersEngine(
        load_policy(path, trainer.ranks.device),
        max_cache_tokens=settings.max_cache_tokens,
        version=version,
        precision=settings.precision,
        logit_noise=settings.logit_noise,
    )
    try:
        yield engine
    finally:
        await engine.close()


def with_run_seed(config: Config) -> AlgorithmConfig:
    """The run's algorithm, with noise that differs from seed to seed of the run."""
    noise = config.algorithm.perturbation
    if noise is None:
        return config.algorithm
    noise = noise.model_copy(update={"seed": noise.seed + config.seed})
    return config.algorithm.model_copy(update={"perturbation": noise})


def check_environment(config: Config, renderer: Renderer, tasks: Sequence[Task]) -> dict[str, Any]:
    """See that prompts leave room to write, and that the environment can take an action.

    The actions are harmless, those of the environment's `harmless_actions()` if it has that. What
    they need, a sandbox for instance, starts or refuses here and not in the first step.

    Returns:
        What the environment's `run_report()` says for people to read, which can go through JSON;
        empty if it has no such method. `warnings` in it are sentences not to be overlooked.
    """
    with closing(make_environment(config)) as env:
        for task in tasks:
            text, _ = env.reset(seed=task.seed, options=task.to_options())
            renderer.prompt_within(text, config.rollout.max_context_tokens, task.task_id)
        says = env.has_wrapper_attr("harmless_actions")
        for action in env.get_wrapper_attr("harmless_actions")() if says else _HARMLESS:
            env.reset(seed=tasks[0].seed, options=tasks[0].to_options())
            info = env.step(action)[-1]
            if Outcome(info.get("outcome", Outcome.OK)).is_infrastructure:
                raise ValueError(f"{config.env.id!r} cannot work here: {info.get('error')}")
        has_report = env.has_wrapper_attr("run_report")
        return env.get_wrapper_attr("run_report")() if has_report else {}


def describe_left_out(sentences: Sequence[str]) -> str:
    """Say which rows of the data were left out, or at least how many."""
    some = "".join(f"  {sentence}\n" for sentence in sentences[:_NUM_NAMED])
    more = len(sentences) - _NUM_NAMED
    return f"left out of the data:\n{some}" + (
        f"  and {more} more, in left_out.txt\n" if more > 0 else ""
    )


def run_name(config: Config) -> str:
    """The run's folder below `runs/`."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return config.name or f"{config.algorithm.name}-seed{config.seed}-{stamp}"
