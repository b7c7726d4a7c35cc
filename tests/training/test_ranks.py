"""Processes over gloo make the same updates as a single one, and none is left waiting.

They are started as a user starts them. Losses, gradients and weights agree to 1e-4 of the largest
element in float32; a wrong denominator, other noise or a gradient that is not summed differs by far
more.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.ranks import CASES, UNDONE, Result, go_on, train
from tir_alp.training.ranks import alone

OF_SOME_TOKENS = ("alp/effective", "alp/relative_rms", "alp/logprob_shift", "mismatch/probe")


def launch(num_ranks: int, task: str, folder: Path, devices: str = "") -> "subprocess.Popen[bytes]":
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return subprocess.Popen(
        [sys.executable, *words, "tests/training/ranks.py", task, str(folder)],
        env=os.environ | {"PYTHONPATH": os.getcwd(), "CUDA_VISIBLE_DEVICES": devices},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run(*launched: object) -> None:
    process = launch(*launched)  # type: ignore[arg-type]
    printed = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 0, printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of results: of one rank below `one/`, of two ranks beside it."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Result]:
    """Results of one rank."""
    return {case: train(alone(), case, folder / "one" / case) for case in CASES}


@pytest.fixture(scope="module")
def two(one: dict[str, Result], folder: Path) -> Path:
    """The folder with the results of two ranks, which also resume from checkpoints of one."""
    run(2, "train", folder)
    return folder


def assert_agree(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = tolerance * value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=0, atol=largest, msg=name)


def assert_reports_agree(found: dict[str, float], expected: dict[str, float]) -> None:
    """Quantiles come from histograms, which are accurate to within 1 % of a log ratio."""
    assert found.keys() == expected.keys()
    for name in (name for name in expected if not name.startswith(OF_SOME_TOKENS)):
        assert found[name] == pytest.approx(expected[name], rel=1e-2, abs=1e-4), name
    of_updates = ("loss/value", "grad_norm/policy")
    was_undone = expected.get("acceptance/rejected") == 1.0
    for name in ("tokens/loss", *(() if was_undone else of_updates)):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize("case", [case for case in CASES if case != "bfloat16"])
def test_two_ranks_make_the_updates_of_one(one: dict[str, Result], two: Path, case: str):
    reports, gradients, weights = one[case]
    for rank in (0, 1):  # all ranks have the same results
        found = torch.load(two / f"train_{rank}.pt")[case]
        for own, other in zip(found[0], reports, strict=True):
            assert_reports_agree(own, other)
        assert_agree(found[1], gradients, 1e-4)
        assert_agree(found[2], weights, 1e-5)
    assert (case == UNDONE) == (reports[1].get("acceptance/rejected") == 1.0)


def test_in_bfloat16_two_ranks_make_the_update_of_one_as_well_as_it_can_tell(
    one: dict[str, Result], two: Path
):
    reports, gradients, _ = one["bfloat16"]
    found = torch.load(two / "train_0.pt")["bfloat16"]
    assert found[0][0]["loss/value"] == pytest.approx(reports[0]["loss/value"], rel=1e-2)
    assert_agree(found[1], gradients, 3e-2)
    assert found[0][0]["alp/effective"] > 0.5  # the noise survives the rounding


def test_all_ranks_halve_the_loss_scale_where_one_of_them_overflows(two: Path):
    first, second = (torch.load(two / f"overflow_{rank}.pt") for rank in (0, 1))
    assert first == second
    *steps, last = first
    made = [is_made for _, is_made, _ in steps]
    assert not made[0] and made[-1]  # overflows at first, and then not any more
    assert steps[-1][0] == 2.0 ** (22 - made.count(False))
    assert last == (steps[-1][0] / 2, False, False)


@pytest.mark.parametrize("case", CASES)
def test_one_rank_goes_on_from_the_checkpoint_of_two_and_two_from_that_of_one(two: Path, case: str):
    reports, _, weights = torch.load(two / "train_0.pt")[case]
    tolerance, of_loss = (1e-3, 1e-2) if case == "bfloat16" else (1e-5, 1e-4)
    of_one = torch.load(two / "go_on_0.pt")[case]
    for found in (go_on(alone(), case, two / case), of_one):
        name = "acceptance/gap" if case == UNDONE else "loss/value"
        assert found[0][0][name] == pytest.approx(reports[1][name], rel=of_loss)
        assert_agree(found[2], weights, tolerance)


def test_no_rank_waits_for_one_that_failed_or_was_killed(tmp_path: Path):
    launch(2, "failures", tmp_path).communicate(timeout=240)
    assert (tmp_path / "fail_1").read_text() == "OSError: the disk is full"
    assert (tmp_path / "fail_0").read_text() == (
        "RankFailed: rank 0 stopped in step 0; first failed rank 1, step 0: OSError: the disk is "
        "full"
    )
    assert (tmp_path / "die_0").read_text().startswith("RankFailed: rank 0 stopped in step 0")
    assert not (tmp_path / "die_1").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_all_gpus_make_the_updates_of_one(tmp_path: Path):
    count = torch.cuda.device_count()
    run(count, "train", tmp_path, ",".join(map(str, range(count))))
    for case, found in torch.load(tmp_path / "train_0.pt", map_location="cpu").items():
        reports, _, _ = train(alone("cuda"), case)
        assert found[0][0]["loss/value"] == pytest.approx(reports[0]["loss/value"], rel=1e-2)
