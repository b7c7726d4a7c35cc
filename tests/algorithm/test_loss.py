"""The loss by golden values and identities. Laws for *all* inputs are in `test_loss_laws.py`."""

import math
from dataclasses import replace

import pytest
import torch

from tir_alp.algorithm.inputs import LossInputs
from tir_alp.algorithm.levels import RATIO_LEVELS
from tir_alp.algorithm.loss import log_ratios, loss_counts, policy_loss
from tir_alp.algorithm.presets import (
    ALGORITHMS,
    AlgorithmConfig,
    CorrectionConfig,
    KLConfig,
    RejectionConfig,
)
from tir_alp.algorithm.ratio_metrics import ratio_metrics
from tir_alp.algorithm.ratio_summary import summarise

NAN = math.nan
TRAIN = [[-0.10, -1.20, -0.50, -2.00], [-0.70, -0.30, NAN, NAN]]
PROXIMAL = [[-0.15, -1.10, -0.55, -1.80], [-0.60, -0.45, NAN, NAN]]
ROLLOUT = [[-0.30, -1.00, -0.40, -2.60], [-1.50, -0.90, NAN, NAN]]
MASK = [[1, 1, 0, 1], [1, 1, 0, 0]]


def tensor(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def golden() -> LossInputs:
    return LossInputs(
        logprobs=tensor(TRAIN).requires_grad_(),
        rollout_logprobs=tensor(ROLLOUT),
        advantages=tensor([1, -1]),
        loss_mask=torch.tensor(MASK, dtype=torch.bool),
        proximal_logprobs=tensor(PROXIMAL),
        turn_ids=torch.tensor([[0, 0, -1, 1], [0, 0, -1, -1]]),
    )


def inputs_of(log_ratio, advantages, mask=None) -> LossInputs:
    """Inputs whose token log ratios are as given, over a rollout logprob of -1."""
    log_ratio = tensor(log_ratio)
    rollout = torch.full_like(log_ratio, -1.0)
    return LossInputs(
        logprobs=(rollout + log_ratio).requires_grad_(),
        rollout_logprobs=rollout,
        advantages=tensor(advantages),
        loss_mask=torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else mask,
        proximal_logprobs=rollout,
        turn_ids=torch.zeros_like(log_ratio, dtype=torch.int64),
    )


def variant(name: str, **changes) -> AlgorithmConfig:
    """A preset with changed fields."""
    return ALGORITHMS[name].model_copy(update=changes)


def corrected(name: str, **changes) -> AlgorithmConfig:
    """A preset with changed fields of its correction."""
    correction = ALGORITHMS[name].correction
    assert correction is not None
    return variant(name, correction=correction.model_copy(update=changes))


def value(inputs: LossInputs, algorithm: AlgorithmConfig) -> float:
    return policy_loss(inputs, algorithm)[0].item()


def gradient(inputs: LossInputs, algorithm: AlgorithmConfig) -> torch.Tensor:
    logprobs = inputs.logprobs.detach().clone().requires_grad_()
    policy_loss(replace(inputs, logprobs=logprobs), algorithm)[0].backward()
    assert logprobs.grad is not None
    return logprobs.grad


# --------------------------------------------------------------------------- the golden vector

WINDOW = {"clip_low": 0.5, "clip_high": 3.0, "dual_clip": 3.0}
GEOMETRIC = {"ratio_level": "sequence_geometric"}
PER_SEQUENCE = {"aggregation": "sequence_mean_token_mean"}
GSPO_ON_ROLLOUT = {"denominator": "rollout", "dual_clip": 100.0}

GOLDEN_LOSSES = [
    (variant("bypass_token"), 0.1455052435),
    (variant("alp_token"), 0.1455052435),
    (variant("alp_token", **PER_SEQUENCE), 0.4585593470),
    (variant("alp_token", aggregation="sequence_mean_token_sum"), 0.3637631088),
    (variant("bypass_sequence"), 0.1067287198),
    (variant("alp_sequence"), 0.1067287198),
    (variant("alp_sequence", **PER_SEQUENCE), 0.5889405998),
    (variant("alp_sequence", **GEOMETRIC), 0.0726594281),
    (variant("alp_sequence", **GEOMETRIC, **PER_SEQUENCE), 0.3961749747),
    (variant("gspo", **GSPO_ON_ROLLOUT, aggregation="token_mean"), 0.2052610830),
    (variant("gspo", **GSPO_ON_ROLLOUT), 0.5066763537),
    (variant("grpo"), -0.1416335213),
    (variant("tis_token"), -0.0091602763),
    (variant("tis_sequence"), -0.2832670427),
    (variant("mis_token"), -0.0436029422),
    (variant("mis_sequence"), 0.0),
    (variant("icepop"), 0.0370814835),
    (variant("cispo"), 0.3692914104),
]


@pytest.mark.parametrize(("algorithm", "expected"), GOLDEN_LOSSES)
def test_golden_loss(algorithm, expected):
    assert value(golden(), algorithm) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_golden_ratios():
    inputs, bypass = golden(), ALGORITHMS["bypass_token"]
    mask = inputs.loss_mask
    assert log_ratios(inputs, bypass).exp()[mask].tolist() == pytest.approx(
        [1.2214027582, 0.8187307531, 1.8221188004, 2.2255409285, 1.8221188004], rel=1e-6
    )
    assert log_ratios(inputs, bypass).sum(-1).exp().tolist() == pytest.approx(
        [1.8221188004, 4.0551999668], rel=1e-6
    )
    geometric = log_ratios(inputs, bypass).sum(-1) / mask.sum(-1)
    assert geometric.exp().tolist() == pytest.approx([1.2214027582, 2.0137527075], rel=1e-6)
    assert log_ratios(inputs, ALGORITHMS["grpo"]).exp()[mask].tolist() == pytest.approx(
        [1.0512710964, 0.9048374180, 0.8187307531, 0.9048374180, 1.1618342427], rel=1e-6
    )


def test_golden_weights():
    # A log ratio of proximal over rollout is a correction weight: the golden w, token and sequence.
    weights = replace(golden(), logprobs=golden().proximal_logprobs)
    bypass = ALGORITHMS["bypass_token"]
    assert log_ratios(weights, bypass).exp()[weights.loss_mask].tolist() == pytest.approx(
        [1.1618342427, 0.9048374180, 2.2255409285, 2.4596031112, 1.5683121855], rel=1e-6
    )
    assert log_ratios(weights, bypass).sum(-1).exp().tolist() == pytest.approx(
        [2.3396468519, 3.8574255307], rel=1e-6
    )


def test_golden_gradient_of_sequence_alp():
    g = -0.3644237601  # nothing on the second sequence: its ratio is above c
    expected = [[g, g, 0, g], [0, 0, 0, 0]]
    actual = gradient(golden(), ALGORITHMS["alp_sequence"])
    torch.testing.assert_close(actual, tensor(expected), rtol=1e-6, atol=0)


def test_golden_kl_to_the_rollout_policy():
    assert ratio_metrics(summarise(golden()))["kl/rollout"] == pytest.approx(-0.4)


def test_cispo_on_clipped_tokens_keeps_its_bounded_gradient():
    expected = -tensor([[1.2214027582, 0.8187307531, 0, 1.28], [-1.28, -1.28, 0, 0]]) / 5
    actual = gradient(golden(), variant("cispo", denominator="rollout"))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


# ---------------------------------------------------------------------- identities between methods


def test_on_policy_every_method_is_the_plain_policy_gradient():
    inputs = inputs_of([[0.0, 0, 0], [0, 0, 0]], [1.5, -0.5])
    inputs = replace(inputs, loss_mask=torch.tensor([[True, True, False], [False, True, True]]))
    plain = -tensor([[1.5, 1.5, 0], [0, -0.5, -0.5]]) / 4
    exact = [each for each in ALGORITHMS.values() if each.surrogate in ("clip", "cispo")]
    exact = [each for each in exact if not (each.selection or each.kl or each.entropy_bonus)]
    assert len(exact) > 20  # to the last bit; test_presets.py has the others
    for algorithm in exact:
        algorithm = algorithm.model_copy(update={"aggregation": "token_mean"})
        found = gradient(inputs, algorithm)
        torch.testing.assert_close(found, plain, rtol=0, atol=0, msg=algorithm.name)
        if algorithm.surrogate == "clip":
            assert value(inputs, algorithm) == -(1.5 * 2 - 0.5 * 2) / 4


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_tis_without_a_bound_on_an_exact_engine_is_grpo(level):
    inputs = replace(golden(), rollout_logprobs=golden().proximal_logprobs)
    tis, grpo = corrected(f"tis_{level}", high=1e30), ALGORITHMS["grpo"]
    assert value(inputs, tis) == value(inputs, grpo)
    assert torch.equal(gradient(inputs, tis), gradient(inputs, grpo))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_mis_with_an_open_window_is_unbounded_tis(level):
    mis = corrected(f"mis_{level}", low=0.0, high=1e30)
    assert value(golden(), mis) == value(golden(), corrected(f"tis_{level}", high=1e30))


def test_icepop_is_token_mis_with_the_same_bounds():
    assert value(golden(), ALGORITHMS["icepop"]) == value(
        golden(), corrected("mis_token", low=0.5, high=5.0)
    )


def test_bypass_is_grpo_with_the_rollout_policy_as_proximal():
    inputs = replace(golden(), proximal_logprobs=golden().rollout_logprobs)
    grpo = variant("grpo", dual_clip=10.0)
    assert value(inputs, grpo) == value(inputs, ALGORITHMS["bypass_token"])
    assert torch.equal(gradient(inputs, grpo), gradient(inputs, ALGORITHMS["bypass_token"]))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_alp_is_its_bypass_twin_but_for_the_perturbation(level):
    alp, bypass = ALGORITHMS[f"alp_{level}"], ALGORITHMS[f"bypass_{level}"]
    assert alp.perturbation is not None
    assert alp.model_copy(update={"perturbation": None, "name": bypass.name}) == bypass


def test_levels_agree_on_one_token():
    inputs = inputs_of([[0.3], [-0.4]], [1, -1])
    losses = {value(inputs, variant("bypass_token", ratio_level=level)) for level in RATIO_LEVELS}
    assert len(losses) == 1


def test_a_constant_log_ratio_has_product_and_geometric_mean():
    delta, length = 0.01, 7
    inputs = inputs_of([[delta] * length], [1])
    loss = {
        level: value(inputs, variant("bypass_token", ratio_level=level, clip_high=9.0))
        for level in RATIO_LEVELS
    }
    assert loss["sequence"] == pytest.approx(-math.exp(length * delta))
    assert loss["turn"] == pytest.approx(-math.exp(length * delta))
    for level in ("sequence_geometric", "turn_geometric", "cumulative_geometric"):
        assert loss[level] == pytest.approx(-math.exp(delta))
    partial = [math.exp(t * delta) for t in range(1, length + 1)]
    assert loss["cumulative"] == pytest.approx(-sum(partial) / length)


def test_a_turn_multiplies_its_own_tokens_and_no_others():
    # Turn 0 has log ratios .1 and .2, turn 1 has .4; the token between them is the environment's.
    inputs = inputs_of([[0.1, 0.2, 9.0, 0.4]], [1], torch.tensor([[True, True, False, True]]))
    inputs = replace(inputs, turn_ids=torch.tensor([[0, 0, -1, 1]]))
    actual = gradient(inputs, variant("bypass_token", ratio_level="turn", clip_high=9.0))
    expected = -tensor([[math.exp(0.3), math.exp(0.3), 0, math.exp(0.4)]]) / 3
    torch.testing.assert_close(actual, expected)


# -------------------------------------------------------------------------- clipping and clamping


@pytest.mark.parametrize(
    ("advantage", "ratio", "is_active"),
    [
        (1, 0.1, True), (1, 0.5, True), (1, 1.0, True), (1, 2.0, True), (1, 2.001, False),
        (-1, 0.499, False), (-1, 0.5, True), (-1, 2.5, True), (-1, 3.0, True), (-1, 3.001, False),
    ],
)  # fmt: skip
def test_where_the_clipped_surrogate_has_a_gradient(advantage, ratio, is_active):
    # exp(log r) need not equal r, so the bounds are set to its exact value.
    exact = tensor(ratio).log().exp().item()
    bounds = {0.5: "clip_low", 2.0: "clip_high", 3.0: "dual_clip"}
    clip = {"clip_low": 0.5, "clip_high": 1.0, "dual_clip": 3.0}
    if ratio in bounds:
        offset = {"clip_low": 1 - exact, "clip_high": exact - 1, "dual_clip": exact}
        clip[bounds[ratio]] = offset[bounds[ratio]]
    inputs = LossInputs(
        logprobs=tensor([[math.log(ratio)]]).requires_grad_(),
        rollout_logprobs=tensor([[0.0]]),
        advantages=tensor([advantage]),
        loss_mask=torch.ones(1, 1, dtype=torch.bool),
    )
    expected = -advantage * exact if is_active else 0.0
    assert gradient(inputs, variant("bypass_token", **clip)).item() == expected


def test_clip_fractions_count_each_side():
    # Ratios 2, .5, 4 with clip 0.2 / 0.28 and c = 3; two tokens in a masked tail would be clipped.
    log = [math.log(r) for r in (2.0, 0.5, 4.0, 1.0, 9.0)]
    mask = torch.tensor([[True] * 4 + [False]] * 2)
    inputs = inputs_of([log, log], [1, -1], mask)
    _, metrics = policy_loss(inputs, variant("bypass_token", dual_clip=3.0))
    assert metrics["loss/clip_fraction_high"].item() == 2 / 8  # A > 0: ratios 2 and 4
    assert metrics["loss/clip_fraction_low"].item() == 1 / 8  # A < 0: ratio .5
    assert metrics["loss/clip_fraction_dual"].item() == 1 / 8  # A < 0: ratio 4
    assert metrics["loss/clip_fraction"].item() == 4 / 8


@pytest.mark.parametrize("sign", [1, -1])
def test_an_extreme_ratio_is_clamped_and_counted(sign):
    inputs = inputs_of([[sign * 500.0, sign * 500.0]], [1])
    unclipped = variant("bypass_sequence", clip_low=1.0, clip_high=1e30)
    loss, metrics = policy_loss(inputs, unclipped)
    assert loss.item() == pytest.approx(-math.exp(sign * 20))
    assert metrics["loss/clamped_fraction"].item() == 1
    assert torch.equal(gradient(inputs, unclipped), torch.zeros(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_batch_without_loss_tokens_is_zero(name):
    inputs = golden()
    none = torch.zeros_like(inputs.loss_mask)
    read = {"selected": none, "entropy": none.double(), "reference_logprobs": none.double()}
    inputs = replace(inputs, loss_mask=none, **read)
    assert value(inputs, ALGORITHMS[name]) == 0
    assert torch.equal(gradient(inputs, ALGORITHMS[name]), torch.zeros(2, 4, dtype=torch.float64))


def test_reinforce_is_minus_advantage_times_logprob_with_its_weight():
    reinforce = variant("tis_token", surrogate="reinforce")
    weights = tensor([[1.1618342427, 0.9048374180, 0, 2.0], [2.0, 1.5683121855, 0, 0]])
    expected = -weights * tensor([[1.0], [-1.0]]) / 5
    torch.testing.assert_close(gradient(golden(), reinforce), expected, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- corrections: what is rejected


def test_rejected_tokens_leave_the_denominator_only_with_kept():
    everyone = corrected("mis_token", low=0.5, high=2.0)  # rejects 2 of the 5 tokens
    kept = corrected("mis_token", low=0.5, high=2.0, normalise="kept")
    assert value(golden(), kept) == pytest.approx(value(golden(), everyone) * 5 / 3)
    assert [count.item() for count in loss_counts(golden(), everyone)[:2]] == [5, 2]
    assert [count.item() for count in loss_counts(golden(), kept)[:2]] == [3, 2]
    for algorithm in (everyone, kept):
        assert policy_loss(golden(), algorithm)[1]["loss/rejected_tokens"].item() == 2


def test_a_rejected_sequence_leaves_the_count_of_sequences():
    kept = corrected("mis_sequence", low=0.0, high=3.0, normalise="kept")  # rejects the second
    assert [count.item() for count in loss_counts(golden(), kept)[:2]] == [3, 1]


@pytest.mark.parametrize(("bound", "rejected"), [("low", 2), ("high", 2)])
def test_the_window_includes_its_bounds(bound, rejected):
    inputs = replace(golden(), loss_mask=torch.tensor([[True] + [False] * 3] * 2))
    assert inputs.proximal_logprobs is not None
    weights = (inputs.proximal_logprobs - inputs.rollout_logprobs)[:, 0].exp().tolist()
    exact = {"low": min(weights), "high": max(weights)}
    _, metrics = policy_loss(inputs, corrected("icepop", **exact))
    assert metrics["loss/rejected_tokens"].item() == 0
    beyond = {"low": {"low": max(weights) + 1e-9}, "high": {"high": min(weights) - 1e-9}}[bound]
    _, metrics = policy_loss(inputs, corrected("icepop", **{"low": 0.0, "high": 9.0} | beyond))
    assert metrics["loss/rejected_tokens"].item() == rejected


def test_a_turn_level_correction_weighs_by_turn():
    # Log weights: .15 and -.1 in turn 0 and .8 in turn 1; in the second sequence .9 and .45.
    turn = corrected("tis_token", level="turn", high=1e30)
    turn = turn.model_copy(update={"surrogate": "reinforce"})
    w = [[math.exp(0.05)] * 2 + [0, math.exp(0.8)], [math.exp(1.35)] * 2 + [0, 0]]
    expected = -tensor(w) * tensor([[1.0], [-1.0]]) / 5
    torch.testing.assert_close(gradient(golden(), turn), expected)


# Log ratios of proximal over rollout: .15, -.1, (masked), .8 | .9, .45.
WINDOWS = [
    (RejectionConfig(low=0.95, high=1.6), [[1, 0, 0, 0], [0, 1, 0, 0]]),
    (RejectionConfig(level="sequence", high=3.0), [[1, 1, 0, 1], [0, 0, 0, 0]]),
    (RejectionConfig(level="sequence_geometric", low=1.5), [[0, 0, 0, 0], [1, 1, 0, 0]]),
    (RejectionConfig(level="turn", high=2.0), [[1, 1, 0, 0], [0, 0, 0, 0]]),
    (RejectionConfig(level="turn_geometric", high=1.2), [[1, 1, 0, 0], [0, 0, 0, 0]]),
    (RejectionConfig(veto=0.95), [[0, 0, 0, 0], [1, 1, 0, 0]]),
    (RejectionConfig(level="sequence", high=3.0, veto=0.95), [[0, 0, 0, 0], [0, 0, 0, 0]]),
]


@pytest.mark.parametrize(("rejection", "kept"), WINDOWS)
def test_what_a_window_or_a_veto_rejects_has_no_gradient(rejection, kept):
    reinforce = variant("bypass_token", surrogate="reinforce", rejection=rejection)
    expected = -tensor(kept) * tensor([[1.0], [-1.0]]) / max(1, sum(map(sum, kept)))
    torch.testing.assert_close(gradient(golden(), reinforce), expected)
    _, metrics = policy_loss(golden(), reinforce)
    assert metrics["loss/rejected_tokens"].item() == 5 - sum(map(sum, kept))


def test_what_is_rejected_is_counted_where_that_is_asked_for():
    window = RejectionConfig(low=0.95, high=1.6, normalise="all")  # rejects 3 of the 5 tokens
    everyone, kept = (
        variant("grpo", rejection=window.model_copy(update={"normalise": name}))
        for name in ("all", "kept")
    )
    assert value(golden(), kept) == pytest.approx(value(golden(), everyone) * 5 / 2)
    assert [count.item() for count in loss_counts(golden(), everyone)[:2]] == [5, 2]
    assert [count.item() for count in loss_counts(golden(), kept)[:2]] == [2, 2]


def test_a_rejection_goes_with_a_weight_and_with_alp():
    tis = CorrectionConfig(type="tis", high=2.0)
    both = variant("alp_token", correction=tis, rejection=RejectionConfig(veto=0.95))
    both = both.model_copy(update={"surrogate": "reinforce"})
    w = [[0, 0, 0, 0], [2.0, math.exp(0.45), 0, 0]]
    torch.testing.assert_close(gradient(golden(), both), -tensor(w) * tensor([[1.0], [-1.0]]) / 2)


def test_weights_carry_no_gradient():
    inputs = golden()
    assert inputs.proximal_logprobs is not None
    proximal = inputs.proximal_logprobs.clone().requires_grad_()
    inputs = replace(inputs, proximal_logprobs=proximal)
    correction = CorrectionConfig(type="tis", high=9.0)
    policy_loss(inputs, variant("bypass_token", correction=correction))[0].backward()
    assert proximal.grad is None


# ------------------------------------------------------------------------- KL, and what is missing


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", lambda d: -d), ("k2", lambda d: d * d / 2), ("k3", lambda d: math.exp(d) - d - 1)],
)
def test_kl_to_the_reference(estimator, expected):
    inputs = inputs_of([[0.0, 0.0, 0.0]], [0])
    reference = inputs.rollout_logprobs.detach() + tensor([[0.5, -0.3, NAN]])
    mask = torch.tensor([[True, True, False]])
    inputs = replace(inputs, reference_logprobs=reference, loss_mask=mask)
    kl = KLConfig(estimator=estimator, coefficient=0.1)
    loss, metrics = policy_loss(inputs, variant("bypass_token", kl=kl))
    mean = (expected(0.5) + expected(-0.3)) / 2
    assert metrics["kl/reference"].item() == pytest.approx(mean)
    assert loss.item() == pytest.approx(0.1 * mean)


def test_the_gradient_of_k2_is_on_average_that_of_the_distance():
    """Sum over a whole vocabulary, weighted by probability, instead of sampling."""
    logits = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    reference = tensor([0.3, -1.0, 0.5, 0.0, 0.2, -0.4, 1.0]).log_softmax(-1)
    current = logits.log_softmax(-1)
    (true,) = torch.autograd.grad((current.exp() * (current - reference)).sum(), logits)

    def mean_gradient(kl: KLConfig) -> torch.Tensor:
        logprobs = logits.log_softmax(-1)
        losses = [
            policy_loss(
                LossInputs(
                    logprobs=logprobs[word].view(1, 1),
                    rollout_logprobs=logprobs[word].detach().view(1, 1),
                    advantages=tensor([0.0]),
                    loss_mask=torch.ones(1, 1, dtype=torch.bool),
                    reference_logprobs=reference[word].view(1, 1),
                ),
                variant("bypass_token", kl=kl),
            )[0]
            for word in range(7)
        ]
        mean = (logprobs.detach().exp() * torch.stack(losses)).sum()
        return torch.autograd.grad(mean, logits)[0]

    for estimator in ("k1", "k2", "k3"):
        found = mean_gradient(KLConfig(estimator=estimator, gradient="k2", coefficient=1.0))
        torch.testing.assert_close(found, true)
    own = mean_gradient(KLConfig(estimator="k1", coefficient=1.0))
    torch.testing.assert_close(own, torch.zeros_like(own))  # the mean gradient of k1 is 0


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        (ALGORITHMS["grpo"], "proximal_logprobs"),
        (ALGORITHMS["tis_token"], "proximal_logprobs"),
        (variant("bypass_token", rejection=RejectionConfig(veto=0.5)), "proximal_logprobs"),
        (variant("bypass_token", kl=KLConfig()), "reference_logprobs"),
        (variant("bypass_token", ratio_level="turn"), "turn_ids"),
    ],
)
def test_a_missing_input_is_named(algorithm, name):
    inputs = replace(golden(), proximal_logprobs=None, turn_ids=None)
    with pytest.raises(ValueError, match=name):
        policy_loss(inputs, algorithm)
