"""The whole way with a real model on a CPU: `python -m tir_alp.studies.real` (`make real`).

Fetches SmolLM2-135M-Instruct, writes demonstrations whose programs really run, teaches their form
by supervised fine-tuning, trains with ALP, evaluates the model after each stage on the same
held-out tasks, audits every stage, and talks to the result. After an interruption the same command
goes on: stages that are done are not repeated, and a run that has a checkpoint is resumed.

Trainer and engine compute in bfloat16 where the processor has matrix units for it (Intel's AMX),
which is several times as fast, and in float32 elsewhere; `--dtype` says it otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tir_alp.process import run_command
from tir_alp.records.folder import read_records
from tir_alp.studies.stages import Stage, audit, logger, perform, training

CONFIGS = Path(__file__).parent
SFT_CONFIG, RL_CONFIG = CONFIGS / "smollm2_sft.toml", CONFIGS / "smollm2_rl.toml"
QUESTIONS = "/greedy\nWhat is 37*48+112?\nWhat is 91*17-640?\n/quit\n"
QUICK_SFT = ("--sequences_per_step", "2")
QUICK_ROLLOUTS = (
    *("--rollout.groups_per_step", "2", "--rollout.group_size", "2"),
    *("--rollout.max_turn_tokens", "32", "--eval.num_tasks", "2"),
)
_RESULT = "real.jsonl"


def stages(folder: Path, seed: int, num_tasks: int, quick: bool, dtype: str) -> list[Stage]:
    """Return the stages in order.

    Args:
        folder: Folder of the whole, below `runs/`.
        seed: Seed of demonstrations, order, rollouts and noise.
        num_tasks: Held-out tasks of each evaluation.
        quick: Make only one step of each kind, to see that everything works.
        dtype: Precision of trainer and engine.
    """
    model, data = folder / "smollm2", folder / "transcripts.jsonl"
    sft, rl = folder / "sft", folder / "rl"
    sft_steps, rl_steps = steps_of(SFT_CONFIG, quick), steps_of(RL_CONFIG, quick)
    taught = sft / "checkpoints" / f"step_{sft_steps}"
    number = ("--number", "64" if quick else "256")
    in_trainer, in_engine = ("--trainer.dtype", dtype), ("--engine.precision", dtype)

    def evaluation(label: str, path: Path) -> Stage:
        out = folder / f"evaluation-{label}"
        words = ("evaluate", "--model", str(path), "--config", str(RL_CONFIG), "--out", str(out))
        limits = ("--eval.num_tasks", str(num_tasks), "--eval.greedy", "false")
        return Stage(f"evaluating: {label}", out / "evaluation.json", (*words, *limits, *in_engine))

    return [
        Stage(
            "fetching the model", model / "config.json", ("models", "smollm2", "--out", str(model))
        ),
        Stage(
            "writing demonstrations",
            data,
            (
                "envs",
                "demonstrate",
                "--out",
                str(data),
                "--instruction",
                "",
                "--seed",
                str(seed),
                *number,
            ),
        ),
        evaluation("base", model),
        training(
            "supervised fine-tuning",
            "sft",
            sft,
            sft_steps,
            *("--config", str(SFT_CONFIG), "--seed", str(seed)),
            *("--model.path", str(model), "--data.path", str(data), *in_trainer),
            *(QUICK_SFT if quick else ()),
        ),
        evaluation("sft", taught),
        training(
            "reinforcement learning with ALP",
            "train",
            rl,
            rl_steps,
            *("--config", str(RL_CONFIG), "--seed", str(seed), "--model.path", str(taught)),
            *(*in_trainer, *in_engine),
            *(QUICK_ROLLOUTS if quick else ()),
        ),
        evaluation("rl", rl / "checkpoints" / f"step_{rl_steps}"),
        Stage(
            "talking to it",
            folder / "no such file",
            ("chat", "--run", str(rl)),
            QUESTIONS,
        ),
    ]


def steps_of(config: Path, quick: bool) -> int:
    """Return the number of steps that a config asks for; 1 if it has to be quick."""
    return 1 if quick else int(tomllib.loads(config.read_text())["steps"])


def fast_dtype() -> str:
    """Return the precision in which this processor multiplies matrices fastest."""
    flags = Path("/proc/cpuinfo")
    return "bfloat16" if flags.exists() and "amx_bf16" in flags.read_text() else "float32"


def summary(
    folder: Path, options: argparse.Namespace, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Return a row: the settings, the accuracy after each stage, and what each step measured.

    Args:
        folder: Folder of the whole.
        options: The command line.
        seconds: Seconds of the stages that were made by this command.
    """
    steps = [
        {name: step[name] for name in _CURVE if name in step}
        for step in read_records(folder / "rl" / "metrics.jsonl")[0]
        if "train/lr" in step
    ]
    row: dict[str, Any] = {
        "model": "alp_sequence",
        "seed": options.seed,
        "dtype": options.dtype,
        "sft_steps": steps_of(SFT_CONFIG, options.quick),
        "num_tasks": options.tasks,
    }
    for label in ("base", "sft", "rl"):
        result = json.loads((folder / f"evaluation-{label}" / "evaluation.json").read_text())
        (only,) = result["sets"].values()
        row[label] = only["avg@k"]
    return row | {"seconds": seconds, "steps": steps}


_CURVE = ("step", "rollout/reward", "rollout/void_turns", "time/rollout", "time/train")
"""Metrics of each step that a row keeps."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser("python -m tir_alp.studies.real", description=__doc__)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--tasks", type=int, default=256, help="held-out tasks per evaluation")
    found.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default=fast_dtype(),
        help="precision of trainer and engine (default: the faster one here, %(default)s)",
    )
    found.add_argument("--quick", action="store_true", help="one step of each kind")
    found.add_argument("--name", help="folder below runs/ (default: real-seed<N>)")
    return found


def main(arguments: Sequence[str]) -> int:
    """Run all stages; returns the exit code."""
    options = parser().parse_args(arguments)
    folder = Path("runs") / (options.name or f"real-seed{options.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    log = logger()
    seconds = {
        stage.title: round(took, 1)
        for stage in stages(folder, options.seed, options.tasks, options.quick, options.dtype)
        if (took := perform(stage, log))
    }
    for name in ("sft", "rl", "evaluation-rl"):
        audit(folder / name, log)
    found = summary(folder, options, seconds)
    (folder / _RESULT).write_text(json.dumps(found) + "\n")
    log(f"held-out accuracy on {options.tasks} tasks, sampled, with 95 % intervals:")
    for label, title in (("base", "before"), ("sft", "after SFT"), ("rl", "after ALP")):
        each = found[label]
        print(f"  {title:<10} {each['mean']:6.1%}  [{each['low']:.1%}, {each['high']:.1%}]")
    print(f"  row: {folder / _RESULT}; pages: {folder}/sft/report.html, {folder}/rl/report.html")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
