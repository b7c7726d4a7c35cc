"""Runs that tests make, and what has to hold for every one of them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from tir_alp.assembly import open_run
from tir_alp.audit import audit_run
from tir_alp.config import load_config, read_toml
from tir_alp.tiny import TRAIN_CONFIG
from tir_alp.train import train


def train_in(folder: Path, *words: str, config: Path = TRAIN_CONFIG) -> Path:
    """Train in this process, without a report; returns the folder of the run."""

    async def main() -> Path:
        async with open_run(load_config(words, read_toml(config))) as run:
            await train(run)
            return run.folder.path.resolve()

    before = os.getcwd()
    os.chdir(folder)
    try:
        return asyncio.run(main())
    finally:
        os.chdir(before)


def assert_honest(run: Path) -> None:
    """Every token of a run is accounted for."""
    findings = audit_run(run)
    assert not findings.drifts, "\n".join(map(str, findings.drifts[:10]))
    checked = findings.totals()
    assert checked["trajectories"][0] and checked["tokens in the loss"][0], checked
