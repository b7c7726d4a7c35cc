"""The train command as a user runs it: what it writes, and that a killed run loses nothing."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.runs import assert_honest

SMALL = (
    *("--rollout.groups_per_step", "4", "--rollout.group_size", "4"),
    *("--eval.num_tasks", "8", "--checkpoint.every", "1", "--deterministic", "true"),
    *("--trainer.rank_timeout_s", "60"),
)
PUBLIC_METRICS = {  # the names that outside scripts read
    *("rollout/reward", "rollout/tool_calls", "ratio/p2", "ratio/p50", "ratio/p98", "kl/rollout"),
    *("loss/clip_fraction", "loss/value", "alp/sigma_mean", "alp/effective", "entropy/mean"),
    *("staleness/mean", "time/generate", "time/tool", "time/train", "outcome/ok"),
    *("outcome/infra_error", "tokens/generated", "tokens/loss"),
}


def start(folder, *arguments):
    command = [sys.executable, "-m", "tir_alp.train", *arguments]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(folder, *arguments):
    process = start(folder, *arguments)
    printed = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 0, printed
    return printed


def metrics(run_folder):
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def digest(checkpoint):
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run of four steps."""
    folder = tmp_path_factory.mktemp("finished")
    printed = run(folder, "--name", "whole", "--steps", "4", *SMALL)
    assert_honest(folder / "runs" / "whole")
    return folder / "runs" / "whole", printed


def test_a_run_prints_its_objective_and_how_it_ended(finished):
    path, printed = finished
    objective = (path / "objective.txt").read_text()
    assert objective.startswith("alp_sequence: minimise the mean over tokens of L_t")
    assert objective in printed
    assert "  rollout.groups_per_step = 4" in printed
    assert "step 0: accuracy" in printed
    assert "step 4: accuracy" in printed
    assert f"--resume runs/{path.name}" in printed
    assert printed.splitlines()[-1] == f"report: runs/{path.name}/report.html"
    assert (path / "report.html").is_file() and (path / "figures" / "ratio.png").is_file()


def test_metrics_have_the_public_names_between_two_evaluations(finished):
    before, *training, after = metrics(finished[0])
    assert [record["step"] for record in training] == [1, 2, 3, 4]
    assert (before["step"], after["step"]) == (0, 4)
    assert before["eval/tasks"] == after["eval/tasks"] == 8
    assert 0 <= after["eval/accuracy"] <= 1
    for record in training:
        assert record.keys() >= PUBLIC_METRICS
        assert record["staleness/mean"] == 0
        assert record["train/skipped_updates"] == record["rollout/failed"] == 0


def documented(name):
    """Whether docs/metrics.md lists a metric; for slices, areas and keys are separate tables."""
    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    names = {each for cell in cells for each in re.findall("`([^`]+)`", cell)}
    patterns = [re.sub("<[a-z]+>", "[a-z0-9_]+", each) for each in names]
    area, key = name.split("/")
    wanted = (
        [name]
        if any("/" in each and each.startswith(f"{area}/") for each in names)
        else [area, key]
    )
    return all(any(re.fullmatch(pattern, each) for pattern in patterns) for each in wanted)


def test_every_metric_is_documented(finished):
    logged = {name for record in metrics(finished[0]) for name in record if name != "step"}
    assert {"turn_0/kl", "ratio/turn_p25", "staleness/share_0"} <= logged
    assert not documented("ratio/p") and not documented("turn_0/nothing")
    assert sorted(name for name in logged if not documented(name)) == []


def test_groups_without_signal_are_replaced_up_to_the_bound(tmp_path):
    small = ("--rollout.groups_per_step", "4", "--rollout.group_size", "2", "--eval.num_tasks", "1")
    run(tmp_path, "--name", "refilled", "--steps", "2", *small, "--rollout.max_refills", "3")
    path = tmp_path / "runs" / "refilled"
    assert_honest(path)
    _, *training, _ = metrics(path)
    # Two answers of the untrained model mostly earn the same reward.
    assert 0 < sum(record["rollout/refills"] for record in training) <= 2 * 3
    for record in training:
        assert record["rollout/zero_signal_groups"] >= record["rollout/refills"] <= 3
    recorded = [
        json.loads(line)["group_id"]
        for file in sorted((path / "trajectories").iterdir())
        for line in file.read_text().splitlines()
    ]
    assert len(recorded) == 2 * 4 * 2 and len(set(recorded)) == 2 * 4  # and none is recorded twice


def test_the_run_folder_is_complete(finished):
    path, _ = finished
    config = json.loads((path / "config.json").read_text())
    assert config["algorithm"]["name"] == "alp_sequence"
    assert config["rollout"]["group_size"] == 4
    assert sorted(file.name for file in (path / "trajectories").iterdir()) == [
        f"step_{step:06d}.jsonl" for step in (1, 2, 3, 4)
    ]
    assert list((path / "tensorboard").glob("events.*"))
    model = AutoModelForCausalLM.from_pretrained(path / "checkpoints" / "step_4")
    assert not [name for name in model.state_dict() if "sigma" in name]


def environments(run_folder):
    lines = (run_folder / "environment.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_reports_its_sandbox(finished):
    path, printed = finished
    (environment,) = environments(path)
    sandbox = environment["tools"]["python"]["sandbox"]
    assert sandbox in ("namespaces", "landlock")
    assert (environment["step"], environment["warnings"]) == (0, [])
    assert f"sandbox of python: {sandbox}, its probes held" in printed
    warnings = [line for line in printed.splitlines() if "warning:" in line]
    assert all("taught nothing" in line for line in warnings)  # so short a run may


def test_a_run_without_protection_warns(tmp_path):
    unsafe = ("--env.kwargs", '{"sandbox": {"backend": "unsafe"}}')
    words = ("--name", "bare", "--steps", "1", *unsafe, *SMALL)
    refused = start(tmp_path, *words)
    printed = refused.communicate(timeout=240)[0].decode()
    assert refused.returncode == 2
    assert "sandbox: a program reached a file of the host" in printed
    assert not (tmp_path / "runs").exists()
    printed = run(tmp_path, *words, "--doctor.ignore", "sandbox")
    assert_honest(tmp_path / "runs" / "bare")
    (environment,) = environments(tmp_path / "runs" / "bare")
    assert environment["tools"]["python"]["sandbox"] == "unsafe"
    (warning,) = environment["warnings"]
    assert "programs written by the model run as this user" in warning
    assert f"warning: {warning}" in printed.splitlines()


def test_recorded_trajectories_are_what_the_model_saw_and_wrote(finished):
    path, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(path / "checkpoints" / "step_4")
    recorded = (path / "trajectories" / "step_000001.jsonl").read_text().splitlines()
    assert len(recorded) == 16
    for trajectory in map(json.loads, recorded):
        assert tokenizer.decode(trajectory["prompt"]["token_ids"]).startswith("<|user|>What is ")
        assert trajectory["prompt"]["rollout_logprobs"] is None
        for turn in trajectory["turns"]:
            completion, observation = turn["completion"], turn["observation"]
            assert len(completion["token_ids"]) == len(completion["rollout_logprobs"]) > 0
            assert max(completion["rollout_logprobs"]) <= 0
            assert observation["rollout_logprobs"] is None
            if observation["token_ids"]:
                shown = tokenizer.decode(observation["token_ids"])
                assert shown == f"<|end|><|tool|>{turn['info']['observation']}<|end|><|assistant|>"


def test_a_run_killed_and_resumed_equals_one_that_was_not(finished, tmp_path):
    whole, _ = finished
    process = start(tmp_path, "--name", "killed", "--steps", "4", *SMALL)
    killed = tmp_path / "runs" / "killed"
    deadline = time.monotonic() + 200
    while not (killed / "checkpoints" / "step_2" / "manifest.json").exists():
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)  # in the middle of step 3
    process.communicate()
    assert not (killed / "checkpoints" / "step_4").exists()

    run(tmp_path, "--resume", str(killed))
    assert_honest(killed)
    assert [each["step"] for each in environments(killed)] in ([0, 2], [0, 3])

    not_repeated = ("time/", "tokens/per", "engine/")  # times, and counts since the process start
    timeless = [name for name in metrics(whole)[1] if not name.startswith(not_repeated)]
    assert len(timeless) > 20
    for undisturbed, resumed in zip(metrics(whole), metrics(killed), strict=True):
        names = [name for name in timeless if name in undisturbed]
        assert {name: undisturbed[name] for name in names} == {
            name: resumed[name] for name in names
        }
    checkpoints = "checkpoints/step_4"
    assert digest(whole / checkpoints) == digest(killed / checkpoints)
    for path in (whole, killed):
        dcp_to_torch_save(path / checkpoints / "trainer", path / "state.pt")
    states = [torch.load(path / "state.pt") for path in (whole, killed)]
    assert len(states[0]) > 100
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0, equal_nan=True)


def test_a_resume_may_not_change_the_trainer(finished):
    process = start(finished[0].parents[1], "--resume", str(finished[0]), "--trainer.lr", "1")
    printed = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 2
    assert "trainer cannot change in the middle of a run" in printed


def test_rollouts_ahead_of_the_weights_stay_within_the_limit(tmp_path):
    stale = ("--name", "stale", "--steps", "4", "--rollout.max_staleness", "2")
    run(tmp_path, *stale, *SMALL, "--deterministic", "false")
    assert_honest(tmp_path / "runs" / "stale")
    training = metrics(tmp_path / "runs" / "stale")[1:-1]
    staleness = [record["staleness/mean"] for record in training]
    assert 0 < max(staleness) <= 2


def test_a_run_out_of_bounds_rolls_back_and_stops_when_that_does_not_help(tmp_path):
    guards = ("--guards.max_ratio_spread", "1.000001", "--guards.on_trip", "roll_back")
    limits = ("--guards.max_roll_backs", "1", "--checkpoint.keep", "3")
    process = start(tmp_path, "--name", "ill", "--steps", "4", *SMALL, *guards, *limits)
    printed = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 3, printed
    path = tmp_path / "runs" / "ill"
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    assert [(event["step"], event["kind"]) for event in events] == [(1, "roll_back"), (2, "stop")]
    assert_honest(path)
    assert "max_ratio_spread = 1" in events[0]["reason"]
    assert "back to the weights of step 0" in events[0]["reason"]
    assert events[0]["weights_of_step"] == 0
    versions = [
        {turn["policy_version"] for turn in json.loads(line)["turns"]}
        for step in (1, 2)
        for line in (path / f"trajectories/step_{step:06d}.jsonl").read_text().splitlines()
    ]
    # The same weights, under the number of the step after which the engine got them.
    assert {*map(tuple, versions)} == {(0,), (1,)}
    assert f"stopped in step 2: {events[1]['reason']}" in printed
    assert digest(path / "checkpoints/step_1") == digest(path / "checkpoints/step_0")
    assert [record["step"] for record in metrics(path)] == [0, 1, 2]
