"""The folders of the models: a random Qwen3 of 3.4 M parameters, and SmolLM2-135M.

Both get a chat template that shows a tool's result and that TRL accepts for tools; the template of
SmolLM2 has no tools. Both sides read the same folder.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.training.policy import load_tokenizer

TEMPLATE = (
    "{% for message in messages %}START{{ message.role }}SPACE{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}{% endfor %}END{% endfor %}"
    "{% if add_generation_prompt %}STARTassistantSPACE{% endif %}"
)


def template(start: str, space: str, end: str) -> str:
    """Return a chat template with the marks of a model."""
    return TEMPLATE.replace("START", start).replace("SPACE", space).replace("END", end)


def write_tiny(folder: Path) -> Path:
    """Write the random Qwen3, with one token per byte."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template("<|", "|>", "<|end|>")
    tokenizer.model_max_length = 4096
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=832,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        ),
        dtype=torch.float32,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def link_smollm2(source: Path, folder: Path) -> Path:
    """Make a folder with the weights of SmolLM2 and another chat template."""
    folder.mkdir()
    for file in source.iterdir():
        if not file.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            (folder / file.name).symlink_to(file.resolve())
    tokenizer = load_tokenizer(str(source))
    tokenizer.chat_template = template("<|im_start|>", "\n", "<|im_end|>\n")
    tokenizer.save_pretrained(folder)
    return folder
