"""Text in records, for people to read: of bounded size, and without secrets.

What is trained on are token ids; text beside them is only for reading. Secrets are recognised by
their form, and by their value if an environment variable of this process holds them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tir_alp.types import TokenSpan

REDACTED = "[secret redacted]"
"""Stands for a secret."""
_LEFT_OUT = "[... {} characters left out ...]"

# Each begins at the border of a word, so that no text is searched more than once per word.
_FORMS = re.compile(
    r"(?<![\w-])(?:"
    r"sk-[\w-]{16,}"  # OpenAI, Anthropic and others
    r"|hf_[A-Za-z0-9]{20,}"
    r"|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"
    r"|xox[abposr]-[\w-]{10,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}"
    r"|AIza[\w-]{35}|ya29\.[\w-]{20,}"
    r"|pypi-[\w-]{40,}|npm_[A-Za-z0-9]{30,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+"  # JSON web tokens
    r")"
    r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
_AFTER_NAME = re.compile(  # the value of what is named like a secret, if it holds a digit
    r"((?:passw(?:or)?d|passphrase|secret|api[_-]?key|(?:access|auth|secret)[_-]?(?:key|token))"
    r"[\"']?\s{0,8}[:=]\s{0,8}[\"']?)(?=[^\s\"',;]{0,256}\d)[^\s\"',;]{8,}",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(\bBearer\s{1,8})[\w.~+/=-]{16,}", re.IGNORECASE)
_IN_URL = re.compile(r"(://[^\s/:@]{1,64}:)[^\s/@]{1,256}(?=@)")
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:KEY|APIKEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(?:_|$)", re.IGNORECASE
)
_SHORTEST_VALUE = 8  # characters of an environment variable; shorter values are words


def secret_values(variables: Mapping[str, str]) -> tuple[str, ...]:
    """Return the values of the environment variables that are named like secrets."""
    found = {
        value
        for name, value in variables.items()
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_VALUE
    }
    return tuple(sorted(found, key=len, reverse=True))


def secret_ranges(text: str, values: Sequence[str] = ()) -> list[tuple[int, int]]:
    """Return where the secrets in a text are: ranges that ascend and do not overlap.

    Args:
        text: The text.
        values: Secrets besides those that are recognised by their form.
    """
    forms = [_FORMS, _AFTER_NAME, _BEARER, _IN_URL, *(re.compile(re.escape(v)) for v in values)]
    found = [
        (match.end(1) if form.groups else match.start(), match.end())
        for form in forms
        for match in form.finditer(text)
    ]
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(found):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


def redacted(text: str, values: Sequence[str] = ()) -> str:
    """Replace the secrets in a text by `REDACTED`; arguments are those of `secret_ranges`."""
    pieces, at = [], 0
    for start, stop in secret_ranges(text, values):
        pieces += [text[at:start], REDACTED]
        at = stop
    return "".join([*pieces, text[at:]])


def redacted_values(value: Any, values: Sequence[str] = ()) -> Any:
    """Replace the secrets in the strings of a JSON value; its structure and its keys stay."""
    match value:
        case str():
            return redacted(value, values)
        case Mapping():
            return {name: redacted_values(each, values) for name, each in value.items()}
        case list() | tuple():
            return [redacted_values(each, values) for each in value]
        case _:
            return value


def shortened(text: str, max_chars: int) -> str:
    """Leave out the middle of a text that is longer than `max_chars`, and say so in its place."""
    if len(text) <= max_chars:
        return text
    head = max_chars // 2
    left_out = _LEFT_OUT.format(len(text) - max_chars)
    return text[:head] + left_out + text[len(text) - (max_chars - head) :]


_GAPS = re.compile(
    re.escape(REDACTED) + "|" + re.escape(_LEFT_OUT).replace(re.escape("{}"), r"\d+")
)


def shows(text: str, whole: str) -> bool:
    """Whether a text of a record is `whole`, but for secrets and a middle that are left out."""
    if text == whole:
        return True
    first, *rest = _GAPS.split(text)
    if not rest or not whole.startswith(first):
        return False
    at = len(first)
    *middle, last = rest
    for part in middle:
        at = whole.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return whole.endswith(last) and len(whole) - len(last) >= at


def holds_redacted(value: Any) -> bool:
    """Whether a string of a JSON value has a secret left out."""
    match value:
        case str():
            return REDACTED in value
        case Mapping():
            return any(map(holds_redacted, value.values()))
        case list() | tuple():
            return any(map(holds_redacted, value))
        case _:
            return False


@dataclass(frozen=True, slots=True)
class Reading:
    """How the records of a run show text.

    Args:
        decode: Returns the text of token ids, special tokens included.
        max_chars: The longest text of a prompt, completion or observation, in characters; 0: none.
        secrets: Values that must not be shown.
    """

    decode: Callable[[Sequence[int]], str]
    max_chars: int
    secrets: tuple[str, ...] = ()

    def text(self, span: TokenSpan) -> str:
        """Return what a record shows of the tokens of a span."""
        text = redacted(self.decode(span.token_ids), self.secrets) if len(span) else ""
        return shortened(text, self.max_chars)

    def info(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a record shows of a turn's `info`."""
        return redacted_values(info, self.secrets)


def reading(tokenizer: Any, max_chars: int) -> Reading:
    """Return how the records of a run with this tokenizer show text; see `Reading`."""
    return Reading(decoder(tokenizer), max_chars, secret_values(os.environ))


def decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Return what decodes token ids without changing the text or leaving out special tokens."""
    return lambda ids: tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
