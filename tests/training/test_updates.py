"""What an update moves and what it leaves alone: optimizer, noise, precision, resume."""

import math

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.training.harness import (
    assert_close,
    assert_same,
    flat,
    gradients,
    make_groups,
    model,
    noisy,
    saved,
    trainer,
    weights_of,
)
from tir_alp.algorithm.inputs import LossInputs
from tir_alp.algorithm.loss import policy_loss
from tir_alp.algorithm.perturbation import LayerwisePerturbation
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.algorithm.sites import find_decoder_layers
from tir_alp.tools.outcome import Outcome
from tir_alp.training import checkpoint
from tir_alp.training.attention import PACKED, PackedSequences
from tir_alp.training.batch import collate, loss_positions, noise_keys, pack, to_rows
from tir_alp.training.policy import (
    PolicyLogprobs,
    hidden_states,
    load_policy,
    token_logprobs,
)
from tir_alp.training.trainer import Trainer
from tir_alp.types import Sample, StopReason, TokenSpan, Trajectory, Turn

# ------------------------------------------------------------------------------ the optimizer


def test_the_losses_of_several_draws_are_averaged():
    groups = make_groups()
    with_draws = trainer(noisy(draws=2))
    with_draws.step(groups, 0)
    policy = model()
    perturbation = LayerwisePerturbation(policy, noisy(draws=2).perturbation)  # type: ignore[arg-type]
    samples = flat(groups)
    batch = collate(samples)
    num_tokens = int(batch.loss_mask.sum())
    keys = noise_keys(batch, 0)
    for draw in range(2):
        with perturbation.active(keys, batch.lengths, draw=draw):
            layout = PackedSequences(batch.lengths)
            hidden = hidden_states(policy, batch.token_ids, batch.position_ids, layout)
            places = loss_positions(batch)
            logprobs, _ = token_logprobs(policy, hidden[places - 1], batch.token_ids[places])
            inputs = LossInputs(
                logprobs=to_rows(batch, logprobs),
                rollout_logprobs=batch.rollout_logprobs,
                advantages=batch.advantages,
                loss_mask=batch.loss_mask,
            )
            loss, _ = policy_loss(inputs, noisy(), num_tokens, len(samples))
            (loss / 2).backward()
    assert_close(gradients(with_draws), gradients(perturbation, policy))


def test_noise_on_the_logits_does_not_depend_on_how_they_are_made():
    groups, algorithm = make_groups(), noisy(site="logits")
    one, other = trainer(algorithm), trainer(algorithm, logprob_chunk_tokens=3)
    whole = one.step(groups, 0).metrics
    assert other.step(groups, 0).metrics["ratio/p98"] == pytest.approx(whole["ratio/p98"], rel=1e-5)
    assert_close(gradients(other), gradients(one))
    assert whole["alp/sigma_logits"] == pytest.approx(0.1, rel=1e-2)


@pytest.mark.parametrize("site", ["hidden", "logits"])
def test_the_shift_of_the_logprobs_by_the_noise_is_reported(site):
    shifts = []
    for std in (1e-4, 1e-3):  # small enough for the model to be linear in it
        report = trainer(noisy(init_std=std, site=site)).step(make_groups(), 0).metrics
        shifts.append(report["alp/logprob_shift"])
    assert shifts[1] == pytest.approx(10 * shifts[0], rel=0.3)
    assert (
        trainer(noisy(init_std=0.0)).step(make_groups(), 0).metrics.get("alp/logprob_shift") is None
    )


def test_log_sigma_has_its_own_learning_rate_and_no_decay():
    one = trainer(noisy(), perturbation_lr=0.125, weight_decay=0.5)
    one.step(make_groups(), 0)
    assert one._perturbation is not None
    moved = one._perturbation.log_sigma.detach() - math.log(0.1)
    # Adam's first step is the learning rate itself; decay would add 0.125 * 0.5 * log(0.1).
    torch.testing.assert_close(moved.abs(), torch.full((3,), 0.125), rtol=1e-3, atol=0)


def test_the_weights_do_decay():
    decayed, plain = (trainer(noisy(), weight_decay=decay, lr=1e-2) for decay in (0.5, 0.0))
    for each in (decayed, plain):
        each.step(make_groups(), 0)
    norm = "model.norm.weight"
    moved = weights_of(plain)[norm] - weights_of(decayed)[norm]
    torch.testing.assert_close(moved, 1e-2 * 0.5 * model().model.norm.weight.detach())


def test_the_gradients_of_weights_and_sigma_are_bounded_each_by_itself():
    one = trainer(noisy(), max_grad_norm=1e-4)
    metrics = one.step(make_groups(), 0).metrics
    found = gradients(one)
    sigma = found.pop("log_sigma")
    weights = torch.stack([each.norm() for each in found.values()]).norm()
    assert metrics["grad_norm/policy"] > 1e-4 < metrics["grad_norm/log_sigma"]
    assert weights.item() == pytest.approx(1e-4, rel=1e-2)
    assert sigma.norm().item() == pytest.approx(1e-4, rel=1e-2)


def test_a_small_gradient_of_sigma_is_not_scaled_by_a_large_one_of_the_weights():
    free, bound = trainer(noisy()), trainer(noisy(), max_grad_norm=0.5)
    norms = free.step(make_groups(), 0).metrics
    assert norms["grad_norm/log_sigma"] < 0.5 < norms["grad_norm/policy"]
    bound.step(make_groups(), 0)
    assert torch.equal(gradients(free)["log_sigma"], gradients(bound)["log_sigma"])


def test_an_engine_gets_the_models_tensors_whole_and_no_sigma():
    weights, own = weights_of(trainer(noisy())), model().state_dict()
    assert_same(weights, own)
    assert {type(tensor) for tensor in weights.values()} == {Tensor}


def test_a_sigma_that_is_not_learnt_stays():
    one = trainer(noisy(learnable=False), perturbation_lr=1.0)
    metrics = one.step(make_groups(), 0).metrics
    assert metrics["alp/sigma_mean"] == pytest.approx(0.1)


def test_a_trainer_that_is_loaded_makes_the_same_next_step(tmp_path):
    groups = make_groups()
    never_stopped = trainer(noisy())
    never_stopped.step(groups, 0)
    path = saved(never_stopped, tmp_path)
    expected = never_stopped.step(groups, 1).metrics

    resumed = trainer(noisy())
    checkpoint.load(path, resumed)
    assert resumed.step(groups, 1).metrics == expected
    assert_same(weights_of(resumed), weights_of(never_stopped))


def test_a_trainer_with_nothing_but_the_weights_makes_another_step(tmp_path):
    """Otherwise the test above would hold without optimizer and sigma in the checkpoint."""
    groups = make_groups()
    first = trainer(noisy())
    first.step(groups, 0)
    exported = load_policy(str(saved(first, tmp_path)))
    expected = first.step(groups, 1).metrics
    assert trainer(noisy(), exported).step(groups, 1).metrics != expected


# ------------------------------------------------------------------------------ precision


def test_in_bfloat16_what_is_trained_is_float32_and_the_noise_survives():
    one, seen = trainer(noisy(init_std=0.01), dtype="bfloat16"), []
    layer = find_decoder_layers(one.model)[0]
    layer.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    metrics = one.step(make_groups(), 0).metrics
    exact = trainer(noisy(init_std=0.01)).step(make_groups(), 0).metrics
    assert set(seen) == {torch.bfloat16}
    assert one._perturbation is not None
    trained = [*one.model.parameters(), one._perturbation.log_sigma]
    assert {each.dtype for each in trained} == {torch.float32}
    assert metrics["loss/value"] == pytest.approx(exact["loss/value"], rel=0.1)
    assert 0.5 < metrics["alp/effective"] < exact["alp/effective"]


# ---------------------------------------------------------------------- outside the training


def test_outside_an_update_the_model_is_itself_bit_for_bit():
    (batch,) = pack(flat(make_groups()), 10_000)

    def forward(of: PolicyLogprobs) -> Tensor:
        with torch.no_grad():
            return of(batch, temperature=1.0)[0]

    def num_hooks(of: Trainer) -> int:
        return sum(len(module._forward_pre_hooks) for module in of.model.modules())

    plain = PolicyLogprobs(model(), chunk_tokens=100)
    one = trainer(noisy(), lr=1e-30, weight_decay=0.0)
    before = num_hooks(one)
    assert torch.equal(forward(plain), forward(one._forwards.policy))
    one.step(make_groups(), 0)
    assert_same(weights_of(one), plain.model.state_dict())
    assert torch.equal(forward(plain), forward(one._forwards.policy))
    assert num_hooks(one) == before


@pytest.mark.parametrize("num_words", [1000, 262_144])
def test_logits_in_memory_do_not_grow_with_the_vocabulary(num_words: int):
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=num_words,
    )
    of = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)
    sizes = []
    of.get_output_embeddings().register_forward_hook(
        lambda _, inputs, logits: sizes.append((logits.shape[0], logits.numel()))
    )
    one = trainer(ALGORITHMS["bypass_token"], of)
    ids = (7,) * 400
    said = TokenSpan(ids, (-5.0,) * len(ids))
    turn = Turn(said, TokenSpan(()), 0, StopReason.STOP, Outcome.OK, 0.0)
    one.step([[Sample(Trajectory("t", 0, TokenSpan((1,)), (turn,), True, False), 1.0)]], 0)
    assert max(size for _, size in sizes) <= 1 << 26
    assert max(rows for rows, _ in sizes) == min(400, (1 << 26) // num_words)
