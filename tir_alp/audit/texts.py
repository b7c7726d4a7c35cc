"""Compares the text in a trajectory's record with its tokens. Pure.

The text is for people to read, and nothing is trained on it; but who reads it must be able to
believe it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tir_alp.audit.findings import Findings
from tir_alp.audit.records import RecordedTrajectory
from tir_alp.records.readable import shows


def check_texts(
    recorded: RecordedTrajectory, decode: Callable[[Sequence[int]], str], findings: Findings
) -> None:
    """Compare each recorded text with the tokens beside it; text that is left out may be anything.

    Args:
        recorded: The trajectory.
        decode: Returns the text of token ids, special tokens included.
        findings: Where drifts are added.
    """
    for sequence, texts in zip(recorded.trajectory.sequences, recorded.texts, strict=True):
        for index, (span, text) in enumerate(zip(sequence.spans(), texts, strict=True)):
            if text is None:
                continue
            findings.count("texts")
            decoded = decode(span.token_ids)
            findings.expect(
                shows(text, decoded),
                "texts",
                recorded.location.at(turn=(index - 1) // 2) if index else recorded.location,
                f"the text is {text!r:.60}, and the tokens read {decoded!r:.60}",
            )
