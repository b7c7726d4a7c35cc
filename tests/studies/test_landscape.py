"""Sharpness against second differences of the loss, and rounding against an engine's weights."""

import json

import pytest
import torch

from tests.runs import train_with
from tests.training.harness import flat, make_groups, model
from tir_alp.algorithm.loss import policy_loss
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.algorithm.sites import find_decoder_layers
from tir_alp.models.tiny import TRAIN_CONFIG
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.studies.landscape import ROUNDINGS, _shifted, curvatures, main, sensitivity
from tir_alp.training.batch import collate
from tir_alp.training.micro_batch import loss_inputs
from tir_alp.training.policy import PolicyLogprobs

REINFORCE = ALGORITHMS["reinforce"].model_copy(update={"denominator": "rollout"})


def test_the_trace_equals_second_differences_of_the_loss_in_every_direction():
    of = model().eval()
    batch = collate(flat(make_groups(1))[:1])
    (found,) = curvatures(of, batch, REINFORCE, temperature=1.0, probes=400, only=[1])
    policy, layer = PolicyLogprobs(of, 64), find_decoder_layers(of)[1]

    def loss_at(shift: torch.Tensor | None) -> tuple[float, torch.Tensor]:
        with torch.no_grad(), _shifted(layer, shift) as seen:
            logprobs, _ = policy(batch, temperature=1.0)
            value = policy_loss(loss_inputs(batch, logprobs.double()), REINFORCE)[0]
        return value.item(), seen[0]

    middle, hidden = loss_at(None)
    assert found.rms == pytest.approx(hidden.square().mean().sqrt().item(), rel=1e-5)
    size, total = 0.3 * found.rms, 0.0
    for place in range(hidden.numel()):
        shift = torch.zeros_like(hidden).flatten()
        shift[place] = size
        up, down = (loss_at((s * shift).view_as(hidden))[0] for s in (1, -1))
        total += (up - 2 * middle + down) / size**2
    assert abs(found.trace - total) < 4 * found.error + 0.1 * abs(total)
    assert found.error < 0.2 * abs(total)


def test_rounding_moves_logprobs_more_the_fewer_bits_there_are_and_is_undone():
    of = model().eval()
    before = {name: each.clone() for name, each in of.state_dict().items()}
    batch = collate(flat(make_groups()))
    found = {each: sensitivity(of, batch, each, temperature=1.0) for each in ROUNDINGS}
    assert 0 < found["bfloat16"].mean < found["fp8"].mean
    assert 0 < found["int8"].mean < found["fp8"].mean
    assert all(each.largest >= each.mean >= abs(each.kl) for each in found.values())
    after = of.state_dict()
    assert all(torch.equal(after[name], each) for name, each in before.items())


def test_the_command_measures_the_last_policy_of_a_run(tmp_path, capsys):
    words = ("--name", "seen", "--model.path", "tiny-able", "--steps", "1", "--eval.num_tasks", "1")
    words = (*words, "--rollout.groups_per_step", "4", "--rollout.group_size", "4")
    run = train_with(tmp_path, load_config(words, read_toml(TRAIN_CONFIG)))
    capsys.readouterr()
    assert main([str(run), "--sequences", "8", "--probes", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["checkpoint"] == "step_1" and found["tokens"] > 20
    assert [each["layer"] for each in found["sharpness"]] == [0, 1, 2]
    assert [each["precision"] for each in found["rounding"]] == [*ROUNDINGS]
