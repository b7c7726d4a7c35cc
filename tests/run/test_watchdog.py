"""The watchdog names what is stuck: trajectory, turn, part, host; and once."""

import asyncio
import contextvars
import re
from concurrent.futures import ThreadPoolExecutor

from tir_alp.run.watchdog import Watchdog, note_host


def test_it_tells_once_where_and_on_which_host_an_episode_is_stuck():
    said: list[str] = []

    async def main() -> None:
        watchdog = Watchdog(after_s=0.02, log=said.append)

        async def stuck() -> None:
            with watchdog.waiting("task t, sequence 7, turn 2: the engine"):
                note_host("engine-1")
                await asyncio.sleep(60)

        async def stuck_in_thread(threads: ThreadPoolExecutor) -> None:
            with watchdog.waiting("task u, sequence 8, turn 0: env.step"):
                call = contextvars.copy_context().run
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(threads, lambda: call(note_host, "environment-0"))
                await asyncio.sleep(60)

        with ThreadPoolExecutor(1) as threads:
            tasks = [asyncio.create_task(stuck()), asyncio.create_task(stuck_in_thread(threads))]
            watchdog.look()
            watching = asyncio.create_task(watchdog.watch())
            async with asyncio.timeout(20):
                while len(said) < 2:
                    await asyncio.sleep(0.01)
            with watchdog.waiting("quick"):
                pass
            watchdog.look()
            for task in (*tasks, watching):
                task.cancel()

    asyncio.run(main())
    assert [re.sub(r"for \d+ s", "for _ s", line) for line in said] == [
        "stuck for _ s: task t, sequence 7, turn 2: the engine, on engine-1",
        "stuck for _ s: task u, sequence 8, turn 0: env.step, on environment-0",
    ]


def test_many_that_wait_for_the_same_are_one_line():
    said: list[str] = []
    watchdog = Watchdog(after_s=-1.0, log=said.append)
    with (
        watchdog.waiting("task a, turn 0: the engine"),
        watchdog.waiting("task b, turn 0: the engine"),
        watchdog.waiting("task c, turn 0: env.step"),
    ):
        watchdog.look()
        watchdog.look()
    assert [line.partition(": ")[2] for line in said] == [
        "task a, turn 0: the engine, on this process; and 1 others",
        "task c, turn 0: env.step, on this process",
    ]
