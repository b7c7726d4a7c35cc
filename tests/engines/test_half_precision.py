"""The embedded engine in 16 bits has the trainer's policy in 16 bits, up to rounding."""

import asyncio
from copy import deepcopy

import pytest
import torch

from tests.engines.harness import PROMPTS, model
from tests.training.harness import noisy, trainer
from tir_alp.config import LOGPROB_TOLERANCE, TransformersConfig
from tir_alp.engines.base import Sampling
from tir_alp.engines.transformers import TransformersEngine

BASE = model(0)


def mean_distance(precision: str) -> float:
    """Mean |difference| of the logprobs of both sides at one precision, in nats per token."""
    one = trainer(noisy(), deepcopy(BASE), dtype=precision)

    async def work() -> list[float]:
        engine = TransformersEngine(deepcopy(BASE), max_cache_tokens=1 << 16, precision=precision)
        found = []
        for uid, prompt in enumerate(PROMPTS * 4):
            sampled = await engine.generate(prompt, Sampling(max_tokens=30, sequence_uid=uid))
            expected = one.completion_logprobs(prompt, sampled.token_ids)
            found += [abs(a - b) for a, b in zip(sampled.logprobs, expected, strict=True)]
        return found

    return float(torch.tensor(asyncio.run(work())).mean())


def test_float16_on_both_sides_is_several_times_closer_than_bfloat16():
    in_float16, in_bfloat16 = mean_distance("float16"), mean_distance("bfloat16")
    tolerance = TransformersConfig(precision="float16").logprob_tolerance
    assert tolerance == LOGPROB_TOLERANCE["float16"] > in_float16
    assert 0 < 4 * in_float16 < in_bfloat16


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_buffers_such_as_rotary_frequencies_are_not_rounded(precision):
    engine = TransformersEngine(deepcopy(BASE), max_cache_tokens=100, precision=precision)
    made = engine._forward.model
    assert {each.dtype for each in made.parameters()} == {getattr(torch, precision)}
    before = dict(BASE.named_buffers())
    assert before and all(torch.equal(each, before[name]) for name, each in made.named_buffers())
    lora = trainer(noisy(), deepcopy(BASE), dtype=precision, lora={"rank": 2})
    assert all(torch.equal(each, before[name]) for name, each in lora.model.named_buffers())
