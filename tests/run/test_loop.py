"""What both loops do after an evaluation: the best checkpoint is written, noted and kept."""

import asyncio

from tir_alp.run.loop import due, keep_if_best
from tir_alp.training.checkpoint_folder import Best, newest_first, prune, read_best


def test_the_best_checkpoint_is_saved_once_and_outlives_newer_ones(tmp_path):
    saved: list[int] = []

    def evaluate(step: int, score: float) -> None:
        async def save() -> None:
            saved.append(step)
            (tmp_path / f"step_{step}").mkdir()

        asyncio.run(keep_if_best(tmp_path, step, score, save))

    evaluate(0, 0.1)  # the initial model is noted, and needs no checkpoint
    assert read_best(tmp_path) == Best(0, 0.1) and saved == []
    evaluate(2, 0.6)
    evaluate(4, 0.6)  # equal is not better
    for step in (4, 6, 8):
        (tmp_path / f"step_{step}").mkdir()
    assert read_best(tmp_path) == Best(2, 0.6) and saved == [2]
    prune(tmp_path, keep=1)
    assert [each.name for each in newest_first(tmp_path)] == ["step_8", "step_2"]
    evaluate(8, 0.9)  # saved already
    prune(tmp_path, keep=1)
    assert saved == [2] and [each.name for each in newest_first(tmp_path)] == ["step_8"]


def test_what_is_due():
    assert [step for step in range(1, 7) if due(step, 3)] == [3, 6]
    assert not any(due(step, 0) for step in range(1, 7))
