"""Where text becomes tokens and tokens become text; nothing else in the trainer does either.

What the model wrote is only ever decoded. What it reads (task, tool output) is encoded alone, piece
by piece, and appended: a trajectory's tokens are the ones that were sampled and the ones that were
shown, never a second tokenisation of their text. Text from outside cannot become a special token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import gymnasium
from tokenizers.decoders import DecodeStream

from tir_alp.config import Config
from tir_alp.engines.base import Completion
from tir_alp.rollouts.chat_template import ChatTemplate, Frame, check_prefix_stability
from tir_alp.tools.calls import HERMES, CallFormat, canonical, has_call
from tir_alp.types import StopReason, TokenSpan, cut_version_spans

_HALF_PAIR = re.compile("[\ud800-\udfff]")


class PromptTooLong(ValueError):
    """A task whose prompt leaves no room in the context."""


class Renderer:
    """Renders one conversation format: that of the tokenizer's chat template.

    Args:
        tokenizer: A fast Hugging Face tokenizer with a chat template that knows the role `tool`.
        system: System prompt; empty for none.
        max_observation_tokens: Longer tool outputs lose tokens in their middle.
        call_format: How the environment reads calls; see `tir_alp.tools.calls`.
        tools: JSON schemas that the template shows to the model, for native calls; the form in
            which the model writes calls is then the template's.
        rewritten_history: What to do with a template that rewrites what was said, e.g. drops
            thinking: "refuse" it, or "append" all the same: the history is what was sampled.

    Raises:
        ValueError: If the tokenizer is slow, has no end-of-sequence token or no chat template, or
            if the template refuses, drops, changes or rewrites what it is given.
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
        """A completion ends with the first of these that is sampled."""

    def prompt(self, text: str) -> TokenSpan:
        """Encode a task as the policy gets to read it, up to where its first completion starts."""
        before, after = self._prompt_frame
        return TokenSpan((*before, *self._encode_plain(text), *after))

    def prompt_within(self, text: str, max_context_tokens: int, task_id: str) -> TokenSpan:
        """Encode a task, and see that there is room to write behind it.

        Raises:
            PromptTooLong: If there is none.
        """
        prompt = self.prompt(text)
        if len(prompt) >= max_context_tokens:
            raise PromptTooLong(
                f"the prompt of task {task_id} has {len(prompt)} tokens, and the context ends at "
                f"rollout.max_context_tokens = {max_context_tokens}: raise it or leave the task out"
            )
        return prompt

    def observation(self, text: str, after: StopReason) -> TokenSpan:
        """Encode an environment's answer alone, up to where the next completion starts.

        Args:
            text: What the environment said.
            after: How the completion before it ended: an end-of-turn token that the policy sampled
                itself is not written a second time.
        """
        before, behind = self._observation_frame
        if after is StopReason.EOS:
            before = before[1:]
        if self._observation_as_json:
            text = json.dumps(text, ensure_ascii=False)[1:-1]
        ids = self._encode_plain(text)
        if len(ids) > self._max_observation_tokens:
            head = self._max_observation_tokens // 2
            ids = ids[:head] + ids[len(ids) - (self._max_observation_tokens - head) :]
        return TokenSpan((*before, *ids, *behind))

    def action(self, token_ids: Sequence[int]) -> str:
        """Decode a completion for the environment, without its end-of-turn token.

        A call in the model's own form becomes one in the form that environments read.
        """
        if token_ids and token_ids[-1] in self.stop_token_ids:
            token_ids = token_ids[:-1]
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return canonical(text, self.marks)

    def stop_matcher(self) -> Callable[[int], bool]:
        """Make a matcher to feed token by token: True at the token that completes a call.

        The end of a call may be spread over several tokens, and a token may reach past it; the
        token that makes the call complete is the last one to keep.
        """
        last = {"fenced": "`", "tool_call": self.marks.closing[-1:], "none": ""}[self.call_format]
        stream = DecodeStream(skip_special_tokens=False)
        text = ""

        def feed(token_id: int) -> bool:
            nonlocal text
            piece = stream.step(self._tokenizer.backend_tokenizer, token_id)
            if piece is None:  # part of a character
                return False
            text += piece
            return bool(last) and last in piece and has_call(text, self.call_format, self.marks)

        return feed

    def cut(self, completion: Completion) -> Completion:
        """Drop what an engine sampled behind the first call: ids, logprobs and versions."""
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

        Half of a surrogate pair, which a tool can say and no tokenizer takes, becomes U+FFFD.
        """
        text = _HALF_PAIR.sub("\ufffd", text)
        return tuple(
            self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        )

    def _encode_frame(self, frame: Frame) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of what the template puts before and behind a content, its special tokens as such."""
        encode = self._tokenizer.encode
        return (
            tuple(encode(frame.before, add_special_tokens=False)),
            tuple(encode(frame.after, add_special_tokens=False)),
        )


def make_renderer(config: Config, tokenizer: Any, env: gymnasium.Env[str, str]) -> Renderer:
    """Make the renderer that fits tokenizer and environment.

    The environment says how it reads calls (`call_format`, else fenced code) and which tools the
    chat template has to show (`tool_schemas`, else none).

    Raises:
        ValueError: They do not fit together.
    """
    turns = {
        name: env.get_wrapper_attr(attribute)
        for name, attribute in (("call_format", "call_format"), ("tools", "tool_schemas"))
        if env.has_wrapper_attr(attribute)
    }
    from tir_alp.rollouts.renderer import (
        Renderer,  # not needed where environments run, nor is torch
    )

    return Renderer(
        tokenizer,
        system=config.model.system,
        max_observation_tokens=config.rollout.max_observation_tokens,
        rewritten_history=config.model.rewritten_history,
        **turns,
    )
