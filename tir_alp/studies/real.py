"""The whole way with a real model on a CPU: `python -m tir_alp.studies.real` (`make real`).

Fetches SmolLM2-135M-Instruct, writes demonstrations whose programs really run, teaches their form
by supervised fine-tuning, trains with ALP, evaluates the model after each stage on the same
held-out tasks, audits every stage, and talks to the result. After an interruption the same command
goes on: stages that are done are not repeated, and a run that has a checkpoint is resumed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tir_alp.process import EXIT_CODE

CONFIGS = Path(__file__).parent
SFT_CONFIG, RL_CONFIG = CONFIGS / "smollm2_sft.toml", CONFIGS / "smollm2_rl.toml"
QUESTIONS = "/greedy\nWhat is 37*48+112?\nWhat is 91*17-640?\n/quit\n"
QUICK_ROLLOUTS = (
    *("--rollout.groups_per_step", "2", "--rollout.group_size", "4"),
    *("--eval.num_tasks", "4"),
)
_RESULT = "real.json"


@dataclass(frozen=True, slots=True)
class Stage:
    """One command."""

    title: str
    done: Path
    """Exists when the stage is done."""
    words: Sequence[str]
    """The command and its arguments."""
    stdin: str = ""
    run: Path | None = None
    """The folder of a run that the command makes."""


def stages(folder: Path, seed: int, num_tasks: int, quick: bool) -> list[Stage]:
    """Return the stages in order.

    Args:
        folder: Folder of the whole, below `runs/`.
        seed: Seed of demonstrations, order, rollouts and noise.
        num_tasks: Held-out tasks of each evaluation.
        quick: Make only a few steps, to see that everything works.
    """
    model, data = folder / "smollm2", folder / "transcripts.jsonl"
    name = str(folder.relative_to("runs"))
    sft, rl = folder / "sft", folder / "rl"
    sft_steps, rl_steps = steps_of(SFT_CONFIG, quick), steps_of(RL_CONFIG, quick)
    taught = sft / "checkpoints" / f"step_{sft_steps}"
    number = ("--number", "64" if quick else "256")

    def training(title: str, command: str, path: Path, num_steps: int, *words: str) -> Stage:
        done = path / "checkpoints" / f"step_{num_steps}" / "manifest.json"
        begin = (command, "--name", f"{name}/{path.name}", "--steps", str(num_steps), *words)
        go_on = (command, "--resume", str(path))
        return Stage(title, done, go_on if has_checkpoint(path) else begin, run=path)

    def evaluation(label: str, path: Path) -> Stage:
        out = folder / f"evaluation-{label}"
        words = ("evaluate", "--model", str(path), "--config", str(RL_CONFIG), "--out", str(out))
        limits = ("--eval.num_tasks", str(num_tasks), "--eval.greedy", "false")
        return Stage(f"evaluating: {label}", out / "evaluation.json", (*words, *limits))

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
            *("--model.path", str(model), "--data.path", str(data)),
        ),
        evaluation("sft", taught),
        training(
            "reinforcement learning with ALP",
            "train",
            rl,
            rl_steps,
            *("--config", str(RL_CONFIG), "--seed", str(seed), "--model.path", str(taught)),
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
    """Return the number of steps that a config asks for; 3 if it has to be quick."""
    import tomllib

    return 3 if quick else int(tomllib.loads(config.read_text())["steps"])


def has_checkpoint(run: Path) -> bool:
    """Whether a run can be resumed."""
    return any((run / "checkpoints").glob("step_*/manifest.json"))


def run(stage: Stage, log: Callable[[str], None]) -> float:
    """Run a stage unless it is done; return its seconds. Raises SystemExit if it fails."""
    if stage.run is not None and stage.run.exists() and not has_checkpoint(stage.run):
        shutil.rmtree(stage.run)  # it was interrupted before there was anything to go on from
    if stage.done.exists():
        log(f"{stage.title}: done before")
        return 0.0
    log(f"{stage.title}: python -m tir_alp.{' '.join(stage.words)}")
    began = time.monotonic()
    call(stage.words, stage.title, stage.stdin)
    return time.monotonic() - began


def call(words: Sequence[str], title: str, stdin: str = "") -> None:
    """Run a command of ours to its own end, at Ctrl-C as well, which a terminal sends to both.

    Raises:
        SystemExit: With the command's exit code, if that is not 0.
    """
    command = [sys.executable, "-m", f"tir_alp.{words[0]}", *words[1:]]
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        code = subprocess.run(command, input=stdin or None, text=True).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    if code:
        ended = "was interrupted" if code == EXIT_CODE else f"failed with exit code {code}"
        print(f"{title} {ended}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(code)


def summary(folder: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Return the accuracy after each stage, and how long each took."""
    found: dict[str, Any] = {"seconds": seconds}
    for label in ("base", "sft", "rl"):
        result = json.loads((folder / f"evaluation-{label}" / "evaluation.json").read_text())
        (only,) = result["sets"].values()
        found[label] = only["avg@k"]
    return found


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser("python -m tir_alp.studies.real", description=__doc__)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--tasks", type=int, default=256, help="held-out tasks per evaluation")
    found.add_argument("--quick", action="store_true", help="three steps of each kind")
    found.add_argument("--name", help="folder below runs/ (default: real-seed<N>)")
    return found


def main(arguments: Sequence[str]) -> int:
    """Run all stages; returns the exit code."""
    options = parser().parse_args(arguments)
    folder = Path("runs") / (options.name or f"real-seed{options.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def log(line: str) -> None:
        print(f"\n[{time.monotonic() - began:5.0f} s] {line}", flush=True)

    seconds = {
        stage.title: round(run(stage, log), 1)
        for stage in stages(folder, options.seed, options.tasks, options.quick)
    }
    audited = [folder / name for name in ("sft", "rl", "evaluation-rl")]
    for path in audited:
        log(f"auditing {path}")
        call(("audit", str(path)), f"auditing {path}")
    found = summary(folder, seconds)
    (folder / _RESULT).write_text(json.dumps(found, indent=2) + "\n")
    log(f"held-out accuracy on {options.tasks} tasks, sampled, with 95 % intervals:")
    for label, title in (("base", "before"), ("sft", "after SFT"), ("rl", "after ALP")):
        each = found[label]
        print(f"  {title:<10} {each['mean']:6.1%}  [{each['low']:.1%}, {each['high']:.1%}]")
    print(f"  rows: {folder / _RESULT}; pages: {folder}/sft/report.html, {folder}/rl/report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
