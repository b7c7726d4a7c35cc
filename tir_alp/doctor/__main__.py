"""`python -m tir_alp.doctor [--config FILE] [--dotted.key VALUE ...]`: check a run's setup."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from tir_alp.config import Config
from tir_alp.doctor import long_context, memory
from tir_alp.models.tiny import TRAIN_CONFIG
from tir_alp.process import run_command, torch_imports
from tir_alp.run.command_line import Command, Words, overlay, read_config, read_toml

_REAL = {
    "rollout": {"max_context_tokens": 8192},
    "trainer": {"dtype": "bfloat16", "gradient_checkpointing": True},
}
"""What one sets for a real model; the defaults are for the tiny one."""
_COMMAND = Command(
    """\
usage: python -m tir_alp.doctor [--config FILE] [--dotted.key VALUE ...]

       python -m tir_alp.doctor memory [--config FILE] [--dotted.key VALUE ...]

Make all checks of a run's start without starting it, and print them as a table; or print how much
memory models of usual sizes take with these settings.""",
    {"config FILE": "TOML file with settings (default: the embedded tiny model)"},
)


def main(arguments: Sequence[str]) -> int:
    """Print the table; 2 if a check failed that is not ignored, or could not be made."""
    is_table = arguments[:1] == ["memory"]
    try:
        words = _COMMAND.read(arguments[1:] if is_table else arguments)
        config = _settings(words) if is_table else read_config(words, TRAIN_CONFIG)
    except ValueError as error:
        print(f"tir_alp.doctor: {error}", file=sys.stderr)
        return 2
    if is_table:
        print(memory.markdown(config), long_context.markdown(config), sep="\n\n")
        return 0
    # Imported here because they need torch, and a mistake in the command line is answered at once.
    with torch_imports():
        from tir_alp.run.ahead import start_tools

        start_tools(config)
        from rich.console import Console

        from tir_alp.doctor.table import examine, table_of
        from tir_alp.run.finish import finish

    def work() -> int:
        findings = asyncio.run(examine(config))
        Console().print(table_of(findings, config.doctor.ignore))
        failed = {finding.check for finding in findings if not finding.holds}
        return 2 if failed - {*config.doctor.ignore} else 0

    return finish("doctor", work)


def _settings(words: Words) -> Config:
    """The settings of a table: those of a run of a real model, unless they are given."""
    file = words.options.get("config")
    return overlay(words.values, _REAL if file is None else read_toml(Path(file)))


if __name__ == "__main__":
    sys.exit(run_command(main, imports=True))
