"""Talk to a model and its tools: `python -m tir_alp.chat --model PATH | --run RUN`.

What the model sees is what it sees in a rollout: the same renderer, environment and sandbox. Its
calls are run as soon as they are complete, and it goes on with what they print.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tir_alp.algorithm.section import merge
from tir_alp.config import Config
from tir_alp.engines.base import Completion, Engine, EngineFailed, Sampling
from tir_alp.process import run_command, torch_imports
from tir_alp.rollouts import history
from tir_alp.rollouts.traces import following
from tir_alp.run.command_line import Command, overlay
from tir_alp.run.model_choice import MODEL_OPTIONS, Model, choose_model

if TYPE_CHECKING:
    import gymnasium

    from tir_alp.rollouts.renderer import Renderer

_COMMAND = Command(
    """\
usage: python -m tir_alp.chat --model PATH | --run RUN [--checkpoint best|last|N] ...

Talk to a model and its real tools. /help lists what can be typed besides questions.""",
    {**MODEL_OPTIONS},
)

HELP = """\
/reset       forget the conversation
/save FILE   write the conversation as one line of JSON, in the form that tir_alp.sft reads
/greedy      take the most probable token from now on, or sample again
/help        this list
/quit        end; so does the end of the input"""


@dataclass(slots=True)
class Conversation:
    """A conversation as tokens, and as messages for people.

    The tokens only grow, until the chat template writes the history in another way: then they are
    what it writes.

    Args:
        env: The environment, which runs tools. It is reset for each message of the user, so that a
            program starts without the variables of earlier messages.
        renderer: Encodes and decodes.
        engine: Samples.
        config: Limits and temperature.
    """

    env: gymnasium.Env[str, str]
    renderer: Renderer
    engine: Engine
    config: Config
    token_ids: tuple[int, ...] = ()
    messages: list[dict[str, Any]] = field(default_factory=list)
    is_greedy: bool = False
    num_turns: int = 0
    """Turns of the model so far; each draws from a seed of its own."""
    told: history.Conversation | None = None
    """What was said before the last completion, as the renderer keeps it."""
    last: Completion | None = None
    """The last completion of the model."""

    def reset(self) -> None:
        """Forget everything."""
        self.token_ids, self.messages, self.told, self.last = (), [], None, None

    async def ask(
        self, text: str, show: Callable[[], contextlib.AbstractContextManager[Any]]
    ) -> AsyncIterator[str]:
        """Let the model answer a message; yield what each of its calls printed.

        Args:
            text: The message.
            show: Opens a view for each turn of the model: a function that is given the text so far.

        Raises:
            ValueError: The context is full, or the template takes no second message.
        """
        kept = self.token_ids, self.told, self.last, [*self.messages]
        try:
            await self._begin(text)
            async for output in self._answer(show):
                yield output
        except BaseException:  # what was not answered is forgotten
            self.token_ids, self.told, self.last, self.messages = kept
            raise

    async def _begin(self, text: str) -> None:
        """Show the model a message."""
        task = {"task_id": "chat", "question": text, "answer": "0"}
        prompt, _ = await asyncio.to_thread(self.env.reset, options={"task": task})
        if self.last is None:
            self.told = history.Conversation.about(prompt)
            self.token_ids = self.renderer.prompt(prompt).token_ids
            self.messages.append({"role": "user", "content": prompt})
        else:
            self._go_on(text, {"role": "user"})
            self.messages.append({"role": "user", "content": text})

    async def _answer(
        self, show: Callable[[], contextlib.AbstractContextManager[Any]]
    ) -> AsyncIterator[str]:
        """Let the model answer; yield what its calls printed."""
        while True:
            self.last = completion = await self._complete(show)
            action = self.renderer.action(completion.token_ids)
            self.token_ids += completion.token_ids
            self.messages.append({"role": "assistant", "content": action})
            step = await asyncio.to_thread(self.env.step, action)
            output, _, terminated, truncated, info = step
            if info.get("tool_calls"):
                self.messages.append({"role": "tool", "content": output})
                yield output
            if terminated or truncated:
                return
            self._go_on(output, info)

    def _go_on(self, text: str, info: Mapping[str, Any]) -> None:
        """Show the model what follows its last completion."""
        assert self.told is not None and self.last is not None
        ids, stop = self.last.token_ids, self.last.stop_reason
        self.told, found = following(self.renderer, self.told, ids, stop, text, info)
        shown = found.span.token_ids
        self.token_ids = shown if found.begins else self.token_ids + shown

    async def _complete(
        self, show: Callable[[], contextlib.AbstractContextManager[Any]]
    ) -> Completion:
        limits = self.config.rollout
        room = limits.max_context_tokens - len(self.token_ids) - 1
        if room < 1:
            raise ValueError(
                f"the conversation has reached rollout.max_context_tokens = "
                f"{limits.max_context_tokens}: /reset begins another one"
            )
        self.num_turns += 1
        with show() as view:
            written: list[int] = []

            def watch() -> Callable[[int], bool]:
                matches = self.renderer.stop_matcher()

                def feed(token_id: int) -> bool:
                    written.append(token_id)
                    view(self.renderer.action(written))
                    return matches(token_id)

                return feed

            completion = await self.engine.generate(
                self.token_ids,
                Sampling(
                    max_tokens=min(limits.max_turn_tokens, room),
                    temperature=0.0 if self.is_greedy else limits.temperature,
                    stop_token_ids=self.renderer.stop_token_ids,
                    stop_matcher=watch,
                    seed=self.config.seed,
                    sequence_uid=self.num_turns,
                ),
            )
            completion = self.renderer.cut(completion)
            view(self.renderer.action(completion.token_ids))
        return completion


@asynccontextmanager
async def open_conversation(config: Config, model: Model) -> AsyncIterator[Conversation]:
    """Open engine and environment.

    Raises:
        ValueError: For what a user can fix.
    """
    from tir_alp.cluster import open_cluster
    from tir_alp.rollouts.renderer import make_renderer
    from tir_alp.run.placement import open_placement
    from tir_alp.training.model_folder import check_model_folder
    from tir_alp.training.policy import load_tokenizer
    from tir_alp.training.structure import local_path, new_origin

    check_model_folder(local_path(model.path))
    async with open_placement(config, open_cluster) as placement:
        origin = new_origin(model.path)
        tokenizer = load_tokenizer(model.path)
        with closing(placement.make_env()) as env:
            renderer = make_renderer(config, tokenizer, env, origin)
            async with placement.engine(model.path, model.version, renderer, None) as engine:
                yield Conversation(env, renderer, engine, config)


async def talk(config: Config, model: Model) -> None:
    """Answer the lines of the standard input until they end, or one of them is /quit."""
    from rich.console import Console

    console = Console()
    async with open_conversation(config, model) as conversation:
        console.print(f"{model.path}; tools run in {config.env.id}. /help lists commands.")
        while (line := await next_line()) is not None:
            text = line.strip()
            if text.startswith("/"):
                if not command(conversation, text, console):
                    return
            elif text:
                try:
                    async for output in conversation.ask(text, lambda: turn_view(console)):
                        show_output(console, output)
                except (ValueError, EngineFailed) as error:
                    console.print(str(error), style="red", markup=False)


def command(conversation: Conversation, text: str, console: Any) -> bool:
    """Obey a line that begins with a slash; returns whether the conversation goes on."""
    word, _, rest = text.partition(" ")
    match word:
        case "/quit":
            return False
        case "/reset":
            conversation.reset()
            console.print("the conversation is forgotten")
        case "/greedy":
            conversation.is_greedy = not conversation.is_greedy
            console.print("greedy" if conversation.is_greedy else "sampled")
        case "/save" if rest.strip():
            row = {"messages": conversation.messages}
            try:
                with Path(rest.strip()).open("a") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                console.print(f"added to {rest.strip()}")
            except OSError as error:
                console.print(f"cannot write {rest.strip()}: {error.strerror}", style="red")
        case _:
            console.print(HELP, markup=False, highlight=False)
    return True


@contextlib.contextmanager
def turn_view(console: Any) -> Iterator[Callable[[str], None]]:
    """Show a turn while it grows: as Markdown in a terminal, and elsewhere once it is complete."""
    from rich.live import Live
    from rich.markdown import Markdown

    latest = ""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=12, vertical_overflow="visible") as live:
            yield lambda text: live.update(Markdown(text))
        return

    def keep(text: str) -> None:
        nonlocal latest
        latest = text

    yield keep
    console.print(latest, markup=False, highlight=False, soft_wrap=True)


def show_output(console: Any, output: str) -> None:
    """Show what a tool returned, apart from the model's words."""
    from rich.panel import Panel
    from rich.text import Text

    if console.is_terminal:
        console.print(Panel(Text(output), title="output", title_align="left", style="dim"))
    else:
        console.print(f"[output]\n{output}", markup=False, highlight=False, soft_wrap=True)


async def next_line() -> str | None:
    """The next line of the standard input, after a prompt in a terminal; None at its end."""
    if not sys.stdin.isatty():
        return await asyncio.to_thread(sys.stdin.readline) or None
    print("> ", end="", flush=True)
    typed = b""
    while not typed.endswith(b"\n"):
        await _readable(sys.stdin.fileno())
        more = os.read(sys.stdin.fileno(), 4096)  # a terminal gives at most one line
        if not more:
            break
        typed += more
    return typed.decode(errors="replace") or None


async def _readable(descriptor: int) -> None:
    """Wait without a thread: one that waits in a read cannot be ended by Ctrl-C."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code: 2 for what the user has to fix."""
    try:
        words = _COMMAND.read(arguments)
        below, model = choose_model(words.options)
        values = merge(words.values, {"model": {"path": model.path}})
        config = overlay(values, below)
    except ValueError as error:
        print(f"tir_alp.chat: {error}", file=sys.stderr)
        return 2
    # Imported here because it needs torch, and a mistake in the command line is answered at once.
    with torch_imports():
        from tir_alp.run.ahead import start_tools

        start_tools(config)
        from tir_alp.run.finish import finish

    return finish("chat", lambda: asyncio.run(talk(config, model)))


if __name__ == "__main__":
    sys.exit(run_command(main, imports=True))
