"""The embedded engine: new weights, aborts, failures."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.engines.embedded import (
    PROMPT,
    Watch,
    model,
    one,
    opened,
    trainer_logprobs,
)
from tir_alp.engines.base import Completion, EngineFailed, Sampling
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.models.tiny.model import make_model
from tir_alp.types import StopReason

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
