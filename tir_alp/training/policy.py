"""The policy: a Hugging Face causal LM, as token logprobs.

The product of the vocabulary and a whole batch of tokens never stands in memory: logits are made a
chunk of tokens at a time, and again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from tir_alp.algorithm.sites import find_decoder_layers
from tir_alp.training.attention import PACKED, Layout, PackedSequences
from tir_alp.training.batch import loss_positions, to_rows
from tir_alp.training.structure import check_folder
from tir_alp.types import Batch

WRAPPER = "_checkpoint_wrapped_module."
"""What `recompute_layers` adds to the names of parameters, though not to those of a state dict."""

_CHANGED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def compute_device(name: str) -> torch.device:
    """The device that a config names: "cpu", "cuda", or "auto", which is a GPU where there is one.

    Raises:
        ValueError: If it is to be a GPU, and torch sees none.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs"
        raise ValueError(
            f'trainer.device = "cuda", but torch {torch.__version__} ({build}) sees no GPU here: '
            "see that nvidia-smi lists one and install a torch for its CUDA, or set trainer.device "
            'to "cpu"'
        )
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def load_policy(path: str, device: torch.device | str = "cpu") -> Any:
    """Load a causal LM with packed attention, in float32, by folder or Hugging Face id.

    Args:
        path: Folder or id.
        device: Where it is to stand. Whatever is computed with it follows it there.

    Raises:
        ValueError: If there is no such model, or it does something to its logits that we do not.
    """
    check_folder(path)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=PACKED
        )
    except OSError as error:
        raise ValueError(f"cannot load the model {path!r}: {error}") from error
    for name in _CHANGED_LOGITS:
        if getattr(model.config, name, None) not in (None, 1.0):
            raise ValueError(f"the model {path!r} sets {name}, which is not supported")
    return model.to(device)


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer of a model, by folder or Hugging Face id.

    Raises:
        ValueError: If there is none.
    """
    check_folder(path)
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer of {path!r}: {error}") from error


def recompute_layers(model: Any) -> None:
    """Keep only what enters each decoder layer, and compute its inside again in backward.

    The layers are wrapped, once, and the names of weights stay as they are. transformers' own
    switch does the same within each layer, so that a hook on a layer runs a second time too. Noise
    that is added by such a hook would be made three times instead of twice, and the states without
    it would be kept although nothing needs them again.
    """
    layers = find_decoder_layers(model)
    for index, layer in enumerate(layers):
        if not isinstance(layer, CheckpointWrapper):
            layers[index] = checkpoint_wrapper(layer)


def hidden_states(model: Any, token_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
    """Run the decoder over packed tokens.

    Args:
        model: A causal LM loaded with `attn_implementation=PACKED`.
        token_ids: [N] of all sequences behind one another.
        position_ids: [N] position of each token in its own sequence.
        layout: Which tokens attend to which.

    Returns:
        [N, H], of the last layer, after the final norm.
    """
    return model.base_model(
        input_ids=token_ids.unsqueeze(0),
        position_ids=position_ids.unsqueeze(0),
        use_cache=False,
        layout=layout,
    ).last_hidden_state.squeeze(0)


def next_token_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits [..., V] in float32 of the token behind each hidden state [..., H]."""
    return model.get_output_embeddings()(hidden).float()


def token_logprobs(
    model: Any,
    hidden: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 2048,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logprob of each token under the hidden state before it, and the entropy there, in nats.

    Args:
        model: A causal LM.
        hidden: [M, H] states that predict.
        token_ids: [M] tokens that are predicted.
        temperature: Of the sampled distribution; logits are divided by it.
        chunk_tokens: Logits stand for at most so many tokens at a time.
        rows: [M] places of the states among the packed tokens; only for a head with noise.

    Returns:
        Logprobs [M] and entropies [M], float32; the entropies carry no gradient.
    """
    head = model.get_output_embeddings()
    states, ids = hidden.split(chunk_tokens), token_ids.split(chunk_tokens)
    places = [{}] * len(ids) if rows is None else [{"rows": r} for r in rows.split(chunk_tokens)]
    parts = [
        checkpoint(_chunk_logprobs, head, *chunk, temperature, use_reentrant=False)
        for chunk in zip(states, ids, places, strict=True)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


@torch.no_grad()
def completion_logprobs(
    model: Any, token_ids: Tensor, num_prompt: int, temperature: float, top_p: float
) -> Tensor:
    """Logprobs [T] of a completion by one forward, at a temperature and truncated to `top_p`.

    A token that is outside of the truncated distribution, which rounding at its border may do, is
    taken for its least likely member.

    Args:
        model: A causal LM.
        token_ids: [num_prompt + T] of prompt and completion.
        num_prompt: Tokens of the prompt.
        temperature: Of the distribution.
        top_p: Only the most probable tokens that together reach it are in the distribution.
    """
    positions = torch.arange(len(token_ids), device=token_ids.device)
    layout = PackedSequences((len(token_ids),), token_ids.device)
    was_training = model.training
    model.eval()
    hidden = hidden_states(model, token_ids, positions, layout)
    model.train(was_training)
    logits = next_token_logits(model, hidden[num_prompt - 1 : -1])
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    chosen = logprobs.gather(-1, token_ids[num_prompt:, None]).squeeze(-1)
    if top_p < 1:
        ordered = logprobs.sort(dim=-1, descending=True).values.exp()
        kept = ordered * (ordered.cumsum(-1) - ordered < top_p)
        chosen = chosen - kept.sum(-1).log()
    return chosen.cpu()


def _chunk_logprobs(
    head: nn.Module,
    hidden: Tensor,
    token_ids: Tensor,
    place: dict[str, Tensor],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(head(hidden, **place).float() / temperature, dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1), entropy


class PolicyLogprobs(nn.Module):
    """A causal LM as one call from a micro-batch to logprobs: the unit that FSDP2 needs.

    Args:
        model: Loaded by `load_policy`; its embeddings and its head are used inside one forward.
        chunk_tokens: Logits stand for at most so many tokens at a time.
    """

    def __init__(self, model: Any, chunk_tokens: int) -> None:
        super().__init__()
        self.model, self._chunk_tokens = model, chunk_tokens

    def forward(
        self, batch: Batch, *, temperature: float, is_head_noisy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies [B, T] of the tokens of the loss, 0 elsewhere; float32.

        Args:
            batch: On the device of the model.
            temperature: Of the sampled distribution.
            is_head_noisy: Whether there is noise on the logits.
        """
        layout = PackedSequences(batch.lengths, batch.token_ids.device)
        hidden = hidden_states(self.model, batch.token_ids, batch.position_ids, layout)
        places = loss_positions(batch)
        logprobs, entropy = token_logprobs(
            self.model,
            hidden.index_select(0, places - 1),
            batch.token_ids[places],
            temperature=temperature,
            chunk_tokens=self._chunk_tokens,
            rows=places - 1 if is_head_noisy else None,
        )
        return to_rows(batch, logprobs), to_rows(batch, entropy)

    def completion_logprobs(
        self, token_ids: Tensor, num_prompt: int, temperature: float, top_p: float
    ) -> Tensor:
        """As `policy.completion_logprobs`."""
        return completion_logprobs(self.model, token_ids, num_prompt, temperature, top_p)
