"""What reinforcement learning adds to fine-tuning: `python -m tir_alp.studies.mixture`.

For each seed, SmolLM2-135M-Instruct is fine-tuned on demonstrations of eleven kinds of tasks, and
is then trained with ALP and, from the same fine-tuned model, with Bypass, which is ALP without
noise. Each model is evaluated on the same held-out tasks with the Python tool; the base model and
that of ALP also without it. Runs and evaluations are audited. Each evaluation is a row of a file;
stages that are done are not repeated, so an interrupted study goes on where it stopped. It takes
hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tir_alp.process import run_command
from tir_alp.records.folder import read_records
from tir_alp.studies.stages import Stage, audit, logger, perform, training

CONFIGS = Path(__file__).parent
SFT_CONFIG, RL_CONFIG = CONFIGS / "smollm2_sft.toml", CONFIGS / "smollm2_mixture.toml"
METHODS = ("alp_sequence", "bypass_sequence")


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything there is."""

    sft_steps: int = 8
    transcripts: int = 256
    rl_steps: int | None = None
    """None: as many as the config asks for."""
    num_tasks: int = 528
    """Held-out tasks of each evaluation."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A model that is evaluated."""

    seed: int
    model: str
    """`base`, `sft`, or the method of its training."""
    with_tools: bool
    folder: Path
    """Folder of the evaluation."""
    run_folder: Path | None = None
    """Folder of the run that made the model; None: it was not made here."""


def chain(folder: Path, seed: int, size: Size) -> Iterator[tuple[Stage, Evaluated | None]]:
    """Yield the stages of a seed, in order, and which of them evaluate something.

    Args:
        folder: Folder of the study, below `runs/`.
        seed: Seed of demonstrations, order, rollouts and noise.
        size: How much of everything there is.
    """
    base, own = folder / "smollm2", folder / f"seed{seed}"
    data = own / "transcripts.jsonl"
    taught = own / "sft" / "checkpoints" / f"step_{size.sft_steps}"
    rl_steps = size.rl_steps or int(tomllib.loads(RL_CONFIG.read_text())["steps"])
    kinds = ",".join(each.get("dataset", each["source"]) for each in _mix())

    def evaluation(
        label: str, model: Path, run_folder: Path | None = None, tools: bool = True
    ) -> tuple[Stage, Evaluated]:
        where = folder if label == "base" else own
        out = where / f"evaluation-{label}{'' if tools else '-without-tools'}"
        words = ("evaluate", "--model", str(model), "--config", str(RL_CONFIG), "--out", str(out))
        limits = ("--eval.num_tasks", str(size.num_tasks))
        words = (*words, *limits, *(() if tools else ("--without-tools",)))
        if label == "base" and not tools:  # nothing else has told it how to answer
            words = (*words, "--env.kwargs.instruction", "null")
        title = f"seed {seed}: evaluating {label}{'' if tools else ' without tools'}"
        stage = Stage(title, out / "evaluation.json", words)
        return stage, Evaluated(seed, label, tools, out, run_folder)

    fetch = ("models", "smollm2", "--out", str(base))
    yield Stage("fetching the model", base / "config.json", fetch), None
    if seed == 0:  # nothing of it depends on the seed
        yield evaluation("base", base)
        yield evaluation("base", base, tools=False)
    show = ("envs", "demonstrate", "--out", str(data), "--kinds", kinds, "--instruction", "")
    show = (*show, "--seed", str(seed), "--number", str(size.transcripts))
    yield Stage(f"seed {seed}: writing demonstrations", data, show), None
    yield (
        training(
            f"seed {seed}: supervised fine-tuning",
            "sft",
            own / "sft",
            size.sft_steps,
            *("--config", str(SFT_CONFIG), "--seed", str(seed), *_episode_limits()),
            *("--model.path", str(base), "--data.path", str(data)),
        ),
        None,
    )
    yield evaluation("sft", taught, own / "sft")
    for method in METHODS:
        run_folder = own / method
        trained = run_folder / "checkpoints" / f"step_{rl_steps}"
        yield (
            training(
                f"seed {seed}: training with {method}",
                "train",
                run_folder,
                rl_steps,
                *("--config", str(RL_CONFIG), "--algorithm", method, "--seed", str(seed)),
                *("--model.path", str(taught)),
            ),
            None,
        )
        yield evaluation(method, trained, run_folder)
        if method == "alp_sequence":
            yield evaluation(method, trained, run_folder, tools=False)


def row_of(evaluated: Evaluated) -> dict[str, Any]:
    """Return what an evaluation found, and how its model was trained, as one row."""
    result = json.loads((evaluated.folder / "evaluation.json").read_text())
    (found,) = result["sets"].values()
    kinds: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for task in found["per_task"]:
        counts = kinds[_kind(task["task_id"])]
        counts[0] += sum(task["correct"])
        counts[1] += len(task["correct"])
    row: dict[str, Any] = {
        "seed": evaluated.seed,
        "model": evaluated.model,
        "tools": evaluated.with_tools,
        **found["avg@k"],
        "failed_episodes": found["failed_episodes"],
        "kinds": {kind: f"{right}/{total}" for kind, (right, total) in sorted(kinds.items())},
        **{name: round(found[name]["mean"], 3) for name in ("turns", "tool_calls", "tool_errors")},
    }
    if evaluated.run_folder is not None and evaluated.with_tools:
        row["steps"] = [
            {name: step[name] for name in _CURVES if name in step}
            for step in read_records(evaluated.run_folder / "metrics.jsonl")[0]
            if "train/lr" in step
        ]
    return row


_CURVES = (
    *("step", "rollout/reward", "rollout/void_turns", "loss/value", "grad_norm/policy"),
    *("kl/rollout_k3", "mismatch/probe_mean", "time/rollout", "time/train"),
)
"""Metrics of each step that a row keeps."""


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the accuracies as a markdown table: a row per seed, a column per model."""
    columns = [
        *(("base", False), ("base", True), ("sft", True)),
        *(("bypass_sequence", True), ("alp_sequence", False), ("alp_sequence", True)),
    ]
    titles = [f"{model}{'' if tools else ', no tools'}" for model, tools in columns]
    lines = [f"| seed | {' | '.join(titles)} |", "|---" * (1 + len(columns)) + "|"]
    for seed in sorted({row["seed"] for row in rows}):
        cells = []
        for model, tools in columns:
            of = [r for r in rows if (r["seed"], r["model"], r["tools"]) == (seed, model, tools)]
            text = "{mean:.1%} [{low:.1%}, {high:.1%}]"
            cells.append(text.format(**of[0]) if of else "")
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    usual = Size()
    found = argparse.ArgumentParser("python -m tir_alp.studies.mixture", description=__doc__)
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--sft-steps", type=int, default=usual.sft_steps)
    found.add_argument("--rl-steps", type=int, help="default: those of the config")
    found.add_argument("--transcripts", type=int, default=usual.transcripts)
    found.add_argument("--tasks", type=int, default=usual.num_tasks, help="tasks per evaluation")
    found.add_argument("--name", default="mixture", help="folder below runs/")
    return found


def main(arguments: Sequence[str]) -> int:
    """Make what is missing of the study; returns the exit code."""
    options = parser().parse_args(arguments)
    size = Size(options.sft_steps, options.transcripts, options.rl_steps, options.tasks)
    folder = Path("runs") / options.name
    folder.mkdir(parents=True, exist_ok=True)
    log, rows = logger(), []
    for seed in options.seeds:
        (folder / f"seed{seed}").mkdir(exist_ok=True)
        for stage, evaluated in chain(folder, seed, size):
            took = perform(stage, log)
            if evaluated is None:
                continue
            if took:
                for path in filter(None, (evaluated.folder, evaluated.run_folder)):
                    audit(path, log)
            rows.append(row_of(evaluated))
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"rows-{'-'.join(map(str, options.seeds))}.jsonl").write_text(text)
    log(f"held-out accuracy on {size.num_tasks} tasks, sampled, with 95 % intervals:")
    print(table(rows))
    return 0


def _mix() -> list[dict[str, str]]:
    return tomllib.loads(RL_CONFIG.read_text())["data"]["mix"]


def _episode_limits() -> Iterator[str]:
    """Limits of an episode as in reinforcement learning, for the config of fine-tuning."""
    rollout = tomllib.loads(RL_CONFIG.read_text())["rollout"]
    for name in ("max_turn_tokens", "max_context_tokens", "max_observation_tokens"):
        yield from (f"--rollout.{name}", str(rollout[name]))


def _kind(task_id: str) -> str:
    source, kind, *_ = task_id.split("/")
    return kind if source == "reasoning_gym" else source


if __name__ == "__main__":
    sys.exit(run_command(main))
