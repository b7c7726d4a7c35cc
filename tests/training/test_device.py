"""Everything that is computed with a model runs on the model's device, with the same result.

Without a GPU, a test device replaces it, which accepts only its own tensors; see `elsewhere`.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.cluster.elsewhere import ELSEWHERE, begin, elsewhere, moved
from tests.training.harness import make_groups, model, noisy, trainer
from tir_alp.algorithm.noise import normal
from tir_alp.algorithm.presets import ALGORITHMS, KLConfig
from tir_alp.config import Config
from tir_alp.engines.base import Completion, Sampling
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.studies.mismatch import trainer_logprobs
from tir_alp.training import forwards
from tir_alp.training.policy import completion_logprobs, compute_device
from tir_alp.training.ranks import Ranks, alone
from tir_alp.training.sharding import gathered

torch.set_num_threads(1)

ALP = noisy()
GRPO = ALGORITHMS["grpo"].model_copy(update={"kl": KLConfig()})
PROMPT = (2, 45, 78, 33)


def there_trained(algorithm, monkeypatch):
    """Return a trainer on that device. It is not sharded: FSDP2 does not support the device."""
    monkeypatch.setattr(forwards, "shard", lambda *_: None)
    adamw = torch.optim.AdamW  # the device has no fused kernel
    monkeypatch.setattr(torch.optim, "AdamW", lambda each, betas, fused: adamw(each, betas=betas))
    return trainer(algorithm, moved(model()), ranks=Ranks(0, 1, ELSEWHERE, alone().mesh))


@pytest.mark.parametrize("algorithm", [ALP, GRPO], ids=["alp", "grpo with a reference"])
def test_updates_and_their_resume(algorithm, monkeypatch):
    groups = make_groups(2)
    here = trainer(algorithm, model())
    here.step(groups, 0)
    state = {name: each.clone() for name, each in gathered(here.state_dict())}
    expected = here.step(groups, 1).metrics
    with elsewhere():
        there = there_trained(algorithm, monkeypatch)
        with torch.no_grad():
            own = there.state_dict()
            for name, value in own.items():
                value.copy_(state[name])
        there.finish_loading(own)
        assert there.step(groups, 1).metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT * 70], ids=["copied", "shared"])
def test_the_embedded_engine_and_who_judges_it(prompt, monkeypatch):
    def sampled(of, begin=lambda: None) -> list[Completion]:
        async def work() -> list[Completion]:
            engine = TransformersEngine(of, max_cache_tokens=1 << 12, logit_noise=0.1)
            engine._thread = ThreadPoolExecutor(1, initializer=begin)
            try:
                await engine.load_weights(model().state_dict(), 1)
                sampling = [Sampling(max_tokens=9, top_p=0.9, sequence_uid=uid) for uid in (1, 2)]
                return await asyncio.gather(*(engine.generate(prompt, each) for each in sampling))
            finally:
                await engine.close()

        return asyncio.run(work())

    expected = sampled(model())
    ids = torch.tensor([*prompt, *expected[0].token_ids])
    judged = completion_logprobs(model(), ids, len(prompt), 0.7, 0.9)
    forward = trainer_logprobs(model(), prompt, expected[0], 0.7)
    with elsewhere():
        there = moved(model())
        one = there_trained(ALP, monkeypatch)
        found = one.completion_logprobs(prompt, expected[0].token_ids, 0.7, 0.9)
        assert found == pytest.approx(judged.tolist(), abs=1e-4)
        found = trainer_logprobs(there, prompt, expected[0], 0.7)
        torch.testing.assert_close(found, forward, rtol=0, atol=1e-4)
        completions = sampled(there, begin)
    for one, other in zip(completions, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_gpu_that_is_not_there():
    assert compute_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        assert compute_device("auto") == compute_device("cuda") == torch.device("cuda")
        return
    assert compute_device(Config().trainer.device) == torch.device("cpu")
    with pytest.raises(ValueError, match=r'trainer.device = "cuda", but torch .* sees no GPU here'):
        compute_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_has_the_noise_of_the_cpu_to_the_last_bit_and_learns_the_same():
    keys = torch.arange(1000) * 0x5DEECE66D
    assert torch.equal(normal(keys.cuda(), 97).cpu(), normal(keys, 97))
    groups = make_groups(4)
    here, there = trainer(ALP, model()), trainer(ALP, model(), ranks=alone("cuda"))
    for step in range(2):
        expected = here.step(groups, step).metrics
        assert there.step(groups, step).metrics == pytest.approx(expected, rel=1e-2, abs=1e-4)
