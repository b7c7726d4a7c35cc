"""Small random models of many families of decoders, as `load_policy` would arrange them.

    python -m tests.training.families

prints the table of docs/models.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tir_alp.engines.embedded.own_caches import measure_reading
from tir_alp.training.arrangement import can_switch, is_packed
from tir_alp.training.attention import IN_ROWS, PACKED
from tir_alp.training.policy import arrange

VOCABULARY = 272

_SIZES: Mapping[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "sliding_window": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_embd": 48,
    "n_layer": 4,
    "n_head": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 24,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_d_ssm": 96,
}
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {},
    "mistral": {},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "mixtral": {},
    "phi3": {},
    "glm4": {},
    "glm4_moe": {"n_group": 1, "topk_group": 1},
    "smollm3": {},
    "granite": {"logits_scaling": 4.0},
    "cohere2": _WINDOWS,
    "olmo3": _WINDOWS,
    "exaone4": _WINDOWS,
    "gemma3_text": _WINDOWS,
    "gemma4_text": {
        **_WINDOWS,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 12,
    },
    "deepseek_v3": _LATENT,
    "gemma2": {**_WINDOWS, "attn_logit_softcapping": 0.5},
    "gpt_oss": _WINDOWS,
    "qwen3_next": _DELTA,
    "qwen3_5_text": _DELTA,
    "olmo_hybrid": _DELTA,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "falcon_h1": _MAMBA,
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "nemotron_h": {
        "layer_types": ["mamba", "attention", "mlp", "mamba"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 24,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
    "stablelm": {"partial_rotary_factor": 0.5},
    "bloom": {"hidden_size": 48},
}
"""Model type -> what differs from the sizes above."""


def make_config(name: str) -> Any:
    """Return the config of a small model of a family."""
    default = CONFIG_MAPPING[name]()
    sizes = {key: value for key, value in _SIZES.items() if hasattr(default, key)}
    return type(default)(**{**sizes, **FAMILIES[name]})


def make_model(name: str, seed: int = 0) -> Any:
    """Return a small random model of a family, arranged."""
    config = make_config(name)
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)
    if not can_switch(model):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # the attention of fresh weights is nearly uniform
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    model.eval()
    arrange(model, name)
    return model


def arrangement(model: Any) -> str:
    """Say how the sequences of a model share a forward."""
    if is_packed(model):
        return "packed"
    own = model.config._attn_implementation != IN_ROWS
    return "in rows, with its own attention" if own else "in rows"


def table() -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| family (`model_type`) | layers | sequences share a forward | embedded engine |"
    yield "|---|---|---|---|"
    for name in FAMILIES:
        model = make_model(name)
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"]
        words = ", ".join(dict.fromkeys(kind.replace("_", " ") for kind in kinds))
        how = arrangement(model)
        reading = "in one batch" if is_packed(model) else measure_reading(model)
        yield f"| `{name}` | {words} | {how} | {reading} |"


if __name__ == "__main__":
    print("\n".join(table()))
