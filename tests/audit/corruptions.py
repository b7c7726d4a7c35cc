"""Ways to corrupt the records of a run. Each one changes files of a copy and returns what it did.

A corruption is careful: what it writes is well-formed, and where a mere count would reveal it, it
keeps the count consistent. It returns None if the records drawn at random do not allow it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tir_alp.models.tiny import ABLE
from tir_alp.records.ledger_rows import pack_array, unpack_array
from tir_alp.training.policy import load_tokenizer

Records = list[dict[str, Any]]
TOKENIZER = load_tokenizer(str(ABLE))


class Copy:
    """The files of a run as JSON records; `files` holds those that a corruption has read."""

    def __init__(self, run: Path, rng: random.Random) -> None:
        self.rng = rng
        names = [str(file.relative_to(run)) for file in sorted(run.glob("*/step_*.jsonl"))]
        self.names = [name for name in names if name.split("/")[0] != "checkpoints"]
        self._run = run
        self.files: dict[str, Records] = {}
        self.texts: dict[str, bytes | None] = {}
        """Raw contents of files; None for a file to delete."""

    def records(self, name: str) -> Records:
        if name not in self.files:
            text = (self._run / name).read_text()
            self.files[name] = [json.loads(line) for line in text.splitlines()]
        return self.files[name]

    def bytes_of(self, name: str) -> bytes:
        return (self._run / name).read_bytes()

    def file(self, folder: str = "trajectories") -> str:
        return self.rng.choice([name for name in self.names if name.startswith(folder)])

    def record(self, folder: str = "trajectories", **having: Any) -> dict[str, Any] | None:
        records = [
            each for each in self.records(self.file(folder)) if having.items() <= each.items()
        ]
        return self.rng.choice(records) if records else None

    def turn(self, *, last: bool | None = None, tool: bool | None = None) -> dict[str, Any] | None:
        """Choose a turn of some trajectory: the last, another, or any; with a tool call or not."""
        record = self.record()
        assert record is not None
        turns = [
            turn
            for index, turn in enumerate(record["turns"])
            if last in (None, index == len(record["turns"]) - 1)
            and tool in (None, bool(turn["info"]["tool_calls"]))
        ]
        return self.rng.choice(turns) if turns else None

    def corrupted(self) -> dict[str, bytes | None]:
        """Return the new contents of the changed files; None for a file to delete."""
        texts = {
            name: "".join(json.dumps(record) + "\n" for record in records).encode()
            for name, records in self.files.items()
        }
        changed = {name: text for name, text in texts.items() if text != self.bytes_of(name)}
        return changed | self.texts


Corruption = Callable[[Copy], Any]


def swapped_ids(copy: Copy) -> Any:
    ids = one(copy.turn())["completion"]["token_ids"]
    pairs = [i for i in range(len(ids) - 1) if ids[i] != ids[i + 1]]
    if not pairs:
        return None
    i = copy.rng.choice(pairs)
    ids[i], ids[i + 1] = ids[i + 1], ids[i]
    return i


def other_id(copy: Copy) -> Any:
    span = one(copy.record())["turns"][0]["completion"]["token_ids"]
    i = copy.rng.randrange(len(span))
    span[i] = (span[i] + copy.rng.randrange(1, 100)) % 128
    return i


def other_prompt(copy: Copy) -> Any:
    ids = one(copy.record())["prompt"]["token_ids"]
    i = copy.rng.randrange(len(ids))
    ids[i] = (ids[i] + copy.rng.randrange(1, 100)) % 128
    return i


def shifted_logprobs(copy: Copy) -> Any:
    logprobs = one(copy.turn())["completion"]["rollout_logprobs"]
    if len(set(logprobs)) == 1:
        return None
    logprobs.append(logprobs.pop(0))
    return logprobs


def lowered_logprob(copy: Copy) -> Any:
    logprobs = one(copy.turn())["completion"]["rollout_logprobs"]
    i = copy.rng.randrange(len(logprobs))
    logprobs[i] -= 10.0 ** -copy.rng.randrange(1, 7)
    return logprobs[i]


def missing_logprobs(copy: Copy) -> Any:
    one(copy.turn())["completion"]["rollout_logprobs"] = None
    return True


def one_logprob_less(copy: Copy) -> Any:
    one(copy.turn())["completion"]["rollout_logprobs"].pop()
    return True


def unmasked_tool_tokens(copy: Copy) -> Any:
    turn = copy.turn(last=False)
    if turn is None:
        return None
    turn["observation"]["rollout_logprobs"] = [-0.1] * len(turn["observation"]["token_ids"])
    return True


def unmasked_prompt(copy: Copy) -> Any:
    prompt = one(copy.record())["prompt"]
    prompt["rollout_logprobs"] = [-0.5] * len(prompt["token_ids"])
    return True


def flipped_mask(copy: Copy) -> Any:
    completion = one(copy.turn())["completion"]
    completion["trainable"] = not completion["trainable"]
    return True


def moved_border(copy: Copy) -> Any:
    """The last token of a completion becomes the first of the observation: all ids stay."""
    turn = copy.turn(last=False)
    if turn is None:
        return None
    token = turn["completion"]["token_ids"].pop()
    turn["completion"]["rollout_logprobs"].pop()
    turn["observation"]["token_ids"].insert(0, token)
    return token


def retokenised(copy: Copy) -> Any:
    """The completion's text is encoded again, with a token of several characters split."""
    completion = one(copy.turn())["completion"]
    ids = completion["token_ids"]
    merged = [i for i, token in enumerate(ids) if len(TOKENIZER.decode([token])) > 1]
    if not merged:
        return None
    i = copy.rng.choice(merged)
    text = TOKENIZER.decode([ids[i]])
    pieces = [TOKENIZER.encode(each, add_special_tokens=False)[0] for each in text]
    logprob = completion["rollout_logprobs"][i]
    completion["token_ids"][i : i + 1] = pieces
    completion["rollout_logprobs"][i : i + 1] = [logprob / len(pieces)] * len(pieces)
    return text


def stale_version(copy: Copy) -> Any:
    turn = one(copy.turn())
    turn["policy_version"] += copy.rng.choice((-1, 1, 2))
    return turn["policy_version"]


def stale_version_everywhere(copy: Copy) -> Any:
    """Trajectory and ledger agree on a version that the step cannot have had."""
    name = copy.file()
    record = copy.rng.choice(copy.records(name))
    version = -1 if copy.rng.random() < 0.5 else int(name[-12:-6]) + copy.rng.randrange(3)
    for turn in record["turns"]:
        turn["policy_version"] = version
    for call in attempt_of(copy, name, record)["calls"]:
        call["version"] = version
    return version


def version_spans_with_a_gap(copy: Copy) -> Any:
    turn = one(copy.turn())
    num, version = len(turn["completion"]["token_ids"]), turn["policy_version"]
    turn["version_spans"] = [{"version": version, "start": 0, "stop": num - 1}]
    return True


def edited_reward(copy: Copy) -> Any:
    turn = one(copy.turn())
    turn["reward"] = copy.rng.choice([r for r in (0.0, 1.0, 0.5, -1.0) if r != turn["reward"]])
    return turn["reward"]


def edited_reward_everywhere(copy: Copy) -> Any:
    """The verdict and the mean reward in the metrics change with the reward."""
    name = copy.file()
    record = copy.rng.choice(copy.records(name))
    turn = record["turns"][-1]
    if turn["info"]["correct"] is None:
        return None
    change = 1.0 - 2 * turn["reward"]
    turn["reward"] += change
    turn["info"]["correct"] = not turn["info"]["correct"]
    step = int(name[-12:-6])
    num = len(copy.records(name))
    metrics = next(
        r for r in copy.records("metrics.jsonl") if r["step"] == step and "tokens/loss" in r
    )
    metrics["rollout/reward"] += change / num
    return change


def edited_answer(copy: Copy) -> Any:
    turn = one(copy.turn())
    turn["info"]["answer"] = str(copy.rng.randrange(10**6))
    return True


def missing_turn(copy: Copy) -> Any:
    turns = one(copy.record())["turns"]
    turns.pop(copy.rng.randrange(len(turns)))
    return True


def swapped_turns(copy: Copy) -> Any:
    turns = one(copy.record())["turns"]
    if len(turns) < 2:
        return None
    turns[0], turns[1] = turns[1], turns[0]
    return True


def doubled_turn(copy: Copy) -> Any:
    turns = one(copy.record())["turns"]
    turns.insert(0, turns[0])
    return True


def doubled_trajectory(copy: Copy) -> Any:
    records = copy.records(copy.file())
    record = copy.rng.choice(records)
    records[copy.rng.choice([i for i, each in enumerate(records) if each is not record])] = record
    return True


def added_trajectory(copy: Copy) -> Any:
    records = copy.records(copy.file())
    records.insert(copy.rng.randrange(len(records)), copy.rng.choice(records))
    return True


def missing_trajectory(copy: Copy) -> Any:
    records = copy.records(copy.file())
    records.pop(copy.rng.randrange(len(records)))
    return True


def trajectory_of_another_step(copy: Copy) -> Any:
    first, second = copy.rng.sample([n for n in copy.names if n.startswith("trajectories")], 2)
    copy.records(first)[0] = copy.records(second)[0]
    return True


def dropped_group(copy: Copy) -> Any:
    """A group is missing from trajectories and ledger."""
    name = copy.file()
    records = copy.records(name)
    group = copy.rng.choice(records)["group_id"]
    uids = {record["sequence_uid"] for record in records if record["group_id"] == group}
    records[:] = [record for record in records if record["group_id"] != group]
    ledger = copy.records(name.replace("trajectories", "ledger"))
    ledger[:] = [
        record
        for record in ledger
        if record.get("group_id") != group and record.get("uid") not in uids
    ]
    ledger[-1]["rows"] = len(ledger) - 2
    return group


def hidden_drop(copy: Copy) -> Any:
    """An episode is missing, and counted as dropped."""
    name = copy.file()
    records = copy.records(name)
    record = records.pop(copy.rng.randrange(len(records)))
    ledger = copy.records(name.replace("trajectories", "ledger"))
    group = next(each for each in ledger if each.get("group_id") == record["group_id"])
    group["dropped"] += 1
    return True


def changed_observation(copy: Copy) -> Any:
    """Text and ids of an observation change consistently."""
    turn = copy.turn(last=False)
    if turn is None:
        return None
    old = turn["info"]["observation"]
    text = str(copy.rng.randrange(10 ** max(1, len(old))))
    if text == old:
        return None
    frame = turn["observation"]["token_ids"]
    start = len(frame) - 2 - len(TOKENIZER.encode(old, add_special_tokens=False))
    turn["info"]["observation"] = text
    frame[start:-2] = TOKENIZER.encode(text, add_special_tokens=False)
    return text


def changed_observation_text(copy: Copy) -> Any:
    turn = copy.turn(tool=True)
    if turn is None:
        return None
    turn["info"]["observation"] += "0"
    return True


def changed_observation_ids(copy: Copy) -> Any:
    turn = copy.turn(last=False)
    if turn is None:
        return None
    ids = turn["observation"]["token_ids"]
    i = copy.rng.randrange(len(ids))
    ids[i] = (ids[i] + copy.rng.randrange(1, 100)) % 128
    return i


def flipped_outcome(copy: Copy) -> Any:
    turn = copy.turn(tool=True)
    if turn is None:
        return None
    other = copy.rng.choice(
        [o for o in ("ok", "tool_error", "tool_timeout") if o != turn["outcome"]]
    )
    turn["outcome"] = turn["info"]["outcome"] = other
    return other


def changed_stop_reason(copy: Copy) -> Any:
    turn = one(copy.turn())
    turn["stop_reason"] = copy.rng.choice(
        [r for r in ("eos", "stop", "length") if r != turn["stop_reason"]]
    )
    return turn["stop_reason"]


def flipped_end(copy: Copy) -> Any:
    record = one(copy.record())
    key = copy.rng.choice(("terminated", "truncated"))
    record[key] = not record[key]
    return key


def other_task(copy: Copy) -> Any:
    record = one(copy.record())
    record["task_id"] = f"arithmetic/train/0/{copy.rng.randrange(1000)}x"
    return record["task_id"]


def other_uid(copy: Copy) -> Any:
    one(copy.record())["sequence_uid"] += copy.rng.choice((-1, 1))
    return True


def edited_timing(copy: Copy) -> Any:
    one(copy.turn())["timing"]["generate"] += 1.0
    return True


def truncated_file(copy: Copy) -> Any:
    name = copy.rng.choice([*copy.names, "metrics.jsonl"])
    data = copy.bytes_of(name)
    copy.texts[name] = data[: copy.rng.randrange(1, len(data))]
    return name


def truncated_at_a_line(copy: Copy) -> Any:
    name = copy.rng.choice(copy.names)
    lines = copy.bytes_of(name).splitlines(keepends=True)
    copy.texts[name] = b"".join(lines[: copy.rng.randrange(len(lines))])
    return name


def flipped_byte(copy: Copy) -> Any:
    """An id or a logprob in the ledger changes."""
    name = copy.file("ledger")
    attempt = one(copy.record("ledger", kind="attempt"))
    call = copy.rng.choice(attempt["calls"])
    key, dtype = copy.rng.choice((("ids", "<i4"), ("logprobs", "<f8")))
    values = unpack_array(call[key], dtype)
    i = copy.rng.randrange(len(values))
    values[i] += 1 if key == "ids" else -0.125
    call[key] = pack_array(values, dtype)
    return name


def missing_file(copy: Copy) -> Any:
    name = copy.rng.choice(copy.names)
    if name.startswith("replaced"):
        return None  # covered by the count of replaced groups
    copy.texts[name] = None
    return name


def edited_metric(copy: Copy) -> Any:
    records = [record for record in copy.records("metrics.jsonl") if "tokens/loss" in record]
    record = copy.rng.choice(records)
    names = ("tokens/loss", "tokens/generated", "rollout/reward", "rollout/failed", "outcome/ok")
    record[copy.rng.choice(names)] += 1
    return True


def missing_metrics_record(copy: Copy) -> Any:
    records = copy.records("metrics.jsonl")
    records.remove(copy.rng.choice([record for record in records if "tokens/loss" in record]))
    return True


def more_in_the_loss(copy: Copy) -> Any:
    """The trainer packed a token that no trajectory admits to the loss."""
    update = one(copy.record("ledger", kind="update"))
    if not update["sequences"]:
        return None
    copy.rng.choice(update["sequences"])[2] += 1
    return True


def other_advantage(copy: Copy) -> Any:
    update = one(copy.record("ledger", kind="update"))
    if not update["sequences"]:
        return None
    copy.rng.choice(update["sequences"])[3] += copy.rng.choice((-0.5, 0.25))
    return True


def packed_twice(copy: Copy) -> Any:
    update = one(copy.record("ledger", kind="update"))
    if not update["sequences"]:
        return None
    update["sequences"].append(copy.rng.choice(update["sequences"]))
    return True


def left_out_of_the_loss(copy: Copy) -> Any:
    update = one(copy.record("ledger", kind="update"))
    if not update["sequences"]:
        return None
    update["sequences"].pop(copy.rng.randrange(len(update["sequences"])))
    return True


def other_packed_digest(copy: Copy) -> Any:
    update = one(copy.record("ledger", kind="update"))
    if not update["sequences"]:
        return None
    sequence = copy.rng.choice(update["sequences"])
    sequence[4] = f"{int(sequence[4], 16) ^ 1:016x}"
    return True


def edited_text(copy: Copy) -> Any:
    one(copy.turn())["completion"]["text"] += "~"
    return True


def one(value: dict[str, Any] | None) -> dict[str, Any]:
    assert value is not None
    return value


def attempt_of(copy: Copy, name: str, record: dict[str, Any]) -> dict[str, Any]:
    ledger = copy.records(name.replace("trajectories", "ledger"))
    return [each for each in ledger if each.get("uid") == record["sequence_uid"]][-1]


CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        *(swapped_ids, other_id, other_prompt, shifted_logprobs, lowered_logprob),
        *(missing_logprobs, one_logprob_less, unmasked_tool_tokens, unmasked_prompt, flipped_mask),
        *(moved_border, retokenised, stale_version, stale_version_everywhere),
        *(version_spans_with_a_gap, edited_reward, edited_reward_everywhere, edited_answer),
        *(missing_turn, swapped_turns, doubled_turn, doubled_trajectory, added_trajectory),
        *(missing_trajectory, trajectory_of_another_step, dropped_group, hidden_drop),
        *(changed_observation, changed_observation_text, changed_observation_ids),
        *(flipped_outcome, changed_stop_reason, flipped_end, other_task),
        *(other_uid, edited_timing, truncated_file, truncated_at_a_line, flipped_byte),
        *(missing_file, edited_metric, missing_metrics_record, more_in_the_loss, other_advantage),
        *(packed_twice, left_out_of_the_loss, other_packed_digest, edited_text),
    )
}
