"""The ledger's records of engine calls, environment answers and updates. Pure."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from tir_alp.engines.base import Completion
from tir_alp.training.packed_sequence import PackedSequence
from tir_alp.training.step_report import UpdateRecord
from tir_alp.types import StopReason, VersionSpan

FORMAT = "tir_alp ledger 1"


Record = dict[str, Any]
"""One JSON object of the ledger: a line of its file."""


@dataclass(frozen=True, slots=True)
class Call:
    """One `generate` call, and the environment's answer to it."""

    num_context: int
    """Number of tokens that the engine continued."""
    context: str
    """Digest of these tokens."""
    completion: Completion
    """The completion as the engine returned it."""
    answer: str | None = None
    """Digest of the action and the environment's answer; None if the environment gave none."""
    outcome: str | None = None
    """Outcome of the environment's step; None if there was none."""
    ended: bool = False
    """Whether the environment ended the episode."""
    trace: int = 0
    """In which of the episode's sequences of tokens the call was made; see `types.trace_uid`."""

    def to_record(self) -> Record:
        """Return the call as a record: ids as int32 and logprobs as float64, so both are exact."""
        completion = self.completion
        record = {
            "context": [self.num_context, self.context],
            "ids": pack_array(completion.token_ids, "<i4"),
            "logprobs": pack_array(completion.logprobs, "<f8"),
            "stop": completion.stop_reason.value,
            "version": completion.policy_version,
            "answer": self.answer,
            "outcome": self.outcome,
            "ended": self.ended,
        }
        if self.trace:
            record["trace"] = self.trace
        if completion.version_spans:
            spans = completion.version_spans
            record["versions"] = [[span.version, span.start, span.stop] for span in spans]
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Call:
        """Return the call that a record describes.

        Raises:
            KeyError, TypeError, ValueError: If the record is not a call.
        """
        completion = Completion(
            token_ids=tuple(unpack_array(record["ids"], "<i4")),
            logprobs=tuple(unpack_array(record["logprobs"], "<f8")),
            stop_reason=StopReason(record["stop"]),
            policy_version=record["version"],
            version_spans=tuple(VersionSpan(*span) for span in record.get("versions", ())),
        )
        num_context, context = record["context"]
        return cls(
            num_context=num_context,
            context=context,
            completion=completion,
            answer=record["answer"],
            outcome=record["outcome"],
            ended=bool(record["ended"]),
            trace=int(record.get("trace", 0)),
        )


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at an episode."""

    uid: int
    """Uid of the sequence."""
    prompt: str | None
    """Digest of the prompt that the environment's reset returned; None if it was not reset."""
    calls: tuple[Call, ...]

    def to_record(self) -> Record:
        """Return the attempt as a record."""
        calls = [call.to_record() for call in self.calls]
        return {"kind": "attempt", "uid": self.uid, "prompt": self.prompt, "calls": calls}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Attempt:
        """Return the attempt that a record describes; raises as `Call.from_record` does."""
        calls = tuple(map(Call.from_record, record["calls"]))
        return cls(record["uid"], record["prompt"], calls)


def digest(text: str | bytes) -> str:
    """Return the 64-bit BLAKE2b digest of a text or of bytes, in hexadecimal."""
    data = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def ids_digest(token_ids: Sequence[int]) -> str:
    """Return the digest of token ids, as int32."""
    return digest(np.asarray(token_ids, "<i4").tobytes())


def answer_digest(
    action: str,
    observation: str,
    reward: Any,
    terminated: bool,
    truncated: bool,
    info: Mapping[str, Any],
) -> str:
    """Return the digest of one environment step: the action and everything it returned."""
    rest = {name: value for name, value in info.items() if name != "observation"}
    answer = [action, observation, float(reward), bool(terminated), bool(truncated), rest]
    return digest(json.dumps(answer, sort_keys=True))


def update_row(record: UpdateRecord) -> Record:
    """Return the row of an update, with each sequence as a list of its fields."""
    sequences = [_sequence_row(each) for each in record.sequences]
    return {
        "kind": "update",
        "update": record.update,
        "made": record.made,
        "sequences": sequences,
    }


def update_record(row: Mapping[str, Any]) -> UpdateRecord:
    """Return the record of a row. Raises KeyError or TypeError if the row is of another kind."""
    sequences = tuple(
        PackedSequence(*each[:_NUM_SCALARS], *map(tuple, each[_NUM_SCALARS:]))
        for each in row["sequences"]
    )
    return UpdateRecord(row["update"], row["made"], sequences)


_NUM_SCALARS = 5  # fields of a packed sequence that every one has


def _sequence_row(sequence: PackedSequence) -> list[Any]:
    """Return the fields of a sequence, without advantages of turns if it has none."""
    *values, by_turn = astuple(sequence)
    return [*values, [*by_turn]] if by_turn else values


def pack_array(values: Sequence[float], dtype: str) -> str:
    """Return numbers as the base64 of their bytes: exact, and a third of the size of text."""
    return base64.b64encode(np.asarray(values, dtype).tobytes()).decode("ascii")


def unpack_array(text: str, dtype: str) -> list[Any]:
    """Return the numbers that `pack_array` packed. Raises ValueError if the text is invalid."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype).tolist()
