"""What engine, environments and trainer each say that they did: the auditor's second source.

Trajectories are made by the rollouts. The ledger is written at the borders instead, by other code:
what the engine returned, before anything was cut; what each environment answered; and what the
trainer had packed when it computed the loss. `tir_alp.audit` proves that the two tell the same.

Only episodes of training are written down. One file a step, `docs/audit.md` has its format.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from tir_alp.engines.base import Completion, Sampling
from tir_alp.rollout import Generate
from tir_alp.types import Batch, StopReason, Trajectory, TrajectoryGroup, VersionSpan

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


class Ledger:
    """Collects what happens until a step takes it.

    Args:
        group_size: Sequences of a group; which of them belong to it follows.
        seed: Of the rollouts. What is sampled with another one, e.g. for an evaluation, is not
            written down.
    """

    def __init__(self, group_size: int, seed: int) -> None:
        self._group_size, self._seed = group_size, seed
        self._attempts: defaultdict[int, list[Attempt]] = defaultdict(list)
        self._updates: list[Row] = []

    def engine(self, generate: Generate) -> Generate:
        """Wrap the engine's own `generate`."""

        async def recorded(token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
            completion = await generate(token_ids, sampling)
            if sampling.seed == self._seed:
                call = Call(len(token_ids), ids_digest(token_ids), completion)
                self._attempts[sampling.sequence_uid][-1].calls.append(call)
            return completion

        return recorded

    def watch(self, env: gymnasium.Env[str, str], uid: int) -> gymnasium.Env[str, str]:
        """Wrap the environment of one attempt at the episode of a sequence."""
        attempt = Attempt(uid)
        self._attempts[uid].append(attempt)
        return _Watched(env, attempt)

    def updated(self, rows: Iterable[Row]) -> None:
        """Write down what updates had packed: rows by `update_row`, made where the loss was."""
        self._updates.extend(rows)

    def kept(self, group_ids: Iterable[int]) -> list[Row]:
        """The attempts at groups that have ended and wait, for the checkpoint."""
        uids = [uid for group_id in group_ids for uid in self._uids(group_id)]
        return [each.to_row() for uid in uids for each in self._attempts.get(uid, ())]

    def restore(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take up what `kept` gave."""
        for row in rows:
            calls = [Call.from_row(call) for call in row["calls"]]
            self._attempts[row["uid"]].append(Attempt(row["uid"], row["prompt"], calls))

    def take(
        self,
        trained: Iterable[TrajectoryGroup],
        replaced: Iterable[TrajectoryGroup],
        lost: Iterable[TrajectoryGroup],
    ) -> list[Row]:
        """The rows of one step, by what became of its groups; they are forgotten here."""
        fates = {"trained": trained, "replaced": replaced, "lost": lost}
        groups = [
            {
                "kind": "group",
                "group_id": group.group_id,
                "task_id": group.task_id,
                "fate": fate,
                "dropped": group.num_dropped,
            }
            for fate, each in fates.items()
            for group in each
        ]
        groups.sort(key=lambda group: group["group_id"])
        uids = [uid for group in groups for uid in self._uids(group["group_id"])]
        attempts = [each for uid in uids for each in self._attempts.pop(uid, ())]
        updates, self._updates = self._updates, []
        rows = [*groups, *(attempt.to_row() for attempt in attempts), *updates]
        return [{"kind": "ledger", "format": FORMAT}, *rows, {"kind": "end", "rows": len(rows)}]

    def _uids(self, group_id: int) -> range:
        return range(group_id * self._group_size, (group_id + 1) * self._group_size)


class _Watched(gymnasium.Wrapper[str, str, str, str]):
    """Writes down what an environment says, in the thread in which it says it."""

    def __init__(self, env: gymnasium.Env[str, str], attempt: Attempt) -> None:
        super().__init__(env)
        self._attempt = attempt

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        text, info = self.env.reset(seed=seed, options=options)
        self._attempt.prompt = digest(text)
        return text, info

    def step(self, action: str) -> tuple[str, Any, bool, bool, dict[str, Any]]:
        answer = self.env.step(action)
        _, _, terminated, truncated, info = answer
        call = self._attempt.calls[-1]
        call.outcome = str(info.get("outcome", "ok"))
        call.ended = bool(terminated or truncated)
        call.answer = answer_digest(action, *answer)
        return answer


# ----------------------------------------------------------------------------- pure: what is kept


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


def update_row(update: int, batches: Sequence[Batch], made: bool) -> Row:
    """What an update had packed; by the trainer, of what the loss got."""
    sequences = [row for batch in batches for row in packed_rows(batch)]
    return {"kind": "update", "update": update, "made": made, "sequences": sequences}


def packed_rows(batch: Batch) -> Iterator[list[Any]]:
    """Describe each sequence of a micro-batch: uid, tokens, loss tokens, advantage, digest."""
    mask = batch.loss_mask.cpu().numpy()
    logprobs = batch.rollout_logprobs.cpu().numpy()
    turn_ids = batch.turn_ids.cpu().numpy()
    token_ids = np.split(batch.token_ids.cpu().numpy(), np.cumsum(batch.lengths)[:-1])
    for row, (uid, length) in enumerate(zip(batch.sequence_uids, batch.lengths, strict=True)):
        loss = mask[row, :length]
        yield [
            uid,
            length,
            int(mask[row].sum()),
            float(batch.advantages[row]),
            _packed_digest(token_ids[row], loss, logprobs[row, :length], turn_ids[row, :length]),
        ]


def packed_row(trajectory: Trajectory, advantage: float) -> list[Any]:
    """What `packed_rows` has to say about a trajectory."""
    mask = np.array(trajectory.loss_mask, bool)
    return [
        trajectory.sequence_uid,
        len(mask),
        int(mask.sum()),
        float(np.float32(advantage)),
        _packed_digest(
            np.array(trajectory.token_ids),
            mask,
            np.array(trajectory.rollout_logprobs),
            np.array(trajectory.turn_ids),
        ),
    ]


def _packed_digest(token_ids: NDArray, mask: NDArray, logprobs: NDArray, turn_ids: NDArray) -> str:
    parts = (
        token_ids.astype("<i4"),
        mask.astype("u1"),
        logprobs[mask].astype("<f4"),
        turn_ids.astype("<i4"),
    )
    return digest(b"".join(part.tobytes() for part in parts))


def pack_array(values: Sequence[float], dtype: str) -> str:
    """Numbers as base64 of their bytes: a third of their size as text, and exact."""
    return base64.b64encode(np.asarray(values, dtype).tobytes()).decode("ascii")


def unpack_array(text: str, dtype: str) -> list[Any]:
    """The numbers of `pack_array`. Raises ValueError if it is none."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype).tolist()
