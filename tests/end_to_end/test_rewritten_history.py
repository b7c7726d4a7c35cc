"""A thinking episode of four turns, whose template drops earlier thoughts, is trained exactly."""

import json
from pathlib import Path

import pytest

from tests.random_model import save_random_model
from tests.rollouts.call_templates import DROPS_THOUGHTS
from tests.rollouts.forked_env import MESSAGES
from tests.runs import assert_honest, train_with
from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.records.trajectories import from_record
from tir_alp.rollouts.chat_template import ChatTemplate
from tir_alp.run.command_line import load_config

WORDS = [f"<think>\nSo {number}.\n</think>\n\nIt is {number}" for number in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random model: one that has learnt something gives some tokens no chance to be drawn."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DROPS_THOUGHTS
    return save_random_model(tokenizer, tmp_path_factory.mktemp("model"), 512)


def words_of(answer: int) -> list[str]:
    return [*WORDS, f"<think>\nHm.\n</think>\n\n{answer}"]


@pytest.mark.parametrize(
    ("method", "credit"),
    [("alp_token", "equal"), ("grpo", "token"), ("bypass_token", "last")],
)
def test_a_thinking_episode_trains_as_exact_traces(model, tmp_path, method, credit):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DROPS_THOUGHTS

    def encoded(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    scripts = [[encoded(f"{each}<|end|>") for each in words_of(answer)] for answer in (42, 41)]
    words = [
        *("--name", "forks", "--model.path", str(model), "--steps", "1", "--algorithm", method),
        *("--algorithm.aggregation", "sequence_mean_token_mean"),
        *("--env.id", "tests.rollouts.forked_env:ThinkTalk-v0", "--rollout.trace_credit", credit),
        *("--rollout.groups_per_step", "1", "--rollout.group_size", "2"),
        *("--rollout.max_turn_tokens", "80", "--rollout.max_context_tokens", "200"),
        *("--eval.every", "0", "--eval.num_tasks", "1", "--engine.type", "custom"),
        *("--engine.factory", "tests.forced_engine:open_engine", "--trackers", "[]"),
        *("--engine.kwargs.scripts", json.dumps(scripts)),
    ]
    run = train_with(tmp_path, load_config(words, {}))
    assert_honest(run)
    lines = (run / "trajectories" / "step_000001.jsonl").read_text().splitlines()
    episodes = [from_record(json.loads(line)) for line in lines]
    assert [each.reward for each in episodes] == [1.0, 0.0]
    num_trained = 0
    for episode, answer in zip(episodes, (42, 41), strict=True):
        messages = [{"role": "user", "content": "6*7?"}]
        assert [len(each.turns) for each in episode.conversation] == [1, 1, 1, 1]
        for number, trace in enumerate(episode.conversation):
            said = words_of(answer)[number]
            due = encoded(ChatTemplate(tokenizer).render(messages, generation=True))
            assert list(trace.prompt.token_ids) == due
            assert list(trace.token_ids) == due + encoded(f"{said}<|end|>")
            is_trained = credit != "last" or number == 3
            mask = [False] * len(due) + [is_trained] * len(encoded(f"{said}<|end|>"))
            assert list(trace.loss_mask) == mask
            num_trained += sum(mask)
            messages.append({"role": "assistant", "content": said})
            messages += [{"role": "user", "content": each} for each in MESSAGES[number:][:1]]
    ledger = (run / "ledger" / "step_000001.jsonl").read_text().splitlines()
    (update,) = [each for each in map(json.loads, ledger) if each["kind"] == "update"]
    assert len(update["sequences"]) == (2 if credit == "last" else 8)
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (metrics,) = [each for each in rows if "tokens/loss" in each]
    assert (metrics["rollout/traces"], metrics["rollout/turns"]) == (4, 4)
    assert metrics["tokens/loss"] == num_trained
