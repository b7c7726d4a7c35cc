"""Where text becomes tokens and tokens become text; nothing else in the trainer does either.

What the model wrote is only ever decoded. What it reads (task, tool output) is encoded alone, piece
by piece, and appended: a trajectory's tokens are the ones that were sampled and the ones that were
shown, never a second tokenisation of their text. Text from outside cannot become a special token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream

from tir_alp.engines.base import Completion
from tir_alp.tools.fenced import code_blocks
from tir_alp.types import StopReason, TokenSpan, cut_version_spans

# Stand-ins for contents, to find out what a chat template puts around them.
_USER, _ASSISTANT, _TOOL = "\u2068user\u2069", "\u2068assistant\u2069", "\u2068tool\u2069"


class PromptTooLong(ValueError):
    """A task whose prompt leaves no room in the context."""


class Renderer:
    """Renders one conversation format: that of the tokenizer's chat template.

    Args:
        tokenizer: A fast Hugging Face tokenizer with a chat template that knows the role `tool`.
        system: System prompt; empty for none.
        max_observation_tokens: Longer tool outputs lose tokens in their middle.

    Raises:
        ValueError: If the tokenizer is slow, has no end-of-sequence token or no chat template, or
            if the template refuses, drops or changes what it is given.
    """

    def __init__(
        self, tokenizer: Any, *, system: str = "", max_observation_tokens: int = 512
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
        opening = [{"role": "system", "content": system}] if system else []
        opening.append({"role": "user", "content": _USER})
        self._prompt_frame = self._frame(opening, _USER)
        self._observation_frame = self._frame(
            [
                *opening,
                {"role": "assistant", "content": _ASSISTANT},
                {"role": "tool", "content": _TOOL},
            ],
            _TOOL,
            behind=_ASSISTANT,
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
        ids = self._encode_plain(text)
        if len(ids) > self._max_observation_tokens:
            head = self._max_observation_tokens // 2
            ids = ids[:head] + ids[len(ids) - (self._max_observation_tokens - head) :]
        return TokenSpan((*before, *ids, *behind))

    def action(self, token_ids: Sequence[int]) -> str:
        """Decode a completion for the environment, without its end-of-turn token."""
        if token_ids and token_ids[-1] in self.stop_token_ids:
            token_ids = token_ids[:-1]
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def fence_matcher(self) -> Callable[[int], bool]:
        """Make a matcher to feed token by token: True at the token that closes a Python block.

        A fence may be spread over several tokens, and a token may reach past the fence; the token
        that makes the block complete is the last one to keep.
        """
        stream = DecodeStream(skip_special_tokens=False)
        text = ""

        def feed(token_id: int) -> bool:
            nonlocal text
            piece = stream.step(self._tokenizer.backend_tokenizer, token_id)
            if piece is None:  # part of a character
                return False
            text += piece
            return "`" in piece and any(block.is_python for block in code_blocks(text))

        return feed

    def cut(self, completion: Completion) -> Completion:
        """Drop what an engine sampled behind the closing fence: ids, logprobs and versions."""
        matches = self.fence_matcher()
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
        """Encode text from outside: `<|im_end|>` in it is ten characters, not the token."""
        return tuple(
            self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        )

    def _frame(
        self, messages: list[dict[str, str]], content: str, behind: str = ""
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids that the template puts before and after `content`, the former from `behind` on."""
        name = self._tokenizer.name_or_path
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ValueError(f"the chat template of {name!r} refuses a message: {error}") from error
        if text.count(content) != 1 or behind not in text:
            role = messages[-1]["role"]
            raise ValueError(
                f"the chat template of {name!r} does not keep the content of a {role!r} message as "
                "it is; use a template that does"
            )
        start = text.index(behind) + len(behind) if behind else 0
        before, after = text[start:].split(content)
        encode = self._tokenizer.encode
        return (
            tuple(encode(before, add_special_tokens=False)),
            tuple(encode(after, add_special_tokens=False)),
        )
