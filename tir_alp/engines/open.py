"""Opens the engine that a config names."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from tir_alp.config import Config, ServersConfig, SGLangConfig, VLLMConfig
from tir_alp.engines.base import AskTrainer, Engine
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.training.policy import compute_device, load_policy
from tir_alp.training.structure import end_token_ids, load_outline


@asynccontextmanager
async def open_engine(
    config: Config,
    path: str,
    version: int,
    ask_trainer: AskTrainer,
    log: Callable[[str], None],
) -> AsyncIterator[Engine]:
    """The engine that the config names, in this process or in servers that it starts.

    Raises:
        ValueError: If it cannot start.
    """
    settings, on_update = config.engine, config.rollout.on_update
    if isinstance(settings, ServersConfig):
        try:
            from tir_alp.engines.sglang.engine import open_sglang
            from tir_alp.engines.vllm.engine import open_vllm
        except ImportError as error:
            raise ValueError(
                f'engine.type = "{settings.type}" needs aiohttp: install it as docs/sglang.md says'
            ) from error
    if isinstance(settings, VLLMConfig):
        async with open_vllm(
            settings,
            load_outline(path),
            Path(path) if Path(path).is_dir() else load_policy(path).state_dict(),
            version=version,
            seed=config.seed,
            ask_trainer=ask_trainer,
            log=log,
        ) as engine:
            yield engine
        return
    if isinstance(settings, SGLangConfig):
        outline = load_outline(path)
        async with open_sglang(
            settings,
            model_path=path,
            version=version,
            vocab_size=outline.config.get_text_config().vocab_size,
            end_token_ids=end_token_ids(outline),
            seed=config.seed,
            ask_trainer=ask_trainer,
            on_update=on_update,
            log=log,
        ) as engine:
            yield engine
        return
    engine = TransformersEngine(
        load_policy(path, compute_device(config.trainer.device)),
        max_cache_tokens=settings.max_cache_tokens,
        version=version,
        precision=settings.precision,
        logit_noise=settings.logit_noise,
        on_update=on_update,
    )
    try:
        yield engine
    finally:
        await engine.close()
