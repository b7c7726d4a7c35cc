"""The auditor on a run that a real model made in a real sandbox: intact, and corrupted."""

import itertools
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import gymnasium
import pytest

from tests.audit.corruptions import CORRUPTIONS, TOKENIZER, Copy
from tests.runs import assert_honest, train_with
from tir_alp.audit import audit_run
from tir_alp.audit.__main__ import main
from tir_alp.envs.spaces import TextSpace
from tir_alp.models.tiny import SHIPPED, TRAIN_CONFIG
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.run.prepare import prepare

SMALL = (
    *("--name", "small", "--model.path", "tiny-able", "--steps", "2", "--seed", "5"),
    *("--rollout.groups_per_step", "2", "--rollout.group_size", "2", "--rollout.max_refills", "2"),
    *("--rollout.max_staleness", "1", "--eval.num_tasks", "1", "--data.num_tasks", "1000"),
)
NUM_CORRUPTIONS = 1000


@pytest.fixture(scope="session")
def honest(tmp_path_factory) -> Path:
    return train_with(tmp_path_factory.mktemp("audit"), load_config(SMALL, read_toml(TRAIN_CONFIG)))


@pytest.fixture
def copied(honest, tmp_path) -> Path:
    """A copy of the run, to be corrupted."""
    return Path(shutil.copytree(honest, tmp_path / "copy"))


def test_every_token_of_an_honest_run_is_accounted_for(honest, capsys):
    assert main([str(honest)]) == 0
    assert "every token is accounted for" in capsys.readouterr().out
    checked = {check: number for check, (number, _) in audit_run(honest).totals().items()}
    assert min(checked.values()) > 0, checked
    assert checked["sampled tokens"] == checked["logprobs"] == checked["versions"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_corruption_is_caught(honest, copied):
    rng = random.Random(0)
    made: Counter[str] = Counter()
    missed = []
    while made.total() < NUM_CORRUPTIONS:
        name = min(CORRUPTIONS, key=lambda name: (made[name], name))
        for _ in range(200):
            copy = Copy(honest, rng)
            change = CORRUPTIONS[name](copy)
            if change is not None and (corrupted := copy.corrupted()):
                break
        else:
            pytest.fail(f"{name} cannot be made here")
        for file, data in corrupted.items():
            (copied / file).unlink() if data is None else (copied / file).write_bytes(data)
        findings = audit_run(copied, TOKENIZER)
        if not findings.drifts:
            missed.append((name, change))
        made[name] += 1
        for file in corrupted:
            shutil.copy(honest / file, copied / file)
    assert missed == []
    assert len(made) >= 20
    assert_honest(copied)  # everything was restored: the drifts came from the corruptions


def test_a_run_keeps_its_clock_and_its_end_tokens_when_it_is_audited_and_resumed(
    tmp_path,
):
    model = Path(shutil.copytree(SHIPPED["tiny-able"], tmp_path / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    template = model / "chat_template.jinja"
    body = template.read_text() if template.exists() else settings.pop("chat_template")
    template.write_text("{{ strftime_now('%H:%M:%S.%f') }}" + body)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = model / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": [1, 0]}))
    words = [*SMALL, "--model.path", str(model), "--steps", "1"]
    config = load_config(words, read_toml(TRAIN_CONFIG))
    path = train_with(tmp_path, config)
    assert audit_run(path).drifts == []
    saved = json.loads(next(path.glob("checkpoints/*/generation_config.json")).read_text())
    assert saved["eos_token_id"] == [0, 1]
    longer = config.model_copy(update={"steps": 2})
    first, again = (prepare(longer, path, print).renderer.prompt("ab") for _ in range(2))
    trajectories = path / "trajectories" / "step_000001.jsonl"
    recorded = json.loads(trajectories.read_text().splitlines()[0])["prompt"]["token_ids"]
    assert prepare(longer, path, print).renderer.stop_token_ids == {0, 1}
    length = len("12:34:56.123456")
    assert list(first.token_ids[:length]) == list(again.token_ids[:length]) == recorded[:length]


# ------------------------------------------------------------------------- what cannot be audited


def refusal(run: Path, capsys) -> str:
    assert main([str(run)]) == 2
    return capsys.readouterr().err


def test_a_folder_that_is_not_a_run(tmp_path, capsys):
    assert "is not a run folder: cannot read" in refusal(tmp_path, capsys)


def test_a_run_without_a_ledger(copied, capsys):
    shutil.rmtree(copied / "ledger")
    assert "has no ledger: it was made by a version of tir_alp that kept none" in refusal(
        copied, capsys
    )


def test_a_ledger_of_another_version(copied, capsys):
    file = copied / "ledger" / "step_000002.jsonl"
    file.write_text(file.read_text().replace("tir_alp ledger 1", "tir_alp ledger 9"))
    assert "step_000002.jsonl:1 has the format 'tir_alp ledger 9'" in refusal(copied, capsys)


def test_a_config_of_another_version(copied, capsys):
    file = copied / "config.json"
    file.write_text(file.read_text().replace('"group_size"', '"samples_a_group"'))
    assert "rollout.samples_a_group: there is no such key" in refusal(copied, capsys)


def test_a_drift_lists_the_records_that_a_step_lacks(copied, capsys):
    (copied / "trajectories" / "step_000001.jsonl").unlink()
    file = copied / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if json.loads(line)["step"] != 1))
    assert main([str(copied)]) == 1
    printed = capsys.readouterr().out.replace("\n", " ")
    missing = "no record in metrics.jsonl, no file in trajectories/"
    assert f"drift: step 1: the step has {missing} (steps)" in printed


def test_a_drift_names_its_location(copied, capsys):
    file = copied / "trajectories" / "step_000002.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["turns"][0]["completion"]["token_ids"][2] += 1
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(copied)]) == 1
    printed = capsys.readouterr().out.replace("\n", " ")
    uid, task = rows[1]["sequence_uid"], rows[1]["task_id"]
    assert f"step_000002.jsonl:2, task {task} (sequence {uid}), turn 0, token 2: " in printed


# --------------------------------------------------------------------- intact runs with failures


class Flaky(gymnasium.Env[str, str]):
    """Fails in every third step, but never when an episode is replayed."""

    observation_space = action_space = TextSpace()
    steps = itertools.count()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        assert options is not None
        self.is_replay = "tool_results" in options
        return options["task"]["question"], {}

    def step(self, action):
        if not self.is_replay and next(self.steps) % 3 == 1:
            return "", 0.0, False, True, {"outcome": "infra_error", "error": "on purpose"}
        return "", float(len(action) % 2), True, False, {"tool_calls": 0}


def test_episodes_that_infrastructure_broke_are_accounted_for(tmp_path):
    gymnasium.register("Flaky-v0", entry_point=Flaky)  # type: ignore[arg-type]
    try:
        words = (*SMALL, "--env.id", "Flaky-v0", "--rollout.max_refills", "0")
        settings = load_config(words, {**read_toml(TRAIN_CONFIG), "env": {"id": "Flaky-v0"}})
        run = train_with(tmp_path, settings)
        findings = audit_run(run)
    finally:
        del gymnasium.registry["Flaky-v0"]
    assert findings.drifts == []
    attempts, trajectories = (findings.totals()[each][0] for each in ("attempts", "trajectories"))
    assert attempts > trajectories


TINY_CONFIGS = [  # configs with servers are audited in the tests that start one
    file
    for file in sorted((Path(__file__).parents[2] / "configs").glob("tiny*.toml"))
    if "sglang" not in file.stem
]
FEW = (
    *("--name", "few", "--steps", "3", "--eval.num_tasks", "1"),
    *("--rollout.groups_per_step", "2", "--rollout.group_size", "4"),
)


@pytest.mark.parametrize("config", TINY_CONFIGS, ids=lambda config: config.stem)
def test_every_shipped_config_makes_an_honest_run(config, tmp_path):
    assert_honest(train_with(tmp_path, load_config(FEW, read_toml(config))))
