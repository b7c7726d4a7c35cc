"""`python -m tir_alp.doctor [--config FILE] [--dotted.key VALUE ...]`: check a run's setup."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from tir_alp.config import Config, load_config, read_toml
from tir_alp.doctor.check_result import CheckResult
from tir_alp.doctor.environment import check_environment
from tir_alp.doctor.examine import examine_config, examine_engine
from tir_alp.models.tiny import SHIPPED, TRAIN_CONFIG
from tir_alp.roles import ask_trainer_in
from tir_alp.rollouts.data import load_order
from tir_alp.rollouts.environment import make_environment
from tir_alp.rollouts.renderer import make_renderer
from tir_alp.run.console import RunConsole
from tir_alp.run.placement import open_placement
from tir_alp.tools.sandbox import SandboxRefused
from tir_alp.training.policy import load_tokenizer
from tir_alp.training.structure import load_outline


async def examine(config: Config) -> list[CheckResult]:
    """Make all checks of a run's start without starting a run.

    Raises:
        ValueError: If something prevents the checks from being made.
    """
    path = str(SHIPPED.get(config.model.path, config.model.path))
    tokenizer = load_tokenizer(path)
    with closing(make_environment(config)) as env:
        renderer = make_renderer(config, tokenizer, env)
    tasks = load_order(config.data, config.seed)
    async with open_placement(config, RunConsole().print) as parts:
        check = (check_environment, config, renderer, [tasks[0]], parts.make_env)
        await asyncio.to_thread(*check)
        with closing(parts.make_env()) as env:
            examined = (examine_config, config, path, tokenizer, renderer, env, tasks[0])
            findings = await asyncio.to_thread(*examined)
            prompts = [
                env.reset(seed=task.seed, options=task.to_options())[0]
                for task in (tasks[0], tasks[1])
            ]
        trainer = await parts.trainer(Path("runs"), path, None)
        with ThreadPoolExecutor(1) as thread, closing(trainer):
            engine = parts.engine(path, 0, renderer, ask_trainer_in(trainer, thread))
            async with engine as opened:
                return findings + await examine_engine(
                    *(config, opened, load_outline(path), trainer, trainer.weights, 0),
                    *(tokenizer, renderer, prompts),
                )


def main(arguments: Sequence[str]) -> int:
    """Print the table; return 2 if a check failed and is not ignored, or could not be made."""
    disable_progress_bar()
    parser = argparse.ArgumentParser("tir_alp.doctor", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    options, words = parser.parse_known_args(arguments)
    try:
        config = load_config(words, read_toml(options.config or TRAIN_CONFIG))
        findings = asyncio.run(examine(config))
    except (ValueError, SandboxRefused) as error:
        print(f"tir_alp.doctor: {error}", file=sys.stderr)
        return 2
    table = Table("check", "", "figure", "fix", box=None, header_style="bold")
    for finding in findings:
        is_ignored = finding.check in config.doctor.ignore
        verdict = "ok" if finding.holds else "ignored" if is_ignored else "[red]FAILS"
        table.add_row(finding.check, verdict, finding.figure, "" if finding.holds else finding.fix)
    Console().print(table)
    failed = {finding.check for finding in findings if not finding.holds}
    return 2 if failed - {*config.doctor.ignore} else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
