"""The trainer by identities: what must be exactly equal, what must not move, what must be zero.

Losses and gradients of the same update computed in different ways agree to 1e-4 of the largest
element, in float32; what is one computation done twice is compared bit for bit.
"""

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.training.harness import (
    assert_close,
    assert_same,
    flat,
    gradients,
    make_groups,
    model,
    noisy,
    trainer,
    weights_of,
)
from tir_alp.algorithm import perturbation
from tir_alp.algorithm.inputs import LossInputs
from tir_alp.algorithm.loss import policy_loss
from tir_alp.algorithm.perturbation import LayerwisePerturbation
from tir_alp.algorithm.presets import ALGORITHMS, KLConfig
from tir_alp.training import trainer as trainer_module
from tir_alp.training.attention import PackedSequences
from tir_alp.training.batch import collate, loss_positions, noise_keys, pack
from tir_alp.training.policy import (
    hidden_states,
    load_policy,
)
from tir_alp.types import Sample, TokenSpan

# ------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["bypass_token", "bypass_sequence", "grpo"])
def test_on_policy_an_update_is_the_plain_policy_gradient(name, temperature):
    groups = make_groups(jitter=0.0, temperature=temperature)
    one = trainer(ALGORITHMS[name], temperature=temperature)
    metrics = one.step(groups, 0).metrics

    plain = model()
    num_tokens = sum(sum(sample.trajectory.loss_mask) for sample in flat(groups))
    expected = torch.zeros(())
    for sample in flat(groups):
        ids = torch.tensor(sample.trajectory.token_ids)
        mask = torch.tensor(sample.trajectory.loss_mask)[1:]
        hidden = hidden_states(plain, ids, torch.arange(len(ids)), PackedSequences((len(ids),)))
        logits = plain.get_output_embeddings()(hidden[:-1]) / temperature
        logprobs = logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
        expected = expected - sample.advantage * logprobs[mask].sum() / num_tokens
    expected.backward()

    mean_advantage = sum(
        sample.advantage * sum(sample.trajectory.loss_mask) / num_tokens for sample in flat(groups)
    )
    assert metrics["loss/value"] == pytest.approx(-mean_advantage, rel=1e-4)
    assert metrics["ratio/p2"] == pytest.approx(1, abs=1e-4)
    assert metrics["ratio/p98"] == pytest.approx(1, abs=1e-4)
    assert_close(gradients(one), gradients(one, plain))


def test_the_proximal_methods_do_not_believe_the_engines_logprobs():
    """The ratio is over the trainer's own forward, so it is 1 whatever the engine reports."""
    value = [trainer(ALGORITHMS["grpo"]).step(make_groups(jitter=j), 0).metrics for j in (0.0, 3.0)]
    assert value[0]["loss/value"] == value[1]["loss/value"]
    assert value[0]["ratio/p98"] != value[1]["ratio/p98"]


@pytest.mark.parametrize("name", ["token", "sequence"])
def test_alp_without_noise_is_bypass_bit_for_bit(name):
    groups = make_groups()
    bypass = trainer(ALGORITHMS[f"bypass_{name}"])
    alp = trainer(noisy(f"alp_{name}", init_std=0.0))
    for step in range(2):
        one, other = bypass.step(groups, step).metrics, alp.step(groups, step).metrics
        assert one == {key: value for key, value in other.items() if key in one}
        assert_same(gradients(bypass), gradients(alp))
    assert_same(weights_of(bypass), weights_of(alp))


def test_with_noise_alp_is_not_bypass():
    groups = make_groups()
    bypass, alp = (trainer(each) for each in (ALGORITHMS["bypass_sequence"], noisy()))
    assert bypass.step(groups, 0).metrics["loss/value"] != alp.step(groups, 0).metrics["loss/value"]


def test_a_penalty_on_the_distance_to_the_reference_starts_at_zero_and_grows():
    algorithm = ALGORITHMS["grpo"].model_copy(update={"kl": KLConfig(coefficient=0.1)})
    groups, one = make_groups(), trainer(algorithm, lr=1e-3)
    distances = [one.step(groups, step).metrics["kl/reference"] for step in range(2)]
    assert distances[0] == 0 and distances[1] > 1e-4


# --------------------------------------------------------------------- what has no influence


def test_only_states_that_predict_a_token_of_the_loss_get_a_gradient():
    groups = make_groups(1)
    one = trainer(ALGORITHMS["bypass_token"])
    states = []

    def keep(_, __, output):
        if output.last_hidden_state.requires_grad:  # not the forward of the probe
            output.last_hidden_state.retain_grad()
            states.append(output.last_hidden_state)

    one.model.base_model.register_forward_hook(keep)
    one.step(groups, 1)
    (batch,) = pack(flat(groups), 10_000)
    has_gradient = states[0].grad[0].abs().sum(-1) > 0
    assert has_gradient.nonzero().squeeze(1).tolist() == (loss_positions(batch) - 1).tolist()


def test_logits_are_made_of_the_tokens_of_the_loss_alone():
    groups = make_groups()
    one, rows = trainer(ALGORITHMS["bypass_token"]), []
    one.model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, __: rows.append(inputs[0].shape[0] * inputs[0].requires_grad)
    )
    metrics = one.step(groups, 1).metrics
    assert sum(rows) == 2 * metrics["tokens/loss"]  # forward, and again in backward
    assert metrics["tokens/loss"] < sum(len(each.trajectory.token_ids) for each in flat(groups))


def test_logprobs_outside_the_loss_are_never_read(monkeypatch):
    groups = make_groups()
    clean, dirty = trainer(noisy()), trainer(noisy())
    expected = clean.step(groups, 0).metrics

    def spoiled(samples, max_tokens, *ranks, **sharing):
        return [
            replace(
                batch,
                rollout_logprobs=batch.rollout_logprobs.masked_fill(~batch.loss_mask, math.nan),
            )
            for batch in pack(samples, max_tokens, *ranks, **sharing)
        ]

    monkeypatch.setattr(trainer_module, "pack", spoiled)
    assert dirty.step(groups, 0).metrics == expected
    assert_same(gradients(dirty), gradients(clean))


def test_a_void_turn_moves_nothing_whatever_its_logprobs():
    def without_first_turn(sample: Sample, logprob: float) -> Sample:
        first, *others = sample.trajectory.turns
        span = TokenSpan(
            first.completion.token_ids, (logprob,) * len(first.completion), trainable=False
        )
        turns = (replace(first, completion=span), *others)
        return replace(sample, trajectory=replace(sample.trajectory, turns=turns))

    trainers = []
    for logprob in (-1.0, math.nan):
        groups = [[without_first_turn(each, logprob) for each in group] for group in make_groups()]
        trainers.append(trainer(noisy()))
        trainers[-1].step(groups, 0)
    assert_same(gradients(trainers[0]), gradients(trainers[1]))


# ----------------------------------------------------------------------- however it is split


SPLITS: dict[str, dict[str, Any]] = {
    "one sequence at a time": {"micro_batch_tokens": 1},
    "some at a time": {"micro_batch_tokens": 50},
    "logits three at a time": {"logprob_chunk_tokens": 3},
    "layers computed twice": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("split", SPLITS)
def test_loss_and_gradients_do_not_depend_on_how_an_update_is_computed(split):
    groups = make_groups()
    whole, other = trainer(noisy()), trainer(noisy(), **SPLITS[split])
    expected, metrics = whole.step(groups, 0).metrics, other.step(groups, 0).metrics
    for name in ("loss/value", "loss/clip_fraction", "kl/rollout", "entropy/mean", "ratio/p98"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7)
    assert_close(gradients(other), gradients(whole))
    assert "log_sigma" in gradients(whole)


def test_recomputing_layers_makes_noise_no_third_time_and_leaves_all_names(monkeypatch, tmp_path):
    made = []
    pieces = perturbation.normal_pieces
    monkeypatch.setattr(
        perturbation, "normal_pieces", lambda *args: (made.append(args[1]), pieces(*args))[1]
    )
    plain, recomputing = trainer(noisy()), trainer(noisy(), gradient_checkpointing=True)
    counts = []
    for each in (plain, recomputing):
        each.step(make_groups(2), 0)
        counts.append(len(made))
        made.clear()
    assert counts == [2 * len(plain.model.model.layers)] * 2
    recomputing.save_model(tmp_path)
    assert load_policy(str(tmp_path)).state_dict().keys() == plain.model.state_dict().keys()
    assert dict(recomputing.weights()).keys() == dict(plain.weights()).keys()
    assert recomputing.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", ["alp_sequence", "tis_token"])
def test_what_is_logged_does_not_depend_on_how_an_update_is_computed_either(name):
    groups = make_groups()
    whole, other = trainer(ALGORITHMS[name]), trainer(ALGORITHMS[name], micro_batch_tokens=50)
    expected, metrics = whole.step(groups, 0).metrics, other.step(groups, 0).metrics
    # A histogram is accurate to 1 % of a log ratio, and the last bit can decide between two bins.
    of_some_tokens = ("alp/effective", "alp/relative_rms", "alp/logprob_shift", "mismatch/probe")
    assert metrics.keys() == expected.keys() > {"turn_0/kl", "turn_1/kl", "after_tool_positive/kl"}
    for key in (key for key in expected if not key.startswith(of_some_tokens)):
        assert math.isfinite(expected[key])
        assert metrics[key] == pytest.approx(expected[key], rel=1e-2, abs=1e-4), key


def test_ratios_are_those_of_all_updates_of_a_step_together():
    groups = make_groups(4)
    # With almost no learning rate, two updates see what one sees.
    halves, whole = (
        trainer(ALGORITHMS["bypass_token"], lr=1e-30, weight_decay=0.0, updates_per_step=number)
        for number in (2, 1)
    )
    found, expected = halves.step(groups, 0).metrics, whole.step(groups, 0).metrics
    names = [name for name in expected if name.startswith("ratio/")]
    assert {name: found[name] for name in names} == pytest.approx(
        {name: expected[name] for name in names}, rel=1e-5
    )
    assert found["turn_0/tokens"] + found["turn_1/tokens"] == found["tokens/loss"]


PROBED = ("mismatch/probe_kl", "mismatch/probe_mean", "mismatch/probe_max")


def test_methods_without_proximal_logprobs_report_the_mismatch_of_a_probe():
    """The probe covers some tokens without noise, where it equals the proximal forward."""
    groups = make_groups(8, jitter=0.05)
    grpo, alp = (trainer(each, lr=1e-30) for each in (ALGORITHMS["grpo"], noisy()))
    logged = [
        (grpo.step(groups, step).metrics, alp.step(groups, step).metrics) for step in range(3)
    ]
    for proximal, own in logged:
        assert "mismatch/kl" in proximal and "mismatch/p98" in proximal
        assert {key for key in own if key.startswith("mismatch/")} == {*PROBED}
        for key in PROBED:
            assert own[key] == pytest.approx(proximal[key], rel=1e-3, abs=1e-5)
        assert len(proximal) < 160
    kls = [own["mismatch/probe_kl"] for _, own in logged]
    assert len(set(kls)) == 3  # each step probes other sequences
    assert sum(kls) / 3 == pytest.approx(logged[0][0]["mismatch/kl"], rel=0.2)


def test_the_order_of_the_samples_does_not_matter():
    groups = make_groups()
    one, other = trainer(noisy()), trainer(noisy())
    metrics = [
        one.step(groups, 0).metrics,
        other.step([group[::-1] for group in groups[::-1]], 0).metrics,
    ]
    assert metrics[0]["loss/value"] == pytest.approx(metrics[1]["loss/value"], rel=1e-5)
    assert_close(gradients(one), gradients(other))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_mean"])
def test_packed_equals_the_librarys_own_forward_of_each_sequence(aggregation):
    groups = make_groups()
    algorithm = noisy().model_copy(update={"aggregation": aggregation})
    packed = trainer(algorithm)
    loss = packed.step(groups, 0).metrics["loss/value"]

    config = deepcopy(model().config)
    eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    eager.load_state_dict(model().state_dict())
    eager.train()
    assert algorithm.perturbation is not None
    perturbation = LayerwisePerturbation(eager, algorithm.perturbation)
    samples = flat(groups)
    num_tokens = sum(sum(sample.trajectory.loss_mask) for sample in samples)
    expected = 0.0
    for sample in samples:
        batch = collate([sample])
        keys = noise_keys(batch, 0)
        with perturbation.active(keys, batch.lengths):
            logits = eager(batch.token_ids[None], use_cache=False).logits[0, :-1]
            chosen = logits.log_softmax(-1).gather(-1, batch.token_ids[1:, None]).squeeze(-1)
            inputs = LossInputs(
                logprobs=torch.cat([torch.zeros(1), chosen])[None],
                rollout_logprobs=batch.rollout_logprobs,
                advantages=batch.advantages,
                loss_mask=batch.loss_mask,
            )
            part, _ = policy_loss(inputs, algorithm, num_tokens, len(samples))
            part.backward()
        expected += part.item()
    assert loss == pytest.approx(expected, abs=2e-6)  # the loss is a sum of terms near 1
    assert_close(gradients(packed), gradients(perturbation, eager))


def test_updates_divide_the_groups_of_a_step():
    groups = make_groups(4)
    together, apart = trainer(noisy(), updates_per_step=2), trainer(noisy())
    together.step(groups, 0)
    apart.step(groups[:2], 0)
    apart.step(groups[2:], 1)
    assert_same(weights_of(together), weights_of(apart))


def test_the_noise_of_every_update_is_another():
    groups = make_groups()
    values = [trainer(noisy()).step(groups, step).metrics["loss/value"] for step in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    bypass = ALGORITHMS["bypass_token"]
    plain = [trainer(bypass).step(groups, step).metrics["loss/value"] for step in (1, 2)]
    assert plain[0] == plain[1]
