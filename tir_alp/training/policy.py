"""The policy: a Hugging Face causal LM that is used for token logprobs.

Logits over the vocabulary are never in memory for a whole batch of tokens: they are computed for
one chunk of tokens at a time, and again in the backward pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from tir_alp.algorithm.sites import find_decoder_layers
from tir_alp.training.arrangement import (
    SPELLED_OUT,
    TOLERANCE,
    can_switch,
    difference,
    is_packed,
    spelled_out,
)
from tir_alp.training.attention import IN_ROWS, PACKED, Layout, PackedSequences
from tir_alp.training.batch import loss_positions, to_rows
from tir_alp.training.model_folder import (
    check_tokenizer_files,
    first_line,
    unknown_architecture,
)
from tir_alp.training.ranks import Ranks
from tir_alp.training.sequence_parallel import DividedLayout, TokenShare, joined
from tir_alp.training.shared_prompts import SharedPrompts, computed_tokens, shared_prompts
from tir_alp.training.structure import local_path
from tir_alp.types import Batch

WRAPPER = "_checkpoint_wrapped_module."
"""Prefix that `recompute_layers` adds to names of parameters, but not to keys of a state dict."""


_TITLES = {
    PACKED: "packed",
    IN_ROWS: "in rows",
    SPELLED_OUT: "in rows, with the attention of the model's authors",
}


def compute_device(name: str) -> torch.device:
    """Return the device for "cpu", "cuda" or "auto", which means a GPU if there is one.

    Raises:
        ValueError: If the name is "cuda" and torch finds no GPU.
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
    """Load a causal LM in float32, with sequences packed or in rows as `arrangement` measures.

    Args:
        path: Folder or Hugging Face id.
        device: Device of the model; everything that is computed with it runs there.

    Raises:
        ValueError: If there is no such model, or no way to train it exactly.
    """
    path = local_path(path)
    model = _load(path, PACKED)
    if model is None or not can_switch(model):
        model = _load(path, SPELLED_OUT)
        assert model is not None  # every family has this one
    model = model.to(device).eval()
    arrange(model, path)
    return model


def arrange(model: Any, name: str) -> None:
    """Let a model pack its sequences if that is exact, else give them rows if that is.

    Args:
        model: A causal LM in float32, which has its weights.
        name: What an error calls it.

    Raises:
        ValueError: If neither is exact.
    """

    def together(sequences: list[Tensor]) -> Tensor:
        layout = PackedSequences(tuple(map(len, sequences)), model.device)
        positions = torch.cat([torch.arange(len(each)) for each in sequences]).to(model.device)
        hidden = hidden_states(model, torch.cat(sequences), positions, layout)
        return next_token_logits(model, hidden[-len(sequences[-1]) :])

    def alone(sequences: list[Tensor]) -> Tensor:
        (ids,) = sequences
        with spelled_out(model):
            return model(input_ids=ids[None], use_cache=False).logits[0].float()

    reasons = []
    for attention in (PACKED, IN_ROWS, SPELLED_OUT) if is_packed(model) else (SPELLED_OUT,):
        try:
            model.set_attn_implementation(attention)
            found = difference(model, together, alone)
        except Exception as error:  # code of any model, with arguments that it may not know
            reason = f"its forward fails ({type(error).__name__}: {first_line(error)})"
        else:
            if found <= TOLERANCE:
                return
            reason = f"a sequence in company changes its logits by {found:.1e}"
        reasons.append(f"{_TITLES[attention]}: {reason}")
    raise ValueError(
        f"the model {name!r} ({type(model).__name__}) cannot be trained exactly, because its "
        f"sequences cannot share a forward ({'; '.join(reasons)}). Take a decoder of another "
        "family: docs/models.md"
    )


def _load(path: str, attention: str) -> Any | None:
    """Return the model with an attention, or None if its family has no such one."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=attention
        )
    except KeyError as error:  # it looks the attention up in a table of its own
        if error.args != (PACKED,):
            raise
        return None
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot load the weights of the model {path!r}: {first_line(error)} Copy or download "
            "the files again"
        ) from error
    except ValueError as error:
        raise ValueError(unknown_architecture(path, error)) from error


@torch.no_grad()
def cast_parameters(model: Any, dtype: torch.dtype) -> None:
    """Convert the parameters of a model, and no buffers.

    Rotary frequencies are buffers. Rounded to bfloat16, they would turn position 1,000 by up to a
    radian too far; and a trainer that casts its parameters for a forward has them in float32.
    """
    for each in model.parameters():
        each.data = each.data.to(dtype)


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer of a model, given by folder or Hugging Face id.

    Raises:
        ValueError: If it cannot be loaded.
    """
    path = local_path(path)
    if Path(path).is_dir():
        check_tokenizer_files(Path(path))
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer of {path!r}: {first_line(error)}") from error


class _OffloadedLayer(CheckpointWrapper):
    """A layer that is recomputed, whose input waits in CPU memory for the backward pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Of what a recomputed function is given, only positional tensors can be saved elsewhere.
        if "hidden_states" in kwargs:
            args = (kwargs.pop("hidden_states"), *args)
        with save_on_cpu(pin_memory=True):
            return super().forward(*args, **kwargs)


def recompute_layers(model: Any, *, offload: bool = False) -> None:
    """Keep only the input of each decoder layer, and recompute its inside in backward.

    Each layer is wrapped once; the keys of the state dict stay the same. The switch in transformers
    recomputes inside of each layer, so hooks on the layer run a second time as well: noise that a
    hook adds would be generated three times instead of twice, and the states without noise would be
    kept although nothing needs them again.

    Args:
        model: A causal LM.
        offload: Whether the inputs are kept in CPU memory. They are copied while the next layers
            compute.
    """
    layers = find_decoder_layers(model)
    for index, layer in enumerate(layers):
        if not isinstance(layer, CheckpointWrapper):
            layers[index] = _OffloadedLayer(layer) if offload else checkpoint_wrapper(layer)


def hidden_states(model: Any, token_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
    """Run the decoder over packed tokens.

    Args:
        model: A causal LM loaded by `load_policy`.
        token_ids: [N] tokens of all sequences, one sequence after the other.
        position_ids: [N] position of each token in its own sequence.
        layout: Which tokens attend to which; `PackedSequences` if the model is not packed.

    Returns:
        [N, H] hidden states of the last layer, after the final norm.
    """
    decoder = model.get_decoder()
    if not is_packed(model):
        assert isinstance(layout, PackedSequences)
        rows = decoder(input_ids=layout.to_rows(token_ids), use_cache=False)
        return layout.to_packed(rows.last_hidden_state)
    return decoder(
        input_ids=token_ids.unsqueeze(0),
        position_ids=position_ids.unsqueeze(0),
        use_cache=False,
        layout=layout,
    ).last_hidden_state.squeeze(0)


def next_token_logits(model: Any, hidden: Tensor) -> Tensor:
    """Return logits [..., V] in float32 for the token after each hidden state [..., H]."""
    return _scaled(model.get_output_embeddings()(hidden).float(), model.config)


def _scaled(logits: Tensor, config: Any) -> Tensor:
    """Apply what some families do to their logits: a factor, a divisor, or a soft cap."""
    text = config.get_text_config()
    if (factor := getattr(text, "logit_scale", None)) is not None:  # Cohere
        logits = logits * factor
    if (divisor := getattr(text, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (cap := getattr(text, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = cap * torch.tanh(logits / cap)
    return logits


def token_logprobs(
    model: Any,
    hidden: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 2048,
    rows: Tensor | None = None,
    entropy_has_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the logprob of each token given the hidden state before it, and the entropy.

    Args:
        model: A causal LM.
        hidden: [M, H] hidden states that predict the tokens.
        token_ids: [M] tokens that are predicted.
        temperature: Temperature of the sampled distribution; logits are divided by it.
        chunk_tokens: Number of tokens whose logits are in memory at a time.
        rows: [M] positions of the states among the packed tokens; only for a head with noise.
        entropy_has_gradient: Whether the entropies carry a gradient.

    Returns:
        Logprobs [M] and entropies [M], float32, in nats.
    """
    head = model.get_output_embeddings()
    states, ids = hidden.split(chunk_tokens), token_ids.split(chunk_tokens)
    keywords = [{}] * len(ids) if rows is None else [{"rows": r} for r in rows.split(chunk_tokens)]
    chunks = [
        checkpoint(
            _chunk_logprobs,
            *(head, model.config, *chunk, temperature, entropy_has_gradient),
            use_reentrant=False,
        )
        for chunk in zip(states, ids, keywords, strict=True)
    ]
    return torch.cat([chunk[0] for chunk in chunks]), torch.cat([chunk[1] for chunk in chunks])


@torch.no_grad()
def completion_logprobs(
    model: Any, token_ids: Tensor, num_prompt: int, temperature: float, top_p: float
) -> Tensor:
    """Compute the logprobs [T] of a completion in one forward.

    The distribution has a temperature and is truncated to `top_p`. Rounding can put a sampled token
    just outside of it; such a token is treated as its least likely member.

    Args:
        model: A causal LM.
        token_ids: [num_prompt + T] tokens of prompt and completion.
        num_prompt: Number of tokens of the prompt.
        temperature: Temperature of the distribution.
        top_p: The distribution holds the most probable tokens that together reach this mass.
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
    config: Any,
    hidden: Tensor,
    token_ids: Tensor,
    keywords: dict[str, Tensor],
    temperature: float,
    entropy_has_gradient: bool,
) -> tuple[Tensor, Tensor]:
    logits = _scaled(head(hidden, **keywords).float(), config)
    logprobs = torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
    chosen = logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    # Last, so that an entropy without gradient is not computed again in the backward pass.
    with torch.set_grad_enabled(entropy_has_gradient and torch.is_grad_enabled()):
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return chosen, entropy


@torch.no_grad()
def token_collisions(
    model: Any, hidden: Tensor, *, temperature: float = 1.0, chunk_tokens: int = 2048
) -> Tensor:
    """Return sum_v pi_v^2 [M] of the distribution after each hidden state [M, H], float32."""
    head = model.get_output_embeddings()
    chunks = []
    for states in hidden.split(chunk_tokens):
        logits = _scaled(head(states).float(), model.config)
        chunks.append(torch.softmax(logits / temperature, dim=-1).square().sum(-1))
    return torch.cat(chunks)


class PolicyLogprobs(nn.Module):
    """A causal LM as one module that maps a micro-batch to logprobs, as FSDP2 needs it.

    Args:
        model: A model loaded by `load_policy`; its embeddings and its head belong to the forward.
        chunk_tokens: Number of tokens whose logits are in memory at a time.
        team: The ranks that share each forward; None: this rank computes it alone.
    """

    def __init__(self, model: Any, chunk_tokens: int, team: Ranks | None = None) -> None:
        super().__init__()
        self.model, self._chunk_tokens, self._team = model, chunk_tokens, team

    def forward(
        self,
        batch: Batch,
        *,
        temperature: float,
        is_head_noisy: bool = False,
        entropy_has_gradient: bool = False,
        with_collisions: bool = False,
    ) -> tuple[Tensor, ...]:
        """Compute logprobs and entropies [B, T] of the loss tokens, 0 elsewhere; float32, in nats.

        Args:
            batch: A micro-batch, on the device of the model.
            temperature: Temperature of the sampled distribution.
            is_head_noisy: Whether noise is added to the logits.
            entropy_has_gradient: Whether the entropies carry a gradient.
            with_collisions: Whether to return sum_v pi_v^2 as well.
        """
        positions = loss_positions(batch)
        number = len(positions)
        hidden, own = self._hidden_states(batch, positions - 1)
        if own is not None:
            positions = positions[own]
        logprobs, entropy = token_logprobs(
            self.model,
            hidden,
            batch.token_ids[positions],
            temperature=temperature,
            chunk_tokens=self._chunk_tokens,
            rows=positions - 1 if is_head_noisy else None,
            entropy_has_gradient=entropy_has_gradient,
        )
        found = [logprobs, entropy]
        if with_collisions:
            keywords = {"temperature": temperature, "chunk_tokens": self._chunk_tokens}
            found.append(token_collisions(self.model, hidden, **keywords))
        if own is not None:
            assert self._team is not None
            found = joined(found, own, number, self._team)
        return tuple(to_rows(batch, each) for each in found)

    def tokens_in_forward(self, batch: Batch) -> Tensor | None:
        """Return the positions [M] of the tokens that a forward of this rank computes.

        They are positions among the packed tokens; None: it computes all of them.
        """
        computed = computed_tokens(batch)
        if self._team is None:
            return computed
        if computed is None:
            computed = torch.arange(len(batch.token_ids), device=batch.token_ids.device)
        return TokenShare.of(len(computed), self._team).own(computed)

    def _hidden_states(self, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the last hidden states of some of the packed tokens, given by position [M].

        Returns:
            The states [K, H] of those that this rank computes, and which of the M they are; None:
            all.
        """
        prompts = shared_prompts(batch)
        token_ids, position_ids = batch.token_ids, batch.position_ids
        layout: Layout
        if prompts is None:
            layout = PackedSequences(batch.lengths, token_ids.device)
        else:
            layout = shared = SharedPrompts(batch, prompts)
            token_ids, position_ids = token_ids[shared.computed], position_ids[shared.computed]
            positions = shared.place[positions]
        own = None
        if self._team is not None:
            share = TokenShare.of(len(token_ids), self._team)
            token_ids, position_ids = share.own(token_ids), share.own(position_ids)
            own, positions = share.find(positions)
            layout = DividedLayout(layout, share)
        hidden = hidden_states(self.model, token_ids, position_ids, layout)
        return hidden.index_select(0, positions), own

    def completion_logprobs(
        self, token_ids: Tensor, num_prompt: int, temperature: float, top_p: float
    ) -> Tensor:
        """As `policy.completion_logprobs`."""
        return completion_logprobs(self.model, token_ids, num_prompt, temperature, top_p)
