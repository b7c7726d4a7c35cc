"""The embedded engine: its cache, and mismatch on purpose."""

import asyncio
import itertools
from copy import deepcopy
from typing import Any

import pytest
import torch

from tests.engines.embedded import (
    PROMPT,
    Watch,
    model,
    one,
    opened,
    sampled,
    trainer_logprobs,
)
from tir_alp.engines.base import Completion, Sampling
from tir_alp.engines.embedded.forward import CachedForward
from tir_alp.engines.embedded.kv_cache import KVCache
from tir_alp.engines.embedded.precision import layer_matrices, quantised
from tir_alp.engines.embedded.thin_linear import MAX_TOKENS, ThinLinear, use_thin_linears
from tir_alp.models.tiny.model import make_model

# -------------------------------------------------------------------------------- the cache


def test_the_cache_bounds_how_many_requests_run_at_a_time():
    most_running = 0

    async def run() -> list[Completion]:
        async with opened(max_cache_tokens=409) as engine:

            def seen() -> None:
                nonlocal most_running
                most_running = max(most_running, int(engine.health()["running"]))

            watch = Watch()
            watch.seen = seen
            sampling = Sampling(max_tokens=34, stop_matcher=watch)  # 40 with its prompt
            return await asyncio.gather(*(engine.generate(PROMPT, sampling) for _ in range(25)))

    completions = asyncio.run(run())
    assert most_running == 10
    assert {each.token_ids for each in completions} == {one(Sampling(max_tokens=34)).token_ids}


def test_one_long_prompt_does_not_make_a_wide_row_of_every_short_one():
    watched, sizes = model(), []
    watched.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    short = [(7, 8, 9, 10, word) for word in range(20, 59)]
    requests = [(prompt, Sampling(max_tokens=2)) for prompt in ((7,) * 800, *short)]
    sampled(*requests, of=watched)
    rows = 8192 // 800
    assert max(sizes) == 800 + (rows - 1) * 5
    assert sum(sizes) == 800 + 39 * 5 + 40


def test_a_prompt_in_common_is_read_once():
    watched, sizes = model(), []
    watched.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    other = (9, 8, 7)
    asked = [
        (prompt, Sampling(max_tokens=9, sequence_uid=uid))
        for uid, prompt in enumerate((PROMPT, PROMPT, other, PROMPT, other))
    ]

    async def run() -> list[Completion]:
        async with opened(watched) as engine:
            watch = Watch()
            late = Sampling(max_tokens=9, sequence_uid=0, stop_matcher=watch)
            first = asyncio.create_task(engine.generate(PROMPT, late))
            await watch.began.wait()  # a row that is running already is copied as well
            return await asyncio.gather(first, *(engine.generate(*each) for each in asked[1:]))

    completions = asyncio.run(run())
    assert sizes[0] == len(PROMPT)
    joined = next(index for index, size in enumerate(sizes[1:], 1) if size > 1)
    # Only the other prompt is new; two requests copy the running row, and one the new one.
    assert sizes[joined : joined + 2] == [len(other), 3]
    for request, completion in zip(asked, completions, strict=True):
        alone = one(request[1], request[0])
        assert completion.token_ids == alone.token_ids
        assert completion.logprobs == pytest.approx(alone.logprobs, abs=1e-9)


def test_a_turn_reads_only_new_tokens_unless_weights_or_prefix_have_changed():
    watched, sizes = model(), []
    watched.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )

    async def run():
        async with opened(watched) as engine:

            async def turn(ids: tuple[int, ...]) -> Completion:
                sizes.clear()
                return await engine.generate(ids, Sampling(max_tokens=5, sequence_uid=7))

            first = await turn(PROMPT)
            ids = (*PROMPT, *first.token_ids, 50, 51)
            second = await turn(ids)
            read = [sizes[0]]
            ids = (*ids, *second.token_ids, 52)
            for prompt in ((9, *ids[1:]), ids):
                await turn(prompt)
                read.append(sizes[0])
            await engine.load_weights(model(1).state_dict(), 1)
            third = await turn((*ids, 3))
            return (*PROMPT, *first.token_ids, 50, 51), second, [*read, sizes[0]], ids, third

    prompt, second, read, ids, third = asyncio.run(run())
    # The last token of a completion has been sampled, but not read.
    assert read == [1 + 2, len(ids), len(ids), len(ids) + 1]
    for of, before, completion in ((model(), prompt, second), (model(1), (*ids, 3), third)):
        expected = trainer_logprobs(of, before, completion, 1.0)
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_parked_sequences_stay_within_the_budget():
    budget = 9000

    async def run() -> list[int]:
        async with opened(max_cache_tokens=budget) as engine:
            parked = []
            for uid in range(60):
                prompt = (5,) * (10 + 7 * uid)
                await engine.generate(prompt, Sampling(max_tokens=3, sequence_uid=uid))
                parked.append(int(engine.health()["parked_tokens"]))
                assert parked[-1] + engine._cache.size <= budget
                assert parked[-1] == sum(len(each.token_ids) for each in engine._parked)
            return parked

    parked = asyncio.run(run())
    assert max(parked) > 3000
    assert any(later < earlier for earlier, later in itertools.pairwise(parked))


def test_health_counts_requests_and_tokens():
    async def run() -> tuple[dict[str, float], dict[str, float]]:
        async with opened(max_cache_tokens=100) as engine:
            watch = Watch()
            during: list[dict[str, float]] = []
            watch.seen = lambda: during.append(dict(engine.health()))
            sampling = Sampling(max_tokens=60, stop_matcher=watch)
            await asyncio.gather(*(engine.generate(PROMPT, sampling) for _ in range(2)))
            return during[2], dict(engine.health())

    during, after = asyncio.run(run())
    assert during == {
        "running": 1,
        "waiting": 1,
        "cache_tokens": 8,
        "parked_tokens": 0,
        "tokens_generated": 2,
        "tokens_dropped": 0,
        "tensors_compared": 0,
    }
    assert after == dict.fromkeys(during, 0) | {"tokens_generated": 120}


def fill(cache: KVCache, lengths: list[int]) -> int:
    """Make rows of these numbers of tokens; returns the cache's size in tokens."""
    while cache.lengths:
        cache.remove_row(0)
    for length in lengths:
        cache.lengths[cache.add_row()] = length
    states = torch.ones(1, 2, 4)
    keys, values = cache.layer(0, max(lengths), states, states)
    assert keys.shape == values.shape
    assert keys.shape[0] >= len(lengths) and keys.shape[1] >= max(lengths)
    return keys.shape[0] * keys.shape[1]


@pytest.mark.parametrize("budget", [400, 4096])
def test_the_memory_of_the_cache_stays_within_its_budget(budget):
    """Many short sequences and then a long one: rows and columns must not both stay large."""
    cache = KVCache(budget)
    assert fill(cache, [10] * (budget // 10)) <= budget
    assert fill(cache, [budget]) <= budget
    assert fill(cache, [budget // 3] * 3) <= budget


@pytest.mark.parametrize(("more_rows", "width"), [(0, 500), (40, 100), (40, 500), (40, 3)])
def test_a_cache_that_grows_keeps_what_it_holds(more_rows, width):
    """Even if the rows that make it grow are shorter than those that it holds."""
    cache = KVCache(1 << 16)
    states = torch.ones(1, 2, 4)
    for _ in range(3):
        cache.lengths[cache.add_row()] = 100
    keys, values = cache.layer(0, 100, states, states)
    keys[:3, :100] = torch.arange(300.0).view(3, 100, 1, 1)
    values[:3, :100] = -torch.arange(300.0).view(3, 100, 1, 1)
    for _ in range(more_rows):
        cache.add_row()
    grown_keys, grown_values = cache.layer(0, width, states, states)
    assert grown_keys.shape[0] >= 3 + more_rows and grown_keys.shape[1] >= width
    assert torch.equal(grown_keys[:3, :100], keys[:3, :100])
    assert torch.equal(grown_values[:3, :100], values[:3, :100])


# ----------------------------------------------------------------------- mismatch, on purpose


def mismatch(**settings: Any) -> float:
    """Mean |engine's logprob - trainer's logprob| over a long completion."""
    completion = one(Sampling(max_tokens=60), of=model().float(), **settings)
    trainers = trainer_logprobs(model().float(), PROMPT, completion)
    return torch.tensor(completion.logprobs).sub(trainers).abs().mean().item()


def test_fewer_bits_give_a_larger_mismatch():
    exact, bf16, fp8, int8 = (
        mismatch(precision=each) for each in ("float32", "bfloat16", "fp8", "int8")
    )
    assert exact < 1e-4
    assert 10 * exact < bf16 < fp8
    assert 10 * exact < int8 < fp8  # int8 has 8 bits per number, e4m3 only 3 of mantissa


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "fp8"])
def test_a_quantised_engine_reports_what_it_samples_from(precision):
    """Its logprobs are those of a forward with its own weights, not with the trainer's."""
    completion = one(Sampling(max_tokens=40), of=model().float(), precision=precision)
    own = model().float()
    if precision == "bfloat16":
        own = own.bfloat16()
    else:
        names = layer_matrices(own)
        for name, weight in own.state_dict().items():
            if name in names:
                weight.copy_(quantised(weight, precision))
    expected = trainer_logprobs(own, PROMPT, completion)
    tolerance = 0.2 if precision == "bfloat16" else 1e-4  # bf16 activations differ by the shape
    assert torch.tensor(completion.logprobs).sub(expected).abs().max() < tolerance


def test_new_weights_are_quantised_too():
    async def run() -> Completion:
        async with opened(model(1).float(), precision="int8") as engine:
            await engine.load_weights(model().float().state_dict(), version=1)
            return await engine.generate(PROMPT, Sampling(max_tokens=20))

    loaded = asyncio.run(run())
    from_the_start = one(Sampling(max_tokens=20), of=model().float(), precision="int8")
    assert loaded.token_ids == from_the_start.token_ids
    assert loaded.logprobs == pytest.approx(from_the_start.logprobs, abs=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_in_bfloat16_multiply_the_other_way_round_with_the_same_result(bias):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(96, 40, bias))
    exact = deepcopy(plain).bfloat16().double()
    thin = plain.bfloat16()
    names = [*thin.state_dict()]
    use_thin_linears(thin)
    assert type(thin[0]) is ThinLinear and [*thin.state_dict()] == names
    for shape in ((1, 96), (1, 7, 96), (2, 3, 96), (MAX_TOKENS + 1, 96)):
        states = torch.randn(shape).bfloat16()
        strided = states.transpose(0, -1).contiguous().transpose(0, -1)
        with torch.no_grad():
            expected = exact(states.double())
            for given in (states, strided):
                found = thin(given)
                assert found.shape == expected.shape and found.is_contiguous()
                torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4)


def test_a_tied_head_stays_tied_in_bfloat16_and_other_precisions_keep_their_layers():
    cache = KVCache(1 << 10)
    tied = make_model(0)
    forward = CachedForward(tied, cache, "bfloat16", 0.0)
    head = forward.model.get_output_embeddings()
    assert type(head) is ThinLinear
    assert tied.config.tie_word_embeddings == (
        head.weight is forward.model.get_input_embeddings().weight
    )
    assert forward.copy_weights(make_model(1).state_dict()) == len(tied.state_dict())
    assert type(CachedForward(make_model(0), cache, "float32", 0.0).model.lm_head) is not ThinLinear


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantised_rows_keep_their_largest_weight_and_round_the_others(precision):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 300, generator=generator) * torch.logspace(-3, 1, 5)[:, None]
    weight[3] = 0
    rounded = quantised(weight, precision)
    torch.testing.assert_close(rounded.abs().amax(1), weight.abs().amax(1))
    error = (rounded - weight).abs()
    step = weight.abs().amax(1, keepdim=True) / (127 if precision == "int8" else 448)
    bound = 0.5 * step if precision == "int8" else torch.maximum(weight.abs() / 16, step * 2**-9)
    assert (error <= bound * 1.0001).all()
    assert max(len(row.unique()) for row in rounded) <= 255


def test_only_matrices_of_the_decoder_layers_are_quantised():
    names = layer_matrices(make_model(0))
    assert len(names) == 3 * 7  # four of attention and three of the MLP
    assert all(name.startswith("model.layers.") and "norm" not in name for name in names)


def test_noise_on_the_logits_depends_on_sequence_and_position_alone():
    """Neighbours do not change it, another sequence has other noise, and its size is as set."""
    sampling = Sampling(max_tokens=30, seed=3, sequence_uid=5)
    alone = one(sampling, logit_noise=0.3)
    other = Sampling(max_tokens=25, seed=3, sequence_uid=6)
    crowded = sampled((PROMPT[:3], other), (PROMPT, sampling), logit_noise=0.3)[1]
    assert crowded.token_ids == alone.token_ids
    assert crowded.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    assert 0.05 < mismatch(logit_noise=0.3) < 0.6
    assert mismatch(logit_noise=0.03) < 0.2 * mismatch(logit_noise=0.3)
