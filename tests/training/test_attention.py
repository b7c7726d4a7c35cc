"""Packed attention against that of transformers, one sequence at a time, for common decoders."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tir_alp.training.attention import PACKED, PackedSequences
from tir_alp.training.policy import hidden_states

torch.set_num_threads(1)

VOCABULARY = 64
LENGTHS = (5, 1, 17, 3)
DECODERS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma": {},
    "gpt_neox": {},
    "qwen2 with shared keys": {"num_key_value_heads": 2},
    "qwen2 with a window in one layer": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
}


def make_config(name: str) -> Any:
    architecture = name.split()[0]
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }
    if architecture != "gpt_neox":
        sizes |= {"num_key_value_heads": 4, "head_dim": 8}
    return CONFIG_MAPPING[architecture](**sizes | DECODERS[name])


def twins(config: Any) -> tuple[Any, Any]:
    """Return the same weights twice: with packed attention, and as transformers runs them."""
    torch.manual_seed(0)
    # A model writes the name of its attention into its config: each model needs its own config.
    packed = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=PACKED)
    with torch.no_grad():  # the attention of fresh weights is nearly uniform
        for parameter in packed.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    eager = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="eager")
    eager.load_state_dict(packed.state_dict())
    return packed.eval(), eager.eval()


def packed_tokens(lengths=LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (sum(lengths),), generator=generator)
    return ids, torch.cat([torch.arange(length) for length in lengths])


@torch.no_grad()
def run_packed(model: Any, ids: torch.Tensor, positions: torch.Tensor, lengths) -> torch.Tensor:
    return hidden_states(model, ids, positions, PackedSequences(lengths))


@pytest.mark.parametrize("name", DECODERS)
def test_packed_hidden_states_are_those_of_each_sequence_alone(name):
    packed, eager = twins(make_config(name))
    ids, positions = packed_tokens()
    with torch.no_grad():
        alone = [
            eager.base_model(input_ids=each[None], use_cache=False).last_hidden_state[0]
            for each in ids.split(LENGTHS)
        ]
    hidden = run_packed(packed, ids, positions, LENGTHS)
    torch.testing.assert_close(hidden, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_a_window_does_hide_tokens():
    """Otherwise the comparison with Mistral above would hold for full attention as well."""
    config = make_config("mistral")
    windowed, _ = twins(config)
    config.sliding_window = None
    full, _ = twins(config)
    ids, positions = packed_tokens()
    one, other = (run_packed(model, ids, positions, LENGTHS) for model in (windowed, full))
    assert torch.allclose(one[:6], other[:6], atol=1e-6)
    assert not torch.allclose(one[6 + 9 : 6 + 17], other[6 + 9 : 6 + 17], atol=1e-3)


def test_a_sequence_does_not_see_its_neighbours():
    packed, _ = twins(make_config("llama"))
    ids, positions = packed_tokens()
    changed = ids.clone()
    changed[6:23] = (changed[6:23] + 1) % VOCABULARY
    one, other = (run_packed(packed, each, positions, LENGTHS) for each in (ids, changed))
    assert torch.equal(one[:6], other[:6]) and torch.equal(one[23:], other[23:])
    assert not torch.allclose(one[6:23], other[6:23])


def test_a_token_does_not_see_its_future():
    packed, _ = twins(make_config("llama"))
    ids, positions = packed_tokens((6,))
    changed = ids.clone()
    changed[4] = (changed[4] + 1) % VOCABULARY
    one, other = (run_packed(packed, each, positions, (6,)) for each in (ids, changed))
    assert torch.equal(one[:4], other[:4])
    assert not torch.allclose(one[4:], other[4:])


def test_rows_and_back():
    layout = PackedSequences((2, 1, 3))
    packed = torch.arange(1, 7)
    rows = layout.to_rows(packed)
    assert rows.shape == (3, 3)
    assert rows[0, :2].tolist() == [1, 2] and rows[1, :1].tolist() == [3]
    assert rows[2].tolist() == [4, 5, 6]
    assert layout.to_packed(rows).tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("gemma2", {"attn_logit_softcapping": 50.0}), ("llama", {"attention_dropout": 0.1})],
)
def test_attention_of_another_kind_is_refused(architecture, settings):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCABULARY}
    config = CONFIG_MAPPING[architecture](**sizes, **heads, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED).train()
    with pytest.raises(ValueError, match="which packed attention does not support"):
        run_packed(model, *packed_tokens(), LENGTHS)
