"""Whether a model learns as an agent what it learns from the same task as an environment.

    python -m tests.benchmarks.agent_learning FILE [STEPS] [SEEDS]

One row per run is appended to the file; runs that have a row are not made again. The agent is the
loop of OpenAI's documentation, unchanged. Each run is audited.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.runs import assert_honest, train_with
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.config import Config

KINDS = {
    "agent": {
        "id": "tir_alp.envs:Agent-v0",
        "kwargs": {"function": "tests.agents.openai_loop:solve"},
    },
    "environment": {
        "id": "tir_alp.envs:MultiTool-v0",
        "kwargs": {
            "tools": ["python"],
            "instruction": "",
            "max_turns": 3,
            "call_format": "fenced",
        },
    },
}
_TASKS = 128
_T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t by number of seeds


def run(kind: str, seed: int, steps: int) -> dict[str, object]:
    """Train once; return the row."""
    values = {
        "name": kind,
        "seed": seed,
        "steps": steps,
        "model": {"path": "tiny-able"},
        "env": KINDS[kind],
        "algorithm": ALGORITHMS["alp_sequence"],
        "agents": {"calls": "fenced"},
        "trainer": {"lr": 1e-4, "updates_per_step": 2},
        "rollout": {
            "groups_per_step": 8,
            "group_size": 8,
            "max_turn_tokens": 64,
            "max_context_tokens": 256,
        },
        "eval": {"num_tasks": _TASKS, "greedy": False},
        "trackers": [],
    }
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        made = train_with(Path(folder), Config.model_validate(values))
        rows = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
        assert_honest(made)
    accuracy = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    return {
        "kind": kind,
        "seed": seed,
        "steps": steps,
        "before": accuracy[0],
        "after": accuracy[-1],
        "rewards": [round(row["rollout/reward"], 4) for row in rows if "rollout/reward" in row],
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def summary(rows: list[dict[str, float]]) -> str:
    """Return mean and 95 % interval of the accuracy after training, in percent."""
    found = [100 * each["after"] for each in rows]
    half = _T_95[len(found)] * statistics.stdev(found) / len(found) ** 0.5
    return f"{statistics.mean(found):.1f} ± {half:.1f}"


def main(file: Path, steps: int = 20, seeds: int = 3) -> None:
    """Make the runs that have no row yet, and print what all of them say."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {(row["kind"], row["seed"], row["steps"]) for row in rows}
    for seed in range(seeds):
        for kind in KINDS:
            if (kind, seed, steps) not in known:
                rows.append(run(kind, seed, steps))
                with file.open("a") as out:
                    out.write(json.dumps(rows[-1]) + "\n")
    for kind in KINDS:
        own = [row for row in rows if row["kind"] == kind and row["steps"] == steps]
        print(f"{kind}: {summary(own)} % of {_TASKS} held-out tasks, {len(own)} seeds")
    by_seed = {(row["kind"], row["seed"]): row["after"] for row in rows if row["steps"] == steps}
    pairs = [by_seed["agent", seed] - by_seed["environment", seed] for seed in range(seeds)]
    print(f"difference by seed: {', '.join(f'{100 * each:+.1f}' for each in pairs)} points")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
