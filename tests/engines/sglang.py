"""What the tests of SGLang share."""

import asyncio

import torch

from tests.engines.harness import (
    PROMPTS,
    model,
)

OLD, NEW = model(0), model(1)
PROMPT = PROMPTS[0]
PATIENCE = 600.0
"""Seconds that a test may wait for a condition on a busy machine."""


def run(work, timeout: float = PATIENCE):
    return asyncio.run(asyncio.wait_for(work, timeout))


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.05)


def drifted(seed: int, versions: int):
    """A model that takes a small step for each version, as training does."""
    models = {0: model(seed)}
    torch.manual_seed(seed)
    for version in range(1, versions + 1):
        models[version] = model(seed)
        models[version].load_state_dict(models[version - 1].state_dict())
        with torch.no_grad():
            for parameter in models[version].parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return models
