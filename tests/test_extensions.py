"""A method, an environment with a tool, and an engine from outside: one file each, and one step."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.runs import assert_honest
from tir_alp.audit import audit_run

ROOT = Path(__file__).parents[1]
TINY = (
    *("--name", "outside", "--steps", "1", "--eval.num_tasks", "2", "--eval.greedy", "false"),
    *("--rollout.groups_per_step", "2", "--rollout.group_size", "4"),
)

METHOD = """
    from tir_alp.algorithm import ALGORITHMS, Surrogate


    def soft(ratios, logprobs, advantages, algorithm):
        return -advantages * 4 * (ratios - 1).sigmoid(), {"soft": ratios > 2}


    SOFT = Surrogate(soft, lambda algorithm: "-4 A sigmoid(r_t - 1)", sides=("soft",))
    PRESET = ALGORITHMS["bypass_token"].model_copy(
        update={"name": "soft", "surrogate": "my_method:SOFT"}
    )
"""

ENGINE = """
    from contextlib import asynccontextmanager

    from tir_alp.engines.transformers import TransformersEngine
    from tir_alp.training.policy import load_policy


    class Counting:
        \"\"\"Speaks the Engine protocol; the sampling itself is borrowed.\"\"\"

        def __init__(self, inner):
            self.inner, self.calls = inner, 0

        async def generate(self, token_ids, sampling):
            self.calls += 1
            return await self.inner.generate(token_ids, sampling)

        async def load_weights(self, source, version):
            await self.inner.load_weights(source, version)

        async def lend_memory(self):
            await self.inner.lend_memory()

        async def abort(self, sequence_uid=None):
            await self.inner.abort(sequence_uid)

        def health(self):
            return {"calls": self.calls}

        async def close(self):
            await self.inner.close()


    @asynccontextmanager
    async def open_engine(settings, context):
        model = load_policy(context.path)
        inner = TransformersEngine(model, version=context.version, **settings.kwargs)
        engine = Counting(inner)
        try:
            yield engine
        finally:
            await engine.close()
"""


def train(folder: Path, *words: str) -> dict[str, float]:
    """Train one step by the command, audit it, and return the step's metrics."""
    done = subprocess.run(
        [sys.executable, "-m", "tir_alp.train", *TINY, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT)]))},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = folder / "runs" / "outside"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["step"] == 1 and "tokens/loss" in row)


def write(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(folder)


def test_a_method_from_one_file_trains_and_logs_its_own_clip_side(tmp_path, monkeypatch):
    write(tmp_path, "my_method", METHOD, monkeypatch)
    metrics = train(tmp_path, "--algorithm", "my_method:PRESET")
    assert metrics["loss/clip_fraction_soft"] >= 0
    run = tmp_path / "runs" / "outside"
    assert "-4 A sigmoid(r_t - 1)" in (run / "objective.txt").read_text()
    assert_honest(run)


def test_an_environment_and_its_tool_from_one_file_train(tmp_path, monkeypatch):
    source = (ROOT / "docs/examples/shop_env.py").read_text()
    write(tmp_path, "shop_env", source, monkeypatch)
    metrics = train(
        tmp_path,
        *("--env.id", "shop_env:Shop-v0", "--data.source", "env"),
        *("--env.kwargs.instruction", "", "--env.kwargs.max_turns", "2"),
        *("--env.kwargs.tools_in_prompt", "true", "--rollout.max_context_tokens", "1024"),
    )
    assert metrics["outcome/infra_error"] == 0 and metrics["tokens/generated"] > 0
    assert audit_run(tmp_path / "runs" / "outside").drifts == []


def test_reward_functions_from_one_file_train(tmp_path, monkeypatch):
    source = (ROOT / "docs/examples/my_reward.py").read_text()
    assert source in (ROOT / "docs/environments.md").read_text()
    write(tmp_path, "my_reward", source, monkeypatch)
    rows = [{"question": f"{n}+{n}", "answer": str(2 * n)} for n in range(10, 60)]
    (tmp_path / "tasks.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    rewards = ["my_reward:close", {"function": "my_reward:brief", "weight": 0.1}]
    metrics = train(
        tmp_path,
        *("--data.source", "jsonl", "--data.path", str(tmp_path / "tasks.jsonl")),
        *("--env.kwargs.rewards", json.dumps(rewards)),
    )
    assert metrics["reward/my_reward:brief"] > 0
    total = metrics["reward/my_reward:brief"] + metrics["reward/my_reward:close"]
    assert metrics["rollout/reward"] == pytest.approx(total)
    assert_honest(tmp_path / "runs" / "outside")


def test_an_engine_from_one_file_trains(tmp_path, monkeypatch):
    write(tmp_path, "my_engine", ENGINE, monkeypatch)
    metrics = train(
        tmp_path,
        *("--engine.type", "custom", "--engine.factory", "my_engine:open_engine"),
        *("--engine.kwargs.max_cache_tokens", "65536"),
    )
    assert metrics["engine/calls"] >= 2 * 2 * 4
    assert_honest(tmp_path / "runs" / "outside")
