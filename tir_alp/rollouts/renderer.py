"""Converts text to tokens and tokens to text; nothing else in the trainer does either.

Text that the model wrote is only ever decoded. Text that it reads (task, tool output) is encoded
piece by piece and appended: a trajectory consists of the tokens that were sampled and the tokens
that were shown, never of a second tokenisation of their text. Text from outside cannot become a
special token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import gymnasium
from tokenizers.decoders import DecodeStream

from tir_alp.config import Config
from tir_alp.engines.base import Completion
from tir_alp.rollouts.chat_template import ChatTemplate, Frame, check_prefix_stability
from tir_alp.rollouts.surrogates import SURROGATE
from tir_alp.tools.calls import HERMES, CallFormat, call_watcher, canonical
from tir_alp.types import StopReason, TokenSpan, cut_version_spans

_MAX_PENDING = 16  # tokens that are no whole character yet


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

    Raises:
        ValueError: The tokenizer is slow, has no end-of-sequence token or no chat template, or the
            template refuses, drops, changes or rewrites messages.
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
        template = ChatTemplate(tokenizer, system, tuple(tools))
        self.marks = template.call_marks() if call_format == "tool_call" else HERMES
        self._prompt_frame = self._encode_frame(template.prompt_frame())
        frame = template.observation_frame(self.marks if call_format == "tool_call" else None)
        self._observation_frame = self._encode_frame(frame)
        self._observation_as_json = frame.as_json
        rewrites = check_prefix_stability(tokenizer, system=system, tools=tools)
        if rewrites and rewritten_history == "refuse":
            raise ValueError(
                f"the chat template of {name!r} rewrites history: {'; '.join(rewrites)}. Use a "
                'template that only appends, or set model.rewritten_history = "append" to train '
                "on the history as it was sampled"
            )
        end_of_turn = self._observation_frame[0][:1]
        self.stop_token_ids = frozenset({tokenizer.eos_token_id, *end_of_turn})
        """A completion ends with the first of these tokens that is sampled."""

    def prompt(self, text: str) -> TokenSpan:
        """Encode a task as the policy reads it, up to the start of its first completion."""
        before, after = self._prompt_frame
        return TokenSpan((*before, *self._encode_plain(text), *after))

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
            after: How the completion before it ended: an end-of-turn token that the policy itself
                sampled is not added a second time.
        """
        prefix, suffix = self._observation_frame
        if after is StopReason.EOS:
            prefix = prefix[1:]
        if self._observation_as_json:
            text = json.dumps(text, ensure_ascii=False)[1:-1]
        ids = self._encode_plain(text)
        if len(ids) > self._max_observation_tokens:
            head = self._max_observation_tokens // 2
            ids = ids[:head] + ids[len(ids) - (self._max_observation_tokens - head) :]
        return TokenSpan((*prefix, *ids, *suffix))

    def action(self, token_ids: Sequence[int]) -> str:
        """Decode a completion for the environment, without its end-of-turn token.

        A call in the model's own form is converted to the form that environments read.
        """
        if token_ids and token_ids[-1] in self.stop_token_ids:
            token_ids = token_ids[:-1]
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return canonical(text, self.marks)

    def stop_matcher(self) -> Callable[[int], bool]:
        """Return a function to call with each token; it returns True when a call is complete.

        The end of a call may be spread over several tokens, and a token may extend past it; the
        token that completes the call is the last one to keep.
        """
        watch = call_watcher(self.call_format, self.marks)
        stream = DecodeStream(skip_special_tokens=False)
        num_pending = 0

        def feed(token_id: int) -> bool:
            nonlocal stream, num_pending
            piece = stream.step(self._tokenizer.backend_tokenizer, token_id)
            if piece is None:  # part of a character
                num_pending += 1
                if num_pending < _MAX_PENDING:
                    return False
                # No character is that long: a stream would decode all of it again and again.
                stream, piece = DecodeStream(skip_special_tokens=False), "\ufffd"
            num_pending = 0
            return watch(piece)

        return feed

    def cut(self, completion: Completion) -> Completion:
        """Drop the tokens after the first call, with their logprobs and versions."""
        matches = self.stop_matcher()
        for index, token_id in enumerate(completion.token_ids):
            if matches(token_id):
                return replace(
                    completion,
                    token_ids=completion.token_ids[: index + 1],
                    logprobs=completion.logprobs[: index + 1],
                    stop_reason=StopReason.STOP,
                    version_spans=cut_version_spans(completion.version_spans, index + 1),
                )
        return completion

    def _encode_plain(self, text: str) -> tuple[int, ...]:
        """Encode text from outside: `<|im_end|>` in it is ten characters, not the token.

        A lone surrogate, which a tool can return and no tokenizer encodes, becomes U+FFFD.
        """
        text = SURROGATE.sub("\ufffd", text)
        return tuple(
            self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        )

    def _encode_frame(self, frame: Frame) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Encode what the template puts before and after a content, with its special tokens."""
        encode = self._tokenizer.encode
        return (
            tuple(encode(frame.before, add_special_tokens=False)),
            tuple(encode(frame.after, add_special_tokens=False)),
        )


def make_renderer(config: Config, tokenizer: Any, env: gymnasium.Env[str, str]) -> Renderer:
    """Make the renderer for a tokenizer and an environment.

    The environment defines how it reads calls (`call_format`; fenced code if it has none) and which
    tools the chat template has to show (`tool_schemas`; none if it has none).

    Raises:
        ValueError: Tokenizer and environment do not fit together.
    """
    call_settings = {
        name: env.get_wrapper_attr(attribute)
        for name, attribute in (("call_format", "call_format"), ("tools", "tool_schemas"))
        if env.has_wrapper_attr(attribute)
    }
    return Renderer(
        tokenizer,
        system=config.model.system,
        max_observation_tokens=config.rollout.max_observation_tokens,
        rewritten_history=config.model.rewritten_history,
        **call_settings,
    )
