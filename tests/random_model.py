"""A small random model with a tokenizer of choice, for runs that only have to be exact."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig


def save_random_model(tokenizer: Any, folder: Path, most_tokens: int) -> Path:
    """Save a model of two layers, always the same for a tokenizer, and the tokenizer.

    Args:
        tokenizer: Its words are those of the model.
        folder: Where they are saved.
        most_tokens: Length of the longest sequence, in tokens.

    Returns:
        The folder.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=most_tokens,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
