"""Ways to corrupt the records of one episode with several traces: its own, and the ledger's.

Each changes the record of a trajectory, or of the ledger's attempt, both as JSON has them.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from tir_alp.audit.findings import Findings
from tir_alp.records.ledger_rows import Attempt, pack_array, unpack_array
from tir_alp.records.trajectories import from_record
from tir_alp.types import Trajectory

Corruption = Callable[[random.Random, dict[str, Any], dict[str, Any]], Any]
CORRUPTIONS: dict[str, Corruption] = {}


def drifts_of(
    record: Any, attempt: Any, check: Callable[[Trajectory, Attempt, Findings], None]
) -> list[str]:
    """Audit the records of an episode; a record that cannot be read is a drift as well.

    Args:
        record: That of the trajectory.
        attempt: That of the ledger.
        check: Adds what drifts to the findings.
    """
    try:
        trajectory = from_record(json.loads(json.dumps(record)))
        ledger = Attempt.from_record(json.loads(json.dumps(attempt)))
    except (ValueError, KeyError, TypeError) as error:
        return [f"unreadable: {error}"]
    findings = Findings()
    check(trajectory, ledger, findings)
    return [str(each) for each in findings.drifts]


def corruption(registry: dict[str, Corruption]) -> Callable[[Corruption], Corruption]:
    """Return a decorator that adds a function to a table."""

    def add(function: Corruption) -> Corruption:
        registry[getattr(function, "__name__", "")] = function
        return function

    return add


def sequences(record):
    return [record, *record["branches"]]


def a_turn(rng, record):
    return rng.choice([turn for each in sequences(record) for turn in each["turns"]])


def change_ids(rng, ids):
    """Change some tokens to other ones that are no marks."""
    at = rng.randrange(len(ids))
    ids[at] = 5 + (ids[at] - 4 + rng.randrange(1, 80)) % 90


@corruption(CORRUPTIONS)
def sampled_token(rng, record, attempt):
    change_ids(rng, a_turn(rng, record)["completion"]["token_ids"])


@corruption(CORRUPTIONS)
def dropped_token(rng, record, attempt):
    span = a_turn(rng, record)["completion"]
    at = rng.randrange(len(span["token_ids"]))
    del span["token_ids"][at], span["rollout_logprobs"][at]


@corruption(CORRUPTIONS)
def doubled_token(rng, record, attempt):
    span = a_turn(rng, record)["completion"]
    at = rng.randrange(len(span["token_ids"]))
    for values in span["token_ids"], span["rollout_logprobs"]:
        values.insert(at, values[at])


@corruption(CORRUPTIONS)
def logprob(rng, record, attempt):
    values = a_turn(rng, record)["completion"]["rollout_logprobs"]
    values[rng.randrange(len(values))] -= rng.choice([1e-9, 0.1])


@corruption(CORRUPTIONS)
def logprobs_shifted(rng, record, attempt):
    values = a_turn(rng, record)["completion"]["rollout_logprobs"]
    values[:] = [*values[1:], values[0] - 1e-6]


@corruption(CORRUPTIONS)
def mask_off(rng, record, attempt):
    a_turn(rng, record)["completion"]["trainable"] = False


@corruption(CORRUPTIONS)
def prompt_token(rng, record, attempt):
    change_ids(rng, rng.choice(sequences(record))["prompt"]["token_ids"])


@corruption(CORRUPTIONS)
def prompt_trained(rng, record, attempt):
    span = rng.choice(sequences(record))["prompt"]
    span["rollout_logprobs"] = [-1.0] * len(span["token_ids"])


@corruption(CORRUPTIONS)
def observation_token(rng, record, attempt):
    shown = [
        turn["observation"]["token_ids"]
        for each in sequences(record)
        for turn in each["turns"]
        if turn["observation"]["token_ids"]
    ]
    change_ids(rng, rng.choice(shown))


@corruption(CORRUPTIONS)
def observation_trained(rng, record, attempt):
    span = a_turn(rng, record)["observation"]
    span["token_ids"] = span["token_ids"] or [7]
    span["rollout_logprobs"] = [-1.0] * len(span["token_ids"])


@corruption(CORRUPTIONS)
def observation_at_the_end(rng, record, attempt):
    rng.choice(sequences(record))["turns"][-1]["observation"]["token_ids"] = [7, 8]


@corruption(CORRUPTIONS)
def branch_dropped(rng, record, attempt):
    record["branches"].pop(rng.randrange(len(record["branches"])))


@corruption(CORRUPTIONS)
def branch_doubled(rng, record, attempt):
    record["branches"].append(copy.deepcopy(rng.choice(record["branches"])))


@corruption(CORRUPTIONS)
def branch_in_front(rng, record, attempt):
    at = rng.randrange(len(record["branches"]))
    branch, rest = record["branches"][at], record.pop("branches")
    rest[at] = {**record}
    record.clear()
    record.update(branch, branches=rest)


@corruption(CORRUPTIONS)
def turn_dropped(rng, record, attempt):
    rng.choice([each for each in sequences(record) if len(each["turns"]) > 1])["turns"].pop()


@corruption(CORRUPTIONS)
def turns_swapped(rng, record, attempt):
    turns = rng.choice([each for each in sequences(record) if len(each["turns"]) > 1])["turns"]
    turns[0], turns[1] = turns[1], turns[0]


@corruption(CORRUPTIONS)
def uid(rng, record, attempt):
    rng.choice(sequences(record))["sequence_uid"] += rng.choice([1, 1 << 54, 9 << 54])


@corruption(CORRUPTIONS)
def reward(rng, record, attempt):
    a_turn(rng, record)["reward"] += rng.choice([0.5, 1.0])


@corruption(CORRUPTIONS)
def outcome(rng, record, attempt):
    record["turns"][-1]["outcome"] = rng.choice(["tool_error", "tool_timeout"])


@corruption(CORRUPTIONS)
def flags(rng, record, attempt):
    sequence = rng.choice(sequences(record))
    name = rng.choice(["terminated", "truncated"])
    sequence[name] = not sequence[name]


@corruption(CORRUPTIONS)
def stop_reason(rng, record, attempt):
    turn = a_turn(rng, record)
    turn["stop_reason"] = rng.choice([e for e in ("stop", "length") if e != turn["stop_reason"]])


@corruption(CORRUPTIONS)
def version(rng, record, attempt):
    a_turn(rng, record)["policy_version"] += rng.choice([-1, 1])


@corruption(CORRUPTIONS)
def group(rng, record, attempt):
    rng.choice(record["branches"])["group_id"] += 1


@corruption(CORRUPTIONS)
def ledger_token(rng, record, attempt):
    call = rng.choice(attempt["calls"][:-1])  # the last tokens may have been cut off
    *ids, last = unpack_array(call["ids"], "<i4")
    change_ids(rng, ids)
    call["ids"] = pack_array([*ids, last], "<i4")


@corruption(CORRUPTIONS)
def ledger_logprob(rng, record, attempt):
    call = rng.choice(attempt["calls"][:-1])
    logprobs = unpack_array(call["logprobs"], "<f8")
    logprobs[rng.randrange(len(logprobs) - 1)] -= 1e-12
    call["logprobs"] = pack_array(logprobs, "<f8")


@corruption(CORRUPTIONS)
def ledger_trace(rng, record, attempt):
    call = rng.choice(attempt["calls"])
    call["trace"] = call.get("trace", 0) + 1


@corruption(CORRUPTIONS)
def ledger_context(rng, record, attempt):
    call = rng.choice(attempt["calls"])
    call["context"] = [call["context"][0], rng.choice("0123456789abcdef") * 16]


@corruption(CORRUPTIONS)
def ledger_call_dropped(rng, record, attempt):
    attempt["calls"].pop(rng.randrange(len(attempt["calls"])))


@corruption(CORRUPTIONS)
def ledger_call_doubled(rng, record, attempt):
    attempt["calls"].insert(0, dict(attempt["calls"][0]))


@corruption(CORRUPTIONS)
def ledger_answer(rng, record, attempt):
    attempt["calls"][-1].update(rng.choice([{"answer": None}, {"ended": False}]))


def missed(
    played: Any, name: str, change: Corruption, times: int, drifts: Callable[[Any, Any], list[str]]
) -> tuple[int, list[int]]:
    """Corrupt records again and again; return how often, and the seeds that were not found.

    Args:
        played: The records of a trajectory and of its attempt.
        name: Name of the corruption.
        change: The corruption.
        times: Number of seeds.
        drifts: Audits records.
    """
    made, found_none = 0, []
    for seed in range(times):
        record, attempt = copy.deepcopy(played)
        change(random.Random(f"{name}/{seed}"), record, attempt)
        if [record, attempt] == played:
            continue
        made += 1
        if not drifts(record, attempt):
            found_none.append(seed)
    return made, found_none
