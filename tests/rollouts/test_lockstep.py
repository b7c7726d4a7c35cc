"""Episodes sample in the order of their uids, once all that are running have asked."""

import asyncio
import random

import pytest

from tir_alp.engines.base import Completion, Generate, Sampling
from tir_alp.rollouts.lockstep import Lockstep
from tir_alp.types import StopReason

NOTHING = Completion(token_ids=(), logprobs=(), stop_reason=StopReason.EOS, policy_version=0)


class Engine:
    """Records the order of its calls, and takes a moment for each."""

    def __init__(self, seed: int = 0):
        self.asked: list[int] = []
        self._rng = random.Random(seed)

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        self.asked.append(sampling.sequence_uid)
        await asyncio.sleep(self._rng.uniform(0, 0.003))
        return NOTHING


def sampling(uid: int) -> Sampling:
    return Sampling(max_tokens=1, sequence_uid=uid)


async def play(lockstep: Lockstep, generate: Generate, uid: int, delays: list[float]) -> None:
    """An episode with one turn per delay, which is how long the tool takes before the turn."""
    with lockstep.episode():
        for delay in delays:
            await asyncio.sleep(delay)
            await generate((1,), sampling(uid))


def limited(body) -> None:
    async def run() -> None:
        async with asyncio.timeout(20):
            await body()

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(3))
def test_episodes_sample_together_by_uid_however_long_their_tools_take(seed):
    rng, engine = random.Random(seed), Engine(seed)
    lengths = {3: 3, 1: 1, 2: 2, 0: 3}

    async def body() -> None:
        lockstep = Lockstep()
        generate = lockstep.in_step(engine.generate)
        await asyncio.gather(
            *(
                play(lockstep, generate, uid, [rng.uniform(0, 0.01) for _ in range(length)])
                for uid, length in lengths.items()
            )
        )

    limited(body)
    assert engine.asked == [0, 1, 2, 3, 0, 2, 3, 0, 3]


def test_no_completion_starts_before_all_episodes_wait():
    engine = Engine()

    async def body() -> None:
        lockstep = Lockstep()
        generate = lockstep.in_step(engine.generate)
        tool = asyncio.Event()

        async def slow() -> None:
            with lockstep.episode():
                await tool.wait()
                await generate((1,), sampling(0))

        episodes = [
            asyncio.create_task(each) for each in (slow(), play(lockstep, generate, 1, [0.0]))
        ]
        await asyncio.sleep(0.02)
        assert engine.asked == []
        tool.set()
        await asyncio.gather(*episodes)

    limited(body)
    assert engine.asked == [0, 1]


def test_an_episode_that_ends_is_no_longer_waited_for():
    engine = Engine()

    async def body() -> None:
        lockstep = Lockstep()
        generate = lockstep.in_step(engine.generate)
        tool = asyncio.Event()

        async def fails() -> None:
            with pytest.raises(ZeroDivisionError), lockstep.episode():
                await tool.wait()
                raise ZeroDivisionError

        episodes = [
            asyncio.create_task(each) for each in (fails(), play(lockstep, generate, 1, [0.0]))
        ]
        await asyncio.sleep(0.01)
        assert engine.asked == []
        tool.set()
        await asyncio.gather(*episodes)

    limited(body)
    assert engine.asked == [1]


def test_an_episode_that_gives_up_waiting_does_not_hold_up_the_others():
    engine = Engine()

    async def body() -> None:
        lockstep = Lockstep()
        generate = lockstep.in_step(engine.generate)
        tool = asyncio.Event()

        async def slow() -> None:
            with lockstep.episode():
                await tool.wait()
                await generate((1,), sampling(0))

        async def impatient() -> None:
            with pytest.raises(TimeoutError), lockstep.episode():
                async with asyncio.timeout(0.01):
                    await generate((1,), sampling(1))

        waiting = [
            asyncio.create_task(each) for each in (slow(), play(lockstep, generate, 2, [0.0]))
        ]
        await asyncio.sleep(0)  # they enter
        await impatient()
        assert engine.asked == []
        tool.set()
        await asyncio.gather(*waiting)

    limited(body)
    assert engine.asked == [0, 2]
