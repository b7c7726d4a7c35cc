"""Ranks that divide the tokens of a forward make the updates of a rank that computes it alone."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from tests.training.families import make_model
from tests.training.harness import noisy, trainer
from tests.training.teams import CASES, FAMILIES, Result, forward, train
from tests.training.test_ranks import assert_agree, assert_reports_agree
from tir_alp.config import Config
from tir_alp.training.attention import PACKED
from tir_alp.training.divided_model import check_division
from tir_alp.training.ranks import Ranks, alone
from tir_alp.training.sequence_parallel import TokenShare

SHARED = "train/shared_tokens"


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of one team of two ranks, or of two."""
    folder = tmp_path_factory.mktemp("teams")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param)]
    process = subprocess.run(
        [sys.executable, *words, "tests/training/teams.py", str(folder)],
        env=os.environ | {"PYTHONPATH": os.getcwd(), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=480,
    )
    assert process.returncode == 0, process.stdout.decode()
    return folder


def found(folder: Path, what: str, name: str) -> list[Any]:
    """What each rank has written of a case or of a family."""
    files = sorted(folder.glob(f"{what}_*.pt"))
    return [torch.load(file, weights_only=False)[name] for file in files]


@pytest.mark.parametrize("case", [case for case in CASES if case != "bfloat16"])
def test_teams_of_two_make_the_updates_of_one_rank(folder: Path, case: str):
    reports, gradients, weights, values = train(alone(), case)
    for result in found(folder, "train", case):
        own: Result = result
        for mine, other in zip(own[0][:-1], reports[:-1], strict=True):
            times = {name: value for name, value in other.items() if name.startswith("time/")}
            # Groups are divided over teams as over ranks, with what they have in common.
            assert_reports_agree(mine | times | {SHARED: other[SHARED]}, other)
        assert own[0][-1] == pytest.approx(reports[-1], rel=1e-5)
        assert_agree(own[1], gradients, 1e-4)
        assert_agree(own[2], weights, 1e-5)
        assert [each.uid for each in own[3]] == [each.uid for each in values]
        for mine, other in zip(own[3], values, strict=True):
            assert mine.columns.keys() == other.columns.keys()
            for name, column in other.columns.items():
                assert mine.columns[name] == pytest.approx(column, abs=1e-4), name


def test_in_bfloat16_they_make_it_as_well_as_it_can_tell(folder: Path):
    reports, gradients, *_ = train(alone(), "bfloat16")
    for own in found(folder, "train", "bfloat16"):
        assert own[0][0]["loss/value"] == pytest.approx(reports[0]["loss/value"], rel=1e-2)
        assert_agree(own[1], gradients, 3e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_team_computes_the_logprobs_and_gradients_of_one_rank(folder: Path, name: str):
    logprobs, gradients = forward(name, alone(), None)
    for own in found(folder, "forward", name):
        torch.testing.assert_close(own[0], logprobs, rtol=0, atol=2e-5)
        assert_agree(own[1], gradients, 1e-4)


def test_a_model_whose_layers_read_their_neighbours_is_refused_by_measurement(folder: Path):
    files = [*folder.glob("refusal_*")]
    start = f"trainer.sequence_parallel = {len(files)} is not exact with LlamaForCausalLM"
    assert files and all(file.read_text().startswith(start) for file in files)


def team_of(size: int) -> Ranks:
    """A team in which nothing is sent: what is refused without a measurement."""
    one = alone()
    return Ranks(0, size, one.device, one.mesh)


def test_what_cannot_be_divided_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"2 needs a model .* Qwen3NextForCausalLM have rows of th"
    ):
        check_division(make_model("qwen3_next"), team_of(2))
    with pytest.raises(ValueError, match="3 does not divide the 4 attention heads of LlamaForC"):
        check_division(make_model("llama"), team_of(3))
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    config = Phi3Config(
        vocab_size=64,
        num_hidden_layers=2,
        intermediate_size=32,
        max_position_embeddings=64,
        original_max_position_embeddings=32,
        pad_token_id=0,
        rope_parameters=rope,
        **sizes,
    )
    model = Phi3ForCausalLM._from_config(config, attn_implementation=PACKED)
    with pytest.raises(ValueError, match="rotary positions of Phi3ForCausalLM, 'longrope'"):
        check_division(model, team_of(2))


def test_a_number_of_ranks_that_is_not_a_multiple_is_refused():
    with pytest.raises(ValueError, match="sequence_parallel = 2 does not divide the number of ra"):
        trainer(noisy(), sequence_parallel=2)
    cluster = {"address": "local", "trainer": {"count": 3}}
    with pytest.raises(ValueError, match=r"\(2\) does not divide the number of ranks, cluster.tr"):
        Config.model_validate({"trainer": {"sequence_parallel": 2}, "cluster": cluster})


@pytest.mark.parametrize(("number", "size"), [(10, 4), (8, 2), (3, 4), (1, 2)])
def test_shares_are_consecutive_disjoint_and_equal_up_to_one(number: int, size: int):
    one = alone()
    tokens = torch.arange(number)
    shares = [
        TokenShare.of(number, Ranks(rank, size, one.device, one.mesh)) for rank in range(size)
    ]
    assert torch.equal(torch.cat([share.own(tokens) for share in shares]), tokens)
    assert max(shares[0].sizes) - min(shares[0].sizes) <= 1
    wanted = torch.tensor([number - 1, 0, 0])
    where = [share.find(wanted) for share in shares]
    assert sorted(torch.cat([which for which, _ in where]).tolist()) == [0, 1, 2]
    for share, (which, place) in zip(shares, where, strict=True):
        assert torch.equal(share.own(tokens)[place], wanted[which])
