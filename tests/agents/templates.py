"""Tokenizers with small chat templates, and conversations for tests."""

import asyncio

from tests.rollouts.test_chat_template import DROPS_OLD_THINKING, HERMES_LIKE, MISTRAL_LIKE
from tir_alp.agents.dialogue_encoder import DialogueEncoder
from tir_alp.agents.messages import Dialogue, Message, tools_text
from tir_alp.engines.base import Completion, Sampling
from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.types import StopReason

TOOL = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Runs Python.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string"}},
            "required": ["code"],
        },
    },
}
TOOLS = tools_text([TOOL])
TEMPLATES = {
    "hermes": HERMES_LIKE,
    "mistral": MISTRAL_LIKE,
    "drops": DROPS_OLD_THINKING,
}


def tokenizer(template: str = "hermes"):
    made = make_tokenizer()
    made.chat_template = TEMPLATES[template]
    return made


def encoder(template: str = "hermes", **how) -> DialogueEncoder:
    return DialogueEncoder(tokenizer(template), **how)


def user(text: str) -> Message:
    return Message("user", text)


def dialogue(*messages: Message, tools: str = "") -> Dialogue:
    return Dialogue(messages, tools)


class Scripted:
    """An engine that answers each request with the next text of its script."""

    def __init__(self, *script: str, end: str = "<|end|>", delay_s: float = 0.0):
        self.script, self.end, self.delay_s = [*script], end, delay_s
        self.calls: list[tuple[tuple[int, ...], Sampling]] = []
        self.tokenizer = make_tokenizer()
        self.running = self.num_cancelled = 0

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        self.calls.append((token_ids, sampling))
        number = len(self.calls)
        text = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        self.running += 1
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.running -= 1
        ids = tuple(self.tokenizer.encode(text + self.end, add_special_tokens=False))
        reason = StopReason.EOS if self.end else StopReason.LENGTH
        if len(ids) > sampling.max_tokens:
            ids, reason = ids[: sampling.max_tokens], StopReason.LENGTH
        logprobs = tuple(-(0.001 * number + 0.0001 * place) for place in range(len(ids)))
        return Completion(
            token_ids=ids, logprobs=logprobs, stop_reason=reason, policy_version=number
        )
