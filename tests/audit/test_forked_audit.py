"""An episode whose history was rewritten, and 1,000 corruptions of what was recorded of it."""

import copy
import json

import pytest

from tests.audit import episode_corruptions
from tests.audit.episode_corruptions import a_turn, corruption, missed, sequences
from tests.rollouts.forked import TASK, WORDS, Speaker, Talk, play, renderer
from tir_alp.audit.findings import Location
from tir_alp.audit.records import RecordedTrajectory
from tir_alp.audit.replay import replay
from tir_alp.audit.trajectory import TrajectoryCheck
from tir_alp.config import RolloutConfig
from tir_alp.records.trajectories import from_record, to_record

RENDERER = renderer()
LIMITS = RolloutConfig(max_turn_tokens=200, max_context_tokens=2000, group_size=1)
CORRUPTIONS = dict(episode_corruptions.CORRUPTIONS)
NUM_CORRUPTIONS = 1000


def drifts(record, attempt, limits=LIMITS):
    """Audit the records of a forked episode."""

    def check(trajectory, ledger, findings):
        replayed = replay(Talk(), TASK, trajectory, RENDERER)
        one = TrajectoryCheck(RENDERER, limits, findings)
        one(RecordedTrajectory(trajectory, Location("here")), ledger, replayed)

    return episode_corruptions.drifts_of(record, attempt, check)


@pytest.fixture(scope="module")
def played():
    trajectory, attempt = play(Speaker(*WORDS))
    assert [len(each.turns) for each in trajectory.conversation] == [1, 2, 1, 1]
    return json.loads(json.dumps([to_record(trajectory), attempt.to_record()]))


def test_what_was_recorded_is_clean(played):
    assert drifts(*played) == []
    assert json.loads(json.dumps(to_record(from_record(played[0])))) == played[0]


def test_what_the_config_leaves_out_of_the_loss_is_checked(played):
    last = LIMITS.model_copy(update={"trace_credit": "last"})
    assert any("trace_credit" in each for each in drifts(played[0], played[1], last))
    trajectory, attempt = play(Speaker(*WORDS), trace_credit="last")
    assert drifts(to_record(trajectory), attempt.to_record(), last) == []
    assert drifts(to_record(trajectory), attempt.to_record()) != []


def test_an_episode_that_a_limit_ends_after_a_fork_is_clean():
    for most in range(150, 420, 30):
        trajectory, attempt = play(Speaker(*WORDS), max_context_tokens=most)
        limits = LIMITS.model_copy(update={"max_context_tokens": most})
        assert drifts(to_record(trajectory), attempt.to_record(), limits) == []


# ----------------------------------------------------------------------------------- corruptions


def traces(record):
    return [*record["branches"], record]


@corruption(CORRUPTIONS)
def not_forked(rng, record, attempt):
    del record["is_forked"]


@corruption(CORRUPTIONS)
def branch_forked(rng, record, attempt):
    branch = record["branches"][rng.randrange(1, len(record["branches"]))]
    branch.update(is_forked=True, branches=[copy.deepcopy(record["branches"][0])])


@corruption(CORRUPTIONS)
def branches_reordered(rng, record, attempt):
    rng.shuffle(record["branches"])


@corruption(CORRUPTIONS)
def prompts_swapped(rng, record, attempt):
    one, other = rng.sample(traces(record), 2)
    one["prompt"], other["prompt"] = other["prompt"], one["prompt"]


@corruption(CORRUPTIONS)
def thought_kept_in_a_prompt(rng, record, attempt):
    """What appending would have shown: the earlier trace as it was sampled."""
    number = rng.randrange(1, 3)
    before, after = traces(record)[number - 1 : number + 1]
    sampled = before["prompt"]["token_ids"] + before["turns"][0]["completion"]["token_ids"]
    rest = after["prompt"]["token_ids"][rng.randrange(1, 30) :]
    after["prompt"]["token_ids"] = sampled + rest


@corruption(CORRUPTIONS)
def prompt_shortened(rng, record, attempt):
    ids = rng.choice(traces(record))["prompt"]["token_ids"]
    del ids[rng.randrange(len(ids))]


@corruption(CORRUPTIONS)
def turn_moved_to_the_trace_before(rng, record, attempt):
    before, after = record["branches"][:2]
    before["turns"].append(after["turns"].pop(0))


@corruption(CORRUPTIONS)
def traces_joined(rng, record, attempt):
    """A trace as if the history had not been rewritten: its prompt is an observation."""
    at = rng.randrange(len(record["branches"]) - 1)
    before, after = record["branches"][at : at + 2]
    before["turns"][-1]["observation"]["token_ids"] = after["prompt"]["token_ids"]
    before["turns"] += after["turns"]
    record["branches"].remove(after)


@corruption(CORRUPTIONS)
def trace_split(rng, record, attempt):
    """A trace as if the history had been rewritten where it was not."""
    whole = record["branches"][1]
    first, second = whole["turns"]
    spans = [whole["prompt"], first["completion"], first["observation"]]
    ids = [token for span in spans for token in span["token_ids"]]
    first["observation"]["token_ids"] = []
    whole["turns"] = [first]
    later = {**copy.deepcopy(whole), "turns": [second]}
    later["prompt"]["token_ids"] = ids
    record["branches"].insert(2, later)
    for number, each in enumerate(traces(record)):
        each["sequence_uid"] = 5 + (number << 54)
    for number, call in zip((0, 1, 2, 3, 4), attempt["calls"], strict=True):
        call["trace"] = number


@corruption(CORRUPTIONS)
def role(rng, record, attempt):
    turns = [turn for each in sequences(record) for turn in each["turns"]]
    turn = rng.choice([each for each in turns if "role" in each["info"]])
    turn["info"]["role"] = rng.choice(["tool", "system", None])


@corruption(CORRUPTIONS)
def messages(rng, record, attempt):
    turns = [turn for each in sequences(record) for turn in each["turns"]]
    found = next(each["info"] for each in turns if "messages" in each["info"])
    rng.choice(found["messages"])["content"] += rng.choice("abc")


@corruption(CORRUPTIONS)
def no_messages(rng, record, attempt):
    turns = [turn for each in sequences(record) for turn in each["turns"]]
    del next(each["info"] for each in turns if "messages" in each["info"])["messages"]


@corruption(CORRUPTIONS)
def observation_text(rng, record, attempt):
    a_turn(rng, record)["info"]["observation"] += rng.choice("abc")


def test_every_corruption_is_found(played):
    times = -(-NUM_CORRUPTIONS // len(CORRUPTIONS)) + 4
    found = {name: missed(played, name, each, times, drifts) for name, each in CORRUPTIONS.items()}
    assert {name: seeds for name, (_, seeds) in found.items() if seeds} == {}
    assert all(number for number, _ in found.values())
    assert sum(number for number, _ in found.values()) >= NUM_CORRUPTIONS
