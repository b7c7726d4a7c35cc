"""The model card of a run's checkpoint: what was trained, on what, how, and what came of it.

It is made of a few chosen facts. Other settings stay private: among them are paths of this machine,
addresses and whatever an environment is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from tir_alp import __version__
from tir_alp.records.folder import read_records, read_run_config

_MEASURES = ("accuracy", "pass_at_k")


def model_card(run: Path, step: int) -> ModelCard:
    """Write the card of a checkpoint.

    Args:
        run: The run's folder.
        step: Number of steps that made the checkpoint.

    Raises:
        ValueError: It is not a run's folder.
    """
    config = read_run_config(run)
    metrics = read_records(run / "metrics.jsonl")[0]
    base = str(config["model"]["path"])
    is_of_hub = base.count("/") == 1 and not base.startswith((".", "~", "/"))
    is_of_hub &= not base.endswith(".gguf") and not Path(base).exists()
    data = ModelCardData(
        base_model=base if is_of_hub else None,
        license=_licence(base),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tir_alp", "reinforcement-learning", "tool-use"],
    )
    objective = run / "objective.txt"
    parts = [
        f"# {run.resolve().name}",
        f"Trained by reinforcement learning with tools, with tir_alp {__version__}: step {step} of "
        f"a run of {config['steps']} steps.",
        "## What was trained, and on what",
        _table(("setting", "value"), _facts(config, base if is_of_hub else PurePath(base).name)),
        "## Objective",
        f"```\n{objective.read_text().strip()}\n```" if objective.is_file() else "",
        "## Measured on held-out tasks",
        _results(metrics, step),
    ]
    body = "\n\n".join(part for part in parts if part)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _facts(config: Mapping[str, Any], base: str) -> list[tuple[str, str]]:
    data, rollout, trainer = config["data"], config["rollout"], config["trainer"]
    path = data.get("path")
    source = str(data["source"]) + (f", {PurePath(path).name}" if path else "")
    return [
        ("initial model", base),
        ("method", str(config["algorithm"]["name"])),
        ("environment", str(config["env"]["id"])),
        ("data", source),
        ("trajectories per step", f"{rollout['groups_per_step']} x {rollout['group_size']}"),
        ("learning rate", f"{trainer['lr']:g}, {trainer.get('schedule', 'constant')}"),
        ("seed", str(config["seed"])),
    ]


def _results(metrics: Sequence[Mapping[str, Any]], step: int) -> str:
    names = [
        name
        for name in sorted({key for row in metrics for key in row})
        if name.startswith("eval/") and name.endswith(_MEASURES)
    ]
    rows = []
    for name in names:
        measured = [(row["step"], row[name]) for row in metrics if name in row]
        upto = [each for each in measured if each[0] <= step]
        if upto:
            shown = [f"{100 * value:.1f} % (step {at})" for at, value in (upto[0], upto[-1])]
            rows.append((f"`{name}`", *shown))
    if not rows:
        return "There was no evaluation."
    return _table(("metric", "first", "this checkpoint, or the last before it"), rows)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(each.replace('|', '/') for each in row)} |" for row in lines)


def _licence(base: str) -> str | None:
    """The licence of a model that was converted from a GGUF file; None if it is not known."""
    file = Path(base).expanduser() / "source.json"
    try:
        return json.loads(file.read_text())["licence"] or None
    except (OSError, ValueError, KeyError):
        return None
