"""Episodes with many traces: their number, and 2,000 corruptions of what was recorded of them."""

import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("openai")

from tests.agents.templates import Scripted, encoder, tokenizer
from tests.audit import episode_corruptions
from tests.audit.episode_corruptions import a_turn, corruption, missed, sequences
from tir_alp.agents.gateway import Gateway
from tir_alp.agents.runner import AgentRunner
from tir_alp.audit.agent_episode import AgentEpisodeCheck
from tir_alp.audit.findings import Findings, Location
from tir_alp.audit.records import RecordedTrajectory
from tir_alp.audit.replay import grade_again
from tir_alp.config import AgentsConfig, RolloutConfig
from tir_alp.envs.agent_env import AgentEnv
from tir_alp.records.ledger import Ledger
from tir_alp.records.ledger_rows import Attempt, unpack_array
from tir_alp.records.readable import REDACTED, Reading
from tir_alp.records.trajectories import from_record, to_record
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.renderer import Renderer
from tir_alp.types import Trajectory, TrajectoryGroup

TASK = Task("t7", "6*7?", "42")
CALL = '<tool_call>\n{"name": "python", "arguments": {"code": "1"}}\n</tool_call>'
LIMITS = RolloutConfig(max_turn_tokens=200, max_context_tokens=2000, group_size=1)
ENCODER = encoder()
SCRIPT = ("let me: " + CALL, "hm", "a", "b", "c", "d", "lost", "kept", "42! yes")


def play(
    train_on: Any = "all",
    function: str = "tests.agents.busy_agent:solve",
    script: Sequence[str] = SCRIPT,
) -> tuple[Trajectory, Attempt]:
    ledger = Ledger(1)
    engine = Scripted(*script)

    async def main() -> Trajectory:
        gateway = Gateway(encoder())
        try:
            runner = AgentRunner(
                make_env=lambda: AgentEnv(function=function),
                generate=ledger.recording(engine.generate),
                renderer=Renderer(tokenizer(), call_format="none"),
                limits=LIMITS,
                threads=threads,
                slots=asyncio.Semaphore(2),
                seed=3,
                on_failure=lambda failure: None,
                record_env=ledger.record_env,
                gateway=gateway,
                agents=AgentsConfig(train_on=train_on),
            )
            return await runner.run_episode(TASK, 5, 5)
        finally:
            await gateway.close()

    with ThreadPoolExecutor(4) as threads:
        trajectory = asyncio.run(main())
    rows = ledger.take([TrajectoryGroup("t7", 5, (trajectory,))], (), ())
    (attempt,) = [each for each in rows if each["kind"] == "attempt"]
    return trajectory, Attempt.from_record(attempt)


def drifts(record: Any, attempt: Any, train_on: Any = "all") -> list[str]:
    """Audit the records of an episode of an agent."""

    def check(trajectory: Trajectory, ledger: Attempt, findings: Findings) -> None:
        replayed = grade_again(AgentEnv(function="tests.agents.busy_agent:solve"), TASK, trajectory)
        one = AgentEpisodeCheck(ENCODER, LIMITS, AgentsConfig(train_on=train_on), findings)
        one(RecordedTrajectory(trajectory, Location("here")), ledger, replayed)

    return episode_corruptions.drifts_of(record, attempt, check)


@pytest.fixture(scope="module")
def played() -> tuple[dict[str, Any], dict[str, Any]]:
    trajectory, attempt = play()
    return json.loads(json.dumps([to_record(trajectory), attempt.to_record()]))


def test_each_conversation_of_an_agent_is_one_trace(played):
    trajectory = from_record(played[0])
    assert json.loads(json.dumps(to_record(trajectory))) == played[0]
    assert len(trajectory.sequences) == 5  # the plan, two sub-agents, the retry, the short one
    turns = [len(each.turns) for each in trajectory.sequences]
    assert sorted(turns) == [1, 1, 2, 2, 3]
    assert trajectory.reward == 1.0 and not any(each.reward for each in trajectory.branches)
    assert len({each.sequence_uid for each in trajectory.sequences}) == 5
    assert all(each.episode_uid == 5 for each in trajectory.sequences)
    sampled = sum(sum(each.loss_mask) for each in trajectory.sequences)
    returned = sum(len(unpack_array(each["ids"], "<i4")) for each in played[1]["calls"])
    assert sampled == returned - len(" yes") - 1  # which the engine sampled after "!"


@pytest.mark.parametrize("train_on", ["answer", "longest", "all"])
def test_the_config_says_what_is_trained_on_and_the_audit_agrees(train_on):
    trajectory, attempt = play(train_on)
    trained = [any(each.loss_mask) for each in trajectory.sequences]
    assert trained == [True, *[train_on == "all"] * 4]
    text = tokenizer().decode(list(trajectory.turns[-1].completion.token_ids))
    assert text == ("42!" if train_on != "longest" else "lost<|end|>")
    assert drifts(to_record(trajectory), attempt.to_record(), train_on) == []
    other = "longest" if train_on != "longest" else "answer"
    assert drifts(to_record(trajectory), attempt.to_record(), other)


def test_a_redacted_secret_is_no_drift_and_hides_nothing_else():
    trajectory, attempt = play()
    record = to_record(trajectory, Reading(tokenizer().decode, 100, secrets=("lost",)))
    assert "lost" not in json.dumps(record) and REDACTED in json.dumps(record)
    assert drifts(record, attempt.to_record()) == []
    completion = record["turns"][-1]["completion"]
    first, *rest = completion["rollout_logprobs"]
    completion["rollout_logprobs"] = [first - 1e-6, *rest]
    assert drifts(record, attempt.to_record())


# ----------------------------------------------------------------------------------- corruptions

CORRUPTIONS = dict(episode_corruptions.CORRUPTIONS)


def an_exchange(rng, record):
    return a_turn(rng, record)["info"]["exchange"]


@corruption(CORRUPTIONS)
def forked(rng, record, attempt):
    record["is_forked"] = True


@corruption(CORRUPTIONS)
def asked_content(rng, record, attempt):
    messages = [each for each in an_exchange(rng, record)["asked"] if each["content"]]
    rng.choice(messages)["content"] += rng.choice("abc")


@corruption(CORRUPTIONS)
def asked_role(rng, record, attempt):
    message = rng.choice(an_exchange(rng, record)["asked"])
    message["role"] = "system" if message["role"] != "system" else "user"


@corruption(CORRUPTIONS)
def asked_more(rng, record, attempt):
    asked = an_exchange(rng, record)["asked"]
    asked.append(dict(asked[0]))


@corruption(CORRUPTIONS)
def asked_nothing(rng, record, attempt):
    an_exchange(rng, record)["asked"].clear()


@corruption(CORRUPTIONS)
def reply_content(rng, record, attempt):
    an_exchange(rng, record)["reply"]["content"] += rng.choice("abc ")


@corruption(CORRUPTIONS)
def reply_shorter(rng, record, attempt):
    reply = an_exchange(rng, record)["reply"]
    reply["content"] = reply["content"][:-1] if reply["content"] else "x"


@corruption(CORRUPTIONS)
def reply_role(rng, record, attempt):
    an_exchange(rng, record)["reply"]["role"] = "user"


def with_calls(record):
    found = [turn["info"]["exchange"]["reply"] for s in sequences(record) for turn in s["turns"]]
    return next(each for each in found if "calls" in each)


@corruption(CORRUPTIONS)
def call_arguments(rng, record, attempt):
    with_calls(record)["calls"][0][2] = rng.choice(['{"code": "2"}', "{}", '{"code": 1}'])


@corruption(CORRUPTIONS)
def call_name(rng, record, attempt):
    with_calls(record)["calls"][0][1] = rng.choice(["bash", "pythom"])


@corruption(CORRUPTIONS)
def call_id(rng, record, attempt):
    with_calls(record)["calls"][0][0] = f"{rng.randrange(10**9):09}"


@corruption(CORRUPTIONS)
def call_dropped(rng, record, attempt):
    del with_calls(record)["calls"]


@corruption(CORRUPTIONS)
def call_doubled(rng, record, attempt):
    calls = with_calls(record)["calls"]
    calls.append(list(calls[0]))


@corruption(CORRUPTIONS)
def order_of_completions(rng, record, attempt):
    one, other = an_exchange(rng, record), an_exchange(rng, record)
    while other is one:
        other = an_exchange(rng, record)
    one["number"], other["number"] = other["number"], one["number"]


@corruption(CORRUPTIONS)
def number_of_a_completion(rng, record, attempt):
    an_exchange(rng, record)["number"] += rng.choice([-1, 1, 7])


@corruption(CORRUPTIONS)
def forced_text(rng, record, attempt):
    an_exchange(rng, record)["forced"] = "So"


@corruption(CORRUPTIONS)
def stops(rng, record, attempt):
    exchange = an_exchange(rng, record)
    exchange["stops"] = [] if exchange["stops"] else [exchange["reply"]["content"][:1] or "<"]


@corruption(CORRUPTIONS)
def reads_no_calls(rng, record, attempt):
    turns = [turn for each in sequences(record) for turn in each["turns"]]
    turn = next(each for each in turns if "calls" in each["info"]["exchange"]["reply"])
    turn["info"]["exchange"]["reads_calls"] = False


@corruption(CORRUPTIONS)
def tools(rng, record, attempt):
    trace = rng.choice(sequences(record))["turns"][0]["info"]["trace"]
    trace["tools"] = rng.choice(["", trace["tools"].replace("Runs", "Walks")])


@corruption(CORRUPTIONS)
def parent(rng, record, attempt):
    trace = rng.choice(sequences(record))["turns"][0]["info"]["trace"]
    trace["parent"] = rng.choice([[0, 1], [0, 3], [1, 1]]) if not trace["parent"] else None


@corruption(CORRUPTIONS)
def parent_elsewhere(rng, record, attempt):
    traces = [each["turns"][0]["info"]["trace"] for each in sequences(record)]
    trace = next(each for each in traces if each["parent"])
    trace["parent"] = rng.choice([[0, 1], [0, 3], [0, 0], [1, 1], [9, 1]])


@corruption(CORRUPTIONS)
def report(rng, record, attempt):
    info = record["turns"][-1]["info"]
    info["report"] = info["report"].replace("42", rng.choice(["43", "41"]))


@corruption(CORRUPTIONS)
def verdict(rng, record, attempt):
    info = record["turns"][-1]["info"]
    info.update(rng.choice([{"correct": False}, {"answer": "7"}, {"rewards": {}}, {"error": "e"}]))


def test_what_was_recorded_is_clean(played):
    assert drifts(*played) == []


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_is_found(played, name):
    times = -(-2000 // len(CORRUPTIONS))
    assert missed(played, name, CORRUPTIONS[name], times, drifts)[1] == []
