"""What becomes of a run that loses its trainer: it goes on from its newest checkpoint, or says why.

The run is scripted; that a real one goes on is shown by `tests/end_to_end/test_drill.py`.
"""

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tir_alp.config import Config
from tir_alp.records.folder import RunFolder
from tir_alp.records.provenance import PROVENANCE
from tir_alp.roles import RoleLost
from tir_alp.run.console import RunConsole
from tir_alp.run.local_placement import LocalPlacement
from tir_alp.run.open_run import Examined
from tir_alp.run.supervise import RunLost, Services, draw, train_stubbornly
from tir_alp.training import checkpoint_folder
from tir_alp.training.checkpoint_folder import Position


@dataclass(frozen=True, slots=True)
class ScriptedRun:
    folder: RunFolder
    console: RunConsole
    examined: Examined


def save(run: Path, step: int) -> None:
    aside = run / "aside"
    aside.mkdir()
    (aside / "weights").write_text(str(step))
    (run / "checkpoints").mkdir(exist_ok=True)
    checkpoint_folder.publish(aside, run / "checkpoints" / f"step_{step}", Position(step, step))


def supervise(path: Path, *ends) -> list[Path | None]:
    """Play a run; each function in `ends` is one life of it. Returns what each life resumed."""
    lives, resumed = [*ends], []

    @asynccontextmanager
    async def opened(config, placement, resume, interrupt, examined):
        resumed.append(resume)
        yield ScriptedRun(RunFolder(path), RunConsole(), examined or Examined({}))

    async def train(run):
        lives.pop(0)()

    services = Services(
        open=opened,
        train=train,
        describe_start=lambda run: "begins",
        describe_end=lambda run: "ends",
        open_cluster=None,  # pyright: ignore[reportArgumentType]
        draw_report=lambda run: run / "report.html",
        command="train",
    )
    config = Config()
    asyncio.run(train_stubbornly(LocalPlacement(config), config, None, services))
    assert lives == []
    return resumed


def lost(reason: str = "rank 0 was lost"):
    def end():
        raise RoleLost(reason)

    return end


def test_a_trainer_that_is_lost_before_the_first_checkpoint_keeps_its_reason(tmp_path):
    with pytest.raises(RunLost, match="rank 0 was lost"):
        supervise(tmp_path, lost())


def test_a_run_goes_on_from_its_newest_whole_checkpoint(tmp_path, capsys):
    def saves_and_is_lost():
        save(tmp_path, 20)
        lost()()

    assert supervise(tmp_path, saves_and_is_lost, lambda: None) == [None, tmp_path]
    assert "rank 0 was lost; the run goes on from step 20" in capsys.readouterr().err


def test_a_run_that_is_lost_at_the_same_step_again_and_again_ends(tmp_path):
    save(tmp_path, 20)
    with pytest.raises(RunLost, match="fourth"):
        supervise(tmp_path, lost(), lost(), lost(), lost("fourth"))


def test_the_report_of_a_run_that_ends_says_when_it_ended_and_what_it_used(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create(Config())
    seen = []

    def draw_report(path: Path) -> Path:
        seen.extend(json.loads((path / PROVENANCE).read_text())["times"])
        return path / "report.html"

    draw(ScriptedRun(folder, RunConsole(), Examined({})), draw_report)
    folder.close()
    (times,) = seen
    assert times["ended"] is not None and times["peak_memory_gb"] > 0
