"""The trainer by identities: what must be exactly equal, what must not move, what must be zero.

Losses and gradients of the same update computed in different ways agree to 1e-4 of the largest
element, in float32; what is one computation done twice is compared bit for bit.
"""

import copy
import math
import random
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tir_alp.algorithm import perturbation
from tir_alp.algorithm.inputs import LossInputs
from tir_alp.algorithm.loss import policy_loss
from tir_alp.algorithm.perturbation import LayerwisePerturbation, NoiseKey
from tir_alp.algorithm.presets import ALGORITHMS, AlgorithmConfig, KLConfig, PerturbationConfig
from tir_alp.algorithm.sites import find_decoder_layers
from tir_alp.config import TrainerConfig
from tir_alp.models.tiny.model import make_model, make_tokenizer
from tir_alp.tools.outcome import Outcome
from tir_alp.training import checkpoint
from tir_alp.training import trainer as trainer_module
from tir_alp.training.attention import PackedSequences
from tir_alp.training.batch import Sample, collate, loss_positions, pack, to_rows
from tir_alp.training.checkpoint import Position
from tir_alp.training.packed_sequence import PackedSequence, packed_sequence
from tir_alp.training.policy import (
    WRAPPER,
    PolicyLogprobs,
    hidden_states,
    load_policy,
    token_logprobs,
)
from tir_alp.training.ranks import Ranks, alone
from tir_alp.training.sharding import gathered
from tir_alp.training.step_report import UpdateRecord, join_ranks
from tir_alp.training.trainer import Trainer
from tir_alp.types import StopReason, TokenSpan, Trajectory, Turn

torch.set_num_threads(1)

Groups = list[list[Sample]]


def model() -> Any:
    made = make_model(0)
    with torch.no_grad():  # fresh weights say the same of every token
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def trainer(
    algorithm: AlgorithmConfig,
    of: Any = None,
    *,
    ranks: Ranks | None = None,
    temperature: float = 1.0,
    bad: Any = None,
    **settings: Any,
) -> Trainer:
    policy = model() if of is None else of
    return Trainer(
        policy,
        TrainerConfig.model_validate({"lr": 1e-4, "max_grad_norm": 1e9} | settings),
        algorithm,
        ranks=ranks or alone(),
        reference=copy.deepcopy(policy) if algorithm.kl else None,
        temperature=temperature,
        on_bad_update=bad or (lambda update, _: pytest.fail(f"update {update} is not finite")),
    )


def noisy(name: str = "alp_sequence", **changes) -> AlgorithmConfig:
    perturbation = PerturbationConfig.model_validate({"init_std": 0.1} | changes)
    return ALGORITHMS[name].model_copy(update={"perturbation": perturbation})


def on_policy(of: Any, token_ids: tuple[int, ...], temperature: float = 1.0) -> Tensor:
    """The logprob of each token of a sequence but the first."""
    ids = torch.tensor(token_ids)
    with torch.no_grad():
        hidden = hidden_states(of, ids, torch.arange(len(ids)), PackedSequences((len(ids),)))
        return token_logprobs(of, hidden[:-1], ids[1:], temperature=temperature)[0]


def make_groups(num_groups: int = 4, jitter: float = 0.02, temperature: float = 1.0) -> Groups:
    """Two-turn trajectories of ragged lengths, on-policy up to the jitter of their logprobs."""
    rng, of = random.Random(0), model()

    def make(uid: int) -> Trajectory:
        lengths = [rng.randint(2, 9) for _ in range(4)]
        prompt, first, shown, second = (
            tuple(rng.randrange(6, 262) for _ in range(length)) for length in lengths
        )
        logprobs = [0.0, *on_policy(of, prompt + first + shown + second, temperature).tolist()]

        def said(ids: tuple[int, ...], start: int) -> TokenSpan:
            own = logprobs[start : start + len(ids)]
            return TokenSpan(ids, tuple(value + rng.gauss(0, jitter) for value in own))

        a, b = len(prompt), len(prompt) + len(first) + len(shown)
        turns = (
            Turn(said(first, a), TokenSpan(shown), 0, StopReason.STOP, Outcome.OK, 0.0),
            Turn(said(second, b), TokenSpan(()), 0, StopReason.EOS, Outcome.OK, 1.0),
        )
        return Trajectory("t", uid // 2, TokenSpan(prompt), turns, True, False, sequence_uid=uid)

    return [
        [Sample(make(2 * group), 0.8), Sample(make(2 * group + 1), -0.3)]
        for group in range(num_groups)
    ]


def flat(groups: Groups) -> list[Sample]:
    return [sample for group in groups for sample in group]


def gradients(of: Trainer | LayerwisePerturbation, at: Any = None) -> dict[str, Tensor]:
    """Gradients by name; that of log sigma too, if there is one."""
    named = (at if at is not None else of.model).named_parameters()  # type: ignore[union-attr]
    found = {
        name: whole
        for name, whole in gathered({name.replace(WRAPPER, ""): each.grad for name, each in named})
        if whole is not None
    }
    perturbation = of._perturbation if isinstance(of, Trainer) else of
    if perturbation is not None and perturbation.log_sigma.grad is not None:
        found["log_sigma"] = perturbation.log_sigma.grad
    return found


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        tolerance = 1e-4 * other[name].abs().max().item()  # a wrong term is far more than that
        torch.testing.assert_close(value, other[name], rtol=0, atol=tolerance, msg=name)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def weights_of(of: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in of.weights()}


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
    """The ratio is over the trainer's own forward, so it is 1 whatever the engine reported."""
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
        if output.last_hidden_state.requires_grad:  # not of the probe
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

    def spoiled(samples, max_tokens, *ranks):
        return [
            replace(
                batch,
                rollout_logprobs=batch.rollout_logprobs.masked_fill(~batch.loss_mask, math.nan),
            )
            for batch in pack(samples, max_tokens, *ranks)
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
    # A histogram knows a log ratio to within 1 %, and at its bins' edges the last bit can be that.
    of_some_tokens = ("alp/effective", "alp/relative_rms", "alp/logprob_shift", "mismatch/probe")
    assert metrics.keys() == expected.keys() > {"turn_0/kl", "turn_1/kl", "after_tool_positive/kl"}
    for key in (key for key in expected if not key.startswith(of_some_tokens)):
        assert math.isfinite(expected[key])
        assert metrics[key] == pytest.approx(expected[key], rel=1e-2, abs=1e-4), key


def test_ratios_are_those_of_all_updates_of_a_step_together():
    groups = make_groups(4)
    # With next to no learning rate, two updates see what one sees.
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


def test_methods_without_a_proximal_pass_report_the_mismatch_of_a_probe_in_every_step():
    """It sees some tokens without noise, and there what the proximal pass sees of all."""
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
        assert len(proximal) < 150
    kls = [own["mismatch/probe_kl"] for _, own in logged]
    assert len(set(kls)) == 3  # other sequences in each
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
        keys = [NoiseKey(0, sample.trajectory.sequence_uid)]
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
    assert loss == pytest.approx(expected, abs=2e-6)  # a sum of terms near 1
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
    keys = [NoiseKey(0, uid) for uid in batch.sequence_uids]
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
    for std in (1e-4, 1e-3):  # so small that the model is linear in it
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


def saved(of: Trainer, folder: Path) -> Path:
    return checkpoint.save(folder, of, make_tokenizer(), Position(1, 4), {}, keep=1)


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
    """Else the test above would hold without optimizer and sigma in the checkpoint."""
    groups = make_groups()
    first = trainer(noisy())
    first.step(groups, 0)
    exported = load_policy(str(saved(first, tmp_path)))
    expected = first.step(groups, 1).metrics
    assert trainer(noisy(), exported).step(groups, 1).metrics != expected


# ------------------------------------------------------------------------ what is not finite


def with_advantage(groups: Groups, value: float) -> Groups:
    return [[replace(groups[0][0], advantage=value), *groups[0][1:]], *groups[1:]]


def with_logprob(groups: Groups, value: float) -> Groups:
    sample = groups[0][0]
    first, *others = sample.trajectory.turns
    assert first.completion.rollout_logprobs is not None
    logprobs = (value, *first.completion.rollout_logprobs[1:])
    turns = (replace(first, completion=TokenSpan(first.completion.token_ids, logprobs)), *others)
    changed = replace(sample, trajectory=replace(sample.trajectory, turns=turns))
    return [[changed, *groups[0][1:]], *groups[1:]]


@pytest.mark.parametrize(
    "bad",
    [
        with_advantage(make_groups(), math.nan),
        with_advantage(make_groups(), math.inf),
        with_logprob(make_groups(), math.nan),
        with_logprob(make_groups(), math.inf),
        with_logprob(make_groups(), -math.inf),
    ],
    ids=["advantage nan", "advantage inf", "logprob nan", "logprob inf", "logprob -inf"],
)
def test_an_update_that_is_not_finite_is_skipped_reported_and_changes_nothing(bad):
    told = []
    one = trainer(noisy(), bad=lambda update, batches: told.append((update, batches)))
    before = weights_of(one)
    metrics = one.step(bad, 5).metrics
    assert metrics["train/skipped_updates"] == 1
    ((update, batches),) = told
    assert update == 5
    assert {uid for batch in batches for uid in batch.sequence_uids} == set(range(8))
    assert_same(weights_of(one), before)
    assert metrics["alp/sigma_mean"] == pytest.approx(0.1)

    never_hurt, groups = trainer(noisy()), make_groups()
    assert one.step(groups, 6).metrics == never_hurt.step(groups, 6).metrics
    assert_same(weights_of(one), weights_of(never_hurt))


def test_a_gradient_of_sigma_that_is_not_finite_skips_the_update_too():
    told = []
    one = trainer(noisy(), bad=lambda update, _: told.append(update))
    assert one._perturbation is not None
    before = weights_of(one)
    spoil = one._perturbation.log_sigma.register_hook(lambda gradient: gradient * math.nan)
    one.step(make_groups(), 0)
    spoil.remove()
    assert told == [0]
    assert_same(weights_of(one), before)
    assert one._perturbation.sigma.tolist() == pytest.approx([0.1] * 3)


def test_the_other_updates_of_a_step_are_made():
    told = []
    one = trainer(noisy(), bad=lambda update, _: told.append(update), updates_per_step=2)
    metrics = one.step(with_advantage(make_groups(), math.nan), 3).metrics
    assert told == [6]
    assert metrics["train/skipped_updates"] == 1
    assert math.isfinite(metrics["loss/value"])


# ------------------------------------------------------------------------ records of updates


def test_a_step_reports_which_sequences_the_loss_of_each_update_got():
    groups, skipped = make_groups(), []
    bad = [*groups[:2], *with_advantage(groups[2:], math.inf)]
    one = trainer(noisy(), bad=lambda update, _: skipped.append(update), updates_per_step=2)
    first, second = one.step(bad, 3).updates
    assert [(each.update, each.made) for each in (first, second)] == [(6, True), (7, False)]
    assert skipped == [7]
    for record, part in ((first, bad[:2]), (second, bad[2:])):
        expected = {packed_sequence(each.trajectory, each.advantage) for each in flat(part)}
        assert set(record.sequences) == expected and len(record.sequences) == len(expected)


def test_what_ranks_report_of_an_update_is_joined_without_what_only_filled_a_round():
    def record(update: int, *sequences: PackedSequence) -> UpdateRecord:
        return UpdateRecord(update, made=True, sequences=sequences)

    long, short = (PackedSequence(uid, 9, 4, 0.5, "ab") for uid in (1, 2))
    filler = replace(short, num_loss_tokens=0)
    first_rank, second_rank = [record(0, long), record(1, short)], [record(0, short), record(1)]
    assert join_ranks([first_rank, [record(0, short), record(1, filler)]]) == join_ranks(
        [first_rank, second_rank]
    )
    assert join_ranks([first_rank, second_rank])[0].sequences == (long, short)


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
    assert torch.equal(forward(plain), forward(one._policy))
    one.step(make_groups(), 0)
    assert_same(weights_of(one), plain.model.state_dict())
    assert torch.equal(forward(plain), forward(one._policy))
    assert num_hooks(one) == before


def test_a_step_with_nothing_to_learn_makes_no_update():
    groups = make_groups(2)
    void = [
        [
            replace(
                each,
                trajectory=replace(each.trajectory, turns=()),
            )
            for each in group
        ]
        for group in groups
    ]
    one = trainer(noisy())
    before = weights_of(one)
    assert one.step(void, 0).metrics["tokens/loss"] == 0
    assert_same(weights_of(one), before)


def test_a_gradient_spike_is_skipped_and_told(tmp_path):
    """Nothing of it is left, and a trainer that is loaded knows the norms before it."""
    told: list[int] = []
    settings: dict[str, Any] = {
        "skip_grad_spike": 20.0,
        "bad": lambda update, _: told.append(update),
    }
    one = trainer(noisy(init_std=0.01), **settings)
    groups = make_groups()
    for step in range(8):
        assert one.step(groups, step).metrics["train/skipped_updates"] == 0
    huge = [[replace(sample, advantage=1e4) for sample in group] for group in groups]
    other = trainer(noisy(init_std=0.01), **settings)
    checkpoint.load(saved(one, tmp_path), other)
    for each in (one, other):
        before = weights_of(each)
        assert each.step(huge, 8).metrics["train/skipped_updates"] == 1
        assert_same(weights_of(each), before)
        assert each.step(groups, 9).metrics["train/skipped_updates"] == 0
    assert told == [8, 8]


@pytest.mark.parametrize("name", ["grad_norm/policy", "grad_norm/log_sigma"])
def test_the_gradients_of_weights_and_sigma_are_each_compared_with_their_own(name):
    one = trainer(noisy(), bad=lambda *_: None, skip_grad_spike=20.0)
    usual = {each: torch.full((8,), 1e9) for each in ("grad_norm/policy", "grad_norm/log_sigma")}
    one.finish_loading(usual)
    assert one.step(make_groups(), 0).metrics["train/skipped_updates"] == 0
    one.finish_loading(usual | {name: torch.full((8,), 1e-12)})
    assert one.step(make_groups(), 1).metrics["train/skipped_updates"] == 1
