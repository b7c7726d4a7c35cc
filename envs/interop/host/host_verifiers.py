"""Adapts verifiers, the package of that name, in its `verifiers.v1` form: the taskset NAME.

In verifiers the environment calls the model; in Gymnasium the model acts on the environment. A
model endpoint in this process converts one to the other: a request to it is an observation, and its
reply is the action. An episode therefore uses all of verifiers: its task, user, stops and rewards.

Settings are those of verifiers' environment (`taskset`, `timeout`, ...) and `num_tasks`, the number
of tasks to choose from, by default all. The `index` of a task selects one, or else the seed.

Tools are not supported: verifiers passes them to programs that speak its tool protocol, and refuses
to start a taskset with tools for a program that does not.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Coroutine
from importlib.metadata import version as package_version
from typing import Any

from aiohttp import web
from texts import Messages, as_text
from verifiers.v1.clients import EvalClientConfig, ModelContext
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.utils.loaders import environment_class, resolve_env_config

_SEAT = {"harness": {"id": "host_harness"}, "runtime": {"type": "subprocess"}}


def version() -> str:
    """Return the installed version."""
    return package_version("verifiers")


class Environment:
    """Episodes of one taskset, one at a time."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self._taskset = _in_loop(_stage.taskset(name, settings))
        self._episode: _Episode | None = None

    def reset(self, seed: int, task: dict[str, Any]) -> str:
        """Begin an episode, and wait for the first request to the model."""
        self.close()
        index = task.get("index")
        tasks = self._taskset.tasks
        chosen = tasks[seed % len(tasks) if index is None else int(index)]
        episode = self._episode = _in_loop(_stage.begin(self._taskset, chosen))
        request = _in_loop(episode.next_request())
        if request is None:
            raise RuntimeError(f"the episode ended before the model was asked: {self._end()}")
        return as_text(request)

    def step(self, action: str) -> dict[str, Any]:
        """Reply for the model, and wait for the next request or the end."""
        assert self._episode is not None
        request = _in_loop(self._episode.reply(action))
        if request is not None:
            return {
                "observation": as_text(request),
                "reward": 0.0,
                "terminated": False,
                "truncated": False,
                "info": {},
            }
        trace = self._end()
        return {
            "observation": "",
            "reward": float(trace.reward),
            "terminated": not trace.is_truncated,
            "truncated": bool(trace.is_truncated),
            "info": {"stop_condition": trace.stop_condition, "metrics": dict(trace.metrics)},
        }

    def close(self) -> None:
        """Cancel the episode that is under way, if any."""
        if self._episode is not None:
            _in_loop(self._episode.cancel())
            self._episode = None

    def _end(self) -> Any:
        """Return the trace of a finished episode.

        Raises:
            RuntimeError: verifiers failed during the episode, so its reward is meaningless.
        """
        assert self._episode is not None
        finished = self._episode.run.result()
        if not finished.ok or len(finished.traces) != 1:
            errors = [*finished.errors, *(e for trace in finished.traces for e in trace.errors)]
            message = "; ".join(f"{error.type}: {error.message}" for error in errors)
            raise RuntimeError(message or f"it left {len(finished.traces)} traces instead of one")
        return finished.traces[0]


class _Taskset:
    """A taskset, with the environment that serves all of its episodes."""

    def __init__(self, env: Any, num_tasks: int | None) -> None:
        if num_tasks is None and not env.taskset.bounded:
            raise ValueError("the taskset is endless: set settings.num_tasks")
        self.env = env
        self.tasks = list(itertools.islice(env.taskset, num_tasks))
        if not self.tasks:
            raise ValueError("the taskset has no tasks")


class _Episode:
    """A running episode: its requests to the model, and the replies to them."""

    def __init__(self) -> None:
        self.run: asyncio.Task[Any]
        self._requests: asyncio.Queue[tuple[Messages, asyncio.Future[str]]] = asyncio.Queue()
        self._history: list[tuple[str, Any]] = []
        self._reply: asyncio.Future[str] | None = None

    async def complete(self, messages: Messages) -> str:
        """Handle a request to the model: wait for the action, and return it."""
        reply: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._requests.put_nowait((messages, reply))
        return await reply

    async def next_request(self) -> Messages | None:
        """Wait for the next request, and return its new messages; None at the end.

        Raises:
            ValueError: The request does not continue the conversation so far: it was rewritten, or
                there is a second one. Neither can be trained on token by token.
        """
        request = asyncio.ensure_future(self._requests.get())
        await asyncio.wait((request, self.run), return_when=asyncio.FIRST_COMPLETED)
        if not request.done():
            request.cancel()
            return None
        messages, self._reply = request.result()
        turns = [(message["role"], message["content"]) for message in messages]
        if turns[: len(self._history)] != self._history:
            raise ValueError("the environment rewrites the conversation, or holds more than one")
        new = messages[len(self._history) :]
        self._history = turns
        return new

    async def reply(self, action: str) -> Messages | None:
        """Reply with an action, and return the new messages after it; None at the end."""
        assert self._reply is not None
        self._history.append(("assistant", action))
        self._reply.set_result(action)
        return await self.next_request()

    async def cancel(self) -> None:
        """End the episode, whatever it is doing."""
        self.run.cancel()
        await asyncio.wait((self.run,))


class _Stage:
    """Shared by all episodes of this process: the tasksets, and the endpoint for the model."""

    def __init__(self) -> None:
        self._tasksets: dict[str, _Taskset] = {}
        self._episodes: dict[str, _Episode] = {}
        self._numbers = itertools.count()
        self._lock = asyncio.Lock()
        self._address = ""

    async def taskset(self, name: str, settings: dict[str, Any]) -> _Taskset:
        """Return the taskset with a name and settings, loaded and serving."""
        key = repr((name, settings))
        async with self._lock:
            if not self._address:
                await self._listen()
            if key not in self._tasksets:
                settings = dict(settings)
                num_tasks = settings.pop("num_tasks", None)
                settings["taskset"] = {"id": name, **settings.get("taskset", {})}
                config = resolve_env_config(settings)
                seats = dict.fromkeys(agent_config_fields(config), _SEAT)
                env_class = environment_class(name, config.id)
                env = env_class(resolve_env_config({**settings, **seats}))
                loaded = _Taskset(env, num_tasks)
                await env.serving().__aenter__()  # until this process ends
                self._tasksets[key] = loaded
        return self._tasksets[key]

    async def begin(self, taskset: _Taskset, task: Any) -> _Episode:
        """Start an episode, whose requests arrive under a model name of its own."""
        episode, model = _Episode(), f"episode-{next(self._numbers)}"
        client = EvalClientConfig(base_url=self._address, api_key_var="NO_KEY")
        context = ModelContext(model=model, client=client)
        self._episodes[model] = episode
        episode.run = asyncio.ensure_future(taskset.env.run_episode(task, context))
        episode.run.add_done_callback(lambda _: self._episodes.pop(model))
        return episode

    async def _listen(self) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        self._address = f"http://127.0.0.1:{port}/v1"

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        episode = self._episodes.get(body["model"])
        if episode is None:
            raise web.HTTPNotFound(text=f"no episode under way is called {body['model']!r}")
        action = await episode.complete(body["messages"])
        message = {"role": "assistant", "content": action}
        return web.json_response(
            {
                "id": "completion",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
            }
        )


def _in_loop(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run_coroutine_threadsafe(work, _loop).result()


_loop = asyncio.new_event_loop()
threading.Thread(target=_loop.run_forever, name="verifiers", daemon=True).start()
_stage = _Stage()
