"""The ledger's rows: what is kept of calls, answers and updates. Pure."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np

from tir_alp.engines.base import Completion
from tir_alp.training.packed_sequence import PackedSequence
from tir_alp.training.step_report import UpdateRecord
from tir_alp.types import StopReason, VersionSpan

FORMAT = "tir_alp ledger 1"


Row = dict[str, Any]


@dataclass(slots=True)
class Call:
    """One `generate` call, and the environment's answer to it."""

    num_context: int
    """Tokens that the engine continued."""
    context: str
    """Their digest."""
    completion: Completion
    """As the engine returned it."""
    answer: str | None = None
    """Digest of action and answer; None: the environment gave none."""
    outcome: str | None = None
    ended: bool = False
    """Whether the environment ended the episode."""

    def to_row(self) -> Row:
        """What goes into the file: ids as int32, logprobs as float64, so that both are exact."""
        completion = self.completion
        row = {
            "context": [self.num_context, self.context],
            "ids": pack_array(completion.token_ids, "<i4"),
            "logprobs": pack_array(completion.logprobs, "<f8"),
            "stop": completion.stop_reason.value,
            "version": completion.policy_version,
            "answer": self.answer,
            "outcome": self.outcome,
            "ended": self.ended,
        }
        if completion.version_spans:
            spans = completion.version_spans
            row["versions"] = [[span.version, span.start, span.stop] for span in spans]
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Call:
        """Raises KeyError, TypeError or ValueError if the row is none of a call."""
        completion = Completion(
            token_ids=tuple(unpack_array(row["ids"], "<i4")),
            logprobs=tuple(unpack_array(row["logprobs"], "<f8")),
            stop_reason=StopReason(row["stop"]),
            policy_version=row["version"],
            version_spans=tuple(VersionSpan(*span) for span in row.get("versions", ())),
        )
        num_context, context = row["context"]
        return cls(
            num_context, context, completion, row["answer"], row["outcome"], bool(row["ended"])
        )


@dataclass(slots=True)
class Attempt:
    """One try at an episode."""

    uid: int
    prompt: str | None = None
    """Digest of the text that the environment was reset to."""
    calls: list[Call] = field(default_factory=list)

    def to_row(self) -> Row:
        """What goes into the file."""
        calls = [call.to_row() for call in [*self.calls]]
        return {"kind": "attempt", "uid": self.uid, "prompt": self.prompt, "calls": calls}


def digest(text: str | bytes) -> str:
    """64 bits, in hexadecimal."""
    data = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def ids_digest(token_ids: Sequence[int]) -> str:
    """Digest of token ids."""
    return digest(np.asarray(token_ids, "<i4").tobytes())


def answer_digest(
    action: str,
    observation: str,
    reward: Any,
    terminated: bool,
    truncated: bool,
    info: Mapping[str, Any],
) -> str:
    """Digest of one step of an environment: what it was given, and all that it answered."""
    rest = {name: value for name, value in info.items() if name != "observation"}
    answer = [action, observation, float(reward), bool(terminated), bool(truncated), rest]
    return digest(json.dumps(answer, sort_keys=True))


def update_row(record: UpdateRecord) -> Row:
    """Return the row of an update, with each sequence as a list of its fields."""
    sequences = [[*astuple(each)] for each in record.sequences]
    return {
        "kind": "update",
        "update": record.update,
        "made": record.made,
        "sequences": sequences,
    }


def update_record(row: Mapping[str, Any]) -> UpdateRecord:
    """Return the record of a row. Raises KeyError or TypeError if the row is of another kind."""
    sequences = tuple(PackedSequence(*each) for each in row["sequences"])
    return UpdateRecord(row["update"], row["made"], sequences)


def pack_array(values: Sequence[float], dtype: str) -> str:
    """Numbers as base64 of their bytes: a third of their size as text, and exact."""
    return base64.b64encode(np.asarray(values, dtype).tobytes()).decode("ascii")


def unpack_array(text: str, dtype: str) -> list[Any]:
    """The numbers of `pack_array`. Raises ValueError if it is none."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype).tolist()
