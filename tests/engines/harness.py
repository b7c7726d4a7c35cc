"""Shared by the tests of all engines: small models, forwards to compare with, opened engines."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tir_alp.config import SGLangConfig, VLLMConfig
from tir_alp.engines.base import AskTrainer, Completion, Engine, EngineContext
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.models.tiny import BASE
from tir_alp.models.tiny.model import make_model
from tir_alp.training.attention import PACKED, PackedSequences
from tir_alp.training.policy import hidden_states, next_token_logits

if TYPE_CHECKING:
    from tir_alp.engines.sglang.engine import SGLangEngine

torch.set_num_threads(1)

VOCABULARY = 262
PROMPTS = [(2, 45, 78, 33, 1, 3), (2, 60, 61), tuple(range(40, 90)), (7,)]

needs_sglang = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="sglang is not installed: docs/engines.md"
)


def model(seed: int = 0) -> Any:
    """A model as small as the tiny one, with weights that prefer some tokens to others."""
    config = deepcopy(make_model(seed).config)
    # The same width in fewer heads: vLLM's CPU build has no attention with heads of size 24.
    config.num_attention_heads = config.num_key_value_heads = 3
    config.head_dim = 32
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.eval()


def write_model(folder: Path) -> str:
    """Write a folder that a server can start from; returns its path."""
    model().save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def logprobs(of: Any, token_ids: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """[T, V] logprobs of the next token at each position, by the trainer's forward."""
    ids = torch.tensor(token_ids)
    hidden = hidden_states(of, ids, torch.arange(len(ids)), PackedSequences((len(ids),)))
    return (next_token_logits(of, hidden) / temperature).log_softmax(-1)


def logprobs_of(
    of: Any, prompt: Sequence[int], completion: Completion, temperature: float = 1.0
) -> torch.Tensor:
    """A model's logprobs of a completion's tokens."""
    every = logprobs(of, (*prompt, *completion.token_ids), temperature)
    positions = torch.arange(len(prompt) - 1, len(prompt) + len(completion.token_ids) - 1)
    return every[positions, torch.tensor(completion.token_ids, dtype=torch.int64)]


def distance(
    models: dict[int, Any],
    prompt: Sequence[int],
    completion: Completion,
    temperature: float = 1.0,
) -> float:
    """The largest |difference| between a completion's logprobs and those of the weights it names.

    Args:
        models: The model of each policy version.
        prompt: Token ids that the completion continues.
        completion: The completion.
        temperature: Temperature at which it was sampled.
    """
    worst = 0.0
    for span in completion.versions:
        reported = torch.tensor(completion.logprobs[span.start : span.stop])
        expected = logprobs_of(models[span.version], prompt, completion, temperature)
        worst = max(worst, float((reported - expected[span.start : span.stop]).abs().max()))
    return worst


@dataclass(frozen=True)
class Harness:
    """An engine under test, and how it is opened with the weights of a model as version 0."""

    name: str
    opened: Callable[[Any], AbstractAsyncContextManager[Engine]]


@asynccontextmanager
async def embedded(of: Any) -> AsyncIterator[Engine]:
    engine = TransformersEngine(deepcopy(of), max_cache_tokens=1 << 16)
    try:
        yield engine
    finally:
        await engine.close()


def served(url: str, of: Any, **settings: Any) -> AbstractAsyncContextManager[SGLangEngine]:
    """An engine over a server that runs already, with the weights of a model as version 0."""
    return served_by((url,), of, **settings)


@asynccontextmanager
async def served_by(
    urls: Sequence[str],
    of: Any | None,
    log: Callable[[str], None] = lambda _: None,
    on_update: str = "keep",
    ask_trainer: AskTrainer | None = None,
    **settings: Any,
) -> AsyncIterator[SGLangEngine]:
    from tir_alp.engines.sglang.engine import open_sglang

    config = SGLangConfig.model_validate(
        {"type": "sglang", "urls": urls, "device": "cpu", "dtype": "float32"} | settings
    )
    context = EngineContext(path=str(BASE), on_update=on_update, ask_trainer=ask_trainer, log=log)
    async with open_sglang(config, context) as engine:
        if of is not None:
            await engine.load_weights(of.state_dict(), 0)
        yield engine


def vllm_config() -> VLLMConfig:
    """The section of a server on the CPU, with the Python that TIR_ALP_VLLM_PYTHON names."""
    return VLLMConfig(
        type="vllm",
        python=Path(os.environ["TIR_ALP_VLLM_PYTHON"]),
        device="cpu",
        dtype="float32",
        max_running=64,
        max_cache_tokens=1 << 16,
    )


@asynccontextmanager
async def served_by_vllm(folder: Path, of: Any) -> AsyncIterator[Engine]:
    """An engine over the server of a folder, with the weights of a model as version 0."""
    from tir_alp.engines.servers.weights import WeightSnapshot, snapshot_tensors
    from tir_alp.engines.vllm.engine import connected
    from tir_alp.engines.vllm.process import SOCKET

    tensors = snapshot_tensors(of.state_dict(), torch.float32, every_name=True)
    snapshot = WeightSnapshot(0, tensors, None)
    opened = connected(vllm_config(), folder / SOCKET, folder, snapshot, VOCABULARY)
    async with opened as engine:
        await engine.load_weights(of.state_dict(), 0)
        yield engine
