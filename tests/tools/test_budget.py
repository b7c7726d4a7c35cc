"""Who waits for memory, and who goes first."""

import asyncio

import pytest

from tir_alp.tools.sandbox import Limits, Outcome, SandboxConfig, SandboxError, create_sandbox
from tir_alp.tools.sandbox.budget import MemoryBudget


def test_what_fits_does_not_wait():
    async def scenario():
        budget = MemoryBudget(100, max_wait_s=1)
        await budget.reserve("a", 60)
        await budget.reserve("b", 40)
        assert budget.reserved_mb == 100

    asyncio.run(scenario())


def test_first_come_first_served():
    async def scenario():
        budget, order = MemoryBudget(100, max_wait_s=5), []
        await budget.reserve("a", 80)

        async def take(owner: str, megabytes: float):
            await budget.reserve(owner, megabytes)
            order.append(owner)

        tasks = [asyncio.create_task(take(*work)) for work in (("big", 90), ("small", 10))]
        await asyncio.sleep(0.01)
        assert order == []  # the small one would fit, and does not overtake
        budget.settle("a", 5)
        await asyncio.sleep(0.01)
        assert order == ["big"]
        budget.settle("big", 0)
        await asyncio.gather(*tasks)
        assert order == ["big", "small"] and budget.reserved_mb == 15

    asyncio.run(scenario())


def test_who_gives_up_lets_the_next_one_in():
    async def scenario():
        budget = MemoryBudget(100, max_wait_s=0.05)
        await budget.reserve("a", 80)
        with pytest.raises(SandboxError, match="memory budget of 100 MB"):
            await budget.reserve("b", 50)
        await budget.reserve("c", 20)

    asyncio.run(scenario())


def test_one_alone_always_fits():
    async def scenario():
        await MemoryBudget(10, max_wait_s=1).reserve("a", 1000)

    asyncio.run(scenario())


@pytest.mark.sandbox
def test_calls_wait_for_each_other_and_say_how_long():
    async def scenario():
        config = SandboxConfig(preload=(), memory_mb=512, memory_budget_mb=600)
        async with create_sandbox(config) as sandbox:
            sessions = [await sandbox.open_session() for _ in range(2)]
            code = "import time; time.sleep(0.3)"
            return await asyncio.gather(*(session.run(code) for session in sessions))

    first, second = asyncio.run(scenario())
    assert first.queue_s < 0.1 and second.queue_s >= 0.25
    assert first.outcome is second.outcome is Outcome.OK


@pytest.mark.sandbox
def test_memory_that_an_idle_session_holds_counts():
    async def scenario():
        config = SandboxConfig(
            preload=(), memory_mb=512, memory_budget_mb=600, max_wait_s=0.5, backend="namespaces"
        )
        async with create_sandbox(config) as sandbox, sandbox.session() as hoarder:
            await hoarder.run("x = bytearray(200 << 20)")
            async with sandbox.session() as other:
                refused = await other.run("1", Limits(wall_s=1))
                await hoarder.run("del x")
                return refused, await other.run("1")

    refused, served = asyncio.run(scenario())
    assert refused.outcome is Outcome.INFRA_ERROR and "memory budget" in refused.stderr
    assert served.outcome is Outcome.OK
