"""Runs for tests, and the check that every run must pass."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from tir_alp.audit import audit_run
from tir_alp.config import Config
from tir_alp.doctor.start import Doctor
from tir_alp.run.local_placement import LocalPlacement
from tir_alp.run.open_run import open_run
from tir_alp.train import train


def train_with(folder: Path, config: Config) -> Path:
    """Train in this process with a folder as working directory; return the run folder."""

    async def main() -> Path:
        async with open_run(config, LocalPlacement(config), Doctor()) as run:
            await train(run)
            return run.folder.path.resolve()

    before = os.getcwd()
    os.chdir(folder)
    try:
        return asyncio.run(main())
    finally:
        os.chdir(before)


def assert_honest(run: Path) -> None:
    """Assert that the audit accounts for every token of a run."""
    findings = audit_run(run)
    assert not findings.drifts, "\n".join(map(str, findings.drifts[:10]))
    checked = findings.totals()
    assert checked["trajectories"][0] and checked["tokens in the loss"][0], checked
