"""Turns the messages of requests into tokens, by the model's own chat template.

A conversation that goes on is not encoded again: `extension` encodes what the template writes after
the end of the last reply, and nothing before it. Where the template would write the conversation
before that in another way than it has been shown to the model, there is no extension, and the
caller begins a new sequence.

Text from outside cannot become a mark of the conversation. Marks in it are replaced by stand-ins
before the template sees the text, and encoded as ordinary text afterwards.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal, TypeVar

from tir_alp.agents.messages import Dialogue, Message
from tir_alp.agents.recent_texts import RecentTexts
from tir_alp.agents.replies import CallStyle, ReplyRule, read_reply
from tir_alp.rollouts.chat_template import ChatTemplate, MadeCall
from tir_alp.rollouts.end_marks import end_mark
from tir_alp.rollouts.formats import ParameterTypes, find_form
from tir_alp.rollouts.formats.readers import JsonReader
from tir_alp.rollouts.mark_guard import MarkGuard, mapped
from tir_alp.rollouts.renderer import Renderer
from tir_alp.rollouts.text_encoder import Ids, TextEncoder
from tir_alp.tools.calls import ToolCall, write_call
from tir_alp.types import StopReason

Calls = Literal["template", "fenced"]
"""How a model writes calls: as its chat template does, or as Python blocks between fences."""

T = TypeVar("T")

_SHORT = 1 << 15  # characters of a conversation that is encoded in a few milliseconds
_MOST_RECENT = 1 << 23  # characters of conversations that are kept as they were rendered


class Unsuitable(ValueError):
    """The model or its template cannot take a request; the message says why."""


@dataclass(frozen=True, slots=True)
class _Form:
    """How conversations with certain tools are written."""

    template: ChatTemplate
    closing: str
    """What the template writes after the last reply."""
    takes_text: bool
    """Whether the template wants the arguments of a call as JSON text."""
    style: CallStyle | None


class DialogueEncoder:
    """Encodes the messages of requests for one model.

    Args:
        tokenizer: A fast Hugging Face tokenizer with a chat template.
        calls: How the model writes calls.
        end_token_ids: Tokens at which the model's own config ends a sequence.
        clock: Local time that a template is given which asks for the time; None: the real time.

    Raises:
        ValueError: The tokenizer is of no use; see `Renderer`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        calls: Calls = "template",
        end_token_ids: Collection[int] = (),
        clock: datetime | None = None,
    ) -> None:
        renderer = Renderer(
            tokenizer,
            call_format="none",
            rewritten_history="append",
            end_token_ids=end_token_ids,
            clock=clock,
        )
        self.tokenizer = tokenizer
        self.stop_token_ids = renderer.stop_token_ids
        """A completion ends with the first of these tokens that is sampled."""
        self.max_token_chars = max(map(len, tokenizer.get_vocab()))
        """Number of characters of the longest token."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._num_in_thread = 0
        self._calls, self._clock = calls, clock
        self._encoder = TextEncoder(tokenizer)
        self._guard = MarkGuard(tokenizer, self._encoder)
        self._form = lru_cache(64)(self._make_form)
        is_fixed = clock is not None or "strftime_now" not in str(tokenizer.chat_template)
        self._recent = RecentTexts(_MOST_RECENT) if is_fixed else None

    async def while_encoding(self, dialogue: Dialogue, work: Callable[[], T]) -> T:
        """Do what encodes a conversation: at once, or in a thread if the conversation is long.

        Only one encodes at a time, since a tokenizer has settings; a short conversation that
        would have to wait for a long one waits in the thread, and the event loop goes on.
        """
        if not self._num_in_thread and dialogue.num_chars < _SHORT:
            return work()
        self._num_in_thread += 1
        running = asyncio.get_running_loop().run_in_executor(self._thread, work)
        running.add_done_callback(self._left_thread)
        return await running

    def _left_thread(self, _: object) -> None:
        self._num_in_thread -= 1

    def style(self, dialogue: Dialogue) -> CallStyle | None:
        """Return how the model writes calls in a conversation; None if it has no tools.

        Raises:
            Unsuitable: It cannot write calls of these tools.
        """
        if dialogue.is_text:
            return None
        return self._form(dialogue.tools).style

    def opening(self, dialogue: Dialogue, forced: str = "") -> Ids:
        """Encode a whole conversation, up to the start of the reply.

        Args:
            dialogue: The conversation.
            forced: Text with which the reply has to begin.

        Raises:
            Unsuitable: The template refuses the conversation.
        """
        if dialogue.is_text:
            return self._beginning(dialogue.text())
        writer = _Writer(dialogue, self._guard, self._form(dialogue.tools))
        text = self._asked(writer, dialogue.messages)
        return writer.texts.encoded(text, begins=True) + self._forced(forced)

    def extension(
        self, dialogue: Dialogue, num_known: int, ended: StopReason, forced: str = ""
    ) -> Ids | None:
        """Encode what follows a reply, up to the start of the next one.

        Args:
            dialogue: The conversation.
            num_known: Number of its messages that the sequence has; the last of them is a reply.
            ended: How the completion ended that was this reply: an end mark that the policy itself
                sampled is not added a second time.
            forced: Text with which the next reply has to begin.

        Returns:
            The tokens; None if the template writes what is known in another way, now that more
            follows.

        Raises:
            Unsuitable: The template refuses the conversation.
        """
        if dialogue.is_text:
            rest = dialogue.text(num_known)
            return self._encoder.mark(rest) if rest else ()
        writer = _Writer(dialogue, self._guard, self._form(dialogue.tools))
        rest = self._after_reply(writer, dialogue.messages, num_known)
        if rest is None:
            return None
        ids = writer.texts.encoded(rest, begins=False)
        if ended is StopReason.EOS:
            mark = end_mark(self.tokenizer, ids)
            ids = ids if mark is None else ids[mark + 1 :]
        return ids + self._forced(forced)

    def _asked(self, writer: _Writer, messages: tuple[Message, ...]) -> str:
        """Render a conversation up to the start of the reply, or find it among the last ones."""

        def render() -> str:
            return writer.written(messages, generation=True)

        if self._recent is None:
            return render()
        return self._recent.get((writer.tools, writer.texts.stand_in, messages), render)

    def _after_reply(
        self, writer: _Writer, messages: tuple[Message, ...], num_known: int
    ) -> str | None:
        """Return what the template writes after a reply, from its closing on.

        None: it writes what came before in another way than it did when the reply was asked for.
        """
        known, closing, eos = messages[:num_known], writer.form.closing, self.tokenizer.eos_token
        asked = self._asked(writer, known[:-1])
        whole = self._asked(writer, messages)
        if not whole.startswith(asked):
            return None
        said = writer.words(known[-1])
        if said is not None and closing and whole.startswith(said + closing, len(asked)):
            return whole[len(asked) + len(said) :]
        before = writer.written(known)
        if not whole.startswith(before):
            before = before.removesuffix(eos)
        if not before.endswith(closing):
            closing = closing.removesuffix(eos)
        is_kept = before.startswith(asked) and whole.startswith(before)
        return closing + whole[len(before) :] if is_kept and before.endswith(closing) else None

    def text(self, token_ids: Sequence[int]) -> str:
        """Decode a completion, without the token that ended the turn."""
        if token_ids and token_ids[-1] in self.stop_token_ids:
            token_ids = token_ids[:-1]
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def reply(
        self, dialogue: Dialogue, token_ids: Sequence[int], rule: ReplyRule, name: str
    ) -> Message:
        """Return the message that a completion is to the client.

        Args:
            dialogue: The conversation that it continues.
            token_ids: Its tokens.
            rule: The rule of the request.
            name: Identity of the completion within the episode.
        """
        reply = read_reply(self.text(token_ids), rule, name)
        if not dialogue.is_text:
            return reply
        whole = self.tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return replace(reply, ending=whole.removeprefix(reply.content))

    def forced_call(self, dialogue: Dialogue, tool: str | None) -> str:
        """Return the text with which a reply begins that has to make a call.

        Args:
            dialogue: The conversation, with tools.
            tool: Name of the tool; None: any.

        Raises:
            Unsuitable: A call has no beginning of its own in this model's form.
        """
        style = self.style(dialogue)
        form = None if style is None else style.form
        if form is None or not form.opening:
            raise Unsuitable(
                "this model's calls have no mark at their beginning, so that tool_choice cannot be "
                'more than "auto" or "none"'
            )
        reader = form.read
        in_list = isinstance(reader, JsonReader) and reader.in_list
        text = form.section_start + form.opening + ("[" if in_list else "")
        if tool is None:
            return text
        if not isinstance(reader, JsonReader):
            raise Unsuitable(
                f"this model writes calls in the form {form.name!r}, in which tool_choice cannot "
                'name a tool: use "auto", "required" or "none"'
            )
        name = json.dumps(tool, ensure_ascii=False)
        between = "" if in_list else "\n"
        return f'{text}{between}{{"{reader.name_key}": {name}, "{reader.arguments_key}":'

    def _forced(self, text: str) -> Ids:
        return self._encoder.mark(text) if text else ()

    def _beginning(self, text: str) -> Ids:
        """Encode a text with its marks, after the token with which the model's texts begin."""
        ids = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        first = self.tokenizer.encode("", verbose=False)[:1]
        begins = first == [self.tokenizer.bos_token_id] and ids[:1] != first
        return (*first, *ids) if begins else tuple(ids)

    def _make_form(self, tools: str) -> _Form:
        schemas = json.loads(tools) if tools else []
        shown = tuple(schemas) if self._calls == "template" else ()
        template = ChatTemplate(self.tokenizer, "", shown, self._clock)
        closing = ChatTemplate(self.tokenizer, "", (), self._clock).end_of_turn().before
        if not schemas:
            return _Form(template, closing, False, None)
        if self._calls == "fenced":
            return _Form(
                template, closing, False, CallStyle(None, fenced_tool=_fenced_tool(schemas))
            )
        if not template.shows_tools():
            raise Unsuitable(
                f"the chat template of {self.tokenizer.name_or_path!r} does not show the model its "
                "tools: use one that does, or calls in fences"
            )
        try:
            style = CallStyle(find_form(template), ParameterTypes.of(schemas))
            probe = template.calls([MadeCall("probe_tool", {"probe_key": "probe_value"})])
            given = probe["tool_calls"][0]["function"]["arguments"]
        except ValueError as error:
            raise Unsuitable(str(error)) from error
        return _Form(template, closing, isinstance(given, str), style)


class _Writer:
    """Writes the messages of one conversation through a template, with stand-ins for marks."""

    def __init__(self, dialogue: Dialogue, guard: MarkGuard, form: _Form) -> None:
        self.form, self.tools = form, dialogue.tools
        self.texts = guard.over(
            [dialogue.tools]
            + [each.content for each in dialogue.messages]
            + [call.arguments for each in dialogue.messages for call in each.calls]
        )
        self._names = {call.call_id: call.name for each in dialogue.messages for call in each.calls}
        self._template = form.template
        if form.template.tools:
            guarded = mapped(form.template.tools, self.texts.outside)
            self._template = ChatTemplate(
                form.template.tokenizer, "", tuple(guarded), form.template.clock
            )

    def written(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        try:
            return self._template.render([*map(self._shown, messages)], generation=generation)
        except ValueError as error:
            raise Unsuitable(str(error)) from error

    def words(self, reply: Message) -> str | None:
        """Return the content of a reply as the template is given it; None if it makes calls."""
        return None if reply.calls else self.texts.written(reply.content)

    def _shown(self, message: Message) -> Mapping[str, Any]:
        texts = self.texts
        guarded = texts.written if message.role == "assistant" else texts.outside
        content = guarded(message.content)
        style = self.form.style
        shown: dict[str, Any] = {"role": message.role, "content": content}
        if message.role == "tool":
            name = message.name or self._names.get(message.call_id, "")
            shown |= {"tool_call_id": message.call_id, "name": texts.outside(name)}
        if message.calls and style is not None and style.form is None:
            code = json.loads(message.calls[0].arguments).get(style.fenced_tool[1], "")
            block = write_call(ToolCall("python", {"code": str(code)}), "fenced") or str(code)
            shown["content"] = content + guarded(block)
        elif message.calls:
            shown["tool_calls"] = [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {
                        "name": texts.outside(call.name),
                        "arguments": self._arguments(call.arguments),
                    },
                }
                for call in message.calls
            ]
        return shown

    def _arguments(self, text: str) -> Any:
        if not self.form.takes_text:
            try:
                return mapped(json.loads(text), self.texts.written)
            except (ValueError, RecursionError):
                pass
        return self.texts.written(text)


def _fenced_tool(schemas: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the name and the argument of the only tool that a Python block can call."""
    functions = [each.get("function", each) for each in schemas]
    parameters = functions[0].get("parameters") or {}
    arguments = [*parameters.get("properties", {})]
    required = parameters.get("required") or arguments
    if len(functions) != 1 or len(required) != 1:
        names = ", ".join(str(each.get("name")) for each in functions)
        raise Unsuitable(
            f"this model calls tools by Python blocks between fences, so a request can have one "
            f"tool with one argument; it has {names}"
        )
    return str(functions[0]["name"]), str(required[0])
