"""Converts text to tokens and tokens to text; nothing else in the trainer does either.

Text that the model wrote is only ever decoded. Text that it reads (task, tool output) is encoded
piece by piece and appended: a trajectory consists of the tokens that were sampled and the tokens
that were shown, never of a second tokenisation of their text. Text from outside cannot become a
mark of the conversation's structure, whether that is a special token or not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

import gymnasium

from tir_alp.config import Config
from tir_alp.engines.base import Completion
from tir_alp.rollouts.chat_template import ChatTemplate, check_prefix_stability
from tir_alp.rollouts.end_marks import end_mark, is_mark, structure_marks
from tir_alp.rollouts.stop_rule import cut_at, token_watcher
from tir_alp.rollouts.surrogates import SURROGATE
from tir_alp.rollouts.text_encoder import EncodedFrame, TextEncoder
from tir_alp.tools.calls import (
    HERMES,
    CallFormat,
    ToolCall,
    call_watcher,
    canonical,
    write_call,
)
from tir_alp.types import Origin, StopReason, TokenSpan


class PromptTooLong(ValueError):
    """The prompt of a task leaves no room in the context."""


class Renderer:
    """Renders the conversation format of a tokenizer's chat template.

    Args:
        tokenizer: A fast Hugging Face tokenizer with a chat template that knows the role `tool`.
        system: System prompt; empty for none.
        max_observation_tokens: Longer observations lose tokens from their middle.
        call_format: How the environment reads calls; see `tir_alp.tools.calls`.
        tools: JSON schemas that the template shows to the model for native calls; the model then
            writes calls in the template's form.
        rewritten_history: What to do with a template that rewrites earlier turns, e.g. drops their
            thinking: "refuse" it, or "append" anyway, so that the history stays as sampled.
        end_token_ids: Tokens at which the model's own config ends a sequence. Those that are
            ordinary text of this tokenizer do not end a completion.
        clock: Local time that a template which asks for the time is given; None: the real time.

    Raises:
        ValueError: The tokenizer is slow, has no end-of-sequence token or no chat template, the
            template refuses, drops, changes or rewrites messages, or a tool's schema contains a
            mark of the conversation.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        system: str = "",
        max_observation_tokens: int = 512,
        call_format: CallFormat = "fenced",
        tools: Sequence[Mapping[str, Any]] = (),
        rewritten_history: Literal["refuse", "append"] = "refuse",
        end_token_ids: Collection[int] = (),
        clock: datetime | None = None,
    ) -> None:
        name = tokenizer.name_or_path
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"tokenizer {name!r} is not a fast one; convert it to tokenizer.json")
        if tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer {name!r} has no eos token; set eos_token in its config")
        if not tokenizer.chat_template:
            raise ValueError(f"tokenizer {name!r} has no chat template; add chat_template.jinja")
        self._tokenizer = tokenizer
        self._max_observation_tokens = max_observation_tokens
        self.call_format: CallFormat = call_format
        self.clock = clock
        template = ChatTemplate(tokenizer, system, tuple(tools), clock)
        self._template = template
        self.marks = template.call_marks() if call_format == "tool_call" else HERMES
        _check_schemas(tokenizer, tools)
        self._encoder = TextEncoder(tokenizer)
        self._prompt_frame = self._encoder.frame(template.prompt_frame())
        self.no_observations = ""
        """Why the template cannot show an observation; empty if it can."""
        try:
            frame = template.observation_frame(self.marks if call_format == "tool_call" else None)
        except ValueError as error:
            if call_format != "none":
                raise
            frame, self.no_observations = template.end_of_turn(), str(error)
        self._observation_frame = self._encoder.frame(frame)
        rewrites = () if self.no_observations else check_prefix_stability(template)
        if rewrites and rewritten_history == "refuse":
            raise ValueError(
                f"the chat template of {name!r} rewrites history: {'; '.join(rewrites)}. Use a "
                'template that only appends, or set model.rewritten_history = "append" to train '
                "on the history as it was sampled"
            )
        before = self._observation_frame.before
        mark = end_mark(tokenizer, before)
        self._after_end_mark = before if mark is None else before[mark + 1 :]
        self.end_mark: int = tokenizer.eos_token_id if mark is None else before[mark]
        """The token that ends a turn in this template."""
        self.stop_token_ids = frozenset(
            {
                tokenizer.eos_token_id,
                *(before[mark : mark + 1] if mark is not None else ()),
                *(each for each in end_token_ids if is_mark(tokenizer, each)),
            }
        )
        """A completion ends with the first of these tokens that is sampled."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self._tokenizer

    def prompt(self, text: str) -> TokenSpan:
        """Encode a task as the policy reads it, up to the start of its first completion."""
        frame = self._prompt_frame
        return TokenSpan((*frame.before, *self._content(text, frame), *frame.after))

    def prompt_within(self, text: str, max_context_tokens: int, task_id: str) -> TokenSpan:
        """Encode a task, and check that the context has room for a completion after it.

        Raises:
            PromptTooLong: The context has no room for one.
        """
        prompt = self.prompt(text)
        if len(prompt) >= max_context_tokens:
            raise PromptTooLong(
                f"the prompt of task {task_id} has {len(prompt)} tokens, and the context ends at "
                f"rollout.max_context_tokens = {max_context_tokens}: raise it or leave the task out"
            )
        return prompt

    def observation(self, text: str, after: StopReason) -> TokenSpan:
        """Encode an observation alone, up to the start of the next completion.

        Args:
            text: The observation, as the environment returned it.
            after: How the completion before it ended: an end mark that the policy itself sampled
                is not added a second time, nor is white space that the template puts before it.
        """
        frame = self._observation_frame
        if self.no_observations:
            raise ValueError(self.no_observations)
        before = self._after_end_mark if after is StopReason.EOS else frame.before
        ids = self._content(text, frame)
        if len(ids) > self._max_observation_tokens:
            head = self._max_observation_tokens // 2
            ids = ids[:head] + ids[len(ids) - (self._max_observation_tokens - head) :]
        return TokenSpan((*before, *ids, *frame.after))

    @cached_property
    def _follow_up_frame(self) -> EncodedFrame:
        return self._encoder.frame(self._template.follow_up_frame())

    def follow_up(self, text: str) -> TokenSpan:
        """Encode a user's message after a completion that ended with the end mark.

        Raises:
            ValueError: The template does not show a second message of a user.
        """
        frame = self._follow_up_frame
        mark = end_mark(self._tokenizer, frame.before)
        before = frame.before if mark is None else frame.before[mark + 1 :]
        return TokenSpan((*before, *self._content(text, frame), *frame.after))

    def demonstrated(
        self, text: str, call: ToolCall | None, *, before_tool: bool
    ) -> tuple[tuple[int, ...], StopReason]:
        """Encode a turn of the assistant that somebody else wrote, as a rollout would sample it.

        Args:
            text: The words of the turn; a call in fences may be among them.
            call: The call after the words, if it is given apart from them.
            before_tool: Whether a tool's output follows.

        Returns:
            The tokens, up to the end of the call or with the end mark, and why they end there.

        Raises:
            ValueError: The call cannot be written in the format that the environment reads, there
                is none though a tool's output follows, or there is text after it.
        """
        ids = self._written(text, call)
        if not before_tool and call is None:
            return (*ids, self.end_mark), StopReason.EOS
        matches = self.stop_matcher()
        end = next((index for index, token in enumerate(ids, start=1) if matches(token)), None)
        if end is None:
            if call is not None:  # in this form, only the end of the turn ends a call
                return (*ids, self.end_mark), StopReason.EOS
            raise ValueError(
                f"a tool's output follows, but the turn has no complete call in the format "
                f"{self.call_format!r}: {text[-80:]!r}"
            )
        if rest := self._tokenizer.decode(list(ids[end:])).strip():
            raise ValueError(f"there is text after the call, which no rollout has: {rest[:80]!r}")
        return ids[:end], StopReason.STOP

    def _written(self, text: str, call: ToolCall | None) -> tuple[int, ...]:
        """Encode words, and a call in the format of the environment and the template."""
        text = SURROGATE.sub("\ufffd", text)
        if call is None:
            return self._encoder.written(text)
        if self.call_format != "tool_call":
            written = write_call(call, self.call_format)
            if written is None:
                raise ValueError(
                    f"a call of {call.name!r} with the arguments {[*call.arguments]} cannot be "
                    f"written in the format {self.call_format!r}: in fences there is only the tool "
                    "'python' with 'code'; see env.kwargs.call_format"
                )
            line_end = "" if not text or text.endswith("\n") else "\n"
            return self._encoder.written(text + line_end + written)
        marks = self.marks
        body = self._template.written_call(text, call, marks)
        if not marks.opening:
            return self._encoder.written(body)
        words, opening, rest = body.partition(marks.opening)
        content, closing, tail = rest.rpartition(marks.closing) if marks.closing else (rest, "", "")
        encoder = self._encoder
        ids = encoder.written(words) + encoder.mark(opening) + encoder.written(content)
        return ids + (encoder.mark(closing) + encoder.written(tail) if closing else ())

    def action(self, token_ids: Sequence[int]) -> str:
        """Decode a completion for the environment, without its end-of-turn token.

        A call in the model's own form is converted to the form that environments read.
        """
        if token_ids and token_ids[-1] in self.stop_token_ids:
            token_ids = token_ids[:-1]
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return canonical(text, self.marks)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, marks included."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def stop_matcher(self) -> Callable[[int], bool]:
        """Return a function to call with each token; it returns True when a call is complete.

        See `stop_rule`: the token that completes the call is the last one to keep.
        """
        return token_watcher(self._tokenizer, call_watcher(self.call_format, self.marks))

    def cut(self, completion: Completion) -> Completion:
        """Drop the tokens after the first call, with their logprobs and versions."""
        return cut_at(completion, self.stop_matcher())

    def _content(self, text: str, frame: EncodedFrame) -> tuple[int, ...]:
        """Encode text from outside. A lone surrogate, which no tokenizer encodes, becomes U+FFFD.

        Such text can come from a tool.
        """
        text = frame.content.written(SURROGATE.sub("\ufffd", text))
        return self._encoder.content(frame.lead + text, frame.starts_text)


def _check_schemas(tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> None:
    """Refuse schemas, which may come from a tool server, that contain marks of a conversation.

    A chat template writes them into its own text, where they would become those marks.
    """
    marks = structure_marks(tokenizer).values()
    for tool in tools:
        text = json.dumps(tool, ensure_ascii=False)
        if found := next((each for each in marks if each in text), None):
            name = tool.get("function", tool).get("name")
            raise ValueError(
                f"the description of the tool {name!r} contains {found!r}, which is a mark of this "
                "model's conversations: change the description, or let the environment show the "
                "tools, as plain text: env.kwargs.tools_in_prompt = true"
            )


def make_renderer(
    config: Config,
    tokenizer: Any,
    env: gymnasium.Env[str, str],
    origin: Origin | None = None,
    *,
    system: str = "",
    tools: Sequence[Mapping[str, Any]] = (),
) -> Renderer:
    """Make the renderer for a tokenizer and an environment.

    The environment defines how it reads calls (`call_format`; fenced code if it has none) and which
    tools the chat template has to show (`tool_schemas`; none if it has none).

    Args:
        config: Config of the run.
        tokenizer: Tokenizer of the run.
        env: An environment of the run.
        origin: When and with which end tokens the run was created; None: now, with those of the
            tokenizer alone.
        system: System prompt in place of the config's; empty: the config's.
        tools: JSON schemas of tools in place of the environment's; empty: the environment's.

    Raises:
        ValueError: Tokenizer and environment do not fit together.
    """
    call_settings = {
        name: env.get_wrapper_attr(attribute)
        for name, attribute in (("call_format", "call_format"), ("tools", "tool_schemas"))
        if env.has_wrapper_attr(attribute)
    }
    if tools and call_settings.get("call_format") == "tool_call":
        call_settings["tools"] = tools
    return Renderer(
        tokenizer,
        system=system or config.model.system,
        max_observation_tokens=config.rollout.max_observation_tokens,
        # Where the history of a whole agent is written in another way, a new sequence begins.
        rewritten_history=(
            "append" if env.has_wrapper_attr("play") else config.model.rewritten_history
        ),
        end_token_ids=() if origin is None else origin.end_token_ids,
        clock=None if origin is None else origin.created,
        **call_settings,
    )
