"""Which calls wait for memory and processes, and which go first."""

import asyncio
from pathlib import Path

import pytest

from tests.tools.sandbox.unprobed import unprobed_sandbox
from tir_alp.tools.sandbox import Limits, Outcome, SandboxConfig, SandboxError
from tir_alp.tools.sandbox.machine.budget import NOTHING, Budget, Resources
from tir_alp.tools.sandbox.machine.capacity import share_of_free_processes


def of_memory(megabytes: int) -> Resources:
    return Resources(memory_mb=megabytes)


def test_what_fits_does_not_wait():
    async def scenario():
        budget = Budget(Resources(memory_mb=100, processes=10), max_wait_s=1)
        await budget.reserve("a", Resources(memory_mb=60, processes=3))
        await budget.reserve("b", Resources(memory_mb=40, processes=7))
        assert budget.reserved == budget.total

    asyncio.run(scenario())


def test_first_come_first_served():
    async def scenario():
        budget, order = Budget(of_memory(100), max_wait_s=5), []
        await budget.reserve("a", of_memory(80))

        async def take(owner: str, megabytes: int):
            await budget.reserve(owner, of_memory(megabytes))
            order.append(owner)

        tasks = [asyncio.create_task(take(*work)) for work in (("big", 90), ("small", 10))]
        await asyncio.sleep(0.01)
        assert order == []  # the small one would fit, and does not overtake
        budget.settle("a", of_memory(5))
        await asyncio.sleep(0.01)
        assert order == ["big"]
        budget.settle("big", NOTHING)
        await asyncio.gather(*tasks)
        assert order == ["big", "small"] and budget.reserved == of_memory(15)

    asyncio.run(scenario())


def test_who_gives_up_lets_the_next_one_in():
    async def scenario():
        budget = Budget(of_memory(100), max_wait_s=0.05)
        await budget.reserve("a", of_memory(80))
        with pytest.raises(SandboxError, match="50 MB of the memory budget of 100 MB"):
            await budget.reserve("b", of_memory(50))
        await budget.reserve("c", of_memory(20))

    asyncio.run(scenario())


def test_one_alone_always_fits():
    async def scenario():
        await Budget(NOTHING, max_wait_s=1).reserve("a", Resources(memory_mb=1000, processes=1000))

    asyncio.run(scenario())


def test_each_resource_has_to_fit():
    async def scenario():
        budget = Budget(Resources(memory_mb=100, processes=10), max_wait_s=0.05)
        await budget.reserve("a", Resources(memory_mb=1, processes=8))
        with pytest.raises(SandboxError, match="5 processes of the process budget of 10"):
            await budget.reserve("b", Resources(memory_mb=50, processes=5))
        await budget.reserve("c", Resources(memory_mb=50, processes=2))

    asyncio.run(scenario())


@pytest.mark.sandbox
def test_calls_wait_for_each_other_and_say_how_long():
    async def scenario():
        config = SandboxConfig(
            backend="namespaces", preload=(), memory_mb=512, memory_budget_mb=600
        )
        async with unprobed_sandbox(config) as sandbox:
            sessions = [await sandbox.open_session() for _ in range(2)]
            code = "import time; time.sleep(0.3)"
            return await asyncio.gather(*(session.run(code) for session in sessions))

    first, second = asyncio.run(scenario())
    assert second.queue_s >= 0.25
    assert first.outcome is second.outcome is Outcome.OK


@pytest.mark.sandbox
def test_memory_that_an_idle_session_holds_counts():
    async def scenario():
        config = SandboxConfig(
            preload=(), memory_mb=512, memory_budget_mb=600, max_wait_s=0.5, backend="namespaces"
        )
        async with unprobed_sandbox(config) as sandbox, sandbox.session() as hoarder:
            await hoarder.run("x = bytearray(200 << 20)")
            async with sandbox.session() as other:
                refused = await other.run("1", Limits(wall_s=1))
                await hoarder.run("del x")
                return refused, await other.run("1")

    refused, served = asyncio.run(scenario())
    assert refused.outcome is Outcome.INFRA_ERROR and "memory budget" in refused.stderr
    assert served.outcome is Outcome.OK


def of_processes(**settings: int | float) -> SandboxConfig:
    return SandboxConfig.model_validate(
        {
            "preload": (),
            "max_processes": 16,
            "backend": "namespaces",
            "ready_sessions": 0,
            **settings,
        }
    )


@pytest.mark.sandbox
def test_calls_that_may_start_too_many_threads_together_wait_for_each_other():
    async def scenario():
        async with unprobed_sandbox(of_processes(process_budget=24)) as sandbox:
            sessions = [await sandbox.open_session() for _ in range(2)]
            code = "import time; time.sleep(0.3)"
            return await asyncio.gather(*(session.run(code) for session in sessions))

    first, second = asyncio.run(scenario())
    assert first.outcome is second.outcome is Outcome.OK
    assert second.queue_s >= 0.25


@pytest.mark.sandbox
def test_threads_that_an_idle_session_keeps_count():
    swarm = """
import threading
end = threading.Event()
for i in range(8): threading.Thread(target=end.wait, daemon=True).start()
"""

    async def scenario():
        config = of_processes(process_budget=24, max_wait_s=0.5)
        async with (
            unprobed_sandbox(config) as sandbox,
            sandbox.session() as other,
            sandbox.session() as hoarder,
        ):
            await hoarder.run(swarm)
            refused = await other.run("1")
            await hoarder.run("end.set(); [t.join() for t in threading.enumerate()[1:]]")
            return refused, await other.run("1")

    refused, served = asyncio.run(scenario())
    assert refused.outcome is Outcome.INFRA_ERROR and "process budget of 24" in refused.stderr
    assert served.outcome is Outcome.OK


@pytest.mark.sandbox
def test_no_session_is_admitted_that_would_leave_no_room_for_a_call():
    async def scenario():
        config = of_processes(process_budget=20, max_wait_s=0.5)
        async with unprobed_sandbox(config) as sandbox:
            sessions = [await sandbox.open_session() for _ in range(3)]
            with pytest.raises(SandboxError, match="process budget of 20"):
                await sandbox.open_session()
            return [(await session.run("1")).value for session in sessions]

    assert asyncio.run(scenario()) == ["1", "1", "1"]


def test_default_process_budget_is_within_what_the_kernel_gives():
    assert 0 < share_of_free_processes() < int(Path("/proc/sys/kernel/pid_max").read_text())
