"""The embedded engine: beginnings that sequences have in common are read and held once."""

import asyncio
import random
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from tests.engines.embedded import (
    Watch,
    enlarged,
    model,
    one,
    opened,
    sampled,
    trainer_logprobs,
)
from tests.engines.test_transformers import SIZES
from tir_alp.engines.base import Completion, Sampling
from tir_alp.engines.embedded.kv_cache import KVCache
from tir_alp.engines.embedded.prefix import (
    MIN_SHARED,
    Prefix,
    PrefixStack,
    find_prefix,
    num_held,
    to_stacks,
)
from tir_alp.engines.embedded.prefix_groups import PrefixGroups
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.training.attention import PACKED, attend_in_rows
from tir_alp.types import StopReason

LONG = tuple(random.Random(1).choices(range(6, 262), k=300))
OTHER = tuple(random.Random(2).choices(range(6, 262), k=280))


def watched() -> tuple[Any, list[int]]:
    """A model, and the numbers of tokens of its forwards so far."""
    of, sizes = model(), []
    of.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return of, sizes


def same(one: Completion, other: Completion) -> bool:
    close = other.logprobs == pytest.approx(one.logprobs, abs=1e-9)
    return one.token_ids == other.token_ids and bool(close)


def held(engine: TransformersEngine) -> int:
    """Tokens that the engine's tensors have room for, in the first layer."""
    assert isinstance(engine._cache, KVCache)
    rows = [keys.shape[0] * keys.shape[1] for keys, _ in [*engine._cache._layers.values()][:1]]
    stacks = {each.stack for each in engine._prefixes() if each.stack is not None}
    prefixes = [each.states[0][0][..., 0, 0].numel() for each in stacks]
    return sum(rows) + sum(prefixes) + sum(len(each.states[0][0]) for each in engine._parked)


# ------------------------------------------------------------------------------- groups, turns


def test_a_group_reads_and_holds_its_prompt_once():
    of, sizes = watched()
    most: list[float] = [0, 0]

    async def run() -> list[Completion]:
        async with opened(of) as engine:
            watch = Watch()

            def seen() -> None:
                most[:] = max(most[0], held(engine)), max(most[1], engine.health()["cache_tokens"])

            watch.seen = seen
            watching = Sampling(max_tokens=30, sequence_uid=0, stop_matcher=watch)
            others = [Sampling(max_tokens=30, sequence_uid=uid) for uid in range(1, 8)]
            return await asyncio.gather(*(engine.generate(LONG, x) for x in (watching, *others)))

    completions = asyncio.run(run())
    assert sizes == [len(LONG) - 1] + [8] * 30
    assert most[1] <= len(LONG) - 1 + 8 * 30
    assert most[0] == len(LONG) - 1 + 16 * 64  # rows that repeated the prompt would hold 16 * 384
    for uid in (0, 3, 7):
        assert same(completions[uid], one(Sampling(max_tokens=30, sequence_uid=uid), LONG))


def test_turns_of_a_group_go_on_from_rows_of_their_own_and_the_prompt_of_all():
    of, sizes = watched()

    async def run():
        async with opened(of) as engine:

            async def turn(prompt: tuple[int, ...], uid: int) -> tuple[int, ...]:
                completion = await engine.generate(prompt, Sampling(max_tokens=5, sequence_uid=uid))
                return (*prompt, *completion.token_ids)

            firsts = await asyncio.gather(*(turn(LONG, uid) for uid in range(4)))
            parked = engine.health()["parked_tokens"]
            sizes.clear()
            asked = [(*each, 50 + uid, 51) for uid, each in enumerate(firsts)]
            seconds = await asyncio.gather(*(turn(each, uid) for uid, each in enumerate(asked)))
            # A fifth sequence continues as the first did, and all that was asked is in the cache.
            read = sizes[0]
            sizes.clear()
            fork = await turn((*LONG, 9), 4)
            return parked, read, asked, seconds, sizes[0], fork

    parked, read, asked, seconds, forked, fork = asyncio.run(run())
    # The last token of a completion has been sampled, but not read.
    assert parked == 4 * (1 + 4)
    assert read == 4 * (1 + 2)
    assert forked == 2
    for uid, (prompt, after) in enumerate(zip(asked, seconds, strict=True)):
        expected = one(Sampling(max_tokens=5, sequence_uid=uid), prompt).token_ids
        assert after[len(prompt) :] == expected
    expected = one(Sampling(max_tokens=5, sequence_uid=4), (*LONG, 9)).token_ids
    assert fork[len(LONG) + 1 :] == expected


def test_a_long_beginning_is_shared_by_different_prompts_and_by_who_comes_later():
    of, sizes = watched()
    prompts = [(*LONG, 10, 11), (*LONG, 12), LONG[:270], (*LONG, 10, 11), LONG, (*OTHER, 1)]
    uids = range(len(prompts))

    async def run() -> list[Completion]:
        async with opened(of) as engine:
            watch = Watch()
            samplings = [
                Sampling(max_tokens=9, sequence_uid=uid, stop_matcher=None if uid else watch)
                for uid in uids
            ]
            early = [
                asyncio.create_task(engine.generate(prompt, sampling))
                for prompt, sampling in zip(prompts[:2], samplings[:2], strict=True)
            ]
            await watch.began.wait()
            asked = zip(prompts[2:], samplings[2:], strict=True)
            late = await asyncio.gather(*(engine.generate(*each) for each in asked))
            return [*await asyncio.gather(*early), *late]

    completions = asyncio.run(run())
    assert sizes[:3] == [len(LONG), 2, 1]
    assert sum(sizes) < 1000  # of 1756 tokens that the prompts have, and 54 sampled ones
    for uid, completion in enumerate(completions):
        assert same(completion, one(Sampling(max_tokens=9, sequence_uid=uid), prompts[uid]))


# ----------------------------------------------------------------------- what could go wrong


def test_a_model_with_a_sliding_window():
    torch.manual_seed(0)
    sizes: dict[str, Any] = SIZES | {"vocab_size": 262}
    config = MistralConfig(**sizes, num_key_value_heads=2, sliding_window=40)
    packed = enlarged(
        AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=PACKED)
    )
    eager = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="eager").eval()
    eager.load_state_dict(packed.state_dict())
    requests = [(LONG, Sampling(max_tokens=30, sequence_uid=uid)) for uid in range(3)]
    for completion in sampled(*requests, of=packed):
        ids = torch.tensor(LONG + completion.token_ids)
        with torch.no_grad():
            logprobs = eager(ids[None], use_cache=False).logits[0].log_softmax(-1)
        places = torch.arange(len(LONG), len(ids))
        expected = logprobs[places - 1, ids[places]]
        assert torch.tensor(completion.logprobs).sub(expected).abs().max() < 1e-4


async def three_of(
    prompt: tuple[int, ...], engine: TransformersEngine
) -> list[asyncio.Task[Completion]]:
    """Three completions of a prompt that are being sampled."""
    watch = Watch()
    samplings = [
        Sampling(max_tokens=25, sequence_uid=uid, stop_matcher=None if uid else watch)
        for uid in range(3)
    ]
    running = [asyncio.create_task(engine.generate(prompt, each)) for each in samplings]
    await watch.began.wait()
    return running


@pytest.mark.parametrize("on_update", ["keep", "drop"])
def test_new_weights_read_a_shared_prompt_again(on_update):
    async def run() -> list[Completion]:
        async with opened(on_update=on_update) as engine:
            running = await three_of(LONG, engine)
            await engine.load_weights(model(1).state_dict(), 1)
            return await asyncio.gather(*running)

    for completion in asyncio.run(run()):
        assert {span.version for span in completion.versions} == (
            {0, 1} if on_update == "keep" else {1}
        )
        for span in completion.versions:
            expected = trainer_logprobs(model(span.version), LONG, completion)
            here = slice(span.start, span.stop)
            assert torch.tensor(completion.logprobs)[here].sub(expected[here]).abs().max() < 1e-4


def test_a_member_that_is_aborted_leaves_the_prompt_to_the_others():
    async def run() -> list[Completion]:
        async with opened() as engine:
            running = await three_of(LONG, engine)
            await engine.abort(1)
            return await asyncio.gather(*running)

    first, aborted, last = asyncio.run(run())
    assert aborted.stop_reason is StopReason.ABORT and len(aborted.token_ids) < 25
    assert same(first, one(Sampling(max_tokens=25, sequence_uid=0), LONG))
    assert same(last, one(Sampling(max_tokens=25, sequence_uid=2), LONG))


@pytest.mark.parametrize("budget", [330, 1200, 5000])
def test_prefixes_rows_and_parked_sequences_stay_within_the_budget_together(budget):
    """Groups, singles and second turns of all lengths join at random moments."""
    rng = random.Random(budget)
    tops: list[int] = []

    async def run() -> list[tuple[int, tuple[int, ...], Completion]]:
        async with opened(max_cache_tokens=budget) as engine:

            async def episode(prompt: tuple[int, ...], uid: int):
                await asyncio.sleep(rng.uniform(0, 0.5))
                done: list[tuple[tuple[int, ...], Completion]] = []
                for _ in range(rng.randint(1, 2)):
                    watch = Watch()
                    watch.seen = lambda: tops.append(held(engine))
                    sampling = Sampling(max_tokens=12, sequence_uid=uid, stop_matcher=watch)
                    completion = await engine.generate(prompt, sampling)
                    done.append((prompt, completion))
                    prompt = (*prompt, *completion.token_ids, 5)
                return done

            prompts = [LONG[:290], LONG[:290], LONG[:270], OTHER, LONG[:9], OTHER[:20], LONG[:290]]
            everything = [(prompt, uid) for uid, prompt in enumerate(prompts * 3)]
            found = await asyncio.gather(*(episode(*each) for each in everything))
            return [(uid, *each) for uid, done in enumerate(found) for each in done]

    completions = asyncio.run(run())
    assert max(tops) <= budget
    for uid, prompt, completion in completions[::5]:
        assert same(completion, one(Sampling(max_tokens=12, sequence_uid=uid), prompt))


@pytest.mark.parametrize("members", [{0: [0, 3], 1: [1], 2: [2]}, {2: [1, 0]}, {0: [3], 2: [0]}])
def test_prefixes_of_a_stack_are_asked_together(members: dict[int, list[int]]):
    """Each row attends to its prefix and its own tokens, as if it had a copy of both."""
    torch.manual_seed(0)
    lengths, num_own = (7, 5, 6), torch.tensor([2, 4, 1, 3])
    stack = PrefixStack(lengths)
    stack.states[0] = (torch.randn(3, 7, 2, 8), torch.randn(3, 7, 2, 8))
    prefixes: list[Prefix | None] = [None] * 4
    for place, rows in members.items():
        prefix = Prefix(tuple(range(lengths[place])), stack, place)
        for row in rows:
            prefixes[row] = prefix
    query, (keys, values) = torch.randn(4, 6, 8), torch.randn(2, 4, 4, 2, 8)
    bias = torch.zeros(4, 1, 1, 4).masked_fill(
        torch.arange(4) >= num_own[:, None, None, None], -1e9
    )
    groups = PrefixGroups(prefixes, torch.device("cpu"))
    found = groups.attend(0, query, keys, values, bias, None)
    for row, prefix in enumerate(prefixes):
        before = (keys[0, :0], values[0, :0]) if prefix is None else prefix.states(0)
        own = (keys[row, : num_own[row]], values[row, : num_own[row]])
        both = [torch.cat(each)[None] for each in zip(before, own, strict=True)]
        mask = torch.ones(1, both[0].shape[1], dtype=torch.bool)
        expected = attend_in_rows(query[row][None, None], *both, mask=mask, scale=None)
        torch.testing.assert_close(found[row], expected[0, 0])


# ----------------------------------------------------------------------------- what is shared


def test_prefixes_of_about_the_same_length_get_one_tensor():
    def lengths(*given: int) -> list[list[int]]:
        return [[*map(len, each)] for each in to_stacks(Prefix(tuple(range(n))) for n in given)]

    assert lengths(300, 280, 310) == [[310, 300, 280]]
    assert lengths(300, 3000, 2900) == [[3000, 2900], [300]]
    assert lengths(*[300] * 9) == [[300] * 8, [300]]
    read = Prefix(LONG, PrefixStack((290, 300)), 1)
    assert num_held([read, Prefix(LONG[:270]), Prefix(LONG[:290])]) == 2 * 300 + 2 * 290


def test_what_sequences_share():
    def length(tokens, known=(), waiting=()) -> int | None:
        found = find_prefix(tokens, known, waiting)
        return None if found is None else len(found)

    assert MIN_SHARED < 280
    assert length(LONG) is None
    assert length(LONG, waiting=[OTHER, LONG]) == 299  # each reads its last token
    assert length(LONG, waiting=[(*LONG, 1)]) == 299
    assert length((*LONG, 1), waiting=[LONG]) == 299
    assert length((*LONG, 1), waiting=[(*LONG, 2), LONG[:290]]) == 300
    assert length(LONG[:MIN_SHARED], waiting=[LONG]) is None
    assert length(LONG[: MIN_SHARED + 1], waiting=[LONG]) == MIN_SHARED
    known = [Prefix(LONG[:280]), Prefix(LONG[:290]), Prefix(OTHER)]
    assert find_prefix(LONG, known, ()) is known[1]
    assert find_prefix(LONG, known, [LONG]) is known[1]  # nine tokens more are not worth a part
    assert find_prefix(LONG[:290], known, ()) is known[0]
    longer = (*LONG, *OTHER)
    assert length(longer, known, [longer]) == 579
