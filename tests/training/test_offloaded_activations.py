"""The inputs of recomputed layers wait in CPU memory, and nothing else changes."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.training.families import make_model
from tests.training.harness import (
    assert_same,
    flat,
    gradients,
    make_groups,
    model,
    noisy,
    trainer,
    weights_of,
)
from tir_alp.config import TrainerConfig
from tir_alp.training.attention import PackedSequences
from tir_alp.training.batch import collate
from tir_alp.training.policy import PolicyLogprobs, hidden_states, recompute_layers

RECOMPUTED: dict[str, Any] = {"gradient_checkpointing": True}


class Copies(TorchFunctionMode):
    """Counts copies into other memory, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            self.shapes[tuple(args[0].shape)] += 1
        return func(*args, **(kwargs or {}))


def forward(of: Any) -> tuple[Copies, torch.Tensor]:
    batch = collate(flat(make_groups(2)))
    with Copies() as copies:
        logprobs, _ = PolicyLogprobs(of, 64)(batch, temperature=1.0)
    logprobs.sum().backward()
    return copies, batch.token_ids


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3_text", "deepseek_v3"])
def test_of_each_layer_the_input_is_kept_elsewhere_and_nothing_more(name: str):
    of = make_model(name).train()
    recompute_layers(of, offload=True)
    copies, token_ids = forward(of)
    state = (1, len(token_ids), 48)
    assert copies.shapes == {state: 4}


def test_without_it_nothing_is_copied():
    of = model().train()
    recompute_layers(of)
    assert forward(of)[0].shapes == {}


def test_steps_are_the_same_bit_for_bit():
    one, other = (
        trainer(noisy(), offload_activations=is_offloaded, **RECOMPUTED)
        for is_offloaded in (False, True)
    )
    for step in range(2):
        metrics, expected = (each.step(make_groups(), step).metrics for each in (other, one))
        assert metrics == expected
    assert_same(gradients(other), gradients(one))
    assert_same(weights_of(other), weights_of(one))


def test_it_needs_recomputation():
    with pytest.raises(ValueError, match=r"set trainer\.gradient_checkpointing = true as well"):
        TrainerConfig(offload_activations=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_keeps_less_between_forward_and_backward():
    kept = []
    for is_offloaded in (False, True):
        of = make_model("llama").to("cuda").train()
        recompute_layers(of, offload=is_offloaded)
        ids = torch.arange(6, 262, device="cuda").repeat(64)
        before = torch.cuda.memory_allocated()
        layout = PackedSequences((256,) * 64, "cuda")
        hidden = hidden_states(of, ids, torch.arange(256, device="cuda").repeat(64), layout)
        kept.append(torch.cuda.memory_allocated() - before)
        hidden.sum().backward()
    state = 4 * 48 * 64 * 256
    assert kept[0] - kept[1] > 3 * state
