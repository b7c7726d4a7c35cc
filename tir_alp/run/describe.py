"""What a run prints about itself before it begins and after it has ended. Pure."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tir_alp.algorithm.formula import formula
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.config import Config, SFTConfig, TranscriptsConfig

_PROBED = ("namespaces", "landlock", "docker")
"""Sandboxes that attack themselves when they start, and do not start if an attack succeeds."""


_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def changed_settings(settings: Mapping[str, Any], algorithm: str) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ from the defaults: dotted key -> (value, default).

    The defaults of an algorithm are those of its preset. A key that this version does not know has
    the default None.

    Args:
        settings: Values by dotted key, as `flat` returns them.
        algorithm: Name of the preset.
    """
    preset = ALGORITHMS.get(algorithm)
    defaults = Config() if preset is None else Config(algorithm=preset)
    known = flat(defaults.model_dump(mode="json"))
    return {
        key: (value, known.get(key))
        for key, value in settings.items()
        if key not in known or known[key] != value
    }


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys; empty mappings are left out."""
    found = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def describe_start(config: Config, environment_report: Mapping[str, Any], path: object) -> str:
    """Describe a run that begins: its objective, its settings, and where its programs run."""
    changed = changed_settings(flat(config.model_dump(mode="json")), config.algorithm.name)
    lines = [formula(config.algorithm)]
    if changed:
        lines.append("settings that differ from the defaults:")
        lines += [f"  {key} = {_shown(value)}" for key, (value, _) in changed.items()]
    lines += describe_environment(environment_report)
    lines += [f"warning: {warning}" for warning in environment_report.get("warnings", ())]
    return "\n".join([*lines, f"run {path}"])


def describe_environment(report: Mapping[str, Any]) -> list[str]:
    """Say in which sandbox each tool runs, and why no stronger one; other entries as they are."""
    lines = []
    for name, tool in report.get("tools", {}).items():
        if isinstance(tool, Mapping) and "sandbox" in tool:
            held = ", its probes held" if tool["sandbox"] in _PROBED else ""
            lines.append(f"sandbox of {name}: {tool['sandbox']}{held}")
            refused = tool.get("refused") or {}
            lines += [f"  not {other}: {reason}" for other, reason in refused.items()]
        elif tool:
            lines.append(f"tool {name}: {_shown(tool)}")
    rest = {key: value for key, value in report.items() if key not in ("tools", "warnings")}
    lines += [f"environment: {key} = {_shown(value)}" for key, value in rest.items() if value]
    return lines


def describe_evaluation(metrics: Mapping[str, float], num_tasks: Mapping[str, int]) -> list[str]:
    """Describe the result of an evaluation: of all tasks, and of each named set.

    Args:
        metrics: As `rollouts.evaluation.summary` returns them.
        num_tasks: Number of tasks of each set, by its name.
    """
    named = [name for name in num_tasks if name]
    lines = [_accuracy(metrics, "eval/", sum(num_tasks.values()))]
    if len(named) > 1:
        lines += [
            f"{name}: {_accuracy(metrics, f'eval/{name}/', num_tasks[name])}" for name in named
        ]
    return lines


def _accuracy(metrics: Mapping[str, float], prefix: str, num_tasks: int) -> str:
    if f"{prefix}accuracy" not in metrics:
        return "no accuracy: every episode of the evaluation failed"
    greedy = metrics.get(f"{prefix}greedy_accuracy")
    return (
        f"accuracy {metrics[f'{prefix}accuracy']:.1%} sampled"
        + (f", {greedy:.1%} greedy" if greedy is not None else "")
        + f", {metrics[f'{prefix}tool_calls']:.2f} tool calls per trajectory"
        + f" ({num_tasks} held-out tasks)"
    )


def describe_end(path: object, steps: int, has_tensorboard: bool) -> str:
    """Say where a finished run left its model and its metrics, and how to go on."""
    if steps == 0:
        return f"nothing was trained, as steps = 0 asks; metrics in {path}/metrics.jsonl"
    look = f"tensorboard --logdir {path}  |  go on: " if has_tensorboard else ""
    return (
        f"the model is in {path}/checkpoints/step_{steps}, metrics in {path}/metrics.jsonl\n"
        f"next: {look}python -m tir_alp.train --resume {path} --steps {steps * 2}"
    )


def describe_sft_start(
    config: SFTConfig, num_conversations: int, num_tokens: int, path: object
) -> str:
    """Describe a run of supervised fine-tuning that begins."""
    changed = changed_sft_settings(flat(config.model_dump(mode="json")))
    lines = [f"{num_conversations} conversations with {num_tokens} tokens"]
    if changed:
        lines.append("settings that differ from the defaults:")
        lines += [f"  {key} = {_shown(value)}" for key, (value, _) in changed.items()]
    return "\n".join([*lines, f"run {path}"])


def changed_sft_settings(settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """As `changed_settings`, for a run of supervised fine-tuning."""
    anything = TranscriptsConfig(path=Path("transcripts.jsonl"))
    known = flat(SFTConfig(data=anything).model_dump(mode="json"))
    return {
        key: (value, known.get(key)) for key, value in settings.items() if known.get(key) != value
    }


def describe_sft_end(path: object, steps: int) -> str:
    """Say where a finished run of supervised fine-tuning left its model, and what comes next."""
    if steps == 0:
        return f"nothing was trained, as steps = 0 asks; metrics in {path}/metrics.jsonl"
    model = f"{path}/checkpoints/step_{steps}"
    return (
        f"the model is in {model}, metrics in {path}/metrics.jsonl\n"
        f"next: python -m tir_alp.train --model.path {model}"
    )


def describe_stop(path: object, step: int | None, command: str = "train") -> str:
    """Say from which checkpoint a run that ended early can go on, if from any."""
    if step is None:
        return f"there is no checkpoint in {path} to go on from"
    return f"step {step} is saved; go on from it: python -m tir_alp.{command} --resume {path}"


def describe_os_error(error: OSError) -> str:
    """Say what the system refused, and what to do where that can be told."""
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in _FULL:
        return (
            f"the disk is full{place}: {error.strerror}. Free some space before you go on (`df -h` "
            "shows how much there is); with a lower checkpoint.keep, a run needs less"
        )
    if error.errno == errno.EFBIG:
        return f"a file may not grow any further{place}: raise the limit (`ulimit -f`), and go on"
    if error.errno in _READ_ONLY:
        return (
            f"cannot write{place}: {error.strerror}. Runs are written to `runs` in the folder in "
            "which the command is started"
        )
    return str(error)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
