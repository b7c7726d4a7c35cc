"""The embedded engine: its samples, and their independence of the batch."""

import asyncio
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from tests.engines.embedded import (
    PROMPT,
    Watch,
    enlarged,
    model,
    one,
    opened,
    sampled,
    trainer_logprobs,
)
from tir_alp.engines.base import Completion, Sampling
from tir_alp.engines.embedded.sampling import draws, sample
from tir_alp.training.attention import PACKED, PackedSequences
from tir_alp.training.policy import hidden_states, next_token_logits
from tir_alp.types import StopReason

# ------------------------------------------------------------------------------ what it samples


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_trainer_forward(temperature):
    sampling = Sampling(max_tokens=60, temperature=temperature)
    of = model().float()
    completion = one(sampling, of=of)
    expected = trainer_logprobs(of, PROMPT, completion, temperature)
    assert len(completion.token_ids) == len(completion.logprobs) == 60
    assert torch.tensor(completion.logprobs).sub(expected).abs().max() < 1e-4
    other = trainer_logprobs(of, PROMPT, completion, temperature + 0.1)
    assert other.sub(expected).abs().max() > 1e-2


@pytest.mark.parametrize("top_p", [0.9, 0.5])
def test_logprobs_under_top_p_are_those_of_the_truncated_distribution(top_p):
    completion = one(Sampling(max_tokens=40, temperature=0.7, top_p=top_p))
    reference, ids = model(), list(PROMPT)
    for token_id, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
        with torch.no_grad():
            hidden = hidden_states(
                reference,
                torch.tensor(ids),
                torch.arange(len(ids)),
                PackedSequences((len(ids),)),
            )
            probabilities = (next_token_logits(reference, hidden[-1]) / 0.7).softmax(-1).tolist()
        kept, total = [], 0.0
        for candidate in sorted(range(len(probabilities)), key=lambda c: -probabilities[c]):
            kept.append(candidate)
            total += probabilities[candidate]
            if total >= top_p:
                break
        assert token_id in kept
        assert logprob == pytest.approx(math.log(probabilities[token_id] / total), abs=1e-4)
        ids.append(token_id)


def test_greedy_takes_the_most_probable_token_and_is_certain_of_it():
    completion = one(Sampling(max_tokens=20, temperature=0.0))
    reference, ids = model(), list(PROMPT)
    for token_id in completion.token_ids:
        with torch.no_grad():
            hidden = hidden_states(
                reference,
                torch.tensor(ids),
                torch.arange(len(ids)),
                PackedSequences((len(ids),)),
            )
        assert token_id == int(next_token_logits(reference, hidden[-1]).argmax())
        ids.append(token_id)
    assert completion.logprobs == (0.0,) * 20


def test_greedy_and_sampled_rows_share_a_batch():
    greedy, warm = Sampling(max_tokens=20, temperature=0.0), Sampling(max_tokens=20)
    together = sampled((PROMPT, greedy), (PROMPT, warm))
    assert [each.token_ids for each in together] == [one(greedy).token_ids, one(warm).token_ids]


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, num_key_value_heads=1),
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8),
    ],
    ids=["shared keys", "sliding window"],
)
def test_logprobs_of_other_attentions_are_those_of_the_librarys_own(config):
    torch.manual_seed(0)
    packed = enlarged(
        AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=PACKED)
    )
    eager = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="eager").eval()
    eager.load_state_dict(packed.state_dict())
    prompts = [tuple(range(5, 5 + length)) for length in (3, 12, 20)]
    requests = [(prompt, Sampling(max_tokens=30)) for prompt in prompts]
    for prompt, completion in zip(prompts, sampled(*requests, of=packed), strict=True):
        ids = torch.tensor(prompt + completion.token_ids)
        with torch.no_grad():
            logprobs = eager(ids[None], use_cache=False).logits[0].log_softmax(-1)
        places = torch.arange(len(prompt), len(ids))
        expected = logprobs[places - 1, ids[places]]
        assert torch.tensor(completion.logprobs).sub(expected).abs().max() < 1e-4


# ----------------------------------------------------------------------------------- the draws


def test_draws_are_a_function_of_seed_sequence_and_position():
    generator = np.random.Generator(np.random.Philox(key=np.array([7, 3], np.uint64)))
    every = generator.random(3000)
    for start, count in ((0, 9), (1, 2), (5, 4), (8, 1), (2047, 900)):
        assert draws(7, 3, start, count).tolist() == every[start : start + count].tolist()
    others = [draws(7, 4, 5, 4), draws(8, 3, 5, 4), draws(7, 3, 6, 4)]
    assert all((other != draws(7, 3, 5, 4)).all() for other in others)
    assert draws((1 << 32) + 1, (1 << 40) + 1, 0, 1).shape == (1,)


@pytest.mark.parametrize("along", ["positions", "sequences", "seeds"])
def test_twenty_thousand_draws_have_the_requested_distribution(along):
    count = 20_000
    uniform = {
        "positions": lambda: draws(0, 0, 0, count),
        "sequences": lambda: np.array([draws(0, uid, 9, 1)[0] for uid in range(count)]),
        "seeds": lambda: np.array([draws(seed, 0, 9, 1)[0] for seed in range(count)]),
    }[along]()
    probabilities = torch.tensor([0.4, 0.3, 0.0, 0.2, 0.09, 0.01])
    ids, logprobs = sample(
        probabilities.log().expand(count, -1),
        torch.ones(count),
        torch.ones(count),
        torch.from_numpy(uniform),
    )
    counts = Counter(ids.tolist())
    for token_id, probability in enumerate(probabilities.tolist()):
        sigma = math.sqrt(count * probability * (1 - probability))
        assert abs(counts[token_id] - count * probability) <= 4 * sigma
    torch.testing.assert_close(logprobs, probabilities.log()[ids])


def test_a_token_without_probability_is_never_drawn_not_even_at_the_ends():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).expand(4, -1)
    uniform = torch.tensor([0.0, 0.5, 0.49999, 1 - 2**-53], dtype=torch.float64)
    ids, _ = sample(logits, torch.ones(4), torch.ones(4), uniform)
    assert ids.tolist() == [1, 3, 1, 3]


@pytest.mark.parametrize("num_words", [2, 64, 1000, 4096])
def test_a_draw_is_where_the_cumulative_distribution_passes_it(num_words):
    """By the definition, in float64, for rows of all temperatures and truncations at once."""
    count = 2000
    generator = torch.Generator().manual_seed(num_words)
    logits = 5 * torch.randn(count, num_words, generator=generator)
    temperature = torch.tensor([1.0, 0.7, 1.3, 0.0]).repeat(count // 4)
    top_p = torch.tensor([1.0, 1.0, 0.9, 0.5, 1.0]).repeat(count // 5)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    ids, logprobs = sample(logits, temperature, top_p, uniform)
    different = 0
    for row in range(count):
        if temperature[row] == 0:
            assert (ids[row], logprobs[row]) == (logits[row].argmax(), 0)
            continue
        weights = (logits[row].double() / temperature[row].double()).softmax(-1)
        ordered, order = weights.sort(descending=True)
        kept = ordered.cumsum(-1) - ordered < top_p[row]
        weights[order[~kept]] = 0
        weights /= weights.sum()
        expected = int((weights.cumsum(-1) <= uniform[row]).sum())
        different += int(ids[row]) != expected
        assert logprobs[row] == pytest.approx(float(weights[ids[row]].log()), abs=1e-5)
    assert different <= 1  # a draw at the border of two tokens, by rounding in float32


def test_the_same_key_gives_the_same_tokens_and_another_key_others():
    same = [one(Sampling(max_tokens=30, seed=5, sequence_uid=9)) for _ in range(2)]
    assert same[0] == same[1]
    for seed, uid in ((6, 9), (5, 10)):
        other = one(Sampling(max_tokens=30, seed=seed, sequence_uid=uid))
        assert other.token_ids != same[0].token_ids


def test_a_second_turn_continues_the_draws_of_the_first():
    whole = one(Sampling(max_tokens=30))
    first = one(Sampling(max_tokens=12))
    second = one(Sampling(max_tokens=18), PROMPT + first.token_ids)
    assert first.token_ids + second.token_ids == whole.token_ids


# -------------------------------------------------------------------------------- neighbours


def test_a_completion_does_not_depend_on_its_neighbours():
    """Forty requests of all lengths join at random moments, and leave when they are done."""
    rng = random.Random(0)
    requests = [
        (
            tuple(rng.randrange(6, 262) for _ in range(rng.randint(1, 90))),
            Sampling(max_tokens=rng.randint(1, 50), seed=1, sequence_uid=uid),
        )
        for uid in range(40)
    ]

    async def crowd() -> tuple[list[Completion], int]:
        most = 0
        async with opened() as engine:

            async def join(request) -> Completion:
                nonlocal most
                await asyncio.sleep(rng.uniform(0, 0.3))
                completion = await engine.generate(*request)
                most = max(most, int(engine.health()["running"]))
                return completion

            return await asyncio.gather(*map(join, requests)), most

    together, most = asyncio.run(crowd())
    assert most > 5  # they shared forwards
    for index in range(0, 40, 4):
        alone = one(requests[index][1], requests[index][0])
        assert together[index].token_ids == alone.token_ids
        assert together[index].logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_requests_join_and_leave_at_any_token():
    lengths = (1, 2, 3, 5, 8, 13)
    whole = one(Sampling(max_tokens=13))

    async def staggered() -> list[Completion]:
        async with opened() as engine:
            tasks = []
            for length in reversed(lengths):
                watch = Watch()
                sampling = Sampling(max_tokens=length, stop_matcher=watch)
                tasks.append(asyncio.create_task(engine.generate(PROMPT, sampling)))
                await watch.began.wait()
            return await asyncio.gather(*tasks)

    for length, completion in zip(reversed(lengths), asyncio.run(staggered()), strict=True):
        assert completion.token_ids == whole.token_ids[:length]


def test_the_time_in_the_queue_is_told():
    fed: list[float] = []

    def matcher() -> Callable[[int], bool]:
        return lambda token_id: fed.append(time.monotonic()) or False

    async def run() -> tuple[list[Completion], float]:
        async with opened(max_cache_tokens=60) as engine:  # room for one of them
            samplings = [
                Sampling(max_tokens=40, stop_matcher=matcher),
                Sampling(max_tokens=40, sequence_uid=1),
            ]
            began = time.monotonic()
            both = await asyncio.gather(*(engine.generate(PROMPT, each) for each in samplings))
            return both, time.monotonic() - began

    (first, second), elapsed_s = asyncio.run(run())
    assert len(fed) == 40 and fed[-1] - fed[0] <= second.queue_s < elapsed_s
    assert 0 < first.queue_s < elapsed_s - (fed[-1] - fed[0])


# ------------------------------------------------------------------------------ how it ends


def test_a_completion_ends_at_its_length():
    completion = one(Sampling(max_tokens=7))
    assert (len(completion.token_ids), completion.stop_reason) == (7, StopReason.LENGTH)


def test_a_stop_token_ends_a_completion_and_stays_in_it():
    whole = one(Sampling(max_tokens=30)).token_ids
    stop = whole[9]
    completion = one(Sampling(max_tokens=30, stop_token_ids=frozenset({stop})))
    assert completion.token_ids == whole[: whole.index(stop) + 1]
    assert completion.stop_reason is StopReason.EOS


def test_a_matcher_ends_a_completion_at_the_token_where_it_holds():
    def third() -> Callable[[int], bool]:
        calls = itertools.count(1)
        return lambda _: next(calls) == 3

    completion = one(Sampling(max_tokens=30, stop_matcher=third))
    assert completion.token_ids == one(Sampling(max_tokens=30)).token_ids[:3]
    assert completion.stop_reason is StopReason.STOP


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ((), 5, "the sequence has no tokens"),
        (PROMPT, 0, "max_tokens is 0; it must be at least 1"),
        (PROMPT, 95, "6 tokens with 95 to sample does not fit into the engine's cache of 100"),
    ],
)
def test_a_request_that_can_never_run_is_refused(prompt, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        one(Sampling(max_tokens=max_tokens), prompt, max_cache_tokens=100)
