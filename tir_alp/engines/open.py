"""Opens the engine that a config names, by the factory that its section names."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch

from tir_alp.config import Config, EngineSettings
from tir_alp.engines.base import AskTrainer, Engine, EngineContext, EngineFactory, Log


@asynccontextmanager
async def open_engine(
    config: Config, path: str, version: int, ask_trainer: AskTrainer | None, log: Log
) -> AsyncIterator[Engine]:
    """Open the engine of a run, in this process or in servers that it starts.

    Args:
        config: The config of the run.
        path: Folder or Hugging Face id of the model whose weights the engine starts with.
        version: Policy version of those weights.
        ask_trainer: Asks the trainer for the logprobs that the engine's are compared with.
        log: Receives starts, losses and recoveries.

    Raises:
        ValueError: If it cannot start.
    """
    settings = config.engine
    _check_gpus(settings)
    context = EngineContext(
        path=path,
        version=version,
        seed=config.seed,
        device=config.trainer.device,
        on_update=config.rollout.on_update,
        adapters=config.adapters,
        ask_trainer=ask_trainer,
        log=log,
    )
    factory = _find_factory(settings.factory, settings.type, settings.install_hint)
    async with factory(settings, context) as engine:
        yield engine


def _check_gpus(settings: EngineSettings) -> None:
    """Refuse an engine on GPUs that this machine does not have, before anything starts."""
    if not settings.gpus:
        return
    num_there = torch.cuda.device_count()
    if settings.gpus[-1] >= num_there:
        raise ValueError(
            f'engine.type = "{settings.type}" takes the GPUs {settings.gpus[0]} to '
            f"{settings.gpus[-1]}, and torch sees {num_there} here: set engine.device to "
            '"cpu", or see that nvidia-smi lists them and that torch is built for CUDA'
        )


def _find_factory(path: str, type_: str, install_hint: str) -> EngineFactory:
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        missing = error.name or str(error)
        raise ValueError(f'engine.type = "{type_}" needs {missing}: {install_hint}') from error
    if not hasattr(module, name):
        raise ValueError(f"engine.factory = {path!r}: the module {module_name} has no {name}")
    return getattr(module, name)
