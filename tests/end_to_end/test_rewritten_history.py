"""A thinking episode of four turns, whose template drops earlier thoughts, is trained exactly."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.random_model import save_random_model
from tests.rollouts.call_templates import DROPS_THOUGHTS
from tests.rollouts.forked_env import MESSAGES
from tests.runs import assert_honest, train_with
from tir_alp.config import Config
from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.records.trajectories import from_record, state_from_record
from tir_alp.rollouts.chat_template import ChatTemplate
from tir_alp.run import supervise
from tir_alp.run.command_line import load_config
from tir_alp.run.supervise import train_from
from tir_alp.train import services
from tir_alp.training import checkpoint_folder

WORDS = [f"<think>\nSo {number}.\n</think>\n\nIt is {number}" for number in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random model: one that has learnt something gives some tokens no chance to be drawn."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DROPS_THOUGHTS
    return save_random_model(tokenizer, tmp_path_factory.mktemp("model"), 512)


def words_of(answer: int) -> list[str]:
    return [*WORDS, f"<think>\nHm.\n</think>\n\n{answer}"]


def encoded(text: str) -> list[int]:
    return make_tokenizer().encode(text, add_special_tokens=False)


def settings(model: Path, method: str, credit: str, *more: str) -> Config:
    """A run of one step of episodes of four turns, by an engine that is given."""
    words = [
        *("--name", "forks", "--model.path", str(model), "--steps", "1", "--algorithm", method),
        *("--algorithm.aggregation", "sequence_mean_token_mean"),
        *("--env.id", "tests.rollouts.forked_env:ThinkTalk-v0", "--rollout.trace_credit", credit),
        *("--rollout.groups_per_step", "1", "--rollout.group_size", "2"),
        *("--rollout.max_turn_tokens", "80", "--rollout.max_context_tokens", "200"),
        *("--eval.every", "0", "--eval.num_tasks", "1", "--trackers", "[]"),
    ]
    return load_config([*words, *more], {})


def forced() -> tuple[str, ...]:
    """An engine that thinks, and is right in every other episode."""
    scripts = [[encoded(f"{each}<|end|>") for each in words_of(answer)] for answer in (42, 41)]
    factory = ("--engine.factory", "tests.forced_engine:open_engine")
    return "--engine.type", "custom", *factory, "--engine.kwargs.scripts", json.dumps(scripts)


@pytest.mark.parametrize(
    ("method", "credit"),
    [("alp_token", "equal"), ("grpo", "token"), ("bypass_token", "last")],
)
def test_a_thinking_episode_trains_as_exact_traces(model, tmp_path, method, credit):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DROPS_THOUGHTS
    run = train_with(tmp_path, settings(model, method, credit, *forced()))
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


AHEAD = ("--rollout.max_staleness", "1", "--rollout.hold", "true", "--deterministic", "true")
"""Groups of a step wait in the queue while another step is trained."""


def trajectories_of(run: Path, step: int) -> list[dict[str, Any]]:
    lines = (run / "trajectories" / f"step_{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_forked_run_resumes_as_if_it_had_not_stopped(model, tmp_path, monkeypatch):
    """The checkpoint in the middle has forked episodes that wait to be trained on."""
    monkeypatch.setattr(supervise, "draw", lambda run, draw_report: None)
    words = (
        *("--checkpoint.every", "1", "--checkpoint.keep", "3", "--rollout.max_refills", "0"),
        *("--env.id", "tests.rollouts.forked_env:Summarised-v0", "--rollout.max_turn_tokens", "9"),
        *("--engine.type", "transformers", *AHEAD),
    )
    found = []
    for name, parts in (("whole", (3,)), ("parts", (3, 3))):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        run = folder / "runs" / "forks"
        for number, steps in enumerate(parts):
            config = settings(model, "grpo", "token", "--steps", str(steps), *words)
            if number:
                for later in ("step_2", "step_3"):
                    shutil.rmtree(run / "checkpoints" / later)
            asyncio.run(train_from(config, run if number else None, services()))
        assert_honest(run)
        found.append(run)
    whole, resumed = found
    saved = checkpoint_folder.load_rollouts(whole / "checkpoints" / "step_1")["queue"]
    waiting = [
        each for group in state_from_record(saved).finished.values() for each in group.trajectories
    ]
    assert waiting and all(len(each.conversation) == 4 for each in waiting)
    for step in (2, 3):
        assert [*map(exact, trajectories_of(resumed, step))] == [
            *map(exact, trajectories_of(whole, step))
        ]
    weights = [load_file(run / "checkpoints" / "step_3" / "model.safetensors") for run in found]
    assert all(torch.equal(weights[1][name], each) for name, each in weights[0].items())


def exact(record: dict[str, Any]) -> dict[str, Any]:
    """A record of a trajectory without its durations."""
    if isinstance(record, dict):
        return {name: exact(each) for name, each in record.items() if name != "timing"}
    return [exact(each) for each in record] if isinstance(record, list) else record
