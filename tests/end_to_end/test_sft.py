"""From demonstrations to a number: sft, train, evaluate and chat on the tiny model, by command."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.rollouts.call_templates import DROPS_THOUGHTS
from tir_alp.audit.sft import audit_sft
from tir_alp.config import SFTConfig
from tir_alp.doctor.start import Doctor
from tir_alp.models.tiny import BASE
from tir_alp.models.tiny.transcripts import transcript
from tir_alp.run.local_placement import LocalPlacement
from tir_alp.run.open_sft import open_sft, prepare_sft
from tir_alp.sft import for_trainer, read_arguments, train
from tir_alp.training.policy import load_policy
from tir_alp.types import split_uid

ROOT = Path(__file__).parents[2]
LIMITS = {"max_context_tokens": 256, "max_turn_tokens": 64, "max_observation_tokens": 64}
TINY = (
    *("--env.kwargs.instruction", "", "--env.kwargs.max_turns", "3"),
    *("--env.kwargs.sandbox.preload", "[]"),
    *(word for name, value in LIMITS.items() for word in (f"--rollout.{name}", str(value))),
)


def write_transcripts(path: Path, number: int = 96) -> Path:
    rows = []
    for index in range(number):
        shown = transcript(7, index, 0.0)
        messages = [{"role": "user", "content": shown.question}]
        for turn, text in enumerate(shown.completions):
            messages.append({"role": "assistant", "content": text})
            if turn < len(shown.observations):
                messages.append({"role": "tool", "content": shown.observations[turn]})
        rows.append({"messages": messages})
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def command(folder: Path, *words: str, stdin: str = "", status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"tir_alp.{words[0]}", *words[1:]],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def config(data: Path, name: str, **changes) -> SFTConfig:
    settings = {
        "name": name,
        "steps": 4,
        "sequences_per_step": 8,
        "model": {"path": "tiny"},
        "env": {"kwargs": {"instruction": ""}},
        "rollout": LIMITS,
        "data": {"path": str(data)},
        "trainer": {"lr": 1e-3, "micro_batch_tokens": 256},
        "checkpoint": {"every": 0},
    }
    return SFTConfig.model_validate(settings | changes)


async def learn(config: SFTConfig, resume: Path | None = None) -> Path:
    prepared = prepare_sft(config, resume, print)
    placement = LocalPlacement(for_trainer(prepared.config))
    async with open_sft(lambda log: prepared, placement, Doctor()) as run:
        await train(run)
        return run.folder.path.resolve()


def metrics_of(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss/value" in row]


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_policy(str(run / f"checkpoints/step_{step}")).state_dict()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    import asyncio

    folder = tmp_path_factory.mktemp("sft")
    data = write_transcripts(folder / "t.jsonl")
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield asyncio.run(learn(config(data, "whole"))), data
    finally:
        os.chdir(before)


def test_the_losses_are_those_of_a_plain_loop_over_the_same_tokens(trained):
    run, _ = trained
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.99))
    for step, metrics in enumerate(metrics_of(run), start=1):
        file = run / "trajectories" / f"step_{step:06d}.jsonl"
        total, num_tokens = torch.zeros(()), 0
        for row in map(json.loads, file.read_text().splitlines()):
            spans = [row["prompt"]]
            for turn in row["turns"]:
                spans += [turn["completion"], turn["observation"]]
            ids = torch.tensor([[token for span in spans for token in span["token_ids"]]])
            learnt = torch.tensor(
                [span["rollout_logprobs"] is not None for span in spans for _ in span["token_ids"]]
            )
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
            chosen = logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1)[learnt[1:]]
            total, num_tokens = total - chosen.sum(), num_tokens + len(chosen)
        loss = total / num_tokens
        assert num_tokens == metrics["tokens/loss"]
        assert loss.item() == pytest.approx(metrics["loss/value"], abs=1e-6)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def test_a_run_in_two_pieces_is_the_whole_run_bit_for_bit(trained):
    import asyncio

    run, data = trained
    first = asyncio.run(learn(config(data, "pieces", steps=2)))
    asyncio.run(learn(config(data, "pieces", steps=4), resume=first))
    whole, pieces = metrics_of(run), metrics_of(first)
    assert [each["loss/value"] for each in whole] == [each["loss/value"] for each in pieces]
    for name, tensor in weights_of(run, 4).items():
        assert torch.equal(tensor, weights_of(first, 4)[name]), name


def test_thoughts_that_the_template_drops_are_learnt_as_traces(trained, tmp_path):
    import asyncio

    model = Path(shutil.copytree(BASE, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(DROPS_THOUGHTS)
    said = [("user", "6*7?"), ("assistant", "<think>Hm</think>42"), ("user", "?")]
    said.append(("assistant", "<think>So</think>Yes"))
    messages = [{"role": role, "content": text} for role, text in said]
    data = tmp_path / "t.jsonl"
    data.write_text(f"{json.dumps({'messages': messages})}\n" * 4)
    settings = config(data, "forked", steps=1, sequences_per_step=2, model={"path": str(model)})
    settings = settings.model_copy(
        update={"data": settings.data.model_copy(update={"held_out": 0.0})}
    )
    run = asyncio.run(learn(settings))
    file = run / "trajectories" / "step_000001.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [len(row["branches"]) for row in rows] == [1, 1]
    assert audit_sft(run).drifts == []
    sequences = [(uid, trace) for uid in (0, 1) for trace in (0, 1)]
    ledger = map(json.loads, (run / "ledger" / "step_000001.jsonl").read_text().splitlines())
    (update,) = [row for row in ledger if row["kind"] == "update"]
    assert sorted(split_uid(each[0]) for each in update["sequences"]) == sequences
    rows[0]["branches"][0]["turns"][0]["completion"]["trainable"] = False
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert audit_sft(run).drifts


def test_packing_changes_the_loss_only_by_rounding(trained):
    import asyncio

    run, data = trained
    wide = {"lr": 1e-3, "micro_batch_tokens": 8192}
    packed = asyncio.run(learn(config(data, "packed", trainer=wide)))
    for one, other in zip(metrics_of(run), metrics_of(packed), strict=True):
        assert one["loss/value"] == pytest.approx(other["loss/value"], abs=2e-5)


def test_more_epochs_make_more_steps_when_a_run_is_resumed(tmp_path):
    saved = config(tmp_path / "t.jsonl", "saved", steps=3)
    (tmp_path / "config.json").write_text(saved.model_dump_json())
    resume = ("--resume", str(tmp_path))
    assert read_arguments(resume)[0].steps == 3
    assert read_arguments([*resume, "--epochs", "2"])[0].steps is None
    assert read_arguments([*resume, "--trackers", "[]"])[0].trackers == ()
    with pytest.raises(ValueError, match="seed cannot change in the middle of a run"):
        read_arguments([*resume, "--seed", "1"])


def test_text_that_no_tokenizer_encodes_is_no_drift(tmp_path, monkeypatch):
    import asyncio

    monkeypatch.chdir(tmp_path)
    data = tmp_path / "t.jsonl"
    pairs = [("half \ud83d", "a \udc00"), ("q", "a")] * 8
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run = asyncio.run(learn(config(data, "odd", steps=1)))
    assert audit_sft(run).drifts == []


def edited(run: Path, folder: Path, change) -> Path:
    """A copy of a run in which the first trajectory of step 2 is changed."""
    shutil.copytree(run, folder)
    file = folder / "trajectories" / "step_000002.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows[0])
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def learn_the_prompt(row):
    row["prompt"]["rollout_logprobs"] = [0.0] * len(row["prompt"]["token_ids"])


def learn_no_answer(row):
    row["turns"][-1]["completion"]["trainable"] = False


def change_a_token(row):
    row["turns"][0]["completion"]["token_ids"][0] += 1


@pytest.mark.parametrize(
    ("change", "checks"),
    [
        (learn_the_prompt, {"loss mask", "prompt tokens", "tokens in the loss"}),
        (learn_no_answer, {"loss mask", "sequences in the loss"}),
        (change_a_token, {"sampled tokens", "sequences in the loss"}),
    ],
)
def test_the_audit_finds_a_corrupted_mask_and_a_changed_token(trained, tmp_path, change, checks):
    run, _ = trained
    assert audit_sft(run).drifts == []
    found = {drift.check for drift in audit_sft(edited(run, tmp_path / "run", change)).drifts}
    assert checks <= found


@pytest.mark.slow
def test_the_whole_way_by_command(tmp_path):
    data = write_transcripts(tmp_path / "t.jsonl", 400)
    out = command(
        tmp_path,
        *("sft", "--data.path", str(data), "--name", "taught", "--steps", "20", "--model.path"),
        *("tiny", "--trainer.lr", "1e-3", "--eval.every", "10", *TINY),
        *("--eval.data", '[{"source": "arithmetic", "limit": 8}]'),
    )
    assert "avg@k" in out and "arithmetic (8)" in out
    assert "held-out conversations" in out and "next: python -m tir_alp.train" in out
    assert "every token is accounted for" in command(tmp_path, "audit", "runs/taught")
    command(
        tmp_path,
        *("train", "--model.path", "runs/taught/checkpoints/step_20", "--name", "trained"),
        *("--steps", "2", "--eval.every", "1", "--eval.num_tasks", "16"),
        *("--config", str(ROOT / "configs/tiny.toml")),
    )
    best = json.loads((tmp_path / "runs/trained/checkpoints/best.json").read_text())
    assert (tmp_path / f"runs/trained/checkpoints/step_{best['step']}").is_dir() or not best["step"]
    words = ("evaluate", "--run", "runs/trained", "--checkpoint", "2", "--eval.num_tasks", "16")
    command(tmp_path, *words)
    folder = tmp_path / "runs/trained/evaluations/held_out-k1-step2"
    result = json.loads((folder / "evaluation.json").read_text())["sets"]["held_out"]
    rows = [
        json.loads(line)
        for line in (tmp_path / "runs/trained/metrics.jsonl").read_text().splitlines()
    ]
    own = [row for row in rows if row["step"] == 2 and "eval/accuracy" in row][-1]
    assert result["avg@k"]["mean"] == own["eval/accuracy"]
    assert result["greedy"]["mean"] == own["eval/greedy_accuracy"]
    assert "every token is accounted for" in command(tmp_path, "audit", str(folder))
    small = ("--eval.num_tasks", "4", "--eval.greedy", "false")
    taught = "runs/taught/checkpoints/step_20"
    words = ("evaluate", "--run", "runs/trained", "--against", taught, "--out", "compared")
    said = command(tmp_path, *words, *small)
    assert f"avg@k minus that of {taught}" in said
    others = json.loads((tmp_path / "evaluations/step_20/held_out-k1/config.json").read_text())
    trained = json.loads((tmp_path / "runs/trained/config.json").read_text())
    assert others["env"] == trained["env"] and others["rollout"] == trained["rollout"]
    again = command(tmp_path, "evaluate", "--run", "runs/taught")  # as `sft` did at its end
    assert "8 tasks have been played" in again
    (own,) = (tmp_path / "runs/taught/evaluations").iterdir()
    assert "every token is accounted for" in command(tmp_path, "audit", str(own))
    learnt = command(
        tmp_path,
        *("sft", "--from-run", str(folder), "--min-reward", "0", "--name", "again", "--steps", "1"),
        *("--model.path", "runs/trained/checkpoints/step_2", "--data.held_out", "0", *TINY),
    )
    assert "conversations with" in learnt
    assert "every token is accounted for" in command(tmp_path, "audit", "runs/again")
    talk = "/greedy\nWhat is 12*34+56?\nand again?\n/save saved.jsonl\n/nonsense\n/quit\n"
    said = command(tmp_path, "chat", "--run", "runs/trained", stdin=talk)
    assert "greedy" in said and "added to saved.jsonl" in said and "/reset" in said
    saved = json.loads((tmp_path / "saved.jsonl").read_text())["messages"]
    assert [each["role"] for each in saved].count("user") == 2


def test_an_evaluation_that_is_killed_loses_no_task_and_repeats_none(tmp_path):
    words = (
        "evaluate",
        "--model",
        "tiny",
        "--eval.num_tasks",
        "120",
        "--eval.greedy",
        "false",
        *TINY,
    )
    whole, half = tmp_path / "whole", tmp_path / "half"
    command(tmp_path, *words, "--out", str(whole))
    process = subprocess.Popen(
        [sys.executable, "-m", "tir_alp.evaluate", *words[1:], "--out", str(half)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 100
    while len([*half.glob("trajectories/*.jsonl")]) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    played = {file: file.stat().st_mtime_ns for file in half.glob("trajectories/*.jsonl")}
    assert not (half / "evaluation.json").exists() and len(played) < 120
    command(tmp_path, *words, "--out", str(half))
    assert all(file.stat().st_mtime_ns == written for file, written in played.items())
    found, expected = (json.loads((f / "evaluation.json").read_text()) for f in (half, whole))
    assert found["sets"] == expected["sets"]
    for file in whole.glob("trajectories/*.jsonl"):
        assert uids(half / "trajectories" / file.name) == uids(file)
    assert "every token is accounted for" in command(tmp_path, "audit", str(half))


def uids(file: Path) -> list[int]:
    return [json.loads(line)["sequence_uid"] for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "there is nothing to learn from: give --data.path FILE or --from-run RUN"),
        (("--data.path", "x.jsonl", "--rollout.group_size", "3"), "--rollout.group_size: there is"),
        (("--data.path", "missing.jsonl"), "cannot read missing.jsonl"),
        (("--from-run", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, words, reason):
    said = command(tmp_path, "sft", *words, status=2)
    assert reason in said and "Traceback" not in said


@pytest.mark.parametrize("name", ["evaluate", "chat"])
def test_a_model_that_is_a_file_is_named_in_one_line(tmp_path, name):
    (tmp_path / "weights.safetensors").touch()
    said = command(tmp_path, name, "--model", "weights.safetensors", status=2)
    assert f"is a file: give the folder that it is in, {tmp_path}" in said
    assert "Traceback" not in said and not (tmp_path / "evaluations").exists()
