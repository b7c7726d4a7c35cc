"""Adapters beside the weights of an engine: applied unmerged, verified, and seen however small."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engines.harness import (
    PROMPTS,
    VOCABULARY,
    logprobs,
    logprobs_of,
    model,
    needs_sglang,
    write_model,
)
from tests.training.harness import make_groups, noisy, trainer
from tir_alp.algorithm.presets import NEGATIVE_LOG_LIKELIHOOD
from tir_alp.config import Config, LoraConfig, SGLangConfig
from tir_alp.engines.base import Completion, EngineContext, EngineFailed, Probe, Sampling
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.tools.outcome import Outcome
from tir_alp.types import Sample, StopReason, TokenSpan, Trajectory, Turn

LORA = LoraConfig(rank=4, alpha=8.0)
BASE = model(0)


def trained(num_steps: int, of: Any = None, **settings: Any):
    """A trainer of adapters after some steps."""
    lora = {"rank": LORA.rank, "alpha": LORA.alpha}
    one = trainer(noisy(), deepcopy(of or BASE), **{"lora": lora, "lr": 1e-2} | settings)
    for step in range(num_steps):
        one.step(make_groups(), step)
    return one


ONE = trained(3)
ADAPTERS = {name: tensor.clone() for name, tensor in ONE.adapters()}
MERGED = deepcopy(BASE)
MERGED.load_state_dict(dict(ONE.weights()))


def embedded(of: Any = None, **settings: Any) -> TransformersEngine:
    settings = {"max_cache_tokens": 1 << 16, "adapters": LORA} | settings
    return TransformersEngine(deepcopy(of or BASE), **settings)


async def sample(engine: Any, num_tokens: int = 30) -> list[Completion]:
    return await asyncio.gather(
        *(
            engine.generate(prompt, Sampling(max_tokens=num_tokens, sequence_uid=uid))
            for uid, prompt in enumerate(PROMPTS)
        )
    )


def distance(of: Any, completions: Sequence[Completion]) -> float:
    """Largest |difference| between the logprobs of completions of PROMPTS and those of a model."""
    return max(
        float((torch.tensor(each.logprobs) - logprobs_of(of, prompt, each)).abs().max())
        for prompt, each in zip(PROMPTS, completions, strict=True)
    )


def test_the_embedded_engine_applies_adapters_as_the_trainer_does():
    async def work():
        engine = embedded()
        before = await sample(engine)
        await engine.load_weights(ADAPTERS, 1)
        after, compared = await sample(engine), engine.health()["tensors_compared"]
        await engine.load_weights({name: each * 0 for name, each in ADAPTERS.items()}, 2)
        return before, after, await sample(engine), compared

    before, after, again, compared = asyncio.run(work())
    assert distance(BASE, before) < 1e-4
    assert distance(MERGED, after) < 1e-4 < 0.1 < distance(BASE, after)
    assert [each.policy_version for each in after] == [1] * len(PROMPTS)
    assert [each.token_ids for each in again] == [each.token_ids for each in before]
    assert compared == len(ADAPTERS)


def test_an_interrupted_completion_names_which_adapters_sampled_which_tokens():
    async def work():
        engine = embedded(on_update="keep")
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def watch():
            return lambda token_id: loop.call_soon_threadsafe(begun.set) is not None and False

        sampling = Sampling(max_tokens=60, stop_matcher=watch)
        running = asyncio.create_task(engine.generate(PROMPTS[0], sampling))
        await begun.wait()
        await engine.load_weights(ADAPTERS, 1)
        return await running

    completion = asyncio.run(work())
    first, second = completion.version_spans
    assert (first.version, second.version, second.stop) == (0, 1, 60)
    for span, of in ((first, BASE), (second, MERGED)):
        expected = logprobs_of(of, PROMPTS[0], completion)[span.start : span.stop]
        reported = torch.tensor(completion.logprobs[span.start : span.stop])
        assert (reported - expected).abs().max() < 1e-4


# ------------------------------------------------------------------- what merging cannot show


def coarse(of: Any) -> Any:
    """A copy whose weights are in bfloat16, and none of whose matrices has a number close to 0."""
    made = deepcopy(of)
    with torch.no_grad():
        for name, each in made.named_parameters():
            if name.endswith("proj.weight"):
                each.copy_(torch.where(each < 0, each.clamp(max=-0.05), each.clamp(min=0.05)))
            each.copy_(each.bfloat16())
    return made


def learned(base: Any, prompts: Sequence[tuple[int, ...]], token_id: int, lr: float):
    """A trainer of adapters that made one step towards one token after each prompt."""

    def sample_of(uid: int, prompt: tuple[int, ...]) -> Sample:
        said = TokenSpan((token_id,), (-1.0,))
        turn = Turn(said, TokenSpan(()), 0, StopReason.EOS, Outcome.OK, 1.0)
        of_prompt = TokenSpan(prompt)
        return Sample(Trajectory("t", uid, of_prompt, (turn,), True, False, sequence_uid=uid), 1.0)

    lora = {"rank": LORA.rank, "alpha": LORA.alpha}
    one = trainer(NEGATIVE_LOG_LIKELIHOOD, deepcopy(base), lora=lora, lr=lr)
    one.step([[sample_of(*each)] for each in enumerate(prompts)], 0)
    return one


def test_an_update_that_merging_in_bfloat16_loses_is_seen():
    """The engine in bfloat16 follows a trainer in float32, up to rounding; merged, nothing moves.

    All logprobs after 32 prompts are compared, 8,384 numbers, because rounding alone moves each by
    more than the update does.
    """
    base = coarse(BASE)
    torch.manual_seed(1)
    prompts = [tuple(torch.randint(6, VOCABULARY, (12,)).tolist()) for _ in range(32)]
    one = learned(base, prompts, token_id=100, lr=1.4e-4)
    adapters, merged = dict(one.adapters()), dict(one.weights())
    assert any(not torch.equal(merged[name], each) for name, each in base.state_dict().items())
    for name, each in base.state_dict().items():  # merging changes not a bit
        assert torch.equal(merged[name].bfloat16(), each.bfloat16()), name

    def last(of: Any) -> Tensor:
        return torch.stack([logprobs(of, prompt)[-1] for prompt in prompts])

    def shift(update: Mapping[str, Tensor], lora: LoraConfig | None) -> Tensor:
        """What new weights change in the logprobs by the engine's own model."""
        engine = embedded(base, precision="bfloat16", adapters=lora)
        before = last(engine._forward.model)
        asyncio.run(engine.load_weights(update, 1))
        return last(engine._forward.model) - before

    updated = deepcopy(base)
    updated.load_state_dict(merged)
    true = last(updated) - last(base)
    assert shift(merged, None).abs().max() == 0
    found = shift(adapters, LORA)
    slope = float((found * true).sum() / true.square().sum())
    assert 0.8 < slope < 1.2 and true.square().mean().sqrt() > 0.01
    assert found[:, 100].mean() > 0.03  # the token that was learned, in nats


# ----------------------------------------------------------------------------------- refusals


def test_what_cannot_be_applied_is_refused():
    async def work(engine: TransformersEngine, source: Any) -> None:
        await engine.load_weights(source, 1)

    with pytest.raises(ValueError, match=r"pairs of factors, but got lm_head\.weight"):
        asyncio.run(work(embedded(), BASE.state_dict()))
    lost = {
        name: each for name, each in ADAPTERS.items() if "layers.1.mlp.up_proj.lora_A" not in name
    }
    with pytest.raises(ValueError, match=r"got model\.layers\.1\.mlp\.up_proj\.lora_A\.weight"):
        asyncio.run(work(embedded(), lost))
    renamed = {name.replace("q_proj", "z_proj"): each for name, each in ADAPTERS.items()}
    with pytest.raises(ValueError, match=r'z_proj.*which is no linear layer.*sync = "merged"'):
        asyncio.run(work(embedded(), renamed))
    broken = {name: each * torch.nan for name, each in ADAPTERS.items()}
    with pytest.raises(EngineFailed, match=r"does not hold the weights.*lora_"):
        asyncio.run(work(embedded(), broken))


def test_adapters_of_another_rank_do_not_fit_those_before_them():
    async def work() -> None:
        engine = embedded()
        await engine.load_weights(ADAPTERS, 1)
        smaller = {
            name: each[:2] if ".lora_A." in name else each[:, :2] for name, each in ADAPTERS.items()
        }
        await engine.load_weights(smaller, 2)

    with pytest.raises(ValueError, match=r"weights of version 2 do not fit.*lora_A"):
        asyncio.run(work())


@pytest.mark.parametrize(
    ("engine", "lora", "gets_adapters"),
    [
        ({}, {}, True),
        ({}, {"sync": "merged"}, False),
        ({"type": "sglang"}, {}, True),
        ({"type": "sglang", "release_memory": True}, {}, False),
        ({"type": "sglang", "urls": ["http://a:1"]}, {}, False),
        ({"type": "sglang", "router": "local"}, {}, False),
        ({"type": "vllm", "python": "/bin/true"}, {}, True),
        ({"type": "custom", "factory": "mine:open"}, {}, False),
        ({"type": "custom", "factory": "mine:open", "takes_adapters": True}, {}, True),
    ],
)
def test_an_engine_gets_adapters_if_it_takes_them(engine, lora, gets_adapters):
    config = Config.model_validate({"engine": engine, "trainer": {"lora": lora}})
    assert config.adapters == (config.trainer.lora if gets_adapters else None)
    if not gets_adapters and not lora:
        with pytest.raises(ValueError, match=r'"adapter" needs an engine.*set it to "merged"'):
            Config.model_validate({"engine": engine, "trainer": {"lora": {"sync": "adapter"}}})


def test_completions_that_go_on_do_not_get_new_adapters_from_a_server():
    changes = {"engine": {"type": "sglang"}, "rollout": {"on_update": "keep"}}
    assert Config.model_validate({**changes, "trainer": {"lora": {}}}).adapters is None


# ------------------------------------------------------------------------------------ servers


async def asked(token_ids: tuple[int, ...]) -> Probe:
    """What the trainer says of a probe; see `AskTrainer`."""
    return Probe(token_ids, tuple(ONE.completion_logprobs(token_ids[:1], token_ids[1:])))


async def served(opened: Any) -> tuple[list[Completion], list[Completion], dict[str, float]]:
    """Complete PROMPTS by a server with its weights alone, and with two adapters in turn."""
    async with opened as engine:
        before = await sample(engine)
        await engine.load_weights({name: each * 0.5 for name, each in ADAPTERS.items()}, 1)
        await engine.load_weights(ADAPTERS, 2)
        health = dict(engine.health())
        after = await sample(engine)
        with pytest.raises(ValueError, match="do not fit"):
            await engine.load_weights(dict(list(ADAPTERS.items())[2:]), 3)
        return before, after, health


def check_served(before: Sequence[Completion], after: Sequence[Completion]) -> None:
    assert distance(BASE, before) < 1e-4
    assert distance(MERGED, after) < 1e-4 < 0.1 < distance(BASE, after)
    assert [each.policy_version for each in after] == [2] * len(PROMPTS)


@needs_sglang
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_sglang_server_samples_with_adapters(tmp_path):
    from tir_alp.engines.sglang.engine import open_sglang

    config = SGLangConfig(type="sglang", device="cpu", dtype="float32", max_cache_tokens=1 << 14)
    context = EngineContext(path=write_model(tmp_path), adapters=LORA)
    before, after, health = asyncio.run(served(open_sglang(config, context)))
    check_served(before, after)
    assert health["tensors_compared"] == len(ADAPTERS)


@pytest.mark.skipif("TIR_ALP_VLLM_PYTHON" not in os.environ, reason="no Python of vLLM is named")
@pytest.mark.timeout(900)
def test_a_vllm_server_samples_with_adapters(tmp_path):
    from tests.engines.harness import vllm_config
    from tir_alp.engines.vllm.engine import open_vllm

    context = EngineContext(path=write_model(tmp_path), adapters=LORA)
    before, after, _ = asyncio.run(served(open_vllm(vllm_config(), context)))
    check_served(before, after)
