"""Families of decoders: each is trained exactly, packed or in rows, or it is refused by name."""

import asyncio
import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.training.families import FAMILIES, arrangement, make_model, table
from tests.training.harness import make_groups, noisy, trainer, weights_of
from tir_alp.algorithm.perturbation import LayerwisePerturbation
from tir_alp.algorithm.presets import PerturbationConfig
from tir_alp.config import TransformersConfig
from tir_alp.engines.base import Completion, EngineContext, Sampling
from tir_alp.engines.embedded.own_caches import measure_reading
from tir_alp.engines.transformers import open_transformers
from tir_alp.training.arrangement import is_packed
from tir_alp.training.batch import collate, noise_keys
from tir_alp.training.policy import PolicyLogprobs, arrange, recompute_layers
from tir_alp.types import Batch, Sample

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


def some_samples() -> list[Sample]:
    samples = [sample for group in make_groups(3) for sample in group]
    random.Random(1).shuffle(samples)
    return samples


def logprobs_and_gradients(
    model: nn.Module, batches: list[Batch], sigma: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logprobs of the loss tokens of some batches in order, and the gradients of their sum."""
    policy = PolicyLogprobs(model, 2048)
    noise = LayerwisePerturbation(model, PerturbationConfig(init_std=sigma))
    model.zero_grad()
    found = []
    for batch in batches:
        with noise.active(noise_keys(batch, update=3), batch.lengths):
            logprobs, _ = policy(batch, temperature=0.7)
            logprobs.sum().backward()
        found.append(logprobs.detach()[batch.loss_mask])
    gradients = {
        name.replace("_checkpoint_wrapped_module.", ""): each.grad.clone()
        for name, each in model.named_parameters()
        if each.grad is not None
    }
    assert noise.log_sigma.grad is not None
    return torch.cat(found), {**gradients, "log_sigma": noise.log_sigma.grad.clone()}


def assert_close(found: tuple[Tensor, dict], expected: tuple[Tensor, dict]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=2e-5)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        scale = value.abs().max().item()
        torch.testing.assert_close(
            found[1][name], value, rtol=0, atol=max(2e-4 * scale, 1e-6), msg=name
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_company_recomputation_and_noise_change_nothing(name: str):
    model, samples = make_model(name).train(), some_samples()
    alone = [batch_of(samples, slice(place, place + 1)) for place in range(len(samples))]
    expected = logprobs_and_gradients(model, alone, sigma=0.05)
    together = [batch_of(samples, slice(0, 4)), batch_of(samples, slice(4, 6))]
    assert_close(logprobs_and_gradients(model, together, sigma=0.05), expected)
    recompute_layers(model)
    assert_close(logprobs_and_gradients(model, together, sigma=0.05), expected)


def batch_of(samples: list[Sample], which: slice) -> Batch:
    return collate(samples[which])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_trains_and_its_checkpoint_is_an_ordinary_model(name: str, tmp_path: Path):
    model = make_model(name)
    one = trainer(noisy(), of=model, micro_batch_tokens=60)
    before = weights_of(one)
    twins = [  # so that there are prompts that could be shared
        [each, replace(each, trajectory=replace(each.trajectory, sequence_uid=100 + number))]
        for number, each in enumerate(some_samples())
    ]
    metrics = one.step(twins, 0).metrics
    assert (metrics["train/shared_tokens"] > 0) == is_packed(model)
    after = weights_of(one)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) > len(before) / 2
    one.save_model(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    assert type(plain) is type(model)
    ids = torch.arange(6, 30)
    with torch.no_grad():
        own = plain(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
    own = own[:-1].gather(-1, ids[1:, None]).squeeze(-1)
    model.eval()
    found = one.completion_logprobs(ids[:1].tolist(), ids[1:].tolist())
    torch.testing.assert_close(torch.tensor(found), own, rtol=0, atol=2e-5)


def test_the_table_of_the_docs_is_what_was_measured():
    assert "\n".join(table()) in DOCS.read_text()


class Leaky(nn.Module):
    """A layer with a state that runs along the row, and from there over its neighbours."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, *arguments, **keywords) -> Tensor:
        mean = hidden_states.mean(dim=(0, 1), keepdim=True)
        return self.layer(hidden_states + 0.1 * mean, *arguments, **keywords)


def test_a_family_without_boundaries_is_refused_by_name():
    model = make_model("qwen3_next")
    assert arrangement(model) == "in rows"
    model.model.layers[1] = Leaky(model.model.layers[1])
    with pytest.raises(ValueError, match=r"'mine' \(Qwen3NextForCausalLM\) cannot be trained") as e:
        arrange(model, "mine")
    assert "in rows, with the attention of the model's authors: a sequence in comp" in str(e.value)


def test_a_model_that_sees_what_comes_later_is_refused():
    model = make_model("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    looking_ahead = copy.deepcopy(model)
    forward = looking_ahead.model.forward

    def reversed_too(input_ids: Tensor, **keywords):
        found = forward(input_ids=input_ids, **keywords)
        found.last_hidden_state = found.last_hidden_state + found.last_hidden_state.flip(1)
        return found

    looking_ahead.model.forward = reversed_too
    with pytest.raises(ValueError, match="cannot be trained exactly"):
        arrange(looking_ahead, "mine")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_embedded_engine_samples_with_the_logprobs_of_the_trainer(name: str, tmp_path: Path):
    """Two turns, side by side: the second goes on where the first ended, past every window."""
    model = make_model(name)
    model.save_pretrained(tmp_path)

    async def play(engine: Any, uid: int) -> list[tuple[list[int], Completion]]:
        ids, found = tuple(range(7 + uid, 30 + uid)), []
        for _ in range(2):
            sampling = Sampling(max_tokens=12, seed=3, sequence_uid=uid)
            completion = await engine.generate(ids, sampling)
            found.append((list(ids), completion))
            ids += completion.token_ids + tuple(range(40, 51))
        return found

    async def main() -> list[list[tuple[list[int], Completion]]]:
        context = EngineContext(path=str(tmp_path), device="cpu")
        async with open_transformers(TransformersConfig(type="transformers"), context) as engine:
            return await asyncio.gather(*(play(engine, uid) for uid in range(3)))

    one = trainer(noisy(), of=model, micro_batch_tokens=256)
    for ids, completion in (turn for turns in asyncio.run(main()) for turn in turns):
        expected = one.completion_logprobs(ids, list(completion.token_ids))
        assert len(completion.token_ids) == 12
        assert list(completion.logprobs) == pytest.approx(expected, abs=1e-4)


def test_how_a_model_reads_with_its_cache_is_measured():
    readings = {name: measure_reading(make_model(name)) for name in ("qwen3_next", "nemotron_h")}
    assert readings == {"qwen3_next": "in pieces", "nemotron_h": "token by token"}
    assert measure_reading(make_model("bamba")) == "anew"
