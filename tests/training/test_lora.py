"""Adapters are trained, and no code outside of the trainer sees them."""

import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.training.harness import (
    assert_same,
    flat,
    make_groups,
    model,
    noisy,
    saved,
    trainer,
    weights_of,
)
from tir_alp.config import LoraConfig
from tir_alp.training.batch import pack
from tir_alp.training.lora import Adapters
from tir_alp.training.policy import PolicyLogprobs, load_policy

SETTINGS = {"lora": {"rank": 4, "alpha": 8.0}, "lr": 1e-2}


def test_adapters_begin_as_no_change_and_then_move_the_linear_layers_alone():
    one, before = trainer(noisy(), **SETTINGS), model().state_dict()
    assert_same(weights_of(one), before)
    one.step(make_groups(), 0)
    after = weights_of(one)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith("proj.weight")}


def test_what_is_saved_and_given_to_an_engine_is_the_policy_that_is_trained(tmp_path):
    import peft

    one, groups = trainer(noisy(), **SETTINGS), make_groups()
    for step in range(2):
        one.step(groups, step)
    path, weights = saved(one, tmp_path), weights_of(one)
    exported = load_policy(str(path))
    assert_same(weights, exported.state_dict())
    adapted = peft.PeftModel.from_pretrained(model(), str(path / "adapters"))
    torch.testing.assert_close(dict(adapted.merge_and_unload().state_dict()), weights)  # type: ignore[operator]
    (batch,) = pack(flat(groups), 10_000)
    with torch.no_grad():
        of_exported, of_trained = (
            policy(batch, temperature=1.0)[0]
            for policy in (PolicyLogprobs(exported, chunk_tokens=100), one._forwards.policy)
        )
    torch.testing.assert_close(of_exported, of_trained, rtol=0, atol=1e-4)


def test_layers_whose_weights_are_transposed_are_merged_as_peft_merges_them():
    sizes = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, eos_token_id=1)
    of = GPT2LMHeadModel(sizes)
    adapters = Adapters(of, LoraConfig(rank=2), torch.float32)
    for name, each in of.named_parameters():
        if "lora_B" in name:
            each.data.normal_()
    merged = dict(adapters.merged(iter(of.state_dict().items())))
    expected = adapters._peft.merge_and_unload().state_dict()  # pyright: ignore
    torch.testing.assert_close(merged, dict(expected))


def test_frozen_weights_are_kept_in_the_compute_dtype_and_adapters_in_float32():
    one = trainer(noisy(), dtype="bfloat16", **SETTINGS)
    frozen = {each.dtype for each in one.model.parameters() if not each.requires_grad}
    trained = {each.dtype for each in one.model.parameters() if each.requires_grad}
    assert (frozen, trained) == ({torch.bfloat16}, {torch.float32})


def test_without_peft_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'tir_alp\[lora\]'"):
        trainer(noisy(), **SETTINGS)
