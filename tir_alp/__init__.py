"""tir_alp: reinforcement learning of language models that use tools, stable off-policy."""

__version__ = "0.2.0"
