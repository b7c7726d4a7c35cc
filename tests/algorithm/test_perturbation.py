"""The noise inside real (tiny) models of every common architecture."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError

from tests.algorithm.harness import (
    ARCHITECTURES,
    HIDDEN,
    KEYS,
    LENGTHS,
    Block,
    Stack,
    assert_same,
    batch,
    gradient_of,
    logprobs,
    noise,
    perturbed,
    step,
    tiny,
)
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.algorithm.sites import find_decoder_layers

# ------------------------------------------------------------------------------- off is exactly off


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_alp_without_noise_is_bypass_bit_for_bit(architecture, level):
    model = tiny(architecture)
    bypass = step(model, ALGORITHMS[f"bypass_{level}"])
    off = perturbed(model, init_std=0.0)
    assert_same(step(model, ALGORITHMS[f"alp_{level}"], off), bypass)
    assert off.sigma.tolist() == [0.0, 0.0] and not off.log_sigma.requires_grad
    with off.active(KEYS, LENGTHS):
        assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outside_the_context_the_model_is_itself(architecture):
    model, (ids, _) = tiny(architecture), batch()
    with torch.no_grad():
        clean = logprobs(model, ids)
        p = perturbed(model)
        assert torch.equal(logprobs(model, ids), clean)
        with p.active(KEYS, LENGTHS):
            assert not torch.allclose(logprobs(model, ids), clean)
        assert torch.equal(logprobs(model, ids), clean)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_are_gone_after_an_exception():
    p = perturbed(model := tiny())
    with pytest.raises(KeyError), p.active(KEYS, LENGTHS):
        raise KeyError
    assert not any(module._forward_pre_hooks for module in model.modules())
    with p.active(KEYS, LENGTHS):
        pass


def test_log_sigma_is_not_part_of_the_model():
    p = perturbed(model := tiny(), init_std=0.02)
    with p.active(KEYS, LENGTHS):
        names = {*model.state_dict()} | {name for name, _ in model.named_parameters()}
    assert names == {*tiny().state_dict()} | {name for name, _ in tiny().named_parameters()}
    assert p.log_sigma.dtype == torch.float32
    assert p.log_sigma.tolist() == pytest.approx([math.log(0.02)] * 2)


# ------------------------------------------------------------------------ the same noise everywhere


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("learnable", [True, False])
def test_gradient_checkpointing_changes_nothing(architecture, learnable):
    model = tiny(architecture)
    plain = step(model, ALGORITHMS["alp_sequence"], perturbed(model, learnable=learnable))
    model.gradient_checkpointing_enable()
    p = perturbed(model, learnable=learnable)
    assert_same(step(model, ALGORITHMS["alp_sequence"], p), plain)
    assert ("log_sigma" in plain[1]) == learnable


@pytest.mark.parametrize("learnable", [True, False])
def test_checkpointed_backward_outside_the_context_is_an_error(learnable):
    model, (ids, _) = tiny(), batch()
    model.gradient_checkpointing_enable()
    p = perturbed(model, learnable=learnable)
    with p.active(KEYS, LENGTHS):
        loss = logprobs(model, ids).sum()
    with pytest.raises(CheckpointError):
        loss.backward()


def test_backward_outside_the_context_is_fine_without_checkpointing():
    model, (ids, _) = tiny(), batch()
    gradients = []
    for is_inside in (True, False):
        p = perturbed(model)
        with p.active(KEYS, LENGTHS):
            loss = logprobs(model, ids).sum()
            if is_inside:
                loss.backward()
        if not is_inside:
            loss.backward()
        gradients.append(gradient_of(p))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("hidden_size", [32, 7])
def test_a_token_has_one_noise_in_every_layout(hidden_size):
    alone = [
        noise([key], [n], torch.zeros(1, n, hidden_size))[0]
        for key, n in zip(KEYS, LENGTHS, strict=True)
    ]
    packed = noise(KEYS, LENGTHS, torch.zeros(1, 15, hidden_size))[0].split(LENGTHS)
    right = noise(KEYS, LENGTHS, torch.zeros(3, 9, hidden_size))
    left = noise(KEYS, LENGTHS, torch.zeros(3, 9, hidden_size), side="left")
    backwards = noise(KEYS[::-1], LENGTHS[::-1], torch.zeros(3, 9, hidden_size)).flip(0)
    for row, n in enumerate(LENGTHS):
        assert torch.equal(packed[row], alone[row])
        assert torch.equal(right[row, :n], alone[row])
        assert torch.equal(left[row, 9 - n :], alone[row])
        assert torch.equal(backwards[row, :n], alone[row])
        assert not right[row, n:].any() and not left[row, : 9 - n].any()


def test_noise_does_not_depend_on_how_much_is_made_at_once():
    hidden = torch.tensor([1.0, 3.0]).repeat_interleave(6000)[None, :, None].expand(1, -1, 40)
    for scale in ("absolute", "relative"):  # 12 000 tokens are many chunks
        long = noise([KEYS[0], KEYS[1]], [5, 11_995], hidden, scale=scale)
        alone = noise([KEYS[1]], [11_995], hidden[:, 5:], scale=scale)
        assert torch.equal(long[:, 5:], alone)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sequence_alone_has_the_logprobs_it_has_in_a_batch(architecture):
    model, (ids, _) = tiny(architecture), batch()
    p = perturbed(model)
    with torch.no_grad():
        with p.active(KEYS, LENGTHS):
            together = logprobs(model, ids)
        for row, n in enumerate(LENGTHS):
            with p.active([KEYS[row]], [n]):
                alone = logprobs(model, ids[row : row + 1, :n])
            torch.testing.assert_close(together[row, : n - 1], alone[0], atol=2e-5, rtol=0)


def test_packed_equals_padded_in_a_model_with_noise_on():
    model, (ids, mask) = tiny("llama"), batch()
    positions = torch.arange(ids.shape[1]).expand_as(ids)[mask]
    sequence = torch.arange(3)[:, None].expand_as(ids)[mask]
    is_own = (sequence[:, None] == sequence) & (positions[:, None] >= positions)
    p = perturbed(model)
    with torch.no_grad(), p.active(KEYS, LENGTHS):
        padded = model(input_ids=ids, use_cache=False).logits[mask]
        packed = model(
            input_ids=ids[mask][None],
            position_ids=positions[None],
            attention_mask=is_own[None, None],
            use_cache=False,
        ).logits[0]
    torch.testing.assert_close(packed, padded, atol=2e-5, rtol=0)


def test_a_hidden_state_passed_by_name_is_perturbed_too():
    p, hidden = perturbed(model := Stack(), init_std=1.0), torch.zeros(1, 5, HIDDEN)
    with p.active(KEYS[:1], [5]):
        assert torch.equal(model(hidden, by_name=True), model(hidden))


# ------------------------------------------------------------- finding the layers, and wrong calls


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoder_layers_are_found_in_every_architecture(architecture):
    layers = find_decoder_layers(tiny(architecture, num_layers=3))
    assert len(layers) == 3
    assert type(layers[0]).__name__.endswith(("DecoderLayer", "GPTNeoXLayer", "GPT2Block"))


def test_decoder_layers_are_found_inside_wrappers_and_not_among_experts():
    class Mixture(Block):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))

    model = Stack(3)
    model.layers = nn.ModuleList(Mixture() for _ in range(3))
    model.heads = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert find_decoder_layers(nn.Sequential(nn.Sequential(model))) is model.layers


def test_wrong_calls_say_what_is_wrong():
    p = perturbed(model := Stack(2))
    with p.active(KEYS, LENGTHS):
        with pytest.raises(RuntimeError, match="does not nest"), p.active(KEYS, LENGTHS):
            pass
        with pytest.raises(ValueError, match=r"3 rows of 6 tokens .* \[5, 3, 7\]"):
            model(torch.zeros(3, 6, 8))
        with pytest.raises(ValueError, match=r"1 rows of 14 tokens .* \[5, 3, 7\]"):
            model(torch.zeros(1, 14, 8))
    with pytest.raises(ValueError, match="2 noise keys for 3 lengths"), p.active(KEYS[:2], LENGTHS):
        pass
    with pytest.raises(ValueError, match="same noise key"), p.active([KEYS[0]] * 3, LENGTHS):
        pass
    with pytest.raises(ValueError, match=r"layers \[1, 3\) of a model with 2 layers"):
        perturbed(model, layers=(1, 3))
    with pytest.raises(ValueError, match="Linear has no"):
        perturbed(nn.Linear(2, 2))
