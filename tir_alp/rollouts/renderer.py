"""Converts text to tokens and tokens to text; nothing else in the trainer does either.

Text that the model wrote is only ever decoded. Text that it reads (task, tool output) is encoded
piece by piece and appended: a trajectory consists of the tokens that were sampled and the tokens
that were shown, never of a second tokenisation of their text. Text from outside cannot become a
mark of the conversation's structure, whether that is a special token or not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

import gymnasium

from tir_alp.config import Config
from tir_alp.engines.base import Completion
from tir_alp.rollouts.chat_template import ChatTemplate, Message
from tir_alp.rollouts.end_marks import end_mark, is_mark
from tir_alp.rollouts.formats import (
    HERMES,
    PROBE,
    ParameterTypes,
    ReadCall,
    canonical,
    find_form,
    read_calls,
    watcher,
    with_tools_shown,
    written_call,
)
from tir_alp.rollouts.history import Conversation, Following, History, Role, SaidTurn
from tir_alp.rollouts.mark_guard import MarkGuard
from tir_alp.rollouts.output_frames import OutputFrames
from tir_alp.rollouts.prefix_stability import check_prefix_stability
from tir_alp.rollouts.stop_rule import cut_at, token_watcher
from tir_alp.rollouts.surrogates import SURROGATE
from tir_alp.rollouts.text_encoder import EncodedFrame, TextEncoder, split_at
from tir_alp.rollouts.tokenizer_checks import check_schemas, check_tokenizer
from tir_alp.tools.calls import CallFormat, ToolCall, call_watcher, write_call
from tir_alp.types import Origin, StopReason, TokenSpan

RewrittenHistory = Literal["fork", "append", "refuse"]


class PromptTooLong(ValueError):
    """The prompt of a task leaves no room in the context."""


class Renderer:
    """Renders the conversation format of a tokenizer's chat template.

    Args:
        tokenizer: A fast Hugging Face tokenizer with a chat template that knows the role `tool`.
        system: System prompt; empty for none.
        max_observation_tokens: Longer observations lose tokens from their middle.
        call_format: How the environment reads calls; see `tir_alp.tools.calls`.
        max_calls: Number of calls that a turn may have. The call that reaches it ends a completion.
        tools: JSON schemas that the template shows to the model for native calls; the model then
            writes calls in the template's form.
        rewritten_history: What to do where the template rewrites earlier turns, e.g. drops their
            thinking: "refuse" it, "append" anyway, so that the history stays as sampled, or "fork":
            begin a new sequence of tokens, which is what the template writes now.
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
        max_calls: int = 1,
        tools: Sequence[Mapping[str, Any]] = (),
        rewritten_history: RewrittenHistory = "refuse",
        end_token_ids: Collection[int] = (),
        clock: datetime | None = None,
    ) -> None:
        name = tokenizer.name_or_path
        check_tokenizer(tokenizer)
        check_schemas(tokenizer, tools)
        self._tokenizer = tokenizer
        self._max_observation_tokens = max_observation_tokens
        self.call_format: CallFormat = call_format
        self.clock = clock
        is_native = call_format == "tool_call"
        template = ChatTemplate(tokenizer, system, tuple(tools), clock)
        self.template = with_tools_shown(template) if is_native else template
        """The chat template, with a system prompt that shows the tools if it does not."""
        self.form = find_form(self.template) if is_native else HERMES
        """How the model writes calls, if `call_format` is `tool_call`."""
        self._max_calls = max_calls
        if max_calls > 1 and (not is_native or self.form.one_per_turn):
            raise ValueError(
                f"a turn may have {max_calls} calls, but the format {call_format!r} has one per "
                f"turn with the chat template of {name!r}: set env.kwargs.max_calls = 1"
            )
        self._types = ParameterTypes.of(tools)
        self._encoder = TextEncoder(tokenizer)
        self._prompt_frame = self._encoder.frame(self.template.prompt_frame())
        self._outputs: OutputFrames | None = None
        self.no_observations = ""
        """Why the template cannot show an observation; empty if it can."""
        try:
            form = self.form if is_native else None
            self._outputs = OutputFrames(self.template, self._encoder, form)
            (frame,) = self._outputs.of((), 1)
            if max_calls > 1:
                self._outputs.of((), 2)
        except ValueError as error:
            if call_format != "none":
                raise
            frame = self._encoder.frame(self.template.end_of_turn())
            self.no_observations = str(error)
        self.rewritten_history: RewrittenHistory = rewritten_history
        self.rewrites = () if self.no_observations else check_prefix_stability(self.template)
        """What the template rewrites in a conversation with a tool, one sentence per kind."""
        if self.rewrites and rewritten_history == "refuse":
            raise ValueError(
                f"the chat template of {name!r} rewrites history: {'; '.join(self.rewrites)}. "
                'Use a template that only appends, or set model.rewritten_history = "fork" to '
                'train on what it writes, or "append" to train on the history as it was sampled'
            )
        self._history = History(
            self.template,
            MarkGuard(tokenizer, self._encoder),
            self.form if is_native else None,
            self._types,
        )
        mark = self._end_mark_in(frame)
        # The mark after a call may not be that after words.
        words_mark = mark
        if self.form.ends_turn:
            words_mark = self._end_mark_in(self._encoder.frame(self.template.end_of_turn()))
        self.end_mark: int = tokenizer.eos_token_id if words_mark is None else words_mark
        """The token that ends a turn in this template."""
        self._call_end_mark: int = self.end_mark if mark is None else mark
        self.stop_token_ids = frozenset(
            {
                tokenizer.eos_token_id,
                *(() if mark is None else (mark,)),
                *(each for each in end_token_ids if is_mark(tokenizer, each)),
            }
        )
        """A completion ends with the first of these tokens that is sampled."""

    def _end_mark_in(self, frame: EncodedFrame) -> int | None:
        """Return the token that ends a turn, in the text after it; None if it is text."""
        index = end_mark(self._tokenizer, frame.before, self._section_end)
        return None if index is None else frame.before[index]

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

    def observation(
        self, text: str | Sequence[str], after: StopReason, completion: Sequence[int] = ()
    ) -> TokenSpan:
        """Encode an observation alone, up to the start of the next completion.

        Args:
            text: The observation, as the environment returned it; several texts are the outputs of
                the calls in the completion, in order.
            after: How the completion before it ended: an end mark that the policy itself sampled
                is not added a second time, nor is white space that the template puts before it.
            completion: The tokens of the completion before it. They are read if the template writes
                the name of the tool or the id of the call with an output.
        """
        texts, frames = self._frames_of(text, completion)
        contents = [self._shortened(*each) for each in zip(texts, frames, strict=True)]
        return self._observed(frames, contents, after, completion)

    def _frames_of(
        self, text: str | Sequence[str], completion: Sequence[int]
    ) -> tuple[list[str], Sequence[EncodedFrame]]:
        """Return the outputs that are shown after a completion, and what is around each."""
        if self._outputs is None:
            raise ValueError(self.no_observations)
        texts = [text] if isinstance(text, str) else [*text]
        calls: tuple[ReadCall, ...] = ()
        if self._outputs.depends_on_calls:
            calls = read_calls(self._text_of_turn(completion), self.form, self._types)
        try:
            return texts, self._outputs.of(calls, len(texts))
        except ValueError:  # more calls than a turn of this template has
            return ["\n".join(texts)], self._outputs.of(calls, 1)

    def _observed(
        self,
        frames: Sequence[EncodedFrame],
        contents: Sequence[tuple[int, ...]],
        after: StopReason,
        completion: Sequence[int],
    ) -> TokenSpan:
        ids = list(self._rest_of_turn(frames[0].before, after, completion))
        for index, (content, frame) in enumerate(zip(contents, frames, strict=True)):
            ids += (*(frame.before if index else ()), *content)
        return TokenSpan((*ids, *frames[-1].after))

    def _shortened(self, text: str, frame: EncodedFrame) -> tuple[int, ...]:
        """Encode an output; a long one loses tokens from its middle."""
        ids = self._content(text, frame)
        if len(ids) <= self._max_observation_tokens:
            return ids
        head = self._max_observation_tokens // 2
        return ids[:head] + ids[len(ids) - (self._max_observation_tokens - head) :]

    def _rest_of_turn(
        self, before: tuple[int, ...], after: StopReason, completion: Sequence[int]
    ) -> tuple[int, ...]:
        """Return of the text before an output what the policy has not sampled."""
        if after is StopReason.EOS:
            mark = end_mark(self._tokenizer, before, self._section_end)
            return before if mark is None else before[mark + 1 :]
        section_end = self._section_end
        if after is StopReason.STOP and section_end:
            sampled = tuple(completion[len(completion) - len(section_end) :])
            place = next(
                (i for i in range(len(before)) if before[i : i + len(section_end)] == section_end),
                None,
            )
            if sampled == section_end and place is not None:
                return before[place + len(section_end) :]
        return before

    @cached_property
    def _section_end(self) -> tuple[int, ...]:
        """The tokens of the mark after a turn's last call; empty if there is none."""
        mark = self.form.section_end if self.call_format == "tool_call" else ""
        return self._encoder.mark(mark) if mark else ()

    @cached_property
    def _follow_up_frame(self) -> EncodedFrame:
        return self._encoder.frame(self.template.follow_up_frame())

    def follow_up(self, text: str) -> TokenSpan:
        """Encode a user's message after a completion that ended with the end mark.

        Raises:
            ValueError: The template does not show a second message of a user.
        """
        frame = self._follow_up_frame
        return self._observed([frame], [self._content(text, frame)], StopReason.EOS, ())

    def go_on(
        self,
        conversation: Conversation,
        completion: Sequence[int],
        after: StopReason,
        answer: str | Sequence[str],
        role: Role = "tool",
    ) -> tuple[Conversation, Following]:
        """Add a turn to a conversation; return what the policy reads next as well.

        Args:
            conversation: The conversation before the completion.
            completion: The tokens of the completion.
            after: How it ended.
            answer: What the environment answered; see `observation`.
            role: Whose message the answer is.

        Raises:
            ValueError: The template cannot show the answer; or it rewrites the history after it,
                and that is refused.
        """
        if role == "user":
            texts = [answer if isinstance(answer, str) else "\n".join(answer)]
            frames = [self._follow_up_frame]
            contents = [self._content(texts[0], frames[0])]
        else:
            texts, frames = self._frames_of(answer, completion)
            contents = [self._shortened(*each) for each in zip(texts, frames, strict=True)]
        span = self._observed(frames, contents, after, completion)
        if self.rewritten_history == "append":
            return conversation, Following(span, begins=False)
        shown = tuple(map(self._shown, texts, frames, contents))
        longer = conversation.and_then(SaidTurn(self._text_of_turn(completion), shown, role))
        if role == "tool" and not self.rewrites:
            return longer, Following(span, begins=False)
        prompt = self._history.rewritten(conversation, longer, [each.content for each in frames])
        if prompt is None:
            return longer, Following(span, begins=False)
        if self.rewritten_history == "refuse":
            raise ValueError(
                "the chat template rewrites the history after a message of the user: set "
                'model.rewritten_history = "fork"'
            )
        return longer, Following(TokenSpan(prompt), begins=True)

    def start_over(self, messages: Sequence[Message]) -> tuple[Conversation, Following]:
        """Begin a conversation, and a trace, with messages that an environment has written.

        Raises:
            ValueError: The template refuses the messages.
        """
        conversation = Conversation(tuple(messages))
        return conversation, Following(TokenSpan(self._history.prompt(conversation)), begins=True)

    def _shown(self, text: str, frame: EncodedFrame, content: Sequence[int]) -> str:
        """Return an output as it is shown: a long one without its middle."""
        if len(content) < self._max_observation_tokens:
            return text
        head = self._max_observation_tokens // 2
        shown = self.decode(content[:head]) + self.decode(content[head:])
        return frame.content.read(shown.removeprefix(frame.lead))

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
                return (*ids, self._call_end_mark), StopReason.EOS
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
        body = written_call(self.template, self.form, text, call)
        ids: tuple[int, ...] = ()
        words, rest = body[: len(text)], body[len(text) :]
        if words == text:
            ids = self._encoder.written(words)
        else:  # the template changes the words, or the form has none
            rest = body
        for is_mark_text, piece in split_at(rest, self.form.all_marks):
            ids += self._encoder.mark(piece) if is_mark_text else self._encoder.written(piece)
        return ids

    def action(self, token_ids: Sequence[int]) -> str:
        """Decode a completion for the environment, without its end-of-turn token.

        A call in the model's own form is converted to the form that environments read.
        """
        text = self._text_of_turn(token_ids)
        if self.call_format != "tool_call" or self.form == HERMES:
            return text
        return canonical(text, self.form, self._types)

    def _text_of_turn(self, token_ids: Sequence[int]) -> str:
        if token_ids and token_ids[-1] in self.stop_token_ids:
            token_ids = token_ids[:-1]
        return self.decode(token_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, marks included."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def stop_matcher(self) -> Callable[[int], bool]:
        """Return a function to call with each token; it returns True when a call is complete.

        See `stop_rule`: the token that completes the call is the last one to keep.
        """
        return token_watcher(self._tokenizer, self._watcher())

    def _watcher(self) -> Callable[[str], bool]:
        if self.call_format == "tool_call":
            return watcher(self.form, self._types, self._max_calls)
        return call_watcher(self.call_format)

    def has_call(self, text: str) -> bool:
        """Whether a text contains the calls after which generation should stop."""
        return self._watcher()(text)

    def sample_calls(self) -> tuple[int, ...]:
        """Encode as many native calls of the first tool as a turn may have."""
        name = self.template.tool_names[0]
        ids = self._written("", ToolCall(name, PROBE))
        return ids * self._max_calls

    def cut(self, completion: Completion) -> Completion:
        """Drop what follows the last call that a turn may have, logprobs and versions included."""
        return cut_at(completion, self.stop_matcher())

    def _content(self, text: str, frame: EncodedFrame) -> tuple[int, ...]:
        """Encode text from outside. A lone surrogate, which no tokenizer encodes, becomes U+FFFD.

        Such text can come from a tool.
        """
        text = frame.content.written(SURROGATE.sub("\ufffd", text))
        return self._encoder.content(frame.lead + text, frame.starts_text)


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

    The environment defines how it reads calls (`call_format`; fenced code if it has none), how many
    it takes in a turn (`max_calls`; one if it has none) and which tools the chat template has to
    show (`tool_schemas`; none if it has none).

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
        for name, attribute in (
            ("call_format", "call_format"),
            ("max_calls", "max_calls"),
            ("tools", "tool_schemas"),
        )
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
