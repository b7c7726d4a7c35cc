"""Text of models and tools as people can read it: nothing invisible, nothing that changes order.

The page does the same in `static/dom.js`, where a test compares the two.
"""

from __future__ import annotations

import re

_UNSEEN = re.compile(
    r"[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Return a text with an escape for each character that is invisible or changes the order.

    Control characters get their pictures (such as U+2400), others their number, such as ⟨U+202E⟩.
    Line breaks and tabs stay.
    """
    return _UNSEEN.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"\u27e8U+{code:04X}\u27e9"
