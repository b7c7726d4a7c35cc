"""What every engine has to do, written against its protocol alone.

A new engine gets a line in `conftest.harness`, and has to pass these tests.
"""

import asyncio
import math
import random
from dataclasses import replace

import pytest
import torch

from tests.engines.harness import PROMPTS, distance, logprobs, logprobs_of, model
from tir_alp.engines.base import Completion, Sampling
from tir_alp.types import StopReason

pytestmark = pytest.mark.timeout(900)  # the first one waits for a server to start

OLD, NEW = model(0), model(1)
PROMPT = PROMPTS[0]


def sampled(harness, *requests, of=OLD) -> list[Completion]:
    """The completions by a new engine of requests that arrive together."""

    async def run():
        async with harness.opened(of) as engine:
            return await asyncio.gather(*(engine.generate(*request) for request in requests))

    return asyncio.run(run())


class Watch:
    """A stop rule that never holds; `reached` is set after this number of tokens."""

    def __init__(self, num_tokens: int = 1):
        self.left = num_tokens
        self.reached = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __call__(self):
        return self._feed

    def _feed(self, _: int) -> bool:
        self.left -= 1
        if self.left == 0:
            self._loop.call_soon_threadsafe(self.reached.set)
        return False


# ------------------------------------------------------------------------------- what it samples


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_trainer_forward(harness, temperature):
    sampling = Sampling(max_tokens=40, temperature=temperature)
    requests = [(prompt, replace(sampling, sequence_uid=uid)) for uid, prompt in enumerate(PROMPTS)]
    for (prompt, _), completion in zip(requests, sampled(harness, *requests), strict=True):
        assert len(completion.token_ids) == len(completion.logprobs) == 40
        assert distance({0: OLD}, prompt, completion, temperature) < 1e-4
        assert distance({0: OLD}, prompt, completion, temperature + 0.1) > 1e-2


def test_logprobs_under_top_p_are_those_of_the_truncated_distribution(harness):
    request = (PROMPT, Sampling(max_tokens=20, temperature=0.7, top_p=0.5))
    completion = sampled(harness, request)[0]
    ids = (*PROMPT, *completion.token_ids)
    rows = logprobs(OLD, ids, 0.7)[len(PROMPT) - 1 : -1].exp()
    for row, token_id, logprob in zip(
        rows.tolist(), completion.token_ids, completion.logprobs, strict=True
    ):
        kept, total = [], 0.0
        for candidate in sorted(range(len(row)), key=lambda token, row=row: -row[token]):
            kept.append(candidate)
            total += row[candidate]
            if total >= 0.5:
                break
        assert token_id in kept
        assert logprob == pytest.approx(math.log(row[token_id] / total), abs=1e-4)


def test_greedy_takes_the_most_probable_tokens_and_is_certain_of_them(harness):
    warm = (PROMPT, Sampling(max_tokens=20, sequence_uid=1))
    greedy = (PROMPT, Sampling(max_tokens=20, temperature=0.0))
    completion, other = sampled(harness, greedy, warm)
    best = logprobs(OLD, (*PROMPT, *completion.token_ids)).argmax(-1)
    assert completion.token_ids == tuple(best[len(PROMPT) - 1 : -1].tolist())
    assert completion.logprobs == (0.0,) * 20
    assert distance({0: OLD}, PROMPT, other) < 1e-4


def test_tokens_are_drawn_as_often_as_they_are_probable(harness):
    num_draws = 600
    requests = [
        (PROMPT, Sampling(max_tokens=1, temperature=2.0, sequence_uid=uid))
        for uid in range(num_draws)
    ]
    drawn = torch.tensor([each.token_ids[0] for each in sampled(harness, *requests)])
    for token_id, share in enumerate(logprobs(OLD, PROMPT, 2.0)[-1].exp().tolist()):
        sigma = math.sqrt(num_draws * share * (1 - share))
        assert abs(int((drawn == token_id).sum()) - num_draws * share) <= 5 * sigma + 1


def test_turns_continue_one_another(harness):
    """Three turns of a sequence, with tokens between them that nobody sampled."""

    async def run():
        async with harness.opened(OLD) as engine:
            ids, turns = PROMPT, []
            for _ in range(3):
                completion = await engine.generate(ids, Sampling(max_tokens=15, sequence_uid=4))
                turns.append((ids, completion))
                ids = (*ids, *completion.token_ids, 4, 50, 51)
            return turns

    for prompt, completion in asyncio.run(run()):
        assert distance({0: OLD}, prompt, completion) < 1e-4


# ------------------------------------------------------------------------------------ how it ends


def test_a_completion_ends_at_its_length(harness):
    completion = sampled(harness, (PROMPT, Sampling(max_tokens=7)))[0]
    assert (len(completion.token_ids), completion.stop_reason) == (7, StopReason.LENGTH)


def test_a_stop_token_ends_a_completion_and_stays_in_it(harness):
    stops = frozenset(range(0, 262, 2))
    completion = sampled(harness, (PROMPT, Sampling(max_tokens=60, stop_token_ids=stops)))[0]
    *before, last = completion.token_ids
    assert completion.stop_reason is StopReason.EOS
    assert last in stops and not stops & set(before)


def test_a_matcher_ends_a_completion_at_the_token_where_it_holds(harness):
    seen: list[int] = []

    def third():
        def feed(token_id: int) -> bool:
            seen.append(token_id)
            return len(seen) == 3

        return feed

    completion = sampled(harness, (PROMPT, Sampling(max_tokens=200, stop_matcher=third)))[0]
    assert completion.token_ids == tuple(seen)
    assert len(seen) == len(completion.logprobs) == 3
    assert completion.stop_reason is StopReason.STOP
    assert distance({0: OLD}, PROMPT, completion) < 1e-4


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ((), 5, "the sequence has no tokens"),
        (PROMPT, 0, "max_tokens is 0; it must be at least 1"),
        (PROMPT, 1 << 17, r"does not fit|exceeds"),
    ],
)
def test_a_request_that_can_never_run_is_refused(harness, prompt, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        sampled(harness, (prompt, Sampling(max_tokens=max_tokens)))


# ---------------------------------------------------------------------------------------- weights


def test_completions_that_begin_after_a_load_carry_its_version(harness, tmp_path):
    """Weights are given as tensors and as a folder."""
    OLD.save_pretrained(tmp_path)

    async def run():
        async with harness.opened(OLD) as engine:
            request = (PROMPT, Sampling(max_tokens=20))
            completions = [await engine.generate(*request)]
            await engine.load_weights(NEW.state_dict(), 1)
            completions.append(await engine.generate(*request))
            await engine.load_weights(tmp_path, 2)
            completions.append(await engine.generate(*request))
            return completions

    completions = asyncio.run(run())
    assert [each.policy_version for each in completions] == [0, 1, 2]
    for completion in completions:
        assert distance({0: OLD, 1: NEW, 2: OLD}, PROMPT, completion) < 1e-4
    assert (
        float(
            logprobs_of(NEW, PROMPT, completions[0])
            .sub(torch.tensor(completions[0].logprobs))
            .abs()
            .max()
        )
        > 1e-2
    )


def test_each_token_has_the_logprob_of_the_weights_that_it_names(harness):
    """New weights arrive while completions of all lengths run."""
    rng = random.Random(0)
    models = {version: model(version) for version in range(3)}
    lengths = [rng.randint(5, 150) for _ in range(12)]

    async def run():
        async with harness.opened(models[0]) as engine:
            watches = [Watch(min(3, length)) for length in lengths]
            running = [
                asyncio.create_task(
                    engine.generate(
                        PROMPTS[uid % 4],
                        Sampling(max_tokens=length, sequence_uid=uid, stop_matcher=watches[uid]),
                    )
                )
                for uid, length in enumerate(lengths)
            ]
            await asyncio.gather(*(watch.reached.wait() for watch in watches))
            for version in (1, 2):
                await engine.load_weights(models[version].state_dict(), version)
            return await asyncio.gather(*running)

    for uid, completion in enumerate(asyncio.run(run())):
        assert len(completion.token_ids) == lengths[uid]
        assert completion.policy_version == 0
        assert distance(models, PROMPTS[uid % 4], completion) < 1e-4


@pytest.mark.parametrize("wrong", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_are_refused_and_change_nothing(harness, wrong):
    weights = dict(NEW.state_dict())
    if wrong == "unknown":
        weights["model.more"] = torch.zeros(3)
    else:
        taken = weights.pop("model.norm.weight")
        if wrong == "shape":
            weights["model.norm.weight"] = taken[:-1]

    async def run():
        async with harness.opened(OLD) as engine:
            with pytest.raises(ValueError, match=r"do not fit the engine's model: 1 tensors"):
                await engine.load_weights(weights, 1)
            return await engine.generate(PROMPT, Sampling(max_tokens=10))

    completion = asyncio.run(run())
    assert completion.policy_version == 0
    assert distance({0: OLD}, PROMPT, completion) < 1e-4


# ------------------------------------------------------------------------------------------ abort


def test_an_abort_ends_one_sequence_with_what_it_has(harness):
    async def run():
        async with harness.opened(OLD) as engine:
            watch = Watch(3)
            whole = Sampling(max_tokens=900, sequence_uid=1, stop_matcher=watch)
            first = asyncio.create_task(engine.generate(PROMPT, whole))
            second = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=30)))
            await watch.reached.wait()
            await engine.abort(1)
            return await asyncio.gather(first, second)

    first, second = asyncio.run(run())
    assert (first.stop_reason, second.stop_reason) == (StopReason.ABORT, StopReason.LENGTH)
    assert 3 <= len(first.token_ids) < 900
    assert distance({0: OLD}, PROMPT, first) < 1e-4


def test_a_caller_that_gives_up_leaves_nothing_behind(harness):
    async def run():
        async with harness.opened(OLD) as engine:
            watch = Watch(3)
            sampling = Sampling(max_tokens=900, stop_matcher=watch)
            running = asyncio.create_task(engine.generate(PROMPT, sampling))
            await watch.reached.wait()
            assert engine.health()["running"] == 1
            running.cancel()
            while engine.health()["running"]:
                await asyncio.sleep(0.05)
            return await engine.generate(PROMPT, Sampling(max_tokens=5))

    assert len(asyncio.run(asyncio.wait_for(run(), 120)).token_ids) == 5
