"""The noise itself: its streams, its distribution, its scale, its gradient, its other sites."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.algorithm.harness import (
    ARCHITECTURES,
    HIDDEN,
    KEYS,
    LENGTHS,
    Stack,
    batch,
    gradient_of,
    noise,
    perturbed,
    tiny,
)
from tir_alp.algorithm.perturbation import NoiseKey
from tir_alp.algorithm.presets import PerturbationConfig
from tir_alp.algorithm.sites import find_decoder_layers

# ---------------------------------------------------------------------- different noise elsewhere


def test_every_seed_update_sequence_and_layer_has_its_own_stream():
    hidden = torch.zeros(1, 200, HIDDEN)
    streams = [
        noise([NoiseKey(update, uid)], [200], hidden, (layer, layer + 1), 3, seed=seed).flatten()
        for seed, update, uid, layer in itertools.product((0, 1), (0, 1), (0, 1, 2), (0, 1, 2))
    ]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert correlation.abs().max() < 5 / math.sqrt(streams[0].numel())


def test_uids_and_updates_beyond_32_bits_are_told_apart():
    hidden = torch.zeros(1, 4, HIDDEN)
    first, *others = (
        noise([NoiseKey(update, uid)], [4], hidden)
        for update, uid in ((1, 1), (1, 1 + 2**32), (1 + 2**32, 1), (1, 1 + 2**64))
    )
    assert not any(torch.equal(first, other) for other in others)


def test_positions_and_channels_are_uncorrelated():
    eps = noise([NoiseKey(0, uid) for uid in range(400)], [40] * 400, torch.zeros(400, 40, HIDDEN))
    assert (torch.corrcoef(eps[:, :, 0].T) - torch.eye(40)).abs().max() < 0.25
    assert (torch.corrcoef(eps.reshape(-1, HIDDEN).T) - torch.eye(HIDDEN)).abs().max() < 0.04
    # neighbours in every direction, as one number each with a standard error of 1 / 700
    for a, b in ((eps[1:], eps[:-1]), (eps[:, 1:], eps[:, :-1]), (eps[..., 1:], eps[..., :-1])):
        assert abs((a * b).mean()) < 5 / math.sqrt(a.numel())


def test_noise_is_standard_normal():
    eps = noise([NoiseKey(0, 0)], [40_000], torch.zeros(1, 40_000, HIDDEN)).double().flatten()
    n = eps.numel()
    assert abs(eps.mean()) < 4 / math.sqrt(n)
    assert abs(eps.square().mean() - 1) < 4 * math.sqrt(2 / n)
    assert abs(eps.pow(3).mean()) < 4 * math.sqrt(15 / n)
    assert abs(eps.pow(4).mean() - 3) < 4 * math.sqrt(96 / n) + 2e-3  # quantiles end at 4.3
    cdf = (torch.special.ndtr(eps.sort().values) - (torch.arange(n) + 0.5) / n).abs().max()
    assert cdf < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, p = 0.001


def test_the_two_channels_that_share_16_bits_are_independent():
    eps = noise([NoiseKey(0, 0)], [40_000], torch.zeros(1, 40_000, HIDDEN)).double()[0]
    x, y = eps[:, 0::2].flatten(), eps[:, 1::2].flatten()
    n = x.numel()
    assert abs((x * y).mean()) < 4 / math.sqrt(n)
    assert abs((x.square() * y.square()).mean() - 1) < 4 * math.sqrt(8 / n) + 3e-3
    for angle in (0.3, 0.785, 1.1, 1.9, 2.356, 2.8):  # every combination of them is Gaussian too
        both = (math.cos(angle) * x + math.sin(angle) * y).sort().values
        cdf = (torch.special.ndtr(both) - (torch.arange(n) + 0.5) / n).abs().max()
        assert cdf < 1.95 / math.sqrt(n) + 6e-4, angle


# --------------------------------------------------------------------------------- sigma and scale


def test_noise_stands_on_the_residual_stream_of_real_layers():
    model = tiny("llama", num_layers=1)
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            nn.init.zeros_(parameter)  # both branches add 0: the layer is its residual
    seen = {}
    layer = find_decoder_layers(model)[0]
    layer.register_forward_hook(lambda _, args, out: seen.update(out=out))
    ids, _ = batch([7])
    with torch.no_grad(), perturbed(model, init_std=0.3).active(KEYS[:1], [7]):
        model(input_ids=ids, use_cache=False)
    out = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
    expected = 0.3 * noise(KEYS[:1], [7], torch.zeros(1, 7, HIDDEN))
    torch.testing.assert_close(out - model.get_input_embeddings()(ids), expected, atol=1e-6, rtol=0)


def test_relative_sigma_is_in_units_of_the_rms_of_each_token():
    hidden = torch.tensor([1.0, 10.0, 100.0])[None, :, None] * torch.ones(1, 3, HIDDEN)
    relative = noise(KEYS[:1], [3], hidden, scale="relative")
    torch.testing.assert_close(relative, hidden * noise(KEYS[:1], [3], torch.zeros_like(hidden)))
    padded = torch.cat([hidden, torch.full((1, 2, HIDDEN), 7.0)], dim=1)
    assert not noise(KEYS[:1], [3], padded, scale="relative")[:, 3:].any()


def test_layers_are_a_half_open_range():
    p = perturbed(model := tiny(num_layers=4), layers=(1, 3))
    with p.active(KEYS, LENGTHS):
        hooked = [bool(layer._forward_pre_hooks) for layer in find_decoder_layers(model)]
    assert hooked == [False, True, True, False]
    assert p.log_sigma.shape == (2,)
    one = noise(KEYS[:1], [5], torch.zeros(1, 5, 8), layers=(1, 2), num_layers=3)
    all_three = [noise(KEYS[:1], [5], torch.zeros(1, 5, 8), (i, i + 1), 3) for i in range(3)]
    assert torch.equal(one, all_three[1])
    torch.testing.assert_close(noise(KEYS[:1], [5], torch.zeros(1, 5, 8), None, 3), sum(all_three))


@pytest.mark.parametrize("scale", ["absolute", "relative"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_gradient_of_log_sigma_in_float64(scale, side):
    # Autograd, the formula of equation (6), and central differences with the noise held fixed.
    torch.manual_seed(0)
    model, weight = Stack(2).double(), torch.randn(8, 8, dtype=torch.float64)
    hidden = torch.randn(2, 5, 8, dtype=torch.float64)
    p = perturbed(model, init_std=0.3, scale=scale)
    p.log_sigma.data = p.log_sigma.data.double() + torch.tensor([0.1, -0.2], dtype=torch.float64)

    def loss() -> torch.Tensor:
        with p.active(KEYS[:2], [5, 3], padding_side=side):
            return (model(hidden) @ weight).tanh().square().sum()

    loss().backward()
    gradient = gradient_of(p)
    for layer in range(2):
        sides = []
        for shift in (1e-5, -1e-5):
            p.log_sigma.data[layer] += shift
            sides.append(loss().item())
            p.log_sigma.data[layer] -= shift
        expected = (sides[0] - sides[1]) / 2e-5
        if scale == "absolute" or layer == 1:  # the unit of layer 1 is detached from layer 0
            assert gradient[layer].item() == pytest.approx(expected, rel=1e-6)


def test_gradient_of_log_sigma_in_a_model_equals_finite_differences():
    model, (ids, mask) = tiny("gpt2").double(), batch()  # RMSNorms round to float32 inside
    p = perturbed(model)
    p.log_sigma.data = p.log_sigma.data.double()

    def loss() -> torch.Tensor:
        with p.active(KEYS, LENGTHS):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            picked = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            return picked[mask[:, 1:]].square().sum()

    loss().backward()
    for layer, gradient in enumerate(gradient_of(p).tolist()):
        sides = []
        for shift in (1e-5, -1e-5):
            p.log_sigma.data[layer] += shift
            sides.append(loss().item())
            p.log_sigma.data[layer] -= shift
        assert gradient == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-6)


def test_stein_the_mean_gradient_is_sigma_squared_times_the_curvature():
    # L = h'Hh/2 summed over tokens: E[dL/dlog_sigma] = sigma^2 tr H per token, equation (7).
    sigma, num_tokens, size = 0.3, 100_000, 6
    torch.manual_seed(0)
    factor = torch.randn(size, size)
    hessian = factor @ factor.T / size
    p = perturbed(model := Stack(), init_std=sigma)
    with p.active([NoiseKey(0, 0)], [num_tokens]):
        out = model(torch.zeros(1, num_tokens, size))
        (0.5 * ((out @ hessian) * out).sum()).backward()
    expected = sigma**2 * hessian.trace().item()
    error = sigma**2 * math.sqrt(2 * hessian.square().sum().item() / num_tokens)
    assert abs(gradient_of(p).item() / num_tokens - expected) < 4 * error
    p.log_sigma.grad = None
    with p.active([NoiseKey(0, 1)], [num_tokens]):
        (model(torch.zeros(1, num_tokens, size)) * factor[0]).sum().backward()
    error = sigma * factor[0].norm().item() / math.sqrt(num_tokens)
    assert abs(gradient_of(p).item() / num_tokens) < 4 * error


# ----------------------------------------------------------------------- what bf16 leaves of it


@pytest.mark.parametrize(
    ("std", "sigma", "percent"),
    [
        (1, 1e-6, 0.02), (1, 1e-5, 0.24), (1, 1e-4, 2.35), (1, 1e-3, 22), (1, 1e-2, 82.5),
        (0.02, 1e-8, 0.01), (0.02, 1e-6, 1.2), (0.02, 1e-5, 11.7), (0.02, 1e-4, 68),
        (10, 1e-5, 0.02), (10, 1e-4, 0.23), (10, 1e-3, 2.4), (10, 1e-2, 22.5),
    ],
)  # fmt: skip
def test_share_of_bf16_elements_that_the_noise_changes(std, sigma, percent):
    torch.manual_seed(0)
    num_tokens, size = 256, 1024  # the number of tokens that an effect measures
    hidden = (std * torch.randn(1, num_tokens, size)).bfloat16()
    p = perturbed(model := Stack(), init_std=sigma)
    with p.active([NoiseKey(0, 0)], [num_tokens], measure=True) as effect:
        out = model(hidden)
    share = effect.changed["0"].item()
    assert share == pytest.approx((out != hidden).double().mean().item(), rel=1e-6)
    # The values were computed with a rounded std, and have two or three digits.
    error = 4 * math.sqrt(share / (num_tokens * size))
    assert share == pytest.approx(percent / 100, rel=0.06, abs=error + 6e-5)


def test_effect_measures_tokens_and_not_padding():
    hidden = torch.full((2, 6, HIDDEN), 2.0)
    p = perturbed(model := Stack(2), init_std=0.1)
    with p.active(KEYS[:2], [6, 3], measure=True) as effect:
        model(hidden)
    assert [effect.changed[layer].item() for layer in ("0", "1")] == [1.0, 1.0]
    assert effect.relative["0"].item() == pytest.approx(0.05, rel=0.1)
    assert effect.metrics() == {
        "alp/effective": 1.0,
        "alp/relative_rms": pytest.approx(0.05, rel=0.1),
        "alp/relative_rms_0": pytest.approx(0.05, rel=0.1),
        "alp/relative_rms_1": pytest.approx(0.05, rel=0.1),
    }
    with p.active(KEYS[:2], [6, 3]) as effect:
        model(hidden)
    assert effect.metrics() == {}


def test_bf16_noise_is_the_float32_noise_rounded_once():
    hidden = torch.randn(1, 5, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    eps = noise(KEYS[:1], [5], torch.zeros(1, 5, HIDDEN))
    p = perturbed(model := Stack(), init_std=0.1)
    with p.active(KEYS[:1], [5]):
        expected = (hidden.float() + p.sigma * eps).bfloat16()
        torch.testing.assert_close(model(hidden), expected, rtol=0, atol=0)


# ------------------------------------------------------------------- other sites, and several draws


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_noise_on_the_logits_is_on_the_logits_alone(architecture):
    model, (ids, mask) = tiny(architecture).eval(), batch()
    p = perturbed(model, site="logits")
    assert (p.names, p.log_sigma.shape) == (["logits"], (1,))
    with torch.no_grad():
        clean = logits_of(model, ids)
        with p.active(KEYS, LENGTHS, measure=True) as effect:
            shift = logits_of(model, ids) - clean
        assert torch.equal(logits_of(model, ids), clean)
    assert shift[mask].std().item() == pytest.approx(0.1, rel=0.1)
    assert not shift[~mask].any()
    assert effect.metrics()["alp/relative_rms_logits"] > 0


def test_logits_of_chosen_tokens_get_the_noise_of_those_tokens():
    model, (ids, mask) = tiny().eval(), batch()
    p, head = perturbed(model, site="logits"), model.get_output_embeddings()
    with torch.no_grad(), p.active(KEYS, LENGTHS):
        whole = logits_of(model, ids)[mask]
        hidden = model.base_model(ids, use_cache=False).last_hidden_state[mask]
        rows = torch.tensor([14, 0, 6, 7])
        chosen = head(hidden[rows], rows=rows)
        with pytest.raises(ValueError, match=r"head\(hidden, rows=...\)"):
            head(hidden[rows])
    torch.testing.assert_close(chosen, whole[rows], rtol=0, atol=1e-5)
    with pytest.raises(TypeError):  # without noise the head does not take rows
        head(hidden[rows], rows=rows)


def test_a_logits_sigma_of_zero_is_off():
    model, (ids, _) = tiny().eval(), batch()
    p = perturbed(model, site="logits", init_std=0.0)
    with torch.no_grad():
        clean = logits_of(model, ids)
        with p.active(KEYS, LENGTHS):
            assert torch.equal(logits_of(model, ids), clean)


def test_gradient_of_the_logits_sigma_equals_finite_differences():
    model, (ids, _) = tiny().double(), batch()
    p = perturbed(model, site="logits")
    p.log_sigma = nn.Parameter(p.log_sigma.double())

    def loss() -> torch.Tensor:
        with p.active(KEYS, LENGTHS):
            return logits_of(model, ids).log_softmax(-1).square().mean()

    loss().backward()
    step = 1e-5
    with torch.no_grad():
        p.log_sigma.add_(step)
        above = loss()
        p.log_sigma.sub_(2 * step)
        below = loss()
    assert gradient_of(p).item() == pytest.approx((above - below).item() / (2 * step), rel=1e-6)


def drawn(draw: int, **config) -> torch.Tensor:
    p = perturbed(model := Stack(), init_std=1.0, **config)
    with p.active(KEYS, LENGTHS, draw=draw), torch.no_grad():
        return model(torch.zeros(1, sum(LENGTHS), HIDDEN))


def test_draws_of_an_update_are_independent():
    first, second = drawn(0, draws=2), drawn(1, draws=2)
    assert torch.equal(first, drawn(0))  # the number of draws does not change the first
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert abs(correlation.item()) < 4 / math.sqrt(first.numel())


def test_antithetic_draws_are_pairs_of_opposites():
    config = {"draws": 4, "antithetic": True}
    draws = [drawn(draw, **config) for draw in range(4)]
    assert torch.equal(draws[1], -draws[0])
    assert torch.equal(draws[3], -draws[2])
    assert not torch.equal(draws[2].abs(), draws[0].abs())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"draws": 3, "antithetic": True}, "come in pairs, but draws is 3"),
        ({"site": "logits", "layers": (0, 1)}, "no meaning with site 'logits'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        PerturbationConfig.model_validate(config)
