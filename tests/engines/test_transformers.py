"""The embedded engine: its samples, their independence of the batch, its cache, its failures."""

import asyncio
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from tir_alp.engines.base import Completion, EngineFailed, Sampling
from tir_alp.engines.embedded.kv_cache import KVCache
from tir_alp.engines.embedded.precision import layer_matrices, quantised
from tir_alp.engines.embedded.sampling import draws, sample
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.models.tiny.model import make_model
from tir_alp.training.attention import PACKED, PackedSequences
from tir_alp.training.policy import hidden_states, next_token_logits, token_logprobs
from tir_alp.types import StopReason

torch.set_num_threads(1)

PROMPT: tuple[int, ...] = (2, 45, 78, 33, 1, 3)


def model(seed: int = 0) -> Any:
    """The tiny model with larger random weights, which prefer some tokens to others.

    In float64: neighbours change the last bits of a forward, and in float32 those are enough to
    move a draw that lies at the border of two tokens from one to the other.
    """
    return enlarged(make_model(seed)).double()


def enlarged(small: Any) -> Any:
    with torch.no_grad():  # fresh weights give every token the same logits
        for parameter in small.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return small.eval()


@asynccontextmanager
async def opened(of: Any = None, max_cache_tokens: int = 1 << 16, **settings: Any):
    engine = TransformersEngine(
        model() if of is None else of, max_cache_tokens=max_cache_tokens, **settings
    )
    try:
        yield engine
    finally:
        await engine.close()


def sampled(*requests: tuple[tuple[int, ...], Sampling], **settings) -> list[Completion]:
    """The completions by a new engine of requests that arrive together."""

    async def run() -> list[Completion]:
        async with opened(**settings) as engine:
            return await asyncio.gather(*(engine.generate(*request) for request in requests))

    return asyncio.run(run())


def one(sampling: Sampling, prompt: tuple[int, ...] = PROMPT, **settings) -> Completion:
    return sampled((prompt, sampling), **settings)[0]


def trainer_logprobs(
    of: Any, prompt: tuple[int, ...], completion: Completion, temperature: float = 1.0
) -> torch.Tensor:
    """The logprobs of a completion in one forward of the trainer's kind."""
    ids = torch.tensor(prompt + completion.token_ids)
    with torch.no_grad():
        layout = PackedSequences((len(ids),))
        hidden = hidden_states(of, ids, torch.arange(len(ids)), layout)
        start = len(prompt)
        return token_logprobs(of, hidden[start - 1 : -1], ids[start:], temperature=temperature)[0]


class Watch:
    """A stop rule that never holds, but reports every token to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.tokens: list[int] = []
        self.began = asyncio.Event()
        self.seen: Callable[[], None] = lambda: None

    def __call__(self) -> Callable[[int], bool]:
        return self._feed

    def _feed(self, token_id: int) -> bool:
        self.tokens.append(token_id)
        self.seen()
        self._loop.call_soon_threadsafe(self.began.set)
        return False


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
    assert draws(7, 3, 5, 4).tolist() == draws(7, 3, 0, 9)[5:].tolist()
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


# ------------------------------------------------------------------------------------ weights


def test_new_weights_wait_for_completions_which_keep_their_version():
    old, new = one(Sampling(max_tokens=40)), one(Sampling(max_tokens=40), of=model(1))
    ended: list[str] = []

    async def run() -> tuple[Completion, Completion]:
        async with opened() as engine:

            async def generate(name: str, stop_matcher=None) -> Completion:
                sampling = Sampling(max_tokens=40, stop_matcher=stop_matcher)
                completion = await engine.generate(PROMPT, sampling)
                ended.append(name)
                return completion

            async def load() -> None:
                await engine.load_weights(model(1).state_dict(), version=1)
                ended.append("load")

            watch = Watch()
            first = asyncio.create_task(generate("before", watch))
            await watch.began.wait()
            loading = asyncio.create_task(load())
            await asyncio.sleep(0)
            second = asyncio.create_task(generate("after"))
            await loading
            return await first, await second

    first, second = asyncio.run(run())
    assert ended == ["before", "load", "after"]
    assert (first.policy_version, second.policy_version) == (0, 1)
    assert (first.token_ids, second.token_ids) == (old.token_ids, new.token_ids)


def updated(on_update: str, *prompts: tuple[int, ...]) -> list[Completion]:
    """Completions of 40 tokens that new weights interrupted again and again."""

    async def run() -> list[Completion]:
        async with opened(on_update=on_update) as engine:
            watch = Watch()
            samplings = [
                Sampling(max_tokens=40, sequence_uid=uid, stop_matcher=None if uid else watch)
                for uid in range(len(prompts))
            ]
            running = [
                asyncio.create_task(engine.generate(prompt, sampling))
                for prompt, sampling in zip(prompts, samplings, strict=True)
            ]
            for version in (1, 2):
                watch.began.clear()
                await watch.began.wait()
                await engine.load_weights(model(version).state_dict(), version)
            return await asyncio.gather(*running)

    return asyncio.run(run())


def test_each_token_range_of_a_kept_completion_names_the_weights_that_sampled_it():
    prompts = (PROMPT, PROMPT[:3], PROMPT * 3)
    for prompt, completion in zip(prompts, updated("keep", *prompts), strict=True):
        spans = completion.version_spans
        assert len(completion.token_ids) == 40
        assert [span.version for span in spans] in ([0, 1, 2], [1, 2])
        for span in spans:
            expected = trainer_logprobs(model(span.version), prompt, completion)
            here = slice(span.start, span.stop)
            assert torch.tensor(completion.logprobs)[here].sub(expected[here]).abs().max() < 1e-4
            wrong = trainer_logprobs(model(span.version + 1), prompt, completion)
            assert wrong[here].sub(expected[here]).abs().max() > 1e-2


def test_a_dropped_completion_begins_again_with_the_same_draws():
    for uid, completion in enumerate(updated("drop", PROMPT, PROMPT)):
        afresh = one(Sampling(max_tokens=40, sequence_uid=uid), of=model(2))
        assert (completion.policy_version, completion.version_spans) == (2, ())
        assert completion.token_ids == afresh.token_ids


def test_loads_are_taken_one_after_another():
    async def run() -> Completion:
        async with opened() as engine:
            watch = Watch()
            sampling = Sampling(max_tokens=40, stop_matcher=watch)
            running = asyncio.create_task(engine.generate(PROMPT, sampling))
            await watch.began.wait()
            await asyncio.gather(
                *(engine.load_weights(model(seed).state_dict(), seed) for seed in (1, 2, 3))
            )
            await running
            return await engine.generate(PROMPT, Sampling(max_tokens=20))

    last = asyncio.run(run())
    assert last.policy_version == 3
    assert last.token_ids == one(Sampling(max_tokens=20), of=model(3)).token_ids


def test_weights_are_read_from_a_folder(tmp_path):
    model(1).save_pretrained(tmp_path)

    async def run() -> Completion:
        async with opened() as engine:
            await engine.load_weights(tmp_path, version=1)
            return await engine.generate(PROMPT, Sampling(max_tokens=20))

    completion = asyncio.run(run())
    assert completion.policy_version == 1
    assert completion.token_ids == one(Sampling(max_tokens=20), of=model(1)).token_ids


def missing(weights):
    del weights["model.norm.weight"]


def unknown(weights):
    weights["log_sigma"] = torch.zeros(3)


def misshapen(weights):
    weights["model.norm.weight"] = torch.zeros(95)


@pytest.mark.parametrize("spoil", [missing, unknown, misshapen])
def test_weights_that_do_not_fit_are_refused_and_change_nothing(spoil):
    weights = model(1).state_dict()
    spoil(weights)

    async def run() -> Completion:
        async with opened(version=4) as engine:
            with pytest.raises(ValueError, match=r"version 5 do not fit .* 1 tensors are missing"):
                await engine.load_weights(weights, version=5)
            return await engine.generate(PROMPT, Sampling(max_tokens=20))

    completion = asyncio.run(run())
    assert completion.policy_version == 4
    assert completion.token_ids == one(Sampling(max_tokens=20)).token_ids


def test_an_engine_that_cannot_hold_its_weights_raises():
    small = make_model(0)
    small.config.tie_word_embeddings = True
    small.tie_weights()
    weights = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    weights["lm_head.weight"] += 1.0  # a tied engine cannot hold a head of its own

    async def run() -> None:
        engine = TransformersEngine(small, max_cache_tokens=1024)
        try:
            with pytest.raises(EngineFailed, match=r"does not hold .*embed_tokens.*differs"):
                await engine.load_weights(weights, version=1)
        finally:
            await engine.close()

    asyncio.run(run())


def test_weights_that_cannot_be_copied_fail_their_caller_and_the_engine_goes_on():
    weights = {name: tensor.to("meta") for name, tensor in model(1).state_dict().items()}

    async def run() -> Completion:
        async with opened() as engine:
            async with asyncio.timeout(10):
                with pytest.raises(NotImplementedError):
                    await engine.load_weights(weights, version=1)
                await engine.load_weights(model(2).state_dict(), version=2)
            return await engine.generate(PROMPT, Sampling(max_tokens=20))

    assert asyncio.run(run()).policy_version == 2


def test_weights_that_fail_do_not_fail_those_that_wait_for_them():
    broken = {name: tensor.to("meta") for name, tensor in model(1).state_dict().items()}

    async def run() -> Sequence[BaseException | None]:
        async with opened() as engine, asyncio.timeout(10):
            return await asyncio.gather(
                engine.load_weights(broken, version=1),
                engine.load_weights(model(2).state_dict(), version=2),
                return_exceptions=True,
            )

    first, second = asyncio.run(run())
    assert isinstance(first, NotImplementedError) and second is None


# ----------------------------------------------------------------------- abort, cancel, failure


def test_an_abort_of_one_sequence_returns_what_it_has_and_leaves_the_others():
    whole = [one(Sampling(max_tokens=120, sequence_uid=uid)) for uid in (1, 2)]

    async def run() -> list[Completion]:
        async with opened() as engine:
            watch = Watch()
            samplings = [
                Sampling(max_tokens=120, sequence_uid=1, stop_matcher=watch),
                Sampling(max_tokens=120, sequence_uid=2),
            ]
            tasks = [asyncio.create_task(engine.generate(PROMPT, each)) for each in samplings]
            await watch.began.wait()
            await engine.abort(1)
            return await asyncio.gather(*tasks)

    aborted, other = asyncio.run(run())
    length = len(aborted.token_ids)
    assert aborted.stop_reason is StopReason.ABORT
    assert 1 <= length < 120 and len(aborted.logprobs) == length
    assert aborted.token_ids == whole[0].token_ids[:length]
    assert other.token_ids == whole[1].token_ids


def test_an_abort_of_all_also_ends_those_that_wait():
    async def run() -> tuple[list[Completion], Completion]:
        async with opened(max_cache_tokens=400) as engine:
            watch = Watch()
            sampling = Sampling(max_tokens=300, stop_matcher=watch)
            tasks = [asyncio.create_task(engine.generate(PROMPT, sampling)) for _ in range(3)]
            await watch.began.wait()
            await engine.abort()
            ended = await asyncio.gather(*tasks)
            return ended, await engine.generate(PROMPT, Sampling(max_tokens=5))

    ended, after = asyncio.run(run())
    assert {each.stop_reason for each in ended} == {StopReason.ABORT}
    assert len(ended[0].token_ids) >= 1 and [len(each.token_ids) for each in ended[1:]] == [0, 0]
    assert len(after.token_ids) == 5


def test_a_caller_that_gives_up_frees_its_row():
    async def run() -> tuple[Completion, dict[str, float]]:
        async with opened() as engine:
            watch = Watch()
            sampling = Sampling(max_tokens=900, sequence_uid=1, stop_matcher=watch)
            late = asyncio.create_task(engine.generate(PROMPT, sampling))
            other = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=60)))
            await watch.began.wait()
            late.cancel()
            completion = await other
            return completion, dict(engine.health())

    completion, health = asyncio.run(run())
    assert completion.token_ids == one(Sampling(max_tokens=60)).token_ids
    assert (health["running"], health["waiting"], health["cache_tokens"]) == (0, 0, 0)


def test_a_forward_that_fails_fails_its_callers_and_the_engine_goes_on():
    broken = model()

    def fail(*_):
        handle.remove()
        raise RuntimeError("out of memory")

    async def run() -> tuple[list[Any], Completion]:
        nonlocal handle
        async with opened(broken) as engine:
            watch = Watch()
            sampling = Sampling(max_tokens=300, stop_matcher=watch)
            tasks = [asyncio.create_task(engine.generate(PROMPT, sampling)) for _ in range(3)]
            await watch.began.wait()
            handle = broken.base_model.register_forward_pre_hook(fail)
            failed = await asyncio.gather(*tasks, return_exceptions=True)
            return failed, await engine.generate(PROMPT, Sampling(max_tokens=20))

    handle: Any = None
    failed, after = asyncio.run(run())
    assert [str(each) for each in failed] == ["out of memory"] * 3
    assert after == one(Sampling(max_tokens=20))


def test_closing_an_engine_cancels_its_requests():
    async def run() -> list[Any]:
        async with opened(max_cache_tokens=400) as engine:
            watch = Watch()
            sampling = Sampling(max_tokens=300, stop_matcher=watch)
            tasks = [asyncio.create_task(engine.generate(PROMPT, sampling)) for _ in range(2)]
            await watch.began.wait()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(each) for each in asyncio.run(run())] == [asyncio.CancelledError] * 2


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
    requests = [((7,) * length, Sampling(max_tokens=2)) for length in (800, *[5] * 39)]
    sampled(*requests, of=watched)
    rows = 8192 // 800
    assert max(sizes) == 800 + (rows - 1) * 5
    assert sum(sizes) == 800 + 39 * 5 + 40


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
                assert parked[-1] == sum(len(each.token_ids) for each in engine._parked.values())
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
    assert keys.shape[0] >= len(lengths) and keys.shape[2] >= max(lengths)
    return keys.shape[0] * keys.shape[2]


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
    keys[:3, :, :100] = torch.arange(300.0).view(3, 1, 100, 1)
    values[:3, :, :100] = -torch.arange(300.0).view(3, 1, 100, 1)
    for _ in range(more_rows):
        cache.add_row()
    grown_keys, grown_values = cache.layer(0, width, states, states)
    assert grown_keys.shape[0] >= 3 + more_rows and grown_keys.shape[2] >= width
    assert torch.equal(grown_keys[:3, :, :100], keys[:3, :, :100])
    assert torch.equal(grown_values[:3, :, :100], values[:3, :, :100])


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
